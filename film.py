"""A film of the digits forming: a run's grids from the same noise, one after the other, as a GIF.

python film.py                 # of the run in this folder, to film.gif
python film.py runs/a --rows 4
"""

import argparse
import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from command_line import WHOLE, OneLineParser, check_output, exit_status, flag
from utils import BadInput, print_line, whole_file

CAPTION = 14  # pixels above the grid
GRID_ROWS = 10  # of every grid
LAST_SHOWN = 3000  # milliseconds


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
        grid = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise BadInput(f"{path} is damaged, or is no picture: delete it to leave it out") from error
    cell = (grid.height - 2) // GRID_ROWS  # an image and the line above it; two more pixels below
    if cell < 3:
        raise BadInput(f"{path} is no grid of {GRID_ROWS} rows: delete it to leave it out")
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
    flag(parser, "--milliseconds", WHOLE, 200, "how long each frame is shown; the last for three seconds")
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
        check_output("--out", opt.out)
        count = make_film(opt.run, opt.out, opt.frames, opt.rows, opt.milliseconds)
        print_line(f"{opt.out}: {count} frames, {opt.out.stat().st_size / 2**20:.1f} MB")

    return exit_status("film.py", command)


if __name__ == "__main__":
    sys.exit(main())
