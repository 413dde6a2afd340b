"""Fixtures: the real script as a subprocess, and the real digits, unpacked once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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

    With `digits=N` on the first N of them, for epochs that end soon.
    """

    def start(*flags, digits=None, **kwargs):
        script = [ROOT / "acgan.py"] if digits is None else [ROOT / "tests" / "few_digits.py", digits]
        command = [sys.executable, *script, "--data_root", data_root, "--device", "cpu", *flags]
        return subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **kwargs,
        )

    return start


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
        del packed["log"], packed["options"], packed["file"]  # paths and seconds
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
