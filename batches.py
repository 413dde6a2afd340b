"""Shuffled batches of real images, in the tutorial's order: out of memory, or read by workers as they are needed."""

import torch
from torch.utils.data import DataLoader, Dataset

from dataset import from_workers


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1]: bit for bit ToTensor and then Normalize(0.5, 0.5)."""
    return images.to(torch.float32).div(255).sub(0.5).div(0.5)


class ShuffledBatches:
    """Shuffled batches out of memory, drawn as the tutorial's `DataLoader(shuffle=True)` draws them.

    An epoch takes the same numbers from torch's CPU stream as that loader: one base seed (for its workers, so
    unused here), then the sampler's seed, from which one permutation follows. The last, smaller batch is kept.

    Args:
        images: uint8 (N, C, H, W). They and the labels are copied to `device` once.
        labels: int64 (N,).
        batch_size: images a batch.
        device: where the batches are wanted.
        rank, world: number of this process, and of all; each batch of this one is its share of `world` batches.
        share_seed: called with the epoch's seed, returns the one that all processes use.
    """

    in_memory = True  # so gather reads the same memory every time, as a CUDA graph needs it

    def __init__(self, images, labels, batch_size, device="cpu", *, rank=0, world=1, share_seed=int):
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.batch_size, self.rank, self.world, self.share_seed = batch_size, rank, world, share_seed
        self.sampler_seed = 0
        self.position = 0  # batches of the current epoch that were handed out; 0 between epochs

    def __len__(self) -> int:
        """Batches an epoch, the same number for every process."""
        together = self.batch_size * self.world
        whole, rest = divmod(len(self.labels), together)
        # fewer images than processes make no batch of their own: they join the last one
        return whole + (rest >= self.world) if whole else 1

    def smallest(self) -> int:
        """Images in the smallest batch of any process."""
        rest = len(self.labels) % (self.batch_size * self.world)
        return rest // self.world if rest >= self.world or len(self.labels) == rest else self.batch_size

    def __iter__(self):
        """One epoch, or the rest of a restored one: yield the indices of each batch, int64 (B,), on the device."""
        if self.position == 0:
            torch.empty((), dtype=torch.int64).random_()  # the loader's base seed
            self.sampler_seed = self.share_seed(int(torch.empty((), dtype=torch.int64).random_()))
        generator = torch.Generator().manual_seed(self.sampler_seed)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        starts = [self.batch_size * self.world * number for number in range(len(self))]
        parts = [
            order[start:end][self.rank :: self.world] for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]
        for indices in self.hand_out(parts[self.position :]):
            self.position += 1
            yield indices
        self.position = 0

    def hand_out(self, parts):
        """The indices of each batch; here is the place to read ahead."""
        return iter(parts)

    def state_dict(self) -> dict[str, int]:
        """The epoch's permutation, by its seed, and the position in it."""
        return {"sampler_seed": self.sampler_seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where state_dict() was taken; the end of an epoch is the start of the next. ValueError for no state."""
        if any(type(value) is not int for value in state.values()) or not 0 <= state["position"] <= len(self):
            raise ValueError("no position in an epoch")
        torch.Generator().manual_seed(state["sampler_seed"])  # raises for what is no seed
        self.sampler_seed, self.position = state["sampler_seed"], state["position"] % len(self)

    def gather(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of these indices: float32 (B, C, H, W) in [-1, 1], and labels, int64 (B,)."""
        return normalize(self.images[indices]), self.labels[indices]


def batches_of(images, labels, batch_size, device, workers: int, **shard) -> ShuffledBatches:
    """Batches out of memory for a tensor of images, else streamed by `workers`; arguments as of ShuffledBatches."""
    if isinstance(images, torch.Tensor):
        return ShuffledBatches(images, labels, batch_size, device, **shard)
    return StreamedBatches(images, labels, batch_size, device, workers=workers, **shard)


class WithIndex(Dataset):
    """Images, one at a time, each with its number."""

    def __init__(self, images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], index


class StreamedBatches(ShuffledBatches):
    """The same batches of a folder too large for memory: workers read them ahead, in the same order.

    Args:
        images: dataset.FolderImages.
        labels, batch_size, device: as of ShuffledBatches.
        workers: processes that read.
        **shard: as of ShuffledBatches.
    """

    in_memory = False

    def __init__(self, images, labels, batch_size, device="cpu", *, workers: int, **shard):
        super().__init__(torch.empty(0), labels, batch_size, device, **shard)
        self.files, self.workers = WithIndex(images), workers
        self.read = torch.empty(0)

    def hand_out(self, parts):
        """Read each part's images, ahead of the training; they wait in `read` until gather is called."""
        device = self.labels.device
        # a generator of its own, so that no stream of the training is drawn from
        loader = DataLoader(
            self.files, batch_sampler=[part.tolist() for part in parts], num_workers=self.workers,
            pin_memory=device.type == "cuda", generator=torch.Generator(),
        )  # fmt: skip
        for images, indices in from_workers(loader):
            self.read = images.to(device, non_blocking=True)
            yield indices.to(device)

    def gather(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch handed out last, which must be the one of these indices."""
        return normalize(self.read), self.labels[indices]
