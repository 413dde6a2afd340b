"""How good is `--recipe best` after so many batches from a cold start, and the tutorial's way after the same time?

    python -m benchmarks.speedrun                   # runs what benchmarks/speedrun.jsonl lacks; nothing else should run
    python -m benchmarks.speedrun --batches 1200    # shorter runs, rows of their own
    python -m benchmarks.speedrun --table           # mean and range over the seeds, for docs/results.md

Each run is the typed command, timed from its start to its end: imports, reading the data, compiling if it does, the
training, the last files. The number of batches was fixed before the first run. `evaluate.py` then scores the EMA on
the test digits. The faithful run is ended by a Ctrl-C after the mean time of the others.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.cells import ROOT, append_rows, machine, read_rows
from run.checkpoint import read_checkpoint

ROWS = ROOT / "benchmarks" / "speedrun.jsonl"
SCORES = {"cas": "{:.2%}", "agreement": "{:.2%}", "coverage": "{:.3f}", "fid": "{:.3f}", "ms_ssim": "{:.3f}"}


def run(recipe: str, seed: int, out_dir: Path, batches: int, seconds: float | None = None) -> dict:
    """Train into `out_dir`, for so many batches or until `seconds` have passed, and return a row with its scores."""
    command = [sys.executable, "acgan.py", "--recipe", recipe, "--seed", str(seed), "--out_dir", out_dir]
    command += [] if seconds else ["--max_steps", str(batches)]
    with tempfile.TemporaryDirectory() as cache:  # so that nothing is compiled yet
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            status = process.wait()
        taken = time.monotonic() - start
    if status not in (0, 128 + signal.SIGINT):
        raise SystemExit(f"speedrun.py: error: the training ended with status {status}")
    command = [sys.executable, "evaluate.py", "--json", "--weights", out_dir]
    card = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    scores = {name: round(pair["generated"], 5) for name, pair in card["scores"].items()}
    worst = min(row["coverage"]["generated"] for row in card["by_class"].values())
    return dict(recipe=recipe, seed=seed, batches=read_checkpoint(out_dir)["step"], seconds=round(taken, 1), **scores,
                worst_coverage=round(worst, 5), machine=machine(), compared_at=batches)  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return mean, lowest and highest over the seeds of each recipe, machine and length, as Markdown."""
    columns = {"seconds": "{:.0f}"} | SCORES
    lines = [f"| recipe | machine | seeds | batches | {' | '.join(columns)} |", "| --- " * (len(columns) + 4) + "|"]

    def group(row):
        return row["recipe"], row["machine"], row["compared_at"]

    for key in dict.fromkeys(map(group, rows)):
        own, cells = [row for row in rows if group(row) == key], []
        for name, form in columns.items():
            values = [row[name] for row in own]
            mean, low, high = (form.format(of(values)) for of in (statistics.mean, min, max))
            cells.append(f"{mean} ({low} to {high})" if len(own) > 1 else mean)
        batches = statistics.mean(row["batches"] for row in own)
        lines.append(f"| {key[0]} | {key[1]} | {len(own)} | {batches:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of the recipe (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=2000, help="length of each of them (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what each run writes here (default: nothing)")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    opt = parser.parse_args()
    if opt.table:
        return print(table(read_rows(ROWS)))

    def comparable() -> list[dict]:
        here = machine(), opt.batches
        return [row for row in read_rows(ROWS) if (row["machine"], row["compared_at"]) == here]

    done = {(row["recipe"], row["seed"]) for row in comparable()}
    runs = [("best", seed) for seed in range(opt.seeds)] + [("faithful", 0)]
    for recipe, seed in tqdm([cell for cell in runs if cell not in done], unit="run"):
        seconds = None
        if recipe == "faithful":
            seconds = statistics.mean(row["seconds"] for row in comparable() if row["recipe"] == "best")
        with tempfile.TemporaryDirectory() as temporary:
            row = run(recipe, seed, (opt.keep or Path(temporary)) / f"{recipe}_{seed}", opt.batches, seconds)
        append_rows(ROWS, [row])


if __name__ == "__main__":
    main()
