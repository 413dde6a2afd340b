"""What every command needs: errors, messages, flags, seeds, the device, atomic writes, signals and the exit status."""

import argparse
import contextlib
import errno
import io
import math
import os
import signal
import sys
import tempfile
import threading
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
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # some network file systems'
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Return True if both outputs are terminals. A piped run shows no bars, nor does one in a notebook.

    Nor does one in a terminal of no width, as `script` makes in a pipe, where a bar would be empty.
    """
    if not all(getattr(stream, "isatty", bool)() for stream in (sys.stdout, sys.stderr)):
        return False
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return True


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
    """Return True if NumPy, PyTorch or the system raised `error` because memory does not suffice."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "out of memory")
    without = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return without or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, or else its kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def seed_everything(seed: int) -> None:
    """Seed PyTorch (all devices) and NumPy, the two streams that the tutorial draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed)


def choose_device(name: str) -> tuple[torch.device, str]:
    """Turn `--device` into a device and a line that says which and why; auto is CUDA if it is there, else the CPU.

    Raises BadInput if it is not there, or a GPU that cannot compute.
    """
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *found):
        raise BadInput(f"argument --device: {name} is not available here; PyTorch finds: {', '.join(found)}")
    device = torch.device(name if name != "auto" else "cuda" if "cuda" in found else "cpu")
    if device.type == "cuda" and local_ranks() == 1:  # of several ranks each checks its own GPU, in run/ranks.py
        check_gpu(device)
    if name != "auto":
        return device, f"Device: {name}."
    if device.type == "cuda":
        return device, "Device: cuda, as PyTorch finds a GPU."
    threads = f"threads: {torch.get_num_threads()}"
    if "mps" in found:
        return device, f"Device: cpu ({threads}). This Mac's GPU is there to try with --device mps: nobody has yet."
    return device, f"Device: cpu, as PyTorch finds no GPU ({threads})."


def check_gpu(device: torch.device) -> None:
    """Raise BadInput unless a GPU can convolve: PyTorch finds also cards that are too old or too new for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # several lines about the same
            ones = torch.ones(1, 1, 3, 3, device=device)
            torch.nn.functional.conv2d(ones, ones).item()
    except Exception as error:  # PyTorch raises many kinds of error
        if out_of_memory(error):
            raise
        card = "the GPU"
        with contextlib.suppress(Exception):
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            card = f"{torch.cuda.get_device_name(device)} (compute capability {capability})"
        raise BadInput(
            f"argument --device: {card} cannot compute here ({first_line(error)}), and this PyTorch is built for "
            f"{' '.join(torch.cuda.get_arch_list())}: add --device cpu, or install a PyTorch that is built for the card"
        ) from error


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
    except Exception as error:  # the zip reader and the unpickler raise many kinds of error
        if out_of_memory(error):
            raise MemoryError(str(error)) from error  # which nobody takes for a corrupt file
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # broken data, or a seek to nowhere
            raise
        raise ValueError(f"{path} is corrupt, or does not hold plain data") from error


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, where its file system can. Raises OSError if the disk fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def atomic_write(path: Path, write, flush: bool = True) -> None:
    """Write a whole file or none: to a temporary file beside it, then renamed.

    `write(buffer)` fills a binary buffer. A missing folder is made, a link is followed. An OSError changes nothing.
    With `flush` the file also survives a power cut.
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
            if flush:
                sync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk names none, the rest the part
        raise


def catch_signals(handler) -> dict:
    """Let `handler` handle Ctrl-C, TERM and a closed terminal, and return those before, for put_back().

    Outside Python's first thread, to which signals go, nothing changes; nor for a signal that is handled by C code.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) is not None}


def put_back(handlers: dict) -> None:
    """Undo catch_signals."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
        put_back(self._previous)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Ends each flag's help with its default, unless the help already states one; the description stays as it is."""

    def _get_help_string(self, action):
        if "(default: " in action.help or not action.option_strings or action.default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors; exit status 2. Its help begins with `description`, a command's docstring.

    `usage` is the command line in short, without the command.
    """

    def __init__(self, prog: str, description: str | None, usage: str = "[--FLAG VALUE ...]"):
        super().__init__(prog=prog, usage=f"{prog} {usage}", description=description, formatter_class=HelpFormatter,
                         allow_abbrev=False)  # fmt: skip

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
    where = "where to compute; auto is cuda if it is there, else cpu"
    group.add_argument("--device", choices=devices, default="auto", help=where)


def report_error(prog: str, line: str) -> None:
    """Write one line to stderr; a rank other than 0 names itself, as each can fail for a reason of its own."""
    print_line(f"{prog}: error: {f'rank {rank()}: ' if rank() else ''}{line}", sys.stderr)


def refused(error: Exception, too_large: str) -> str | None:
    """Return what the system refused, and what to do (`too_large` for want of memory); None if that is not known."""
    if out_of_memory(error):
        return f"not enough memory: {too_large}"
    if first_line(error).endswith((os.strerror(errno.EAGAIN), "can't start new thread")):
        return f"too many processes or threads ({first_line(error)}): end some, or raise the limit (ulimit -u)"
    if not isinstance(error, OSError):
        return None
    names = " or ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
    why = error.strerror or error
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many open files: raise the limit (ulimit -n){f'; the next was {names}' if names else ''}"
    if error.errno in NO_SPACE:
        return f"cannot write {names or 'the output'} ({why}): free space or name another place"
    return f"cannot read or write {names or 'a file'} ({why}): mend that, or name another place"


@contextlib.contextmanager
def usable_outputs():
    """Inside the block stdout and stderr are there, and show also names that a terminal cannot; then as before."""

    def put_back_errors(stream, errors):
        with contextlib.suppress(OSError, ValueError):  # it flushes, as to a full disk
            stream.reconfigure(errors=errors)

    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):  # by the shell, or by a program
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
                stack.callback(setattr, sys, name, stream)
            elif hasattr(stream, "reconfigure"):  # a notebook's has not
                stack.callback(put_back_errors, stream, stream.errors)
                stream.reconfigure(errors="backslashreplace")
        yield


def run_command(prog: str, command, too_large: str = "ask for fewer images", stopped: str = "nothing was written"):
    """Call `command()` and return the script's exit status. Outputs and signals are as before then.

    That is the command's own, or 0. It is 2 after bad input, a failed read or write or too little memory: then
    `too_large` says what to do. It is 128 + N after signal N: then `stopped` says what is left.
    """
    over, previous = False, {}

    def stop(number, frame):
        if not over:
            raise Stopped(number)

    with usable_outputs():
        try:
            previous = catch_signals(stop)
            return command() or 0
        except BadInput as error:
            report_error(prog, str(error))
        except Stopped as signalled:
            announce(f"Stopped: {stopped}.")
            return signalled.exit_status
        except (MemoryError, RuntimeError, OSError) as error:
            line = refused(error, too_large)
            if line is None:
                raise
            report_error(prog, line)
        finally:
            over = True  # a signal while the handlers are put back comes too late
            put_back(previous)
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
