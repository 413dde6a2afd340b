"""Digits on request: the right ones, the same for the same seed, and a film of them forming."""

import contextlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import film
import generate
from command_line import exit_status, print_result
from judge import WEIGHTS as JUDGE_WEIGHTS
from judge import judge_images, load_judge
from models import Generator, pack_network, write_weights
from utils import whole_file


def call(command, *flags):
    try:
        return command.main([str(flag) for flag in flags])
    except SystemExit as exit:
        return exit.code


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
def test_picture_shows_the_digits_asked_for(flags, rows, wanted, tmp_path, capsys):
    assert call(generate, *flags, "--out", tmp_path / "a.png") == 0
    assert f"a.png: {rows} rows of {len(wanted)} images\n" in capsys.readouterr().out
    images = cells(tmp_path / "a.png", rows, len(wanted))
    assert len(images.flatten(1).unique(dim=0)) == rows * len(wanted)  # variants, not copies
    recognised = judge_images(load_judge(JUDGE_WEIGHTS), images)[1]
    assert (recognised == torch.tensor(wanted).repeat(rows)).double().mean() >= 0.9


def test_seed_repeats_and_another_differs(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert call(generate, "7", "--seed", seed, "--out", tmp_path / f"{name}.png") == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_walk_begins_and_ends_at_the_classes(tmp_path):
    flags = ["--interpolate", 3, 8, "-n", 6, "--steps", 7, "--out", tmp_path / "walk.png"]
    assert call(generate, *flags) == 0
    walk = cells(tmp_path / "walk.png", 6, 7).view(6, 7, 1, 32, 32)
    noise = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    generator = generate.load_generator(generate.WEIGHTS)
    for end, label in [(0, 3), (6, 8)]:
        alone = generate.to_bytes(generate.draw_images(generator, noise, torch.full((6,), label)))
        assert (walk[:, end].int() - alone.int()).abs().max() <= 1
    changes = (walk[:, 1:].float() - walk[:, :-1].float()).abs().mean((2, 3, 4))
    jump = (walk[:, 0].float() - walk[:, -1].float()).abs().mean((1, 2, 3))
    assert (changes > 0).all() and (changes.max(1).values < jump).all()


def test_data_set(tmp_path, capsys):
    assert call(generate, "-n", 130, "--npz", tmp_path / "set.npz") == 0  # more than two chunks
    assert capsys.readouterr().out == f"{tmp_path / 'set.npz'}: 1,300 images\n"
    with np.load(tmp_path / "set.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (1300, 1, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (1300,) and labels.dtype == np.int64
    assert (np.bincount(labels) == 130).all()
    recognised = judge_images(load_judge(JUDGE_WEIGHTS), torch.from_numpy(images))[1]
    assert (recognised.numpy() == labels).mean() > 0.95
    assert not list(tmp_path.glob(".*"))


def test_image_does_not_depend_on_its_neighbours(tmp_path):
    generator = generate.load_generator(generate.WEIGHTS)
    z, labels = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    together = generate.draw_images(generator, z, labels)
    alone = generate.draw_images(generator, z[3:4], labels[3:4])
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["20x6"], "argument digits: 'x' is not a class; the classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ([""], "argument digits: '' is not a class"),
        (["1", "--out", "."], "argument --out: '.' is a folder; name a file"),
        (["--npz", "/tmp"], "argument --npz: '/tmp' is a folder; name a file"),
        (["--npz", "a.npz", "--out", "b.png"], "argument --npz: not allowed with argument --out"),
        (["--steps", "3"], "argument --steps: only with argument --interpolate"),
        (["--weights", "nan.pth"], "argument --weights: nan.pth is damaged"),
        (["--labels", "3,12"], "argument --labels: '12' is not a class"),
        (["--labels", ""], "argument --labels: '' is not a class"),
        (["--interpolate", "3", "a"], "argument --interpolate: 'a' is not a class"),
        (["12", "--labels", "3"], "not allowed with argument"),
        (["-n", "0"], "argument -n: '0' is not a whole number"),
        (["-n", "2000"], "argument -n: more than 10,000 images do not fit one picture"),
        (["--weights", "none.pth"], "argument --weights: cannot read 'none.pth'"),
        (["--weights", "text.pth"], "argument --weights: text.pth is damaged"),
        (["--interpolate", "1", "2", "--npz", "a.npz"], "argument --npz: not allowed with argument --interpolate"),
        (["1", "--out", "a.jpg"], "argument --out: 'a.jpg' does not end in .png, as what it will hold"),
        (["1", "--out", "/dev/null"], "argument --out: '/dev/null' is a device or a pipe; name a file"),
        (["1", "--out", "text.pth/a.png"], "argument --out: cannot write to 'text.pth'"),
        (["--npz", "/proc/a.npz"], "argument --npz: cannot write to '/proc'"),
    ],
)
def test_mistakes(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    broken = Generator()
    torch.nn.init.constant_(broken.label_emb.weight, float("nan"))
    write_weights(tmp_path / "nan.pth", pack_network(broken))
    assert call(generate, *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("generate.py: error: ") and words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.pth", "text.pth"]


def test_links_are_followed_and_two_writers_do_not_meet(tmp_path, monkeypatch):
    (tmp_path / "target.png").touch()
    (tmp_path / "link.png").symlink_to("target.png")
    assert call(generate, "1", "--out", tmp_path / "link.png") == 0
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "target.png").stat().st_size > 100
    with whole_file(tmp_path / "one") as first:
        first.write(b"first")
        monkeypatch.setattr("os.getpid", lambda: 1)
        with whole_file(tmp_path / "one") as second:
            second.write(b"second, longer")
        assert (tmp_path / "one").read_bytes() == b"second, longer"
    assert (tmp_path / "one").read_bytes() == b"first"


def test_full_disk_behind_the_output_is_an_error(capsys, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", full)
        assert exit_status("a.py", lambda: print_result("result")) == 2
        patched.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert capsys.readouterr().err.startswith("a.py: error: cannot write its output: No space left")


def test_closed_outputs_are_no_error_of_their_own(tmp_path):
    command = f'"{sys.executable}" "{generate.__file__}" 1 --out "{tmp_path}/a.png" --weights'
    assert subprocess.run(f"{command} none.pth >&- 2>&-", shell=True).returncode == 2
    assert subprocess.run(f'{command} "{generate.WEIGHTS}" >&- 2>&-', shell=True).returncode == 0
    assert (tmp_path / "a.png").exists()


def test_film_of_a_run(run, tmp_path, capsys):
    flags = ["--seed", 0, "--batch_size", 16, "--img_size", 16, "--sample_interval", 1, "--max_steps", 9]
    assert run(*flags, "--out_dir", tmp_path).returncode == 0
    assert call(film, tmp_path, "--out", tmp_path / "a.gif", "--frames", 5, "--rows", 4) == 0
    assert re.search(r"a.gif: 5 frames, 0\.\d MB", capsys.readouterr().out)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5 and gif.size == (182, 4 * 18 + 2 + film.CAPTION) and gif.info["loop"] == 0
        frames = []
        for number in range(5):
            gif.seek(number)
            frames.append(gif.convert("RGB").tobytes())
    assert len(set(frames)) == 5
    assert film.chosen_frames(list(range(0, 900, 100)), 5) == [0, 100, 200, 400, 800]
    last = Image.open(tmp_path / "images" / "fixed_z" / "8.png").convert("RGB").crop((0, 0, 182, 74))
    shown = Image.frombytes("RGB", (182, 88), frames[-1]).crop((0, 14, 182, 88))
    assert np.abs(np.asarray(shown, int) - np.asarray(last, int)).mean() < 4  # 32 greys

    (tmp_path / "images" / "fixed_z" / "3.png").write_text("no picture")
    for flags, words in [
        ([tmp_path / "none"], "fewer than two grids in"),
        ([tmp_path], "3.png is damaged, or is no picture"),
        ([tmp_path, "--rows", 11], "argument --rows: a grid has 10"),
        ([tmp_path, "--milliseconds", 700_000], "argument --milliseconds: '700000' is not a whole number from 10 to"),
        ([tmp_path, "--frames", 1], "argument --frames: a film has at least 2"),
    ]:
        assert call(film, *flags, "--out", tmp_path / "b.gif") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("film.py: error: ") and words in err
    assert not (tmp_path / "b.gif").exists()
