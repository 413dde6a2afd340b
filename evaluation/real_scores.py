"""The scores of real images, kept on the disk: they are the same for every generator, and take a third of the time."""

import contextlib
import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

from utils import announce, atomic_write, load_data

KEPT = Path(__file__).resolve().parent / "kept"  # in the checkout, so that only its owner writes there


def kept_or_computed(compute, *inputs):
    """Return compute()'s plain data, or what an earlier call with the same inputs, code and machine returned.

    `inputs` are tensors and values whose repr says all; all that the result depends on must be among them. A file that
    is corrupt is replaced. Where nothing can be written, all is computed each time.
    """
    path = KEPT / f"{fingerprint(inputs)}.pth"
    with contextlib.suppress(OSError, ValueError):
        kept = load_data(path)
        announce(f"Real images: scores of an earlier call, from {KEPT}.")
        return kept
    computed = compute()
    with contextlib.suppress(OSError):
        atomic_write(path, lambda file: torch.save(computed, file))
    return computed


def fingerprint(inputs: tuple) -> str:
    """Return a SHA-256 over the inputs, this folder's code, the packages' versions, and what computes."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    packages = torch.__version__, version("torchmetrics")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = gpu, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    for part in (*inputs, packages, machine):
        if isinstance(part, torch.Tensor):
            digest.update(repr((part.dtype, part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
