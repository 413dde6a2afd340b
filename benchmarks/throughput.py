"""How many batches a second: this script's own training path against a plain loop written as the tutorial trains.

    python benchmarks/throughput.py                # about five minutes on two cores; nothing else should run
    python benchmarks/throughput.py --isa avx2     # as on a processor without AVX-512, emulated
    python benchmarks/throughput.py --busy         # ours alone: quiet, and beside one busy process, in turns
    python benchmarks/throughput.py --until_epoch 1   # ours alone: from the typed command to the end of an epoch
    python benchmarks/throughput.py --markdown     # as docs/speed.md shows it; or --json

Each side has a process of its own and trains all the time with its own settings; they take turns, round by round,
so that both meet the same load. `ours` is `acgan.train` itself, with the default flags of a
200-epoch run, its bar, logs and grids; it has compiled what it wants to compile before the first timed round.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if sys.argv[1:3] == ["--side", "ours"]:  # the tutorial's side keeps PyTorch's own settings
    import before_torch  # noqa: F401

import numpy as np  # noqa: E402 (needs the line above)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

import acgan  # noqa: E402
import run.loop  # noqa: E402
from data import builtin  # noqa: E402
from fast.convolutions import NarrowConv2d, UpsampleConv2d, use_fast_layers  # noqa: E402
from models import Discriminator, Generator, weights_init_normal  # noqa: E402

# What keeps PyTorch, oneDNN and MKL from AVX-512. Compiled code is kept apart: it would crash a process without these.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "acgan_avx2_compiled")}  # fmt: skip
BUSY = "while True: pass"
WARM_UP = 30  # batches before the first timed round
DROPPED = 20  # batches at the start of a round: what the tutorial's workers had loaded ahead


class PerImageMNIST(torch.utils.data.Dataset):
    """The training digits, each resized and normalised when it is asked for, as the tutorial does."""

    def __init__(self):
        from torchvision import transforms

        self.pixels, self.labels = (builtin.read_idx(builtin.BUNDLED / name, "") for name in builtin.IDX[:2])
        steps = [transforms.Resize(32), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def tutorial_batches(device: torch.device, workers: int):
    """Train as the tutorial's script does; yields after each batch."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    cuda = device.type == "cuda"
    FloatTensor = torch.cuda.FloatTensor if cuda else torch.FloatTensor
    LongTensor = torch.cuda.LongTensor if cuda else torch.LongTensor
    loader = torch.utils.data.DataLoader(PerImageMNIST(), batch_size=64, shuffle=True, num_workers=workers)
    adversarial_loss, auxiliary_loss = torch.nn.BCELoss(), torch.nn.CrossEntropyLoss()
    generator = Generator().apply(weights_init_normal).to(device)
    discriminator = Discriminator().apply(weights_init_normal).to(device)
    optimizer_G = torch.optim.Adam(generator.parameters(), lr=0.0002, betas=(0.5, 0.999))
    optimizer_D = torch.optim.Adam(discriminator.parameters(), lr=0.0002, betas=(0.5, 0.999))
    while True:
        for imgs, labels in loader:
            size = imgs.shape[0]
            valid, fake = FloatTensor(size, 1).fill_(1.0), FloatTensor(size, 1).fill_(0.0)
            real_imgs, labels = imgs.type(FloatTensor), labels.type(LongTensor)
            z = FloatTensor(np.random.normal(0, 1, (size, 100)))
            gen_labels = LongTensor(np.random.randint(0, 10, size))
            gen_imgs = generator(z, gen_labels)

            optimizer_D.zero_grad()
            real_pred, real_aux = discriminator(real_imgs)
            d_real_loss = (adversarial_loss(real_pred, valid) + auxiliary_loss(real_aux, labels)) / 2
            fake_pred, fake_aux = discriminator(gen_imgs.detach())
            d_fake_loss = (adversarial_loss(fake_pred, fake) + auxiliary_loss(fake_aux, gen_labels)) / 2
            d_loss = (d_real_loss + d_fake_loss) / 2
            pred = np.concatenate([real_aux.data.cpu().numpy(), fake_aux.data.cpu().numpy()], axis=0)
            gt = np.concatenate([labels.data.cpu().numpy(), gen_labels.data.cpu().numpy()], axis=0)
            np.mean(np.argmax(pred, axis=1) == gt)
            d_loss.backward()
            optimizer_D.step()

            optimizer_G.zero_grad()
            validity, pred_label = discriminator(gen_imgs)
            g_loss = 0.5 * (adversarial_loss(validity, valid) + auxiliary_loss(pred_label, gen_labels))
            g_loss.backward()
            optimizer_G.step()
            d_loss.item(), g_loss.item()
            yield


class Rounds:
    """In the side's process: lets it run when the parent says so, and reports each round's seconds."""

    def __init__(self, device: torch.device, batches: int):
        self.device, self.batches, self.left, self.start = device, batches, WARM_UP, None

    def after_batch(self) -> None:
        self.left -= 1
        if self.left == self.batches and self.start is None and self.dropping:
            self.wait_for_device()
            self.dropping, self.start = False, time.perf_counter()
        if self.left:
            return
        self.wait_for_device()
        seconds = time.perf_counter() - self.start if self.start else None
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({"seconds": seconds, "memory": memory}), flush=True)
        if sys.stdin.readline() != "go\n":
            os._exit(0)  # not a clean-up worth waiting for
        self.left, self.start, self.dropping = DROPPED + self.batches, None, True

    def wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    dropping = False


def run_side(opt, device: torch.device) -> None:
    """The life of one side's process."""
    rounds = Rounds(device, opt.batches)
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        torch._inductor.config.cpp.simdlen = 256  # bits; without it compiled code is slower than on a real AVX2
    if opt.side == "tutorial":
        for _ in tutorial_batches(device, opt.workers):
            rounds.after_batch()

    class TimedRecord(run.loop.Record):
        def batch(self, *args) -> None:
            super().batch(*args)
            rounds.after_batch()

    run.loop.Record = TimedRecord
    if opt.without == "fold":
        layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        acgan.fast.use_fast_layers = lambda G, D: D.to(memory_format=layout)
    if opt.without == "share":
        UpsampleConv2d.share = UpsampleConv2d.fold
    if opt.without == "sum_taps":
        NarrowConv2d.sum_taps = lambda self, x: F.conv2d(x, self.weight, self.bias, padding=1)
    with tempfile.TemporaryDirectory() as out_dir:
        sys.exit(acgan.main(["--out_dir", out_dir, "--device", device.type, *opt.flags]))


class Side:
    """The parent's handle on one side's process."""

    def __init__(self, name: str, opt):
        command = [sys.executable, __file__, "--side", name, "--device", opt.device, "--batches", str(opt.batches)]
        command += ["--workers", str(opt.workers), *without_flag(opt), *opt.flags]
        env = os.environ | (AVX2 if opt.isa == "avx2" else {})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.memory = self.read()["memory"]  # also the end of its warm-up

    def read(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("throughput.py: error: a side ended early; its message stands above")

    def round(self) -> float:
        """Let it run one round; seconds for its timed batches."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        report = self.read()
        self.memory = report["memory"]
        return report["seconds"]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def without_flag(opt) -> list[str]:
    return ["--without", opt.without] if opt.without else []


def multiply_adds() -> float:
    """Multiply-adds of one training step of 64 images, of matrix products and convolutions, as a compiled G does."""
    from torch.utils.flop_counter import FlopCounterMode

    ours = {torch.ops.acgan.multiply: lambda pixels, kernels, **_: 2 * math.prod(pixels) * kernels[1],
            torch.ops.acgan.multiply_back: lambda grad, pixels, **_: 2 * math.prod(pixels) * grad[4]}  # fmt: skip
    generator, discriminator = Generator(), Discriminator()
    use_fast_layers(generator, discriminator)
    optimizers = [torch.optim.Adam(network.parameters()) for network in (generator, discriminator)]
    labels = torch.zeros(64, dtype=torch.long)
    shared = mock.patch.object(UpsampleConv2d, "forward", UpsampleConv2d.share)
    with shared, FlopCounterMode(display=False, custom_mapping=ours) as counter:
        inputs = torch.zeros(64, 1, 32, 32), labels, torch.randn(64, 100), labels
        acgan.train_step(generator, discriminator, *optimizers, *inputs)
    return counter.get_total_flops() / 2


def matmul_rate(device: torch.device) -> float:
    """Multiply-adds a second of a float32 matrix product of 2048: the better of torch.mm and a 1x1 convolution."""
    n = 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    image, kernel = a.view(1, n, n, 1), b.view(n, n, 1, 1)  # the same product, by the convolution library
    best = float("inf")
    for product in (lambda: torch.mm(a, b), lambda: F.conv2d(image, kernel)):
        for _ in range(6):
            start = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return n**3 / best


def beside_a_busy_process(opt) -> dict:
    """Time ours, quiet and beside a process that keeps one core busy, in turns; batches a second and their ratio."""
    side, times = Side("ours", opt), {"quiet": [], "busy": []}
    try:
        for _ in range(opt.rounds):
            times["quiet"].append(side.round())
            busy = subprocess.Popen([sys.executable, "-c", BUSY])
            try:
                times["busy"].append(side.round())
            finally:
                busy.kill()
                busy.wait()
    finally:
        side.stop()
    ratios = [busy / quiet for quiet, busy in zip(times["quiet"], times["busy"], strict=True)]
    per_second = {name: spread([opt.batches / seconds for seconds in values]) for name, values in times.items()}
    return {"batches_per_second": per_second, "times_as_long": spread(ratios)}


def time_to_picture(opt) -> dict[str, float]:
    """Type the command, with nothing compiled yet; return the seconds to the first grid and to the end of an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "acgan.py", "--out_dir", folder, "--device", opt.device, *opt.flags]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
        first_grid = Path(folder) / "images" / "0.png"
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        try:
            while not first_grid.exists() and process.poll() is None:
                time.sleep(0.02)
            seconds = {"first grid": time.perf_counter() - start}
            for line in process.stdout:  # one for each epoch
                if line.split()[:1] == ["epoch"] and line.split()[1].startswith(f"{opt.until_epoch}/"):
                    return seconds | {f"end of epoch {opt.until_epoch}": time.perf_counter() - start}
        finally:
            process.kill()
            process.wait()
    raise SystemExit("throughput.py: error: the run ended before that epoch did; its message stands above")


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each side (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=60, help="timed batches a round (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="the tutorial's --n_cpu (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument(
        "--without",
        choices=["sum_taps", "share", "fold"],
        help="ours without one of the fast ways in fast/convolutions.py; fold: without any (default: with all)",
    )
    parser.add_argument("--isa", choices=["native", "avx2"], default="native",
                        help="instructions for both sides; avx2 is emulated (default: %(default)s)")  # fmt: skip
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--busy", action="store_true", help="ours alone, beside a busy process and without")
    alone.add_argument("--until_epoch", type=int, metavar="N", help="ours alone: the seconds to the end of epoch N")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of the table")
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--side", choices=["tutorial", "ours"], help=argparse.SUPPRESS)
    opt, opt.flags = parser.parse_known_args()  # what is left goes to acgan.py: --compile off, for instance
    device = torch.device(opt.device)
    if opt.side:
        return run_side(opt, device)

    if opt.until_epoch:
        if opt.without or opt.isa != "native":
            parser.error("--until_epoch runs the command as it is typed: drop --without and --isa")
        return print(json.dumps(time_to_picture(opt), indent=2))
    if opt.busy:
        return print(json.dumps(beside_a_busy_process(opt), indent=2))
    sides = {}
    times, rates = {"tutorial": [], "ours": []}, []
    try:
        for name in times:
            sides[name] = Side(name, opt)
        for _ in range(opt.rounds):
            for name, side in sides.items():
                times[name].append(side.round())
            rates.append(matmul_rate(device))
    finally:
        for side in sides.values():
            side.stop()

    per_second = {name: [opt.batches / seconds for seconds in values] for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["tutorial"], times["ours"], strict=True)]
    # this process has all instructions, so for an emulated set the floor is unknown
    step, rate = multiply_adds(), statistics.median(rates) if opt.isa == "native" else float("nan")
    result = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores, {cpu_name()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "isa": "AVX2, emulated" if opt.isa == "avx2" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "flags": without_flag(opt) + opt.flags,
        "batches_per_second": {name: spread(values) for name, values in per_second.items()},
        "ratio": spread(ratios),
        "peak_memory_MiB": {name: side.memory for name, side in sides.items()},
        "multiply_adds_per_step": step,
        "matmul_multiply_adds_per_second": rate,
        "floor_seconds_per_step": step / rate,
        "share_of_floor": step / rate * statistics.median(per_second["ours"]),
    }
    if opt.json:
        return print(json.dumps(result, indent=2))
    setting = f"{result['machine']} ({result['isa']}, threads: {result['threads']}); Python {result['python']}, PyTorch"
    setting += f" {result['torch']}; flags: {' '.join(result['flags']) or 'default'}"
    if opt.markdown:
        return print(f"{setting}; {opt.rounds} rounds of {opt.batches} batches\n\n{markdown(result)}")
    print(setting)
    print(f"{opt.rounds} rounds of {opt.batches} batches of 64 images each, in turn\n")
    print(f"{'':24}{'min':>8}{'median':>8}{'max':>8}   peak memory, MiB")
    for name in times:
        row = result["batches_per_second"][name]
        print(f"{name + ', batches/s':24}{row['min']:8.2f}{row['median']:8.2f}{row['max']:8.2f}"
              f"   {result['peak_memory_MiB'][name]:.0f}")  # fmt: skip
    row = result["ratio"]
    print(f"{'ratio':24}{row['min']:8.2f}{row['median']:8.2f}{row['max']:8.2f}\n")
    print(f"One step: {step / 1e9:.2f} G multiply-adds; matrix products here: {rate / 1e9:.0f} G a second;")
    print(f"so at least {step / rate * 1e3:.1f} ms a batch, of which {result['share_of_floor']:.0%} is reached.")


def markdown(result: dict) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| batches/s | min | median | max | peak memory |", "| --- | --- | --- | --- | --- |"]
    for name, row in result["batches_per_second"].items():
        figures = " | ".join(f"{row[key]:.2f}" for key in ("min", "median", "max"))
        lines.append(f"| {name} | {figures} | {result['peak_memory_MiB'][name]:,.0f} MiB |")
    figures = " | ".join(f"{result['ratio'][key]:.2f}" for key in ("min", "median", "max"))
    lines.append(f"| ratio, round by round | {figures} | |")
    floor, share = result["floor_seconds_per_step"] * 1e3, result["share_of_floor"]
    return (
        "\n".join(lines)
        + f"\n\nMatrix products alone would take {floor:.0f} ms a batch: {share:.0%} of that is reached."
    )


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
