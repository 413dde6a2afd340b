"""How good is `--recipe best` after so many batches from a cold start, and the tutorial's way after the same time?

    python -m benchmarks.speedrun                   # runs what benchmarks/speedrun.jsonl lacks; nothing else should run
    python -m benchmarks.speedrun --batches 1200    # shorter runs, rows of their own
    python -m benchmarks.speedrun --warm DIR        # with --compile on, and a cache that holds what it compiles
    python -m benchmarks.speedrun --table           # mean and range over the seeds, for docs/results.md

Each run is the typed command, timed from its start to its end: imports, reading the data, compiling if it does, the
training, the last files. The number of batches was fixed before the first run. `evaluate.py` then scores the EMA on
the test digits. The faithful run is ended by a Ctrl-C after the mean time of the others. Without --warm each run has an
empty cache. With it, fill DIR first: TORCHINDUCTOR_CACHE_DIR=DIR before `acgan.py --recipe best --compile on` and
`--max_steps 1 --out_dir OUT`.
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
from departures import RECIPES
from run.checkpoint import read_checkpoint

ROWS = ROOT / "benchmarks" / "speedrun.jsonl"
CLAIM = 0.975  # the CAS that the runs are to exceed
SCORES = {"cas": "{:.2%}", "agreement": "{:.2%}", "coverage": "{:.3f}", "fid": "{:.3f}", "ms_ssim": "{:.3f}"}


def train(flags: list, cache: Path, seconds: float | None = None) -> float:
    """Type acgan.py with these flags, end it if `seconds` have passed, and return how many it took."""
    start = time.monotonic()
    command = [sys.executable, "acgan.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        status = process.wait()
    if status != (128 + signal.SIGINT if seconds else 0):
        raise SystemExit(f"speedrun.py: error: the training ended with status {status}")
    return round(time.monotonic() - start, 1)


def run(recipe: str, seed: int, out_dir: Path, batches: int, cache: Path, warm: bool, seconds=None) -> dict:
    """Train into `out_dir`, for so many batches or until `seconds` have passed, and return a row with its scores."""
    flags = ["--recipe", recipe, "--seed", seed, "--out_dir", out_dir] + (["--compile", "on"] if warm else [])
    taken = train(flags if seconds else [*flags, "--max_steps", batches], cache, seconds)
    command = [sys.executable, "evaluate.py", "--json", "--weights", out_dir]
    card = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    scores = {name: round(pair["generated"], 5) for name, pair in card["scores"].items()}
    worst = min(row["coverage"]["generated"] for row in card["by_class"].values())
    return dict(recipe=recipe, seed=seed, batches=read_checkpoint(out_dir)["step"], seconds=taken, **scores,
                worst_coverage=round(worst, 5), machine=machine(), compared_at=batches, warm=warm,
                flags=RECIPES[recipe])  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return mean, lowest and highest over the seeds of each recipe, machine and length, as Markdown."""
    columns = {"seconds": "{:.0f}"} | SCORES
    head = ["recipe", "machine", "seeds", "batches", *columns, f"p that CAS is not above {CLAIM:.1%}"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]

    def group(row):
        flags = json.dumps(row.get("flags"), sort_keys=True)  # a recipe of the same name may have changed
        return row["recipe"], row["machine"], row["compared_at"], row.get("warm", False), flags

    for key in dict.fromkeys(map(group, rows)):
        own, cells = [row for row in rows if group(row) == key], []
        for name, form in columns.items():
            values = [row[name] for row in own]
            mean, low, high = (form.format(of(values)) for of in (statistics.mean, min, max))
            cells.append(f"{mean} ({low} to {high})" if len(own) > 1 else mean)
        cells.append(f"{p_value([row['cas'] for row in own]):.2g}" if len(own) > 2 else "")
        batches = statistics.mean(row["batches"] for row in own)
        name = f"{key[0]}, warm cache" if key[3] else key[0]
        lines.append(f"| {name} | {key[1]} | {len(own)} | {batches:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def p_value(values: list[float]) -> float:
    """Return the p of a one-sided t test of a mean above CLAIM."""
    from scipy import stats

    return float(stats.ttest_1samp(values, CLAIM, alternative="greater").pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of the recipe (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=2000, help="length of each of them (default: %(default)s)")
    parser.add_argument("--warm", type=Path, metavar="DIR", help="compile, with a cache in DIR that is filled already")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what each run writes here (default: nothing)")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    opt = parser.parse_args()
    if opt.table:
        return print(table(read_rows(ROWS)))

    def comparable() -> list[dict]:
        here = machine(), opt.batches, bool(opt.warm)
        rows = [row for row in read_rows(ROWS) if row.get("flags") == RECIPES[row["recipe"]]]
        return [row for row in rows if (row["machine"], row["compared_at"], row["warm"]) == here]

    done = {(row["recipe"], row["seed"]) for row in comparable()}
    runs = [("best", seed) for seed in range(opt.seeds)] + [("faithful", 0)]
    for recipe, seed in tqdm([cell for cell in runs if cell not in done], unit="run"):
        seconds = None
        if recipe == "faithful":
            seconds = statistics.mean(row["seconds"] for row in comparable() if row["recipe"] == "best")
        with tempfile.TemporaryDirectory() as temporary:
            cache = opt.warm or Path(temporary) / "cache"
            out_dir = (opt.keep or Path(temporary)) / f"{recipe}_{seed}"
            row = run(recipe, seed, out_dir, opt.batches, cache, bool(opt.warm), seconds)
        append_rows(ROWS, [row])


if __name__ == "__main__":
    main()
