"""A film of the digits forming: a run's grids from the same noise, one after the other, as a GIF.

python film.py                 # of the run in this folder, to film.gif
python film.py runs/a --rows 4
"""

import argparse
import io
import re
import signal
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import numpy as np
from PIL import Image, ImageDraw

from command_line import WHOLE, OneLineParser, check_output, exit_status, flag, number, print_result
from utils import BadInput, whole_file

CAPTION = 14  # pixels above the grid
GRID_ROWS = 10  # of every grid
LAST_SHOWN = 3000  # milliseconds
SHOWN = number(int, "a whole number from 10 to 655350", lambda value: 10 <= value <= 655_350)  # what a GIF can hold
GIF_SIDE = 65_535  # pixels


def chosen_frames(steps: list[int], count: int) -> list[int]:
    """At most `count` of the ascending `steps`: all of the early ones, then ever sparser, and always the last."""
    if len(steps) <= count:
        return steps
    at = np.unique(np.geomspace(1, len(steps), count).round().astype(int)) - 1
    extra = [n for n in range(len(steps)) if n not in set(at)][: count - len(at)]  # geomspace repeats the first ones
    return [steps[n] for n in sorted([*at, *extra])]


def read_frame(path: Path, step: int, rows: int) -> Image.Image:
    """One grid, cut to its first `rows` rows, below a line that says its batch. Raises BadInput."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of a picture too large to be a grid
            grid = Image.open(path, formats=("PNG",)).convert("RGB")
    except Exception as error:  # Pillow's reader meets garbage in a dozen ways
        raise BadInput(f"{path} is damaged, or is no picture: delete it to leave it out") from error
    cell = (grid.height - 2) // GRID_ROWS  # an image and the line above it; two more pixels below
    if cell < 3:
        raise BadInput(f"{path} is no grid of {GRID_ROWS} rows: delete it to leave it out")
    if max(grid.size) > GIF_SIDE - CAPTION:
        raise BadInput(f"{path} is too large for a GIF, {grid.width} x {grid.height} pixels")
    grid = grid.crop((0, 0, grid.width, cell * rows + 2))
    frame = Image.new("RGB", (grid.width, grid.height + CAPTION), "white")
    frame.paste(grid, (0, CAPTION))
    ImageDraw.Draw(frame).text((3, 1), f"batch {step:,}", fill="black")
    return frame


def make_film(run: Path, out: Path, count: int, rows: int, milliseconds: int) -> int:
    """Write the GIF; returns its number of frames. Raises BadInput where there are no grids, or OSError."""
    grids = {
        int(path.stem): path for path in (run / "images" / "fixed_z").glob("*.png") if re.fullmatch("[0-9]+", path.stem)
    }
    if len(grids) < 2:
        raise BadInput(
            f"argument run: fewer than two grids in {str(run / 'images' / 'fixed_z')!r}; name a run's folder"
        )
    steps = chosen_frames(sorted(grids), count)
    frames = [read_frame(grids[step], step, rows) for step in steps]
    if len({frame.size for frame in frames}) > 1:
        raise BadInput(
            f"argument run: the grids in {str(run / 'images' / 'fixed_z')!r} differ in size: of several runs?"
        )
    frames = [frame.quantize(32, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [LAST_SHOWN]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    with whole_file(out) as file:
        file.write(buffer.getbuffer())
    return len(frames)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2."""
    parser = OneLineParser(prog="film.py", description="Make a GIF of a run's grids.", allow_abbrev=False)
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path(), help="folder that acgan.py wrote to (default: the current one)"
    )
    flag(parser, "--out", Path, Path("film.gif"), "file to write", "FILE")
    flag(parser, "--frames", WHOLE, 40, "frames at most: the early grids, then ever sparser ones")
    flag(parser, "--rows", WHOLE, GRID_ROWS, f"rows of the grid to show, at most {GRID_ROWS}")
    flag(parser, "--milliseconds", SHOWN, 200, "how long each frame is shown; the last for three seconds")
    opt = parser.parse_args(argv)
    if opt.frames < 2:
        parser.error("argument --frames: a film has at least 2")
    if opt.rows > GRID_ROWS:
        parser.error(f"argument --rows: a grid has {GRID_ROWS}")
    return opt


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit status, as command_line.exit_status."""
    opt = parse_args(argv)

    def command():
        check_output("--out", opt.out, ".gif")
        count = make_film(opt.run, opt.out, opt.frames, opt.rows, opt.milliseconds)
        print_result(f"{opt.out}: {count} frames, {opt.out.stat().st_size / 2**20:.1f} MB")

    return exit_status("film.py", command)


if __name__ == "__main__":
    sys.exit(main())
