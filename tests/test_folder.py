"""A folder of the user's own images: trained on, resumed, drawn from, scored; damage is named."""

import json
import os
import re
import shutil
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import assert_same_run, call, errors, read_board
from PIL import Image
from shapes import CLASSES, make_folder

import evaluate
import generate
import train_judge
from data import folder, load_dataset
from data.batches import Batches
from evaluation.scorecard import Counts, balanced
from run.weights import load_network
from utils import BadInput

SMALL = ["--dataset", "folder", "--batch_size", 16, "--img_size", 16, "--latent_dim", 4, "--log_interval", 1,
         "--sample_interval", 9]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 70)


@pytest.fixture
def copy(tmp_path):
    """A small folder for one test to harm."""
    return make_folder(tmp_path / "copy", 4)


@pytest.fixture(scope="module")
def straight(shapes, train, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("straight")
    result = train(*SMALL, "--data_root", shapes, "--seed", 2, "--max_steps", 16, "--out_dir", out_dir)
    assert result.status == 0 and "Data: folder, 210 colour images of 3 classes." in result.err
    return out_dir


def test_folder_trains_and_resumes_bit_exactly_on_the_same_images_only(shapes, straight, train, tmp_path):
    resumed = tmp_path / "resumed"
    flags = [*SMALL, "--data_root", shapes]
    assert train(*flags, "--seed", 2, "--max_steps", 10, "--out_dir", resumed).status == 0
    assert train("--resume", resumed, "--data_root", shapes, "--max_steps", 16).status == 0
    assert_same_run(resumed, straight)
    moved = shutil.copytree(shapes, tmp_path / "moved")
    (moved / "red disc" / "1.png").rename(moved / "green box" / "red.png")
    for other in (make_folder(tmp_path / "other", 5), moved):
        line = errors(train("--resume", resumed, "--data_root", other, "--max_steps", 30))
        assert "argument --resume: the checkpoint is from other images: name its own --data_root" in line
    assert "--data_root: --dataset folder needs it" in errors(train("--resume", resumed, "--max_steps", 30))
    assert_same_run(resumed, straight)


def test_names_of_the_classes_reach_the_record_tensorboard_and_generate(straight, tmp_path):
    assert json.loads((straight / "config.json").read_text())["classes"] == CLASSES
    (event,) = read_board(straight).Tensors("classes/text_summary")
    assert event.tensor_proto.string_val == [", ".join(CLASSES).encode()]
    grid = np.asarray(Image.open(straight / "images" / "9.png"))
    assert grid.shape == (10 * 18 + 2, 3 * 18 + 2, 3) and (grid[..., 0] != grid[..., 2]).any()  # in colour
    generator = load_network(straight / "acgan_gen.pth")
    assert generator.classes == CLASSES and generator.config["channels"] == 3
    flags = ["--weights", straight, "--out", tmp_path / "a.png"]
    result = call(generate.main, "--labels", "red disc,0", *flags)
    assert result.status == 0 and result.err == f"Weights: {straight / 'acgan_gen_ema.pth'}\n"
    assert Image.open(tmp_path / "a.png").size == (4 * (2 * 18 + 2), 4 * (5 * 18 + 2))
    assert "5 rows of 2 images, of red disc, " in result.out
    line = errors(call(generate.main, "--labels", "red", *flags))
    assert "argument --labels: 'red' is not a class: choose from blue cross, green box, red disc" in line


def test_judge_for_them_can_be_trained_and_scores_with_it(shapes, straight, train, tmp_path, monkeypatch):
    flags = [*SMALL, "--data_root", shapes, "--seed", 2, "--n_epochs", 1, "--eval_interval", 1]
    line = errors(train(*flags, "--out_dir", tmp_path / "run"))
    assert "it knows 10 classes (0, 1, 2, ...) in grey, 32 pixels, but the generator draws 3 classes (blue" in line
    assert not (tmp_path / "run").exists()

    data = ["--dataset", "folder", "--data_root", shapes, "--device", "cpu"]
    judge = [*data, "--img_size", 16, "--out", tmp_path / "judge.pth"]
    assert "argument --test_root: --dataset folder needs it" in errors(call(train_judge.main, *judge))
    data += ["--test_root", make_folder(tmp_path / "test", 12, seed=1)]
    result = call(train_judge.main, *judge, "--test_root", tmp_path / "test", "--n_epochs", 8)
    assert result.status == 0 and float(re.search(r"([\d.]+)% of the 36 test images", result.out)[1]) > 80
    result = train(*flags, "--judge", tmp_path / "judge.pth", "--out_dir", tmp_path / "run")
    assert result.status == 0 and result.err.count("agreement") == 1, result.err
    weights = ["--weights", tmp_path / "run", "--judge", tmp_path / "judge.pth"]
    monkeypatch.setattr(evaluate, "QUICK", Counts(scored=100, cas=100, cas_epochs=1, pairs=20))
    result = call(evaluate.main, *weights, *data)
    assert result.status == 0 and "blue cross" in result.out
    assert "Warning: only 36 test images: FID, density and coverage are uncertain." in result.out
    assert "--dataset: mnist has other classes" in errors(call(evaluate.main, *weights, "--device", "cpu"))


def test_folder_beyond_the_memory_budget_is_decoded_into_a_file(shapes, straight, train, tmp_path, monkeypatch):
    in_memory = load_dataset("folder", shapes, 32)
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0)
    result = train(*SMALL, "--data_root", shapes, "--seed", 2, "--max_steps", 16, "--out_dir", tmp_path / "run")
    assert result.status == 0 and "exceed the memory budget; decoded once, into a temporary file" in result.err
    assert_same_run(tmp_path / "run", straight)
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0.25)
    monkeypatch.setattr(folder, "memory", lambda: 7.9 * in_memory.images.numel())  # twice suffice for one rank
    assert load_dataset("folder", shapes, 32).in_memory
    for name, value in dict(TORCHELASTIC_RUN_ID="none", RANK="0", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    on_disk = load_dataset("folder", shapes, 32, scratch=tmp_path)
    assert not on_disk.in_memory and torch.equal(on_disk.images, in_memory.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # the file has no name
    batches = Batches(on_disk, 32)
    torch.manual_seed(0)
    for indices in batches:
        assert torch.equal(batches.gather(indices)[0], Batches(in_memory, 32).gather(indices)[0])
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(BadInput, match="the images take 0.0 GiB of disk at this size, and .* has 0.0 GiB: free some"):
        load_dataset("folder", shapes, 32, scratch=tmp_path)


def test_damage_and_loss_that_a_worker_finds_are_one_line(copy, monkeypatch):
    monkeypatch.setattr(folder, "MANY", 0)
    path = copy / "green box" / "2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-60])  # the header is whole
    with pytest.raises(BadInput, match=r"^\S.*green box/2.png' is corrupt, as a part of it .*: replace or delete it$"):
        load_dataset("folder", copy, 32, n_cpu=1)
    path.write_bytes(whole)
    monkeypatch.setattr(folder.ImageFiles, "__getitem__", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BadInput, match="a worker that decodes images was lost"):
        load_dataset("folder", copy, 32, n_cpu=1)


def test_thin_picture_takes_little_memory(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (1, 200_000), 50).save(tmp_path / name / "thin.png")
    tracemalloc.start()
    assert load_dataset("folder", tmp_path, 16).images.float().mean() == 50
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_mixed_modes_become_one(tmp_path):
    red = Image.new("RGB", (40, 30), (200, 0, 0))
    (tmp_path / "a").mkdir(), (tmp_path / "b" / "deeper").mkdir(parents=True), (tmp_path / ".hidden").mkdir()
    red.save(tmp_path / "a" / "rgb.PNG")
    red.quantize(4).save(tmp_path / "a" / "palette.png")
    Image.new("RGBA", (30, 40), (200, 0, 0, 0)).save(tmp_path / "a" / "transparent.png")
    red.save(tmp_path / "b" / "deeper" / "photo.jpeg", quality=95)
    red.save(tmp_path / "b" / "deeper" / "small.WebP", quality=95)
    red.save(tmp_path / "b" / "deeper" / "plain.bmp")
    Image.fromarray(np.full((50, 50), 128 * 257, np.uint16)).save(tmp_path / "b" / "sixteen.png")
    Image.new("1", (20, 20), 1).save(tmp_path / "b" / "bits.png")
    (tmp_path / "b" / "notes.txt").write_text("skipped")
    (tmp_path / "b" / "._photo.png").write_text("skipped")
    images, labels, classes, _ = load_dataset("folder", tmp_path, 16)
    assert classes == ["a", "b"] and labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    wanted = [(200, 0, 0)] * 5 + [(255, 255, 255)] * 2 + [(128, 128, 128)]
    found = sorted(tuple(row) for row in images.float().mean((2, 3)).round().int().tolist())
    assert np.abs(np.array(found) - np.array(sorted(wanted))).max() <= 2

    for path in [*(tmp_path / "a").glob("*"), *(tmp_path / "b" / "deeper").glob("*")]:
        path.unlink()
    Image.new("L", (20, 20), 9).save(tmp_path / "a" / "grey.png")
    assert load_dataset("folder", tmp_path, 16).images.shape == (3, 1, 16, 16)  # all grey


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read everything")
def test_folder_that_cannot_be_read_is_named(copy):
    (copy / "green box" / "deeper").mkdir()
    (copy / "green box" / "deeper").chmod(0)
    with pytest.raises(BadInput, match="cannot read .*deeper"):
        load_dataset("folder", copy, 32)


def test_every_image_size_trains_in_colour(train, copy, tmp_path):
    for size in (28, 100):
        flags = [*SMALL, "--data_root", copy, "--img_size", size, "--batch_size", 4, "--seed", 0]
        assert train(*flags, "--max_steps", 1, "--out_dir", tmp_path / str(size)).status == 0
        grid = Image.open(tmp_path / str(size) / "images" / "0.png")
        assert grid.size == (3 * (size + 2) + 2, 10 * (size + 2) + 2)


def test_scores_of_too_few_images_are_refused(shapes):
    few = load_dataset("folder", shapes, 16)
    with pytest.raises(BadInput, match="class number 2 has 0 real images"):
        balanced(few.images[:71], few.labels[:71], 10, 3, 0)  # none of the third class
