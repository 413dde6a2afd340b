"""Digits by request, from a trained generator.

python generate.py 2026                        # those, in generated.png
python generate.py --labels 0,1,3 -n 8         # eight of each
python generate.py --interpolate 3 8           # from one class to another
python generate.py -n 6000 --npz digits.npz    # a data set of 60,000 images
python generate.py 7 --weights RUN             # with the EMA of a run
"""

import argparse
import re
import sys
import unicodedata
from pathlib import Path

if __name__ == "__main__":
    import before_torch  # noqa: F401

import numpy as np
import torch
from torchvision.utils import make_grid, save_image

import fast
from data.drawing import CHUNK, draw_images, draw_set
from models import Generator
from run.trained import add_weights_flag, load_trained
from utils import (
    COUNT,
    SEED,
    BadInput,
    OneLineParser,
    add_device_flag,
    announce,
    atomic_write,
    check_output,
    choose_device,
    counted,
    print_line,
    run_command,
)

PNG_LIMIT = 10_000  # images in one picture
SCALE, SIDE = 4, 1000  # without --scale a picture is enlarged up to SCALE times, and up to SIDE pixels
PIXEL_LIMIT = 10**8  # of an enlarged picture


@torch.no_grad()
def interpolate(generator: Generator, z: torch.Tensor, start: int, end: int, steps: int) -> torch.Tensor:
    """Go from class `start` to class `end` through the label embedding in `steps` images, both ends included.

    Each row of z, float32 (N, latent_dim), stays the same. Returns float32 (N * steps, C, H, W) in [-1, 1], row by row.
    """
    device = next(generator.parameters()).device
    first, last = generator.label_emb(torch.tensor([start, end], device=device))
    way = torch.lerp(first, last, torch.linspace(0, 1, steps, device=device)[:, None])  # (steps, latent_dim)
    pairs = [(part, noise.to(device).expand_as(part)) for noise in z for part in way.split(CHUNK)]
    return torch.cat([generator.decode(*pair).cpu() for pair in pairs])


def composed(text: str) -> str:
    """Return text whose accents are part of their letters, as they are typed: in folders of a Mac they may be apart."""
    return unicodedata.normalize("NFC", text)


def find_classes(words: list[str], flag: str, generator: Generator) -> list[int]:
    """Return class numbers for what was typed: the classes' names, or else their numbers. Raises BadInput."""
    classes = generator.classes
    known = {composed(name): number for number, name in enumerate(classes)}
    if not any(name.isdigit() for name in classes):
        known |= {str(number): number for number in range(len(classes))}
    words = words or [""]
    for word in words:
        if word not in known:
            names = ", ".join(classes[:20]) + (f", ... ({len(classes)} in all)" if len(classes) > 20 else "")
            raise BadInput(f"argument {flag}: {word!r} is not a class of {generator.file.name}: choose from {names}")
    return [known[word] for word in words]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser("generate.py", __doc__, "[DIGITS] [--FLAG VALUE ...]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("digits", nargs="?", type=composed, help="the classes to draw, a character each, such as 2026; "
                      "or one class, by its name (default: all)")  # fmt: skip
    what.add_argument("--labels", type=composed, metavar="A,B,...",
                      help="the classes to draw, by name or number (default: all)")  # fmt: skip
    what.add_argument("--interpolate", nargs=2, type=composed, metavar=("A", "B"),
                      help="go from class A to class B (default: off)")  # fmt: skip
    add = parser.add_argument
    add("-n", type=COUNT, default=5, metavar="N", help="images of each class, that is, rows of the picture")
    add("--steps", type=COUNT, metavar="N", help="images a row of --interpolate, 2 or more (default: 10)")
    add("--seed", type=SEED, default=0, metavar="N", help="seed of the noise; another one draws other variants")
    add_weights_flag(parser)
    add("--out", type=Path, metavar="FILE", help="picture to write (default: generated.png)")
    add("--scale", type=COUNT, metavar="N", help="enlarge the picture N times, each pixel becoming N x N "
        f"(default: up to {SCALE} times, while no side exceeds {SIDE:,} pixels)")  # fmt: skip
    add("--npz", type=Path, metavar="FILE", help="write a data set instead: images, labels and "
        "the classes' names (default: off)")  # fmt: skip
    add_device_flag(parser)
    opt = parser.parse_args(argv)
    if opt.npz and opt.interpolate:
        parser.error("argument --npz: not allowed with argument --interpolate, which has no labels")
    if opt.npz and opt.out:
        parser.error("argument --npz: not allowed with argument --out, as it replaces the picture")
    if opt.npz and opt.scale:
        parser.error("argument --npz: not allowed with argument --scale, which is for the picture")
    if opt.steps and not opt.interpolate:
        parser.error("argument --steps: only with argument --interpolate")
    if opt.steps == 1:
        parser.error("argument --steps: a row has at least 2 images")
    opt.out, opt.steps = opt.out or Path("generated.png"), opt.steps or 10
    return opt


def generate(opt: argparse.Namespace) -> None:
    """Write what the command line asks for. Raises BadInput, or OSError if it cannot be written."""
    device, _ = choose_device(opt.device)
    generator = load_trained(opt.weights, "ema", device).eval()
    fast.use_fast_layers(generator)
    classes = generator.classes
    names, labels = [composed(name) for name in classes], list(range(len(classes)))
    if opt.interpolate:
        labels = find_classes(opt.interpolate, "--interpolate", generator)
    elif opt.labels is not None:  # a class whose name has a comma can be drawn alone
        words = [opt.labels] if opt.labels in names else re.split(r"\s*[,，]\s*", opt.labels.strip())
        labels = find_classes(words, "--labels", generator)
    elif opt.digits is not None:
        words = [opt.digits] if opt.digits in names else list(opt.digits)
        labels = find_classes(words, "digits", generator)

    announce(f"Weights: {generator.origin}")
    if opt.npz:
        check_output("--npz", opt.npz, ".npz")
        labels = torch.tensor(labels).repeat(opt.n)
        images = draw_set(generator, labels, opt.seed)
        data = dict(images=images.numpy(), labels=labels.numpy(), classes=np.array(classes))  # by label
        atomic_write(opt.npz, lambda file: np.savez_compressed(file, **data))
        print_line(f"{opt.npz}: {counted(len(labels), 'image')}", must_succeed=True)
        return
    columns = opt.steps if opt.interpolate else len(labels)
    if columns * opt.n > PNG_LIMIT:
        raise BadInput(f"argument -n: more than {PNG_LIMIT:,} images do not fit one picture: lower it, or use --npz")
    check_output("--out", opt.out, ".png")
    noise = torch.Generator().manual_seed(opt.seed)
    if opt.interpolate:
        z = torch.randn(opt.n, generator.config["latent_dim"], generator=noise)
        imgs = interpolate(generator, z, *labels, opt.steps)
    else:
        z = torch.randn(columns * opt.n, generator.config["latent_dim"], generator=noise)
        imgs = draw_images(generator, z, torch.tensor(labels).repeat(opt.n))
    grid = make_grid(imgs, nrow=columns, normalize=True, value_range=(-1, 1))
    scale = opt.scale or max(1, min(SCALE, SIDE // max(grid.shape[1:])))
    if opt.scale and grid[0].numel() * scale**2 > PIXEL_LIMIT:
        raise BadInput(f"argument --scale: {scale} makes more than {PIXEL_LIMIT:,} pixels: lower it, or -n")
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    atomic_write(opt.out, lambda file: save_image(grid, file, format="png"))
    drawn = [classes[label] for label in labels]
    shown = f"from {drawn[0]} to {drawn[1]}" if opt.interpolate else f"of {', '.join(drawn)}"
    print_line(f"{opt.out}: {counted(opt.n, 'row')} of {counted(columns, 'image')}, {shown}", must_succeed=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status, as utils.run_command does."""
    return run_command("generate.py", lambda: generate(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
