"""The scorecard of a trained generator, each figure beside that of real digits.

python evaluate.py                       # weights/best.pth, in a minute or two
python evaluate.py --weights RUN         # the EMA of your own run
python evaluate.py --full --json         # more images; for programs
"""

import argparse
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    import before_torch  # noqa: F401

from tqdm import tqdm

import fast
from data import Reading, add_data_flags, load_train_and_test
from evaluation.judge import load_judge
from evaluation.metrics import check_torchmetrics
from evaluation.scorecard import DRAWING, FULL, QUICK, SCORING, check_judge, committed_real_scores, scorecard, table
from fast.process import keep_memory, tune_process
from run.trained import add_weights_flag, load_trained
from utils import (
    SEED,
    BadInput,
    OneLineParser,
    add_device_flag,
    announce,
    choose_device,
    on_terminal,
    print_line,
    run_command,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser("evaluate.py", __doc__)
    add = parser.add_argument
    add_weights_flag(parser)
    add("--judge", type=Path, metavar="FILE", help="the judge, from train_judge.py (default: the bundled one)")
    full, quick = (f"{n.scored:,} images a class, CAS from {n.cas:,} in {n.cas_epochs} passes" for n in (FULL, QUICK))
    add("--full", action="store_true", help=f"score {full} (default: {quick})")
    add("--json", action="store_true", help="print the scorecard as JSON (default: as a table)")
    add("--seed", type=SEED, default=0, metavar="N", help="seed of the images and of everything drawn for their scores")
    add_data_flags(parser)
    add_device_flag(parser)
    return parser.parse_args(argv)


def evaluate(opt: argparse.Namespace) -> None:
    """Print the scorecard that the command line asks for. Raises BadInput."""
    start = time.monotonic()
    check_torchmetrics("evaluate.py")
    device, _ = choose_device(opt.device)
    tune_process(device)
    keep_memory(device)
    generator = load_trained(opt.weights, "ema", device).eval()
    fast.use_fast_layers(generator)
    announce(f"Weights: {generator.origin}")
    judge = load_judge(opt.judge, device, generator.classes)
    check_judge(judge, generator.classes, generator.config["img_size"], generator.config["channels"])
    # those of MNIST's real digits are the same for every generator, and a third of the time
    known = opt.dataset == "mnist" and opt.judge is None and not opt.full and opt.seed == 0
    stages = 1 + DRAWING + (SCORING if known else 2 * SCORING)
    form = "{desc:28} |{bar}| {n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=stages, bar_format=form, leave=False, disable=not on_terminal()) as bar:

        def stage(name: str) -> None:
            bar.set_description_str(name, refresh=False)
            bar.update()
            bar.refresh()

        card = make_card(opt, generator, judge, device, stage, committed_real_scores() if known else None)
    card["seconds"] = round(time.monotonic() - start, 1)
    print_line(json.dumps(card, indent=2) if opt.json else table(card), must_succeed=True)
    announce(f"This took {card['seconds']:.0f} s.")


def make_card(opt: argparse.Namespace, generator, judge, device, stage, real_scores: tuple | None) -> dict:
    """Return the scorecard as plain data; `stage` is called with the name of each stage. Raises BadInput."""
    stage("Reading the real images")
    reading = Reading(judge.classes, judge.config["channels"], generator.white or judge.white, opt.bad_images == "skip")
    train_set, test_set = load_train_and_test(
        opt.dataset, opt.data_root, opt.test_root, judge.config["img_size"], reading
    )
    if train_set.classes != judge.classes or train_set.images.shape[1] != judge.config["channels"]:
        raise BadInput(f"argument --dataset: {opt.dataset} has other classes or channels than judge and generator")
    counts = FULL if opt.full else QUICK
    card = scorecard(generator, train_set[:2], test_set[:2], judge, counts, opt.seed, device, stage, real_scores)
    return dict(weights=str(generator.file), **card)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status, as utils.run_command does."""
    return run_command("evaluate.py", lambda: evaluate(parse_args(argv)), too_large="drop --full, or free some")


if __name__ == "__main__":
    sys.exit(main())
