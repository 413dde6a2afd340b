"""What becomes of digits that two classes share: overlapping MNIST, as in TAC-GAN (arXiv:1907.02690).

    python -m benchmarks.overlap     # runs what benchmarks/overlap.jsonl lacks, and draws docs/images/overlap.png

Class A is half zeros and half ones, class B half zeros and half twos. A generator without bias draws 50 % zeros in
each. The bundled judge counts what the EMA of G draws. `python -m benchmarks.quirks --report` puts the table into
docs/quirks.md.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from torchvision.utils import make_grid, save_image

import acgan
import fast
from benchmarks.cells import ROOT, append_rows, machine, mean_and_interval, read_rows, run_cells, train_cell
from data import LabelledImages, load_dataset
from data.drawing import draw_set
from evaluation.judge import judge_images, load_judge
from fast.process import tune_process
from run.weights import load_network
from utils import atomic_write, choose_device

ROWS = ROOT / "benchmarks" / "overlap.jsonl"
BATCHES = 3000
CLASSES = {"A": (0, 1), "B": (0, 2)}  # the two digits of each
COUNTED = 2500  # images of each class
VARIANTS = {
    "faithful": [],
    "fake_class_loss off": ["--fake_class_loss", "off"],
    "class_head 2k": ["--class_head", "2k"],
}


def overlapping(digits: LabelledImages) -> LabelledImages:
    """Return classes A and B, as many images of either digit in each; no zero is in both."""
    of = {digit: (digits.labels == digit).nonzero().flatten() for digit in (0, 1, 2)}
    size = min(len(of[0]) // 2, len(of[1]), len(of[2]))
    parts = [of[0][:size], of[1][:size], of[0][size : 2 * size], of[2][:size]]
    labels = torch.tensor([0, 0, 1, 1]).repeat_interleave(size)
    return LabelledImages(digits.images[torch.cat(parts)], labels, list(CLASSES))


def grid_path(work: Path, name: str) -> Path:
    """Return where a variant's digits of seed 0 lie until the picture is put together."""
    return work / f"{name.replace(' ', '_')}.png"


def run_cell(name: str, seed: int, opt: argparse.Namespace) -> None:
    """Train one cell in this process, count what it draws, and append its row."""
    acgan.load_dataset = lambda *args, **kwargs: overlapping(load_dataset(*args, **kwargs))
    folder = opt.work / f"{name.replace(' ', '_')}_{opt.batches}_{seed}"
    train_cell([*VARIANTS[name], *opt.flags], seed, (opt.batches,), folder)
    tune_process(device := choose_device("auto")[0])
    generator = load_network(folder / f"ema_{opt.batches}.pth", device).eval()
    fast.use_fast_layers(generator)
    labels = torch.arange(len(CLASSES)).repeat(COUNTED)
    images = draw_set(generator, labels, seed=0)
    seen, shares = judge_images(load_judge(None, device), images)[1], {}
    for label, (letter, own) in enumerate(CLASSES.items()):
        drawn = seen[labels == label]
        shares[letter] = {str(digit): round((drawn == digit).double().mean().item(), 4) for digit in own}
    if seed == 0:
        few = torch.cat([images[labels == label][:40] for label in range(len(CLASSES))])
        save_image(make_grid(few.float() / 255, nrow=8), grid_path(opt.work, name))
    append_rows(opt.rows, [dict(name=name, seed=seed, batches=opt.batches, machine=machine(), **shares)])
    shutil.rmtree(folder)


def section(rows: list[dict]) -> list[str]:
    """Return the section of docs/quirks.md as lines; none without rows of that length."""
    rows = [row for row in rows if row["batches"] == BATCHES]
    if not rows:
        return []
    lines = [
        "",
        "## Digits that two classes share",
        "",
        "`python -m benchmarks.overlap`: class A is half zeros and half ones, class B half zeros and half twos, as in",
        f"TAC-GAN (arXiv:1907.02690). After {BATCHES:,} batches the judge counts {COUNTED:,} images of each class.",
        "Without bias each would be 50 % zeros; what is missing from 100 % is read as another digit. In percent, mean",
        "over the seeds and 95 % interval:",
        "",
        "| variant | seeds | A: zeros | A: ones | B: zeros | B: twos |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own, cells = [row for row in rows if row["name"] == name], []
        for letter, digits in CLASSES.items():
            for digit in digits:
                mean, half = mean_and_interval([100 * row[letter][str(digit)] for row in own])
                cells.append(f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}")
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return [*lines, "", "![What each draws](images/overlap.png)", "",
            f"*From left to right: {', '.join(VARIANTS)}; class A above, class B below; seed 0.*"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="seeds of each variant (default: %(default)s)")
    add("--jobs", type=int, default=1, help="cells at a time; more help on a GPU alone (default: %(default)s)")
    add("--batches", type=int, default=BATCHES, help="batches of each run (default: %(default)s)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "acgan_overlap",
        help="folder of the runs in progress (default: %(default)s)")  # fmt: skip
    add("--rows", type=Path, default=ROWS, help="the rows (default: %(default)s)")
    picture = ROOT / "docs" / "images" / "overlap.png"
    add("--picture", type=Path, default=picture, help="the picture (default: %(default)s)")
    add("--flags", default=[], type=str.split, help="more flags for all variants, as one text (default: none)")
    add("--cell", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    opt = parser.parse_args()
    if opt.cell:
        return run_cell(opt.cell[0], int(opt.cell[1]), opt)
    done = {(row["name"], row["seed"]) for row in read_rows(opt.rows) if row["batches"] == opt.batches}
    cells = [(name, seed) for seed in range(opt.seeds) for name in VARIANTS if (name, seed) not in done]
    run_cells("overlap", cells, *sys.argv[1:], jobs=opt.jobs)
    grids = [grid_path(opt.work, name) for name in VARIANTS]
    if all(grid.exists() for grid in grids):
        pictures = [to_tensor(Image.open(grid)) for grid in grids]
        joined = make_grid(pictures, nrow=len(pictures), padding=12, pad_value=1)
        atomic_write(opt.picture, lambda file: save_image(joined, file, format="png"))


if __name__ == "__main__":
    main()
