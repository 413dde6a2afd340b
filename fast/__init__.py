"""All that is only faster: the same mathematics but for rounding, compiled, captured or plain."""

from fast.bfloat16 import InBfloat16
from fast.compile import compiled
from fast.convolutions import use_fast_layers
from fast.cuda_graph import CapturedBatches
from fast.process import keep_memory

__all__ = ["batch", "use_fast_layers"]


def batch(train_batch, update, networks, optimizers, opt, plan, batches):
    """Return the fastest way that this device has to train on a batch: a function of its indices and its number.

    It calls train_batch(generator, discriminator, indices). An `update` that has a method prepare(step, *optimizers)
    has it called before each batch; what that returns names the kind of the batch. Only full `batches` use a compiled
    G. A CUDA graph needs them in the device's memory. From here on freed memory is kept. What the function returns may
    be overwritten by its next call.
    """
    wrap = InBfloat16 if opt.amp == "bf16" else as_it_is
    generator, discriminator = map(wrap, networks)
    full_generator = compiled(networks[0], opt.batch_size, wrap) if plan.compile == "on" else None
    if full_generator is None:
        plan.compile, full_generator = "off", generator
    device = next(generator.parameters()).device
    keep_memory(device)
    prepare = getattr(update, "prepare", None)

    def run(indices, kind=None):
        return train_batch(full_generator if len(indices) == batches.batch_size else generator, discriminator, indices)

    # several ranks talk to each other in mid-batch
    if device.type == "cuda" and plan.world_size == 1 and batches.in_memory:
        run = CapturedBatches(run, discriminator)
    return lambda indices, step: run(indices, prepare(step, *optimizers) if prepare else None)


def as_it_is(network):
    """Return the network: it computes in float32."""
    return network
