"""What surrounds the batches of a training: epochs, stop requests, rows, scores and checkpoints, in their order."""

import contextlib

from data.batches import Batches
from data.drawing import GRID_CLASSES, draw_images, fixed_noise
from run.checkpoint import Checkpoints
from run.plan import Plan
from run.ranks import Ranks, cause
from run.record import Record, disk_errors_hidden
from utils import StopRequest, announce


class Run:
    """A run in progress, for a `with` block: it locks the run's folder and listens for Ctrl-C.

    `step` is the number of the batch at hand, counted from 0; as the run ends, the batches done. `parts` are what a
    checkpoint holds, by name. `scorer` has if_due(step, record, ema, discriminator), or is None. Only rank 0 writes.
    Raises OSError if the folder cannot be written, BadInput if another run writes there, and Diverged or LostRank.
    """

    def __init__(self, opt, plan: Plan, ranks: Ranks, batches: Batches, parts: dict, scorer, step: int):
        self.opt, self.plan, self.ranks, self.parts, self.scorer, self.step = opt, plan, ranks, parts, scorer, step
        self.all_batches, self.ended = batches, False
        self.fixed_noise = fixed_noise(plan.n_classes, opt.latent_dim)

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.stop, self.record = stack.enter_context(StopRequest()), None
            if not self.ranks.rank:
                stack.enter_context(disk_errors_hidden())
                self.record = Record(self.opt, self.plan, self.ranks.device, len(self.all_batches), self.step)
                stack.callback(self.record.close)
                self.checkpoints = Checkpoints(self.opt, self.plan, self.ranks.device, self.record, self.parts)
            self.resources = stack.pop_all()
        if self.step and self.opt.compile == "on" != self.plan.compile:
            announce("The run resumes, but not bit-exactly: it was compiled before.")
        if self.plan.n_classes > GRID_CLASSES:
            announce(f"Sample grids: the first {GRID_CLASSES} of {self.plan.n_classes} classes.")
        return self

    def __exit__(self, kind, error, traceback):
        self.resources.close()
        if known := cause(error, self.step):
            raise known from error

    def graph(self, *networks_and_inputs) -> None:
        """Write TensorBoard's graph of both networks; a resumed run has it already."""
        if self.record and not self.step:
            self.record.graph(*networks_and_inputs)

    def epochs(self):
        """Yield the number of each epoch that is left, counted from 0."""
        for epoch in range(self.step // len(self.all_batches), self.opt.n_epochs):
            if self.ended:
                return
            yield epoch

    def batches(self, epoch: int):
        """Yield the indices of each batch that is left of an epoch."""
        batches = self.record.progress(epoch, self.step, self.all_batches) if self.record else self.all_batches
        for indices in batches:
            self.indices = indices
            self.ranks.reseed(self.plan.seed, self.step)
            yield indices
            if self.ended:
                return

    def grids(self, fake_image) -> None:
        """Write the tutorial's sample grid of this batch, and one of the same noise every time, in eval mode."""
        if self.record:
            self.record.grid("fake_image", fake_image, self.step)
            self.record.grid("fixed_z", draw_images(self.parts["generator"], *self.fixed_noise), self.step)

    def after_batch(self, metrics: dict) -> None:
        """Record the batch, and do what is due after it. Scores come before the checkpoint that has their batch."""
        done = self.step + 1
        if self.record:
            self.record.batch(self.step, metrics)
        self.ended = self.ranks.any(self.stop.requested) or done == self.plan.total_steps  # every rank must ask
        if self.record:
            if self.all_batches.position == len(self.all_batches) or self.ended:
                self.record.end_epoch(self.step, self.all_batches.gather(self.indices)[0], metrics)
            if self.scorer:
                self.scorer.if_due(done, self.record, self.parts["ema"], self.parts["discriminator"])
            if not self.ended:
                self.checkpoints.save_if_due(done)
        self.step = done

    def finish(self) -> int:
        """Write the last checkpoint, the weights and the film, and return the exit status of the command.

        The weights are tried even if no checkpoint can be written. Raises Diverged and OSError.
        """
        finished = self.step == self.plan.total_steps
        if self.record:
            self.record.grid("fixed_z", draw_images(self.parts["generator"], *self.fixed_noise), self.step - 1)
            networks = [self.parts[name] for name in ("generator", "discriminator", "ema")]
            try:
                self.checkpoints.save(self.step, finished)
            except OSError:
                self.record.finish(self.step, *networks)
                raise
            self.record.finish(self.step, *networks)
            self.record.say_end(self.step)
        return 0 if finished else self.stop.exit_status
