"""Digits by request: the right ones, the same for the same seed."""

import contextlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, errors
from PIL import Image

import generate
from data import drawing
from data.drawing import draw_images, draw_set
from evaluation.judge import judge_images, load_judge
from models import Generator
from run.weights import BUNDLED_GENERATOR, load_network, save_network
from utils import atomic_write, print_line, run_command


def cells(path, rows, columns):
    """The images of a picture, row by row: uint8 (N, 1, 32, 32)."""
    picture = Image.open(path).convert("L")
    enlarged = picture.width // (columns * 34 + 2)
    small = picture.reduce(enlarged)
    assert (np.asarray(small.resize(picture.size, Image.Resampling.NEAREST)) == np.asarray(picture)).all()
    picture = np.asarray(small)
    assert picture.shape == (rows * 34 + 2, columns * 34 + 2)
    corners = [(34 * row + 2, 34 * column + 2) for row in range(rows) for column in range(columns)]
    return torch.from_numpy(np.stack([picture[None, y : y + 32, x : x + 32] for y, x in corners]))


def test_2026_is_the_picture_that_the_model_card_shows(tmp_path):
    assert call(generate.main, "2026", "--out", tmp_path / "2026.png").status == 0
    ours, shown = (np.asarray(Image.open(path)).astype(int) for path in
                   (tmp_path / "2026.png", ROOT / "docs" / "images" / "2026.png"))  # fmt: skip
    assert ours.shape == shown.shape and np.abs(ours - shown).mean() < 0.5  # grey levels; processors round differently


@pytest.mark.parametrize(
    ("flags", "rows", "wanted"),
    [
        (["2026"], 5, [2, 0, 2, 6]),
        (["--labels", "0,1， 3", "-n", 8], 8, [0, 1, 3]),  # a Chinese keyboard's comma
        (["-n", 2], 2, list(range(10))),
    ],
)
def test_picture_shows_the_digits_asked_for(flags, rows, wanted, tmp_path):
    result = call(generate.main, *flags, "--out", tmp_path / "a.png")
    names = ", ".join(str(digit) for digit in wanted)
    assert result.status == 0
    assert result.out == f"{tmp_path / 'a.png'}: {rows} rows of {len(wanted)} images, of {names}\n"
    assert result.err == f"Weights: {BUNDLED_GENERATOR}, after batch 13,132\n"
    images = cells(tmp_path / "a.png", rows, len(wanted))
    assert len(images.flatten(1).unique(dim=0)) == rows * len(wanted)  # variants, not copies
    recognised = judge_images(load_judge(None), images)[1]
    assert (recognised == torch.tensor(wanted).repeat(rows)).double().mean() >= 0.9


def test_picture_is_large_enough_to_see_and_scale_is_obeyed(tmp_path):
    for flags, size in [([], (4 * 138, 4 * 172)), (["--scale", 1], (138, 172)), (["--scale", 7], (7 * 138, 7 * 172)),
                        (["-n", 14], (2 * 138, 2 * 478)), (["-n", 50], (138, 1702))]:  # fmt: skip
        assert call(generate.main, "2026", *flags, "--out", tmp_path / "a.png").status == 0
        assert Image.open(tmp_path / "a.png").size == size


def test_seed_repeats_and_another_differs(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert call(generate.main, "7", "--seed", seed, "--out", tmp_path / f"{name}.png").status == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_interpolation_begins_and_ends_at_the_classes(tmp_path):
    flags = ["--interpolate", 3, 8, "-n", 6, "--steps", 7, "--out", tmp_path / "walk.png"]
    assert call(generate.main, *flags).status == 0
    walk = cells(tmp_path / "walk.png", 6, 7).view(6, 7, 1, 32, 32)
    noise = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    generator = load_network(BUNDLED_GENERATOR)
    for end, label in [(0, 3), (6, 8)]:
        alone = draw_images(generator, noise, torch.full((6,), label)).add(1).mul(127.5)
        assert (walk[:, end].float() - alone).abs().max() <= 1
    changes = (walk[:, 1:].float() - walk[:, :-1].float()).abs().mean((2, 3, 4))
    jump = (walk[:, 0].float() - walk[:, -1].float()).abs().mean((1, 2, 3))
    assert (changes > 0).all() and (changes.max(1).values < jump).all()


def test_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "CHUNK", 100)  # of 260 images
    result = call(generate.main, "-n", 26, "--npz", tmp_path / "set.npz")
    assert result.status == 0 and result.out == f"{tmp_path / 'set.npz'}: 260 images\n"
    page, documented = (ROOT / "docs" / "outputs.md").read_text(), {}
    (snippet,) = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)
    exec(snippet.replace('"digits.npz"', "path"), {"path": tmp_path / "set.npz"}, documented)
    assert documented["labels"].tolist()[:11] == [*range(10), 0] and documented["names"][3] == "3"
    with np.load(tmp_path / "set.npz") as file:
        images, labels, classes = file["images"], file["labels"], file["classes"]
    assert images.shape == (260, 1, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (260,) and labels.dtype == np.int64
    assert classes.tolist() == list("0123456789") and classes.dtype.kind == "U"
    assert (np.bincount(labels) == 26).all()
    recognised = judge_images(load_judge(None), torch.from_numpy(images))[1]
    assert (recognised.numpy() == labels).mean() > 0.95
    assert not list(tmp_path.glob(".*"))


def test_image_does_not_depend_on_its_neighbours_or_the_chunk(monkeypatch):
    monkeypatch.setattr(drawing, "CHUNK", 100)
    generator = load_network(BUNDLED_GENERATOR)
    z, labels = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    together = draw_images(generator, z, labels)
    alone = draw_images(generator, z[3:4], labels[3:4])
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=0)
    assert generator.training
    few, many = (draw_set(generator, torch.arange(n) % 10, seed=0).int() for n in (5, 105))
    assert (few[:4] - many[:4]).abs().max() <= 1  # torch.randn draws the tail of a tensor otherwise


def test_links_are_followed_and_two_writers_never_share_a_file(tmp_path, monkeypatch):
    (tmp_path / "target.png").touch()
    (tmp_path / "link.png").symlink_to("target.png")
    assert call(generate.main, "1", "--out", tmp_path / "link.png").status == 0
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "target.png").stat().st_size > 100

    def write_while_another_does(file):
        file.write(b"first")
        monkeypatch.setattr("os.getpid", lambda: 1)
        atomic_write(tmp_path / "one", lambda file: file.write(b"second, longer"))
        assert (tmp_path / "one").read_bytes() == b"second, longer"
        monkeypatch.undo()

    atomic_write(tmp_path / "one", write_while_another_does)
    assert (tmp_path / "one").read_bytes() == b"first"


def test_full_disk_behind_the_output_is_an_error(capsys, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", full)
        assert run_command("a.py", lambda: print_line("result", must_succeed=True)) == 2
        patched.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert capsys.readouterr().err.startswith("a.py: error: cannot write the output (No space left on device): free")


def test_closed_outputs_are_no_error_of_their_own(tmp_path, monkeypatch):
    save_network(tmp_path / "small.pth", Generator(img_size=16, latent_dim=4), list("0123456789"))
    flags = f'1 --out "{tmp_path}/a.png" --weights "{tmp_path}/small.pth"'
    assert subprocess.run(f'"{sys.executable}" "{ROOT / "generate.py"}" {flags} >&- 2>&-', shell=True).returncode == 0
    assert Image.open(tmp_path / "a.png").size == (4 * 20, 4 * 92)
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it if the shell closed it
    monkeypatch.setattr(sys, "stderr", None)
    assert generate.main(["1", "--weights", str(tmp_path / "none.pth")]) == 2


def test_name_of_a_class_is_drawn_before_its_characters(tmp_path):
    classes = ["0", "1", "2", "10", "hat, red", "cat", "cafe\u0301"]  # the last as a Mac writes it
    save_network(tmp_path / "small.pth", Generator(7, 4, 16), classes)
    flags = ["--weights", tmp_path / "small.pth", "--out", tmp_path / "a.png"]
    for words, drawn in [(["10"], "10"), (["12"], "1, 2"), (["cat"], "cat"), (["--labels", "hat, red"], "hat, red"),
                         (["--labels", "1,10"], "1, 10"), (["0110"], "0, 1, 1, 0"), (["caf\u00e9"], "cafe\u0301"),
                         (["--labels", "1,cafe\u0301"], "1, cafe\u0301")]:  # fmt: skip
        result = call(generate.main, *words, *flags)
        assert result.status == 0 and result.out.endswith(f", of {drawn}\n"), result
    assert "'a' is not a class of small.pth: choose from 0, 1, 2, 10, " in errors(call(generate.main, "a1", *flags))
    assert call(generate.main, "10", "--weights", tmp_path / "small.pth", "--npz", tmp_path / "a.npz").status == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["classes"].tolist() == classes and (file["classes"][file["labels"]] == "10").all()
