"""A compiled generator."""

import copy
import errno
import logging
import os
import re
import time

import torch

from utils import BadInput, announce, first_line, on_terminal

# a compiler's or a linker's error, without the place in the text that it is about
COMPLAINT = re.compile(r"\b(fatal )?error( [A-Z]+\d+)?: .+|\bld(\.\w+)?: (?!warning).+", re.IGNORECASE)
BREAK_EVEN = 1_500  # batches of a run; compiling won its time back after 800 with AVX-512, once after 1,300 without


def choose_compile(opt, device: torch.device, world_size: int, total_steps: int, has_full_batch: bool) -> str:
    """Turn `--compile` into "on" or "off": auto compiles on a CPU, on one rank, if the run has many full batches.

    Raises BadInput for "on" with several ranks.
    """
    if opt.compile == "on" and world_size > 1:
        raise BadInput("argument --compile: on works on one rank only: drop it")
    if opt.compile != "auto":
        return opt.compile
    possible = device.type == "cpu" and world_size == 1
    pays = total_steps >= BREAK_EVEN and has_full_batch
    if possible and not pays and on_terminal():
        announce(f"Compile: off, as a run of fewer than {BREAK_EVEN:,} full batches does not win back its time.")
    return "on" if possible and pays else "off"


def compiled(generator, batch_size: int, wrap):
    """Return wrap(G), G compiled, and run once on made-up data. If that fails, say so, and return None.

    D stays as it is: its few multiplications leave a compiler nothing to win.
    """
    announce("Compiling the generator; this takes about half a minute, longer on a slow machine ...")
    logger, start = logging.getLogger("torch.utils.cpp_extension"), time.monotonic()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns if CUDA has no GPU
    try:
        fast = wrap(CompiledGenerator(generator))
        rehearse(generator, fast, batch_size)
    except Exception as error:  # a missing compiler, an unsupported Python, ...: there is a long list
        announce(f"Compile: off, as it failed here: {complaint(error)}")
        return None
    finally:
        logger.setLevel(level)
    announce(f"Compiled in {time.monotonic() - start:.0f} s.")
    return fast


def complaint(error: Exception) -> str:
    """Return the first error in what the compiler printed, if PyTorch quotes it, or else the error's first line."""
    output = str(error).partition("\nOutput:\n")[2]
    if found := COMPLAINT.search(output):
        return found[0]
    line = output.partition("\n")[0].strip() or first_line(error)
    return f"{line}: {os.environ.get('TORCHINDUCTOR_CACHE_DIR')}" if line.endswith(os.strerror(errno.ENOSPC)) else line


class CompiledGenerator(torch.nn.Module):
    """G, compiled from its embedded labels on.

    A compiled embedding adds up its gradient in the order that its threads come, so no run would be the same twice.
    """

    def __init__(self, generator):
        super().__init__()
        self.generator = generator
        for layer in generator.modules():
            if isinstance(layer, torch.nn.LeakyReLU):
                layer.inplace = False  # in place, its gradient would read one tensor more: the result
        self.decode = torch.compile(generator.decode, dynamic=False)

    def forward(self, noise, labels):
        return self.decode(self.generator.label_emb(labels), noise)


def rehearse(generator, fast, batch_size: int) -> None:
    """Run a made-up batch forward and backward through `fast`, the compiled G, which keeps its state."""
    config, device = generator.config, next(generator.parameters()).device
    before = copy.deepcopy(generator.state_dict())
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            z = torch.randn(batch_size, config["latent_dim"], device=device)
            labels = torch.randint(config["n_classes"], (batch_size,), device=device)
            fast(z, labels).sum().backward()
    finally:
        generator.load_state_dict(before)
        generator.zero_grad(set_to_none=True)
