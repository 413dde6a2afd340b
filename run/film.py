"""The film of a run, from its grids of fixed noise."""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from run.folder import OUR_GRID
from utils import atomic_write

FRAMES = 60  # at most
MILLISECONDS, LAST_MILLISECONDS = 150, 3000  # how long each frame is shown, and the last one
CAPTION = 14  # pixels above a frame


def write_film(images: Path, last_step: int) -> None:
    """Write film.gif from the grids of fixed noise up to batch `last_step`, evenly thinned out. Raises OSError."""
    grids = [path for path in (images / "fixed_z").glob("*.png") if OUR_GRID.fullmatch(path.name)]
    grids = [path for path in grids if path.is_file() and int(path.stem) <= last_step]
    grids.sort(key=lambda path: int(path.stem))
    at = np.unique(np.linspace(0, len(grids) - 1, min(FRAMES, len(grids))).round().astype(int))
    frames = []
    for path in (grids[n] for n in at):
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # a corrupt grid is left out
            grid = Image.open(path, formats=("PNG",)).convert("RGB")
            frame = Image.new("RGB", (grid.width, grid.height + CAPTION), "white")
            frame.paste(grid, (0, CAPTION))
            ImageDraw.Draw(frame).text((3, 1), f"batch {int(path.stem):,}", fill="black")
            frames.append(frame.quantize(32, dither=Image.Dither.NONE))
    frames = [frame for frame in frames if frame.size == frames[-1].size and max(frame.size) < 2**16]
    if frames:
        durations = [MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
        gif = dict(format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
        atomic_write(images / "film.gif", lambda file: frames[0].save(file, **gif))
