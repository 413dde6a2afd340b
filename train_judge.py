"""Train a judge on real images, for scores of a generator of such images.

python train_judge.py                            # MNIST's, to judge.pth
python train_judge.py --dataset fashion_mnist --out fashion.pth
python train_judge.py --dataset folder --data_root A --test_root B
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    import before_torch  # noqa: F401

from data import Reading, add_data_flags, load_train_and_test
from evaluation.judge import judge_images, train_classifier
from fast.process import keep_memory, tune_process
from run.weights import save_network
from utils import (
    COUNT,
    IMG_SIZE,
    SEED,
    BadInput,
    OneLineParser,
    add_device_flag,
    announce,
    check_output,
    choose_device,
    print_line,
    run_command,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser("train_judge.py", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("judge.pth"), metavar="FILE", help="file to write")
    add("--n_epochs", type=COUNT, default=10, metavar="N", help="passes over the training images")
    add("--img_size", type=IMG_SIZE, default=32, metavar="N", help="side of the images to judge, pixels")
    add("--channels", type=COUNT, metavar="N", help="1 or 3 turns a folder's images into grey or colour (default: as "
        "they are)")  # fmt: skip
    add("--seed", type=SEED, default=0, metavar="N", help="seed of the weights and of the order of the images")
    add_data_flags(parser)
    add_device_flag(parser)
    return parser.parse_args(argv)


def train_judge(opt: argparse.Namespace) -> None:
    """Train and write the judge that the command line asks for. Raises BadInput, or OSError if it cannot be written."""
    device, why = choose_device(opt.device)
    tune_process(device)
    keep_memory(device)
    check_output("--out", opt.out, ".pth")
    reading = Reading(channels=opt.channels, skip_bad=opt.bad_images == "skip")
    data, test = load_train_and_test(opt.dataset, opt.data_root, opt.test_root, opt.img_size, reading)
    if opt.channels not in (None, data.images.shape[1]):
        wrong = f"{opt.dataset} has {data.images.shape[1]}, not {opt.channels}"
        raise BadInput(f"argument --channels: {wrong}: drop the flag")
    announce(why)
    judge = train_classifier(*data[:2], len(data.classes), opt.n_epochs, opt.seed, device, jitter=True)
    accuracy = (judge_images(judge, test.images)[1] == test.labels).double().mean()
    save_network(opt.out, judge, data.classes, white=data.white)
    print_line(f"{opt.out}: {accuracy:.2%} of the {len(test.labels):,} test images recognised", must_succeed=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status, as utils.run_command does."""
    return run_command("train_judge.py", lambda: train_judge(parse_args(argv)), too_large="lower --img_size")


if __name__ == "__main__":
    sys.exit(main())
