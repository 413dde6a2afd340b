"""A small colour data set, drawn: discs, boxes and crosses on pale backgrounds, in pictures of many sizes.

python tests/shapes.py FOLDER 400    # 400 of each
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

CLASSES = ["blue cross", "green box", "red disc"]


def draw_shape(name: str, rng: random.Random) -> Image.Image:
    """A colour picture of one class, of a size of its own, on a pale background."""
    size = rng.randint(40, 90), rng.randint(40, 90)
    image = Image.new("RGB", size, tuple(rng.randint(200, 255) for _ in range(3)))
    pen, x, y, r = ImageDraw.Draw(image), size[0] // 2, size[1] // 2, rng.randint(10, 18)
    if name == "red disc":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(rng.randint(180, 255), 0, 0))
    elif name == "green box":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=(0, rng.randint(120, 255), 0))
    else:
        pen.line((x - r, y - r, x + r, y + r), fill=(0, 0, 255), width=5)
        pen.line((x - r, y + r, x + r, y - r), fill=(0, 0, 255), width=5)
    return image


def make_folder(root: Path, per_class: int, seed: int = 0) -> Path:
    """Write ROOT/CLASS/N.png, and return ROOT."""
    rng = random.Random(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            draw_shape(name, rng).save(root / name / f"{number}.png")
    return root


if __name__ == "__main__":
    make_folder(Path(sys.argv[1]), int(sys.argv[2]))
