"""The training images, as bytes and labels.

builtin.py reads the known sets, folder.py a user's own images: classes.py finds them, pixels.py decodes one, memory.py
knows the room. batches.py shuffles images, drawing.py draws with G.
"""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from data.builtin import SETS, load_builtin
from data.folder import AS_FOUND, Reading, load_folder
from utils import BadInput

__all__ = ["NAMES", "LabelledImages", "Reading", "add_bad_images_flag", "add_data_flags", "check_data_root",
           "load_dataset", "load_train_and_test"]  # fmt: skip
NAMES = ("mnist", *SETS, "folder")


class LabelledImages(NamedTuple):
    """A data set: images, uint8 (N, C, H, W); labels, int64 (N,); the classes' names, by label.

    `in_memory` is False if the images are a file on the disk that PyTorch reads as if it were memory. `white` is the
    value that became 255 in grey of more than 8 bits, or 0 if none is.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    in_memory: bool = True
    white: int = 0


def check_data_root(name: str, data_root: Path | None, new_out_dir: Path | None = None) -> None:
    """Raise BadInput unless `--data_root` fits the data set: MNIST does not read it, a folder needs it.

    A new run may not write among the images of a folder.
    """
    if name == "mnist" and data_root is not None:
        raise BadInput("argument --data_root: --dataset mnist does not read it: did you mean --dataset folder?")
    if name == "folder" and data_root is None:
        raise BadInput("argument --data_root: --dataset folder needs it: name the folder of your classes' folders")
    if name == "folder" and new_out_dir:
        root, *places = (Path(os.path.realpath(path)) for path in
                         (data_root, new_out_dir, new_out_dir / "images", new_out_dir / "logs"))  # fmt: skip
        if root in places or root in places[0].parents:
            raise BadInput(f"argument --out_dir: a run in {str(new_out_dir)!r} writes among the images of "
                           f"{str(data_root)!r}: name a folder beside them, such as {root.name}_run")  # fmt: skip


def load_dataset(
    name: str,
    data_root: Path | None,
    img_size: int,
    n_cpu: int = 1,
    scratch: Path | None = None,
    reading: Reading = AS_FOUND,
    train: bool = True,
) -> LabelledImages:
    """Read one of NAMES, each image resized with PIL to `img_size` pixels as the tutorial's transform does.

    Up to `n_cpu` threads decode a folder, as `reading` says; one that exceeds the memory budget into a file in
    `scratch`, by default the system's temporary folder. Only the other sets have test images (`train=False`). Raises
    BadInput for a file that is missing, corrupt or cannot be downloaded.
    """
    if name == "folder":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        scratch = scratch or Path(tempfile.gettempdir())
        return LabelledImages(*load_folder(data_root, img_size, min(n_cpu, cores), scratch, reading))
    return LabelledImages(*load_builtin(name, data_root, img_size, train))


def add_bad_images_flag(parser) -> None:
    """Add --bad_images."""
    parser.add_argument("--bad_images", choices=["refuse", "skip"], default="refuse",
                        help="skip: leave out images of a folder that cannot be read, and name them")  # fmt: skip


def add_data_flags(parser) -> None:
    """Add --dataset, --data_root, --test_root and --bad_images, as evaluate.py and train_judge.py read them."""
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="mnist", help="the real images")
    add("--data_root", type=Path, metavar="DIR", help="their folder, as for acgan.py (default: as for acgan.py)")
    add("--test_root", type=Path, metavar="DIR", help="folder of the test images of --dataset folder (default: none)")
    add_bad_images_flag(parser)


def load_train_and_test(
    name: str, data_root: Path | None, test_root: Path | None, img_size: int, reading: Reading = AS_FOUND
) -> tuple[LabelledImages, LabelledImages]:
    """Read both parts of a data set; the test images of a folder are in `test_root`, and are read as the others are.

    Raises BadInput.
    """
    check_data_root(name, data_root)
    if name != "folder":
        if test_root is not None:
            raise BadInput(f"argument --test_root: {name} has its own test images; it is for --dataset folder")
        return load_dataset(name, data_root, img_size), load_dataset(name, data_root, img_size, train=False)
    if test_root is None:
        raise BadInput("argument --test_root: --dataset folder needs it: name a folder of images kept for testing")
    train_set = load_dataset(name, data_root, img_size, n_cpu=8, reading=reading)
    as_these = Reading(train_set.classes, train_set.images.shape[1], train_set.white, reading.skip_bad)
    test_set = load_dataset(name, test_root, img_size, n_cpu=8, reading=as_these)
    if train_set.classes != test_set.classes:
        only = sorted({*train_set.classes} ^ {*test_set.classes})
        raise BadInput(f"argument --test_root: {str(test_root)!r} has other classes than --data_root: {only[0]!r} is "
                       "in one of them only")  # fmt: skip
    return train_set, test_set
