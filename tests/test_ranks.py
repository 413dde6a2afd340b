"""Two ranks on one machine, over gloo: equal parameters, divided data; one that fails or dies loses nothing."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, read_rows

from data import LabelledImages
from data.batches import Batches
from run.checkpoint import read_checkpoint
from utils import BadInput

DIGITS, BATCH, STEPS = 205, 8, 20  # 13 batches an epoch for each of two ranks, the last of 7 and of 6
FLAGS = ["--seed", 3, "--batch_size", BATCH, "--img_size", 16, "--latent_dim", 4, "--log_interval", 1,
         "--sample_interval", 7]  # fmt: skip


@pytest.fixture(scope="module")
def start_two(start):
    """start_two(out_dir, *flags, **variables): two ranks; tests/small.py names the variables."""

    def start_two(out_dir, *flags, restarts=0, steps=STEPS, **kwargs):
        (out_dir / "notes").mkdir(exist_ok=True)
        env = {"NOTES": str(out_dir / "notes")} | {name: kwargs.pop(name) for name in list(kwargs) if name.isupper()}
        env |= {} if "command" in kwargs else {"RANKS": f"2 {restarts}"}
        return start(*FLAGS, "--out_dir", out_dir, "--max_steps", steps, *flags, digits=DIGITS, env=env, **kwargs)

    return start_two


def read_notes(out_dir):
    """What each rank did, batch by batch."""
    return [
        [json.loads(line) for line in (out_dir / f"notes/{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def straight(start_two, tmp_path_factory):
    """A run of STEPS batches, with torchrun itself."""
    out_dir = tmp_path_factory.mktemp("straight")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start_two(out_dir, command=torchrun)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 2 and "13" in out  # one rank talks: a line an epoch
    assert err.count("Data: mnist, 205 grey images") == 1
    return out_dir


def test_parameters_are_equal_after_every_batch_though_images_and_noise_differ(straight):
    first, second = read_notes(straight)
    assert len(first) == len(second) == STEPS
    assert not {batch["z"] for batch in first} & {batch["z"] for batch in second}  # each its own noise
    hashes = [batch["parameters"] for batch in first]
    assert hashes == [batch["parameters"] for batch in second] and len(set(hashes)) == STEPS


def test_shares_are_disjoint_and_cover_the_epoch(straight):
    first, second = read_notes(straight)
    # a whole epoch's last batch is gathered once more, for the real_image grid
    taken = [batch["indices"] for part in (first[:13], second[:13]) for batch in part]
    assert sorted(index for indices in taken for index in indices) == list(range(DIGITS))
    assert [len(indices) for indices in taken] == [8] * 12 + [7] + [8] * 12 + [6]


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size", "d_steps"),
    [(100, 8, 3, 1), (97, 8, 3, 1), (98, 8, 3, 1), (7, 8, 3, 1), (64, 8, 4, 1), (60000, 64, 8, 1), (135, 8, 2, 4),
     (136, 8, 2, 4), (8, 8, 2, 4)],
)  # fmt: skip
def test_any_number_of_ranks_shares_an_epoch(n, batch_size, world_size, d_steps):
    data, shares = LabelledImages(torch.zeros(n, 1), torch.zeros(n), ["a", "b"]), []
    for rank in range(world_size):
        torch.manual_seed(0)
        ranks = SimpleNamespace(rank=rank, world_size=world_size, broadcast=int)
        batches = Batches(data, batch_size, "cpu", ranks, shares=d_steps)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
        batches.check(32, "batch")
    sizes = [len(indices) for share in shares for indices in share]
    assert torch.cat([indices for share in shares for indices in share]).sort().values.tolist() == list(range(n))
    assert d_steps <= min(sizes) <= max(sizes) <= (batch_size + 1) * d_steps  # every rank updates D as often


def test_too_few_images_for_the_ranks_are_refused():
    ranks = SimpleNamespace(rank=0, world_size=4, broadcast=int)
    with pytest.raises(BadInput, match="3 images are too few for 4 ranks"):
        Batches(LabelledImages(torch.zeros(3, 1), torch.zeros(3), ["a", "b"]), 8, "cpu", ranks).check(32, "batch")
    data = LabelledImages(torch.zeros(7, 1), torch.zeros(7), ["a", "b"])
    Batches(data, 8, "cpu", ranks).check(32, "batch")
    with pytest.raises(BadInput, match="7 images are too few for 4 ranks"):  # two updates of D need two a rank
        Batches(data, 8, "cpu", ranks, shares=2).check(32, "batch")


def test_lost_ranks_lose_nothing_as_torchrun_restarts_the_run(straight, start_two, tmp_path):
    process = start_two(tmp_path, "--checkpoint_interval", 3, restarts=2, KILL_AT="0 8, 1 5")
    _, err = process.communicate()
    assert process.returncode == 0 and err.count("Resuming after batch") == 2, err
    assert "Resuming after batch 6 of 20." in err and "Resuming after batch 9 of 20." in err
    assert_same_run(tmp_path, straight)


def test_term_stops_both_after_the_same_batch_and_penalised_parameters_are_equal_too(start_two, tmp_path):
    process = start_two(tmp_path, "--recipe", "best", "--d_steps", 2, "--pretrain_class_head", 1, steps=10_000)
    while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") < 20:
        assert process.poll() is None, process.communicate()
        signal.sigtimedwait([], 0.02)
    process.terminate()
    _, err = process.communicate()
    rows = read_rows(tmp_path)
    assert "Warning" not in err and "Compile" not in err  # a run so long would be compiled on one rank
    assert err.count("Pretrained D's class head") == 1 and "-m torch.distributed.run --nproc_per_node=2 " in err, err
    assert read_checkpoint(tmp_path)["step"] == len(rows) == rows[-1]["step"] + 1
    first, second = ([note["parameters"] for note in notes] for notes in read_notes(tmp_path))
    assert len(first) == len(rows) and first == second and "d_penalty" in rows[4]


def test_divergence_on_the_second_rank_is_no_traceback_and_the_run_can_be_continued(straight, start_two, tmp_path):
    process = start_two(tmp_path, "--checkpoint_interval", 3, SPOIL_AT="1 8")
    _, err = process.communicate()
    assert process.returncode != 0 and not (tmp_path / "acgan_gen.pth").exists()
    last = f"the last good checkpoint is {tmp_path / 'checkpoint.pt'}, after batch 6"
    assert f"acgan.py: error: rank 1: the loss is no longer finite at step 8; {last}" in err
    assert 'acgan.py", line' not in err
    process = start_two(tmp_path, "--resume")
    _, err = process.communicate()
    assert process.returncode == 0 and "Resuming after batch 6 of 20." in err, err
    assert_same_run(tmp_path, straight)


def test_scores_that_cannot_be_made_end_all_ranks_without_a_traceback(start_two, tmp_path):
    process = start_two(tmp_path, "--eval_interval", 1)  # the bundled judge knows larger images
    _, err = process.communicate()
    assert process.returncode != 0 and "argument --judge: it knows 10 classes (0, 1, 2, ...) in grey, 32 pixels" in err
    assert "rank 1: rank 0 was lost; there is no checkpoint yet" in err
    assert 'acgan.py", line' not in err and not (tmp_path / "metrics.jsonl").exists()


def test_checkpoint_of_two_ranks_is_not_for_one(straight, train):
    before = (straight / "checkpoint.pt").read_bytes()
    result = train("--resume", straight, "--max_steps", 30)
    assert result.status == 2 and "the run has 2 ranks, not 1: start as many\n" in result.err
    assert (straight / "checkpoint.pt").read_bytes() == before
