"""KILL a run again and again at random moments, resume each time, and compare it with one that nothing interrupted.

    python tests/torture.py             # 30 kills, about five minutes on two cores; not part of the test suite
    python tests/torture.py --kills 100 --seed 1

A checkpoint is written after every batch, so most kills fall into a write; a third fall into the start-up, where the
records of the killed run are cut back.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkpoint import NEWEST, find_checkpoint
from conftest import assert_same_run, read_board, read_rows

FEW_DIGITS = Path(__file__).resolve().parent / "few_digits.py"
FLAGS = ["--batch_size", "24", "--img_size", "16", "--log_interval", "1", "--sample_interval", "5", "--device", "cpu"]


def command(out_dir: Path, *flags: str) -> list[str]:
    """A run on 60 digits: three batches an epoch, the last of 12."""
    return [sys.executable, str(FEW_DIGITS), "60", "--out_dir", str(out_dir), *flags]


def age(out_dir: Path) -> int | None:
    """When the newest checkpoint was written, ns; None if there is none at this instant."""
    try:
        return (out_dir / NEWEST).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    opt = parser.parse_args()
    rng = random.Random(opt.seed)
    with tempfile.TemporaryDirectory() as folder:
        out_dir, straight = Path(folder) / "killed", Path(folder) / "straight"
        in_start_up = 0
        log = open(Path(folder) / "log", "w+")  # noqa: SIM115
        for kill in range(opt.kills):
            flags = ["--resume"] if find_checkpoint(out_dir) else ["--seed", "3"]
            before = age(out_dir)
            process = subprocess.Popen(
                command(out_dir, *flags, *FLAGS, "--checkpoint_interval", "1"), stdout=subprocess.DEVNULL, stderr=log
            )
            if rng.random() < 1 / 3 and kill:
                in_start_up += 1
                time.sleep(rng.uniform(0, 5))
            else:
                while age(out_dir) in (None, before) and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.5))
            if process.poll() is not None:
                raise SystemExit(
                    f"the run ended by itself with status {process.returncode}:\n{log.seek(0)}{log.read()}"
                )
            process.kill()
            process.wait()
            print(f"kill {kill + 1:3d}: {len(read_rows(out_dir)):4d} rows of metrics.jsonl on the disk", flush=True)
        log.seek(0)
        fallbacks = log.read().count("cannot be read")
        steps = read_rows(out_dir)[-1]["step"] + 20
        subprocess.run(command(out_dir, "--resume", "--max_steps", str(steps)), check=True, stdout=subprocess.DEVNULL)
        subprocess.run(command(straight, "--seed", "3", *FLAGS, "--max_steps", str(steps)), check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        assert_same_run(out_dir, straight)
        ours, theirs = (
            [(event.step, event.value) for event in read_board(run).Scalars("D_loss/total")]
            for run in (out_dir, straight)
        )
        assert ours == theirs
    print(
        f"{opt.kills} kills, {in_start_up} of them at a random moment of the first 5 s; {fallbacks} times the previous"
    )
    print(f"checkpoint was used; after {steps} batches the run equals an uninterrupted one to the last bit.")


if __name__ == "__main__":
    main()
