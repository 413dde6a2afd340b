"""What surrounds a run: clear errors, seeds, the choice of device, whole files, and stopping on a signal."""

import contextlib
import os
import random
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class BadInput(Exception):
    """Something only the person at the keyboard can mend; its one line says what is wrong and what to do."""


class Diverged(Exception):
    """A number that training stands on is no longer finite; its line names the batch."""


def on_terminal() -> bool:
    """True if a person watches: both outputs are terminals. Piped runs stay quiet."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def process_number() -> int:
    """This process's number among those that torchrun started; 0 if it is alone."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def announce(line: str) -> None:
    """Tell the person one thing, on stderr, so that stdout keeps to its one line an epoch.

    Of several processes that torchrun started, only the first one speaks.
    """
    if process_number():
        return
    if on_terminal():
        tqdm.write(line, file=sys.stderr)  # above the bar, not into it
    else:
        print_line(line, sys.stderr)


def print_line(line: str, stream=None) -> None:
    """Print to stdout, or to `stream`, at once. A reader that has gone away, or a full disk, ends no training."""
    stream = sys.stdout if stream is None else stream
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except OSError:
        pass  # a full disk behind it: the line is lost, not the run


def out_of_memory(error: BaseException) -> bool:
    """True if `error` is one of the ways in which NumPy and PyTorch say that memory does not suffice."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def draw_seed() -> int:
    """A fresh seed in [0, 2**32), the range that NumPy accepts."""
    return random.SystemRandom().randrange(2**32)


def seed_everything(seed: int) -> None:
    """Seed PyTorch (all devices) and NumPy, the two streams that the tutorial draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed)


def choose_device(name: str) -> tuple[torch.device, str]:
    """Turn `--device` into a device and, for "auto", one line that says what was chosen and why.

    Args:
        name: "auto", "cpu", "cuda" or "mps".

    Raises:
        BadInput: the named device is not on this machine.
    """
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if name == "auto":
        if cuda:
            return torch.device("cuda"), f"Device: cuda ({torch.cuda.get_device_name()}), as PyTorch finds a GPU."
        if mps:
            return torch.device("mps"), "Device: mps (this Mac's GPU), as PyTorch finds no CUDA GPU."
        threads = torch.get_num_threads()
        return torch.device("cpu"), f"Device: cpu ({threads} threads), as PyTorch finds no GPU."
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        found = ", ".join(["cpu"] + ["cuda"] * cuda + ["mps"] * mps)
        raise BadInput(f"argument --device: {name} is not available here; PyTorch finds: {found}")
    return torch.device(name), ""


def check_writable(flag: str, folder: Path) -> None:
    """Raise BadInput unless `folder` exists or can be made, and files can be written there. Leaves no trace."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise BadInput(
            f"argument {flag}: cannot write to {str(folder)!r} ({error.strerror}); name a folder that you may write to"
        ) from error


def load_data(path: Path):
    """Read what torch.save wrote, as data: nothing in the file is run, and its checksums must be right.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds more than data.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes zip files, but torch.load skips their checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the zip reader and the unpickler meet garbage with a dozen kinds
        raise ValueError(f"{path} is damaged, or does not hold plain data") from error


@contextlib.contextmanager
def whole_file(path: Path):
    """Open a binary file that appears under `path` only when the block ends well: never half a file.

    Written beside its place, flushed to the disk, then renamed. A missing folder is made; a link is followed.

    Raises:
        OSError: the folder cannot be written, or the disk is full; `path` keeps what it held.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.part")  # two processes that write the same file do not meet
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


class Stopped(KeyboardInterrupt):
    """A signal that ends the run where it stands; carries the exit status that a shell expects, 128 + its number."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_status = 128 + number


def raise_stopped(number, frame):
    """A signal handler."""
    raise Stopped(number)


def stop_signals() -> list[int]:
    """Ctrl-C, TERM and a closed terminal; of the last only if nobody asked to ignore it, as nohup does."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


class StopRequest:
    """Inside the block, a stop signal lets the running batch finish: `requested` turns true.

    A second signal, or a batch that takes longer than `PATIENCE` seconds, ends the block with Stopped; after
    take_your_time() only the second signal does.
    `exit_status` is then what a shell expects: 128 + the first signal's number.
    """

    PATIENCE = 2.0  # seconds

    def __init__(self) -> None:
        self.requested = False
        self.number = 0

    @property
    def exit_status(self) -> int:
        return 128 + self.number

    def __enter__(self):
        signals = stop_signals() + ([signal.SIGALRM] if hasattr(signal, "SIGALRM") else [])
        self._previous = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def _on_signal(self, number, frame):
        if self.requested:
            raise Stopped(self.number)
        self.requested = True
        self.number = number
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)

    def take_your_time(self) -> None:
        """The running batch has ended: what comes after it may take longer."""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    def __exit__(self, *exc_info):
        self.take_your_time()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
