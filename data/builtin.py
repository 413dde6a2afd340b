"""MNIST, which is bundled, and Fashion-MNIST, KMNIST and CIFAR-10, which torchvision downloads."""

import contextlib
import errno
import gzip
import io
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from utils import BadInput, first_line, on_terminal

BUNDLED = Path(__file__).resolve().parent / "mnist"
DOWNLOADS = Path(__file__).resolve().parent / "downloads"
# for each of torchvision's sets: its class, its folder below data_root, and the files in it
IDX = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
       "t10k-labels-idx1-ubyte.gz"]  # fmt: skip
SETS = {
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw", IDX),
    "kmnist": (datasets.KMNIST, "KMNIST/raw", IDX),
    "cifar10": (datasets.CIFAR10, ".", ["cifar-10-python.tar.gz"]),
}
AT_ONCE = 10_000  # images resized at a time


def load_builtin(name: str, data_root: Path | None, img_size: int, train: bool):
    """Return images, uint8 (N, C, img_size, img_size), labels, int64 (N,), and classes' names. Raises BadInput."""
    files = IDX[:2] if train else IDX[2:]
    if name == "mnist":
        images, labels = (read_idx(BUNDLED / file, "restore it with 'git checkout data/mnist'") for file in files)
        classes = [str(digit) for digit in range(10)]
    else:
        kind, folder, _ = SETS[name]
        source = fetch(name, data_root or DOWNLOADS, train)
        if source is None:
            folder, hint = (data_root or DOWNLOADS) / folder, "delete it, and run again to download it"
            images, labels = (read_idx(folder / file, hint) for file in files)
        else:
            images, labels = source.data, np.asarray(source.targets)
        classes = list((source or kind).classes)
    images = images if images.ndim == 4 else images[..., None]
    square = images.ndim == 4 and images.shape[1] == images.shape[2]
    if not square or len(images) != len(labels) or labels.ndim != 1 or max(labels, default=0) >= len(classes):
        raise BadInput(f"a file of {name} is corrupt: {len(images):,} images do not match {len(labels):,} labels")
    return resize(images, img_size), torch.from_numpy(labels.astype(np.int64)), classes


def read_idx(path: Path, hint: str) -> np.ndarray:
    """Read an IDX file of bytes, gzipped or, without .gz in its name, unpacked. Raises BadInput, ending in `hint`."""
    plain = path.with_suffix("")
    try:
        unpacked = plain.exists() and not path.exists()
        content = plain.read_bytes() if unpacked else gzip.decompress(path.read_bytes())
        if content[:3] != b"\0\0\x08":
            raise ValueError("it is not an IDX file of bytes")
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing: {hint}") from error
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise BadInput(f"{path} is corrupt or cannot be read ({error}): {hint}") from error


def fetch(name: str, data_root: Path, train: bool):
    """Download the files of a set unless they are there; return torchvision's data set, or None for IDX files."""
    kind, folder, files = SETS[name]
    folder = data_root / folder
    if files == IDX and all((folder / file).exists() or (folder / file).with_suffix("").exists() for file in files):
        return None
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    put = f"put {', '.join(files)} into {str(folder)!r}"
    bars, printed = sys.stderr if on_terminal() else io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(bars), contextlib.redirect_stdout(printed):
            source = kind(data_root, train=train, download=True)
        return None if files == IDX else source
    except Exception as error:  # torchvision raises many kinds of error
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = f"cannot read or write {str(error.filename or folder)!r} ({error.strerror})"
            raise BadInput(f"argument --data_root: {what}: name another folder") from error
        for part in missing:
            with contextlib.suppress(OSError):
                part.rmdir()  # made by torchvision and left empty
        why = reason(error, printed.getvalue())
        raise BadInput(f"{name} is missing or corrupt, and no download works ({why}): mend that, or {put}") from error


def reason(error: Exception, printed: str) -> str:
    """Return why a download failed: torchvision quotes it in its own error, or prints it, or raises it as it is."""
    quoted = re.findall(r"(?:got|\(trying next\)):\n(.+)", f"{printed}\n{error}")
    why = quoted[-1] if quoted else first_line(error)
    return why.removeprefix("<urlopen error ").rstrip(">.")


def resize(images: np.ndarray, img_size: int) -> torch.Tensor:
    """Resize images as PIL does one by one, but all at once.

    PIL resizes along the width, rounds to bytes, then along the height. So many images, stacked into a single tall
    one, come out with the same bytes if they are resized along the width, transposed, and resized again. From uint8
    (N, h, w, C) to uint8 (N, C, img_size, img_size).
    """
    n, _, _, channels = images.shape
    resized = torch.empty(n, channels, img_size, img_size, dtype=torch.uint8)
    for first in range(0, n, AT_ONCE):
        for channel in range(channels):
            chunk = images[first : first + AT_ONCE, :, :, channel]  # (n, h, w)
            for _ in range(2):
                stack = Image.fromarray(np.ascontiguousarray(chunk).reshape(-1, chunk.shape[2]))  # (n * h, w)
                stack = stack.resize((img_size, stack.height), Image.Resampling.BILINEAR)
                chunk = np.asarray(stack).reshape(len(chunk), -1, img_size).swapaxes(1, 2)  # (n, img_size, h)
            resized[first : first + AT_ONCE, channel] = torch.from_numpy(np.ascontiguousarray(chunk))
    return resized
