"""Fixtures: the real script on a few real digits, in this process or in one of its own."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and threads of one would wait for those of another
os.environ["DISPLAY"] = ":0"  # a screen, where nothing is said of how to reach the pictures
os.environ.pop("SSH_CONNECTION", None)
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # and those of a test that has two would keep the cores busy


def call(main, *flags) -> SimpleNamespace:
    """Call a script's main() with `flags`, piped; has .status, .out and .err."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(flag) for flag in flags])
        except SystemExit as exit:
            status = exit.code
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="session")
def train():
    """train(*flags, digits=60): acgan.py in this process, on the CPU, on the first real digits."""
    import small

    import acgan

    def train(*flags, digits=60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(acgan, "load_dataset", small.few(digits))
            patch.setattr(acgan.EpochScorer, "SCORED", 50)
            return call(acgan.main, "--device", "cpu", *flags)

    return train


@pytest.fixture(scope="session")
def start():
    """start(*flags, digits=60): acgan.py in a process of its own, on the CPU, piped; digits=None takes all.

    With `pause_at=B` it stops itself when B batches are done, and start returns then.
    """
    started = []

    def start(*flags, digits=60, pause_at=None, command=(sys.executable,), env=None, **kwargs):
        script = ROOT / "acgan.py" if digits is None else ROOT / "tests" / "small.py"
        words = [str(word) for word in [*command, script, "--device", "cpu", *flags]]
        env = os.environ | {"DIGITS": str(digits)} | ({} if env is None else env)
        env |= {} if pause_at is None else {"PAUSE_AT": str(pause_at)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process := subprocess.Popen(words, env=env, **pipes, **kwargs))
        if pause_at is not None:
            ended = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code != os.CLD_STOPPED
            assert not ended, process.communicate()
        return process

    yield start
    for process in started:  # those that a failed test left behind
        process.kill()


@contextlib.contextmanager
def stopped_after(batches: int):
    """Inside the block a run in this process gets the signal TERM when so many batches are done."""
    from run.loop import Run

    after_batch = Run.after_batch

    def stop_in_time(self, metrics):
        if self.step + 1 == batches:
            signal.raise_signal(signal.SIGTERM)
        after_batch(self, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after_batch", stop_in_time)
        yield


def on_terminal(main, *flags, columns: int = 80) -> SimpleNamespace:
    """Call a script's main() in a pseudo-terminal of 24 rows; has .status and .lines, with every state of a bar."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    output = []

    def read():
        with contextlib.suppress(OSError):  # its end
            while part := os.read(ours, 4096):
                output.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as terminal, contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        status = main([str(flag) for flag in flags])
    reader.join()
    os.close(ours)
    return SimpleNamespace(status=status, lines=re.split(r"[\r\n]+", b"".join(output).decode()))


def errors(result) -> str:
    """The one line of a command that must fail with exit status 2."""
    assert result.status == 2 and result.out == "", result
    lines = [line for line in result.err.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in result.err, result.err
    return lines[0]


def files(folder: Path) -> dict:
    """All files of a folder with what they hold."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leaves(value, path=""):
    """The leaves of nested dicts and lists, each with its path."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}.{key}")
    else:
        yield path, value


def differing(one, other) -> list[str]:
    """The paths of all leaves of nested dicts that differ in any bit."""
    import torch

    ours, theirs = dict(leaves(one)), dict(leaves(other))
    assert ours.keys() == theirs.keys() and len(ours) > 100

    def is_same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [path for path, value in ours.items() if not is_same(value, theirs[path])]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two run folders hold the same run bit by bit: rows, weights, optimisers, random states."""
    from run.checkpoint import read_checkpoint

    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    for name in ("acgan_gen.pth", "acgan_dist.pth", "acgan_gen_ema.pth"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    one, other = (read_checkpoint(folder) for folder in (ours, theirs))
    for checkpoint in (one, other):
        del checkpoint["options"], checkpoint["file"]  # they name folders
        del checkpoint["plan"]["compile"], checkpoint["plan"]["schedule_steps"]  # of how each was begun
    assert differing(one, other) == []


def read_board(out_dir: Path):
    """TensorBoard's view of the log folder of the run in `out_dir`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_dir = out_dir / json.loads((out_dir / "config.json").read_text())["log_dir"]
    return EventAccumulator(str(log_dir), size_guidance={"images": 0, "scalars": 0}).Reload()


def read_rows(out_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
