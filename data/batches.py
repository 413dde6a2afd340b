"""Shuffled batches of real images, in the tutorial's order: one seed an epoch, plus a position."""

import math

import torch

from utils import MEMORY_SHARE, BadInput, announce


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 [0, 255] to float32 [-1, 1], bit for bit as ToTensor and then Normalize(0.5, 0.5) do."""
    return images.to(torch.float32).div(255).sub(0.5).div(0.5)


def fits(images: torch.Tensor, device: torch.device) -> bool:
    """Return True if the images may stay on `device`; say so if a GPU has too little free memory for that."""
    if device.type != "cuda":
        return True  # the memory of the host, whose budget the images keep already
    budget = torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE
    if images.numel() > budget:  # they are bytes
        size, limit = (f"{n / 2**30:.1f} GiB" for n in (images.numel(), budget))
        announce(f"Images: {size} exceed the GPU's memory budget, {limit}; each batch is copied to it.")
    return images.numel() <= budget


class Batches:
    """Shuffled batches of `batch_size` images, drawn as the tutorial's `DataLoader(shuffle=True)` draws them.

    An epoch takes the same numbers from torch's CPU stream as that loader: first a base seed for its workers, unused
    here, then the sampler's seed, from which one permutation follows. The last, smaller batch is kept. Images in memory
    are copied to `device` once, if they fit there. `ranks`, a run.ranks.Ranks, each take their share of a
    larger batch. `by_class` sorts each batch, which stays the same otherwise.
    With `shares` a batch has so many times `batch_size` images, for as many updates of D.
    """

    def __init__(self, data, batch_size: int, device="cpu", ranks=None, by_class: bool = False, shares: int = 1):
        self.device = device
        self.in_memory = data.in_memory and fits(data.images, torch.device(device))  # of the device
        store = device if self.in_memory else "cpu"
        self.images, self.labels = data.images.to(store), data.labels.to(store)
        self.batch_size, self.ranks, self.by_class, self.shares = batch_size * shares, ranks, by_class, shares
        self.rank, self.world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        # of a batch: each of several ranks makes all its updates of D, or the others would wait for it
        self.fewest = self.world_size * shares if self.world_size > 1 else 1
        self.sampler_seed = 0
        self.position = 0  # batches of the current epoch that were handed out; 0 between epochs

    def __len__(self) -> int:
        """Return the number of batches an epoch, the same for every rank."""
        whole, rest = divmod(len(self.labels), self.batch_size * self.world_size)
        return whole + (rest >= self.fewest) if whole else 1  # a rest that is too small joins the last one

    def check(self, img_size: int, d_norm: str) -> None:
        """Raise BadInput if the smallest batch of any rank, or a share of it, is too small to train on."""
        rest = len(self.labels) % (self.batch_size * self.world_size)
        if len(self.labels) < self.fewest:
            raise BadInput(f"{len(self.labels)} images are too few for {self.world_size} ranks: add images")
        smallest = rest // self.world_size if rest >= self.fewest else self.batch_size
        # D ends at a single pixel then, and its batch norm needs two values
        if smallest // self.shares <= 1 and img_size == 16 and d_norm == "batch":
            size = self.batch_size // self.shares
            raise BadInput(f"argument --batch_size: {size} leaves one image alone in a batch: choose another")

    def __iter__(self):
        """Yield the indices of each batch of an epoch, int64 (B,), or of the rest of a restored one."""
        if self.position == 0:
            torch.empty((), dtype=torch.int64).random_()  # the loader's base seed
            self.sampler_seed = int(torch.empty((), dtype=torch.int64).random_())
            if self.ranks:
                self.sampler_seed = self.ranks.broadcast(self.sampler_seed)
        generator = torch.Generator().manual_seed(self.sampler_seed)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        starts = [self.batch_size * self.world_size * number for number in range(len(self))]
        ends = [*starts[1:], None]
        for number in range(self.position, len(self)):
            self.position += 1
            indices = order[starts[number] : ends[number]][self.rank :: self.world_size]
            yield indices[self.labels[indices].argsort(stable=True)] if self.by_class else indices
        self.position = 0

    def gather(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch of these indices: float32 (B, C, H, W) in [-1, 1], and labels, int64 (B,)."""
        return normalize(self.images[indices].to(self.device)), self.labels[indices].to(self.device)

    def n_fakes(self, indices: torch.Tensor) -> int:
        """Return how many images G draws beside the batch of these indices: one share of it, rounded up."""
        return math.ceil(len(indices) / self.shares)

    def in_order(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the classes to draw in the order of a batch: as they came, or sorted if batches are."""
        return labels.sort().values if self.by_class else labels

    def state_dict(self) -> dict[str, int]:
        """Return the epoch's permutation, as its seed, and the position in it."""
        return {"sampler_seed": self.sampler_seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where state_dict() was taken; the end of an epoch is the start of the next. Raises ValueError."""
        if any(type(value) is not int for value in state.values()) or not 0 <= state["position"] <= len(self):
            raise ValueError("no position in an epoch")
        torch.Generator().manual_seed(state["sampler_seed"])  # raises for what is no seed
        self.sampler_seed, self.position = state["sampler_seed"], state["position"] % len(self)
