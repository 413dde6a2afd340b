"""A picture of the real digits that a generator draws least, or of the digits that it draws worst.

    python -m benchmarks.missed missed.png                      # of weights/best.pth; about half a minute
    python -m benchmarks.missed missed.png --weights RUN
    python -m benchmarks.missed worst.png --worst               # a minute

The first are the test digits farthest from all of 30,000 generated ones of seed 0; the second, of these, those farthest
from all training digits. Distances are in the bundled judge's features. A column a class, the farthest on top.
"""

import argparse
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

import fast
from data import load_dataset
from data.drawing import draw_set
from evaluation.judge import load_judge
from evaluation.metrics import Judged, show_to
from evaluation.scorecard import QUICK
from run.trained import add_weights_flag, load_trained
from utils import atomic_write

SHOWN = 10  # images of each class


def farthest(images: Judged, others: Judged, label: int, count: int) -> torch.Tensor:
    """Return the images of a class that are farthest from any other, the farthest first: uint8 (count, C, H, W)."""
    own = images.of_class(label)
    nearest = torch.cat([torch.cdist(chunk, others.features).amin(1) for chunk in own.features.split(1000)])
    return own.images[nearest.topk(count).indices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--worst", action="store_true", help="generated digits, farthest from all training digits")
    add_weights_flag(parser)
    opt = parser.parse_args()
    generator, judge = load_trained(opt.weights, "ema").eval(), load_judge(None)
    fast.use_fast_layers(generator)
    labels = torch.arange(10).repeat(QUICK.cas)
    drawn = show_to(judge, draw_set(generator, labels, seed=0), labels)
    real = show_to(judge, *load_dataset("mnist", None, 32, train=opt.worst)[:2])
    images, others = (drawn, real) if opt.worst else (real, drawn)
    columns = [farthest(images, others, label, SHOWN) for label in range(10)]
    grid = make_grid(torch.stack(columns, 1).flatten(0, 1).float() / 255, nrow=len(columns))
    atomic_write(opt.picture, lambda file: save_image(grid, file, format="png"))


if __name__ == "__main__":
    main()
