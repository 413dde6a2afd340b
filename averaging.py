"""A running average of G's weights: a steadier G kept beside the one that trains, in which it has no part.

At a constant learning rate G's weights keep circling around a good place; their average lies nearer to it. See
Yazici et al., "The Unusual Effectiveness of Averaging in GAN Training", arXiv:1806.04498.
"""

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


def floats(network: torch.nn.Module) -> list[torch.Tensor]:
    """Weights and statistics: all but the counters."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


class RunningAverage:
    """The exponential moving average of a network's weights and batch-norm statistics.

    Args:
        source: the network that trains; it is only read.
        decay: in [0, 1); the average reaches back about 1 / (1 - decay) batches, but at most a quarter of those done.
            0 keeps it equal to the source.
    """

    def __init__(self, source: torch.nn.Module, decay: float):
        self.source, self.decay = source, decay
        self.network = copy.deepcopy(source)
        self.ours, self.theirs = floats(self.network), floats(source)

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the source as it is after `steps` batches."""
        decay = min(self.decay, steps / (steps + 4))
        get_ema_multi_avg_fn(decay)(self.ours, self.theirs, None)

    def restart(self) -> None:
        """Begin anew with the source as it is."""
        self.network.load_state_dict(self.source.state_dict())

    def state_dict(self) -> dict:
        return self.network.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state)
