"""Several processes that train one pair of networks, started by torchrun: each on its share of the data."""

import inspect
import os

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils import BadInput, process_number


class Processes:
    """This process among those that torchrun started; alone without torchrun, and then all of this costs nothing.

    Gradients are averaged by PyTorch's DistributedDataParallel, over NCCL on GPUs and gloo on CPUs. The first process
    draws from the random streams just as one alone would. Each of the others starts its streams anew at each batch,
    from the seed, its number and the batch, so that a checkpoint of the first one holds all that matters.

    Args:
        device: where to train; on "cuda" each process takes the GPU of its number on this machine.

    Raises:
        BadInput: there are more processes than GPUs.
    """

    def __init__(self, device: torch.device):
        self.world = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
        self.rank = process_number()
        self.device = device
        if self.world == 1:
            return
        local = int(os.environ["LOCAL_RANK"])
        if device.type == "cuda":
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise BadInput(
                    f"torchrun: --nproc_per_node is more than this machine's {torch.cuda.device_count()} GPUs"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun keeps its store through a restart, and with it the addresses of processes that are gone
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # gloo for numbers that the host decides by: it need not wait for the GPU to learn them
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    @property
    def first(self) -> bool:
        """True for the process that writes and talks."""
        return self.rank == 0

    def shard(self) -> dict:
        """How batches.ShuffledBatches divides the data."""
        return dict(rank=self.rank, world=self.world, share_seed=self.from_first)

    def from_first(self, number: int) -> int:
        """The first process's number, for all."""
        if self.world == 1:
            return number
        shared = torch.tensor(number)
        dist.broadcast(shared, 0)
        return int(shared)

    def synchronise_norms(self, *networks) -> None:
        """Make every batch norm take its statistics over all processes' batches. Raises BadInput on a CPU."""
        if self.device.type != "cuda":
            raise BadInput("argument --sync_bn: PyTorch's SyncBatchNorm works on GPUs only")
        for network in networks:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)

    def wrap(self, *networks):
        """The networks as the training calls them: gradients come out averaged over all processes."""
        if self.world == 1:
            return networks
        # each process keeps its own running statistics (or SyncBatchNorm keeps them equal), so no buffers are sent
        names = inspect.signature(DistributedDataParallel).parameters
        keep = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # its older name
        return tuple(DistributedDataParallel(network, **{keep: False}) for network in networks)

    def start_batch(self, seed: int, step: int) -> None:
        """Give all processes but the first their own random numbers for batch `step`."""
        if self.rank:
            torch_seed, numpy_seed = np.random.SeedSequence([seed, self.rank, step]).generate_state(2)
            torch.manual_seed(int(torch_seed))
            np.random.seed(int(numpy_seed))

    def any(self, flag: bool) -> bool:
        """True if `flag` is true in any process: all of them must ask."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def first_goes_first(self, load):
        """`load()`, in the first process before the others: it finds nothing half unpacked, nor do they."""
        if self.world > 1 and not self.first:
            dist.barrier()
        loaded = load()
        if self.world > 1 and self.first:
            dist.barrier()
        return loaded

    def lost_one(self, error: BaseException) -> bool:
        """True if `error` is how PyTorch says that another process has gone."""
        words = ("gloo", "Connection closed", "Connection reset", "NCCL")
        return self.world > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)

    def close(self) -> None:
        """Take leave of the others."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
