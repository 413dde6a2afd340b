"""A stopped run resumes bit-exactly, and no fault loses what was reached."""

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_same_run, errors, files, read_board, read_rows

import acgan
from training.checkpoint import NEWEST, PREVIOUS, read_checkpoint

SMALL = ["--seed", 4, "--batch_size", 24, "--img_size", 16, "--log_interval", 1, "--sample_interval", 4]
STEPS, HALF = 30, 16  # three batches an epoch, the last of 12; HALF ends within the sixth epoch


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """The folder of a run of STEPS batches without interruption."""
    out_dir = tmp_path_factory.mktemp("straight")
    assert train(*SMALL, "--max_steps", STEPS, "--out_dir", out_dir).status == 0
    return out_dir


@pytest.fixture(scope="module")
def half(train, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("half")
    assert train(*SMALL, "--max_steps", HALF, "--checkpoint_interval", 7, "--out_dir", out_dir).status == 0
    return out_dir


@pytest.fixture
def copy(half, tmp_path):
    """A copy of that folder for one test to harm, or to continue in."""
    return shutil.copytree(half, tmp_path / "run")


def points(board, tag):
    return [(event.step, event.value) for event in board.Scalars(tag)]


@pytest.mark.parametrize("how", ["max_steps", signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_equals_straight(straight, start, train, copy, tmp_path, how):
    out_dir = copy
    if how != "max_steps":
        out_dir = tmp_path / "stopped"
        flags = [*SMALL, "--max_steps", STEPS, "--checkpoint_interval", 7, "--out_dir", out_dir]
        process = start(*flags, pause_at=HALF)
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate()
        assert process.returncode == (143 if how == signal.SIGTERM else -9), err
    step = read_checkpoint(out_dir)["step"]
    assert step == {"max_steps": HALF, signal.SIGTERM: HALF + 1, signal.SIGKILL: 14}[how]
    result = train("--resume", out_dir, "--max_steps", STEPS)
    assert result.status == 0 and f"Resuming after batch {step} of {STEPS}." in result.err, result.err
    assert_same_run(out_dir, straight)
    for image in (straight / "images").rglob("*.png"):
        assert (out_dir / image.relative_to(straight)).read_bytes() == image.read_bytes()
    ours, theirs = read_board(out_dir), read_board(straight)
    assert ours.Tags()["graph"] and len(theirs.Tags()["scalars"]) == 14
    for tag in theirs.Tags()["scalars"]:
        # the curves by epoch may hold a point twice, with the same value
        assert list(dict.fromkeys(points(ours, tag))) == points(theirs, tag), tag
    assert [event.step for event in ours.Images("fake_image")] == list(range(0, STEPS, 4))


def test_end_of_the_run_can_be_moved_and_an_end_reached_is_said(copy, train):
    line = errors(train("--resume", copy, "--n_epochs", 5))
    assert "16 batches are done: raise --n_epochs or --max_steps" in line
    assert train("--resume", copy, "--n_epochs", 7, "--log_interval", 2).status == 0
    assert read_checkpoint(copy)["step"] == 21
    assert [row["step"] for row in read_rows(copy)] == [*range(16), 16, 18, 20]


def test_another_interval_of_grids_is_allowed_and_said_to_change_the_draws(copy, train):
    result = train("--resume", copy, "--max_steps", HALF + 1, "--sample_interval", 3)
    assert result.status == 0 and "Another --sample_interval or --compile: the run resumes, but not bit-" in result.err
    assert "bit-exactly" not in train("--resume", copy, "--max_steps", HALF + 2).err


def fails(train, folder, *flags):
    """Run with `flags`, which must fail with one line and change no file; returns the line."""
    before = files(folder)
    line = errors(train(*flags))
    assert files(folder) == before
    return line


def test_flags_that_change_the_mathematics_are_refused_with_a_list(copy, train):
    line = fails(train, copy, "--resume", copy, "--lr", 0.1, "--batch_size", 24, "--b1", 0.9, "--seed", 5)
    assert "the checkpoint has --seed 4, not 5; --lr 0.0002, not 0.1; --b1 0.5, not 0.9: drop these" in line


def test_new_run_does_not_drop_an_unfinished_one(copy, train):
    packed = torch.load(copy / NEWEST, weights_only=True)
    torch.save(packed | {"finished": False}, copy / NEWEST)
    line = fails(train, copy, *SMALL, "--out_dir", copy)
    assert "unfinished run (batches done: 16)" in line and "add --resume to continue" in line


def test_moved_run_resumes_with_its_judge_and_current_folder(copy, straight, train, tmp_path, monkeypatch):
    moved = copy.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(moved)
    assert train("--resume", "--max_steps", STEPS).status == 0
    assert_same_run(moved, straight)


def test_run_resumes_from_a_checkout_that_was_moved(start, tmp_path):
    """With the default judge, whose place is the checkout's."""
    folders = ["data", "evaluation", "training", "tests", "weights"]
    parts = [path.name for path in ROOT.glob("*.py")] + folders
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / "here").mkdir(exist_ok=True)
        copy(ROOT / part, tmp_path / "here" / part)
    flags = ["--seed", 4, "--batch_size", 60, "--eval_interval", 1, "--device", "cpu"]
    for place, more in [("here", ["--n_epochs", 1]), ("there", ["--n_epochs", 2, "--resume"])]:
        script = [sys.executable, "tests/small.py", *(flags if place == "here" else flags[-4:]), *more]
        env = os.environ | {"DIGITS": "60"}
        result = subprocess.run([str(w) for w in script], cwd=tmp_path / place, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (tmp_path / "here").rename(tmp_path / "there") if place == "here" else None
    assert "Resuming after batch 1 of 2." in result.stderr and "After batch 2: agreement" in result.stderr
    assert [row["step"] for row in read_rows(tmp_path / "there") if "intra_fid" in row] == [0, 1]


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_files_that_are_no_checkpoint_get_one_line_and_run_nothing(copy, train):
    newest, marker = copy / NEWEST, copy.parent / "code was run"
    (copy / PREVIOUS).unlink()
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({"format": "acgan checkpoint 2", "code": RunsCode(str(marker))}, copy.parent / "malicious.pt")
    contents = {
        "empty": b"",
        "text": b"not a checkpoint",
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "weights": (copy / "acgan_gen.pth").read_bytes(),
        "malicious": (copy.parent / "malicious.pt").read_bytes(),
        "malicious pickle": pickle.dumps(RunsCode(str(marker))),
    }
    for kind, content in contents.items():
        newest.write_bytes(content)
        assert "is corrupt, or is not a checkpoint" in fails(train, copy, "--resume", copy), kind
        assert "unfinished run" in fails(train, copy, *SMALL, "--out_dir", copy), kind  # a new run keeps it
    assert not marker.exists()
    torch.save(torch.zeros(3), newest)
    assert "is corrupt, or is not a checkpoint" in fails(train, copy, "--resume", copy)
    torch.save({"format": "acgan checkpoint 1", "steps": 3}, newest)
    assert "is from an older version of this script" in fails(train, copy, "--resume", copy)


def moments(packed):
    return packed["parts"]["optimizer_G"]["state"]


CRAFTED = {
    "another shape": lambda packed: packed["options"].update(latent_dim=50),
    "moments of another size": lambda packed: moments(packed)[0].update(exp_avg=torch.zeros(3)),
    "no moments": lambda packed: moments(packed).clear(),
    "a step that is no number": lambda packed: moments(packed)[1].update(step=torch.tensor(float("nan"))),
    "position beyond NumPy's numbers": lambda packed: packed["random"]["numpy"]["rest"].__setitem__(1, 2**31 - 1),
    "NumPy's numbers all zero": lambda packed: packed["random"]["numpy"]["keys"].zero_(),
    "position beyond the epoch": lambda packed: packed["parts"]["batches"].update(position=7),
    "another position": lambda packed: packed["parts"]["batches"].update(position=2),
    "negative steps": lambda packed: packed.update(step=-3),
    "no seed": lambda packed: packed["options"].update(seed=None),
    "an option of another kind": lambda packed: packed["options"].update(lr="fast"),
    "an option out of its range": lambda packed: packed["options"].update(b1=7.0),
    "options that are none": lambda packed: packed.update(options=[1, 2]),
    "an option that is a tensor": lambda packed: packed["options"].update(world_size=torch.tensor([1, 2])),
    "a schedule without a length": lambda packed: packed["options"].update(lr_schedule="linear", schedule_steps=0),
    "no latent_dim": lambda packed: packed["options"].update(latent_dim=None),
    "finished in two ways": lambda packed: packed.update(finished=torch.tensor([1, 2])),
    "threads in two ways": lambda packed: packed["random"].update(threads=torch.tensor([1, 2])),
}


@pytest.mark.parametrize("harm", CRAFTED)
def test_checkpoint_that_contradicts_itself_is_refused(harm, copy, train):
    packed = torch.load(copy / NEWEST, weights_only=True)
    CRAFTED[harm](packed)
    torch.save(packed, copy / NEWEST)
    (copy / PREVIOUS).unlink()
    line = fails(train, copy, "--resume", copy, "--max_steps", STEPS)
    assert re.search("does not fit its options|is corrupt, (or|as)|argument --(lr|b1): '", line)


def test_previous_checkpoint_replaces_a_corrupt_newest(straight, copy, train):
    content = bytearray((copy / NEWEST).read_bytes())
    content[len(content) // 3] ^= 4
    (copy / NEWEST).write_bytes(content)
    result = train("--resume", copy, "--max_steps", STEPS)
    assert f"{NEWEST} is corrupt or missing: resuming from {PREVIOUS} instead.\n" in result.err
    assert_same_run(copy, straight)
    assert read_checkpoint(copy)["step"] == STEPS
    (copy / NEWEST).unlink()
    assert read_checkpoint(copy)["step"] < STEPS  # the corrupt one did not take its place


def test_moments_that_lie_otherwise_in_memory_than_their_parameters_do_no_harm(straight, copy, train):
    packed = torch.load(copy / NEWEST, weights_only=True)
    moments = [state[name] for state in packed["parts"]["optimizer_D"]["state"].values() for name in state]
    assert not all(moment.is_contiguous() for moment in moments)  # D's images lie channels last
    for state in packed["parts"]["optimizer_D"]["state"].values():
        state.update({name: value.contiguous() for name, value in state.items()})
    torch.save(packed, copy / NEWEST)
    assert train("--resume", copy, "--max_steps", STEPS).status == 0
    assert_same_run(copy, straight)


def test_moments_that_share_their_memory_are_given_their_own(copy, train, tmp_path):
    packed = torch.load(copy / NEWEST, weights_only=True)
    shape = moments(packed)[0]["exp_avg"].shape
    for name, zeros in (("shared", torch.zeros(1, 1).expand(shape)), ("own", torch.zeros(shape))):
        shutil.copytree(copy, tmp_path / name)
        moments(packed)[0]["exp_avg"] = zeros
        torch.save(packed, tmp_path / name / NEWEST)
        assert train("--resume", tmp_path / name, "--max_steps", STEPS).status == 0
    assert_same_run(tmp_path / "shared", tmp_path / "own")


def test_torchruns_restart_resumes_from_the_previous_checkpoint_alone(straight, copy, train, monkeypatch):
    (copy / NEWEST).unlink()  # as a kill between the two renames leaves it
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = train(*SMALL, "--max_steps", STEPS, "--out_dir", copy, "--init_from", straight)  # whatever began it
    assert result.status == 0, result.err
    assert_same_run(copy, straight)


def test_rows_that_were_cut_or_are_no_rows_do_no_harm(copy, straight, train):
    rows = (copy / "metrics.jsonl").read_bytes()
    (copy / "metrics.jsonl").write_bytes(rows[:-1])  # its last newline is lost
    assert train("--resume", copy, "--max_steps", HALF + 2).status == 0
    with open(copy / "metrics.jsonl", "a") as file:
        file.write("[" * 100_000 + "\n{}\n")
    assert train("--resume", copy, "--max_steps", STEPS).status == 0
    assert_same_run(copy, straight)


def test_divergence_keeps_the_last_good_checkpoint(copy, train, monkeypatch):
    good, train_step, calls = (copy / NEWEST).read_bytes(), acgan.train_step, []

    def diverging(*args):
        calls.append(1)
        metrics = train_step(*args)
        return metrics | {"g_loss": metrics["g_loss"] * float("nan")} if len(calls) == 5 else metrics

    monkeypatch.setattr(acgan, "train_step", diverging)
    result = train("--resume", copy, "--max_steps", STEPS)
    last = f"the last good checkpoint is {copy / NEWEST}, after batch 16"
    assert result.status == 1 and f"the loss is no longer finite at step 20; {last}\n" in result.err
    assert (copy / NEWEST).read_bytes() == good and read_rows(copy)[-1]["step"] == 19


def test_networks_that_are_not_finite_are_not_saved(copy, train, monkeypatch):
    train_step, weights = acgan.train_step, (copy / "acgan_gen.pth").read_bytes()

    def spoiling(generator, *args):
        metrics = train_step(generator, *args)
        generator.l1[0].bias.data[3] = float("inf")
        return metrics

    monkeypatch.setattr(acgan, "train_step", spoiling)
    result = train("--resume", copy, "--max_steps", 17)
    assert result.status == 1 and "the networks are no longer finite after batch 17; the last good" in result.err
    assert read_checkpoint(copy)["step"] == 16 and (copy / "acgan_gen.pth").read_bytes() == weights


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))  # of 9 MB that a checkpoint takes


def test_disk_that_cannot_take_a_checkpoint_keeps_the_earlier_one(copy, start, train):
    before = (copy / NEWEST).read_bytes()
    flags = ["--resume", copy, "--max_steps", 25, "--checkpoint_interval", 4]
    process = start(*flags, preexec_fn=small_files)
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    lines = [line.rpartition(":")[0] for line in err.splitlines() if line.startswith("Warning")]
    assert lines == [f"Warning: no checkpoint after batch {n} (File too large)" for n in (20, 24)]
    assert "acgan.py: error: cannot write" in err.splitlines()[-1]
    assert (copy / NEWEST).read_bytes() == before and not list(copy.rglob("*.part"))
    assert len(read_rows(copy)) == 25  # training reached its end, and its small files were written
    assert train("--resume", copy, "--max_steps", STEPS).status == 0


def test_lost_folder_and_unwritable_grids_do_not_end_training(start, tmp_path):
    out_dir = tmp_path / "run"
    flags = ["--max_steps", STEPS, "--checkpoint_interval", 20, "--out_dir", out_dir]
    process = start(*SMALL, *flags, pause_at=5)  # it would write while its folder is being removed
    shutil.rmtree(out_dir)
    out_dir.mkdir()
    (out_dir / "images").touch()  # a file where the grids' folder was
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err.count("Warning: cannot write sample grids") == 1 and "Traceback" not in err
    assert read_checkpoint(out_dir)["step"] == STEPS
