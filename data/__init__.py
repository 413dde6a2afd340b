"""The training images, as bytes and labels.

builtin.py reads the known sets, folder.py a user's own images; batches.py shuffles them, drawing.py draws with G.
"""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from data.builtin import SETS, load_builtin
from data.folder import load_folder
from utils import BadInput

NAMES = ("mnist", *SETS, "folder")


class LabelledImages(NamedTuple):
    """A data set: images, uint8 (N, C, H, W); labels, int64 (N,); the classes' names, by label.

    `in_memory` is False if the images are a file on the disk that PyTorch reads as if it were memory.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    in_memory: bool = True


def check_data_root(name: str, data_root: Path | None) -> None:
    """Raise BadInput unless `--data_root` fits the data set: MNIST does not read it, a folder needs it."""
    if name == "mnist" and data_root is not None:
        raise BadInput("argument --data_root: --dataset mnist does not read it: did you mean --dataset folder?")
    if name == "folder" and data_root is None:
        raise BadInput("argument --data_root: --dataset folder needs it: name the folder of your classes' folders")


def load_dataset(
    name: str, data_root: Path | None, img_size: int, n_cpu: int = 1, scratch: Path | None = None, train: bool = True
) -> LabelledImages:
    """Read one of NAMES, each image resized with PIL to `img_size` pixels as the tutorial's transform does.

    Up to `n_cpu` workers decode a large folder; one that exceeds the memory budget into a file in `scratch`, by default
    the system's temporary folder. Only the other sets have test images (`train=False`). Raises BadInput for a file that
    is missing, corrupt or cannot be downloaded.
    """
    if name == "folder":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        scratch = scratch or Path(tempfile.gettempdir())
        return LabelledImages(*load_folder(data_root, img_size, min(n_cpu, cores), scratch))
    return LabelledImages(*load_builtin(name, data_root, img_size, train))


def add_data_flags(parser) -> None:
    """Add --dataset, --data_root and --test_root, as evaluate.py and train_judge.py read them."""
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="mnist", help="the real images")
    add("--data_root", type=Path, metavar="DIR", help="their folder, as for acgan.py (default: as for acgan.py)")
    add("--test_root", type=Path, metavar="DIR", help="folder of the test images of --dataset folder (default: none)")


def load_train_and_test(
    name: str, data_root: Path | None, test_root: Path | None, img_size: int
) -> tuple[LabelledImages, LabelledImages]:
    """Read both parts of a data set; the test images of a folder are in `test_root`. Raises BadInput."""
    check_data_root(name, data_root)
    if name != "folder":
        if test_root is not None:
            raise BadInput(f"argument --test_root: {name} has its own test images; it is for --dataset folder")
        return load_dataset(name, data_root, img_size), load_dataset(name, data_root, img_size, train=False)
    if test_root is None:
        raise BadInput("argument --test_root: --dataset folder needs it: name a folder of images kept for testing")
    train_set, test_set = (load_dataset(name, root, img_size, n_cpu=8) for root in (data_root, test_root))
    if train_set.classes != test_set.classes or train_set.images.shape[1] != test_set.images.shape[1]:
        raise BadInput(f"argument --test_root: {str(test_root)!r} has other classes or channels than --data_root")
    return train_set, test_set
