"""On an NVIDIA GPU only: the captured batch trains as the plain one does, and whole runs work there."""

import copy
import itertools
import math
from functools import partial

import pytest
import small
import torch
from conftest import call, read_rows
from shapes import make_folder

import acgan
from data import folder
from data.batches import Batches
from models import Discriminator, Generator, weights_init_normal
from training import speed
from training.checkpoint import read_checkpoint
from training.departures import Objective
from utils import StopRequest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_captured_batches_train_as_plain_ones(r1, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    torch.manual_seed(0)
    batches = Batches(small.few(600)("mnist", None, 32), 64, device)  # ten batches an epoch, the last of 24
    start = Generator().apply(weights_init_normal).to(device), Discriminator().apply(weights_init_normal).to(device)
    for layer in start[1].modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.p = 0.0  # the only draw within a step
    z, gen_labels = torch.randn(600, 100, device=device), torch.randint(10, (600,), device=device)
    indices = [part for _ in range(6) for part in batches]
    objective, losses = Objective(r1=r1), {}
    for how in ("plain", "captured"):
        generator, discriminator = copy.deepcopy(start)
        rate = torch.tensor(0.0002, device=device)
        adam = dict(lr=rate, betas=(0.5, 0.999), fused=True, capturable=True)
        optimizers = [torch.optim.Adam(network.parameters(), **adam) for network in (generator, discriminator)]
        penalty = partial(objective.penalty, discriminator)

        def train_batch(generator, discriminator, picked, penalised, optimizers=optimizers, penalty=penalty):
            inputs = *batches.gather(picked), z[picked], gen_labels[picked]
            terms = objective, penalty if penalised else None
            return acgan.train_step(generator, discriminator, *optimizers, *inputs, *terms)

        call = fast = speed.accelerate(train_batch, generator, discriminator, 64, "off", "off")
        if how == "plain":
            call = fast.call
        losses[how] = []
        for step, picked in enumerate(indices):
            rate.fill_(0.0002 * (1 - step / 60))
            metrics = call(picked, objective.penalised(step))
            losses[how].append([metrics["d_loss"].item(), metrics["g_loss"].item()])
    assert set(fast.graphs) == {(64, False), (24, False)} | ({(64, True)} if r1 else set()) and fast.works
    torch.testing.assert_close(torch.tensor(losses["captured"]), torch.tensor(losses["plain"]), rtol=1e-3, atol=0)


def test_replays_draw_new_numbers():
    def draw(generator, discriminator, indices, penalised):
        return {"drawn": torch.rand((), device="cuda")}

    call = speed.accelerate(draw, Generator().cuda(), Discriminator().cuda(), 64, "off", "off")
    indices = torch.arange(64, device="cuda")
    drawn = [call(indices)["drawn"].item() for _ in range(20)]
    assert call.works and len(set(drawn)) == 20


def test_images_beyond_the_memory_budget_train_as_those_in_memory(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "shapes", 40)
    flags = ["--dataset", "folder", "--data_root", root, "--device", "cuda", "--seed", 0, "--batch_size", 16,
             "--log_interval", 1, "--max_steps", 16]  # fmt: skip
    for how, share in [("memory", 1), ("file", 0)]:
        monkeypatch.setattr(folder, "MEMORY_SHARE", share)
        assert call(acgan.main, *flags, "--out_dir", tmp_path / how).status == 0
    ours, theirs = ([row["d_real_adv"] for row in read_rows(tmp_path / how)] for how in ("memory", "file"))
    assert ours[:8] == pytest.approx(theirs[:8], rel=1e-2)


class StopAfter20(StopRequest):
    """A Ctrl-C in batch 20; train() asks once a batch."""

    exit_status = 130
    requested = property(lambda self: next(self.batches) >= 20, lambda self, value: None)

    def __init__(self):
        self.batches = itertools.count(1)


@pytest.mark.parametrize("flags", [[], ["--amp", "bf16"], ["--compile", "on"], ["--recipe", "best"]])
def test_run_and_resume_on_the_gpu(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(acgan, "load_dataset", small.few(150))
    words = ["--device", "cuda", "--seed", 0, "--log_interval", 1, "--out_dir", tmp_path, *flags, "--max_steps", 40]
    with monkeypatch.context() as patch:
        patch.setattr(acgan, "StopRequest", StopAfter20)
        first = call(acgan.main, *words)
    assert first.status == 130 and read_checkpoint(tmp_path)["step"] == 20, first.err
    second = call(acgan.main, "--resume", tmp_path, "--device", "cuda", "--max_steps", 40)
    assert second.status == 0, second.err
    assert "as capturing failed" not in first.err + second.err and "as it failed" not in first.err + second.err
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(40))
    assert all(math.isfinite(row["d_loss"]) for row in rows)
    assert read_checkpoint(tmp_path)["step"] == 40
    assert (tmp_path / "images" / "0.png").exists()


def test_batch_that_cannot_be_captured_goes_on_without(capsys):
    def waits_for_the_device(generator, discriminator, indices, penalised):
        return {"drawn": torch.rand(int(indices.sum()) + 1, device="cuda").sum()}

    call = speed.accelerate(waits_for_the_device, Generator().cuda(), Discriminator().cuda(), 4, "off", "off")
    drawn = [call(torch.arange(4, device="cuda"))["drawn"].item() for _ in range(10)]
    assert not call.works and len(set(drawn)) == 10
    assert capsys.readouterr().err.startswith("CUDA graph: off, as capturing failed")
