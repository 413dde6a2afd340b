"""On an NVIDIA GPU only: the captured batch trains as the plain one does, and whole runs work there."""

import copy
import math
from argparse import Namespace

import pytest
import small
import torch
from conftest import call, read_rows, stopped_after
from shapes import make_folder

import acgan
import fast
from data import folder
from data.batches import Batches
from departures import Step
from fast.cuda_graph import CapturedBatches
from models import Discriminator, Generator, weights_init_normal
from run.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def captures(monkeypatch):
    """All CapturedBatches that the test makes."""
    made = []

    class Watched(CapturedBatches):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(fast, "CapturedBatches", Watched)
    return made


def fast_batch(train_batch, update=None, networks=None, optimizers=(), batch_size=64, world_size=1):
    networks = networks or (Generator().cuda(), Discriminator().cuda())
    plan, batches = Namespace(compile="off", world_size=world_size), Namespace(batch_size=batch_size, in_memory=True)
    return fast.batch(train_batch, update, networks, optimizers, Namespace(amp="off"), plan, batches)


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_captured_batches_train_as_plain_ones(r1, captures, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    torch.manual_seed(0)
    batches = Batches(small.few(600)("mnist", None, 32), 64, device)  # ten batches an epoch, the last of 24
    start = Generator().apply(weights_init_normal).to(device), Discriminator().apply(weights_init_normal).to(device)
    fast.use_fast_layers(*start)
    for layer in start[1].modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.p = 0.0  # the only draw within a step
    z, gen_labels = torch.randn(600, 100, device=device), torch.randint(10, (600,), device=device)
    indices = [part for _ in range(6) for part in batches]
    losses, rates = {}, {}
    for how in ("plain", "captured"):
        networks, update = copy.deepcopy(start), Step(r1=r1, falling_from=0.0002, schedule_steps=60)
        adam = dict(lr=0.0002, betas=(0.5, 0.999), fused=True, capturable=True)
        optimizers = [torch.optim.Adam(network.parameters(), **adam) for network in networks]

        def train_batch(generator, discriminator, picked, update=update, optimizers=optimizers):
            inputs = *batches.gather(picked), z[picked], gen_labels[picked]
            return update(generator, discriminator, *optimizers, *inputs)

        # of two ranks, nothing is captured
        call = fast_batch(train_batch, update, networks, optimizers, world_size=1 if how == "captured" else 2)
        losses[how], rates[how] = [], []
        for step, picked in enumerate(indices):
            metrics = call(picked, step)
            losses[how].append([metrics["d_loss"].item(), metrics["g_loss"].item()])
            rates[how].append(float(optimizers[0].param_groups[0]["lr"]))
    (captured,) = captures
    kinds = {(64, False), (24, False)} | ({(64, True)} if r1 else set())
    assert set(captured.graphs) == kinds and captured.works
    assert rates["captured"] == rates["plain"] and rates["plain"][-1] == pytest.approx(0.0002 * 2 * (1 - 59 / 60))
    torch.testing.assert_close(torch.tensor(losses["captured"]), torch.tensor(losses["plain"]), rtol=1e-3, atol=0)


def test_replays_draw_new_numbers(captures):
    def draw(generator, discriminator, indices):
        return {"drawn": torch.rand((), device="cuda")}

    call, indices = fast_batch(draw), torch.arange(64, device="cuda")
    drawn = [call(indices, step)["drawn"].item() for step in range(20)]
    assert captures[0].works and captures[0].graphs and len(set(drawn)) == 20


def test_images_beyond_the_memory_budget_train_as_those_in_memory(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "shapes", 40)
    flags = ["--dataset", "folder", "--data_root", root, "--device", "cuda", "--seed", 0, "--batch_size", 16,
             "--log_interval", 1, "--max_steps", 16]  # fmt: skip
    for how, share in [("memory", 1), ("file", 0)]:
        monkeypatch.setattr(folder, "MEMORY_SHARE", share)
        assert call(acgan.main, *flags, "--out_dir", tmp_path / how).status == 0
    ours, theirs = ([row["d_real_adv"] for row in read_rows(tmp_path / how)] for how in ("memory", "file"))
    assert ours[:8] == pytest.approx(theirs[:8], rel=1e-2)


@pytest.mark.parametrize("flags", [[], ["--amp", "bf16"], ["--compile", "on"], ["--recipe", "best"]])
def test_run_and_resume_on_the_gpu(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(acgan, "load_dataset", small.few(150))
    words = ["--device", "cuda", "--seed", 0, "--log_interval", 1, "--out_dir", tmp_path, *flags, "--max_steps", 40]
    with stopped_after(20):
        first = call(acgan.main, *words)
    assert first.status == 143 and read_checkpoint(tmp_path)["step"] == 20, first.err
    second = call(acgan.main, "--resume", tmp_path, "--device", "cuda", "--max_steps", 40)
    assert second.status == 0, second.err
    assert "as capturing failed" not in first.err + second.err and "as it failed" not in first.err + second.err
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(40))
    assert all(math.isfinite(row["d_loss"]) for row in rows)
    assert read_checkpoint(tmp_path)["step"] == 40
    assert (tmp_path / "images" / "0.png").exists()


def test_batch_that_cannot_be_captured_goes_on_without(captures, capsys):
    def waits_for_the_device(generator, discriminator, indices):
        discriminator.requires_grad_(False)
        drawn = torch.rand(int(indices.sum()) + 1, device="cuda").sum()
        discriminator.requires_grad_(True)
        return {"drawn": drawn}

    networks = Generator().cuda(), Discriminator().cuda()
    call = fast_batch(waits_for_the_device, networks=networks, batch_size=4)
    drawn = [call(torch.arange(4, device="cuda"), step)["drawn"].item() for step in range(10)]
    assert not captures[0].works and len(set(drawn)) == 10
    assert all(parameter.requires_grad for parameter in networks[1].parameters())
    line = capsys.readouterr().err
    assert line.startswith("CUDA graph: off, as capturing failed: ") and "previous error" not in line
