"""What makes a batch fast without changing its mathematics: memory kept, compiled networks, CUDA graphs, bf16."""

import ctypes
import logging
import os
import statistics
import sys
import time
from collections import Counter

import torch
from torch.nn.parallel import DistributedDataParallel

from utils import Stopped, announce, on_terminal


def tune_process(device: torch.device) -> None:
    """Settings of the whole process; to be called before the first large tensor is made.

    CPU on Linux: glibc gives every large block back to the kernel when it is freed, and the next one is faulted in
    anew, page by page: up to half of a batch's time. Here it keeps them, and asks for large pages.
    CUDA: cuDNN picks its fastest algorithms by trying, and float32 products may use TF32.
    """
    if device.type == "cpu" and sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch's allocator at its first use
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from malloc.h
            mallopt(m_mmap_max, 0)
            mallopt(m_trim_threshold, 2**31 - 1)
            mallopt(m_top_pad, 2**28)
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def in_bf16(network):
    """`network` as a function that computes in bfloat16 where autocast holds it safe, and returns float32."""
    device_type = next(network.parameters()).device.type

    def call(*inputs):
        # no cache of cast weights: it would outlive a CUDA graph's capture
        with torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False):
            out = network(*inputs)
        return tuple(tensor.float() for tensor in out) if isinstance(out, tuple) else out.float()

    return call


def in_float32(layer, inputs):
    """A hook for D's last layers: in bfloat16 a probability near 1 would become 1, without a gradient."""
    return tuple(tensor.float() for tensor in inputs)


def accelerate(
    train_batch, generator, discriminator, batch_size: int, steps: int, compile: str, amp: str, capture: bool = True
):
    """The fastest way that this device has to call `train_batch(generator, discriminator, indices)`.

    Args:
        train_batch: does all the work of one batch on the device, without waiting for it, and returns metrics.
        generator, discriminator: the networks, on their device.
        batch_size: indices in a full batch; smaller ones are computed too.
        steps: batches that the run will have.
        compile: "on", "off", or "auto", which compiles on a CPU when the run is long enough. Networks shared by several
            processes are neither compiled nor captured.
        amp: "off" or "bf16".
        capture: on a CUDA device, replay the batch as a graph; then train_batch must find its inputs where they were,
            but for the indices.

    Returns:
        A function of the indices.
    """
    networks = (generator, discriminator)
    shared = isinstance(generator, DistributedDataParallel)  # it talks to other processes in mid-batch
    plain = networks
    if amp == "bf16":
        for layer in discriminator.modules():
            if isinstance(layer, torch.nn.Sigmoid | torch.nn.Softmax):
                layer.register_forward_pre_hook(in_float32)
        plain = tuple(in_bf16(network) for network in networks)
    call = CompiledBatches(train_batch, networks, plain, batch_size, steps, "off" if shared else compile, amp)
    on_cuda = next(generator.parameters()).device.type == "cuda"
    return CapturedBatches(call) if capture and on_cuda and not shared else call


class CompiledBatches:
    """Calls `train_batch` with compiled networks on full batches, from the moment when that pays.

    "auto" times 20 eager batches, compiles, times 20 compiled ones, and goes back if they are not faster. The
    random stream stays that of the eager run: compiled dropout draws from it too, and compiling leaves it alone.
    """

    BREAK_EVEN = 5_000  # batches; twice what was measured: README, "Speed"
    SKIPPED, TIMED = 5, 20  # batches

    def __init__(self, train_batch, networks, plain, batch_size, steps, compile, amp):
        self.train_batch, self.networks, self.plain, self.amp = train_batch, networks, plain, amp
        self.batch_size = batch_size
        self.fast = None
        self.seconds = []
        on_cpu = next(networks[0].parameters()).device.type == "cpu"
        self.deciding = compile == "auto" and on_cpu and steps >= self.BREAK_EVEN
        if compile == "auto" and on_cpu and not self.deciding and on_terminal():
            announce(f"Compile: off, as less than {self.BREAK_EVEN:,} batches do not win back the time it takes.")
        if compile == "on":
            self.compile()

    def __call__(self, indices):
        full = len(indices) == self.batch_size
        networks = self.fast if self.fast and full else self.plain
        if not (self.deciding and full):
            return self.train_batch(*networks, indices)
        start = time.perf_counter()
        metrics = self.train_batch(*networks, indices)
        self.seconds.append(time.perf_counter() - start)
        if len(self.seconds) == self.SKIPPED + self.TIMED:
            self.decide()
        return metrics

    def decide(self) -> None:
        """After the timed eager batches: compile. After the timed compiled ones: keep the faster way."""
        timed = statistics.median(self.seconds[self.SKIPPED :])
        self.seconds = []
        if self.fast is None:
            self.eager_seconds = timed
            self.compile()
            self.deciding = self.fast is not None
        else:
            self.deciding = False
            if timed >= self.eager_seconds:
                self.fast = None
                announce("Compile: off, as compiled batches were not faster on this machine.")

    def compile(self) -> None:
        """Compile both networks, and rehearse so that no real batch has to wait or can fail; else say why not."""
        if on_terminal():
            announce("Compiling the networks: about half a minute, once for this machine ...")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where CUDA has no GPU
        try:
            fast = [
                torch.compile(network, dynamic=False, options={"fallback_random": True}) for network in self.networks
            ]
            if self.amp == "bf16":
                fast = [in_bf16(network) for network in fast]
            self.rehearse(*fast)
            self.fast = fast
        except Stopped:
            pass  # the loop, which knows of the signal too, ends the run in good order
        except Exception as error:  # a missing compiler, an unsupported Python, ...: there is a long list
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            announce(f"Compile: off, as it failed here: {reason}")

    def rehearse(self, generator, discriminator) -> None:
        """One made-up batch forward and backward; the random state and the networks' state stay as they were."""
        config, device = self.networks[0].config, next(self.networks[0].parameters()).device
        buffers = [buffer for network in self.networks for buffer in network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                z = torch.randn(self.batch_size, config["latent_dim"], device=device)
                labels = torch.randint(config["n_classes"], (self.batch_size,), device=device)
                imgs = generator(z, labels)
                for batch in (imgs.detach(), imgs):  # as in D's update, and as in G's
                    validity, label = discriminator(batch)
                    (validity.sum() + label.sum()).backward()
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            for network in self.networks:
                network.zero_grad(set_to_none=True)


class CapturedBatches:
    """Replays the whole batch as one CUDA graph, so that the host only starts it; one graph for each batch size.

    The first batches of a size run as they are, on a side stream, as capturing asks for; they train like all
    others. If capturing fails, one line says so and the batches go on as they are. The returned metrics are
    overwritten by the next batch.
    """

    WARM_UP = 3  # batches

    def __init__(self, call):
        self.call = call
        self.graphs = {}
        self.seen = Counter()
        self.works = True
        self.side = torch.cuda.Stream()

    def __call__(self, indices):
        size = len(indices)
        if size in self.graphs:
            return self.replay(indices)
        self.seen[size] += 1
        if self.works and self.seen[size] > self.WARM_UP:
            try:
                self.capture(indices)
                return self.replay(indices)
            except RuntimeError as error:
                self.works = False
                announce(
                    f"CUDA graph: off, as capturing failed; --cuda_graph off avoids it: {str(error).splitlines()[0]}"
                )
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            metrics = self.call(indices)
        torch.cuda.current_stream().wait_stream(self.side)
        return metrics

    def capture(self, indices) -> None:
        graph, static_indices = torch.cuda.CUDAGraph(), indices.clone()
        with torch.cuda.graph(graph):  # records, but does not run
            metrics = self.call(static_indices)
        self.graphs[len(indices)] = graph, static_indices, metrics

    def replay(self, indices):
        graph, static_indices, metrics = self.graphs[len(indices)]
        static_indices.copy_(indices)
        graph.replay()
        return metrics
