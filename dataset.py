"""The training images: MNIST unpacked without a network, resized once, and batches served from memory."""

import contextlib
import io
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import PIL
import torch
from torchvision import datasets, transforms
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from utils import BadInput, on_terminal, whole_file

BUNDLED = Path(__file__).resolve().parent / "data" / "mnist"
KEPT_BYTES = 200 * 2**20  # resized images above this are made anew at each start: 60,000 up to 56 pixels are kept


class FileWithLength(urllib.request.FileHandler):
    """Opens file:// with the `length` that torchvision asks of every response, and that urllib gives only to http."""

    def file_open(self, request):
        response = super().file_open(request)
        response.length = int(response.headers["Content-Length"])
        return response


class MNIST(datasets.MNIST):
    """torchvision's MNIST, taken from the files bundled with this project when they are there.

    torchvision's own download code fetches and verifies the files, over `file://`; its mirrors serve only a
    copy of the project without the bundled files. The unpacked files are verified as well, at every start.

    Raises:
        BadInput: a file is damaged, or cannot be fetched or written; the line names it and says what to do.
    """

    mirrors = [BUNDLED.as_uri() + "/", *datasets.MNIST.mirrors]
    # The bundled files hold the original bytes but were compressed anew, so these are their own MD5 sums.
    resources = [
        ("train-images-idx3-ubyte.gz", "c7dfcf1bfd3481a40f7b3aedbdbd083c"),
        ("train-labels-idx1-ubyte.gz", "d289298a347a2cc65765a3c81043ba88"),
        ("t10k-images-idx3-ubyte.gz", "ecff87aa27c74fbc2c1f97e89c19221d"),
        ("t10k-labels-idx1-ubyte.gz", "a38049bc042dc6e683842a84160daae1"),
    ]
    unpacked = [
        ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
        ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
        ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
        ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
    ]

    def __init__(self, root: str | Path, train: bool = True):
        super().__init__(root, train=train, download=True)

    def download(self) -> None:
        if not self._check_exists():
            self._fetch()
        for name, md5 in self.unpacked:
            path = os.path.join(self.raw_folder, name)
            if not check_integrity(path, md5):
                raise BadInput(f"{path} is damaged (its checksum is wrong): delete it, and run again to unpack it anew")

    def _fetch(self) -> None:
        """Fetch and unpack into a temporary folder, then move: an interrupted start leaves no half file."""
        final = Path(self.raw_folder)
        bundled = all((BUNDLED / name).exists() for name, _ in self.resources)
        if bundled:
            self.mirrors = self.mirrors[:1]  # all is here: ask no network, even if a file turns out damaged
        else:
            self.mirrors, self.resources = datasets.MNIST.mirrors, datasets.MNIST.resources
        # torchvision shows a bar a file: worth seeing for a download, noise for a copy
        quiet = bundled or not on_terminal()
        try:
            final.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=final) as staging:
                self._staging = staging
                urllib.request.install_opener(urllib.request.build_opener(FileWithLength))
                with contextlib.redirect_stderr(io.StringIO() if quiet else sys.stderr):
                    super().download()
                del self._staging
                for name, _ in self.unpacked:
                    os.replace(Path(staging) / name, final / name)
        except (RuntimeError, EOFError) as error:
            if bundled:
                broken = [name for name, md5 in self.resources if not check_integrity(BUNDLED / name, md5)]
                raise BadInput(
                    f"{BUNDLED / (broken or ['*.gz'])[0]} is damaged (its checksum is wrong) or cannot be read: "
                    "restore it, for instance with 'git checkout data/mnist'"
                ) from error
            raise BadInput(
                f"MNIST is neither in {BUNDLED} nor in {final}, and could not be downloaded: "
                f"put the four .gz files of MNIST into {BUNDLED}, or connect this machine"
            ) from error
        except OSError as error:
            raise BadInput(
                f"argument --data_root: cannot unpack MNIST into {str(self.root)!r} ({error.strerror or error}); "
                "name a folder with 150 MB of space that you may write to"
            ) from error
        finally:
            urllib.request.install_opener(None)  # back to urllib's own

    @property
    def raw_folder(self) -> str:
        return getattr(self, "_staging", None) or super().raw_folder


def load_mnist(data_root: str | Path, img_size: int, train: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Read MNIST, each image resized with PIL, as the tutorial's transform does.

    The resized images are kept beside the unpacked ones, where the next start finds them; a kept file that is
    damaged, or of another Pillow, is made anew.

    Args:
        data_root: where the unpacked files are, or will be.
        img_size: image side, pixels.
        train: the 60,000 training digits, or else the 10,000 test digits.

    Returns:
        images, uint8 (N, 1, img_size, img_size), and labels, int64 (N,).

    Raises:
        BadInput: as MNIST does.
    """
    mnist = MNIST(data_root, train=train)
    split = "train" if train else "test"
    kept = Path(mnist.raw_folder).parent / "resized" / f"{split}-{img_size}-pillow{PIL.__version__}.npz"
    with contextlib.suppress(Exception):  # damage shows in a dozen ways
        images = torch.from_numpy(np.load(kept)["images"])  # npz: a zip file, whose checksums are verified
        if images.shape == (len(mnist), 1, img_size, img_size):
            return images, mnist.targets

    resize, to_uint8 = transforms.Resize(img_size), transforms.PILToTensor()
    images = torch.empty(len(mnist), 1, img_size, img_size, dtype=torch.uint8)
    for i, (image, _) in enumerate(tqdm(mnist, desc="Resizing", unit="img", delay=1, disable=not on_terminal())):
        images[i] = to_uint8(resize(image))
    if images.nbytes <= KEPT_BYTES:
        with contextlib.suppress(OSError), whole_file(kept) as file:
            np.savez(file, images=images.numpy())
    return images, mnist.targets


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1]: bit for bit ToTensor and then Normalize(0.5, 0.5)."""
    return images.to(torch.float32).div(255).sub(0.5).div(0.5)


class ShuffledBatches:
    """Shuffled batches out of memory, drawn as the tutorial's `DataLoader(shuffle=True)` draws them.

    An epoch takes the same numbers from torch's CPU stream as that loader: one base seed (for its workers, so
    unused here), then the sampler's seed, from which one permutation follows. The last, smaller batch is kept.

    Args:
        images: uint8 (N, C, H, W). They and the labels are copied to `device` once.
        labels: int64 (N,).
        batch_size: images a batch.
        device: where the batches are wanted.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, device: torch.device | str = "cpu"):
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.sampler_seed = 0
        self.position = 0  # batches of the current epoch that were handed out; 0 between epochs

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self):
        """One epoch, or the rest of a restored one: yield the indices of each batch, int64 (B,), on the device."""
        if self.position == 0:
            torch.empty((), dtype=torch.int64).random_()  # the loader's base seed
            self.sampler_seed = int(torch.empty((), dtype=torch.int64).random_())
        generator = torch.Generator().manual_seed(self.sampler_seed)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for indices in order.split(self.batch_size)[self.position :]:
            self.position += 1
            yield indices
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        """The epoch's permutation, by its seed, and the position in it."""
        return {"sampler_seed": self.sampler_seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where state_dict() was taken; the end of an epoch is the start of the next."""
        self.sampler_seed, self.position = state["sampler_seed"], state["position"] % len(self)

    def gather(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of these indices: float32 (B, C, H, W) in [-1, 1], and labels, int64 (B,)."""
        return normalize(self.images[indices]), self.labels[indices]
