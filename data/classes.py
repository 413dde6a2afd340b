"""Which images a folder of classes holds: its classes, their images, and what is neither."""

import collections
import json
import os
import re
import stat
import unicodedata
from pathlib import Path

import torch

from data import pixels
from utils import BadInput, announce, counted

NAMED = 10  # things that a message names, at most
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's categories of control characters, half pairs and ends of lines
NO_CLASSES = {"@eadir", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information", "lost+found"}


def find_images(root: Path, known: list[str] | None = None) -> tuple[list[str], torch.Tensor, list[str]]:
    """Return the paths of all images, their labels, int64 (N,), and the classes' names.

    These are in the order of `known` if they are the same, else in natural order: 2 before 10. Hidden files, other
    kinds of files and folders of earlier runs are skipped; all but the hidden ones are announced. Raises BadInput.
    """
    images, inner, other_kinds = {}, {}, collections.defaultdict(collections.Counter)  # by class
    loose, runs = [], []
    for folder, subfolders, files in walk(root, runs):
        kinds = {file: os.path.splitext(file)[1].lower() for file in files}
        found = [os.path.join(folder, file) for file, kind in kinds.items() if kind in pixels.suffixes()]
        if folder == os.fspath(root):
            images, loose = {name: [] for name in subfolders}, found
            continue
        name = Path(folder).relative_to(root).parts[0]
        inner.setdefault(name, list(subfolders))  # the class's own folder comes first
        images[name] += found
        other_kinds[name].update(kind or "without a suffix" for kind in kinds.values() if kind not in pixels.suffixes())
    check_classes(root, images, inner, loose, other_kinds)

    other = sum(other_kinds.values(), collections.Counter())
    skipped = [f"{counted(other.total(), 'file')} of other kinds ({by_kind(other)})"] if other else []
    skipped += [f"{counted(len(loose), 'image')} beside the classes' folders"] if loose else []
    skipped += [f"{listed(map(repr, runs))}, of an earlier run"] if runs else []
    if skipped:
        announce(f"Skipped: {'; '.join(skipped)}.")
    classes = known if known and sorted(known) == sorted(images) else sorted(images, key=natural)
    labels = [label for label, name in enumerate(classes) for _ in images[name]]
    return [path for name in classes for path in images[name]], torch.tensor(labels), classes


def walk(root: Path, runs: list[str]):
    """Yield each folder from `root` down, the names of its folders, and of its files, both sorted.

    Hidden ones and those that hold no images by their name are left out; folders of earlier runs are put into `runs`.
    Raises BadInput for what cannot be read, and for links that lead nowhere or twice to the same place.
    """

    def fail(error: OSError):
        raise BadInput(f"cannot read {error.filename!r} ({error.strerror}): allow reading it or remove it") from error

    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise BadInput(f"{str(root)!r} is a file: name a folder that holds a folder for each class")
    except FileNotFoundError as error:
        raise BadInput(f"{str(root)!r} is missing: name a folder that holds a folder for each class") from error
    except OSError as error:
        fail(error)
    seen = {}
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        if (twin := seen.setdefault(os.path.realpath(folder), folder)) != folder:
            raise BadInput(f"{folder!r} and {twin!r} are the same folder: remove the link to it")
        for file in files if folder == os.fspath(root) else ():  # it may be meant as a class
            if not os.path.exists(os.path.join(folder, file)):
                raise BadInput(f"{os.path.join(folder, file)!r} is a link to nothing: mend or remove it")
        visible = [name for name in sorted(subfolders) if not name.startswith(".") and name.lower() not in NO_CLASSES]
        of_this = ("images", "logs") if is_run(folder) else ()
        of_runs = [name for name in visible if name in of_this or is_run(os.path.join(folder, name))]
        runs += [os.path.join(folder, name) for name in of_runs]
        subfolders[:] = [name for name in visible if name not in of_runs]
        yield folder, subfolders, sorted(file for file in files if not file.startswith("."))


def listed(words, separator: str = ", ") -> str:
    """Return words as a list, of which only the first NAMED are shown."""
    words = list(words)
    more = f"{separator}and {len(words) - NAMED:,} more" if len(words) > NAMED else ""
    return separator.join(words[:NAMED]) + more


def by_kind(kinds: collections.Counter) -> str:
    """Return how many files there are of each kind, the most frequent first."""
    return listed(f"{n:,} {kind}" for kind, n in kinds.most_common())


def is_run(folder: str) -> bool:
    """Return True if a training has written into a folder, by its config.json."""
    try:
        settings = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        return settings.keys() >= {"options", "log_dir", "versions"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def natural(name: str) -> tuple[list, str]:
    """Return a key that sorts names by the numbers in them: 2 before 10."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", name))], name


def parts_of_data_set(inner: dict[str, list[str]]) -> list[str]:
    """Return the folders that are no classes, but parts of a data set, such as train and test; the training one first.

    `inner` are the names of the folders in each. Such parts hold folders; there are two kinds of them, or their folders
    have the names of other folders here.
    """
    kinds = {name: SPLITS & set(re.split(r"[^a-z]+", name.lower())) for name in inner}
    parts = [name for name in inner if kinds[name] and inner[name]]
    elsewhere = [name for name in inner] + [name for other in inner for name in inner[other]]
    common = any(elsewhere.count(name) > 1 for part in parts for name in inner[part])
    are_parts = common or len(set().union(*kinds.values())) > 1
    return sorted(parts, key=lambda name: "train" not in name.lower()) if are_parts else []


def check_classes(root: Path, images: dict, inner: dict, loose: list[str], other_kinds: dict) -> None:
    """Raise BadInput unless each class has images. By class: its `images`, its `inner` folders, and other files."""
    if parts := parts_of_data_set(inner):
        raise BadInput(f"{str(root)!r} holds parts of a data set, not its classes ({listed(map(repr, inner))}): name a "
                       f"part, such as {str(root / parts[0])!r}")  # fmt: skip
    if len(images) < 2:
        found = counted(len(images), "folder") + (f" and {counted(len(loose), 'image')}" if loose else "")
        there = "".join(f", or name {str(root / name)!r}" for name in images if len(inner[name]) > 1)
        raise BadInput(f"{str(root)!r} holds {found}: make a folder of images for each class, two or more{there}")
    for name, found in images.items():
        if UNPRINTABLE & set(map(unicodedata.category, name)):
            raise BadInput(f"{name!r} cannot be printed as the name of a class: rename the folder")
        if not found:
            others = f", but {by_kind(other_kinds[name])}" if other_kinds[name] else ""
            raise BadInput(
                f"{str(root / name)!r} holds no image{others}: add some (PNG, JPEG, ...), or remove the folder"
            )
