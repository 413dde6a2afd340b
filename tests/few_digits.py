"""acgan.py on the first N digits only, so that epochs end within a test's patience: few_digits.py N FLAGS...

With PAUSE_AT=B in the environment it stops itself, as by Ctrl-Z, when B batches are done: a test can then do what must
not depend on how fast the machine is.
"""

import os
import signal
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


def pause_at(n: int) -> None:
    """Let this process stop itself within the batch after the first `n`, until SIGCONT."""
    train_step, calls = acgan.train_step, []

    def pausing_step(*args):
        calls.append(1)
        if len(calls) == n + 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return train_step(*args)

    acgan.train_step = pausing_step


if __name__ == "__main__":
    if "PAUSE_AT" in os.environ:
        pause_at(int(os.environ["PAUSE_AT"]))
    acgan.EpochScores.SCORED = 50
    acgan.load_dataset = first(int(sys.argv[1]))
    sys.exit(acgan.main(sys.argv[2:]))
