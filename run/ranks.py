"""Several ranks that train one pair of networks, started by torchrun: each on its share of every batch."""

import contextlib
import inspect
import os
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils import BadInput, Diverged, check_gpu, first_line, local_ranks, rank


class LostRank(Exception):
    """Another rank of this run has ended, or the GPU of this one has failed, so it cannot continue."""


class Ranks:
    """This rank among those that torchrun started; without torchrun the only one, at no cost.

    PyTorch's DistributedDataParallel averages the gradients, over NCCL on GPUs and gloo on CPUs. Rank 0 draws from the
    random streams as a single process does. Every other rank seeds its streams at each batch, from the run's seed, its
    number and the batch. So one checkpoint, of rank 0, holds all that matters. On "cuda" each rank takes the GPU of its
    local number; more ranks than GPUs are BadInput, and so is a GPU that cannot compute.
    """

    def __init__(self, device: torch.device):
        self.world_size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
        self.rank = rank()
        self.device = device
        if self.world_size == 1:
            return
        local = int(os.environ["LOCAL_RANK"])
        if device.type == "cuda":
            if local_ranks() > torch.cuda.device_count():
                raise BadInput(f"torchrun: this machine has {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
            check_gpu(self.device)
        store, number, world_size = next(dist.rendezvous("env://"))
        # torchrun keeps its store through a restart, with the addresses of ranks that no longer exist
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # gloo for numbers that the host decides by: it does not wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=world_size)

    @contextlib.contextmanager
    def rank_0_first(self):
        """Let rank 0 run the block before all others. Raises LostRank on these if it fails."""
        try:
            if self.rank:
                dist.barrier()
        except RuntimeError as error:
            raise LostRank("rank 0 was lost") from error
        yield
        if self.world_size > 1 and not self.rank:
            dist.barrier()

    def broadcast(self, number: int) -> int:
        """Return rank 0's number on every rank."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number)
        dist.broadcast(shared, 0)
        return int(shared)

    def wrap(self, *networks):
        """Return the networks with gradients averaged over all ranks and, on GPUs, with SyncBatchNorm."""
        if self.world_size == 1:
            return networks
        if self.device.type == "cuda":
            networks = [torch.nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks]
        # of one channel's weights both strides mean the same order
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # each rank keeps its own running statistics, or SyncBatchNorm keeps them equal: no buffers are sent
        names = inspect.signature(DistributedDataParallel).parameters
        keep = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # its older name
        return tuple(DistributedDataParallel(network, **{keep: False}) for network in networks)

    def reseed(self, seed: int, step: int) -> None:
        """Give every rank but 0 its own random numbers for batch `step`."""
        if self.rank:
            torch_seed, numpy_seed = np.random.SeedSequence([seed, self.rank, step]).generate_state(2)
            torch.manual_seed(int(torch_seed))
            np.random.seed(int(numpy_seed))

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is true on any rank; every rank must ask."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def close(self) -> None:
        """Leave the group of ranks."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def was_restarted() -> bool:
    """Return True if torchrun restarted this process after another rank was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def cause(error: BaseException | None, step: int) -> Diverged | LostRank | None:
    """Return what ended the training in batch `step`, if that is known from PyTorch's own error."""
    if not isinstance(error, RuntimeError):
        return None
    words = str(error)
    if "between 0 and 1" in words or "device-side assert" in words:  # BCELoss's, on the CPU and on CUDA
        return Diverged(f"the loss is no longer finite at step {step}")
    if isinstance(error, dist.DistError) or any(name in words for name in ("gloo", "Connection closed", "NCCL")):
        return LostRank("another rank of this run was lost")
    if words.startswith(("CUDA error", "cuDNN error")):
        return LostRank(f"the GPU has failed in batch {step} ({first_line(error)})")
    return None
