"""What makes a batch fast without changing its mathematics: kept memory, a compiled G, CUDA graphs, bf16."""

import copy
import ctypes
import logging
import mmap
import os
import sys
import time
from collections import Counter

import torch
from torch.nn.parallel import DistributedDataParallel

from utils import BadInput, announce, on_terminal

BREAK_EVEN = 1_500  # batches of a run; compiling won its time back after 800 with AVX-512, once after 1,300 without
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # from glibc's malloc.h


def tune_process(device: torch.device, threads: int | None = None) -> None:
    """Set up the whole process; call this before the first large tensor is made.

    Threads: sums on a CPU are split among them, so a resumed run needs the `threads` that it had. They are set even if
    nothing changes: otherwise MKL may choose fewer by itself, in some starts of the same program (docs/resume.md).
    CUDA: cuDNN picks its fastest algorithms by trying, and float32 products may use TF32.
    """
    possible = type(threads) is int and 1 <= threads <= (os.cpu_count() or 1)
    torch.set_num_threads(threads if possible else torch.get_num_threads())
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif libc := glibc():
        libc.mallopt(M_MMAP_THRESHOLD, 2**17)  # its default, which would grow: large blocks go back when they are freed


def keep_memory(device: torch.device) -> None:
    """From here on, keep what is freed for the next batch, in large pages; for a CPU on Linux.

    glibc returns every large block to the kernel when it is freed, and the next one is mapped again, page by page: up
    to half of a batch's time. Call this when the data are loaded and G is compiled: what they leave would only be holes
    that the blocks of a batch do not fit into.
    """
    libc = glibc() if device.type == "cpu" else None
    if not libc:
        return
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**28)
    # PyTorch's own way to large pages (THP_MEM_ALLOC_ENABLE) aligns blocks to pages, which leaves more holes
    start = libc.sbrk(0)
    libc.free(libc.malloc(2**26))  # larger than any hole, so the heap grows, by that and the padding
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.madvise(start, libc.sbrk(0) - start, mmap.MADV_HUGEPAGE)


def glibc():
    """Return the C library, with the types of what is called here, or None if it is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return None
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.restype, libc.malloc.argtypes = address, [size]
    libc.free.argtypes = [address]
    libc.sbrk.restype, libc.sbrk.argtypes = address, [ctypes.c_ssize_t]
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    libc.malloc_trim.argtypes = [size]
    return libc


def choose_compile(opt, device: torch.device) -> str:
    """Turn `--compile` into "on" or "off": auto compiles on a CPU, on one rank, if the whole run has many full batches.

    Raises BadInput for "on" with several ranks.
    """
    if opt.compile == "on" and opt.world_size > 1:
        raise BadInput("argument --compile: on works on one rank only: drop it")
    if opt.compile != "auto":
        return opt.compile
    possible = device.type == "cpu" and opt.world_size == 1
    pays = opt.total_steps >= BREAK_EVEN and opt.n_images >= opt.batch_size
    if possible and not pays and on_terminal():
        announce(f"Compile: off, as a run of fewer than {BREAK_EVEN:,} full batches does not win back its time.")
    return "on" if possible and pays else "off"


def accelerate(train_batch, generator, discriminator, batch_size: int, compile: str, amp: str, in_memory: bool = True):
    """Return the fastest way that this device has to call `train_batch(generator, discriminator, indices, penalised)`.

    From here on freed memory is kept. Only full batches use a compiled G. A CUDA graph needs batches from the device's
    memory. Returns a function of the indices and `penalised`; what it returns may be overwritten by its next call.
    """
    plain = fast = (generator, discriminator)
    if amp == "bf16":
        for layer in discriminator.modules():
            if isinstance(layer, torch.nn.Sigmoid | torch.nn.Softmax):
                layer.register_forward_pre_hook(to_float32)
        plain = fast = tuple(InBfloat16(network) for network in plain)
    if compile == "on":
        fast = compiled(generator, plain[0], batch_size, amp), plain[1]
    device = next(generator.parameters()).device
    keep_memory(device)

    def call(indices, penalised=False):
        return train_batch(*(fast if len(indices) == batch_size else plain), indices, penalised)

    one_rank = not isinstance(generator, DistributedDataParallel)  # several talk to each other in mid-batch
    return CapturedBatches(call, discriminator) if device.type == "cuda" and one_rank and in_memory else call


class InBfloat16(torch.nn.Module):
    """A network that computes in bfloat16 where autocast finds it safe, and returns float32."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.device_type = next(network.parameters()).device.type

    def forward(self, *inputs):
        # no cache of cast weights: it would outlive a CUDA graph's capture
        with torch.autocast(self.device_type, dtype=torch.bfloat16, cache_enabled=False):
            out = self.network(*inputs)
        return tuple(tensor.float() for tensor in out) if isinstance(out, tuple) else out.float()


def to_float32(layer, inputs):
    """Hook D's last layers: in bfloat16 a probability near 1 would become 1, without a gradient."""
    return tuple(tensor.float() for tensor in inputs)


def compiled(generator, plain, batch_size: int, amp: str):
    """Compile G and run it once on made-up data. If that fails, say so, and return `plain`.

    D stays as it is: its few multiplications leave a compiler nothing to win.
    """
    if on_terminal():
        announce("Compiling the generator; this takes about half a minute, longer on a slow machine ...")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if CUDA has no GPU
    start = time.monotonic()
    try:
        fast = CompiledGenerator(generator)
        if amp == "bf16":
            fast = InBfloat16(fast)
        rehearse(generator, fast, batch_size)
    except Exception as error:  # a missing compiler, an unsupported Python, ...: there is a long list
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        announce(f"Compile: off, as it failed here: {reason}")
        return plain
    if on_terminal():
        announce(f"Compiled in {time.monotonic() - start:.0f} s.")
    return fast


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


class CapturedBatches:
    """Replays the whole batch as one CUDA graph, so that the host only starts it.

    There is one graph for each kind of batch: its size, and whether it is penalised. The first batches of a kind run
    uncaptured, on a side stream, as PyTorch asks; they train like all others. If capturing fails, one line says so and
    the batches stay uncaptured. The next batch overwrites the returned metrics.
    """

    WARM_UP = 3  # batches

    def __init__(self, call, discriminator):
        self.call, self.discriminator = call, discriminator
        self.graphs = {}
        self.seen = Counter()
        self.works = True
        self.side = torch.cuda.Stream()

    def __call__(self, indices, penalised=False):
        kind = len(indices), penalised
        if kind in self.graphs:
            return self.replay(kind, indices)
        self.seen[kind] += 1
        if self.works and self.seen[kind] > self.WARM_UP:
            current = torch.cuda.current_stream()
            try:
                self.capture(kind, indices)
            except RuntimeError as error:
                if "device-side assert" in str(error):  # of an earlier batch
                    raise
                torch.cuda.set_stream(current)
                self.give_up(str(error).splitlines()[0])
            else:
                return self.replay(kind, indices)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            metrics = self.call(indices, penalised)
        torch.cuda.current_stream().wait_stream(self.side)
        return metrics

    def capture(self, kind, indices) -> None:
        graph, static_indices = torch.cuda.CUDAGraph(), indices.clone()
        with torch.cuda.graph(graph):  # records, but does not run
            metrics = self.call(static_indices, kind[1])
        self.graphs[kind] = graph, static_indices, metrics

    def give_up(self, reason: str) -> None:
        """Say that there are no graphs from now on, and undo what a capture that broke off leaves."""
        announce(f"CUDA graph: off, as capturing failed: {reason}")
        self.works = False
        self.graphs.clear()
        self.discriminator.requires_grad_(True)  # G's update leaves it out for a while
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        random.graphsafe_set_state(random.clone_state())  # before PyTorch 2.13 the old one waits for the capture's end

    def replay(self, kind, indices):
        graph, static_indices, metrics = self.graphs[kind]
        static_indices.copy_(indices)
        graph.replay()
        return metrics
