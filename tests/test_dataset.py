"""The digits: the same numbers as torchvision's per-image transform and loader, and clear words on damage."""

import shutil

import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import transforms

import dataset
import mnist
from batches import ShuffledBatches, normalize
from dataset import load_dataset
from mnist import MNIST
from utils import BadInput


def tutorials_transform(img_size):
    return transforms.Compose(
        [transforms.Resize(img_size), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    )  # fmt: skip


@pytest.mark.parametrize("img_size", [28, 32, 48])
def test_cached_images_equal_the_per_image_transform(data_root, img_size):
    images, labels, classes = load_dataset("mnist", data_root, img_size)
    assert classes == list("0123456789")
    source = MNIST(data_root)
    source.transform = tutorials_transform(img_size)
    assert images.shape == (60000, 1, img_size, img_size) and images.dtype == torch.uint8
    for first in range(0, 60000, 5000):  # in steps, as float32 takes four times the memory
        expected = torch.stack([source[i][0] for i in range(first, first + 5000)])
        assert torch.equal(normalize(images[first : first + 5000]), expected)
    assert torch.equal(labels, source.targets)


def test_kept_images_are_used_and_made_anew_when_damaged(data_root, monkeypatch):
    images, *_ = load_dataset("mnist", data_root, 32, train=False)
    (kept,) = (data_root / "MNIST" / "resized").glob("test-32-*.npz")
    with monkeypatch.context() as without_pil:
        without_pil.setattr(dataset.transforms, "Resize", None)  # nothing is resized a second time
        assert torch.equal(load_dataset("mnist", data_root, 32, train=False)[0], images)
    content = bytearray(kept.read_bytes())
    content[5_000_000] ^= 1
    for damaged in (bytes(content), content[:1000], b""):
        kept.write_bytes(damaged)
        assert torch.equal(load_dataset("mnist", data_root, 32, train=False)[0], images)


def test_every_byte_value_is_normalised_as_the_tutorial_does():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    expected = tutorials_transform(16)(transforms.ToPILImage()(values))
    assert torch.equal(normalize(values), expected)


def test_batches_and_random_stream_are_those_of_the_shuffled_loader(data_root):
    source = MNIST(data_root)
    images, labels = source.data[:1000, None], source.targets[:1000]
    ours = ShuffledBatches(images, labels, batch_size=64)
    theirs = DataLoader(list(zip(normalize(images), labels, strict=True)), batch_size=64, shuffle=True)
    assert len(ours) == len(theirs) == 16

    torch.manual_seed(3)
    our_batches = [ours.gather(indices) for _ in range(2) for indices in ours]
    our_next_number = torch.rand(1)
    torch.manual_seed(3)
    their_batches = [batch for _ in range(2) for batch in theirs]
    their_next_number = torch.rand(1)
    for (our_images, our_labels), (their_images, their_labels) in zip(our_batches, their_batches, strict=True):
        assert torch.equal(our_images, their_images) and torch.equal(our_labels, their_labels)
    assert torch.equal(our_next_number, their_next_number)


def test_unpacked_files_are_read_again_and_nothing_is_fetched(data_root, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [])
    assert len(MNIST(data_root)) == 60000
    assert len(MNIST(data_root, train=False)) == 10000


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A copy of the bundled folder, free to be damaged, in place of the real one."""
    copy = tmp_path / "a folder" / "mnist"
    shutil.copytree(mnist.BUNDLED, copy)
    monkeypatch.setattr(mnist, "BUNDLED", copy)
    # beyond the copy, only an address that refuses at once: a test that asks the network fails
    monkeypatch.setattr(MNIST, "mirrors", [copy.as_uri() + "/", "http://127.0.0.1:9/"])
    monkeypatch.setattr(mnist.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    return copy


def test_bundled_files_unpack_from_a_path_with_a_space(bundled, tmp_path):
    assert len(MNIST(tmp_path / "root")) == 60000
    raw = tmp_path / "root" / "MNIST" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(name for name, _ in MNIST.unpacked)


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_bundled_file_is_named(bundled, tmp_path, damage):
    path = bundled / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes({"truncated": content[:100_000], "altered": content, "empty": b""}[damage])
    with pytest.raises(BadInput, match=r"train-images-idx3-ubyte\.gz is damaged"):
        MNIST(tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*ubyte*"))  # no half file is left to be trusted next time


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_unpacked_file_is_named_and_kept(bundled, tmp_path, damage):
    MNIST(tmp_path / "root")
    path = tmp_path / "root" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    content = bytes(content if damage == "altered" else content[:20_000])
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"train-labels-idx1-ubyte is damaged"):
        MNIST(tmp_path / "root")
    assert path.read_bytes() == content


def test_no_bundled_files_and_no_network_says_what_to_put_where(bundled, tmp_path):
    (bundled / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(BadInput, match="put the four .gz files of MNIST into .*mnist"):
        MNIST(tmp_path / "root")


def test_data_root_that_cannot_be_made_is_named(bundled, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="--data_root"):
        MNIST(tmp_path / "file" / "root")
