"""A run that was stopped goes on to the last bit, and no fault costs what was reached."""

import pickle
import re
import resource
import shutil
import signal

import few_digits
import pytest
import torch
from conftest import assert_same_run, read_board, read_rows

import acgan
from checkpoint import NEWEST, PREVIOUS, begun_by_this_torchrun, read_checkpoint
from runlog import RunLog

SMALL = ["--seed", 4, "--batch_size", 24, "--img_size", 16, "--log_interval", 1, "--sample_interval", 4]
DIGITS = 60  # three batches an epoch, the last of 12
STEPS = 80


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """The folder of a run of STEPS batches that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("straight")
    result = run(*SMALL, "--max_steps", STEPS, "--out_dir", out_dir, digits=DIGITS)
    assert result.returncode == 0, result.stderr
    return out_dir


@pytest.fixture(scope="module")
def half(run, tmp_path_factory):
    """The folder of a run that ended within its 14th epoch."""
    out_dir = tmp_path_factory.mktemp("half")
    run(*SMALL, "--max_steps", STEPS // 2, "--out_dir", out_dir, digits=DIGITS)
    return out_dir


@pytest.fixture
def copy(half, tmp_path, monkeypatch):
    """A copy of that folder for one test to harm, or to go on with on the same few digits."""
    monkeypatch.setattr(acgan, "load_dataset", few_digits.first(DIGITS))
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


def resume(run, out_dir, *flags):
    return run("--resume", "--max_steps", STEPS, "--out_dir", out_dir, *flags, digits=DIGITS)


@pytest.mark.parametrize("how", ["max_steps", signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_equals_straight(straight, start, run, tmp_path, how):
    if how == "max_steps":
        assert run(*SMALL, "--max_steps", STEPS // 2, "--out_dir", tmp_path, digits=DIGITS).returncode == 0
    else:
        flags = ["--max_steps", STEPS, "--checkpoint_interval", 7, "--out_dir", tmp_path]
        process = start(*SMALL, *flags, digits=DIGITS, pause_at=STEPS // 4)
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (128 + how if how == signal.SIGTERM else -how), err
    assert read_checkpoint(tmp_path)["steps"] < STEPS
    result = resume(run, tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert_same_run(tmp_path, straight)
    images = [path.relative_to(straight) for path in (straight / "images").rglob("*.png")]
    assert len(images) > 2
    for image in images:
        assert (tmp_path / image).read_bytes() == (straight / image).read_bytes()
    ours, theirs = read_board(tmp_path), read_board(straight)
    assert ours.Tags()["graph"]
    for tag in theirs.Tags()["scalars"]:
        assert [(e.step, e.value) for e in ours.Scalars(tag)] == [(e.step, e.value) for e in theirs.Scalars(tag)]
    for tag in theirs.Tags()["images"]:
        assert [e.step for e in ours.Images(tag)] == [e.step for e in theirs.Images(tag)]


def test_resume_into_another_folder_takes_the_record_along(straight, half, run, tmp_path):
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    flags = ["--max_steps", STEPS, "--out_dir", tmp_path / "new"]
    assert run("--resume", half / NEWEST, *flags, digits=DIGITS).returncode == 0
    assert_same_run(tmp_path / "new", straight)
    assert [e.step for e in read_board(tmp_path / "new").Scalars("D_loss/total")] == list(range(STEPS))
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


def test_end_of_the_run_can_be_moved_and_an_end_reached_is_said(copy, run):
    result = run("--resume", "--n_epochs", 13, "--out_dir", copy, digits=DIGITS)
    assert result.returncode == 2 and "has come to its end, 40 batches; raise --n_epochs" in result.stderr
    assert run("--resume", "--n_epochs", 15, "--log_interval", 2, "--out_dir", copy, digits=DIGITS).returncode == 0
    assert read_checkpoint(copy)["steps"] == 45
    assert [row["step"] for row in read_rows(copy)] == [*range(40), 40, 42, 44]


def fails(out_dir, flags, capsys):
    """Run with `flags`, which must fail with one line and change no file; returns the line."""
    before = {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}
    try:
        status = acgan.main([str(flag) for flag in ["--device", "cpu", "--out_dir", out_dir, *flags]])
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1, err
    assert {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()} == before
    return err


def test_flags_that_change_the_mathematics_are_refused_with_a_list(copy, capsys):
    line = fails(copy, ["--resume", "--lr", 0.1, "--batch_size", 24, "--b1", 0.9, "--seed", 5], capsys)
    assert "the checkpoint has --seed 4, not 5; --lr 0.0002, not 0.1; --b1 0.5, not 0.9: drop these" in line


def test_new_run_does_not_drop_an_unfinished_one(start, tmp_path, capsys):
    process = start(*SMALL, "--checkpoint_interval", 1, "--out_dir", tmp_path, digits=DIGITS, pause_at=3)
    process.kill()
    process.communicate()
    line = fails(tmp_path, SMALL, capsys)
    assert "unfinished run" in line and "add --resume to go on" in line


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_checkpoints_that_are_none_get_one_line_and_run_nothing(copy, capsys):
    newest, marker = copy / NEWEST, copy.parent / "code was run"
    (copy / PREVIOUS).unlink(missing_ok=True)
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({"format": "acgan checkpoint 1", "code": RunsCode(str(marker))}, copy.parent / "malicious.pt")
    contents = {
        "empty": b"",
        "text": b"not a checkpoint",
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "foreign": (copy / "acgan_gen.pth").read_bytes(),
        "malicious": (copy.parent / "malicious.pt").read_bytes(),
        "malicious pickle": pickle.dumps(RunsCode(str(marker))),
    }
    for kind, content in contents.items():
        newest.write_bytes(content)
        assert "is damaged, or is not a checkpoint of this script" in fails(copy, ["--resume"], capsys), kind
        assert "unfinished run" in fails(copy, SMALL, capsys), kind  # and a new run does not overwrite it
    assert not marker.exists()
    newest.write_bytes(whole)
    assert "is damaged, or is not a checkpoint" in fails(copy, ["--resume", copy / "acgan_gen.pth"], capsys)
    newest.unlink()
    assert "no checkpoint.pt in" in fails(copy, ["--resume"], capsys)
    assert "no file" in fails(copy, ["--resume", copy / "nothing.pt"], capsys)


def test_checkpoint_of_another_shape_is_named(copy, capsys):
    packed = torch.load(copy / NEWEST, weights_only=True)
    packed["options"]["latent_dim"] = 50
    torch.save(packed, copy / NEWEST)
    line = fails(copy, ["--resume"], capsys)
    assert "--resume: the checkpoint's generator does not fit its flags" in line


def moments(packed):
    return packed["parts"]["optimizer_G"]["state"]


CRAFTED = {
    "moments of another size": lambda packed: moments(packed)[0].update(exp_avg=torch.zeros(3)),
    "moments of another kind": lambda packed: moments(packed)[0].update(exp_avg=moments(packed)[0]["exp_avg"].double()),
    "no second moment": lambda packed: moments(packed)[2].pop("exp_avg_sq"),
    "no moments": lambda packed: moments(packed).clear(),
    "steps of no kind": lambda packed: moments(packed)[1].update(step=torch.tensor(float("nan"))),
    "position beyond NumPy's numbers": lambda packed: packed["random"]["numpy"]["rest"].__setitem__(1, 2**31 - 1),
    "position beyond the epoch": lambda packed: packed["parts"]["batches"].update(position=7),
    "half a position": lambda packed: packed["parts"]["batches"].update(position=1.5),
    "another position": lambda packed: packed["parts"]["batches"].update(position=2),
    "seed of an epoch too large": lambda packed: packed["parts"]["batches"].update(sampler_seed=2**70),
    "negative steps": lambda packed: packed.update(steps=-3),
    "no seed": lambda packed: packed["options"].update(seed=None),
    "no time": lambda packed: packed["log"].update(seconds=float("nan")),
    "no rows": lambda packed: packed["log"].update(pending=5),
    "no folder": lambda packed: packed["log"].update(log_dir=None),
    "no sizes": lambda packed: packed["log"].update(sizes=[]),
    "negative sizes": lambda packed: packed["log"].update(sizes={"metrics.jsonl": -1}),
}


@pytest.mark.parametrize("harm", CRAFTED)
def test_checkpoint_that_contradicts_itself_is_refused(harm, copy, capsys):
    packed = torch.load(copy / NEWEST, weights_only=True)
    CRAFTED[harm](packed)
    torch.save(packed, copy / NEWEST)
    (copy / PREVIOUS).unlink(missing_ok=True)
    line = fails(copy, ["--resume", "--max_steps", STEPS], capsys)
    assert "does not fit its flags" in line or "is damaged, or is not a checkpoint" in line


def test_only_its_own_torchrun_restarts_a_run(copy, monkeypatch):
    launcher = read_checkpoint(copy)["launcher"]
    monkeypatch.setattr("os.getppid", lambda: launcher)
    assert not begun_by_this_torchrun(copy)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begun_by_this_torchrun(copy) and not begun_by_this_torchrun(copy / "images")
    monkeypatch.setattr("os.getppid", lambda: launcher + 1)
    assert not begun_by_this_torchrun(copy)


def test_leftovers_of_a_killed_run_are_removed(copy, run):
    (copy / "images" / ".123.part").write_text("half a grid")
    assert run("--resume", "--max_steps", 41, "--out_dir", copy, digits=DIGITS).returncode == 0
    assert not list(copy.rglob(".*.part"))


def test_checkpoint_cannot_reach_files_outside_the_run(copy, capsys):
    victim = copy.parent / "victim"
    victim.write_text("keep me")
    packed = torch.load(copy / NEWEST, weights_only=True)
    packed["log"]["sizes"]["../victim"] = 0
    torch.save(packed, copy / NEWEST)
    assert "is no record of a run" in fails(copy, ["--resume"], capsys)
    assert victim.read_text() == "keep me"


def test_previous_checkpoint_stands_in_for_a_damaged_newest(straight, run, tmp_path):
    flags = ["--max_steps", 30, "--checkpoint_interval", 11, "--out_dir", tmp_path]
    assert run(*SMALL, *flags, digits=DIGITS).returncode == 0
    content = bytearray((tmp_path / NEWEST).read_bytes())
    content[len(content) // 3] ^= 4
    (tmp_path / NEWEST).write_bytes(content)
    result = resume(run, tmp_path)
    assert result.returncode == 0
    assert re.fullmatch(r".*checkpoint.pt cannot be read; checkpoint.previous.pt is used, .*batch 21.\n", result.stderr)
    assert_same_run(tmp_path, straight)
    assert read_checkpoint(tmp_path / PREVIOUS)["steps"] < STEPS  # the damaged one did not take its place


def test_interval_of_grids_may_change_but_is_said_to_change_the_draws(copy, run):
    result = run("--resume", "--max_steps", 41, "--sample_interval", 3, "--out_dir", copy, digits=DIGITS)
    assert result.returncode == 0
    assert result.stderr == "Another --sample_interval draws other noise: the run goes on, but not to the last bit.\n"


def test_resume_finds_the_current_folder_by_its_name(copy, run, tmp_path):
    result = run("--resume", ".", "--max_steps", 41, "--out_dir", "../new", digits=DIGITS, cwd=copy)
    assert result.returncode == 0 and read_checkpoint(tmp_path / "new")["steps"] == 41
    assert read_checkpoint(copy)["steps"] == 40


def test_divergence_keeps_the_last_good_checkpoint(copy, capsys, monkeypatch):
    good = (copy / NEWEST).read_bytes()
    train_step, calls = acgan.train_step, []

    def diverging(*args):
        calls.append(1)
        metrics = train_step(*args)
        return metrics | {"g_loss": metrics["g_loss"] * float("nan")} if len(calls) == 5 else metrics

    monkeypatch.setattr(acgan, "train_step", diverging)
    assert acgan.main(["--resume", "--max_steps", "60", "--device", "cpu", "--out_dir", str(copy)]) == 1
    err = capsys.readouterr().err
    assert f"not finite at batch 44; the last good checkpoint is {copy / NEWEST}, after batch 39" in err.replace(
        "no longer finite", "not finite"
    )
    assert (copy / NEWEST).read_bytes() == good and read_rows(copy)[-1]["step"] == 43


def test_networks_that_are_not_finite_are_not_saved(copy, capsys, monkeypatch):
    train_step = acgan.train_step

    def spoiling(generator, *args):
        metrics = train_step(generator, *args)
        generator.l1[0].bias.data[3] = float("inf")
        return metrics

    monkeypatch.setattr(acgan, "train_step", spoiling)
    flags = ["--resume", "--max_steps", "41", "--compile", "off", "--device", "cpu", "--out_dir", str(copy)]
    weights = (copy / "acgan_gen.pth").read_bytes()
    assert acgan.main(flags) == 1
    assert "the networks are no longer finite after batch 40; the last good" in capsys.readouterr().err
    assert read_checkpoint(copy)["steps"] == 40 and (copy / "acgan_gen.pth").read_bytes() == weights


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))  # of 6.4 MB that a checkpoint takes


def test_disk_that_cannot_take_a_checkpoint_keeps_the_earlier_one(copy, run):
    before = (copy / NEWEST).read_bytes()
    flags = ["--resume", "--max_steps", 50, "--checkpoint_interval", 4, "--out_dir", copy]
    result = run(*flags, digits=DIGITS, preexec_fn=small_files)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    warnings = [f"Warning: no checkpoint after batch {n} (File too large)" for n in (43, 47)]
    assert [line.rpartition(":")[0] for line in lines[:-1]] == warnings
    assert lines[-1].startswith("acgan.py: error: cannot write")
    assert (copy / NEWEST).read_bytes() == before and not list(copy.rglob("*.part"))
    assert len(read_rows(copy)) == 50  # training went on to its end, and its small files were written
    assert resume(run, copy).returncode == 0


def test_lost_folder_and_unwritable_grids_do_not_end_training(start, tmp_path):
    out_dir = tmp_path / "run"
    flags = ["--max_steps", STEPS, "--checkpoint_interval", 20, "--out_dir", out_dir]
    process = start(*SMALL, *flags, digits=DIGITS, pause_at=5)  # it would write while its folder is being removed
    shutil.rmtree(out_dir)
    out_dir.mkdir()
    (out_dir / "images").touch()  # a file where the grids' folder was
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Warning: cannot write sample grids" in err and "Traceback" not in err
    assert err.count("sample grids") == 1
    assert read_checkpoint(out_dir)["steps"] == STEPS


def test_rows_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path):
    with RunLog(tmp_path, {}, 10, 1, 10, 1) as log:
        rows, log.rows = log.rows, open("/dev/full", "wb", 0)  # noqa: SIM115
        list(log.epoch(0, []))
        names = ["d_loss", "d_real_adv", "d_real_aux", "d_fake_adv", "d_fake_aux", "g_loss", "g_adv", "g_aux"]
        metrics = dict.fromkeys([*names, "real_correct", "fake_correct"], torch.tensor(1.0))
        log.batch(0, metrics, 1)
        log.batch(1, metrics, 1)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
        log.rows = rows
        log.batch(2, metrics, 1)
        assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2]
