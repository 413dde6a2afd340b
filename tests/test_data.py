"""The known data sets and the batches: the numbers of torchvision's transform and loader, and clear words on damage."""

import gzip
import hashlib
import pickle
import shutil
import struct
import tarfile
from ssl import SSLCertVerificationError
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import small
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from data import batches, builtin, load_dataset
from data.batches import Batches, normalize
from run.weights import load_network
from utils import BadInput


def tutorials_transform(img_size):
    return transforms.Compose(
        [transforms.Resize(img_size), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    )  # fmt: skip


@pytest.mark.faithful
@pytest.mark.parametrize("img_size", [16, 20, 28, 32, 48, 64])
def test_images_resized_at_once_equal_the_tutorials_transform(img_size):
    pixels = builtin.read_idx(builtin.BUNDLED / builtin.IDX[2], "")[:500]
    ours = normalize(builtin.resize(pixels[..., None], img_size))
    transform = tutorials_transform(img_size)
    assert torch.equal(ours, torch.stack([transform(Image.fromarray(image)) for image in pixels]))


def test_colour_images_are_resized_as_pil_does():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    wanted = [np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR)) for image in pixels]
    assert np.array_equal(builtin.resize(pixels, 20).numpy(), np.stack(wanted).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("train", "n"), [(True, 60_000), (False, 10_000)])
def test_mnist_is_bundled(train, n):
    images, labels, classes, in_memory, _ = load_dataset("mnist", None, 28, train=train)
    assert images.shape == (n, 1, 28, 28) and images.dtype == torch.uint8 and labels.shape == (n,) and in_memory
    digest = hashlib.md5(struct.pack(">4i", 2051, n, 28, 28) + images.numpy().tobytes()).hexdigest()
    assert digest == ("6bbc9ace898e44ae57da46a324031adb" if train else "2646ac647ad5339dbf082846283269ea")  # published
    assert classes == list("0123456789") and labels.bincount().min() > n / 12


@pytest.mark.faithful
def test_every_byte_value_is_normalised_as_the_tutorial_does():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(normalize(values), tutorials_transform(16)(transforms.ToPILImage()(values)))


@pytest.mark.faithful
def test_batches_and_random_stream_are_those_of_the_shuffled_loader():
    digits = small.first_digits(28)
    ours = Batches(digits, batch_size=64)
    theirs = DataLoader(list(zip(normalize(digits.images), digits.labels, strict=True)), batch_size=64, shuffle=True)
    assert len(ours) == len(theirs) == 16
    torch.manual_seed(3)
    our_batches = [ours.gather(indices) for _ in range(2) for indices in ours]
    our_next_number = torch.rand(1)
    torch.manual_seed(3)
    their_batches = [batch for _ in range(2) for batch in theirs]
    assert torch.equal(our_next_number, torch.rand(1))
    for (our_images, our_labels), (their_images, their_labels) in zip(our_batches, their_batches, strict=True):
        assert torch.equal(our_images, their_images) and torch.equal(our_labels, their_labels)


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A copy of the bundled folder to damage, instead of the real one."""
    monkeypatch.setattr(builtin, "BUNDLED", shutil.copytree(builtin.BUNDLED, tmp_path / "a folder"))
    return builtin.BUNDLED


def test_images_beyond_the_gpus_free_memory_stay_with_the_host(monkeypatch, capsys):
    """On the budget alone: no GPU is needed, as nothing is copied to it."""
    images = torch.empty(2**20, 1, 32, 32, dtype=torch.uint8)  # 1 GiB that is never touched
    for free, fit in [(5 * 2**30, True), (3 * 2**30, False)]:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 80 * 2**30))
        assert batches.fits(images, torch.device("cuda", 1)) is fit
    assert capsys.readouterr().err == (
        "Images: 1.0 GiB exceed the GPU's memory budget, 0.8 GiB; each batch is copied to it.\n"
    )


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "missing", "not IDX", "other shape"])
def test_damaged_bundled_file_is_named(bundled, damage):
    path = bundled / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    other_shape = gzip.compress(struct.pack(">2i", 2049, 99) + bytes(50))
    path.write_bytes({"truncated": content[:1000], "altered": content, "not IDX": gzip.compress(b"text"),
                      "other shape": other_shape}.get(damage, b""))  # fmt: skip
    if damage == "missing":
        path.unlink()
    with pytest.raises(BadInput, match=r"t10k-labels-idx1-ubyte\.gz is .*: restore it with 'git checkout data/mnist'"):
        load_dataset("mnist", None, 28, train=False)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        file.write(
            struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
        )


def put_files(name, root):
    """Write the files of a set of 30 images below `root`, and return pixels and labels."""
    _, folder, files = builtin.SETS[name]
    pixels, labels = np.random.default_rng(0).integers(0, 256, (30, 28, 28)), np.arange(30) % 10
    for images_file, labels_file in (files[:2], files[2:]):
        write_idx(root / folder / images_file, pixels)
        write_idx(root / folder / labels_file, labels)
    return pixels, labels


def test_run_learns_from_the_files_put_there(tmp_path, train):
    put_files("fashion_mnist", tmp_path)
    flags = ["--dataset", "fashion_mnist", "--data_root", tmp_path, "--img_size", 16, "--latent_dim", 4, "--seed", 0]
    result = train(*flags, "--batch_size", 15, "--max_steps", 1, "--out_dir", tmp_path / "run")
    assert result.status == 0 and "Data: fashion_mnist, 30 grey images of 10 classes." in result.err
    assert load_network(tmp_path / "run" / "acgan_gen.pth").classes == datasets.FashionMNIST.classes


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_idx_sets_are_read_from_the_files_put_there(name, tmp_path):
    kind, folder, files = builtin.SETS[name]
    pixels, labels = put_files(name, tmp_path)
    for part in (True, False):
        images, found, classes, *_ = load_dataset(name, tmp_path, 28, train=part)
        assert torch.equal(images[:, 0], torch.from_numpy(pixels).to(torch.uint8)) and found.tolist() == labels.tolist()
        assert classes == kind.classes

    packed = (tmp_path / folder / files[1]).read_bytes()
    write_idx(tmp_path / folder / files[1], labels[:20])
    with pytest.raises(BadInput, match=f"a file of {name} is corrupt: 30 images do not match 20 labels"):
        load_dataset(name, tmp_path, 28)
    (tmp_path / folder / files[1]).write_bytes(packed[:20] + bytes(10) + packed[30:])
    with pytest.raises(BadInput, match=f"{files[1]} is corrupt or cannot be read .*: delete it"):
        load_dataset(name, tmp_path, 28)
    (tmp_path / folder / files[1]).with_suffix("").write_bytes(gzip.decompress(packed))  # unpacked, as torchvision does
    (tmp_path / folder / files[1]).unlink()
    assert load_dataset(name, tmp_path, 28).labels.tolist() == labels.tolist()


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
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    images, labels, classes, *_ = load_dataset("cifar10", tmp_path, 32)
    assert images.shape == (8, 3, 32, 32) and labels.tolist() == [0, 1] * 4 and classes == ["airplane", "automobile"]

    # a batch with another checksum is never unpickled
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    archive.unlink()
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    wanted = r"cifar10 is missing or corrupt, and no download works \(.+\): mend that, or put cifar-10-python"
    with pytest.raises(BadInput, match=wanted):
        load_dataset("cifar10", tmp_path, 32)


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_no_files_and_no_network_says_what_to_put_where(name, tmp_path, monkeypatch):
    kind, folder, files = builtin.SETS[name]
    monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(BadInput) as error:
        load_dataset(name, tmp_path, 28)
    assert f"{name} is missing or corrupt, and no download works ([Errno 111] Connection refused): mend that, or " in (
        str(error.value)
    )
    assert f"into '{tmp_path / folder}'" in str(error.value) and files[0] in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


URL = "https://example.com/file.gz"
CERTIFICATE = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate"
DOWNLOAD_ERRORS = [
    (URLError(SSLCertVerificationError(1, CERTIFICATE)), CERTIFICATE),
    (URLError(OSError("Tunnel connection failed: 407 Proxy Authentication Required")), "407 Proxy Authentication Requ"),
    (HTTPError(URL, 503, "Service Unavailable", {}, None), "HTTP Error 503: Service Unavailable"),
    (
        HTTPError(URL, 302, "A redirect without end\nand more about it", {}, None),
        "HTTP Error 302: A redirect without end",
    ),
    (TimeoutError("The read operation timed out"), "The read operation timed out"),
    (ConnectionResetError(), "ConnectionResetError"),
    (OSError(28, "No space left on device"), "No space left on device"),
]


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
@pytest.mark.parametrize(("error", "words"), DOWNLOAD_ERRORS, ids=[words[:20] for _, words in DOWNLOAD_ERRORS])
def test_download_that_fails_says_why(name, error, words, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets.utils, "_get_redirect_url", fail)
    with pytest.raises(BadInput, match=r"and no download works \((.+)\): mend that, or put .* into ") as raised:
        load_dataset(name, tmp_path, 28)
    assert words in str(raised.value) and "urlopen" not in str(raised.value) and "\n" not in str(raised.value)
    assert capsys.readouterr().out == ""


def test_download_that_fails_says_why_also_if_torchvision_only_prints_it(tmp_path, monkeypatch, capsys):
    def download(self):
        print("Downloading a file\nFailed to download (trying next):\nHTTP Error 403: Forbidden\n")
        raise RuntimeError("Error downloading a file")

    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    with pytest.raises(BadInput, match=r"and no download works \(HTTP Error 403: Forbidden\): mend that, or put "):
        load_dataset("fashion_mnist", tmp_path, 28)
    assert capsys.readouterr().out == ""


def test_download_into_a_folder_that_refuses_it_says_so(tmp_path, monkeypatch):
    def makedirs(*args, **kwargs):
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr("os.makedirs", makedirs)
    wanted = rf"argument --data_root: cannot read or write '{tmp_path}' \(Read-only file system\): name another folder"
    with pytest.raises(BadInput, match=wanted):
        load_dataset("kmnist", tmp_path, 28)
