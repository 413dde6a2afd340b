"""Digits by request: the right ones, the same for the same seed."""

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, errors
from PIL import Image

import generate
from cli import BUNDLED_GENERATOR, run_command
from drawing import draw_images, draw_set
from evaluation.judge import judge_images, load_judge
from models import Generator, load_network, save_network
from utils import atomic_write, print_line


def cells(path, rows, columns):
    """The images of a picture, row by row: uint8 (N, 1, 32, 32)."""
    picture = np.asarray(Image.open(path).convert("L"))
    assert picture.shape == (rows * 34 + 2, columns * 34 + 2)
    corners = [(34 * row + 2, 34 * column + 2) for row in range(rows) for column in range(columns)]
    return torch.from_numpy(np.stack([picture[None, y : y + 32, x : x + 32] for y, x in corners]))


@pytest.mark.parametrize(
    ("flags", "rows", "wanted"),
    [
        (["2026"], 5, [2, 0, 2, 6]),
        (["--labels", "0,1, 3", "-n", 8], 8, [0, 1, 3]),
        (["-n", 2], 2, list(range(10))),
    ],
)
def test_picture_shows_the_digits_asked_for(flags, rows, wanted, tmp_path):
    result = call(generate.main, *flags, "--out", tmp_path / "a.png")
    assert result.status == 0 and f"a.png: {rows} rows of {len(wanted)} images\n" in result.out
    assert result.err == f"Weights: {BUNDLED_GENERATOR}\n"
    images = cells(tmp_path / "a.png", rows, len(wanted))
    assert len(images.flatten(1).unique(dim=0)) == rows * len(wanted)  # variants, not copies
    recognised = judge_images(load_judge(None), images)[1]
    assert (recognised == torch.tensor(wanted).repeat(rows)).double().mean() >= 0.9


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


def test_data_set(tmp_path):
    result = call(generate.main, "-n", 130, "--npz", tmp_path / "set.npz")  # more than two chunks
    assert result.status == 0 and result.out == f"{tmp_path / 'set.npz'}: 1,300 images\n"
    with np.load(tmp_path / "set.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (1300, 1, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (1300,) and labels.dtype == np.int64
    assert (np.bincount(labels) == 130).all()
    recognised = judge_images(load_judge(None), torch.from_numpy(images))[1]
    assert (recognised.numpy() == labels).mean() > 0.95
    assert not list(tmp_path.glob(".*"))


def test_image_does_not_depend_on_its_neighbours_or_the_chunk():
    generator = load_network(BUNDLED_GENERATOR)
    z, labels = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    together = draw_images(generator, z, labels)
    alone = draw_images(generator, z[3:4], labels[3:4])
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=0)
    assert generator.training
    few, many = (draw_set(generator, torch.arange(n) % 10, seed=0).int() for n in (5, 505))
    assert (few[:4] - many[:4]).abs().max() <= 1  # torch.randn draws the tail of a tensor otherwise


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["20x6"], "argument digits: 'x' is not a class: choose from 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ([""], "argument digits: '' is not a class"),
        (["1", "--out", "."], "argument --out: '.' is a folder: name a file"),
        (["--npz", "/tmp"], "argument --npz: '/tmp' is a folder: name a file"),
        (["--npz", "a.npz", "--out", "b.png"], "argument --npz: not allowed with argument --out"),
        (["--steps", "3"], "argument --steps: only with argument --interpolate"),
        (["--labels", "3,12"], "argument --labels: '12' is not a class"),
        (["--labels", ""], "argument --labels: '' is not a class"),
        (["--interpolate", "3", "a"], "argument --interpolate: 'a' is not a class"),
        (["12", "--labels", "3"], "not allowed with argument"),
        (["-n", "0"], "argument -n: '0' is not a whole number"),
        (["-n", "2000"], "argument -n: more than 10,000 images do not fit one picture"),
        (["--weights", "none.pth"], "cannot read 'none.pth' (No such file or directory)"),
        (["--weights", "."], "cannot read 'acgan_gen_ema.pth'"),
        (["--weights", "text.pth"], "'text.pth' is corrupt, or is not a Generator"),
        (["--weights", "judge.pth"], "'judge.pth' is corrupt, or is not a Generator"),
        (["--interpolate", "1", "2", "--npz", "a.npz"], "argument --npz: not allowed with argument --interpolate"),
        (["1", "--out", "a.jpg"], "argument --out: 'a.jpg' does not end in .png: name a file that does"),
        (["1", "--out", "/dev/null"], "argument --out: '/dev/null' is a device or a pipe: name a file"),
        (["1", "--out", "text.pth/a.png"], "argument --out: cannot write to 'text.pth'"),
        (["--npz", "/proc/a.npz"], "argument --npz: cannot write to '/proc'"),
    ],
)
def test_mistakes(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    save_network(tmp_path / "judge.pth", load_judge(None))
    assert words in errors(call(generate.main, *flags))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.pth", "text.pth"]


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
    assert capsys.readouterr().err.startswith("a.py: error: cannot write 'the output' (No space left on device): free")


def test_closed_outputs_are_no_error_of_their_own(tmp_path):
    save_network(tmp_path / "small.pth", Generator(img_size=16))
    command = f'"{sys.executable}" "{ROOT / "generate.py"}" 1 --out "{tmp_path}/a.png" --weights'
    assert subprocess.run(f"{command} none.pth >&- 2>&-", shell=True).returncode == 2
    assert subprocess.run(f'{command} "{tmp_path}/small.pth" >&- 2>&-', shell=True).returncode == 0
    assert (tmp_path / "a.png").exists()
