"""A whole batch as one CUDA graph."""

from collections import Counter

import torch

from utils import announce


class CapturedBatches:
    """Replays the whole batch as one CUDA graph, so that the host only starts it.

    There is one graph for each size and kind of batch. Before, a few batches are not captured, but run on a side
    stream, as PyTorch asks; they train like all others. If capturing fails, one line says so, and what has no graph
    stays uncaptured. The next batch overwrites the returned metrics.
    """

    WARM_UP = 3  # batches

    def __init__(self, run, discriminator):
        self.run, self.discriminator = run, discriminator
        self.graphs = {}
        self.seen = Counter()
        self.works = True
        self.side = torch.cuda.Stream()

    def __call__(self, indices, kind=None):
        key = len(indices), kind
        if key in self.graphs:
            return self.replay(key, indices)
        self.seen[key] += 1
        if self.works and self.seen[key] > self.WARM_UP:
            try:
                self.capture(key, indices)
            except RuntimeError as error:
                self.give_up(error)
            else:
                return self.replay(key, indices)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            metrics = self.run(indices)
        torch.cuda.current_stream().wait_stream(self.side)
        return metrics

    def capture(self, key, indices) -> None:
        graph, static_indices = torch.cuda.CUDAGraph(), indices.clone()
        with torch.cuda.graph(graph):  # records, but does not run
            metrics = self.run(static_indices)
        self.graphs[key] = graph, static_indices, metrics

    def give_up(self, error: RuntimeError) -> None:
        """Say that no more graphs are captured, and undo what a capture that broke off leaves."""
        first = error.__context__ or error  # the end of the capture fails too, and says less
        announce(f"CUDA graph: off, as capturing failed: {str(first).splitlines()[0]}")
        self.works = False
        self.discriminator.requires_grad_(True)  # G's update leaves it out for a while
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        random.graphsafe_set_state(random.clone_state())  # before PyTorch 2.13 the old one waits for the capture's end

    def replay(self, key, indices):
        graph, static_indices, metrics = self.graphs[key]
        static_indices.copy_(indices)
        graph.replay()
        return metrics
