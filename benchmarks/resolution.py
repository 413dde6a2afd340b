"""How many digits are still recognised after they went through fewer pixels? (paper, section 4.1)

    python -m benchmarks.resolution                  # of weights/best.pth, beside real test digits; about a minute
    python -m benchmarks.resolution --weights RUN

The judge has only seen sharp images. So these are read by a classifier of the training digits, a part of which went
through each number of pixels.
"""

import argparse

import torch
import torch.nn.functional as F

import fast
from data import load_train_and_test
from data.drawing import draw_set
from evaluation.judge import train_classifier
from evaluation.metrics import agreement, show_to
from evaluation.scorecard import QUICK
from fast.process import keep_memory, tune_process
from run.trained import add_weights_flag, load_trained

PARTS = (1, 2, 4, 8)  # of the side
READER_EPOCHS = 2


def blurred(images: torch.Tensor, part: int) -> torch.Tensor:
    """Bring images, uint8 (N, C, H, W), down to 1 / `part` of their side and back up, bilinearly."""
    side = images.shape[-1]
    smaller = F.interpolate(images.float(), size=side // part, mode="bilinear", antialias=True)
    return F.interpolate(smaller, size=side, mode="bilinear").round().clamp(0, 255).to(torch.uint8)


def agreement_by_resolution(drawn, train_set, test_set, n_classes: int, seed: int = 0, device="cpu") -> dict:
    """Return {part: {"generated": agreement, "real": agreement}} for each of PARTS.

    Each set is a pair of images, uint8 (N, C, H, W), and labels, int64 (N,).
    """
    real_images, real_labels = train_set
    shares = [blurred(real_images[number :: len(PARTS)], part) for number, part in enumerate(PARTS)]
    known = torch.cat([real_labels[number :: len(PARTS)] for number in range(len(PARTS))])
    reader = train_classifier(torch.cat(shares), known, n_classes, READER_EPOCHS, seed, device, jitter=False)
    sets = {"generated": drawn, "real": test_set}

    def read(images, labels, part: int) -> float:
        return agreement(show_to(reader, blurred(images, part), labels))

    return {part: {who: read(*pair, part) for who, pair in sets.items()} for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_weights_flag(parser)
    opt = parser.parse_args()
    tune_process(torch.device("cpu"))
    keep_memory(torch.device("cpu"))
    generator = load_trained(opt.weights, "ema").eval()
    fast.use_fast_layers(generator)
    train_set, test_set = load_train_and_test("mnist", None, None, 32)
    labels = torch.arange(10).repeat(QUICK.cas)  # the scorecard's images, of which the first are read
    images, n_read = draw_set(generator, labels, seed=0), 10 * QUICK.scored
    rows = agreement_by_resolution((images[:n_read], labels[:n_read]), train_set[:2], test_set[:2], 10)
    for part, row in rows.items():
        print(f"read at 1/{part} of the side: generated {row['generated']:.2%}, real {row['real']:.2%}")


if __name__ == "__main__":
    main()
