"""Fixtures: the real script as a subprocess, and the real digits, unpacked once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, and threads of one would wait for those of another


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A folder with MNIST unpacked from the bundled files."""
    from mnist import MNIST

    root = tmp_path_factory.mktemp("unpacked")
    MNIST(root)
    return root


@pytest.fixture(scope="session")
def start(data_root):
    """start(*flags): the running script, on the CPU, its outputs piped; it trains on the real digits.

    With `digits=N` on the first N of them, for epochs that end soon; with `pause_at=B` too, it stops itself when B
    batches are done, and start returns then.
    """

    started = []

    def start(*flags, digits=None, pause_at=None, **kwargs):
        script = [ROOT / "acgan.py"] if digits is None else [ROOT / "tests" / "few_digits.py", digits]
        command = [sys.executable, *script, "--data_root", data_root, "--device", "cpu", *flags]
        if pause_at is not None:
            kwargs["env"] = os.environ | {"PAUSE_AT": str(pause_at)}
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **kwargs,
        )
        started.append(process)
        if pause_at is not None:
            ended = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code != os.CLD_STOPPED
            assert not ended, process.communicate()
        return process

    yield start
    for process in started:  # those that a failed test left behind
        process.kill()


@pytest.fixture(scope="session")
def run(start):
    """run(*flags): the script run to its end; has .returncode, .stdout and .stderr."""

    def run(*flags, **kwargs):
        process = start(*flags, **kwargs)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two run folders hold the same run to the last bit: rows, weights, optimisers, random states."""
    import torch

    from checkpoint import read_checkpoint

    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    for name in ("acgan_gen.pth", "acgan_dist.pth", "acgan_gen_ema.pth"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()

    def leaves(value, path=""):
        if isinstance(value, dict):
            for key in value:
                yield from leaves(value[key], f"{path}.{key}")
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                yield from leaves(part, f"{path}.{i}")
        else:
            yield path, value

    one, other = (read_checkpoint(folder) for folder in (ours, theirs))
    for packed in (one, other):
        del packed["log"], packed["options"], packed["file"], packed["launcher"]  # paths, seconds, a process
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for path, value in ours.items():
        same = torch.equal(value, theirs[path]) if isinstance(value, torch.Tensor) else value == theirs[path]
        assert same, path


def read_board(out_dir: Path):
    """TensorBoard's view of the log folder of the run in `out_dir`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out_dir / json.loads((out_dir / "config.json").read_text())["log_dir"])).Reload()


def read_rows(out_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
