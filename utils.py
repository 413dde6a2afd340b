"""What every command needs: errors, messages, flags, seeds, the device, atomic writes, signals and the exit status."""

import argparse
import contextlib
import io
import math
import os
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

MEMORY_SHARE = 0.25  # of the memory, or of a GPU's free memory, that the images of a data set may take
PART_FILE = ".acgan-{pid}.part"  # the name of a file that is still being written
OLD_TORCH_SAVE = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how its files began before PyTorch 1.6


class BadInput(Exception):
    """Something that only the user can correct: one line says what is wrong and what to do."""


class Diverged(Exception):
    """The losses or the networks are no longer finite; the line names the batch."""


class Stopped(KeyboardInterrupt):
    """A signal ends the command at once; `exit_status` is 128 + its number, as a shell expects."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_status = 128 + number


def rank() -> int:
    """Return the rank of this process among those of torchrun; 0 without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def local_ranks() -> int:
    """Return the number of torchrun's ranks on this machine; 1 without torchrun."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def on_terminal() -> bool:
    """Return True if both outputs are terminals. A piped run shows no bars."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def counted(n: int, noun: str) -> str:
    """Return a number of things in words, such as "1 image" or "60,000 images"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def announce(line: str) -> None:
    """Write one line for the user to stderr; of several ranks, only rank 0 does."""
    if not rank():
        tqdm.write(line, file=sys.stderr) if on_terminal() else print_line(line, sys.stderr)  # above the bar


def print_line(line: str, stream=None, must_succeed: bool = False) -> None:
    """Print to stdout or `stream`, and flush. A closed pipe is no error, nor is a full disk unless `must_succeed`."""
    stream = sys.stdout if stream is None else stream
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except OSError:  # the line is lost, not the run
        if must_succeed:
            raise


def out_of_memory(error: BaseException) -> bool:
    """Return True if NumPy or PyTorch raised `error` because memory does not suffice."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, or else its kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def seed_everything(seed: int) -> None:
    """Seed PyTorch (all devices) and NumPy, the two streams that the tutorial draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed)


def choose_device(name: str) -> tuple[torch.device, str]:
    """Turn `--device` into a device and a line that says which and why. Raises BadInput if it is not there."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name != "auto":
        if name not in found:
            raise BadInput(f"argument --device: {name} is not available here; PyTorch finds: {', '.join(found)}")
        return torch.device(name), f"Device: {name}."
    why = {"cuda": "a GPU", "mps": "this Mac's GPU", "cpu": f"no GPU (threads: {torch.get_num_threads()})"}
    return torch.device(found[0]), f"Device: {found[0]}, as PyTorch finds {why[found[0]]}."


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path


def check_writable(flag: str, folder: Path) -> None:
    """Raise BadInput unless files can be written to `folder`, or it can be made. Leave no trace."""
    try:
        str(folder).encode()  # raises for what is not text
        tempfile.TemporaryFile(dir=nearest_folder(folder)).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise BadInput(f"argument {flag}: cannot write to {str(folder)!r} ({why}): name another") from error


def load_data(path: Path):
    """Read what torch.save wrote, as data: nothing in the file is run, and its checksums, if any, must be right.

    Raises OSError if the file cannot be read, and ValueError if it is corrupt, or holds more than data.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise ValueError("a pipe or a device, which may never end")
        with open(path, "rb") as file:
            has_checksums = file.read(len(OLD_TORCH_SAVE)) != OLD_TORCH_SAVE
            if has_checksums and zipfile.ZipFile(file).testzip() is not None:  # torch.load skips them
                raise ValueError("a checksum is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is no such file, which then raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the zip reader and the unpickler raise many kinds of error
        raise ValueError(f"{path} is corrupt, or does not hold plain data") from error


def atomic_write(path: Path, write) -> None:
    """Write a whole file or none: to a temporary file beside it, flushed to the disk, then renamed.

    `write(buffer)` fills a binary buffer. A missing folder is made, a link is followed. An OSError changes nothing.
    """
    buffer = io.BytesIO()  # with a buffer, a full disk is an OSError and not an error of the zip writer
    write(buffer)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(PART_FILE.format(pid=os.getpid()))  # two processes never share one
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def catch_signals(handler=None) -> dict:
    """Let `handler`, or else one that raises Stopped, handle Ctrl-C, TERM and a closed terminal; return the old."""

    def stop(number, frame):
        raise Stopped(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler or stop) for number in numbers}


class StopRequest:
    """Inside the block, a first stop signal sets `requested`; a second one raises Stopped.

    `exit_status` is 128 + the number of the first signal.
    """

    SAME_SIGNAL = 1.0  # seconds; torchrun passes a terminal's Ctrl-C on, so that it arrives twice

    def __init__(self) -> None:
        self.requested, self.exit_status = False, 0

    def __enter__(self):
        self._previous = catch_signals(self._on_signal)
        return self

    def _on_signal(self, number, frame):
        if not self.requested:
            self.requested, self.exit_status, self._since = True, 128 + number, time.monotonic()
        elif time.monotonic() - self._since > self.SAME_SIGNAL:
            raise Stopped(number)

    def __exit__(self, *exc_info):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class HelpFormatter(argparse.HelpFormatter):
    """Ends each flag's help with its default, unless the help already states one."""

    def _get_help_string(self, action):
        if "(default: " in action.help or not action.option_strings or action.default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors; exit status 2."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        hint = " (--help lists the flags)" if message.startswith("unrecognized arguments: ") else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")


def number(kind: type, wanted: str, accept):
    """Return an argparse type: a finite `kind` that `accept` takes, or else an error that says what is `wanted`."""

    def parse(text: str):
        try:
            value = kind(text)
            if math.isfinite(value) and accept(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


COUNT = number(int, "a whole number from 1 to 2147483647", lambda value: 1 <= value < 2**31)
SEED = number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
IMG_SIZE = number(int, "a multiple of 4 from 16 to 65532, such as 28 or 32", lambda n: 16 <= n < 2**16 and n % 4 == 0)


def add_device_flag(group) -> None:
    """Add --device."""
    devices = ["auto", "cpu", "cuda", "mps"]
    group.add_argument("--device", choices=devices, default="auto", help="where to compute; auto prefers a GPU")


def report_error(prog: str, line: str) -> None:
    """Write one line to stderr; a rank other than 0 names itself, as each can fail for a reason of its own."""
    print_line(f"{prog}: error: {f'rank {rank()}: ' if rank() else ''}{line}", sys.stderr)


def run_command(prog: str, command, too_large: str = "ask for fewer images", stopped: str = "nothing was written"):
    """Call `command()` and return the script's exit status.

    That is the command's own, or 0. It is 2 after bad input, a failed write or too little memory: then `too_large` says
    what to do. It is 128 + N after signal N: then `stopped` says what is left.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names that this terminal cannot show
    catch_signals()
    try:
        return command() or 0
    except BadInput as error:
        report_error(prog, str(error))
    except Stopped as signalled:
        announce(f"Stopped: {stopped}.")
        return signalled.exit_status
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        report_error(prog, f"not enough memory: {too_large}")
    except OSError as error:
        where = error.filename or "the output"
        report_error(prog, f"cannot write {str(where)!r} ({error.strerror or error}): free space or name another place")
    return 2


def check_output(flag: str, path: Path, suffix: str) -> None:
    """Raise BadInput unless a file can be written to `path`, whose name must end in `suffix`. Leave no trace."""
    if path.is_dir() or not path.name:
        raise BadInput(f"argument {flag}: {str(path)!r} is a folder: name a file")
    if path.exists() and not path.is_file():
        raise BadInput(f"argument {flag}: {str(path)!r} is a device or a pipe: name a file")
    if path.suffix.lower() != suffix:
        raise BadInput(f"argument {flag}: {str(path)!r} does not end in {suffix}: name a file that does")
    check_writable(flag, path.parent)
