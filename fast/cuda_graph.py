"""A whole batch as one CUDA graph."""

from collections import Counter

import torch

from utils import announce, first_line


class CapturedBatches:
    """Replays the whole batch as one CUDA graph, so that the host only starts it.

    There is one graph for each size and kind of batch. Before, a few batches are not captured, but run on a side
    stream, as PyTorch asks; they train like all others. If capturing fails, one line says so, and all stay
    uncaptured. The next batch overwrites the returned metrics.
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
                if "device-side assert" in str(error):  # of an earlier batch
                    raise
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
        # the outer block restores the stream even if the end of the capture fails
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # records, but does not run
            metrics = self.run(static_indices)
        self.graphs[key] = graph, static_indices, metrics

    def give_up(self, error: RuntimeError) -> None:
        """Say that there are no graphs from now on, and undo what a capture that broke off leaves."""
        # the end of the capture fails too, and says less than what it follows
        announce(f"CUDA graph: off, as capturing failed: {first_line(error.__context__ or error)}")
        self.works = False
        self.graphs.clear()  # they would draw from the random state that is replaced below
        self.discriminator.requires_grad_(True)  # G's update leaves it out for a while
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        random.graphsafe_set_state(random.clone_state())  # before PyTorch 2.13 the old one waits for the capture's end

    def replay(self, key, indices):
        graph, static_indices, metrics = self.graphs[key]
        static_indices.copy_(indices)
        graph.replay()
        return metrics
