"""Checkpoints: all that a run needs to go on to the last bit, written so that no fault loses it."""

import io
import os
import time
from pathlib import Path

import numpy as np
import torch

from utils import BadInput, Diverged, announce, load_data, whole_file

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FORMAT = "acgan checkpoint 1"

# Options that change what is computed: a resumed run must have the checkpoint's.
MATHEMATICS = ("seed", "batch_size", "lr", "b1", "b2", "latent_dim", "n_classes", "img_size", "channels", "upsample",
               "amp")  # fmt: skip
# Options that a resumed run takes from the checkpoint unless the command line says otherwise.
CONTINUED = ("n_epochs", "sample_interval", "log_interval")


class Checkpoints:
    """Writes and restores `checkpoint.pt` in a run's folder.

    Args:
        out_dir: the run's folder.
        interval: batches between checkpoints; None for one every `SECONDS`.
        options: the run's options, as plain data.
        device: where the run trains; its random state is kept too.
        log: the RunLog, whose state says how much of the record belongs to a checkpoint.
        parts: what else has a state, by name: objects with state_dict() and load_state_dict().
    """

    SECONDS = 120

    def __init__(self, out_dir: Path, interval: int | None, options: dict, device: torch.device, log, **parts):
        self.out_dir = out_dir
        self.interval = interval
        self.options = options
        self.device = device
        self.log = log
        self.parts = parts
        self.last_time = time.monotonic()

    def save_if_due(self, steps: int) -> None:
        """Write a checkpoint after `steps` batches, if it is time; if that fails, warn, and try again later."""
        late = time.monotonic() - self.last_time >= self.SECONDS
        due = late if self.interval is None else steps % self.interval == 0
        if not due:
            return
        try:
            self.save(steps)
        except OSError as error:
            announce(
                f"Warning: no checkpoint after batch {steps - 1} ({error.strerror or error}): "
                "training goes on, and an earlier one is kept."
            )
        self.last_time = time.monotonic()

    def save(self, steps: int, finished: bool = False) -> None:
        """Write a checkpoint; the one before stays as checkpoint.previous.pt.

        Args:
            steps: batches done.
            finished: the run came to its end.

        Raises:
            Diverged: a number in the state is not finite; nothing is written.
            OSError: it cannot be written; the earlier ones are kept.
        """
        packed = {
            "format": FORMAT,
            "steps": steps,
            "finished": finished,
            "options": self.options,
            "random": random_state(self.device),
            "log": self.log.state_dict(),
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
        if newest.exists():
            os.replace(newest, self.out_dir / PREVIOUS)
        os.replace(written, newest)
        sync_folder(self.out_dir)

    def restore(self, packed: dict) -> None:
        """Put all parts and random states back to where `packed` (from read_checkpoint) left them."""
        for name, part in self.parts.items():
            state = packed["parts"][name]
            if isinstance(part, torch.optim.Optimizer):
                for group, ours in zip(state["param_groups"], part.param_groups, strict=True):
                    group |= {key: ours[key] for key in ("fused", "capturable")}  # they belong to the device
            part.load_state_dict(state)
        if not restore_random_state(packed["random"], self.device):
            announce(f"The checkpoint is from another device than {self.device}: from here on it is another run.")


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint file in `folder`, or None."""
    return next((folder / name for name in (NEWEST, PREVIOUS) if (folder / name).exists()), None)


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint as data, never as code; falls back to the previous one, and says so.

    Args:
        path: a checkpoint file, or the folder that holds one.

    Raises:
        BadInput: there is none, or none that can be read.
    """
    if path.is_dir():
        found = find_checkpoint(path)
        if found is None:
            raise BadInput(f"argument --resume: no {NEWEST} in {str(path)!r}; name the folder or file of one")
        path = found
    if not path.exists():
        raise BadInput(f"argument --resume: no file {str(path)!r}; name the folder or file of a checkpoint")
    for candidate in dict.fromkeys([path, path.with_name(PREVIOUS)]):
        try:
            packed = load_data(candidate)
            if packed["format"] != FORMAT or not set(MATHEMATICS + CONTINUED) <= packed["options"].keys():
                continue
            packed = {key: packed[key] for key in ("steps", "finished", "options", "random", "log", "parts")}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
        packed["folder"] = path.parent
        if candidate != path:
            announce(f"{path} cannot be read; {candidate.name} is used, which ends at batch {packed['steps'] - 1}.")
        return packed
    raise BadInput(f"argument --resume: {str(path)!r} is damaged, or is not a checkpoint of this script")


def check_shapes(packed: dict, **networks: torch.nn.Module) -> None:
    """Raise BadInput unless the checkpoint's networks have the shapes of these, which its own options describe."""
    for name, network in networks.items():
        ours = {key: tensor.shape for key, tensor in network.state_dict().items()}
        theirs = packed["parts"][name]
        if {key: getattr(tensor, "shape", None) for key, tensor in theirs.items()} != ours:
            raise BadInput(f"argument --resume: the checkpoint's {name} is of another shape than its flags say")


def describe_last(folder: Path) -> str:
    """Where the last good checkpoint in `folder` is, in words."""
    found = find_checkpoint(folder)
    if found is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {found}, after batch {read_checkpoint(found)['steps'] - 1}"


def check_nothing_unfinished(out_dir: Path) -> None:
    """Raise BadInput if a new run in `out_dir` would drop one that has not come to its end."""
    found = find_checkpoint(out_dir)
    if found is None:
        return
    try:
        packed = read_checkpoint(found)
    except BadInput:
        packed = {"finished": False, "steps": "unknown"}
    if not packed["finished"]:
        raise BadInput(
            f"argument --out_dir: {str(found)!r} is of an unfinished run ({packed['steps']} batches done): "
            "add --resume to go on, name another folder, or delete that file to start anew"
        )


def random_state(device: torch.device) -> dict:
    """All random states, as tensors and numbers: PyTorch's on the CPU and on `device`, and NumPy's."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": [kind, position, has_gauss, cached]},
        "device": device.type,
    }
    if device.type != "cpu":
        state["on_device"] = getattr(torch, device.type).get_rng_state()
    return state


def restore_random_state(state: dict, device: torch.device) -> bool:
    """Undo random_state; False if the state is of another kind of device, whose own stream is then left as it is."""
    torch.set_rng_state(state["torch"])
    kind, *rest = state["numpy"]["rest"]
    np.random.set_state((kind, state["numpy"]["keys"].numpy().astype(np.uint32), *rest))
    if state["device"] != device.type:
        return False
    if device.type != "cpu":
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
