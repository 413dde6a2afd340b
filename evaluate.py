"""The scorecard of a trained generator, each figure beside that of real digits.

python evaluate.py                                 # weights/best.pth
python evaluate.py --weights acgan_gen_ema.pth     # your own; one to three minutes on two cores
python evaluate.py --full --json                   # more images; for programs
python evaluate.py --missed missed.png             # and a picture of the real digits that it draws least
"""

import argparse
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    import before_torch  # noqa: F401

import torch
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from cli import SEED, OneLineParser, add_data_flags, add_device_flag, add_weights_flag, check_output, run_command
from data import NAMES, load_train_and_test
from drawing import draw_set
from evaluation.judge import Judge, load_judge
from evaluation.metrics import check_torchmetrics, most_missed, show_to
from evaluation.scorecard import FULL, QUICK, STAGES, agreement_by_resolution, check_judge, scorecard, table
from models import Generator, load_network
from training.speed import keep_memory, tune_process
from utils import BadInput, announce, atomic_write, choose_device, on_terminal, print_line

MISSED = 10  # images of each class


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser("evaluate.py", "Score a generator beside real images.")
    add = parser.add_argument
    add_weights_flag(parser)
    add("--judge", type=Path, metavar="FILE", help="the judge, from train_judge.py (default: the bundled one)")
    add("--full", action="store_true", help=f"score {FULL.scored:,} images a class (default: {QUICK.scored:,})")
    add("--json", action="store_true", help="print the scorecard as JSON (default: as a table)")
    add("--seed", type=SEED, default=0, metavar="N", help="seed of the images and of everything drawn for their scores")
    add("--resolution", action="store_true", help="also how many are recognised after they went through fewer pixels, "
        "by a classifier that is trained for it, a minute more (default: no)")  # fmt: skip
    add("--missed", type=Path, metavar="FILE", help="write a picture of the real test images that are farthest from "
        f"any generated one, up to {MISSED} of each class, a column a class (default: none)")  # fmt: skip
    add_data_flags(parser, NAMES)
    add_device_flag(parser)
    return parser.parse_args(argv)


def evaluate(opt: argparse.Namespace) -> None:
    """Print the scorecard that the command line asks for. Raises BadInput."""
    start = time.monotonic()
    check_torchmetrics("evaluate.py")
    if opt.missed:
        check_output("--missed", opt.missed, ".png")
    device, _ = choose_device(opt.device)
    tune_process(device)
    keep_memory(device)
    generator = load_network(opt.weights, device, kinds=(Generator,)).eval()
    announce(f"Weights: {opt.weights}")
    judge = load_judge(opt.judge, device)
    check_judge(judge, generator.classes, generator.config["img_size"], generator.config["channels"])
    form = "{desc:28} |{bar}| {n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=STAGES + 2 + opt.resolution, bar_format=form, leave=False, disable=not on_terminal()) as bar:

        def stage(name: str) -> None:
            bar.set_description_str(name, refresh=False)
            bar.update()
            bar.refresh()

        card = score(opt, generator, judge, device, stage)
    card["seconds"] = round(time.monotonic() - start, 1)
    print_line(json.dumps(card, indent=2) if opt.json else table(card), must_succeed=True)
    announce(f"This took {card['seconds']:.0f} s.")


def score(opt: argparse.Namespace, generator: Generator, judge: Judge, device, stage) -> dict:
    """Return the scorecard as plain data; `stage` is called with the name of each stage. Raises BadInput."""
    stage("Reading the real images")
    train_set, test_set = load_train_and_test(opt.dataset, opt.data_root, opt.test_root, judge.config["img_size"])
    if train_set.classes != judge.classes or train_set.images.shape[1] != judge.config["channels"]:
        raise BadInput(f"argument --dataset: {opt.dataset} has other classes or channels than judge and generator")
    counts, n_classes = FULL if opt.full else QUICK, len(judge.classes)
    labels = torch.arange(n_classes).repeat(max(counts.scored, counts.cas))
    stage(f"Drawing {len(labels):,} images")
    images = draw_set(generator, labels, opt.seed)
    scores = scorecard(images, labels, train_set[:2], test_set[:2], judge, counts, opt.seed, device, stage)
    if opt.resolution:
        stage("Reading fewer pixels")
        drawn = images[: counts.scored * n_classes], labels[: counts.scored * n_classes]
        rows = agreement_by_resolution(drawn, train_set[:2], test_set[:2], n_classes, opt.seed, device)
        scores["scores"] |= rows
    if opt.missed:
        draw_missed(opt.missed, images, labels, test_set, judge)
    features = f"the judge's last {judge.head.in_features} features: this is no Inception FID."
    return dict(weights=str(opt.weights), images=counts.scored * n_classes, cas_images=counts.cas * n_classes,
                test_images=len(test_set.labels), seed=opt.seed, feature_space=features, **scores)  # fmt: skip


def draw_missed(path: Path, images, labels, test_set, judge: Judge) -> None:
    """Write the test images that are farthest from all of `images` in the judge's features, the farthest on top."""
    real, drawn = show_to(judge, *test_set[:2]), show_to(judge, images, labels)
    rows = min(MISSED, int(torch.bincount(real.labels).min()))
    columns = [most_missed(real, drawn, label, rows) for label in range(len(judge.classes))]
    grid = make_grid(torch.stack(columns, 1).flatten(0, 1).float() / 255, nrow=len(columns))
    atomic_write(path, lambda file: save_image(grid, file, format="png"))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status, as cli.run_command does."""
    return run_command("evaluate.py", lambda: evaluate(parse_args(argv)), too_large="drop --full, or free some")


if __name__ == "__main__":
    sys.exit(main())
