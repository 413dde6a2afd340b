"""Is resume exact, every time? Two loops over many process starts; not part of the test suite.

    python tests/torture.py kills                     # KILL a run 30 times at random moments, resume it each time
    python tests/torture.py starts --count 200        # resume one checkpoint 200 times, each time in a new process
    python tests/torture.py starts --busy             # ... beside a busy process
    python tests/torture.py starts MKL_NUM_THREADS=1  # ... with a variable of the environment

`kills` writes a checkpoint after every batch, so that most kills occur during a write; a third occur during the start.
At the end the run must equal one without interruption, bit by bit. `starts` compares the figures and weights of three
batches with those of the run that the checkpoint comes from, and says which figure differs first.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, assert_same_run, differing, read_board, read_rows

from run.checkpoint import NEWEST, PREVIOUS, read_checkpoint

os.environ.pop("OMP_NUM_THREADS")  # conftest's; here all cores count
SMALL = ["--batch_size", "24", "--img_size", "16", "--log_interval", "1", "--sample_interval", "5", "--device", "cpu"]
FLAGS = ["--seed", "5", "--batch_size", "16", "--device", "cpu", "--compile", "off", "--checkpoint_interval", "25",
         "--sample_interval", "20", "--log_interval", "1"]  # fmt: skip
BEFORE, AFTER = 125, 128  # batches


def small(out_dir: Path, *flags: str) -> list[str]:
    """A run on 60 digits: three batches an epoch, the last of 12."""
    return [sys.executable, str(ROOT / "tests" / "small.py"), "--out_dir", str(out_dir), *flags]


def age(out_dir: Path) -> int | None:
    """When the newest checkpoint was written, ns; None if there is none at this instant."""
    try:
        return (out_dir / NEWEST).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def kills(opt: argparse.Namespace, folder: Path) -> int:
    """KILL a run again and again, and compare it with one without interruption."""
    os.environ["DIGITS"] = "60"
    rng, in_start = random.Random(opt.seed), 0
    out_dir, straight = folder / "killed", folder / "straight"
    log = open(folder / "log", "w+")  # noqa: SIM115
    for kill in range(opt.count or 30):
        begun = any((out_dir / name).exists() for name in (NEWEST, PREVIOUS))
        flags = ["--resume"] if begun else ["--seed", "3"]
        before = age(out_dir)
        command = small(out_dir, *flags, *SMALL, "--checkpoint_interval", "1")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        if rng.random() < 1 / 3 and kill:
            in_start += 1
            time.sleep(rng.uniform(0, 5))
        else:
            while age(out_dir) in (None, before) and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself with status {process.returncode}:\n{log.seek(0)}{log.read()}")
        process.kill()
        process.wait()
        print(f"kill {kill + 1:3d}: {len(read_rows(out_dir)):4d} rows of metrics.jsonl on the disk", flush=True)
    log.seek(0)
    steps, fallbacks = str(read_rows(out_dir)[-1]["step"] + 20), log.read().count("is corrupt or missing")
    for command in (small(out_dir, "--resume", "--max_steps", steps),
                    small(straight, "--seed", "3", *SMALL, "--max_steps", steps)):  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert_same_run(out_dir, straight)
    boards = (read_board(run).Scalars("batch/d_loss") for run in (out_dir, straight))
    ours, theirs = ([(event.step, event.value) for event in events] for events in boards)
    assert ours == theirs
    print(f"{opt.count or 30} kills, {in_start} of them in the first 5 s; {fallbacks} times the previous "
          f"checkpoint was used; after {steps} batches the run equals one without interruption")  # fmt: skip
    return 0


def starts(opt: argparse.Namespace, folder: Path) -> int:
    """Resume one checkpoint again and again; returns 1 if any start computes differently."""

    def run(out_dir, *flags, **env):
        command = [sys.executable, str(ROOT / "acgan.py"), *flags, "--out_dir", str(out_dir)]
        result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(result.stderr)

    straight = folder / "straight"
    run(straight, *FLAGS, "--max_steps", str(BEFORE))
    checkpointed = shutil.copytree(straight, folder / "checkpointed")
    run(straight, "--resume", "--max_steps", str(AFTER))
    env = dict(word.split("=", 1) for word in opt.variables)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if opt.busy else None
    different = 0
    try:
        for number in range(opt.count or 200):
            again = shutil.copytree(checkpointed, folder / "again")
            run(again, "--resume", "--max_steps", str(AFTER), **env)
            rows = zip(read_rows(straight), read_rows(again), strict=True)
            figures = [(a["step"], key, a[key], b[key]) for a, b in rows for key in a if a[key] != b[key]]
            parts = differing(*(read_checkpoint(run)["parts"] for run in (straight, again)))
            if figures or parts:
                different += 1
                print(
                    f"start {number + 1}: {len(parts)} parts differ, and figures {json.dumps(figures[:3])}", flush=True
                )
            shutil.rmtree(again)
    finally:
        if busy:
            busy.kill()
    beside = ", beside a busy process" if opt.busy else ""
    print(f"{different} of {opt.count or 200} starts computed differently{beside}; environment: {env or 'as it is'}")
    return int(different > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loop", choices=["kills", "starts"])
    parser.add_argument("variables", nargs="*", metavar="NAME=VALUE", help="for starts: environment of each start")
    parser.add_argument("--count", type=int, help="kills or starts (default: 30 kills, 200 starts)")
    parser.add_argument("--busy", action="store_true", help="for starts: let another process keep a core busy")
    parser.add_argument("--seed", type=int, default=0, help="for kills: of the random moments (default: %(default)s)")
    opt = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return {"kills": kills, "starts": starts}[opt.loop](opt, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
