"""Fast ways compute what the plain ones compute."""

import re
import subprocess
import sys
from argparse import Namespace

import pytest
import small
import torch
from conftest import ROOT, assert_same_run, read_rows
from torch import nn

import acgan
from benchmarks.plain import plain_generator
from convolutions import NarrowConv2d, UpsampleConv2d
from data.batches import Batches
from drawing import draw_labels, draw_noise
from models import Discriminator, Generator, load_network, weights_init_normal
from training import speed

SMALL = ["--seed", 3, "--batch_size", 24, "--img_size", 16, "--log_interval", 1]


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (8, 8), (5, 9), (16, 16)])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (3, 5), (128, 64)])
@pytest.mark.parametrize("way", ["fold", "share", "sum_taps"])
def test_fast_ways_to_convolve_equal_the_plain_one(size, in_channels, out_channels, way):
    torch.manual_seed(0)
    plain = nn.Conv2d(in_channels, out_channels, 3, padding=1).double()
    layer = (NarrowConv2d if way == "sum_taps" else UpsampleConv2d)(in_channels, out_channels).double()
    layer.load_state_dict(plain.state_dict())  # the same names and shapes
    x = torch.randn(2, in_channels, *size, dtype=torch.float64)
    results = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        if module is layer:
            out = getattr(layer, way)(inputs)
        else:
            out = plain(inputs if way == "sum_taps" else nn.functional.interpolate(inputs, scale_factor=2))
        target = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        nn.functional.mse_loss(out, target).backward()
        results.append([out, inputs.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("img_size", [16, 28, 32])
def test_folded_generator_has_the_plain_ones_gradients(img_size):
    torch.manual_seed(0)
    folded = Generator(img_size=img_size).apply(weights_init_normal).double()
    plain = plain_generator(folded)
    z, labels = torch.randn(4, 100, dtype=torch.float64), torch.arange(4)
    for generator in (folded, plain):
        generator(z, labels).square().mean().backward()
    for (name, ours), theirs in zip(folded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=name)


def ten_steps(plain=False, compile="off"):
    """Losses, parameters and next random number of ten training steps, in one of the ways to compute them."""
    torch.manual_seed(0)
    acgan.seed_everything(0)
    batches = Batches(small.first_digits(16), 24)
    generator = Generator(img_size=16).apply(weights_init_normal)
    discriminator = Discriminator(img_size=16).apply(weights_init_normal)
    generator = plain_generator(generator) if plain else generator
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=0.0002, betas=(0.5, 0.999)) for net in (generator, discriminator)
    ]

    def train_batch(generator, discriminator, indices, penalised):
        z = draw_noise(len(indices), 100, torch.device("cpu"))
        labels = draw_labels(len(indices), 10, torch.device("cpu"))
        return acgan.train_step(generator, discriminator, *optimizers, *batches.gather(indices), z, labels)

    step = speed.accelerate(train_batch, generator, discriminator, 24, compile, "off")
    losses = []
    for indices, _ in zip(batches, range(10), strict=False):
        metrics = step(indices)
        losses.append([metrics["d_loss"].item(), metrics["g_loss"].item()])
    return torch.tensor(losses), [*generator.parameters(), *discriminator.parameters()], torch.rand(1)


def assert_same_training(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    for a, b in zip(ours[1], theirs[1], strict=True):
        # Adam moves a parameter by up to lr = 2e-4 a step, whatever the size of its gradient: where a gradient is
        # nearly 0, its rounding decides the direction
        assert (a - b).abs().max() < 10 * 2 * 0.0002
        assert (a - b).abs().mean() < 2e-5
    assert torch.equal(ours[2], theirs[2])  # the same random numbers were used up


@pytest.mark.faithful
def test_ten_folded_steps_equal_ten_plain_ones():
    assert_same_training(ten_steps(), ten_steps(plain=True))


def test_compiled_run_equals_an_eager_one_saves_plain_names_and_resumes_compiled(train, tmp_path, monkeypatch):
    compiled, calls = speed.compiled, []
    monkeypatch.setattr(speed, "compiled", lambda *args: calls.append(compiled(*args)) or calls[-1])
    eager = train(*SMALL, "--max_steps", 6, "--compile", "off", "--out_dir", tmp_path / "off")
    result = train(*SMALL, "--max_steps", 4, "--compile", "on", "--out_dir", tmp_path / "on")
    assert eager.status == result.status == 0 and "Compile" not in result.err
    assert train("--resume", tmp_path / "on", "--max_steps", 6).status == 0
    ours, theirs = ([row["d_loss"] for row in read_rows(tmp_path / how)] for how in ("on", "off"))
    assert ours == pytest.approx(theirs, rel=1e-5)  # the third batch of an epoch is smaller
    assert len(calls) == 2  # it was compiled, also after the resume
    assert all(isinstance(call, speed.CompiledGenerator) for call in calls)
    load_network(tmp_path / "on" / "acgan_gen.pth")  # strict: names with _orig_mod. would not load


def test_compiled_generator_with_two_threads_has_the_same_gradients_each_time():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = Generator(img_size=16)
        fast = speed.compiled(generator, None, 64, "off")
        z, labels = torch.randn(64, 100), torch.arange(64) % 10
        seen = set()
        for _ in range(100):
            generator.zero_grad()
            fast(z, labels).square().sum().backward()
            seen.add(tuple(parameter.grad.numpy().tobytes() for parameter in generator.parameters()))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1  # else a compiled run could not be repeated, nor resumed bit-exactly


def test_without_a_compiler_the_run_continues_and_says_why(start, train, tmp_path):
    env = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start(*SMALL, "--max_steps", 2, "--compile", "on", "--out_dir", tmp_path / "on", env=env)
    _, err = process.communicate()
    assert process.returncode == 0 and re.search(r"^Compile: off, as it failed here: .+$", err, re.MULTILINE)
    assert train(*SMALL, "--max_steps", 2, "--compile", "off", "--out_dir", tmp_path / "off").status == 0
    assert_same_run(tmp_path / "on", tmp_path / "off")  # the attempt left no trace in the numbers


def test_compiling_is_chosen_by_the_length_of_the_whole_run_on_one_cpu(train, tmp_path, monkeypatch):
    def choice(batches, device="cpu", world_size=1, n_images=64):
        opt = dict(compile="auto", total_steps=batches, world_size=world_size, n_images=n_images, batch_size=64)
        return speed.choose_compile(Namespace(**opt), torch.device(device))

    assert [choice(speed.BREAK_EVEN - 1), choice(speed.BREAK_EVEN)] == ["off", "on"]
    assert choice(10**6, device="cuda") == choice(10**6, world_size=2) == choice(10**6, n_images=63) == "off"
    asked = []
    monkeypatch.setattr(speed, "BREAK_EVEN", 30)
    monkeypatch.setattr(speed, "compiled", lambda generator, plain, *_: asked.append(1) or plain)
    flags = [*SMALL, "--out_dir", tmp_path]
    assert train(*flags, "--max_steps", 20).status == 0 and not asked
    assert train("--resume", tmp_path, "--max_steps", 40).status == 0 and not asked  # as before: so it stays exact
    assert train("--resume", tmp_path, "--max_steps", 50, "--compile", "auto").status == 0 and asked


def test_resumed_run_has_the_threads_that_it_began_with(start, tmp_path):
    for name, threads in [("straight", "2"), ("resumed", "2"), ("resumed", "1")]:
        steps = 4 if (name, threads) == ("resumed", "2") else 8
        resume = ["--resume"] if threads == "1" else SMALL
        flags = [*resume, "--max_steps", steps, "--out_dir", tmp_path / name]
        _, err = (process := start(*flags, env={"OMP_NUM_THREADS": threads})).communicate()
        assert process.returncode == 0 and "bit-exactly" not in err, err
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


@pytest.mark.skipif(not speed.glibc(), reason="only glibc is told to keep memory")
def test_large_blocks_go_back_to_the_kernel_until_memory_is_kept():
    code = """
import resource, torch
from training.speed import keep_memory, tune_process
tune_process(cpu := torch.device("cpu"))
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(new_pages())
keep_memory(cpu)
new_pages()
print(new_pages())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    mapped_again, kept = map(int, result.stdout.split())
    assert mapped_again > 10 * 16e6 / 2**21  # even with the largest pages
    assert kept < 100


def test_bf16_keeps_the_gradient_of_a_sure_discriminator():
    discriminator = Discriminator(img_size=16)
    speed.accelerate(None, Generator(img_size=16), discriminator, 8, "off", "bf16")
    discriminator.adv_layer[0].weight.data.zero_()
    discriminator.adv_layer[0].bias.data.fill_(7.0)
    validity, label = speed.InBfloat16(discriminator)(torch.zeros(8, 1, 16, 16))
    loss = nn.functional.binary_cross_entropy(validity, torch.zeros(8, 1))  # called a fake, D being sure it is real
    loss.backward()
    assert loss.item() == pytest.approx(7.0, rel=1e-3)
    assert discriminator.adv_layer[0].bias.grad.item() == pytest.approx(1.0, rel=1e-2)
    assert label.dtype == torch.float32


def test_bf16_trains_close_to_float32(train, tmp_path):
    rows = {}
    for amp in ("bf16", "off"):
        assert train(*SMALL, "--max_steps", 5, "--amp", amp, "--out_dir", tmp_path / amp).status == 0
        rows[amp] = [row["d_loss"] for row in read_rows(tmp_path / amp)]
    assert rows["bf16"] == pytest.approx(rows["off"], rel=2e-2)
    assert rows["bf16"] != rows["off"]
    assert load_network(tmp_path / "bf16" / "acgan_gen.pth").l1[0].weight.dtype == torch.float32
