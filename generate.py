"""Digits on request, from a trained generator.

python generate.py 2026                            # those digits, one row a variant, in generated.png
python generate.py --labels 0,1,3 -n 8             # eight of each
python generate.py --interpolate 3 8               # from one class to another, the noise kept
python generate.py -n 6000 --npz digits.npz        # a labelled data set of 60,000 images
"""

import argparse
import io
import signal
import sys
import zipfile
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import numpy as np
import torch
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from command_line import (
    SEED,
    WHOLE,
    OneLineParser,
    check_output,
    device_flag,
    exit_status,
    flag,
    print_result,
    read_network,
)
from models import Generator, load_network
from utils import BadInput, choose_device, on_terminal, whole_file

WEIGHTS = Path(__file__).resolve().parent / "weights" / "acgan_gen.pth"
CHUNK = 500  # images drawn at a time
PNG_LIMIT = 10_000  # images in one picture


@torch.no_grad()
def draw_images(generator: Generator, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Draw G(z | y) in eval mode: each image depends on its own z and y alone, and drawing changes nothing in G.

    Args:
        generator: on any device; left in the mode that it came in.
        z: float32 (N, latent_dim), on any device.
        labels: int64 (N,), on any device.

    Returns:
        Images, float32 (N, C, H, W) in [-1, 1], on the CPU.
    """
    device, mode = next(generator.parameters()).device, generator.training
    generator.eval()
    try:
        chunks = zip(z.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.cat([generator(z.to(device), y.to(device)).cpu() for z, y in chunks])
    finally:
        generator.train(mode)


@torch.no_grad()
def interpolate(generator: Generator, z: torch.Tensor, start: int, end: int, steps: int) -> torch.Tensor:
    """Walk from class `start` to class `end` through the label embedding, with the noise kept.

    Args:
        generator: in eval mode.
        z: float32 (N, latent_dim), one for each walk.
        start, end: classes.
        steps: images of each walk, at least 2, both ends included.

    Returns:
        Images, float32 (N * steps, C, H, W) in [-1, 1], walk by walk, on the CPU.
    """
    device = next(generator.parameters()).device
    first, last = generator.label_emb(torch.tensor([start, end], device=device))
    way = torch.lerp(first, last, torch.linspace(0, 1, steps, device=device)[:, None])  # (steps, latent_dim)
    chunks = [part * noise.to(device) for noise in z for part in way.split(CHUNK)]
    return torch.cat([generator.decode(chunk).cpu() for chunk in chunks])


def to_bytes(imgs: torch.Tensor) -> torch.Tensor:
    """float [-1, 1] to uint8 [0, 255], to the nearest."""
    return imgs.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def draw_set(generator: Generator, labels: torch.Tensor, seed: int):
    """Draw any number of images in chunks: yields uint8 (B, C, H, W) for each chunk of `labels`, int64 (N,).

    The noise is drawn on the CPU from `seed` alone, so it is the same on every device.
    """
    noise = torch.Generator().manual_seed(seed)
    for chunk in labels.split(CHUNK):
        z = torch.randn(len(chunk), generator.config["latent_dim"], generator=noise)
        yield to_bytes(draw_images(generator, z, chunk))


def load_generator(path: Path, device="cpu") -> Generator:
    """The generator in a file that a training wrote, in eval mode. Raises BadInput."""
    load = read_network("argument --weights", path, lambda path: load_network(path, device, kinds=(Generator,)))
    return load.eval()


def write_npz(path: Path, generator: Generator, labels: torch.Tensor, seed: int) -> None:
    """Write a labelled data set, image by image as they are drawn, so that it may be larger than the memory.

    `images`, uint8 (N, C, H, W), and `labels`, int64 (N,): numpy.load reads it.
    """
    c = generator.config
    shape = (len(labels), c["channels"], c["img_size"], c["img_size"])
    bar = tqdm(total=len(labels), desc="Drawing", unit="img", disable=not on_terminal())
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive, bar:
        with archive.open("images.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for images in draw_set(generator, labels, seed):
                entry.write(images.numpy().tobytes())
                bar.update(len(images))
        with archive.open("labels.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, labels.numpy())


def write_png(path: Path, imgs: torch.Tensor, nrow: int) -> None:
    """Write images, float (N, C, H, W) in [-1, 1], as one picture with `nrow` a row."""
    buffer = io.BytesIO()
    save_image(make_grid(imgs, nrow=nrow, normalize=True, value_range=(-1, 1)), buffer, format="png")
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def classes_of(words: list[str], what: str, classes: list[str]) -> list[int]:
    """Class numbers for what a person typed: the classes' names, or else their numbers. Raises BadInput."""
    known = {name: number for number, name in enumerate(classes)}
    if not any(name.isdigit() for name in classes):
        known |= {str(number): number for number in range(len(classes))}
    words = words or [""]
    for word in words:
        if word not in known:
            names = ", ".join(classes[:20]) + (f", ... ({len(classes)} in all)" if len(classes) > 20 else "")
            raise BadInput(f"{what}: {word!r} is not a class; the classes are {names}")
    return [known[word] for word in words]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser(
        prog="generate.py", description="Draw images of the classes you ask for, with a trained generator.",
        allow_abbrev=False,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("digits", nargs="?", help="the classes to draw, a character each, such as 2026 (default: all)")
    what.add_argument(
        "--labels", metavar="A,B,...", help="the classes to draw, by name or number, with commas between (default: all)"
    )
    what.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"),
        help="walk from class A to class B instead, through the label embedding (default: off)",
    )  # fmt: skip
    flag(parser, "-n", WHOLE, 5, "images of each class asked for, that is, rows of the picture")
    flag(parser, "--steps", WHOLE, None, "images of each walk of --interpolate, 2 or more", shown="10")
    flag(parser, "--seed", SEED, 0, "seed of the noise: another one, other variants")
    flag(
        parser,
        "--weights",
        Path,
        WEIGHTS,
        "generator to use, as acgan.py writes it",
        "FILE",
        "the one that comes along",
    )
    flag(parser, "--out", Path, None, "picture to write", "FILE", "generated.png")
    flag(
        parser, "--npz", Path, None,
        "write a data set instead: images, uint8 (N, C, H, W), and labels, int64 (N,), the classes in turn",
        "FILE", "a picture is written",
    )  # fmt: skip
    device_flag(parser)
    opt = parser.parse_args(argv)
    if opt.npz and opt.interpolate:
        parser.error("argument --npz: not allowed with argument --interpolate, which has no labels")
    if opt.npz and opt.out:
        parser.error("argument --npz: not allowed with argument --out, as it takes the place of the picture")
    if opt.steps and not opt.interpolate:
        parser.error("argument --steps: only with argument --interpolate")
    if opt.steps == 1:
        parser.error("argument --steps: a walk has at least 2 images")
    opt.out, opt.steps = opt.out or Path("generated.png"), opt.steps or 10
    return opt


def generate(opt: argparse.Namespace) -> None:
    """Write what the options of parse_args ask for. Raises BadInput, or OSError where it cannot be written."""
    device, _ = choose_device(opt.device)
    generator = load_generator(opt.weights, device)
    if opt.interpolate:
        labels = classes_of(opt.interpolate, "argument --interpolate", generator.classes)
    elif opt.labels is not None:
        labels = classes_of([word.strip() for word in opt.labels.split(",")], "argument --labels", generator.classes)
    elif opt.digits is not None:
        labels = classes_of(list(opt.digits), "argument digits", generator.classes)
    else:
        labels = list(range(len(generator.classes)))

    if opt.npz:
        check_output("--npz", opt.npz, ".npz")
        write_npz(opt.npz, generator, torch.tensor(labels).repeat(opt.n), opt.seed)
        print_result(f"{opt.npz}: {len(labels) * opt.n:,} images")
        return
    columns = opt.steps if opt.interpolate else len(labels)
    if columns * opt.n > PNG_LIMIT:
        raise BadInput(f"argument -n: more than {PNG_LIMIT:,} images do not fit one picture; --npz has no limit")
    check_output("--out", opt.out, ".png")
    noise = torch.Generator().manual_seed(opt.seed)
    if opt.interpolate:
        z = torch.randn(opt.n, generator.config["latent_dim"], generator=noise)
        imgs = interpolate(generator, z, *labels, opt.steps)
    else:
        z = torch.randn(columns * opt.n, generator.config["latent_dim"], generator=noise)
        imgs = draw_images(generator, z, torch.tensor(labels).repeat(opt.n))
    write_png(opt.out, imgs, columns)
    print_result(f"{opt.out}: {opt.n} rows of {columns} images")


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit status, as command_line.exit_status."""
    opt = parse_args(argv)
    return exit_status("generate.py", lambda: generate(opt))


if __name__ == "__main__":
    sys.exit(main())
