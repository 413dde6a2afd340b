"""A stopped run resumes bit-exactly, and no fault loses what was reached."""

import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_run, call, errors, files, read_board, read_rows

import acgan
import evaluate
import generate
from run import checkpoint
from run.checkpoint import NEWEST, PREVIOUS, random_state, read_checkpoint, restore_random_state
from run.trained import FILES, load_trained
from run.weights import NETWORKS, load_network

SMALL = ["--seed", 4, "--batch_size", 24, "--img_size", 16, "--latent_dim", 4, "--log_interval", 1,
         "--sample_interval", 4]  # fmt: skip
STEPS, HALF = 19, 10  # three batches an epoch, the last of 12; HALF ends within the fourth epoch


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


def in_batch(number, act, monkeypatch):
    """Call `act(metrics, *inputs)` after the update of the batch at hand once `number` updates were done before.

    What it returns, if anything, are the batch's metrics.
    """
    train_step, done = acgan.train_step, []

    def watched(*inputs):
        metrics = train_step(*inputs)
        done.append(1)
        return metrics if len(done) != number + 1 else act(metrics, *inputs) or metrics

    monkeypatch.setattr(acgan, "train_step", watched)


@pytest.mark.parametrize("how", ["max_steps", signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_equals_straight(straight, start, train, copy, tmp_path, monkeypatch, how):
    out_dir = copy
    flags = [*SMALL, "--max_steps", STEPS, "--checkpoint_interval", 7, "--out_dir", tmp_path / "stopped"]
    if how == signal.SIGTERM:
        out_dir = tmp_path / "stopped"
        with monkeypatch.context() as patch:
            in_batch(HALF, lambda *args: os.kill(os.getpid(), how), patch)
            assert train(*flags).status == 143
    elif how == signal.SIGKILL:
        out_dir = tmp_path / "stopped"
        process = start(*flags, pause_at=HALF)
        process.kill()
        assert process.wait() == -9
    step = read_checkpoint(out_dir)["step"]
    assert step == {"max_steps": HALF, signal.SIGTERM: HALF + 1, signal.SIGKILL: 7}[how]
    if how == signal.SIGKILL:  # it has left no weights
        shown = call(generate.main, "--weights", out_dir, "--out", tmp_path / "a.png", "--device", "cpu")
        assert shown.status == 0 and shown.err == f"Weights: {out_dir / NEWEST}, after batch 7\n"
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
    line = errors(train("--resume", copy, "--n_epochs", 3))
    assert f"{HALF} batches are done: raise --n_epochs or --max_steps" in line
    assert train("--resume", copy, "--n_epochs", 5, "--log_interval", 2).status == 0
    assert read_checkpoint(copy)["step"] == 15
    assert [row["step"] for row in read_rows(copy)] == [*range(HALF), 10, 12, 14]


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
    line = fails(train, copy, *SMALL, "--max_steps", 1, "--out_dir", copy)
    assert f"unfinished run (batches done: {HALF}): add --resume to continue, or name another folder" in line


def test_checkpoint_of_an_older_version_is_refused_with_what_to_do(copy, train):
    packed = torch.load(copy / NEWEST, weights_only=True)
    del packed["plan"]
    (copy / PREVIOUS).unlink()
    older = "is from an older version of this script: continue it with that version"
    new_run = [*SMALL, "--max_steps", 1, "--out_dir", copy]
    torch.save(packed | {"format": "acgan checkpoint 2", "finished": False}, copy / NEWEST)
    assert f"{older}, or begin a new run in another folder" in fails(train, copy, "--resume", copy)
    line = fails(train, copy, *new_run)
    assert f"unfinished run (batches done: {HALF}): it {older}, or name another folder" in line
    torch.save({"format": "acgan checkpoint 1", "steps": 3, "finished": False, "parts": {}}, copy / NEWEST)
    assert older in fails(train, copy, "--resume", copy)
    assert f"it {older}, or name another folder" in fails(train, copy, *new_run)

    torch.save(packed | {"format": "acgan checkpoint 2", "finished": True}, copy / NEWEST)
    assert older in fails(train, copy, "--resume", copy)
    result = train(*new_run)
    assert result.status == 0 and "The earlier run's files were moved to" in result.err
    (moved,) = (copy / "logs").glob(f"*/{NEWEST}")
    assert torch.load(moved, weights_only=True)["format"] == "acgan checkpoint 2"


def test_moved_run_resumes_with_its_judge_and_current_folder(copy, straight, train, tmp_path, monkeypatch):
    moved = copy.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(moved)
    assert train("--resume", "--max_steps", STEPS).status == 0
    assert_same_run(moved, straight)


def test_run_resumes_in_another_checkout(train, tmp_path):
    """With the default judge, whose place is the checkout's."""
    flags = ["--seed", 4, "--batch_size", 30, "--latent_dim", 4, "--eval_interval", 1, "--max_steps", 1]
    assert train(*flags, "--out_dir", tmp_path).status == 0
    for path in [*ROOT.glob("*.py"), ROOT / "tests" / "small.py", ROOT / "weights" / "judge.pth"]:
        there = tmp_path / path.relative_to(ROOT)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(path, there)
    for name in ("data", "evaluation", "fast", "run"):
        shutil.copytree(ROOT / name, tmp_path / name)
    command = [sys.executable, "tests/small.py", "--resume", "--n_epochs", "1", "--device", "cpu"]
    env = os.environ | {"DIGITS": "60"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Resuming after batch 1 of 2." in result.stderr and "After batch 2: agreement" in result.stderr
    assert [row["step"] for row in read_rows(tmp_path) if "intra_fid" in row] == [1]


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
    torch.save({"format": "acgan checkpoint 3", "code": RunsCode(str(marker))}, copy.parent / "malicious.pt")
    contents = {
        "empty": b"",
        "text": b"not a checkpoint",
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "weights": (copy / "acgan_gen.pth").read_bytes(),
        "malicious": (copy.parent / "malicious.pt").read_bytes(),
        "malicious pickle": pickle.dumps(RunsCode(str(marker))),
    }
    new_run = [*SMALL, "--max_steps", 1, "--out_dir", copy]  # which keeps it
    for kind, content in contents.items():
        newest.write_bytes(content)
        assert "is corrupt, or is not a checkpoint" in fails(train, copy, "--resume", copy), kind
        assert "unfinished run" in fails(train, copy, *new_run), kind
    assert not marker.exists()
    torch.save(torch.zeros(3), newest)
    assert "is corrupt, or is not a checkpoint" in fails(train, copy, "--resume", copy)


def moments(packed):
    return packed["parts"]["optimizer_G"]["state"]


CRAFTED = {
    "another shape": lambda packed: packed["options"].update(latent_dim=50),
    "moments of another size": lambda packed: moments(packed)[0].update(exp_avg=torch.zeros(3)),
    "Adam's steps in two ways": lambda packed: moments(packed)[1].update(step=torch.zeros(2)),
    "no moments": lambda packed: moments(packed).clear(),
    "position beyond NumPy's numbers": lambda packed: packed["random"]["numpy"]["rest"].__setitem__(1, 2**31 - 1),
    "NumPy's numbers too few": lambda packed: packed["random"]["numpy"].update(keys=torch.ones(3)),
    "threads in two ways": lambda packed: packed["random"].update(threads=torch.tensor([1, 2])),
    "position beyond the epoch": lambda packed: packed["parts"]["batches"].update(position=7),
    "negative steps": lambda packed: packed.update(step=-3),
    "an option of another kind": lambda packed: packed["options"].update(lr="fast"),
    "an option out of its range": lambda packed: packed["options"].update(b1=7.0),
    "an option that is a tensor": lambda packed: packed["options"].update(batch_size=torch.tensor([1, 2])),
    "options that are none": lambda packed: packed.update(options=[1, 2]),
    "no latent_dim": lambda packed: packed["options"].update(latent_dim=None),
    "no seed": lambda packed: packed["plan"].update(seed=None),
    "a plan that lacks something": lambda packed: packed["plan"].pop("total_steps"),
    "a plan that is a tensor": lambda packed: packed["plan"].update(world_size=torch.tensor([1, 2])),
    "a schedule without a length": lambda packed: (packed["options"].update(lr_schedule="linear"),
                                                   packed["plan"].update(schedule_steps=0)),
}  # fmt: skip


@pytest.mark.parametrize("harm", CRAFTED)
def test_checkpoint_that_contradicts_itself_is_refused(harm, copy, train):
    packed = torch.load(copy / NEWEST, weights_only=True)
    CRAFTED[harm](packed)
    torch.save(packed, copy / NEWEST)
    (copy / PREVIOUS).unlink()
    fails(train, copy, "--resume", copy, "--max_steps", STEPS)


def test_numpys_numbers_all_zero_are_refused_as_no_draw_from_them_ends():
    device = torch.device("cpu")
    state = random_state(device)
    state["numpy"]["keys"].zero_()
    try:
        with pytest.raises(ValueError, match="NumPy"):
            restore_random_state(state, device)
    finally:
        np.random.seed(0)


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


def test_newest_checkpoint_that_cannot_be_read_is_no_corrupt_one_and_stays(copy, train, monkeypatch):
    load_data = checkpoint.load_data

    def fails_once(path):
        if path.name == NEWEST:
            raise PermissionError(13, "Permission denied", str(path))
        return load_data(path)

    monkeypatch.setattr(checkpoint, "load_data", fails_once)
    line = fails(train, copy, "--resume", copy, "--max_steps", STEPS)
    assert f"cannot read '{copy / NEWEST}' (Permission denied): mend that, or move it away" in line


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
    copy.rename(tmp_path / "half")
    for name, zeros in (("shared", torch.zeros(1, 1).expand(shape)), ("own", torch.zeros(shape))):
        shutil.copytree(tmp_path / "half", tmp_path / name)
        moments(packed)[0]["exp_avg"] = zeros
        torch.save(packed, tmp_path / name / NEWEST)
        assert train("--resume", tmp_path / name, "--max_steps", HALF + 2).status == 0
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
    good = (copy / NEWEST).read_bytes()
    in_batch(2, lambda metrics, *inputs: metrics | {"g_loss": metrics["g_loss"] * float("nan")}, monkeypatch)
    result = train("--resume", copy, "--max_steps", STEPS)
    last = f"the last good checkpoint is {copy / NEWEST}, after batch {HALF}"
    assert result.status == 1 and f"the loss is no longer finite at step {HALF + 2}; {last}\n" in result.err
    assert (copy / NEWEST).read_bytes() == good and read_rows(copy)[-1]["step"] == HALF + 1


def test_networks_that_are_not_finite_are_not_saved(copy, train, monkeypatch):
    weights = (copy / "acgan_gen.pth").read_bytes()

    def spoil(metrics, generator, *inputs):
        generator.l1[0].bias.data[3] = float("inf")

    in_batch(0, spoil, monkeypatch)
    result = train("--resume", copy, "--max_steps", HALF + 1)
    words = f"the networks are no longer finite after batch {HALF + 1}; the last good"
    assert result.status == 1 and words in result.err
    assert read_checkpoint(copy)["step"] == HALF and (copy / "acgan_gen.pth").read_bytes() == weights


def test_disk_that_cannot_take_a_checkpoint_keeps_the_earlier_one(copy, straight, train):
    before, (soft, hard) = (copy / NEWEST).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))  # of 5 MB that a checkpoint takes
    try:
        result = train("--resume", copy, "--max_steps", STEPS - 1, "--checkpoint_interval", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == 2 and "acgan.py: error: cannot write" in result.err.splitlines()[-1]
    lines = [line.rpartition(":")[0] for line in result.err.splitlines() if line.startswith("Warning")]
    assert lines == [f"Warning: no checkpoint after batch {n} (File too large)" for n in (12, 16)]
    assert (copy / NEWEST).read_bytes() == before and not list(copy.rglob("*.part"))
    assert len(read_rows(copy)) == STEPS - 1  # training reached its end, and its small files were written
    assert train("--resume", copy, "--max_steps", STEPS).status == 0
    assert_same_run(copy, straight)


def test_lost_folder_and_unwritable_grids_do_not_end_training(train, tmp_path, monkeypatch):
    out_dir = tmp_path / "run"

    def lose(*args):
        shutil.rmtree(out_dir)
        out_dir.mkdir()
        (out_dir / "images").touch()  # a file where the grids' folder was

    in_batch(5, lose, monkeypatch)
    result = train(*SMALL, "--max_steps", STEPS, "--checkpoint_interval", 13, "--out_dir", out_dir)
    assert result.status == 0, result.err
    assert result.err.count("Warning: cannot write sample grids") == 1 and "Traceback" not in result.err
    assert read_checkpoint(out_dir)["step"] == STEPS


def origins(folder, equal_to):
    """Where load_trained says each network of a run is from; they equal those of the weight files in `equal_to`."""
    found = {}
    for part, file in FILES.items():
        network = load_trained(folder, part, networks=NETWORKS)
        wanted = load_network(equal_to / file)
        assert network.config == wanted.config and network.classes == wanted.classes
        assert all(map(torch.equal, network.state_dict().values(), wanted.state_dict().values())), part
        found[file] = network.origin
    return found


def without_batch(folder):
    """Make the weight files of a run those of a version that did not record their batch."""
    for file in FILES.values():
        packed = torch.load(folder / file, weights_only=True)
        del packed["step"]
        torch.save(packed, folder / file)


def test_networks_of_a_run_are_those_of_its_weights_or_its_checkpoint_whichever_is_further_trained(copy, straight):
    names = FILES.values()
    assert origins(copy, equal_to=copy) == {file: f"{copy / file}, after batch {HALF}" for file in names}
    weights = shutil.copytree(copy, copy.with_name("weights"))
    shutil.copy(straight / NEWEST, copy / NEWEST)  # as of a run that was resumed, and killed after batch STEPS
    newer = f"{copy / NEWEST}, after batch {STEPS}"
    assert origins(copy, equal_to=straight) == {f: f"{newer}; passed over: {f}, after batch {HALF}" for f in names}
    packed = torch.load(copy / NEWEST, weights_only=True)
    without_batch(copy)
    assert origins(copy, equal_to=weights) == {file: f"{copy / file}" for file in names}  # the run has ended
    torch.save(packed | {"finished": False}, copy / NEWEST)
    assert origins(copy, equal_to=straight) == {f: f"{newer}; passed over: {f}, of an unknown batch" for f in names}

    torch.save({"format": "acgan checkpoint 2", "step": STEPS, "finished": False}, copy / NEWEST)
    words = f"; {NEWEST} beside it is from an older version, and cannot be read"
    assert origins(copy, equal_to=weights) == {file: f"{copy / file}{words}" for file in names}
    (copy / NEWEST).write_bytes(b"")
    (copy / PREVIOUS).unlink()
    words = f"; {NEWEST} beside it cannot be read"
    assert origins(copy, equal_to=weights) == {file: f"{copy / file}{words}" for file in names}


def test_killed_run_can_be_drawn_from_scored_and_started_from(copy, straight, train, tmp_path):
    for file in FILES.values():
        (copy / file).unlink()
    for named in (copy, copy / NEWEST, shutil.copy(copy / NEWEST, tmp_path / "renamed.pt")):
        origin = f"{named / NEWEST if named == copy else named}, after batch {HALF}"
        for main, flags in ((generate.main, ["--out", tmp_path / "a.png"]), (evaluate.main, [])):
            result = call(main, "--weights", named, "--device", "cpu", *flags)
            assert f"Weights: {origin}\n" in result.err
        result = train(*SMALL, "--init_from", named, "--max_steps", 1, "--out_dir", tmp_path / "new")
        assert result.status == 0, result.err
        assert f"Generator: starts from {origin}.\nDiscriminator: starts from {origin}.\n" in result.err

    torch.save({"format": "acgan checkpoint 2", "step": STEPS, "finished": False}, copy / NEWEST)
    for named in (copy, copy / NEWEST):
        line = errors(call(generate.main, "--weights", named, "--device", "cpu"))
        assert f"{str(copy / NEWEST)!r} is from an older version of this script: end the run with that version" in line
