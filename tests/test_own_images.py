"""A folder of one's own images, and torchvision's other sets: trained on, resumed, drawn from; damage is named."""

import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import assert_same_run, read_board
from PIL import Image
from shapes import CLASSES, make_folder
from torchvision import datasets

import acgan
import dataset
import evaluate
import generate
import judge
from batches import ShuffledBatches, StreamedBatches
from checkpoint import read_checkpoint
from dataset import FolderImages, load_dataset
from evaluate import balanced
from models import load_network
from utils import BadInput

SMALL = ["--batch_size", 16, "--img_size", 32, "--log_interval", 1, "--sample_interval", 9]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 70)


@pytest.fixture
def copy(tmp_path):
    """A small folder for one test to harm."""
    return make_folder(tmp_path / "copy", 4)


@pytest.fixture(scope="module")
def start_on(start):
    """start_on(folder, *flags): a run on a folder of images."""

    def start_on(folder, *flags, **kwargs):
        process = start("--dataset", "folder", *flags, "--data_root", folder, **kwargs)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return start_on


def test_folder_trains_samples_and_resumes_to_the_last_bit(shapes, start_on, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert start_on(shapes, *SMALL, "--seed", 2, "--max_steps", 20, "--out_dir", straight)[0] == 0
    assert start_on(shapes, *SMALL, "--seed", 2, "--max_steps", 10, "--out_dir", resumed)[0] == 0
    status, _, err = start_on(shapes, "--resume", "--max_steps", 20, "--out_dir", resumed)
    assert status == 0, err
    assert_same_run(resumed, straight)
    status, _, err = start_on(make_folder(tmp_path / "other", 5), "--resume", "--max_steps", 30, "--out_dir", resumed)
    assert status == 2 and "argument --resume: the checkpoint is of other classes or another number of images" in err
    assert_same_run(resumed, straight)
    moved = shutil.copytree(shapes, tmp_path / "moved")
    (moved / "red disc" / "1.png").rename(moved / "green box" / "red.png")
    status, _, err = start_on(moved, "--resume", "--max_steps", 30, "--out_dir", resumed)
    assert status == 2 and "the checkpoint is of other classes or another number of images" in err
    assert json.loads((straight / "config.json").read_text())["classes"] == CLASSES
    grid = np.asarray(Image.open(straight / "images" / "18.png"))
    assert grid.shape == (10 * 34 + 2, 3 * 34 + 2, 3) and (grid[..., 0] != grid[..., 2]).any()  # in colour
    generator = load_network(straight / "acgan_gen.pth")
    assert generator.classes == CLASSES and generator.config["channels"] == 3


def test_names_of_the_classes_reach_tensorboard_and_generate(shapes, start_on, tmp_path, capsys):
    assert start_on(shapes, *SMALL, "--seed", 2, "--max_steps", 1, "--out_dir", tmp_path)[0] == 0
    board = read_board(tmp_path)
    (event,) = board.Tensors("classes/text_summary")
    assert event.tensor_proto.string_val == [", ".join(CLASSES).encode()]
    weights = ["--weights", str(tmp_path / "acgan_gen.pth"), "--out", str(tmp_path / "a.png")]
    assert generate.main(["--labels", "red disc,0", *weights]) == 0
    assert Image.open(tmp_path / "a.png").size == (2 * 34 + 2, 5 * 34 + 2)
    assert generate.main(["--labels", "red", *weights]) == 2
    err = capsys.readouterr().err
    assert "argument --labels: 'red' is not a class; the classes are blue cross, green box, red disc\n" in err


def test_the_judge_says_that_it_does_not_know_them_and_one_can_be_trained(shapes, start_on, tmp_path, capsys):
    flags = [*SMALL, "--seed", 2, "--n_epochs", 2, "--eval_interval", 1]
    status, _, err = start_on(shapes, *flags, "--out_dir", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1
    assert "it knows 10 classes (0, 1, 2, ...) in grey, 32 pixels, but the generator draws 3 classes (blue cross" in err
    assert not (tmp_path / "run").exists()

    test_root = make_folder(tmp_path / "test", 12, seed=1)
    data = ["--dataset", "folder", "--data_root", str(shapes), "--device", "cpu"]
    assert judge.main([*data, "--out", str(tmp_path / "judge.pth")]) == 2
    assert "argument --test_root: needed" in capsys.readouterr().err
    data += ["--test_root", str(test_root)]
    assert judge.main(data) == 2  # the one that comes along is not overwritten
    assert "argument --out: needed here" in capsys.readouterr().err
    assert judge.main([*data, "--n_epochs", "8", "--out", str(tmp_path / "judge.pth")]) == 0
    share = re.search(r"([\d.]+)% of the 36 test images recognised", capsys.readouterr().out)[1]
    assert float(share) > 80
    status, _, err = start_on(shapes, *flags, "--judge", tmp_path / "judge.pth", "--out_dir", tmp_path / "run")
    assert status == 0 and err.count("agreement") == 2, err
    weights = [str(tmp_path / "run" / "acgan_gen.pth"), "--judge", str(tmp_path / "judge.pth")]
    assert evaluate.main([*weights, *data]) == 0
    out = capsys.readouterr().out
    assert "blue cross" in out and "36 test images" in out
    assert evaluate.main([*weights, "--device", "cpu"]) == 2
    assert "argument --dataset: mnist has other classes" in capsys.readouterr().err


def test_streamed_batches_are_those_from_memory(shapes, monkeypatch):
    in_memory = load_dataset("folder", shapes, 32)
    monkeypatch.setattr(dataset, "MEMORY_SHARE", 0)
    streamed = load_dataset("folder", shapes, 32)
    assert isinstance(streamed.images, FolderImages) and streamed.images.shape == in_memory.images.shape
    torch.manual_seed(0)
    expected = ShuffledBatches(*in_memory[:2], 32)
    batches = [expected.gather(indices) for _ in range(2) for indices in expected]
    next_number = torch.rand(1)
    torch.manual_seed(0)
    ours = StreamedBatches(*streamed[:2], 32, workers=1)
    for number, indices in enumerate(indices for _ in range(2) for indices in ours):
        for one, other in zip(ours.gather(indices), batches[number], strict=True):
            assert torch.equal(one, other)
    assert number == len(batches) - 1 == 13 and torch.equal(torch.rand(1), next_number)

    state = expected.state_dict() | {"position": 5}  # resumed within an epoch
    for one in (ours, expected):
        one.load_state_dict(state)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(ours.gather(mine)[0], expected.gather(theirs)[0])


def test_damage_that_a_worker_finds_is_one_line(copy, monkeypatch):
    monkeypatch.setattr(dataset, "MEMORY_SHARE", 0)
    path = copy / "green box" / "2.png"
    path.write_bytes(path.read_bytes()[:-60])  # the header is whole
    images, labels, _ = load_dataset("folder", copy, 32)
    with pytest.raises(
        BadInput, match=r"^\S.*green box/2.png' is damaged, or is no PNG or JPEG .*: mend or remove it$"
    ):
        list(StreamedBatches(images, labels, 4, workers=1))


def test_reader_that_is_killed_is_one_line(copy, monkeypatch):
    monkeypatch.setattr(dataset, "MEMORY_SHARE", 0)
    images, labels, _ = load_dataset("folder", copy, 32)
    monkeypatch.setattr(FolderImages, "__getitem__", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BadInput, match="a process that reads images was lost"):
        list(StreamedBatches(images, labels, 4, workers=1))


def test_damage_in_mid_run_keeps_what_was_reached(copy, tmp_path, monkeypatch, capsys):
    train_step, calls = acgan.train_step, []

    def harming(*args):
        calls.append(1)
        if len(calls) == 3:  # the last batch of an epoch, so nothing is read ahead
            (copy / "green box" / "2.png").write_bytes(b"")
        return train_step(*args)

    monkeypatch.setattr(acgan, "train_step", harming)
    monkeypatch.setattr(dataset, "MEMORY_SHARE", 0)
    flags = ["--dataset", "folder", "--data_root", copy, "--device", "cpu", "--img_size", 16, "--batch_size", 4]
    run = ["--seed", 0, "--n_cpu", 1, "--out_dir", tmp_path / "run"]
    assert acgan.main([str(flag) for flag in [*flags, *run]]) == 2
    assert "2.png' is damaged" in capsys.readouterr().err
    assert 3 <= read_checkpoint(tmp_path / "run")["steps"] < 6


def test_thin_picture_takes_little_memory(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (1, 200_000), 50).save(tmp_path / name / "thin.png")
    tracemalloc.start()
    assert load_dataset("folder", tmp_path, 16).images.float().mean() == 50
    assert tracemalloc.get_traced_memory()[1] < 50_000_000


def test_mixed_modes_become_one(tmp_path):
    red = Image.new("RGB", (40, 30), (200, 0, 0))
    (tmp_path / "a").mkdir(), (tmp_path / "b" / "deeper").mkdir(parents=True), (tmp_path / ".hidden").mkdir()
    red.save(tmp_path / "a" / "rgb.PNG")
    red.quantize(4).save(tmp_path / "a" / "palette.png")
    Image.new("RGBA", (30, 40), (200, 0, 0, 0)).save(tmp_path / "a" / "transparent.png")
    red.save(tmp_path / "b" / "deeper" / "photo.jpeg", quality=95)
    Image.fromarray(np.full((50, 50), 128 * 257, np.uint16)).save(tmp_path / "b" / "sixteen.png")
    Image.new("1", (20, 20), 1).save(tmp_path / "b" / "bits.png")
    (tmp_path / "b" / "notes.txt").write_text("passed over")
    (tmp_path / "b" / "._photo.png").write_text("passed over")
    images, labels, classes = load_dataset("folder", tmp_path, 16)
    assert classes == ["a", "b"] and labels.tolist() == [0, 0, 0, 1, 1, 1]
    wanted = [(200, 0, 0), (200, 0, 0), (255, 255, 255), (255, 255, 255), (200, 0, 0), (128, 128, 128)]
    means = images.float().mean((2, 3))
    found = sorted(tuple(row) for row in means.round().int().tolist())
    assert np.abs(np.array(found) - np.array(sorted(wanted))).max() <= 2

    for path in [*(tmp_path / "a").glob("*"), *(tmp_path / "b" / "deeper").glob("*")]:
        path.unlink()
    Image.new("L", (20, 20), 9).save(tmp_path / "a" / "grey.png")
    assert load_dataset("folder", tmp_path, 16).images.shape == (3, 1, 16, 16)  # all grey


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("missing", "no folder '.*'; name one that holds a folder for each class"),
        ("empty", "holds 0 folders of images"),
        ("one class", "holds 1 folders of images"),
        ("empty class", "Found no valid file for the classes green box"),
        ("text", "green box/2.png' is no PNG or JPEG that can be read: mend or remove it"),
        ("postscript", "green box/2.png' is no PNG or JPEG that can be read"),
        ("pipe", "green box/2.png' is no PNG or JPEG that can be read"),
        ("zero bytes", "green box/2.png' is empty: mend or remove it"),
        ("truncated", "green box/2.png' is damaged, or is no PNG or JPEG"),
        ("loop", "is a link to a folder that was met already"),
        ("dangling", "2.png' is no PNG or JPEG that can be read"),
        ("name", "cannot be printed as the name of a class"),
        ("channels", r"argument --channels: the data \(folder\) has 3, not 1"),
        ("n_classes", r"argument --n_classes: the data \(folder\) has 3, not 10"),
    ],
)
def test_mistakes(harm, words, copy, tmp_path, capsys):
    path, flags, root = copy / "green box" / "2.png", [], copy
    if harm == "missing":
        root = tmp_path / "none"
    elif harm == "empty":
        root = tmp_path / "nothing"
        root.mkdir()
    elif harm == "one class":
        root = tmp_path / "alone"
        root.mkdir()
        (copy / "green box").rename(root / "green box")
    elif harm == "empty class":
        for image in (copy / "green box").iterdir():
            image.unlink()
    elif harm == "text":
        path.write_text("no image")
    elif harm == "postscript":  # Pillow would hand it to another program
        Image.new("RGB", (40, 40)).save(path, "EPS")
    elif harm == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif harm == "zero bytes":
        path.write_bytes(b"")
    elif harm == "loop":
        (copy / "green box" / "self").symlink_to(copy / "green box")
    elif harm == "dangling":
        path.unlink()
        path.symlink_to("nowhere.png")
    elif harm == "name":
        (copy / "green box").rename(copy / "green\nbox")
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:-60])
    else:
        flags = [f"--{harm}", {"channels": 1, "n_classes": 10}[harm]]
    data = ["--dataset", "folder", "--data_root", root, "--device", "cpu"]
    status = acgan.main([str(flag) for flag in [*data, "--seed", 0, *flags, "--out_dir", tmp_path / "run"]])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("acgan.py: error: ")
    assert re.search(words, err), err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read everything")
def test_folder_that_cannot_be_read_is_named(copy):
    (copy / "green box" / "deeper").mkdir()
    (copy / "green box" / "deeper").chmod(0)
    with pytest.raises(BadInput, match="cannot read .*deeper"):
        load_dataset("folder", copy, 32)


def write_idx(path, array, kind=8):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype({8: np.uint8, 12: ">i4"}[kind]).tobytes())


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "qmnist"])
def test_idx_sets_are_read_from_the_files_put_there(name, tmp_path, start):
    kind, folder, files = dataset.SETS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    labels = np.arange(30) % 10
    for images_file, labels_file in (files[:2], files[2:]):
        write_idx(tmp_path / folder / images_file, pixels)
        if name == "qmnist":
            write_idx(tmp_path / folder / labels_file, np.stack([labels] + [labels * 0 + 7] * 7, 1), kind=12)
        else:
            write_idx(tmp_path / folder / labels_file, labels)
    for train in (True, False):
        images, found, classes = load_dataset(name, tmp_path, 28, train)
        assert torch.equal(images[:, 0], torch.from_numpy(pixels).to(torch.uint8)) and found.tolist() == labels.tolist()
        assert classes == (list("0123456789") if name == "qmnist" else kind.classes)
    process = start("--dataset", name, *SMALL, "--img_size", 28, "--seed", 0, "--max_steps", 2, "--out_dir",
                    tmp_path / "run", "--data_root", tmp_path)  # fmt: skip
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert load_network(tmp_path / "run" / "acgan_gen.pth").classes == classes

    labels_file = (tmp_path / folder / files[1]).with_suffix("")
    whole = labels_file.read_bytes()
    rows, width = (20, 32) if name == "qmnist" else (20, 1)
    labels_file.write_bytes(whole[:4] + struct.pack(">I", rows) + whole[8 : len(whole) - (30 - rows) * width])
    with pytest.raises(BadInput, match="is damaged: 30 images, but 20 labels"):
        load_dataset(name, tmp_path, 28)
    labels_file.unlink()
    packed = (tmp_path / folder / files[1]).read_bytes()
    (tmp_path / folder / files[1]).write_bytes(packed[:20] + bytes(10) + packed[30:])
    with pytest.raises(BadInput, match=f"a file of {name} in '.*' is damaged"):
        load_dataset(name, tmp_path, 28)
    labels_file.write_bytes(whole)

    damaged = (tmp_path / folder / files[0]).with_suffix("")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(BadInput, match=f"a file of {name} in '.*' is damaged: delete its files, and put {files[0]}"):
        load_dataset(name, tmp_path, 28)


def test_cifar10_from_its_archive_and_no_other(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "source" / "cifar-10-batches-py").mkdir(parents=True)
    sums = {}
    for name in ["data_batch_1", "test_batch", "batches.meta"]:
        batch = {"label_names": ["airplane", "automobile"]} if name == "batches.meta" else {
            "data": rng.integers(0, 256, (8, 3072), dtype=np.uint8), "labels": [0, 1] * 4}  # fmt: skip
        path = tmp_path / "source" / "cifar-10-batches-py" / name
        path.write_bytes(pickle.dumps(batch))
        sums[name] = hashlib.md5(path.read_bytes()).hexdigest()
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    images, labels, classes = load_dataset("cifar10", tmp_path, 32)
    assert images.shape == (8, 3, 32, 32) and labels.tolist() == [0, 1] * 4 and classes == ["airplane", "automobile"]

    # a batch with another checksum is never unpickled
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    archive.unlink()
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(BadInput, match="cifar10 is not in .*put cifar-10-python.tar.gz there, or connect this machine"):
        load_dataset("cifar10", tmp_path, 32)


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "qmnist"])
def test_no_files_and_no_network_says_what_to_put_where(name, tmp_path, monkeypatch):
    kind, folder, files = dataset.SETS[name]
    monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/"])
    if name == "qmnist":
        refused = {part: [("http://127.0.0.1:9/" + url.split("/")[-1], md5) for url, md5 in pairs]
                   for part, pairs in kind.resources.items()}  # fmt: skip
        monkeypatch.setattr(kind, "resources", refused)
    with pytest.raises(BadInput) as error:
        load_dataset(name, tmp_path, 28)
    assert f"{name} is not in '{tmp_path / folder}', and could not be downloaded: put {files[0]}" in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_every_image_size_trains_in_colour(start_on, shapes, tmp_path):
    for size in (28, 64, 128):
        flags = ["--img_size", size, "--batch_size", 4, "--seed", 0, "--max_steps", 1]
        status, _, err = start_on(shapes, *flags, "--out_dir", tmp_path / str(size))
        assert status == 0 and err == ""
        grid = Image.open(tmp_path / str(size) / "images" / "0.png")
        assert grid.size == (3 * (size + 2) + 2, 10 * (size + 2) + 2)


def test_scores_of_too_few_images_are_refused(shapes):
    few = load_dataset("folder", shapes, 32)
    few = few._replace(images=few.images[:71], labels=few.labels[:71])  # none of the third class
    with pytest.raises(BadInput, match="class number 2 has 0 real images"):
        balanced(few.images, few.labels, 10, 3, 0)
