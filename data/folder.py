"""A user's own images: one folder a class, decoded once into memory or, beyond the memory budget, into a file."""

import collections
import json
import os
import re
import shutil
import tempfile
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
NAMED = 10  # bad images that a message names
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
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
    grey = sum(mode in pixels.GREY for mode in modes.values())
    channels = reading.channels or (1 if grey == len(modes) else 3)
    if deep:
        values = f"{min(lowest):,.6g} to {max(highest):,.6g}; 0 is taken as black, {white:,} as white"
        announce(f"Images: {len(deep):,} in grey of more than 8 bits, with values from {values}.")
    if grey and grey < len(modes) and not reading.channels:
        announce(f"Images: {grey:,} are grey and {len(modes) - grey:,} in colour; --channels 1 reads all as grey.")

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
    return images, labels, classes, fits, white


def find_images(root: Path, known: list[str] | None = None) -> tuple[list[str], torch.Tensor, list[str]]:
    """Return the paths of all images, their labels, int64 (N,), and the classes' names.

    These are in the order of `known` if they are the same, else in natural order: 2 before 10. Hidden files, other
    kinds of files and folders of earlier runs are skipped; all but the hidden ones are announced. Raises BadInput.
    """
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "is missing"
        raise BadInput(f"{str(root)!r} {what}: name a folder that holds a folder for each class")

    def fail(error: OSError):
        raise BadInput(f"cannot read {error.filename!r} ({error.strerror}): allow reading it or remove it") from error

    images, holds_folders, loose = {}, {}, []
    runs, other_kinds, seen = [], collections.Counter(), set()
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in seen:
            raise BadInput(f"{folder!r} is a link to a folder that is read already: remove it")
        seen.add(os.path.realpath(folder))
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
            continue
        other_kinds.update(kind or "without a suffix" for kind in kinds.values() if kind not in pixels.suffixes())
        name = Path(folder).relative_to(root).parts[0]
        holds_folders.setdefault(name, bool(subfolders) and not found)  # the class's own folder comes first
        images[name] += found
    check_classes(root, images, [name for name in images if holds_folders[name]], loose)
    classes = known if known and sorted(known) == sorted(images) else sorted(images, key=natural)

    kinds = ", ".join(f"{n:,} {kind}" for kind, n in other_kinds.most_common())
    skipped = [f"{counted(other_kinds.total(), 'file')} of other kinds ({kinds})"] if kinds else []
    skipped += [f"{counted(len(loose), 'image')} beside the classes' folders"] if loose else []
    skipped += [f"{', '.join(map(repr, runs))}, of an earlier run"] if runs else []
    if skipped:
        announce(f"Skipped: {'; '.join(skipped)}.")
    labels = [label for label, name in enumerate(classes) for _ in images[name]]
    return [path for name in classes for path in images[name]], torch.tensor(labels), classes


def is_run(folder: str) -> bool:
    """Return True if a training has written into a folder, by its config.json."""
    try:
        settings = json.loads(Path(folder, "config.json").read_text())
        return settings.keys() >= {"options", "log_dir", "versions"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def natural(name: str) -> list:
    """Return a key that sorts names by the numbers in them: 2 before 10."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", name))] + [name]


def check_classes(root: Path, images: dict[str, list[str]], outer: list[str], loose: list[str]) -> None:
    """Raise BadInput unless each class has images. `outer` are those of folders alone, `loose` are in no class."""
    parts = [name for name, found in images.items() if found]
    if outer and all(name.lower() in SPLITS for name in parts):
        named = " and ".join(map(repr, parts))
        best = next((name for name in outer if name.lower().startswith("train")), outer[0])
        raise BadInput(f"{str(root)!r} holds parts of a data set, {named}, not its classes: name a part, such as "
                       f"{str(root / best)!r}")  # fmt: skip
    if len(images) < 2:
        found = counted(len(images), "folder") + (f" and {counted(len(loose), 'image')}" if loose else "")
        there = f", or name {str(root / outer[0])!r}" if outer else ""
        raise BadInput(f"{str(root)!r} holds {found}: make a folder of images for each class, two or more{there}")
    for name, found in images.items():
        if not name.isprintable():
            raise BadInput(f"{name!r} cannot be printed as the name of a class: rename the folder")
        if not found:
            raise BadInput(f"{str(root / name)!r} holds no image: add some (PNG, JPEG, ...), or remove the folder")


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
    images = np.memmap(file, np.uint8, "c", shape=(count, *shape[1:]))
    images.file = file
    return torch.from_numpy(images)


def report(bad: dict[int, str], paths: list[str], skip: bool) -> None:
    """Name bad images, all of them or the first few. Raises BadInput unless they are to be skipped."""
    named = "; ".join(f"{paths[number]!r} ({why})" for number, why in sorted(bad.items())[:NAMED])
    more = f"; and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
    if not skip:
        what = f"{len(bad):,} of {len(paths):,} images" if len(bad) > 1 else "an image"
        mend = f"replace or delete {'them' if len(bad) > 1 else 'it'}, or add --bad_images skip"
        raise BadInput(f"{what} cannot be read: {named}{more}: {mend}")
    announce(f"Left out: {counted(len(bad), 'image')} that cannot be read: {named}{more}.")
