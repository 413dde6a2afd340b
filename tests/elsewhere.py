"""Training, drawing and scoring without what only POSIX has, as far as this project's own modules use it.

python -X warn_default_encoding tests/elsewhere.py FOLDER
"""

import builtins
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import small

import acgan
import evaluate
import generate
from data import builtin
from evaluation.scorecard import Counts

ROOT = Path(acgan.__file__).parent
MODULES = {"fcntl", "termios", "resource"}
NAMES = {"SIGHUP", "SIGKILL", "sysconf", "sched_getaffinity", "fork", "geteuid", "mkfifo"}
OTHERS = (ROOT / "tests", sys.prefix)  # a virtual environment may lie in ROOT
OURS = [module for module in list(sys.modules.values())
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT)
        and not any(Path(module.__file__).is_relative_to(folder) for folder in OTHERS)]  # fmt: skip


class Poorer:
    """A module without NAMES."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        if name in NAMES:
            raise AttributeError(f"module {self.module.__name__!r} has no attribute {name!r}")
        return getattr(self.module, name)


def take_away() -> None:
    """Take MODULES and NAMES away from the project's own modules."""
    import_module, files = builtins.__import__, {module.__file__ for module in OURS}

    def poorer_import(name, globals=None, *args, **kwargs):
        if name in MODULES and (globals or {}).get("__file__") in files:
            raise ImportError(f"No module named {name!r}")
        return import_module(name, globals, *args, **kwargs)

    builtins.__import__ = poorer_import
    for module in OURS:
        for name, value in list(vars(module).items()):
            if value is os or value is signal:
                setattr(module, name, Poorer(value))


def run(folder: Path) -> None:
    """Train, resume, draw and score in `folder`; each must end with status 0."""
    acgan.load_dataset = small.few(60)
    evaluate.load_train_and_test = lambda *args: [small.digits(builtin.IDX[n : n + 2], 0, 500) for n in (0, 2)]
    evaluate.QUICK = Counts(scored=20, cas=20, cas_epochs=1, pairs=5)
    out_dir, flags = str(folder / "run"), ["--device", "cpu"]
    few = [*flags, "--seed", "1", "--batch_size", "24", "--latent_dim", "4"]
    commands = [
        (acgan, [*few, "--max_steps", "1", "--out_dir", out_dir]),
        (acgan, [*flags, "--resume", out_dir, "--max_steps", "2"]),
        (acgan, [*few, "--max_steps", "1", "--out_dir", out_dir]),  # moves the earlier run aside
        (acgan, [*few, "--max_steps", "1", "--out_dir", str(folder / "mine"), "--dataset", "folder", "--data_root",
                 str(folder / "images of mine"), "--img_size", "16"]),
        (generate, ["2026", *flags, "--weights", out_dir, "--out", str(folder / "drawn.png")]),
        (evaluate, ["--seed", "1", *flags, "--weights", out_dir]),
    ]  # fmt: skip
    for module, words in commands:
        if status := module.main(words):
            sys.exit(f"{module.__name__}.py {' '.join(words)}: {status}")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    for module in OURS:  # a default encoding is another one on Windows
        warnings.filterwarnings("error", category=EncodingWarning, module=module.__name__.replace(".", r"\."))
    take_away()
    run(Path(sys.argv[1]))
    print(f"{len(OURS)} modules without {', '.join(sorted(MODULES | NAMES))}")
