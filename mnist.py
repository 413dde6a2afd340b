"""MNIST without a network: unpacked from the files bundled with this project, and verified at every start."""

import contextlib
import io
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from utils import BadInput, on_terminal

BUNDLED = Path(__file__).resolve().parent / "data" / "mnist"


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
