"""acgan.py on the first N digits only, so that epochs end within a test's patience: few_digits.py N FLAGS..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import acgan  # noqa: E402 (needs the path above)


def first(n: int):
    """A stand-in for load_mnist that returns the first `n` digits."""
    load_mnist = acgan.load_mnist
    return lambda *args: tuple(tensor[:n] for tensor in load_mnist(*args))


if __name__ == "__main__":
    acgan.EpochScores.SCORED = 50
    acgan.load_mnist = first(int(sys.argv[1]))
    sys.exit(acgan.main(sys.argv[2:]))
