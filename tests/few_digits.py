"""acgan.py on the first N digits only, so that epochs end within a test's patience: few_digits.py N FLAGS..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import acgan  # noqa: E402 (needs the path above)
from dataset import LabelledImages  # noqa: E402


def first(n: int):
    """A stand-in for load_dataset that returns the first `n` images."""
    load_dataset = acgan.load_dataset

    def load_few(*args, **kwargs):
        images, labels, classes = load_dataset(*args, **kwargs)
        return LabelledImages(images[:n], labels[:n], classes)

    return load_few


if __name__ == "__main__":
    acgan.EpochScores.SCORED = 50
    acgan.load_dataset = first(int(sys.argv[1]))
    sys.exit(acgan.main(sys.argv[2:]))
