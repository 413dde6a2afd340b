"""Throughput of one process and of several on this machine's CPU, one thread each, in turns.

python benchmarks/processes.py                  # 1 against 2
python benchmarks/processes.py --processes 4 --batches 100
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ACGAN = Path(__file__).resolve().parent.parent / "acgan.py"


def images_per_second(processes: int, batches: int) -> float:
    """Images that all processes train on together, by the run's own line about its (unfinished) epoch."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as out_dir:
        flags = [
            "--seed",
            "0",
            "--device",
            "cpu",
            "--compile",
            "off",
            "--max_steps",
            str(batches),
            "--out_dir",
            out_dir,
        ]
        result = subprocess.run(
            [*launcher, str(ACGAN), *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
    found = re.search(r"([\d.]+) batches/s", result.stdout)
    if found is None:
        sys.exit(f"the run failed:\n{result.stderr}")
    return float(found[1]) * 64 * processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="to compare with one (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=150, help="a run, for each process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: %(default)s)")
    opt = parser.parse_args()
    counts = (1, opt.processes)
    measured = {count: [] for count in counts}
    for _ in range(opt.rounds):
        for count in counts:
            measured[count].append(images_per_second(count, opt.batches))
            print(f"{count} processes: {measured[count][-1]:.0f} images/s", flush=True)
    alone, together = (statistics.median(measured[count]) for count in counts)
    share = together / (alone * opt.processes)
    print(f"medians: {alone:.0f} and {together:.0f} images/s, {share:.0%} of {opt.processes} times one process")


if __name__ == "__main__":
    main()
