"""A user's own images: one folder a class, decoded once into memory or, beyond the memory budget, into a file."""

import contextlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional
from tqdm import tqdm

from utils import MEMORY_SHARE, BadInput, announce, counted, local_ranks, on_terminal

MANY = 2000  # images from which on workers decode a folder
CHUNK = 64  # images that a worker decodes at a time
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # whatever a file's name says: other readers of Pillow start programs
KINDS = "PNG, JPEG, WebP or BMP"
GREY_MODES = {"1", "L", "LA", "I;16", "I"}


def load_folder(root: Path, img_size: int, workers: int, scratch: Path):
    """Read the images in ROOT/CLASS/ and below, grey if all of them are, else colour, cropped to a centred square.

    `workers` processes decode MANY images or more; to a file in `scratch` if they exceed the memory budget. Returns the
    fields of data.LabelledImages. Raises BadInput for a bad image or too small a disk.
    """
    paths, labels, classes = find_images(root)
    grey = [is_grey(path) for path in paths]  # of all, as each header is checked
    files = ImageFiles(paths, 1 if all(grey) else 3, img_size)
    n_bytes = int(np.prod(files.shape, dtype=np.int64))
    if n_bytes <= memory() * MEMORY_SHARE / local_ranks():  # each rank of this machine decodes its own copy
        images = torch.empty(files.shape, dtype=torch.uint8)
        for number, chunk in enumerate(decoded(files, workers)):
            images[CHUNK * number : CHUNK * number + len(chunk)] = chunk
        return images, labels, classes, True
    size, free = (f"{n / 2**30:.1f} GiB" for n in (n_bytes, shutil.disk_usage(scratch).free))
    if shutil.disk_usage(scratch).free < n_bytes:
        raise BadInput(f"the images take {size} of disk at this size, and {str(scratch)!r} has {free}: free some")
    announce(f"Images: {size} exceed the memory budget; decoded once, into a temporary file in {str(scratch)!r}.")
    with tempfile.TemporaryFile(dir=scratch) as file:  # it has no name, so nothing is left behind
        for chunk in decoded(files, workers):
            file.write(chunk.numpy())
        file.flush()
        return torch.from_numpy(np.memmap(file, np.uint8, "c", shape=files.shape)), labels, classes, False


def find_images(root: Path) -> tuple[list[str], torch.Tensor, list[str]]:
    """Return the paths of all images, their labels, int64 (N,), and the classes' names; hidden ones are skipped."""
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "is missing"
        raise BadInput(f"{str(root)!r} {what}: name a folder that holds a folder for each class")

    def fail(error: OSError):
        raise BadInput(f"cannot read {error.filename!r} ({error.strerror}): allow reading it or remove it") from error

    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        fail(error)
    if len(classes) < 2:
        loose = sum(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(root))
        found = counted(len(classes), "folder") + (f" and {counted(loose, 'image')}" if loose else "")
        raise BadInput(f"{str(root)!r} holds {found}: make a folder of images for each class, two or more")
    paths, labels, seen = [], [], set()
    for label, name in enumerate(classes):
        if not name.isprintable():
            raise BadInput(f"{name!r} cannot be printed as the name of a class: rename the folder")
        for folder, subfolders, files in os.walk(root / name, onerror=fail, followlinks=True):
            if os.path.realpath(folder) in seen:
                raise BadInput(f"{folder!r} is a link to a folder that is read already: remove it")
            seen.add(os.path.realpath(folder))
            subfolders[:] = sorted(subfolder for subfolder in subfolders if not subfolder.startswith("."))
            images = [file for file in sorted(files) if file.lower().endswith(SUFFIXES) and not file.startswith(".")]
            paths += [os.path.join(folder, image) for image in images]
        labels += [label] * (len(paths) - len(labels))
        if label not in labels:
            raise BadInput(
                f"{str(root / name)!r} holds no image: add {', '.join(SUFFIXES)} files, or remove the folder"
            )
    return paths, torch.tensor(labels), classes


def is_grey(path: str) -> bool:
    """Return True if an image has no colour, by its header. Raises BadInput if it has none."""
    try:
        if not os.path.isfile(path):
            raise ValueError("not a file")
        with no_warnings(), Image.open(path, formats=FORMATS) as image:
            return image.mode in GREY_MODES
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        what = "empty" if empty else f"not a {KINDS} file that can be read"
        raise BadInput(f"{path!r} is {what}: replace or delete it") from error


class ImageFiles(Dataset):
    """Image files, decoded when they are asked for: uint8 (C, img_size, img_size), or BadInput as a value."""

    def __init__(self, paths: list[str], channels: int, img_size: int):
        self.paths, self.channels = paths, channels
        self.shape = (len(paths), channels, img_size, img_size)
        self.fit = transforms.Compose([transforms.Resize(img_size), transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | BadInput:
        path = self.paths[index]
        try:
            with no_warnings(), Image.open(path, formats=FORMATS) as image:
                image = to_mode(ImageOps.exif_transpose(image), self.channels)
                return self.fit(functional.center_crop(image, min(image.size)))
        except MemoryError:
            raise
        except Exception:  # Pillow's readers raise many kinds of error
            return BadInput(f"{path!r} is corrupt, as a part of it cannot be decoded: replace or delete it")


def collate(images: list) -> torch.Tensor | BadInput:
    """Stack images in the worker, or return the first error among them."""
    return next((image for image in images if isinstance(image, BadInput)), None) or torch.stack(images)


def decoded(files: ImageFiles, workers: int):
    """Yield the images of `files` in order, CHUNK at a time. Raises BadInput for a corrupt file or a lost worker."""
    workers = workers if len(files) >= MANY else 0
    loader = DataLoader(files, CHUNK, num_workers=workers, collate_fn=collate, generator=torch.Generator())
    try:
        for chunk in tqdm(loader, "Reading", delay=1, disable=not on_terminal()):
            if isinstance(chunk, BadInput):
                raise chunk
            yield chunk
    except (RuntimeError, EOFError) as error:
        raise BadInput("a worker that decodes images was lost, perhaps for lack of memory: lower --n_cpu") from error


@contextlib.contextmanager
def no_warnings():
    """Silence Pillow: a large picture is fine, and a corrupt one raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert any mode to 8-bit grey or RGB: 16 bits are scaled down, transparency is laid on white."""
    if image.mode in ("I;16", "I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def memory() -> float:
    """Return the bytes of memory of this machine, or of its container if less; infinite if unknown."""
    sizes = [float("inf")]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" if there is no limit
    return min(sizes)
