"""The scorecard of a trained generator, each figure beside what real digits get.

python evaluate.py                    # the generator that comes along
python evaluate.py acgan_gen.pth      # your own; about a minute on two cores
python evaluate.py --full --json      # more images; for programs
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import torch

from batches import normalize
from command_line import SEED, OneLineParser, data_flags, device_flag, exit_status, flag, print_result, read_network
from dataset import NAMES, load_train_and_test
from generate import WEIGHTS, draw_set, load_generator
from judge import WEIGHTS as JUDGE_WEIGHTS
from judge import Judge, load_judge
from models import Discriminator, Generator, load_network
from scores import (
    Judged,
    agreement,
    check_torchmetrics,
    classification_accuracy_score,
    density_and_coverage,
    fid,
    scores_by_class,
    show_to,
)
from speed import tune_process
from utils import BadInput, announce, choose_device


@dataclass(frozen=True)
class Counts:
    """How many images each measure takes, per class, and passes of CAS over its own."""

    scored: int
    cas: int
    cas_epochs: int
    pairs: int


QUICK = Counts(scored=1000, cas=3000, cas_epochs=2, pairs=200)
FULL = Counts(scored=5000, cas=5000, cas_epochs=5, pairs=1000)

# key, its name in the table, which way is good, and how to print it
ROWS = [
    ("agreement", "label agreement", "up", "{:.2%}"),
    ("fid", "FID, in the judge's features", "down", "{:.3f}"),
    ("intra_fid", "intra-FID, mean of the classes", "down", "{:.3f}"),
    ("density", "density", "up", "{:.3f}"),
    ("coverage", "coverage", "up", "{:.3f}"),
    ("ms_ssim", "same-class MS-SSIM", "as real", "{:.3f}"),
    ("cas", "CAS", "up", "{:.2%}"),
    ("d_accuracy", "D's own accuracy", "", "{:.2%}"),
    ("d_validity", "D's mean P(real)", "", "{:.2f}"),
]
CLASS_ROWS = [row for row in ROWS if row[0] in ("agreement", "fid", "density", "coverage", "ms_ssim")]


def images_by_class(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """How many images each class has, int64 (n_classes,). Raises BadInput if one has fewer than two."""
    counts = torch.bincount(labels, minlength=n_classes)
    if counts.min() < 2:
        raise BadInput(f"class number {int(counts.argmin())} has {int(counts.min())} real images, but two are needed")
    return counts


def balanced(images, labels, per_class: int, n_classes: int, seed: int):
    """`per_class` random images of each class, or as many as the smallest class has; the classes in turn.

    Returns:
        images, uint8 (N, C, H, W), and labels, int64 (N,).

    Raises:
        BadInput: a class has fewer than two images.
    """
    counts = images_by_class(labels, n_classes)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    per_class = min(per_class, int(counts.min()))
    by_class = [order[labels[order] == label][:per_class] for label in range(n_classes)]
    indices = torch.stack(by_class, 1).flatten()
    return images[indices], labels[indices]


def collapsed(generated: float, real: float) -> bool:
    """True if a class's mean MS-SSIM is over a quarter of the way from that of real images to that of one image, 1."""
    return generated > real + (1 - real) / 4


@torch.no_grad()
def discriminator_opinion(discriminator: Discriminator, images, labels, device) -> tuple[float, float]:
    """D in eval mode on uint8 images: the share of classes it gets right, and its mean P(real)."""
    discriminator.eval()
    right, validity = 0, 0.0
    for chunk, chunk_labels in zip(images.split(500), labels.split(500), strict=True):
        real, label = discriminator(normalize(chunk.to(device)))
        right += (label.argmax(1).cpu() == chunk_labels).sum().item()
        validity += real.sum().item()
    return right / len(labels), validity / len(labels)


def score(
    images: torch.Tensor,
    labels: torch.Tensor,
    real: Judged,
    judge: Judge,
    counts: Counts,
    seed: int = 0,
    discriminator: Discriminator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Score images against the real test set.

    Args:
        images, labels: uint8 (N, C, H, W) and int64 (N,), the classes in turn, N at least what `counts` says.
        real: the test set.
        judge: of these classes.
        counts: images for each measure.
        seed: of the pairs and of the CAS classifier.
        discriminator: whose opinion is told too.
        device: where to compute.

    Returns:
        The scores, and for each class those that go by class; ROWS says what they are.
    """
    n_classes = judge.config["n_classes"]
    n_scored, n_cas = counts.scored * n_classes, counts.cas * n_classes
    shown = show_to(judge, images[:n_scored], labels[:n_scored])
    by_class = scores_by_class(real, shown, counts.pairs, seed, n_classes)
    density, coverage = density_and_coverage(real.features, shown.features)
    scores = {
        "agreement": agreement(shown),
        "fid": fid(real.features, shown.features),
        "intra_fid": sum(row["fid"] for row in by_class) / n_classes,
        "density": density,
        "coverage": coverage,
        "ms_ssim": sum(row["ms_ssim"] for row in by_class) / n_classes,
        "cas": classification_accuracy_score(
            images[:n_cas], labels[:n_cas], real.images, real.labels, counts.cas_epochs, seed, device
        ),
    }
    if discriminator is not None:
        opinion = discriminator_opinion(discriminator, shown.images, shown.labels, device)
        scores["d_accuracy"], scores["d_validity"] = opinion
    return scores, by_class


def scorecard(images, labels, train_set, test_set, judge, counts, seed=0, discriminator=None, device="cpu") -> dict:
    """Score images beside the real floor: as many training images, scored in the same way against the test set.

    The judge has learnt from the training images, and D as well, so for what these two recognise the floor is what they
    make of the test images.

    Args:
        images, labels, judge, counts, seed, discriminator, device: as of `score`.
        train_set, test_set: real images and labels, uint8 (N, C, H, W) and int64 (N,), in any order.

    Returns:
        {"scores": {measure: {"generated": x, "real": y}}, "by_class": {name: the same}, "warnings": [...]}.
    """
    n_classes = judge.config["n_classes"]
    real = show_to(judge, *test_set)
    how = (real, judge, counts, seed, discriminator, device)
    generated, generated_rows = score(images, labels, *how)
    floor, floor_rows = score(*balanced(*train_set, max(counts.scored, counts.cas), n_classes, seed), *how)
    floor["agreement"] = agreement(real)
    for label, row in enumerate(floor_rows):
        row["agreement"] = agreement(real.of_class(label))
    if discriminator is not None:
        floor["d_accuracy"], floor["d_validity"] = discriminator_opinion(discriminator, *test_set, device)

    def side_by_side(ours, theirs):
        return {name: {"generated": ours[name], "real": theirs[name]} for name in ours}

    rows = zip(judge.classes, generated_rows, floor_rows, strict=True)
    by_class = {name: side_by_side(ours, theirs) for name, ours, theirs in rows}
    collapses = [name for name, row in by_class.items() if collapsed(**row["ms_ssim"])]
    return {
        "scores": side_by_side(generated, floor),
        "by_class": by_class,
        "warnings": [f"class {name} has collapsed: its images are too much alike" for name in collapses],
    }


def table(card: dict) -> str:
    """The scorecard for people."""
    lines = [
        f"{card['weights']}: {card['images']:,} images, seed {card['seed']}, beside real training images,",
        f"both against the {card['test_images']:,} test images. FID, density and coverage are taken in",
        f"{card['feature_space']}",
        "",
        f"{'':34}{'good':>8}{'generated':>12}{'real':>10}",
    ]
    for key, name, good, form in ROWS:
        if key in card["scores"]:
            values = card["scores"][key]
            lines.append(f"{name:34}{good:>8}{form.format(values['generated']):>12}{form.format(values['real']):>10}")
    lines += ["", f"{'class':12}" + "".join(f"{key.replace('_', '-'):>18}" for key, *_ in CLASS_ROWS)]
    for name, row in card["by_class"].items():
        cells = [
            f"{form.format(row[key]['generated'])} ({form.format(row[key]['real'])})" for key, *_, form in CLASS_ROWS
        ]
        lines.append(f"{name[:12]:<12}" + "".join(f"{cell:>18}" for cell in cells))
    lines += ["", "In brackets: real images. CAS: a classifier trained on these images alone, tested on real ones."]
    lines += [f"Warning: {warning}." for warning in card["warnings"]]
    return "\n".join(lines)


def check_judge(judge: Judge, generator: Generator) -> None:
    """Raise BadInput unless the judge knows the images that G draws: their classes, size and channels."""
    if judge.classes != generator.classes or any(generator.config[name] != judge.config[name] for name in judge.config):
        raise BadInput(f"argument --judge: it knows {kind_of_images(judge)}, but the generator draws "
                       f"{kind_of_images(generator)}: judge.py trains one for these")  # fmt: skip


def kind_of_images(network) -> str:
    """What a network draws or knows, in words."""
    names = ", ".join(network.classes[:3]) + (", ..." if len(network.classes) > 3 else "")
    size, colour = network.config["img_size"], "grey" if network.config["channels"] == 1 else "colour"
    return f"{len(network.classes)} classes ({names}) in {colour}, {size} pixels"


def load_discriminator(given: Path | None, weights: Path, generator: Generator, device) -> Discriminator | None:
    """The D named on the command line, or the one beside the generator, if there is one that fits. Raises BadInput."""
    beside = [weights.with_name(weights.name.replace("gen", "dist")), weights.with_name("acgan_dist.pth")]
    path = given or next((path for path in beside if path != weights and path.exists()), None)
    if path is None:
        return None
    loader = lambda path: load_network(path, device, kinds=(Discriminator,))  # noqa: E731
    discriminator = read_network("argument --discriminator", path, loader)
    config = discriminator.config
    if any(config[name] != generator.config[name] for name in config):
        raise BadInput(f"argument --discriminator: {str(path)!r} is for other images than the generator draws")
    return discriminator


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser(prog="evaluate.py", description="Score a generator.", allow_abbrev=False)
    parser.add_argument(
        "weights", nargs="?", type=Path, default=WEIGHTS, metavar="acgan_gen.pth",
        help="generator to score, as acgan.py writes it (default: the one that comes along)",
    )  # fmt: skip
    flag(
        parser, "--discriminator", Path, None, "whose own opinion is told too",
        "FILE", "the file beside the generator with dist for gen in its name, or acgan_dist.pth, if there is one",
    )  # fmt: skip
    flag(parser, "--judge", Path, JUDGE_WEIGHTS, "the judge, as judge.py writes it", "FILE", "the one that comes along")
    parser.add_argument(
        "--full", action="store_true",
        help=f"score {FULL.scored * 10:,} images in place of {QUICK.scored * 10:,}: takes several times as long "
        "(default: off)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the scorecard as JSON (default: as a table)")
    flag(parser, "--seed", SEED, 0, "seed of the images to score and of everything drawn for it")
    data_flags(parser, NAMES)
    device_flag(parser)
    return parser.parse_args(argv)


def evaluate(opt: argparse.Namespace) -> dict:
    """The scorecard that the options of parse_args ask for, with how it was made. Raises BadInput."""
    start = time.monotonic()
    check_torchmetrics("evaluate.py")
    device, _ = choose_device(opt.device)
    tune_process(device)
    generator = load_generator(opt.weights, device)
    judge = load_judge(opt.judge, device)
    check_judge(judge, generator)
    discriminator = load_discriminator(opt.discriminator, opt.weights, generator, device)
    counts = FULL if opt.full else QUICK
    n_classes, img_size = judge.config["n_classes"], judge.config["img_size"]
    train_set, test_set = load_train_and_test(opt.dataset, opt.data_root, opt.test_root, img_size)
    if train_set.classes != judge.classes or train_set.images.shape[1] != judge.config["channels"]:
        raise BadInput(f"argument --dataset: {opt.dataset} has other classes or channels than judge and generator")
    images_by_class(test_set.labels, n_classes)
    labels = torch.arange(n_classes).repeat(max(counts.scored, counts.cas))
    images = torch.cat(list(draw_set(generator, labels, opt.seed)))
    card = scorecard(images, labels, train_set[:2], test_set[:2], judge, counts, opt.seed, discriminator, device)
    made = {
        "weights": str(opt.weights),
        "images": counts.scored * n_classes,
        "cas_images": counts.cas * n_classes,
        "test_images": len(test_set.labels),
        "seed": opt.seed,
        "feature_space": f"the judge's last {judge.head.in_features} features: this is no Inception FID.",
        "seconds": round(time.monotonic() - start, 1),
    }
    return made | card


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit status, as command_line.exit_status."""
    opt = parse_args(argv)

    def command():
        card = evaluate(opt)
        if opt.json:
            print_result(json.dumps(card, indent=2))
            return
        print_result(table(card))
        announce(f"Took {card['seconds']:.0f} s.")

    return exit_status("evaluate.py", command)


if __name__ == "__main__":
    sys.exit(main())
