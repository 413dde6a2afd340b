"""The command line of every command: flags with their defaults, errors in one line, and the exit status."""

import argparse
import difflib
import math
import os
import sys
from pathlib import Path

from utils import BadInput, Stopped, announce, catch_signals, check_writable, out_of_memory, print_line, rank

BUNDLED_GENERATOR = Path(__file__).resolve().parent / "weights" / "best.pth"


class HelpFormatter(argparse.HelpFormatter):
    """Ends each flag's help with its default, unless the help already states one."""

    def _get_help_string(self, action):
        if "(default: " in action.help or not action.option_strings or action.default is argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors that suggest the flag that was meant; exit status 2."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flags = [flag for action in self._actions for flag in action.option_strings]
            typed = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            near = difflib.get_close_matches(typed, flags, n=1)
            message += f" (did you mean {near[0]}?)" if near else " (--help lists the flags)"
        self.exit(2, f"{self.prog}: error: {message}\n")


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


def add_data_flags(parser, names) -> None:
    """Add --dataset, one of `names`, --data_root and --test_root, as evaluate.py and train_judge.py read them."""
    add = parser.add_argument
    add("--dataset", choices=names, default="mnist", help="the real images")
    add("--data_root", type=Path, metavar="DIR", help="their folder, as for acgan.py (default: as for acgan.py)")
    add("--test_root", type=Path, metavar="DIR", help="folder of the test images of --dataset folder (default: none)")


def add_weights_flag(parser) -> None:
    """Add --weights: a file, or the folder of a run, which stands for its EMA weights."""

    def find(text: str) -> Path:
        return Path(text) / "acgan_gen_ema.pth" if os.path.isdir(text) else Path(text)

    parser.add_argument("--weights", type=find, default=BUNDLED_GENERATOR, metavar="PATH",
                        help="a weight file, or a run's folder, for its EMA (default: weights/best.pth)")  # fmt: skip


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
