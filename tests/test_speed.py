"""Fast ways compute what the plain ones compute."""

import copy
import re

import pytest
import torch
from conftest import read_rows
from torch import nn

import acgan
import speed
from batches import ShuffledBatches
from dataset import load_dataset
from models import Discriminator, Generator, UpsampleConv2d, load_network, weights_init_normal


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (8, 8), (5, 9), (16, 16)])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (3, 5), (128, 64)])
def test_folded_upsampling_equals_the_plain_pair(size, in_channels, out_channels):
    torch.manual_seed(0)
    folded = UpsampleConv2d(in_channels, out_channels).double()
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(in_channels, out_channels, 3, padding=1)).double()
    plain[1].load_state_dict(folded.state_dict())  # the same names and shapes
    x = torch.randn(2, in_channels, *size, dtype=torch.float64)
    target = torch.randn(2, out_channels, 2 * size[0], 2 * size[1], dtype=torch.float64)
    results = []
    for layer in (folded, plain):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        nn.functional.mse_loss(out, target).backward()
        results.append([out, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("img_size", [16, 28, 32])
def test_folded_generator_has_the_plain_ones_gradients(img_size):
    torch.manual_seed(0)
    folded = Generator(img_size=img_size).apply(weights_init_normal).double()
    plain = Generator(img_size=img_size, folded=False).double()
    plain.load_state_dict(folded.state_dict())
    z, labels = torch.randn(4, 100, dtype=torch.float64), torch.arange(4)
    for generator in (folded, plain):
        generator(z, labels).square().mean().backward()
    for (name, ours), theirs in zip(folded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=name)


class Steps:
    """Training steps from one fixed state, on fixed real digits and draws, in any of the ways to compute them."""

    def __init__(self, data_root, batch_size=32, n=10):
        torch.manual_seed(0)
        self.batches = ShuffledBatches(*load_dataset("mnist", data_root, 32)[:2], batch_size)
        self.indices = [indices for indices, _ in zip(self.batches, range(n), strict=False)]
        self.networks = Generator().apply(weights_init_normal), Discriminator().apply(weights_init_normal)
        self.batch_size = batch_size

    def run(self, folded=True, compile="off"):
        generator, discriminator = copy.deepcopy(self.networks)
        for layer in generator.modules():
            if isinstance(layer, UpsampleConv2d):
                layer.folded = folded
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=0.0002, betas=(0.5, 0.999)) for net in (generator, discriminator)
        ]
        torch.manual_seed(1)
        acgan.np.random.seed(1)

        def train_batch(generator, discriminator, indices):
            z = acgan.draw_noise(len(indices), 100, torch.device("cpu"))
            labels = acgan.draw_labels(len(indices), 10, torch.device("cpu"))
            return acgan.train_step(generator, discriminator, *optimizers, *self.batches.gather(indices), z, labels)

        step = speed.accelerate(train_batch, generator, discriminator, self.batch_size, 10, compile, "off")
        losses = [[metrics["d_loss"].item(), metrics["g_loss"].item()] for metrics in map(step, self.indices)]
        return torch.tensor(losses), [*generator.parameters(), *discriminator.parameters()], torch.rand(1), step


@pytest.fixture(scope="module")
def steps(data_root):
    return Steps(data_root)


def assert_same_training(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    for a, b in zip(ours[1], theirs[1], strict=True):
        # Adam moves a parameter by up to lr = 2e-4 a step, whatever the size of its gradient: where a gradient is
        # nearly 0, its rounding decides the direction
        assert (a - b).abs().max() < 10 * 2 * 0.0002
        assert (a - b).abs().mean() < 2e-5
    assert torch.equal(ours[2], theirs[2])  # the same random numbers were used up


def test_ten_folded_steps_equal_ten_plain_ones(steps):
    assert_same_training(steps.run(folded=True), steps.run(folded=False))


def test_ten_compiled_steps_equal_ten_eager_ones(steps):
    compiled = steps.run(compile="on")
    assert compiled[3].fast is not None
    assert_same_training(compiled, steps.run(compile="off"))


def test_compiled_run_saves_plain_names_and_handles_the_smaller_batch(run, tmp_path):
    flags = ["--seed", 3, "--batch_size", 24, "--img_size", 16, "--max_steps", 4, "--log_interval", 1]
    rows = {}
    for compile in ("on", "off"):
        result = run(*flags, "--compile", compile, "--out_dir", tmp_path / compile, digits=60)
        assert result.returncode == 0 and result.stderr == ""
        rows[compile] = [row["d_loss"] for row in read_rows(tmp_path / compile)]
    assert rows["on"] == pytest.approx(rows["off"], rel=1e-5)
    load_network(tmp_path / "on" / "acgan_gen.pth")  # strict: names with _orig_mod. would not load


def test_without_a_compiler_the_run_goes_on_and_says_why(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--seed", 3, "--batch_size", 8, "--img_size", 16, "--max_steps", 2, "--log_interval", 1]
    result = run(*flags, "--compile", "on", "--out_dir", tmp_path / "on")
    assert result.returncode == 0
    assert re.fullmatch(r"Compile: off, as it failed here: .+\n", result.stderr)
    assert run(*flags, "--compile", "off", "--out_dir", tmp_path / "off").returncode == 0
    assert read_rows(tmp_path / "on") == read_rows(tmp_path / "off")  # the attempt left no trace in the numbers


class Clock:
    """A stand-in for time.perf_counter that the test moves."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("compiled_seconds", "kept"), [(0.5, True), (1.5, False)])
def test_auto_keeps_compiled_networks_only_if_they_are_faster(monkeypatch, capsys, compiled_seconds, kept):
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", clock)
    monkeypatch.setattr(speed.torch, "compile", lambda network, **_: copy.copy(network))
    generator, discriminator = Generator(img_size=16), Discriminator(img_size=16)

    def train_batch(used, _, indices):
        clock.now += 1.0 if used is generator else compiled_seconds
        return used is generator

    indices = torch.arange(2)
    call = speed.accelerate(train_batch, generator, discriminator, 2, 5_000, "auto", "off")
    eager = [call(indices) for _ in range(60)]
    assert eager == [True] * 25 + [False] * 25 + [not kept] * 10
    assert ("not faster" in capsys.readouterr().err) is not kept
    short = speed.accelerate(train_batch, generator, discriminator, 2, 4_999, "auto", "off")
    assert all(short(indices) for _ in range(60))


def test_bf16_keeps_the_gradient_of_a_sure_discriminator():
    discriminator = Discriminator(img_size=16)
    speed.accelerate(None, Generator(img_size=16), discriminator, 8, 10, "off", "bf16")
    discriminator.adv_layer[0].weight.data.zero_()
    discriminator.adv_layer[0].bias.data.fill_(7.0)
    validity, label = speed.in_bf16(discriminator)(torch.zeros(8, 1, 16, 16))
    loss = nn.functional.binary_cross_entropy(validity, torch.zeros(8, 1))  # called a fake, D being sure it is real
    loss.backward()
    assert loss.item() == pytest.approx(7.0, rel=1e-3)
    assert discriminator.adv_layer[0].bias.grad.item() == pytest.approx(1.0, rel=1e-2)
    assert label.dtype == torch.float32


def test_bf16_trains_close_to_float32(run, tmp_path):
    flags = ["--seed", 3, "--batch_size", 8, "--max_steps", 5, "--log_interval", 1]
    rows = {}
    for amp in ("bf16", "off"):
        assert run(*flags, "--amp", amp, "--out_dir", tmp_path / amp).returncode == 0
        rows[amp] = [row["d_loss"] for row in read_rows(tmp_path / amp)]
    assert rows["bf16"] == pytest.approx(rows["off"], rel=2e-2)
    assert rows["bf16"] != rows["off"]
    assert load_network(tmp_path / "bf16" / "acgan_gen.pth").l1[0].weight.dtype == torch.float32
