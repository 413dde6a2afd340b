"""The judge: a small classifier of real images, which recognises generated ones and lends the scores its features.

python judge.py                                               # trains MNIST's anew and writes weights/judge.pth
python judge.py --dataset fashion_mnist --out my_judge.pth    # one for other images
"""

import argparse
import math
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from batches import normalize
from command_line import (
    SEED,
    WHOLE,
    OneLineParser,
    check_output,
    data_flags,
    device_flag,
    exit_status,
    flag,
    print_result,
    read_network,
)
from dataset import NAMES, load_train_and_test
from models import load_network, pack_network, write_weights
from speed import tune_process
from utils import BadInput, announce, choose_device, on_terminal

WEIGHTS = Path(__file__).resolve().parent / "weights" / "judge.pth"
CHUNK = 500  # images judged at a time


class Judge(nn.Module):
    """A convolutional classifier; its features are the 128 means that its last layer reads.

    Args:
        n_classes: number of classes.
        img_size: side of the images it was trained on, pixels.
        channels: image channels.
    """

    def __init__(self, n_classes: int = 10, img_size: int = 32, channels: int = 1):
        super().__init__()
        self.config = dict(n_classes=n_classes, img_size=img_size, channels=channels)
        self.classes = [str(label) for label in range(n_classes)]  # names; the data set's are put here

        def block(in_filters, out_filters, kernel_size, stride):
            conv = nn.Conv2d(in_filters, out_filters, kernel_size, stride, kernel_size // 2, bias=False)
            return [conv, nn.BatchNorm2d(out_filters), nn.ReLU(inplace=True)]

        self.features = nn.Sequential(  # (B, channels, s, s), s = img_size
            *block(channels, 32, 5, 2),  # (B, 32, s/2, s/2)
            *block(32, 64, 3, 1),
            *block(64, 64, 3, 2),  #       (B, 64, s/4, s/4)
            *block(64, 96, 3, 1),
            nn.Dropout2d(0.1),
            *block(96, 128, 3, 2),  #      (B, 128, s/8, s/8)
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, n_classes)

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        """Images, float32 (B, channels, s, s) in [-1, 1], to class logits, float32 (B, n_classes)."""
        return self.head(self.features(img))


@torch.no_grad()
def judge_images(judge: Judge, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the judge, in eval mode, makes of images.

    Args:
        images: uint8 (N, C, H, W).

    Returns:
        features, float32 (N, 128), and recognised classes, int64 (N,), both on the CPU.
    """
    judge.eval()
    device = next(judge.parameters()).device
    features = [judge.features(normalize(chunk.to(device))) for chunk in images.split(CHUNK)]
    return torch.cat(features).cpu(), torch.cat([judge.head(chunk).argmax(1) for chunk in features]).cpu()


def train_classifier(images, labels, n_classes: int, epochs: int, seed: int, device, jitter: bool) -> Judge:
    """Train a Judge: AdamW, one cycle of the learning rate, batches of 128.

    Args:
        images, labels: uint8 (N, C, H, W) and int64 (N,).
        n_classes: number of classes.
        epochs: passes over them.
        seed: of the initial weights, the order and the jitter; the caller's random streams are left alone.
        device: where to train.
        jitter: turn, scale and shift each image a little, each time anew.

    Returns:
        The classifier, in eval mode.
    """
    device, batch_size = torch.device(device), min(128, len(labels))
    images, labels = images.to(device), labels.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        judge = Judge(n_classes, images.shape[-1], images.shape[1]).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)
        steps = epochs * (len(labels) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.006, total_steps=steps)
        bar = tqdm(total=steps, desc="Training a classifier", unit="batch", leave=False, disable=not on_terminal())
        for _ in range(epochs):
            for indices in torch.randperm(len(labels)).to(device).split(batch_size)[: len(labels) // batch_size]:
                batch = normalize(images[indices])
                if jitter:
                    batch = jittered(batch)
                logits = judge(batch.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels[indices], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
        bar.close()
    return judge.eval()


def jittered(imgs: torch.Tensor) -> torch.Tensor:
    """Each image turned by up to 10 degrees, scaled and sheared by up to 10 % and shifted by up to 6 % of its side."""

    def uniform(bound):
        return (torch.rand(len(imgs)) * 2 - 1) * bound

    angle, scale, shear = uniform(math.radians(10)), 1 + uniform(0.1), uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, uniform(0.12)], 1), torch.stack([sin, cos, uniform(0.12)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(imgs.device), imgs.shape, align_corners=False)
    return F.grid_sample(imgs + 1, grid, align_corners=False) - 1  # outside is 0, black is -1


def load_judge(path: Path, device="cpu") -> Judge:
    """The judge in a file that this script wrote, in eval mode. Raises BadInput."""
    load = read_network("argument --judge", path, lambda path: load_network(path, device, kinds=(Judge,)))
    return load.eval()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser(
        prog="judge.py", description="Train the judge on real images, and test it.", allow_abbrev=False
    )
    flag(
        parser,
        "--out",
        Path,
        None,
        "file to write",
        "FILE",
        "for MNIST at 32 pixels, weights/judge.pth beside judge.py",
    )
    flag(parser, "--n_epochs", WHOLE, 10, "passes over the training images")
    flag(parser, "--img_size", WHOLE, 32, "image side in pixels; that of the generator to be judged")
    flag(parser, "--seed", SEED, 0, "seed of its weights and of the order of the images")
    data_flags(parser, NAMES)
    device_flag(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit status, as command_line.exit_status."""
    opt = parse_args(argv)

    def command():
        device, why = choose_device(opt.device)
        tune_process(device)
        if opt.out is None and (opt.dataset, opt.img_size) != ("mnist", 32):
            raise BadInput("argument --out: needed here, as weights/judge.pth is for MNIST at 32 pixels; name a file")
        opt.out = opt.out or WEIGHTS
        check_output("--out", opt.out, ".pth")
        if why:
            announce(why)
        data, test = load_train_and_test(opt.dataset, opt.data_root, opt.test_root, opt.img_size)
        n_classes = len(data.classes)
        judge = train_classifier(data.images, data.labels, n_classes, opt.n_epochs, opt.seed, device, jitter=True)
        judge.classes = data.classes
        accuracy = (judge_images(judge, test.images)[1] == test.labels).double().mean()
        write_weights(opt.out, pack_network(judge))
        print_result(f"{opt.out}: {accuracy:.2%} of the {len(test.labels):,} test images recognised")

    return exit_status("judge.py", command)


if __name__ == "__main__":
    sys.exit(main())
