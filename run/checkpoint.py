"""Checkpoints: all that a run needs to resume, on a CPU bit-exactly, written so that no fault loses it."""

import contextlib
import dataclasses
import os
import time
import typing
from pathlib import Path

import numpy as np
import torch

from run.plan import Plan
from utils import NO_FSYNC, BadInput, Diverged, announce, atomic_write, load_data, out_of_memory, sync

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FORMAT, OLD_FORMATS = "acgan checkpoint 3", ("acgan checkpoint 1", "acgan checkpoint 2")
PARTS = {"generator", "discriminator", "optimizer_G", "optimizer_D", "batches", "ema"}


class Checkpoints:
    """Writes `checkpoint.pt` in a run's folder: options, plan, the states of `parts` by name, and the random states.

    What the `record` has written is flushed to the disk first. `restore` is the other half.
    """

    SECONDS = 120

    def __init__(self, opt, plan: Plan, device: torch.device, record, parts: dict):
        self.out_dir, self.interval = opt.out_dir, opt.checkpoint_interval
        self.decided, self.parts = dict(options=as_data(opt), plan=dataclasses.asdict(plan)), parts
        self.device, self.record = device, record
        self.last_time = time.monotonic()

    def save_if_due(self, step: int) -> None:
        """Write a checkpoint after `step` batches, if one is due; if that fails, warn, and try at the next."""
        late = time.monotonic() - self.last_time >= self.SECONDS
        if not (late if self.interval is None else step % self.interval == 0):
            return
        try:
            self.save(step)
        except OSError as error:
            kept = "the earlier one is kept" if has_checkpoint(self.out_dir) else "there is none yet"
            announce(f"Warning: no checkpoint after batch {step} ({error.strerror or error}): {kept}.")
        self.last_time = time.monotonic()

    def save(self, step: int, finished: bool = False) -> None:
        """Write a checkpoint after `step` batches; the one before becomes checkpoint.previous.pt.

        Raises Diverged, and writes nothing, if a number is not finite. After an OSError the earlier ones are kept.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        packed = dict(format=FORMAT, step=step, finished=finished, **self.decided, random=random_state(self.device),
                      parts=parts)  # fmt: skip
        if not all_finite(parts):
            raise Diverged(f"the networks are no longer finite after batch {step}")
        self.record.flush()
        new, newest = self.out_dir / "checkpoint.new.pt", self.out_dir / NEWEST
        atomic_write(new, lambda file: torch.save(packed, file))
        if newest.exists():
            os.replace(newest, self.out_dir / PREVIOUS)
        os.replace(new, newest)
        sync_folder(self.out_dir)


def as_data(opt) -> dict:
    """Return the options of a command line as JSON can hold them; of a path that is not text, its bytes are shown."""

    def text(path: Path) -> str:
        return str(path).encode(errors="backslashreplace").decode()

    return {name: text(value) if isinstance(value, Path) else value for name, value in vars(opt).items()}


def restore(checkpoint: dict, parts: dict, device: torch.device) -> int:
    """Set all parts and random states to what a checkpoint holds, and return its batches done. Raises BadInput."""
    try:
        for name, part in parts.items():
            state = checkpoint["parts"][name]
            if isinstance(part, torch.optim.Optimizer):
                fit_moments(state["state"], part)
                state = {"state": state["state"], "param_groups": part.state_dict()["param_groups"]}  # of the options
            part.load_state_dict(state)
        name = "random state"
        inexact = restore_random_state(checkpoint["random"], device)
    except Exception as error:  # the checksums were right, so the file was written like this
        if out_of_memory(error):
            raise
        raise BadInput(f"argument --resume: the checkpoint's {name} does not fit its options") from error
    if checkpoint["file"].name == PREVIOUS:  # the newest is corrupt, and must not replace a good one
        checkpoint["file"].with_name(NEWEST).unlink(missing_ok=True)
    if inexact:
        announce(f"The run resumes, but not bit-exactly: {inexact}.")
    return checkpoint["step"]


def fit_moments(state: dict, optimizer: torch.optim.Optimizer) -> None:
    """Lay out Adam's moments in `state` as their parameters: fused Adam reads both in the order of the memory.

    Raises ValueError unless they are those of each parameter: PyTorch does not check their sizes.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(state) != list(range(len(parameters))):
        raise ValueError("moments of other parameters")
    for number, parameter in enumerate(parameters):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[number][name]
            wanted = parameter.shape, parameter.dtype, torch.strided
            if (moment.shape, moment.dtype, moment.layout) != wanted:
                raise ValueError(f"{name} of another size or type")
            state[number][name] = torch.empty_like(parameter).copy_(moment)
        if not 0 <= float(state[number]["step"]) < 2**31:
            raise ValueError("no number of steps")


def read_checkpoint(folder: Path, quiet: bool = False) -> dict:
    """Read the newest checkpoint of a run's folder as data, never as code; if it is corrupt, the previous one.

    Returns what Checkpoints.save wrote, and under "file" the path that was read; of an older format only "format",
    "step", "finished" and "file". Raises BadInput.
    """
    paths = [folder / name for name in (NEWEST, PREVIOUS) if (folder / name).is_file()]
    if not paths:
        raise BadInput(f"argument --resume: there is no {NEWEST} in {str(folder)!r}: name the folder of a run")
    for path in paths:
        try:
            checkpoint = checked(load_data(path), path)
            if checkpoint["format"] == FORMAT and path.name == PREVIOUS and not quiet:
                announce(f"{folder / NEWEST} is corrupt or missing: resuming from {PREVIOUS} instead.")
            return checkpoint
        except OSError as error:  # it may be good: none that is older takes its place
            what = f"cannot read {str(path)!r} ({error.strerror or error})"
            raise BadInput(f"argument --resume: {what}: mend that, or move it away") from error
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            continue
    raise BadInput(f"argument --resume: {str(paths[0])!r} is corrupt, or is not a checkpoint: name another run")


def checked(packed: dict, path: Path) -> dict:
    """Return what read_checkpoint returns of what the file `path` holds. What is no checkpoint raises many errors."""
    if not isinstance(packed, dict):  # a tensor, say, which would warn
        raise TypeError("no checkpoint")
    if packed["format"] in OLD_FORMATS:
        step = packed.get("step", packed.get("steps"))  # the oldest say steps
        return dict(format=packed["format"], step=step, finished=packed["finished"], file=path)
    if packed["format"] != FORMAT or not packed["parts"].keys() >= PARTS:
        raise ValueError("no checkpoint")
    check_kinds(packed)
    return packed | {"file": path}


def check_kinds(packed: dict) -> None:
    """Raise TypeError unless what decides how a run is resumed is of the kinds that Checkpoints.save writes."""
    plan, kinds = Plan(**packed["plan"]), typing.get_type_hints(Plan)
    right = all(type(getattr(plan, name)) is (typing.get_origin(kind) or kind) for name, kind in kinds.items())
    right &= type(packed["step"]) is int and packed["step"] >= 0 and type(packed["finished"]) is bool
    if not right or type(packed["options"]) is not dict:
        raise TypeError("a part of another kind")


def read_to_resume(folder: Path) -> dict:
    """Return the checkpoint of a run that this version can continue. Raises BadInput."""
    checkpoint = read_checkpoint(folder)
    if checkpoint["format"] != FORMAT:
        raise BadInput(f"argument --resume: {str(checkpoint['file'])!r} is from an older version of this script: "
                       "continue it with that version, or begin a new run in another folder")  # fmt: skip
    return checkpoint


def describe_last(folder: Path, resumed: dict | None) -> str:
    """Return the place of the last good checkpoint of a run that may have `resumed` another, in words."""
    checkpoint = None
    with contextlib.suppress(BadInput):
        checkpoint = read_checkpoint(folder, quiet=True)
    if checkpoint is None or (checkpoint["finished"] and not resumed):  # that one is an earlier run's
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {checkpoint['file']}, after batch {checkpoint['step']}"


def has_checkpoint(folder: Path) -> bool:
    """Return True if a run in `folder` has left a checkpoint; a kill between two renames leaves the previous one."""
    return any((folder / name).exists() for name in (NEWEST, PREVIOUS))


def check_finished(out_dir: Path) -> None:
    """Raise BadInput if a new run in `out_dir` would drop one that is not finished."""
    if not has_checkpoint(out_dir):
        return
    try:
        checkpoint = read_checkpoint(out_dir, quiet=True)
    except BadInput:
        checkpoint = {"finished": False, "step": "unknown", "format": FORMAT}
    if not checkpoint["finished"]:
        there = "add --resume to continue" if checkpoint["format"] == FORMAT else (
            "it is from an older version of this script: continue it with that version")  # fmt: skip
        raise BadInput(f"argument --out_dir: {str(out_dir)!r} holds an unfinished run (batches done: "
                       f"{checkpoint['step']}): {there}, or name another folder")  # fmt: skip


def random_state(device: torch.device) -> dict:
    """Return all random states, as tensors and numbers: PyTorch's on the CPU and on `device`, and NumPy's."""
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


def restore_random_state(state: dict, device: torch.device) -> str:
    """Undo random_state; return why the continuation is not exact, or nothing if it is."""
    torch.set_rng_state(state["torch"])
    kind, *rest = state["numpy"]["rest"]
    if not 0 <= rest[0] <= 624 or not state["numpy"]["keys"].any():  # NumPy does not check: no draw from zeros ends
        raise ValueError("no position in NumPy's random numbers")
    np.random.set_state((kind, state["numpy"]["keys"].numpy().astype(np.uint32), *rest))
    if state["device"] != device.type:
        return "its checkpoint is from another device"
    if device.type == "cpu":
        same = int(state["threads"]) == torch.get_num_threads()
        return "" if same else "its checkpoint is from another number of threads"
    getattr(torch, device.type).set_rng_state(state["on_device"])
    return "a GPU's libraries choose their algorithms anew"


def all_finite(state) -> bool:
    """Return True if every floating-point tensor in nested dicts and lists is finite; waits for the device once."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from tensors(part)

    by_device = {}
    for tensor in tensors(state):
        by_device.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(flags).all()) for flags in by_device.values())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can open and flush one. Raises OSError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if isinstance(error, PermissionError | IsADirectoryError) or error.errno in NO_FSYNC:
            return  # on Windows, for one
        raise
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
