"""Checkpoints: all that a run needs to go on to the last bit, written so that no fault loses it."""

import io
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from utils import BadInput, Diverged, announce, load_data, out_of_memory, whole_file

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FORMAT = "acgan checkpoint 1"

# Options that change what is computed: a resumed run must have the checkpoint's.
MATHEMATICS = ("seed", "batch_size", "lr", "b1", "b2", "latent_dim", "n_classes", "img_size", "channels", "upsample",
               "amp", "dataset", "sync_bn")  # fmt: skip
# Options that a resumed run takes from the checkpoint unless the command line says otherwise. Another sample_interval
# draws other noise, and another compile rounds otherwise: allowed, but not to the last bit.
CONTINUED = ("n_epochs", "sample_interval", "log_interval", "checkpoint_interval", "eval_interval", "judge", "ema",
             "compile", "cuda_graph", "n_cpu")  # fmt: skip
LATER = {"dataset": "mnist", "sync_bn": "off", "processes": 1}  # what a checkpoint that lacks an option was made with
KEYS = ("steps", "finished", "options", "data", "random", "log", "parts", "launcher")
PARTS = ("generator", "discriminator", "optimizer_G", "optimizer_D", "batches")


class Checkpoints:
    """Writes `checkpoint.pt` in a run's folder; `restore` is its other half.

    Args:
        out_dir: the run's folder.
        interval: batches between checkpoints; None for one every `SECONDS`.
        options: the run's options, as plain data.
        device: where the run trains; its random state is kept too.
        data: {"classes": names, "images": number} of the training set; a resumed run must have the same.
        log: the RunLog, whose state says how much of the record belongs to a checkpoint.
        writes: False in all processes but the first: nothing is written.
        parts: what else has a state, under the names of PARTS: objects with state_dict().
    """

    SECONDS = 120

    def __init__(
        self, out_dir: Path, interval: int | None, options: dict, data: dict, device, log, writes=True, **parts
    ):
        self.writes = writes
        self.out_dir = out_dir
        self.interval = interval
        self.options, self.data = options, data
        self.device = device
        self.log = log
        self.parts = parts
        self.last_time = time.monotonic()
        self.unsaved = 0  # batches done, if they are not in a checkpoint yet

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Images that could no longer be read end the run; what was reached by then is kept."""
        if isinstance(error, BadInput) and self.unsaved:
            self.save(self.unsaved)

    def save_if_due(self, steps: int) -> None:
        """Write a checkpoint after `steps` batches, if it is time; if that fails, warn, and try again later."""
        self.unsaved = steps
        late = time.monotonic() - self.last_time >= self.SECONDS
        due = late if self.interval is None else steps % self.interval == 0
        if not due or not self.writes:
            return
        try:
            self.save(steps)
        except OSError as error:
            announce(
                f"Warning: no checkpoint after batch {steps - 1} ({error.strerror or error}): "
                "training goes on, and an earlier one is kept."
            )
        self.last_time = time.monotonic()

    def save(self, steps: int, finished: bool = False, rotate: bool = True) -> None:
        """Write a checkpoint; the one before stays as checkpoint.previous.pt.

        Args:
            steps: batches done.
            finished: the run came to its end.
            rotate: False drops the one before instead, as it was damaged, or lies after this one.

        Raises:
            Diverged: a number in the state is not finite; nothing is written.
            OSError: it cannot be written; the earlier ones are kept.
        """
        if not self.writes:
            return
        packed = {
            "format": FORMAT,
            "steps": steps,
            "finished": finished,
            "options": self.options,
            "data": self.data,
            "random": random_state(self.device),
            "log": self.log.state_dict(),
            "launcher": os.getppid(),  # torchrun, where it started this process
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        if not all_finite(packed["parts"]):
            raise Diverged(f"the networks are no longer finite after batch {steps - 1}")
        buffer = io.BytesIO()
        torch.save(packed, buffer)
        written = self.out_dir / "checkpoint.new.pt"
        with whole_file(written) as file:
            file.write(buffer.getbuffer())
        newest = self.out_dir / NEWEST
        if rotate and newest.exists():
            os.replace(newest, self.out_dir / PREVIOUS)
        os.replace(written, newest)
        sync_folder(self.out_dir)
        self.unsaved = 0


def restore(packed: dict, device: torch.device, **parts) -> None:
    """Put all parts, and the random states, back to where `packed` (from read_checkpoint) left them.

    Args:
        packed: the checkpoint.
        device: where the run goes on.
        parts: under the names of PARTS, and "averaged", objects with load_state_dict().

    Raises:
        BadInput: what the checkpoint holds does not fit its own flags.
    """
    try:
        for restored, part in parts.items():
            if restored == "averaged" and restored not in packed["parts"]:
                part.restart()  # from the G just restored, as older checkpoints lack an average
                continue
            state = packed["parts"][restored]
            if isinstance(part, torch.optim.Optimizer):
                check_moments(state["state"], part)
                state = {"state": state["state"], "param_groups": part.state_dict()["param_groups"]}  # of the flags
            part.load_state_dict(state)
        restored = "position in the data"
        if parts["batches"].position != packed["steps"] % len(parts["batches"]):
            raise ValueError("not that of its number of batches")
        restored = "random state"
        exact = restore_random_state(packed["random"], device)
    except Exception as error:  # the file's checksums were right, so it was made so
        if out_of_memory(error):
            raise
        raise BadInput(f"argument --resume: the checkpoint's {restored} does not fit its flags") from error
    if not exact:
        announce(f"The checkpoint was made on another device or number of threads than {device} here has: "
                 "the run goes on, but not to the last bit.")  # fmt: skip


def check_moments(state: dict, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless `state` has Adam's moments for each parameter: PyTorch trusts their sizes blindly."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(state) != list(range(len(parameters))):
        raise ValueError("moments of other parameters")
    for number, parameter in enumerate(parameters):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[number][name]
            if moment.shape != parameter.shape or moment.dtype != parameter.dtype:
                raise ValueError(f"{name} of another size or kind")
        if not 0 <= float(state[number]["step"]) < 2**31:
            raise ValueError("no number of steps")


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint file in `folder`, or None."""
    return next((folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()), None)


def read_checkpoint(path: Path, quiet: bool = False) -> dict:
    """Read a checkpoint as data, never as code.

    In place of a checkpoint.pt that is damaged or missing, the previous one is read.

    Args:
        path: a checkpoint file, or the folder that holds one.
        quiet: do not say that the previous one is used.

    Returns:
        What Checkpoints.save wrote, and under "file" the path that was read.

    Raises:
        BadInput: there is none, or none that can be read.
    """
    if path.is_dir():
        if find_checkpoint(path) is None:
            raise BadInput(f"argument --resume: no {NEWEST} in {str(path)!r}; name the folder or file of one")
        path = path / NEWEST
    candidates = [path, path.with_name(PREVIOUS)] if path.name == NEWEST else [path]
    if not any(candidate.exists() for candidate in candidates):
        raise BadInput(f"argument --resume: no file {str(path)!r}; name the folder or file of a checkpoint")
    for candidate in candidates:
        try:
            packed = load_data(candidate)
            packed["options"] = LATER | packed["options"]
            log = packed["log"]
            whole = (
                packed["format"] == FORMAT
                and is_count(packed["steps"])
                and is_count(packed["options"]["seed"])
                and set(MATHEMATICS) <= packed["options"].keys()
                and set(PARTS) <= packed["parts"].keys()
                and isinstance(log["log_dir"], str)
                and all(isinstance(name, str) and is_count(size) for name, size in log["sizes"].items())
                and log["pending"].isascii()
                and 0 <= log["seconds"] < math.inf
            )
            packed = {"data": None, "launcher": None} | packed  # older ones lack these
            packed = {key: packed[key] for key in KEYS}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
        if not whole:
            continue
        if candidate != path and not quiet:
            announce(f"{path} cannot be read; {candidate.name} is used, which ends at batch {packed['steps'] - 1}.")
        return packed | {"file": candidate}
    raise BadInput(f"argument --resume: {str(path)!r} is damaged, or is not a checkpoint of this script")


def is_count(value) -> bool:
    """True for a whole number from 0 on."""
    return type(value) is int and value >= 0


def begun_by_this_torchrun(folder: Path) -> bool:
    """True if torchrun has restarted this process, and the run in `folder` is the one that it had started before."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return False
    try:
        return read_checkpoint(folder, quiet=True)["launcher"] == os.getppid()
    except BadInput:
        return False


def describe_last(folder: Path) -> str:
    """Where the last good checkpoint in `folder` is, in words."""
    try:
        packed = read_checkpoint(folder, quiet=True)
    except BadInput:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {packed['file']}, after batch {packed['steps'] - 1}"


def check_nothing_unfinished(out_dir: Path) -> None:
    """Raise BadInput if a new run in `out_dir` would drop one that has not come to its end."""
    found = find_checkpoint(out_dir)
    if found is None:
        return
    try:
        packed = read_checkpoint(out_dir, quiet=True)
    except BadInput:
        packed = {"finished": False, "steps": "unknown"}
    if not packed["finished"]:
        raise BadInput(
            f"argument --out_dir: {str(found)!r} is of an unfinished run (batches done: {packed['steps']}): "
            "add --resume to go on, name another folder, or delete its checkpoints to start anew"
        )


def random_state(device: torch.device) -> dict:
    """All random states, as tensors and numbers: PyTorch's on the CPU and on `device`, and NumPy's."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": [kind, position, has_gauss, cached]},
        "device": device.type,
        "threads": torch.get_num_threads(),  # sums on a CPU are split among them
    }
    if device.type != "cpu":
        state["on_device"] = getattr(torch, device.type).get_rng_state()
    return state


def restore_random_state(state: dict, device: torch.device) -> bool:
    """Undo random_state; False if the run cannot go on to the last bit, on another device or number of threads."""
    torch.set_rng_state(state["torch"])
    kind, *rest = state["numpy"]["rest"]
    if not 0 <= rest[0] <= 624:  # NumPy does not look before it reads there
        raise ValueError("no position in NumPy's random numbers")
    np.random.set_state((kind, state["numpy"]["keys"].numpy().astype(np.uint32), *rest))
    if state["device"] != device.type:
        return False
    if device.type == "cpu":
        return state["threads"] == torch.get_num_threads()
    getattr(torch, device.type).set_rng_state(state["on_device"])
    return True


def all_finite(state) -> bool:
    """True if every floating-point tensor in nested dicts and lists is finite; waits for the device once."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, dict):
            for part in value.values():
                yield from tensors(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from tensors(part)

    by_device = {}
    for tensor in tensors(state):
        by_device.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(flags).all()) for flags in by_device.values())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut, where the system can (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
