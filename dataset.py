"""The training images: MNIST and its kin, CIFAR-10, or a folder of one's own, all as bytes and labels."""

import contextlib
import gzip
import os
import pickle
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import functional
from tqdm import tqdm

from mnist import MNIST
from utils import BadInput, announce, on_terminal, whole_file

KEPT_BYTES = 200 * 2**20  # MNIST resized to more is made anew at each start: 60,000 up to 56 pixels are kept
MEMORY_SHARE = 0.25  # of the memory that a folder's images may take; larger ones are streamed
MANY = 2000  # images from which on workers read a folder into memory
NAMES = ("mnist", "fashion_mnist", "kmnist", "qmnist", "cifar10", "folder")
IDX = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz",
       "t10k-labels-idx1-ubyte.gz"]  # fmt: skip
QMNIST_FILES = ["qmnist-train-images-idx3-ubyte.gz", "qmnist-train-labels-idx2-int.gz",
                "qmnist-test-images-idx3-ubyte.gz", "qmnist-test-labels-idx2-int.gz"]  # fmt: skip
# for each of torchvision's sets: its class, the folder below data_root to put files into, and which
SETS = {
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw", IDX),
    "kmnist": (datasets.KMNIST, "KMNIST/raw", IDX),
    "qmnist": (datasets.QMNIST, "QMNIST/raw", QMNIST_FILES),
    "cifar10": (datasets.CIFAR10, ".", ["cifar-10-python.tar.gz"]),
}
FORMATS = ("PNG", "JPEG")  # whatever a file's name says: other readers start programs
GREY_MODES = {"1", "L", "LA", "I;16", "I"}


class LabelledImages(NamedTuple):
    """A data set.

    images: uint8 (N, C, H, W), or FolderImages where they do not fit into memory; labels: int64 (N,);
    classes: their names, by label.
    """

    images: "torch.Tensor | FolderImages"
    labels: torch.Tensor
    classes: list[str]


def load_dataset(name: str, data_root: str | Path, img_size: int, train: bool = True, workers: int = 0):
    """Read a data set, each image resized with PIL, as the tutorial's transform does.

    Args:
        name: one of NAMES.
        data_root: where the files are, or will be; for "folder", the folder of the classes.
        img_size: image side, pixels.
        train: the training images, or else the test images; a folder has no such parts.
        workers: processes that read a large folder.

    Returns:
        LabelledImages.

    Raises:
        BadInput: a file is missing, damaged, or cannot be fetched or written; the line names it.
    """
    if name == "folder":
        return load_folder(Path(data_root), img_size, workers)
    if name == "mnist":
        return load_mnist(data_root, img_size, train)
    source = from_torchvision(name, Path(data_root), train)
    labels = torch.as_tensor(source.targets)
    labels = labels[:, 0] if name == "qmnist" else labels  # the other columns tell who wrote it
    classes = [str(digit) for digit in range(10)] if name == "qmnist" else list(source.classes)
    if len(source.data) != len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        raise BadInput(f"a file of {name} below {str(data_root)!r} is damaged: {len(source.data):,} images, but "
                       f"{len(labels):,} labels from {labels.min()} to {labels.max()}")  # fmt: skip
    if source.data.shape[1] != source.data.shape[2]:
        raise BadInput(f"a file of {name} below {str(data_root)!r} is damaged: its images are no squares")
    return LabelledImages(resized(source, img_size), labels, classes)


def load_train_and_test(name: str, data_root: Path, test_root: Path | None, img_size: int):
    """Both parts of a data set, for those who judge: two LabelledImages. A folder's test images lie in `test_root`.

    Raises:
        BadInput: as load_dataset; or a folder's parts do not match, or do not fit into memory.
    """
    if name != "folder":
        if test_root is not None:
            raise BadInput(f"argument --test_root: only for --dataset folder; {name} has test images of its own")
        return tuple(load_dataset(name, data_root, img_size, train) for train in (True, False))
    if test_root is None:
        raise BadInput(
            "argument --test_root: needed with --dataset folder; name a folder of real images kept for testing"
        )
    workers = workers_for(8)
    parts = (load_folder(data_root, img_size, workers), load_folder(test_root, img_size, workers, "--test_root"))
    if parts[0].classes != parts[1].classes or parts[0].images.shape[1] != parts[1].images.shape[1]:
        raise BadInput(
            f"argument --test_root: {str(test_root)!r} has other classes or channels than {str(data_root)!r}"
        )
    if any(isinstance(part.images, FolderImages) for part in parts):
        raise BadInput("argument --data_root: too many images for memory; judge fewer of them")
    return parts


def load_mnist(data_root: str | Path, img_size: int, train: bool) -> LabelledImages:
    """MNIST. The resized images are kept beside the unpacked ones, where the next start finds them; a kept file that
    is damaged, or of another Pillow, is made anew."""
    mnist = MNIST(data_root, train=train)
    classes = [str(digit) for digit in range(10)]
    split = "train" if train else "test"
    kept = Path(mnist.raw_folder).parent / "resized" / f"{split}-{img_size}-pillow{PIL.__version__}.npz"
    with contextlib.suppress(Exception):  # damage shows in a dozen ways
        images = torch.from_numpy(np.load(kept)["images"])  # npz: a zip file, whose checksums are verified
        if images.shape == (len(mnist), 1, img_size, img_size):
            return LabelledImages(images, mnist.targets, classes)
    images = resized(mnist, img_size)
    if images.nbytes <= KEPT_BYTES:
        with contextlib.suppress(OSError), whole_file(kept) as file:
            np.savez(file, images=images.numpy())
    return LabelledImages(images, mnist.targets, classes)


def resized(source, img_size: int) -> torch.Tensor:
    """The images of a torchvision data set, resized: uint8 (N, C, img_size, img_size)."""
    resize, to_uint8 = transforms.Resize(img_size), transforms.PILToTensor()
    images = None
    for i, (image, _) in enumerate(tqdm(source, desc="Resizing", unit="img", delay=1, disable=not on_terminal())):
        image = to_uint8(resize(image))
        images = torch.empty(len(source), *image.shape, dtype=torch.uint8) if images is None else images
        images[i] = image
    return images


def from_torchvision(name: str, data_root: Path, train: bool):
    """One of SETS, from files in data_root, or else from the network. Raises BadInput."""
    kind, folder, files = SETS[name]
    folder = data_root / folder
    options = {"what": "train" if train else "test10k"} if name == "qmnist" else {"train": train}
    missing = [part for part in (folder, folder.parent) if not part.exists()]
    put = f"put {', '.join(files)} there"
    try:
        unpack(folder)
        try:
            return kind(data_root, **options)
        except RuntimeError as error:
            if "not found" not in str(error):
                raise ValueError("damaged") from error
        return kind(data_root, download=True, **options)
    except (ValueError, AssertionError, EOFError, LookupError, TypeError, gzip.BadGzipFile, zlib.error,
            pickle.PickleError) as error:  # fmt: skip
        raise BadInput(f"a file of {name} in {str(folder)!r} is damaged: delete its files, and {put}") from error
    except PermissionError as error:
        raise BadInput(f"argument --data_root: cannot write to {str(folder)!r}; name another folder") from error
    except (RuntimeError, URLError, OSError) as error:
        for part in missing:
            with contextlib.suppress(OSError):
                part.rmdir()  # what torchvision made and left empty
        raise BadInput(
            f"{name} is not in {str(folder)!r}, and could not be downloaded: {put}, or connect this machine"
        ) from error


def unpack(folder: Path) -> None:
    """Unpack the IDX files that somebody put into `folder`, once; torchvision wants just the bytes of its mirrors."""
    for packed in sorted(folder.glob("*-idx?-*.gz")):
        if not packed.with_suffix("").exists():
            with gzip.open(packed) as source, whole_file(packed.with_suffix("")) as target:
                target.write(source.read())


class VisibleFolders(datasets.ImageFolder):
    """ImageFolder that passes over what is hidden, such as .git, and reads PNG and JPEG.

    Args:
        root: the folder of the classes.
        flag: that named it.
    """

    def __init__(self, root: Path, flag: str):
        self.flag = flag
        super().__init__(root, is_valid_file=self.wanted)

    def wanted(self, path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(self.root).parts)
        return path.lower().endswith((".png", ".jpg", ".jpeg")) and not hidden

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        classes = sorted(
            entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith(".")
        )
        if len(classes) < 2:
            raise BadInput(
                f"argument {self.flag}: {str(directory)!r} holds {len(classes)} folders of images, "
                "but a class needs another to be told from: put each class's images into a folder of its own"
            )
        for name in classes:
            if not name.isprintable():
                raise BadInput(f"argument {self.flag}: {name!r} cannot be printed as the name of a class; rename it")
        return classes, {name: number for number, name in enumerate(classes)}


class FolderImages:
    """The images of a folder, read when they are asked for, all in one size and number of channels.

    Args:
        paths: files, by number.
        channels: 1 for grey, 3 for colour.
        img_size: image side, pixels.
    """

    def __init__(self, paths: list[str], channels: int, img_size: int):
        self.paths, self.channels = paths, channels
        self.shape = (len(paths), channels, img_size, img_size)
        self.fit = transforms.Compose([transforms.Resize(img_size), transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index) -> torch.Tensor:
        """One image, uint8 (C, H, W), or for an int64 (B,) of indices, (B, C, H, W). Raises BadInput."""
        if isinstance(index, torch.Tensor) and index.dim():
            return torch.stack([self[int(i)] for i in index])
        path = self.paths[index]
        try:
            with quiet(), Image.open(path, formats=FORMATS) as image:
                image = plain(ImageOps.exif_transpose(image), self.channels)
                return self.fit(functional.center_crop(image, min(image.size)))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers meet garbage in a dozen ways
            what = "damaged, or is no PNG or JPEG"
            raise BadInput(f"{path!r} is {what} ({first_line(error)}): mend or remove it") from error


@contextlib.contextmanager
def quiet():
    """Without Pillow's warnings: a large picture is as good as any, and what is damaged raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain(image: Image.Image, channels: int) -> Image.Image:
    """Any mode to 8-bit grey or RGB: 16 bits are scaled down, transparency is laid on white."""
    if image.mode in ("I;16", "I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def load_folder(data_root: Path, img_size: int, workers: int, flag: str = "--data_root") -> LabelledImages:
    """DATA_ROOT/CLASS/**/*.png or .jpg: grey if all of them are, else colour; cropped to a square around the middle.

    Raises:
        BadInput: the folder or one in it cannot be read, a class is alone or empty, or a file is no image.
    """
    if not data_root.is_dir():
        raise BadInput(f"argument {flag}: no folder {str(data_root)!r}; name one that holds a folder for each class")

    def fail(error: OSError):
        raise BadInput(f"argument {flag}: cannot read {error.filename!r} ({error.strerror})") from error

    seen = set()
    for folder, _, _ in os.walk(data_root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in seen:
            raise BadInput(f"argument {flag}: {folder!r} is a link to a folder that was met already; remove it")
        seen.add(os.path.realpath(folder))
    try:
        found = VisibleFolders(data_root, flag)
    except FileNotFoundError as error:
        raise BadInput(f"argument {flag}: {first_line(error)}; it needs .png or .jpg files") from error
    paths, labels = [path for path, _ in found.samples], torch.tensor([label for _, label in found.samples])
    channels = 1
    for path in paths:  # headers only
        try:
            if not os.path.isfile(path):
                raise ValueError("no file")
            with quiet(), Image.open(path, formats=FORMATS) as image:
                if image.mode not in GREY_MODES:
                    channels = 3
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            empty = os.path.isfile(path) and os.path.getsize(path) == 0
            what = "empty" if empty else "no PNG or JPEG that can be read"
            raise BadInput(f"{path!r} is {what}: mend or remove it") from error
    files = FolderImages(paths, channels, img_size)
    n_bytes = len(paths) * channels * img_size**2
    if n_bytes > memory() * MEMORY_SHARE:
        announce(
            f"Images: {n_bytes / 2**30:.1f} GiB at this size, too many for memory, so workers read them as they go."
        )
        return LabelledImages(files, labels, found.classes)
    images = torch.empty(files.shape, dtype=torch.uint8)
    loader = DataLoader(
        files, batch_size=64, num_workers=workers if len(files) >= MANY else 0, generator=torch.Generator()
    )
    for number, chunk in enumerate(
        tqdm(from_workers(loader), "Reading", len(loader), delay=1, disable=not on_terminal())
    ):
        images[64 * number : 64 * number + len(chunk)] = chunk
    return LabelledImages(images, labels, found.classes)


def from_workers(loader: DataLoader):
    """What `loader` reads. Raises BadInput, in one line, where a file is damaged or a worker was lost."""
    try:
        yield from loader
    except BadInput as error:  # PyTorch puts the worker's traceback before it
        raise BadInput(str(error).strip().splitlines()[-1].removeprefix("utils.BadInput: ")) from None
    except (RuntimeError, OSError, EOFError) as error:
        raise BadInput(
            "a process that reads images was lost, perhaps for want of memory: lower --n_cpu of acgan.py"
        ) from error


def workers_for(wanted: int) -> int:
    """As many workers as wanted, but no more than there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


def memory() -> float:
    """Bytes of memory of this machine, or of its container where that has less; infinite where nothing says."""
    sizes = [float("inf")]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" where there is no limit
    return min(sizes)


def first_line(error: BaseException) -> str:
    """An error's first line, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
