"""The quirk study: what each departure from the tutorial does to the digits, with intervals.

    python -m benchmarks.quirks               # runs what benchmarks/quirks.jsonl lacks; stop and go on at any time
    python -m benchmarks.quirks --long        # and faithful and best once for 25 epochs, scored after every fifth
    python -m benchmarks.overlap              # what becomes of digits that two classes share: a section of the page
    python -m benchmarks.quirks --report      # only writes the two pages and the plot from the rows

Each cell, a variant with a seed, trains `acgan.py` and keeps G and its EMA after some numbers of batches. Both are then
scored on the test digits by the bundled judge. All variants of seed 0 run first, then those of seed 1, so that a table
stands after each seed. A run that was killed is resumed from its checkpoint. Differences are those of one seed, so all
variants of a seed belong on one machine; with a GPU, whose noise is another, begin with a new seed, or with no rows.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import fast
from benchmarks import overlap
from benchmarks.cells import ROOT, append_rows, machine, mean_and_interval, read_rows, run_cells, train_cell
from data import load_train_and_test
from data.drawing import draw_set
from evaluation import metrics
from evaluation.judge import load_judge
from evaluation.scorecard import QUICK
from fast.process import tune_process
from run.weights import load_network
from utils import atomic_write, choose_device

POINTS = (500, 1000, 3000)  # batches after which G is scored; the last ends the run
LONG = (4690, 9380, 14_070, 18_760, 23_450)  # batches: 5, 10, 15, 20 and 25 epochs
FEW = 3  # seeds; the intervals of fewer say little
CAS_FROM = 1000  # batches; before that the images teach a classifier nothing worth its time
REPAIRS = ["--class_loss", "logits", "--bn_eps", "0.00001", "--conditioning", "concat"]
VARIANTS = {
    "faithful": [],
    "class_loss logits": ["--class_loss", "logits"],
    "bn_eps 1e-5": ["--bn_eps", "0.00001"],
    "conditioning concat": ["--conditioning", "concat"],
    "fake_class_loss off": ["--fake_class_loss", "off"],
    "class_head 2k": ["--class_head", "2k"],
    "pretrain_class_head 1": ["--pretrain_class_head", "1"],
    "lr_schedule linear": ["--lr_schedule", "linear"],
    "d_dropout 0": ["--d_dropout", "0"],
    "usual repairs": REPAIRS,
    "best": ["--recipe", "best", "--d_steps", "1", "--r1_end", "1", "--lr_fall", "0.5"],  # its first edition
}
QUESTIONS = {
    "class_loss logits": "Is the softmax before the cross-entropy harmful? Without it",
    "conditioning concat": "Multiply noise and label embedding, or concatenate them? Concatenating",
    "fake_class_loss off": "Should D learn classes from generated images? Without that",
    "bn_eps 1e-5": "Is BatchNorm2d(n, 0.8) a mistake? With PyTorch's own eps",
    "pretrain_class_head 1": "Does ACGAN start faster from a trained classifier, as the tutorial says? With an epoch "
    "of it before",
    "class_head 2k": "Should D's class head tell real from generated classes? With 2K outputs",
    "lr_schedule linear": "Should the learning rate fall at the end? With that",
    "d_dropout 0": "Does D need its dropout? Without it",
    "usual repairs": "Are the usual repairs together (logits, eps 1e-5, concatenation) an improvement? With them",
    "best": "Is the first edition of `--recipe best` better? With it",
}
SHOWN = {"agreement": "agreement", "fid": "FID", "intra_fid": "intra-FID", "density": "density",
         "coverage": "coverage", "cas": "CAS"}  # fmt: skip
JUDGED_BY = ("agreement", "coverage", "cas")  # the verdicts; more of each is better


def score(generator, real: metrics.Judged, judge, per_class: int, with_cas: bool) -> dict[str, float]:
    """Return the scores of `per_class` images of each class, drawn by G in eval mode from the noise of seed 0."""
    n_classes = len(generator.classes)
    labels = torch.arange(n_classes).repeat(max(per_class, QUICK.cas) if with_cas else per_class)
    images, n_scored = draw_set(generator.eval(), labels, seed=0), per_class * n_classes
    shown = metrics.show_to(judge, images[:n_scored], labels[:n_scored])
    density, coverage = metrics.density_and_coverage(real.features, shown.features)
    scores = dict(agreement=metrics.agreement(shown), fid=metrics.fid(real.features, shown.features),
                  intra_fid=metrics.intra_fid(real, shown, n_classes), density=density, coverage=coverage)  # fmt: skip
    if with_cas:
        cas_set = images, labels, real.images, real.labels
        device = next(generator.parameters()).device
        scores["cas"] = metrics.classification_accuracy_score(*cas_set, QUICK.cas_epochs, 0, device)
    return {name: round(value, 5) for name, value in scores.items()}


def run_cell(name: str, seed: int, opt: argparse.Namespace) -> None:
    """Train and score one cell in this process, and append its rows: one for each number of batches."""
    folder = opt.work / f"{name.replace(' ', '_')}_{opt.points[-1]}_{seed}"
    train_cell([*VARIANTS[name], *opt.flags], seed, opt.points, folder)
    tune_process(device := choose_device("auto")[0])
    judge, rows = load_judge(None, device), []
    real = metrics.show_to(judge, *load_train_and_test("mnist", None, None, 32)[1][:2])
    for point in opt.points:
        row = dict(name=name, seed=seed, batches=point, machine=machine())
        for which in ("ema", "raw"):
            with_cas = which == "ema" and point >= CAS_FROM
            generator = load_network(folder / f"{which}_{point}.pth", device)
            fast.use_fast_layers(generator)
            row[which] = score(generator, real, judge, opt.scored, with_cas)
        rows.append(row)
    append_rows(opt.rows, rows)
    shutil.rmtree(folder)
    write_report(opt)


def differences(rows: list[dict], name: str, batches: int, key: str) -> list[float]:
    """Return what a variant's EMA scores above the faithful one of the same seed, for each seed that both have."""
    by_seed = {row["seed"]: row["ema"] for row in rows if (row["name"], row["batches"]) == ("faithful", batches)}
    own = [row for row in rows if (row["name"], row["batches"]) == (name, batches) and row["seed"] in by_seed]
    return [row["ema"][key] - by_seed[row["seed"]][key] for row in own if key in row["ema"]]


def verdict(intervals: dict[str, tuple[float, float | None]], seeds: int) -> str:
    """Say in words what the intervals of the differences say; an interval that holds 0 says nothing."""
    if seeds < FEW:
        return f"fewer than {FEW} seeds: undecided"
    up = [SHOWN[key] for key, (mean, half) in intervals.items() if mean > half]
    down = [SHOWN[key] for key, (mean, half) in intervals.items() if -mean > half]
    rest = [SHOWN[key] for key, (mean, half) in intervals.items() if abs(mean) <= half]
    undecided = f"; {', '.join(rest)} undecided" if rest else ""
    if up and down:
        return f"a trade: {', '.join(up)} up; {', '.join(down)} down{undecided}"
    if up or down:
        return f"**{'helps' if up else 'harms'}**: {', '.join(up or down)} {'up' if up else 'down'}{undecided}"
    return "no difference that this study can see"


def shown(key: str, mean: float, half: float | None) -> str:
    """Return a difference and its interval; shares in percentage points, all else as it is."""
    scale, digits = (100, 1) if key in ("agreement", "cas") else (1, 3)
    text = f"{scale * mean:+.{digits}f}"
    return text if half is None else f"{text} ± {scale * half:.{digits}f}"


def table(rows: list[dict], which: str, points: list[int]) -> list[str]:
    """Return the means over seeds as lines of Markdown: `which` is "ema" or "raw"."""
    keys = [key for key in SHOWN if any(key in row[which] for row in rows)]
    lines = [f"| variant | batches | seeds | {' | '.join(SHOWN[key] for key in keys)} |",
             "| --- " * (len(keys) + 3) + "|"]  # fmt: skip
    for name in dict.fromkeys(row["name"] for row in rows):
        for point in points:
            own = [row[which] for row in rows if (row["name"], row["batches"]) == (name, point)]
            if own:
                means = [f"{statistics.mean(row[key] for row in own):.3f}" if key in own[0] else "" for key in keys]
                lines.append(f"| {name} | {point:,} | {len(own)} | {' | '.join(means)} |")
    return lines


def last_gains(rows: list[dict]) -> list[str]:
    """Say what the last five epochs of the longer runs still changed, as an answer to when one should stop."""
    before, after = ({row["name"]: row["ema"] for row in rows if row["batches"] == at} for at in LONG[-2:])
    lines = ["When should one stop? This is what the last five of the 25 epochs still changed (points, shares):", ""]
    for name in [name for name in VARIANTS if name in before and name in after]:
        changes = [f"{SHOWN[key]} {shown(key, after[name][key] - before[name][key], None)}" for key in JUDGED_BY]
        lines.append(f"- {name}: {', '.join(changes)}.")
    return lines


def machines(rows: list[dict]) -> list[str]:
    """Return what ran where, as lines of Markdown."""
    lines = ["| machine | seed | variants |", "| --- | --- | --- |"]
    for where, seed in sorted({(row["machine"], row["seed"]) for row in rows}):
        names = list(dict.fromkeys(row["name"] for row in rows if (row["machine"], row["seed"]) == (where, seed)))
        lines.append(f"| {where} | {seed} | {'all' if len(names) == len(VARIANTS) else ', '.join(names)} |")
    return lines


def report(rows: list[dict], points: tuple[int, ...], scores_page: str) -> str:
    """Return docs/quirks.md: the verdicts, when to stop, and digits that two classes share."""
    last = points[-1]
    short = [row for row in rows if row["batches"] in points]
    seeds = sorted({row["seed"] for row in short})
    lines = [
        "# What does each departure from the tutorial do to the digits?",
        "",
        f"`python -m benchmarks.quirks` trains every variant with the same seeds ({', '.join(map(str, seeds))}), for",
        f"{last:,} batches of 64 images. It scores the EMA of G on the test digits, as `evaluate.py` does, but on",
        f"5,000 images. This page, [the scores]({scores_page}) and the picture are made of `benchmarks/quirks.jsonl`.",
        "",
        "A difference is that to the faithful run of the same seed: its mean over the seeds and a 95 % interval",
        "(Student's t). Of so many intervals one or two miss 0 by chance. The rates of `lr_schedule linear` and of",
        "`best` fall in the second half of the run. `best` is the first edition of `--recipe best`, which",
        "`--d_steps 1 --r1_end 1 --lr_fall 0.5` beside it repeats.",
        "",
        f"## The answers, after {last:,} batches",
        "",
        "Agreement and CAS in percentage points, coverage as a share. More of each is better.",
        "",
        f"| question | seeds | {' | '.join(SHOWN[key] for key in JUDGED_BY)} | verdict |",
        "| --- " * (len(JUDGED_BY) + 3) + "|",
    ]
    for name, question in QUESTIONS.items():
        values = {key: differences(short, name, last, key) for key in JUDGED_BY}
        if not all(values.values()):
            continue
        intervals = {key: mean_and_interval(own) for key, own in values.items()}
        cells = [shown(key, *interval) for key, interval in intervals.items()]
        count = len(values[JUDGED_BY[0]])
        lines.append(f"| {question}: | {count} | {' | '.join(cells)} | {verdict(intervals, count)} |")
    lines += ["", "![Agreement and coverage over the batches](images/quirks.png)"]
    if longer := [row for row in rows if row["batches"] in LONG]:
        lines += ["", "## Up to 25 epochs, one run each", "",
                  "`python -m benchmarks.quirks --long`. The rate of `best` falls in the second half of its 25 epochs,",
                  "so its earlier scores are not those of a shorter run. The EMA:", ""]  # fmt: skip
        lines += [*table(longer, "ema", list(LONG)), "", *last_gains(longer)]
    lines += overlap.section(read_rows(overlap.ROWS))
    return "\n".join(lines) + "\n"


def report_scores(rows: list[dict], points: tuple[int, ...], page: str) -> str:
    """Return docs/quirks-scores.md: all scores, and where they were made."""
    short = [row for row in rows if row["batches"] in points]
    lines = ["# All scores of the quirk study", "", "Means over the seeds; agreement, coverage and CAS as shares. How",
             f"they were made, and what they say: [the study]({page})."]  # fmt: skip
    lines += ["", "## The scores of the EMA", "", *table(short, "ema", list(points))]
    lines += ["", "## The scores of G itself", "", *table(short, "raw", list(points))]
    if longer := [row for row in rows if row["batches"] in LONG]:
        lines += ["", "## G itself, up to 25 epochs, one run each", "", *table(longer, "raw", list(LONG))]
    lines += ["", "## Machines", "", "With the same seed, another machine rounds differently, which soon gives another",
              "run of the same kind.", "", *machines(short)]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], points: tuple[int, ...], path: Path) -> None:
    """Draw agreement and coverage over the batches: a line for each variant, and a band from its lowest to highest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    # Okabe and Ito's colours, which the colour-blind can tell apart; those that share one differ in their dashes
    colours = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00"]
    figure, axes = plt.subplots(2, 1, figsize=(6, 9), sharex=True)
    for number, name in enumerate(VARIANTS):
        own = [row for row in rows if row["name"] == name and row["batches"] in points]
        at = sorted({row["batches"] for row in own})
        if not own:
            continue
        look = dict(color="#0072B2" if name == "best" else colours[number % 6], marker="osD^vP"[number // 2 % 6],
                    linestyle="-" if name in ("faithful", "best") or number < 6 else "--",
                    linewidth=3 if name in ("faithful", "usual repairs", "best") else 1.5)  # fmt: skip
        for axis, key in zip(axes, ("agreement", "coverage"), strict=True):
            values = [[row["ema"][key] for row in own if row["batches"] == point] for point in at]
            axis.plot(at, [statistics.mean(seeds) for seeds in values], label=name, **look)
            axis.fill_between(at, [min(seeds) for seeds in values], [max(seeds) for seeds in values],
                              color=look["color"], alpha=0.12, linewidth=0)  # fmt: skip
            axis.set_ylabel(key, fontsize=13)
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
    axes[1].set_xscale("log")
    axes[1].set_xticks(points, [f"{point:,}" for point in points], fontsize=12)
    axes[1].minorticks_off()
    axes[1].set_xlabel("batches of 64 images", fontsize=13)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=12, frameon=False)
    figure.subplots_adjust(left=0.12, right=0.97, top=0.98, bottom=0.3, hspace=0.06)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def write_report(opt: argparse.Namespace) -> None:
    """Write both pages and the plot of all rows there are."""
    by_cell = {(row["name"], row["seed"], row["batches"]): row for row in read_rows(opt.rows)}  # none of them twice
    rows, points = list(by_cell.values()), POINTS if opt.long else opt.points
    scores_page = opt.page.with_name(f"{opt.page.stem}-scores.md")
    atomic_write(opt.page, lambda file: file.write(report(rows, points, scores_page.name).encode()))
    atomic_write(scores_page, lambda file: file.write(report_scores(rows, points, opt.page.name).encode()))
    draw(rows, points, opt.plot)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=FEW, help="seeds of each variant (default: %(default)s)")
    add("--jobs", type=int, default=1, help="cells at a time; more help on a GPU alone (default: %(default)s)")
    add("--only", action="append", choices=list(VARIANTS), help="only this variant; may be repeated (default: all)")
    add("--long", action="store_true", help="faithful and best, seed 0, for 25 epochs, scored every 5")
    add("--report", action="store_true", help="run nothing, only write pages and plot from the rows")
    add("--points", type=int, nargs="+", default=POINTS, help="batches to score after (default: 500 1000 3000)")
    add("--scored", type=int, default=500, help="images of each class to score (default: %(default)s)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "acgan_quirks",
        help="folder of the runs in progress, about 30 MB each (default: %(default)s)")  # fmt: skip
    add("--rows", type=Path, default=ROOT / "benchmarks" / "quirks.jsonl", help="the rows (default: %(default)s)")
    docs = ROOT / "docs"
    add("--page", type=Path, default=docs / "quirks.md",
        help="the page; a second one beside it, PAGE-scores.md, has all scores (default: %(default)s)")  # fmt: skip
    add("--plot", type=Path, default=docs / "images" / "quirks.png", help="the plot (default: %(default)s)")
    add("--flags", default=[], type=str.split, help="more flags for all variants, as one text (default: none)")
    add("--cell", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    opt = parser.parse_args(argv)
    opt.points = LONG if opt.long else tuple(opt.points)
    return opt


def main() -> None:
    opt = parse_args()
    if opt.cell:
        return run_cell(opt.cell[0], int(opt.cell[1]), opt)
    if not opt.report:
        names = opt.only or (["faithful", "best"] if opt.long else list(VARIANTS))
        done = {(row["name"], row["seed"], row["batches"]) for row in read_rows(opt.rows)}
        cells = [(name, seed) for seed in range(1 if opt.long else opt.seeds) for name in names
                 if any((name, seed, point) not in done for point in opt.points)]  # fmt: skip
        run_cells("quirks", cells, *sys.argv[1:], jobs=opt.jobs)
    write_report(opt)


if __name__ == "__main__":
    main()
