"""What the headline run's stretches and grids are worth: scores of benchmarks/headline.py's RUN, and their page.

    python -m benchmarks.headline_scores RUN        # scores what headline.jsonl lacks; a stretch takes a minute
    python -m benchmarks.headline_scores --report   # only prints the tables and draws the curves

G and its EMA are scored after each stretch on 10,000 test digits, as evaluate.py does; the EMA also on training digits,
by which alone weights are chosen. Losses are means over a stretch. The run's own grids, images/N.png, are cut into
digits, and the judge reads these.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import fast
from benchmarks.cells import ROOT, append_rows, machine, read_rows
from benchmarks.quirks import SHOWN, score
from data import load_train_and_test
from evaluation.during_training import EpochScorer
from evaluation.judge import judge_images, load_judge
from evaluation.metrics import show_to
from evaluation.scorecard import QUICK
from fast.process import keep_memory, tune_process
from run.film import CAPTION, write_film
from run.weights import load_network
from utils import atomic_write

ROWS = ROOT / "benchmarks" / "headline.jsonl"
PICTURE, GRIDS, FILM = (ROOT / "docs" / "images" / name for name in
                        ("headline.png", "headline_grids.png", "headline.gif"))  # fmt: skip
SHOWN_GRIDS = (0, 400, 4000, 40_000)  # batches, and the last
FILM_STEP = 1.13  # from each frame's batch to the next one's
EPOCH = 938  # batches
CAS_EPOCHS = (5, 10, 25, 50, 100, 150, 200)
STRETCH = 5  # epochs
LOSSES = ("g_adv", "d_real_adv", "d_fake_adv", "d_acc_real", "d_acc_fake")
SHARES = ("agreement", "cas")
FILES = {"ema": "acgan_gen_ema.pth", "raw": "acgan_gen.pth"}
# batches, and the agreement of the tutorial's published grids there, by another classifier
PUBLISHED = {(400, 2000): 0.480, (2000, 4000): 0.822, (4000, 8000): 0.921, (8000, 16_000): 0.980,
             (16_000, 32_000): 0.995, (32_000, 48_000): 0.995, (48_000, 64_000): 0.989,
             (64_000, 93_601): 0.983, (93_601, 187_601): None}  # fmt: skip


def read_grid(path: Path) -> torch.Tensor:
    """Cut a sample grid of ten rows of ten digits into uint8 (100, 1, 32, 32)."""
    cells = np.asarray(Image.open(path).convert("L"))[2:, 2:].reshape(10, 34, 10, 34)[:, :32, :, :32]
    return torch.from_numpy(np.ascontiguousarray(cells.swapaxes(1, 2))).reshape(100, 1, 32, 32)


def score_grids(run: Path, judge, known: set[int]) -> list[dict]:
    """Return a row for each grid that has none: the share of its digits that are recognised as their column's."""
    steps = sorted(int(path.stem) for path in (run / "images").glob("*.png") if path.stem.isdigit())
    rows, columns = [], torch.arange(10).repeat(10)
    for step in [step for step in steps if step not in known]:
        seen = judge_images(judge, read_grid(run / "images" / f"{step}.png"))[1]
        rows.append(dict(grid=step, agreement=round((seen == columns).double().mean().item(), 4)))
    return rows


def mean_losses(run: Path, known: set[int]) -> list[dict]:
    """Return a row for each stretch that has none: what G and D said on average in its rows of metrics.jsonl."""
    ends = [int(folder.name) for folder in (run / "stretches").iterdir() if folder.name.isdigit()]
    rows, of_run = [], [row for row in read_rows(run / "metrics.jsonl") if "g_adv" in row]
    for end in sorted({end // EPOCH for end in ends} - known):
        own = [row for row in of_run if end - STRETCH <= row["epoch"] < end]
        rows.append(dict(losses=end) | {key: round(sum(row[key] for row in own) / len(own), 4) for key in LOSSES})
    return rows


def score_stretches(run: Path, judge, known: set[tuple[int, str]]) -> None:
    """Append a row for G and one for the EMA of each stretch that has none."""
    train_set, test_set = load_train_and_test("mnist", None, None, 32)
    real, chooser = show_to(judge, *test_set[:2]), EpochScorer(1, None, train_set, torch.device("cpu"))
    instructions = {row["done"]: row["instructions"] for row in read_rows(run / "stretches.jsonl")}
    for step in sorted(int(folder.name) for folder in (run / "stretches").iterdir() if folder.name.isdigit()):
        for which, file in FILES.items():
            if (step, which) in known:
                continue
            generator = load_network(run / "stretches" / str(step) / file)
            fast.use_fast_layers(generator)
            with_cas = which == "ema" and step / EPOCH in CAS_EPOCHS
            row = dict(step=step, epoch=step // EPOCH, which=which, trained_with=instructions.get(step),
                       **score(generator, real, judge, QUICK.scored, with_cas))  # fmt: skip
            if which == "ema":
                on_training_digits = chooser.score_generator(generator)["intra_fid"]
                row["intra_fid_on_training_digits"] = round(on_training_digits, 5)
            append_rows(ROWS, [row | dict(machine=machine())])


def percent(share: float, decimals: int = 2) -> str:
    """Return a share as the pages write it."""
    return f"{100 * share:.{decimals}f} %"


def curves(rows: list[dict]) -> list[str]:
    """Return the scores by epoch as Markdown, in each cell that of the EMA, then that of G; and G's loss before."""
    shown = ("agreement", "fid", "intra_fid", "density", "coverage", "cas")
    lines = [f"| epoch | {' | '.join(SHOWN[key] for key in shown)} | g_adv |", "| --- " * (len(shown) + 2) + "|"]
    losses = {row["losses"]: row for row in rows if "losses" in row}
    scored = {(row["epoch"], row["which"]): row for row in rows if "which" in row}
    for epoch in sorted({epoch for epoch, _ in scored}):
        both = [scored[epoch, which] for which in ("ema", "raw")]
        cells = [", ".join(percent(row[key]) if key in SHARES else f"{row[key]:.3f}" for row in both if key in row)
                 for key in shown]  # fmt: skip
        lines.append(f"| {epoch} | {' | '.join(cells)} | {losses[epoch]['g_adv']:.2f} |")
    return lines


def grids_by_range(rows: list[dict]) -> list[str]:
    """Return the agreement of the grids over the ranges of batches, beside the published ones, as Markdown."""
    lines = ["| batches | grids | agreement | the tutorial's published grids |", "| --- | --- | --- | --- |"]
    for (first, end), published in PUBLISHED.items():
        own = {row["grid"]: row["agreement"] for row in rows if "grid" in row and first <= row["grid"] < end}
        if own:
            mean, theirs = percent(sum(own.values()) / len(own), 1), percent(published, 1) if published else ""
            lines.append(f"| {min(own):,} to {max(own):,} | {len(own)} | {mean} | {theirs} |")
    return lines


def draw(rows: list[dict]) -> None:
    """Draw agreement, coverage and FID of G and of the EMA over the epochs, and what D says of real and of drawn."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(7, 11), sharex=True)
    for axis, key in zip(axes[:3], ("agreement", "coverage", "fid"), strict=True):
        for which, label, colour in (("ema", "EMA", "#0072B2"), ("raw", "G", "#E69F00")):
            own = sorted((row["epoch"], row[key]) for row in rows if row.get("which") == which)
            axis.plot(*zip(*own, strict=True), label=label, color=colour, marker="o", markersize=3)
        axis.set_ylabel(key, fontsize=13)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    axes[2].set_yscale("log")
    losses = sorted((row["losses"], row["g_adv"], row["d_real_adv"]) for row in rows if "losses" in row)
    for column, label, colour in ((1, "g_adv", "#009E73"), (2, "d_real_adv", "#CC79A7")):
        axes[3].plot([row[0] for row in losses], [row[column] for row in losses], label=label, color=colour, marker="o",
                     markersize=3)  # fmt: skip
    axes[3].set_ylabel("loss", fontsize=13)
    axes[3].legend(frameon=False)
    axes[3].grid(alpha=0.3)
    axes[3].set_xlabel("epochs of 938 batches", fontsize=13)
    figure.tight_layout()
    atomic_write(PICTURE, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def draw_grids(run: Path) -> None:
    """Draw the run's own grids of SHOWN_GRIDS and the last one side by side, each below its batch."""
    last = max(int(path.stem) for path in (run / "images").glob("*.png"))
    grids = {step: Image.open(run / "images" / f"{step}.png").convert("L") for step in (*SHOWN_GRIDS, last)}
    side = grids[last].width
    picture = Image.new("L", ((side + CAPTION) * len(grids) - CAPTION, side + CAPTION), "white")
    for column, (step, grid) in enumerate(grids.items()):
        picture.paste(grid, ((side + CAPTION) * column, CAPTION))
        ImageDraw.Draw(picture).text(((side + CAPTION) * column + 3, 1), f"batch {step:,}", fill="black")
    atomic_write(GRIDS, lambda file: picture.save(file, format="PNG", optimize=True))


def make_film(run: Path) -> None:
    """Make a film of the whole run, from its grids of the same noise: dense where digits form, then ever sparser."""
    steps, shown = sorted(int(path.stem) for path in (run / "images" / "fixed_z").glob("*.png")), []
    for step in steps:
        if len(shown) < 2 or step >= FILM_STEP * shown[-1] or step == steps[-1]:
            shown.append(step)
    with tempfile.TemporaryDirectory() as folder:
        (images := Path(folder) / "fixed_z").mkdir()
        for step in shown:
            shutil.copy(run / "images" / "fixed_z" / f"{step}.png", images)
        write_film(Path(folder), steps[-1])
        shutil.copy(Path(folder) / "film.gif", FILM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="the run's folder")
    parser.add_argument("--report", action="store_true", help="score nothing, print the tables and draw the curves")
    opt = parser.parse_args()
    if not opt.report:
        tune_process(torch.device("cpu"))
        keep_memory(torch.device("cpu"))
        judge, rows = load_judge(None), read_rows(ROWS)
        append_rows(ROWS, score_grids(opt.run, judge, {row["grid"] for row in rows if "grid" in row}))
        append_rows(ROWS, mean_losses(opt.run, {row["losses"] for row in rows if "losses" in row}))
        score_stretches(opt.run, judge, {(row["step"], row["which"]) for row in rows if "which" in row})
        draw_grids(opt.run)
        make_film(opt.run)
    rows = read_rows(ROWS)
    print("\n".join([*curves(rows), "", *grids_by_range(rows)]))
    draw(rows)


if __name__ == "__main__":
    main()
