"""Studies of many short runs: a JSON line a row; what has its rows is skipped, so a study goes on after a kill."""

import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


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


def run_cells(module: str, cells: list[tuple], *arguments) -> None:
    """Run `python -m benchmarks.MODULE --cell ...` for each cell, one at a time, in a process of its own.

    Two at once on two cores are many times slower than one after the other. Raises SystemExit if a process fails.
    """
    for cell in tqdm(cells, unit="cell"):
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--cell", *cell]
        status = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
        if status:
            name = ", ".join(str(part) for part in cell)
            raise SystemExit(f"{module}.py: error: {name} ended with status {status}; what is done is kept")
