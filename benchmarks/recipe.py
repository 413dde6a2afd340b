"""The search for `--recipe best`: short runs of many variants, scored on training digits that were held out.

    python -m benchmarks.recipe                # runs what benchmarks/recipe.jsonl lacks; stop and go on at any time
    python -m benchmarks.recipe --table        # the means over seeds

Each cell trains `acgan.py` on the first 50,000 training digits. A judge of these scores the EMA against the other
10,000, and CAS is tested on them. The test digits are never read. Cells run one at a time, as two at once on two cores
are many times slower. Rows with `--d_width` or `--d_deviation on` can be made again at commit 2d0af8b. Some where
gamma or, from the start, the rate falls were made before that had a flag, so their own flags do not say so.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import acgan
import departures
import fast
from benchmarks.cells import ROOT, append_rows, read_rows, run_cells
from data import load_dataset
from data.drawing import draw_set
from evaluation.judge import load_judge, train_classifier
from evaluation.metrics import agreement, show_to
from evaluation.scorecard import Counts, balanced, score_images
from fast.process import tune_process
from run.weights import load_network, save_network

ROWS = ROOT / "benchmarks" / "recipe.jsonl"
TRAINED = 50_000  # digits; the rest of the 60,000 is for the scores
COUNTS = Counts(scored=1000, cas=3000, cas_epochs=2, pairs=100)
SHOWN = ("agreement", "fid", "coverage", "cas", "ms_ssim")
# Where the search began; --recipe best may move on, these rows stay what they are.
PROTOTYPE = shlex.split(
    "--class_loss logits --bn_eps 0.00001 --class_head 2k --d_norm none --d_dropout 0 --r1 0.2 --lr_schedule linear "
    "--lr 0.002 --b1 0 --b2 0.99 --ema 0.999"
)
BOTH = [*PROTOTYPE, "--conditioning", "both", "--lr", "0.004"]
WHOLE = [*BOTH, "--d_deviation", "class", "--r1_on", "whole"]
THREE = [*WHOLE, "--r1", "0.05", "--d_steps", "3"]
FALLING = ["--r1_end", "0.1", "--lr_fall", "1"]
VARIANTS = {  # name: batches, flags
    "faithful": (1000, []),
    "prototype": (1000, PROTOTYPE),
    "gamma 0.05": (1000, [*PROTOTYPE, "--r1", "0.05"]),
    "gamma 0.1": (1000, [*PROTOTYPE, "--r1", "0.1"]),
    "gamma 0.5": (1000, [*PROTOTYPE, "--r1", "0.5"]),
    "lr 0.001": (1000, [*PROTOTYPE, "--lr", "0.001"]),
    "lr 0.003": (1000, [*PROTOTYPE, "--lr", "0.003"]),
    "both": (1000, [*PROTOTYPE, "--conditioning", "both"]),
    "both, lr 0.004": (1000, BOTH),
    "lr 0.005": (1000, [*PROTOTYPE, "--lr", "0.005"]),
    "bn_eps 0.8, lr 0.003": (1000, [*PROTOTYPE, "--bn_eps", "0.8", "--lr", "0.003"]),
    "both, lr 0.004, 2000": (2000, BOTH),
    "lr 0.004, 2000": (2000, [*PROTOTYPE, "--lr", "0.004"]),
    "both, lr 0.004, half class term": (1000, BOTH),
    "both, lr 0.004, 6000": (6000, BOTH),
    "batch 32, lr 0.003": (2000, [*PROTOTYPE, "--batch_size", "32", "--lr", "0.003"]),
    "b1 0.5, lr 0.003": (1000, [*PROTOTYPE, "--b1", "0.5", "--lr", "0.003"]),
    "concat": (1000, [*PROTOTYPE, "--conditioning", "concat"]),
    "ema 0.998": (1000, [*PROTOTYPE, "--ema", "0.998"]),
    "both, dropout 0.1": (1000, [*BOTH, "--d_dropout", "0.1"]),
    "both, shifts": (1000, BOTH),
    "both, deviation within a class": (1000, [*BOTH, "--d_deviation", "class"]),
    "both, deviation within a class, 2000": (2000, [*BOTH, "--d_deviation", "class"]),
    "whole R1 0.05, 2000": (2000, [*WHOLE, "--r1", "0.05"]),
    "whole R1 0.01, 2000": (2000, [*WHOLE, "--r1", "0.01"]),
    "whole R1 0.2, 2000": (2000, [*WHOLE, "--r1", "0.2"]),
    # the second edition
    "whole R1 0.05, 800": (800, [*WHOLE, "--r1", "0.05"]),
    "three D steps, 800": (800, THREE),
    "two D steps, 800": (800, [*THREE, "--d_steps", "2"]),
    "three D steps, lr 0.005, 800": (800, [*THREE, "--lr", "0.005"]),
    "three D steps, the real labels, 800": (800, THREE),
    "three D steps, ema 0.998, 800": (800, [*THREE, "--ema", "0.998"]),
    "three D steps, gamma falls, 800": (800, [*THREE, "--r1_end", "0.1"]),
    "three D steps, gamma 0.02, 800": (800, [*THREE, "--r1", "0.02"]),
    "four D steps, 800": (800, [*THREE, "--d_steps", "4"]),
    "three D steps, rate falls from the start, 800": (800, [*THREE, "--lr_fall", "1"]),
    "three D steps, G's rate 0.006, 800": (800, THREE),
    "three D steps, rate and gamma fall from the start, 800": (800, [*THREE, *FALLING]),
    "four D steps, rate and gamma fall from the start, 800": (800, [*THREE, *FALLING, "--d_steps", "4"]),
    # how long runs end
    "four D steps, rate falls from the start, 6000": (6000, [*THREE, "--lr_fall", "1", "--d_steps", "4"]),
    "two D steps, rate falls from the start, 6000": (6000, [*THREE, "--lr_fall", "1", "--d_steps", "2"]),
    "one D step, rate falls from the start, 6000": (6000, [*THREE, "--lr_fall", "1", "--d_steps", "1"]),
    "two D steps, gamma 0.2, 6000": (6000, [*THREE, "--lr_fall", "1", "--d_steps", "2", "--r1", "0.2"]),
    "two D steps, gamma 0.02, 6000": (6000, [*THREE, "--lr_fall", "1", "--d_steps", "2", "--r1", "0.02"]),
    "real digits": (0, []),  # as many of those to train on
}


def half_class_term() -> None:
    """Halve G's class term."""
    whole = departures.Step.generator_class
    departures.Step.generator_class = lambda *inputs: whole(*inputs) / 2


class ShiftingDiscriminator(departures.Discriminator):
    """D that sees each image shifted by up to 2 pixels each way, as in DiffAugment (arXiv:2006.10738)."""

    def moved(self, img):
        size, side = len(img), img.shape[-1]
        for axis in (2, 3):
            shift = torch.randint(-2, 3, (size, 1), device=img.device)
            places = (torch.arange(side, device=img.device) + shift).clamp(0, side - 1)  # the border is black
            places = places.view(size, 1, side, 1) if axis == 2 else places.view(size, 1, 1, side)
            img = img.gather(axis, places.expand(size, img.shape[1], side, side))
        return img

    def forward(self, img):
        return super().forward(self.moved(img))


def shifts() -> None:
    """Train with a D that sees shifted images."""
    with_logit = departures.with_logit
    departures.Discriminator = ShiftingDiscriminator
    departures.with_logit = lambda discriminator, img: with_logit(discriminator, discriminator.moved(img))


def real_labels() -> None:
    """Draw the classes of D's first share of the real images."""
    whole = departures.Step.__call__

    def step(self, *inputs):
        *first, labels, z, _ = inputs
        return whole(self, *first, labels, z, labels[:: self.d_steps])

    departures.Step.__call__ = step


def faster_generator() -> None:
    """Give G half as high a rate again."""
    whole = departures.Step.prepare

    def prepare(self, step, optimizer_G, optimizer_D):
        penalised = whole(self, step, optimizer_G, optimizer_D)
        optimizer_G.param_groups[0]["lr"] *= 1.5
        return penalised

    departures.Step.prepare = prepare


CHANGES = {  # ideas without a flag
    "three D steps, the real labels, 800": real_labels,
    "three D steps, G's rate 0.006, 800": faster_generator,
    "both, lr 0.004, half class term": half_class_term,
    "both, shifts": shifts,
}


def first_digits(name, data_root, img_size, *args, **kwargs):
    """Stand in for load_dataset: the digits to train on."""
    data = load_dataset(name, data_root, img_size, *args, **kwargs)
    return data._replace(images=data.images[:TRAINED], labels=data.labels[:TRAINED])


def held_out_judge(path: Path, data):
    """Return the judge of the digits to train on; it is trained once and kept at `path`."""
    if not path.exists():
        judge = train_classifier(data.images[:TRAINED], data.labels[:TRAINED], 10, 10, 0, "cpu", jitter=True)
        save_network(path, judge, data.classes)
    return load_judge(path)


def train_generator(name: str, seed: int) -> torch.nn.Module:
    """Train one cell's networks on the first digits; return the EMA."""
    batches, flags = VARIANTS[name]
    acgan.load_dataset = first_digits
    CHANGES.get(name, lambda: None)()
    with tempfile.TemporaryDirectory() as out_dir:
        few_files = ["--sample_interval", "100000", "--checkpoint_interval", "100000"]
        status = acgan.main([*flags, "--seed", str(seed), "--max_steps", str(batches), "--out_dir", out_dir,
                             "--compile", "on", *few_files])  # fmt: skip
        if status:
            sys.exit(status)
        generator = load_network(Path(out_dir) / "acgan_gen_ema.pth").eval()
    fast.use_fast_layers(generator)
    return generator


def run_cell(name: str, seed: int, judge_path: Path) -> None:
    """Train and score one cell in this process, and append its row."""
    batches, flags = VARIANTS[name]
    start = time.monotonic()
    generator = train_generator(name, seed) if batches else None
    seconds = time.monotonic() - start
    tune_process(torch.device("cpu"))
    data = load_dataset("mnist", None, 32)
    judge = held_out_judge(judge_path, data)
    if generator:
        labels = torch.arange(10).repeat(COUNTS.cas)
        images = draw_set(generator, labels, seed=0)
    else:
        images, labels = balanced(data.images[:TRAINED], data.labels[:TRAINED], COUNTS.cas, 10, seed)
    real = show_to(judge, data.images[TRAINED:], data.labels[TRAINED:])
    scores, by_class = score_images(images, labels, real, judge, COUNTS)
    if not generator:
        scores["agreement"] = agreement(real)  # the judge has learned the other digits
    scores["worst_coverage"] = min(row["coverage"] for row in by_class)
    scores = {key: round(value, 5) for key, value in scores.items()}
    row = dict(name=name, seed=seed, batches=batches, flags=flags, seconds=round(seconds, 1), **scores)
    append_rows(ROWS, [row])


def table(rows: list[dict]) -> str:
    """Return the mean over seeds of each variant, and the spread of its CAS, as Markdown."""
    head = ["variant", "batches", "seeds", *SHOWN, "CAS, from to"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        means = [f"{statistics.mean(row[key] for row in own):.3f}" for key in SHOWN]
        cas = [row["cas"] for row in own]
        lines.append(
            f"| {name} | {own[0]['batches']:,} | {len(own)} | {' | '.join(means)} | {min(cas):.3f} to {max(cas):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=list(VARIANTS),
                        help="only this variant; may be repeated (default: all)")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--judge", type=Path, default=Path(tempfile.gettempdir()) / "acgan_held_out_judge.pth",
                        help="where the judge is kept between runs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cell", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    opt = parser.parse_args()
    if opt.cell:
        return run_cell(opt.cell[0], int(opt.cell[1]), opt.judge)
    if opt.table:
        return print(table(read_rows(ROWS)))
    names = opt.only or list(VARIANTS)
    done = {(row["name"], row["seed"]) for row in read_rows(ROWS)}
    cells = [(name, seed) for seed in range(opt.seeds) for name in names if (name, seed) not in done]
    run_cells("recipe", cells, "--judge", opt.judge)  # all variants of seed 0 first


if __name__ == "__main__":
    main()
