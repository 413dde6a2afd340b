"""Studies of many short runs: a JSON line a row; what has its rows is skipped, so a study goes on after a kill."""

import json
import platform
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import acgan
from run.checkpoint import has_checkpoint
from run.weights import save_network, update_ema

ROOT = Path(__file__).resolve().parent.parent
CLASSES = [str(digit) for digit in range(10)]


def read_rows(path: Path) -> list[dict]:
    """Return the rows that are whole."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill
    return rows


def append_rows(path: Path, rows: list[dict]) -> None:
    """Append rows in one write, on lines of their own even after one that a kill cut off."""
    with open(path, "a+b") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
            cut_off = file.read() != b"\n"
        else:
            cut_off = False
        file.write(b"\n" * cut_off + "".join(json.dumps(row) + "\n" for row in rows).encode())


def run_cells(module: str, cells: list[tuple], *arguments, jobs: int = 1) -> None:
    """Run `python -m benchmarks.MODULE --cell ...` for each cell in a process of its own, `jobs` of them at a time.

    More than one helps on a GPU alone: two on two CPU cores are many times slower than one after the other. Raises
    SystemExit if a process fails, or was stopped; no other begins then, and those that run end first.
    """
    failed = threading.Event()

    def run(cell) -> None:
        if failed.is_set():
            return
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--cell", *cell]
        status = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
        if status:
            failed.set()
            name = ", ".join(str(part) for part in cell)
            raise SystemExit(f"{module}.py: error: {name} ended with status {status}; what is done is kept")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in tqdm(pool.map(run, cells), total=len(cells), unit="cell"):
            pass


def train_cell(flags: list[str], seed: int, points: tuple[int, ...], folder: Path) -> None:
    """Train, or go on training, a run in `folder` to the last of `points`, numbers of batches.

    After each of them the EMA and G are written there, as ema_POINT.pth and raw_POINT.pth.
    """

    def update_and_keep(ema, generator, decay, steps):
        update_ema(ema, generator, decay, steps)
        if steps in points:
            for which, network in (("ema", ema), ("raw", generator)):
                save_network(folder / f"{which}_{steps}.pth", network, CLASSES, step=steps)

    if all((folder / f"{which}_{point}.pth").exists() for which in ("ema", "raw") for point in points):
        return
    folder.mkdir(parents=True, exist_ok=True)
    acgan.update_ema = update_and_keep
    if has_checkpoint(folder):
        argv = ["--resume", folder, *flags]
    else:
        argv = ["--out_dir", folder, "--seed", seed, "--sample_interval", 100_000, *flags]
    if status := acgan.main([str(word) for word in [*argv, "--max_steps", points[-1]]]):
        sys.exit(status)


def machine() -> str:
    """Return what the rounding of a run depends on, in words."""
    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """Return the mean, and half the width of its 95 % interval by Student's t; None for a single value."""
    from scipy import stats  # in requirements-eval.txt, as matplotlib

    if len(values) < 2:
        return statistics.mean(values), None
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)
