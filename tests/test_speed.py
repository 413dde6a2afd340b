"""Fast ways compute what the plain ones compute."""

import copy
import errno
import importlib
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import small
import torch
from conftest import ROOT, assert_same_run, read_rows
from torch import nn

import acgan
import fast
from data.batches import Batches
from data.drawing import draw_labels, draw_noise
from fast.bfloat16 import InBfloat16
from fast.compile import CompiledGenerator, choose_compile, complaint
from fast.convolutions import NarrowConv2d, UpsampleConv2d
from fast.process import glibc
from models import Discriminator, Generator, weights_init_normal
from run.checkpoint import read_checkpoint
from run.weights import load_network

SMALL = ["--seed", 3, "--batch_size", 24, "--img_size", 16, "--latent_dim", 4, "--log_interval", 1]


@pytest.fixture
def two_threads():
    """Two threads in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 7), (8, 8), (5, 9), (16, 16)])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (3, 5), (128, 64)])
@pytest.mark.parametrize("way", ["fold", "share", "sum_taps"])
def test_fast_ways_to_convolve_equal_the_plain_one(size, in_channels, out_channels, way):
    torch.manual_seed(0)
    plain = nn.Conv2d(in_channels, out_channels, 3, padding=1).double()
    layer = (NarrowConv2d if way == "sum_taps" else UpsampleConv2d)(copy.deepcopy(plain))
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


def ten_steps(layers):
    """Losses, parameters and next random number of ten training steps, with plain or with fast layers."""
    acgan.seed_everything(0)
    batches = Batches(small.first_digits(16), 24)
    generator = Generator(img_size=16).apply(weights_init_normal)
    discriminator = Discriminator(img_size=16).apply(weights_init_normal)
    if layers == "fast":
        fast.use_fast_layers(generator, discriminator)
    networks = generator, discriminator
    optimizers = [torch.optim.Adam(network.parameters(), lr=0.0002, betas=(0.5, 0.999)) for network in networks]

    def train_batch(generator, discriminator, indices):
        z = draw_noise(len(indices), 100, torch.device("cpu"))
        labels = draw_labels(len(indices), 10, torch.device("cpu"))
        return acgan.train_step(generator, discriminator, *optimizers, *batches.gather(indices), z, labels)

    opt, plan = Namespace(amp="off"), Namespace(compile="off", world_size=1)
    batch = fast.batch(train_batch, acgan.train_step, networks, optimizers, opt, plan, batches)
    losses = []
    for step, indices in zip(range(10), batches, strict=False):
        metrics = batch(indices, step)
        losses.append([metrics["d_loss"].item(), metrics["g_loss"].item()])
    return torch.tensor(losses), [*generator.parameters(), *discriminator.parameters()], torch.rand(1)


@pytest.mark.faithful
def test_ten_steps_with_fast_layers_equal_ten_plain_ones():
    (our_losses, ours, our_number), (their_losses, theirs, their_number) = ten_steps("fast"), ten_steps("plain")
    torch.testing.assert_close(our_losses, their_losses, rtol=1e-5, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        # Adam moves a parameter by up to lr = 2e-4 a step, whatever the size of its gradient: where a gradient is
        # nearly 0, its rounding decides the direction
        assert (a - b).abs().max() < 10 * 2 * 0.0002
        assert (a - b).abs().mean() < 2e-5
    assert torch.equal(our_number, their_number)  # the same random numbers were used up


def test_compiled_run_equals_an_eager_one_and_resumes_compiled_and_can_be_repeated(
    train, tmp_path, monkeypatch, two_threads
):
    compile_generator, compiled, batch_sizes = fast.compiled, [], []

    def watched(*args):
        compiled.append(compile_generator(*args))
        compiled[-1].register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
        return compiled[-1]

    monkeypatch.setattr(fast, "compiled", watched)
    # the tutorial's G, which the compiler sees; all else departs. At the recipe's own rate, rounding grows fast
    recipe = ["--recipe", "best", "--d_steps", 1, "--conditioning", "multiply", "--bn_eps", 0.8, "--lr", 0.0002]
    flags = [*SMALL, *recipe, "--lr_schedule", "constant"]
    eager = train(*flags, "--max_steps", 6, "--compile", "off", "--out_dir", tmp_path / "off")
    result = train(*flags, "--max_steps", 4, "--compile", "on", "--out_dir", tmp_path / "on")
    assert eager.status == result.status == 0 and "Compile: off" not in result.err and "Compiled in" in result.err
    assert train("--resume", tmp_path / "on", "--max_steps", 6).status == 0
    ours, theirs = (read_rows(tmp_path / how) for how in ("on", "off"))
    for name in ("d_loss", "g_loss", "d_penalty"):
        wanted = [row.get(name, 0) for row in theirs]
        assert [row.get(name, 0) for row in ours] == pytest.approx(wanted, rel=1e-5)
    assert ["d_penalty" in row for row in ours] == [True, False, False, False, True, False]
    assert [type(network) for network in compiled] == 2 * [CompiledGenerator]  # also after the resume
    assert batch_sizes == 4 * [24]  # not the third of an epoch, which is smaller
    # strict: names with _orig_mod. would not load; and the compiler's trial leaves no trace in the running statistics
    ours, theirs = (load_network(tmp_path / how / "acgan_gen.pth") for how in ("on", "off"))
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name), rtol=1e-3, atol=1e-4, msg=name)

    z, labels, seen = torch.randn(24, 4), torch.arange(24) % 10, set()
    for _ in range(50):
        compiled[-1].zero_grad()
        compiled[-1](z, labels).square().sum().backward()
        seen.add(tuple(parameter.grad.numpy().tobytes() for parameter in compiled[-1].parameters()))
    assert len(seen) == 1  # else a compiled run could not be repeated, nor resumed bit-exactly


GCC = """In file included from /tmp/a.cpp:2:
/tmp/a.h:7:10: fatal error: Python.h: No such file or directory
    7 | #include <Python.h>
compilation terminated."""


def test_without_a_compiler_that_works_the_run_continues_and_says_why(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(UpsampleConv2d, "share", UpsampleConv2d.fold)  # less to read until the compiler is called
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\ncase "$1" in -*version) echo "g++ (GCC) 12.2"; exit;; esac\necho "{GCC}"\nexit 1')
    compiler.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}):
        result = train(*SMALL, "--max_steps", 2, "--compile", "on", "--out_dir", tmp_path / "on")
    line = "Compile: off, as it failed here: fatal error: Python.h: No such file or directory\n"
    assert result.status == 0 and line in result.err, result.err
    assert train(*SMALL, "--max_steps", 2, "--compile", "off", "--out_dir", tmp_path / "off").status == 0
    assert_same_run(tmp_path / "on", tmp_path / "off")  # the attempt left no trace in the numbers
    assert read_checkpoint(tmp_path / "on")["plan"]["compile"] == "off"  # so a resumed run does not compile either


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("a.cpp:2:9: warning: x\n" + GCC, "fatal error: Python.h: No such file or directory"),
        ("/usr/bin/ld: warning: x\n/usr/bin/ld: cannot find -lgomp\ncollect2: error: ld returned 1 exit status",
         "ld: cannot find -lgomp"),
        ("a.cpp\na.cpp(7): fatal error C1083: Cannot open include file: 'omp.h'", "fatal error C1083: Cannot op"),
        ("sh: g++: Permission denied\n", "sh: g++: Permission denied"),
        ("\n\nSet TORCHDYNAMO_VERBOSE=1 for", "C++ compile error"),
    ],
)  # fmt: skip
def test_what_a_compiler_prints_is_quoted_by_the_line_that_matters(output, words):
    error = importlib.import_module("torch._inductor.exc").CppCompileError(["g++", "-Werror=x"], output)
    assert complaint(error).startswith(words)


def test_cache_that_cannot_be_written_is_named(train, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(UpsampleConv2d, "share", UpsampleConv2d.fold)
    result = train(*SMALL, "--max_steps", 1, "--compile", "on", "--out_dir", tmp_path / "on")
    line = next(line for line in result.err.splitlines() if line.startswith("Compile:"))
    assert result.status == 0 and "Not a directory" in line and str(tmp_path / "file") in line
    full = complaint(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert full == f"[Errno 28] No space left on device: {tmp_path / 'file' / 'cache'}"


def test_compiling_is_chosen_by_the_length_of_the_whole_run_on_one_cpu(train, tmp_path, monkeypatch):
    def choice(batches, device="cpu", world_size=1, has_full=True):
        return choose_compile(Namespace(compile="auto"), torch.device(device), world_size, batches, has_full)

    assert [choice(fast.compile.BREAK_EVEN - 1), choice(fast.compile.BREAK_EVEN)] == ["off", "on"]
    assert choice(10**6, device="cuda") == choice(10**6, world_size=2) == choice(10**6, has_full=False) == "off"
    asked = []
    monkeypatch.setattr(fast.compile, "BREAK_EVEN", 5)
    monkeypatch.setattr(fast, "compiled", lambda generator, batch_size, wrap: asked.append(batch_size) or generator)
    flags = [*SMALL, "--out_dir", tmp_path]
    assert train(*flags, "--max_steps", 4).status == 0 and not asked
    assert train("--resume", tmp_path, "--max_steps", 6).status == 0 and not asked  # as before: so it stays exact
    resumed = train("--resume", tmp_path, "--max_steps", 7, "--compile", "auto")
    assert resumed.status == 0 and asked == [24]
    assert "Another --sample_interval or --compile: the run resumes, but not bit-exactly." in resumed.err


def test_resumed_run_has_the_threads_that_it_began_with(start, train, tmp_path, two_threads):
    for name, steps in [("straight", 8), ("resumed", 4)]:
        assert train(*SMALL, "--max_steps", steps, "--out_dir", tmp_path / name).status == 0
    process = start("--resume", tmp_path / "resumed", "--max_steps", 8, env={"OMP_NUM_THREADS": "1"})
    _, err = process.communicate()
    assert process.returncode == 0 and "bit-exactly" not in err, err
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    assert read_checkpoint(tmp_path / "resumed")["plan"]["threads"] == 2


@pytest.mark.skipif(not glibc(), reason="only glibc is told to keep memory")
def test_large_blocks_go_back_to_the_kernel_until_memory_is_kept():
    code = """
import resource, torch
from fast.process import keep_memory, tune_process
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
    discriminator.adv_layer[0].weight.data.zero_()
    discriminator.adv_layer[0].bias.data.fill_(7.0)
    validity, label = InBfloat16(discriminator)(torch.zeros(8, 1, 16, 16))
    loss = nn.functional.binary_cross_entropy(validity, torch.zeros(8, 1))  # called a fake, D being sure it is real
    loss.backward()
    assert loss.item() == pytest.approx(7.0, rel=1e-3)
    assert discriminator.adv_layer[0].bias.grad.item() == pytest.approx(1.0, rel=1e-2)
    assert label.dtype == torch.float32


def test_bf16_trains_close_to_float32(train, tmp_path):
    rows = {}
    for amp in ("bf16", "off"):
        flags = ["--max_steps", 5, "--amp", amp, "--r1", 0.2, "--out_dir", tmp_path / amp]
        assert train(*SMALL, *flags).status == 0
        rows[amp] = read_rows(tmp_path / amp)
    ours, theirs = ([row["d_loss"] for row in rows[amp]] for amp in ("bf16", "off"))
    assert ours == pytest.approx(theirs, rel=2e-2) and ours != theirs
    ours, theirs = (rows[amp][0]["d_penalty"] for amp in ("bf16", "off"))
    assert ours == pytest.approx(theirs, rel=1e-5)  # D alone, in float32
    assert load_network(tmp_path / "bf16" / "acgan_gen.pth").l1[0].weight.dtype == torch.float32
