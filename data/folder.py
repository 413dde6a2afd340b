"""A user's own images: one folder a class, decoded once into memory or, beyond the memory budget, into a file."""

import collections
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import pixels
from data.memory import memory
from utils import MEMORY_SHARE, BadInput, announce, counted, local_ranks, on_terminal

CHUNK = 256  # images decoded at a time
LARGE = 2**14  # bytes of a file from which on threads pay: smaller ones are read mostly under Python's lock
NAMED = 10  # bad images, kinds of files or folders that a message names
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's categories of control characters, half pairs and ends of lines
NO_CLASSES = {"@eadir", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information", "lost+found"}


class Reading(NamedTuple):
    """How a folder is read, where it is not to decide itself.

    classes: their names, in the order of the labels. channels: 1, grey, or 3, colour. white: the value that is white in
    grey of more than 8 bits, or 0. skip_bad: leave out images that cannot be read.
    """

    classes: list[str] | None = None
    channels: int | None = None
    white: int = 0
    skip_bad: bool = False


AS_FOUND = Reading()


def load_folder(root: Path, img_size: int, workers: int, scratch: Path, reading: Reading = AS_FOUND):
    """Read the images in ROOT/CLASS/ and below, grey if all of them are, else colour, cropped to a centred square.

    Up to `workers` threads decode large files; to a file in `scratch` if the images exceed the memory budget. Returns
    the fields of data.LabelledImages. Raises BadInput for bad images or too small a disk.
    """
    if reading.channels not in (None, 1, 3):
        raise BadInput(f"argument --channels: images of a folder are read with 1 (grey) or 3, not {reading.channels}")
    paths, labels, classes = find_images(root, reading.classes)
    bad = {}  # the number of each bad image, and why
    some = [os.path.getsize(path) for path in paths[:: len(paths) // 100 + 1] if os.path.isfile(path)]
    all_good = partial(good, paths=paths, bad=bad, workers=workers if sum(some) > LARGE * len(some) else 1)

    modes = dict(all_good("Checking", pixels.mode_of, range(len(paths))))
    deep = [number for number, mode in modes.items() if mode in pixels.DEEP_GREY]
    lowest, highest = zip((0.0, 0.0), *(pair for _, pair in all_good("Checking", pixels.range_of, deep)), strict=True)
    white = reading.white or (pixels.white_for(max(highest)) if deep else 0)
    channels = reading.channels or (1 if set(modes.values()) <= pixels.GREY else 3)

    to_square = partial(pixels.square_of, channels=channels, white=white, img_size=img_size)
    squares = all_good("Reading", to_square, list(modes))
    shape = (len(modes), channels, img_size, img_size)
    fits = int(np.prod(shape, dtype=np.int64)) <= memory() * MEMORY_SHARE / local_ranks()  # each rank has its own copy
    images = into_memory(squares, shape) if fits else into_file(squares, shape, scratch)
    labels = labels[[number for number in range(len(paths)) if number not in bad]]
    if bad:
        report(bad, paths, reading.skip_bad)
        if empty := set(range(len(classes))) - set(labels.tolist()):
            raise BadInput(f"class {classes[min(empty)]!r} has no image that can be read: add some, or remove it")

    if deep:
        values = f"{min(lowest):,.6g} to {max(highest):,.6g}; 0 is taken as black, {white:,} as white"
        announce(f"Images: {len(deep):,} in grey of more than 8 bits, with values from {values}.")
    if not reading.channels and channels == 3:
        grey = sum(modes[number] in pixels.GREY for number in modes if number not in bad)
        if grey == len(labels):  # only those left out are in colour
            images = images[:, :1].contiguous() if fits else images[:, :1]
        elif grey:
            announce(f"Images: {grey:,} in grey, {len(labels) - grey:,} in colour; --channels 1 reads all as grey.")
    return images, labels, classes, fits, white


def find_images(root: Path, known: list[str] | None = None) -> tuple[list[str], torch.Tensor, list[str]]:
    """Return the paths of all images, their labels, int64 (N,), and the classes' names.

    These are in the order of `known` if they are the same, else in natural order: 2 before 10. Hidden files, other
    kinds of files and folders of earlier runs are skipped; all but the hidden ones are announced. Raises BadInput.
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
    images, inner, loose = {}, {}, []  # by class: its images, and the names of its own folders
    runs, other_kinds, seen = [], collections.defaultdict(collections.Counter), {}
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        if (twin := seen.setdefault(os.path.realpath(folder), folder)) != folder:
            raise BadInput(f"{folder!r} and {twin!r} are the same folder: remove the link to it")
        subfolders[:] = [
            name for name in sorted(subfolders) if not (name.startswith(".") or name.lower() in NO_CLASSES)
        ]
        of_this = ("images", "logs") if is_run(folder) else ()
        of_runs = [name for name in subfolders if name in of_this or is_run(os.path.join(folder, name))]
        subfolders[:] = [name for name in subfolders if name not in of_runs]
        runs += [os.path.join(folder, name) for name in of_runs]
        kinds = {file: os.path.splitext(file)[1].lower() for file in sorted(files) if not file.startswith(".")}
        found = [os.path.join(folder, file) for file, kind in kinds.items() if kind in pixels.suffixes()]
        if folder == os.fspath(root):
            images, loose = {name: [] for name in subfolders}, found
            for file in files:
                if not os.path.exists(os.path.join(folder, file)):
                    raise BadInput(f"{os.path.join(folder, file)!r} is a link to nothing: mend or remove it")
            continue
        name = Path(folder).relative_to(root).parts[0]
        inner.setdefault(name, list(subfolders))  # the class's own folder comes first
        images[name] += found
        other_kinds[name].update(kind or "without a suffix" for kind in kinds.values() if kind not in pixels.suffixes())
    check_classes(root, images, inner, loose, other_kinds)
    classes = known if known and sorted(known) == sorted(images) else sorted(images, key=natural)

    other = sum(other_kinds.values(), collections.Counter())
    skipped = [f"{counted(other.total(), 'file')} of other kinds ({named(other)})"] if other else []
    skipped += [f"{counted(len(loose), 'image')} beside the classes' folders"] if loose else []
    skipped += [f"{listed(map(repr, runs))}, of an earlier run"] if runs else []
    if skipped:
        announce(f"Skipped: {'; '.join(skipped)}.")
    labels = [label for label, name in enumerate(classes) for _ in images[name]]
    return [path for name in classes for path in images[name]], torch.tensor(labels), classes


def listed(words, separator: str = ", ") -> str:
    """Return words as a list, of which only the first NAMED are shown."""
    words = list(words)
    more = f"{separator}and {len(words) - NAMED:,} more" if len(words) > NAMED else ""
    return separator.join(words[:NAMED]) + more


def named(kinds: collections.Counter) -> str:
    """Return how many files there are of each kind, the most frequent first."""
    return listed(f"{n:,} {kind}" for kind, n in kinds.most_common())


def is_run(folder: str) -> bool:
    """Return True if a training has written into a folder, by its config.json."""
    try:
        settings = json.loads(Path(folder, "config.json").read_text())
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
            others = f", but {named(other_kinds[name])}" if other_kinds[name] else ""
            raise BadInput(
                f"{str(root / name)!r} holds no image{others}: add some (PNG, JPEG, ...), or remove the folder"
            )


def good(desc: str, use, numbers, *, paths: list[str], bad: dict[int, str], workers: int):
    """Yield (number, use(opened image)) for each image that is not `bad`; those that prove so are put there."""

    def attempt(number: int):
        try:
            return number, pixels.read(paths[number], use), None
        except pixels.BadImage as error:
            return number, None, str(error)

    numbers = [number for number in numbers if number not in bad]
    bar = tqdm(total=len(numbers), desc=desc, delay=1, disable=not on_terminal())
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool, bar:
        warnings.simplefilter("ignore")  # Pillow's: a large picture is fine, and a corrupt one raises
        for first in range(0, len(numbers), CHUNK):
            for number, result, why in (pool.map if workers > 1 else map)(attempt, numbers[first : first + CHUNK]):
                bar.update()
                if why is None:
                    yield number, result
                else:
                    bad[number] = why


def into_memory(squares, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the images of `squares`, pairs of a number and an image, at most `shape`, as one tensor."""
    images, count = torch.empty(shape, dtype=torch.uint8), 0
    for _, square in squares:
        images[count] = square
        count += 1
    return images[:count]


def into_file(squares, shape: tuple[int, ...], scratch: Path) -> torch.Tensor:
    """Do as into_memory does, but in a temporary file in `scratch`, which has no name and so leaves nothing behind."""
    n_bytes, room = int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(scratch).free
    size, free = (f"{n / 2**30:.1f} GiB" for n in (n_bytes, room))
    if room < n_bytes:
        raise BadInput(f"the images take {size} of disk at this size, and {str(scratch)!r} has {free}: free some")
    announce(f"Images: {size} exceed the memory budget; decoded once, into a temporary file in {str(scratch)!r}.")
    file, count = tempfile.TemporaryFile(dir=scratch), 0  # noqa: SIM115 (open as long as its images are)
    for _, square in squares:
        file.write(square.contiguous().numpy())
        count += 1
    file.flush()
    if not count:
        return torch.empty(count, *shape[1:], dtype=torch.uint8)
    images = np.memmap(file, np.uint8, "c", shape=(count, *shape[1:]))
    images.file = file
    return torch.from_numpy(images)


def report(bad: dict[int, str], paths: list[str], skip: bool) -> None:
    """Name bad images, all of them or the first few. Raises BadInput unless they are to be skipped."""
    these = listed((f"{paths[number]!r} ({why})" for number, why in sorted(bad.items())), "; ")
    if not skip:
        what = f"{len(bad):,} of {len(paths):,} images" if len(bad) > 1 else "an image"
        mend = f"replace or delete {'them' if len(bad) > 1 else 'it'}, or add --bad_images skip"
        raise BadInput(f"{what} cannot be read: {these}: {mend}")
    announce(f"Left out: {counted(len(bad), 'image')} that cannot be read: {these}.")
