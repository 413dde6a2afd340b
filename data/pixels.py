"""The pixels of one image file, of any kind that Pillow reads safely, as a square of 8-bit grey or colour."""

import errno
import functools
import io
import os
import stat
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional

from utils import first_line

# Read whatever a file's name says; other readers of Pillow start programs, or take almost any bytes for theirs.
FORMATS = {"PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000"}
DEEP_GREY = {"I", "I;16", "I;16B", "I;16L", "I;16N", "F"}  # Pillow's modes of more than 8 bits
GREY = {"1", "L", "LA", *DEEP_GREY}
SIGNATURE = b"\x89PNG\r\n\x1a\n"
OF_THE_FILE = {None, errno.EINVAL, errno.ENOENT, errno.ELOOP}  # other errors are of the disk, the rights, the process


class BadImage(Exception):
    """A file whose pixels cannot be read; the text says why."""


@functools.cache
def formats() -> list[str]:
    """Return those of FORMATS that this Pillow has."""
    Image.init()
    return [name for name in Image.ID if name in FORMATS]


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the names' endings of these formats, as .png, in small letters."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def read(path: str, use):
    """Return use(image), where `image` is the file at `path`, opened by Pillow.

    A PNG that Pillow refuses is read once more without its metadata, which may be all that is damaged. Raises BadImage,
    and OSError if the file cannot be read at all, as without permission.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise BadImage("not a file")
        if info.st_size == 0:
            raise BadImage("empty")
        try:
            with Image.open(path, formats=formats()) as image:
                return use(image)
        except (OSError, SyntaxError, ValueError):
            if not (plain := without_metadata(path)):
                raise
        with Image.open(plain, formats=["PNG"]) as image:
            return use(image)
    except BadImage:
        raise
    except MemoryError as error:
        raise BadImage("too large for the memory here") from error
    except FileNotFoundError as error:
        raise BadImage("missing, or a link to nothing") from error
    except Exception as error:  # Pillow's readers raise many kinds of error
        if getattr(error, "errno", None) not in OF_THE_FILE:
            error.filename = path
            raise
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise BadImage("of no kind that is read here" if unknown else first_line(error)) from error


def without_metadata(path: str) -> io.BytesIO | None:
    """Return a PNG file's chunks that make its pixels, and the EXIF block if it is whole; None if it is no PNG."""
    with open(path, "rb") as file:
        if file.read(8) != SIGNATURE:
            return None
        kept = [SIGNATURE]
        while len(head := file.read(8)) == 8:
            size, name = struct.unpack(">I4s", head)
            body = file.read(size + 4)  # and its checksum
            whole = body[size:] == struct.pack(">I", zlib.crc32(name + body[:size]))
            if name[:1].isupper() or name == b"tRNS" or (name == b"eXIf" and whole):  # critical ones have a capital
                kept += [head, body]
    return io.BytesIO(b"".join(kept))


def mode_of(image: Image.Image) -> str:
    """Return the mode of an opened image, from its header. Raises BadImage for a TIFF that Pillow reads wrongly."""
    tags = getattr(image, "tag_v2", {})
    signed = tags.get(339, (1,))[0] == 2
    if image.mode in DEEP_GREY and tags.get(262) == 0:
        raise BadImage("a TIFF of more than 8 bits in which 0 is white: such are not read")
    if (image.mode == "L" and signed) or (image.mode == "I" and tags and not signed):
        raise BadImage("a TIFF of signed 8-bit or unsigned 32-bit values: such are not read")
    return image.mode


def kind_of(image: Image.Image) -> tuple[str, bool]:
    """Return the mode of an opened image, and whether it is square. Raises as mode_of does."""
    return mode_of(image), image.width == image.height


def range_of(image: Image.Image) -> tuple[float, float]:
    """Return the smallest and the largest value in an opened image of DEEP_GREY. Raises BadImage if not finite."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadImage("a value in it is not finite")
    return float(values.min()), float(values.max())


def white_for(peak: float) -> int:
    """Return what is white where the largest value is `peak`: all bits that it needs, such as 4095 for 12 bits."""
    return 2 ** max(1, int(np.ceil(peak)).bit_length()) - 1 if peak > 0 else 1


def square_of(image: Image.Image, channels: int, white: int, img_size: int) -> torch.Tensor:
    """Return the middle square of an opened image, resized: uint8 (channels, img_size, img_size)."""
    image.load()  # truncated pixels raise here
    image = to_mode(upright(image), channels, white)
    image = functional.center_crop(image, min(image.size))
    return functional.pil_to_tensor(functional.resize(image, img_size))


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its metadata say; if they cannot be read, it stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image


def to_mode(image: Image.Image, channels: int, white: int) -> Image.Image:
    """Convert any mode to 8-bit grey or RGB: `white` of DEEP_GREY becomes 255, transparency is laid on white."""
    if image.mode in DEEP_GREY:
        values = np.asarray(image, np.float64).clip(0, white)
        image = Image.fromarray((values * 255 // white).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")
