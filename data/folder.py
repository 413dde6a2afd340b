"""A user's own images: one folder a class, decoded once into memory or, beyond the memory budget, into a file."""

import os
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
from data.classes import find_images, listed
from data.memory import memory
from utils import MEMORY_SHARE, BadInput, announce, counted, local_ranks, on_terminal

CHUNK = 256  # images decoded at a time
LARGE = 2**14  # bytes of a file from which on threads pay: smaller ones are read mostly under Python's lock


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

    kinds = dict(all_good("Checking", pixels.kind_of, range(len(paths))))
    modes = {number: mode for number, (mode, _) in kinds.items()}
    deep = [number for number, mode in modes.items() if mode in pixels.DEEP_GREY]
    ranges = dict(all_good("Checking", pixels.range_of, deep))  # the smallest and the largest value of each
    white = reading.white or (pixels.white_for(max(high for _, high in ranges.values())) if ranges else 0)
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

    if oblong := sum(not kinds[number][1] for number in kinds if number not in bad):
        announce(f"Images: {oblong:,} of {len(labels):,} cropped to the middle square.")
    if seen := [pair for number, pair in ranges.items() if number not in bad]:
        lowest, highest = min(low for low, _ in seen), max(high for _, high in seen)
        values = f"{lowest:,.6g} to {highest:,.6g}; 0 is taken as black, {white:,} as white"
        announce(f"Images: {len(seen):,} in grey of more than 8 bits, with values from {values}.")
    if not reading.channels and channels == 3:
        grey = sum(modes[number] in pixels.GREY for number in modes if number not in bad)
        if grey == len(labels):  # only those left out are in colour
            images = images[:, :1].contiguous() if fits else images[:, :1]
        elif grey:
            announce(f"Images: {grey:,} in grey, {len(labels) - grey:,} in colour; --channels 1 reads all as grey.")
    return images, labels, classes, fits, white


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
    try:
        for _, square in squares:
            file.write(square.contiguous().numpy())
            count += 1
        file.flush()
    except OSError as error:
        error.filename = error.filename or str(scratch)
        raise
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
