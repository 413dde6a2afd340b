"""What the commands share: flags with one-line errors, and every failure as one line and an exit status."""

import argparse
import difflib
import math
import os
import signal
import sys
from pathlib import Path

from utils import (
    BadInput,
    Stopped,
    announce,
    check_writable,
    out_of_memory,
    print_line,
    process_number,
    raise_stopped,
    stop_signals,
)

HERE = Path(__file__).resolve().parent


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with a guess at a mistyped flag; exit status 2."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flags = [flag for action in self._actions for flag in action.option_strings]
            typed = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            near = difflib.get_close_matches(typed, flags, n=1)
            message += f" (did you mean {near[0]}?)" if near else " (--help lists the flags)"
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, wanted: str, accept):
    """An argparse type: a finite `kind` that `accept` takes, or else an error that says what is `wanted`."""

    def parse(text: str):
        try:
            value = kind(text)
            if math.isfinite(value) and accept(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def flag(group, name: str, kind, default, text: str, metavar: str = "N", shown: str = "%(default)s") -> None:
    """Add a flag whose help ends with its default; `shown` says it in words."""
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {shown})")


def device_flag(group) -> None:
    """Add --device."""
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where to compute; auto takes a GPU if there is one (default: %(default)s)",
    )  # fmt: skip


def data_flags(group, names) -> None:
    """Add the flags that say what is judged by what: --dataset (one of `names`), --data_root and --test_root."""
    group.add_argument("--dataset", choices=names, default="mnist", help="the real images (default: %(default)s)")
    flag(
        group, "--data_root", Path, HERE / "data" / "unpacked", "folder of the real images, as of acgan.py",
        "DIR", "data/unpacked beside acgan.py",
    )  # fmt: skip
    flag(
        group,
        "--test_root",
        Path,
        None,
        "folder of test images, for --dataset folder",
        "DIR",
        "the others have their own",
    )


WHOLE = number(int, "a whole number from 1 to 2147483647", lambda value: 1 <= value < 2**31)
SEED = number(int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def tell_error(prog: str, line: str) -> None:
    """One line on stderr; of several processes each tells its own, as each can fail for a reason of its own."""
    prefix = f"process {process_number()}: " if process_number() else ""
    print_line(f"{prog}: error: {prefix}{line}", sys.stderr)


def exit_status(
    prog: str, command, too_large: str = "ask for fewer images", stopped: str = "Stopped; nothing was written."
) -> int:
    """Call `command()`, which does what a person asked for, and return the exit status.

    0 done, or what the command returned; 2 bad input, too little memory or a disk that cannot be written (one line says
    so); 128 + N for signal N.

    Args:
        prog: the script's name.
        command: called without arguments.
        too_large: what to do if memory does not suffice.
        stopped: what to say after a signal.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names that this terminal cannot show
    for stop_signal in stop_signals():
        signal.signal(stop_signal, raise_stopped)
    try:
        return command() or 0
    except BadInput as error:
        tell_error(prog, str(error))
    except Stopped as signalled:
        announce(stopped)
        return signalled.exit_status
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        tell_error(prog, f"not enough memory; {too_large}")
    except OSError as error:
        tell_error(prog, f"cannot write {error.filename or 'its output'}: {error.strerror or error}")
    return 2


def check_output(flag: str, path: Path, suffix: str) -> None:
    """Raise BadInput unless a file can be written to `path`, whose name ends in `suffix`. Leaves no trace."""
    if path.is_dir() or not path.name:
        raise BadInput(f"argument {flag}: {str(path)!r} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise BadInput(f"argument {flag}: {str(path)!r} is a device or a pipe; name a file")
    if path.suffix.lower() != suffix:
        raise BadInput(f"argument {flag}: {str(path)!r} does not end in {suffix}, as what it will hold")
    check_writable(flag, path.parent)


def print_result(text: str) -> None:
    """Print what a command was asked for; a reader that has gone away is no error. OSError for a full disk."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_network(what: str, path: Path, loader):
    """`loader(path)`, with one line for a file that is missing or is none of its kind."""
    try:
        return loader(path)
    except OSError as error:
        raise BadInput(f"{what}: cannot read {str(path)!r} ({error.strerror or error})") from error
    except ValueError as error:
        raise BadInput(f"{what}: {error}") from error
