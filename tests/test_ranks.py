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
from training.checkpoint import read_checkpoint
from utils import BadInput

DIGITS, BATCH, STEPS = 205, 8, 20  # 13 batches an epoch for each of two ranks, the last of 7 and of 6
FLAGS = ["--seed", 3, "--batch_size", BATCH, "--img_size", 16, "--latent_dim", 8, "--log_interval", 1,
         "--sample_interval", 7]  # fmt: skip


@pytest.fixture(scope="module")
def start_two(start):
    """start_two(out_dir, *flags, **variables): torchrun with two ranks; tests/small.py names the variables."""

    def start_two(out_dir, *flags, torchrun=(), steps=STEPS, **env):
        (out_dir / "notes").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *torchrun]
        flags = [*FLAGS, "--out_dir", out_dir, "--max_steps", steps, *flags]
        return start(*flags, digits=DIGITS, command=command, env={"NOTES": str(out_dir / "notes")} | env)

    return start_two


def read_notes(out_dir):
    """What each rank did, batch by batch."""
    return [
        [json.loads(line) for line in (out_dir / f"notes/{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def straight(start_two, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("straight")
    process = start_two(out_dir)
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


def test_penalised_and_pretrained_runs_keep_the_parameters_equal_too(start_two, tmp_path):
    process = start_two(tmp_path, "--recipe", "best", "--pretrain_class_head", 1, steps=6)
    _, err = process.communicate()
    assert process.returncode == 0 and err.count("Pretrained D's class head") == 1, err
    first, second = ([note["parameters"] for note in notes] for notes in read_notes(tmp_path))
    assert len(first) == 6 and first == second


def test_shares_are_disjoint_and_cover_the_epoch(straight):
    first, second = read_notes(straight)
    # a whole epoch's last batch is gathered once more, for the real_image grid
    taken = [batch["indices"] for part in (first[:13], second[:13]) for batch in part]
    assert sorted(index for indices in taken for index in indices) == list(range(DIGITS))
    assert [len(indices) for indices in taken] == [8] * 12 + [7] + [8] * 12 + [6]


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size"), [(100, 8, 3), (97, 8, 3), (98, 8, 3), (7, 8, 3), (64, 8, 4), (60000, 64, 8)]
)
def test_any_number_of_ranks_shares_an_epoch(n, batch_size, world_size):
    data, shares = LabelledImages(torch.zeros(n, 1), torch.zeros(n), ["a", "b"]), []
    for rank in range(world_size):
        torch.manual_seed(0)
        batches = Batches(data, batch_size, "cpu", SimpleNamespace(rank=rank, world_size=world_size, broadcast=int))
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
        batches.check(32)
    sizes = [len(indices) for share in shares for indices in share]
    assert torch.cat([indices for share in shares for indices in share]).sort().values.tolist() == list(range(n))
    assert 1 <= min(sizes) <= max(sizes) <= batch_size + 1


def test_too_few_images_for_the_ranks_are_refused():
    ranks = SimpleNamespace(rank=0, world_size=4, broadcast=int)
    with pytest.raises(BadInput, match="3 images are too few for 4 ranks"):
        Batches(LabelledImages(torch.zeros(3, 1), torch.zeros(3), ["a", "b"]), 8, "cpu", ranks).check(32)


@pytest.mark.parametrize("rank", [0, 1])
def test_lost_rank_loses_nothing_and_a_restart_by_torchrun_resumes(straight, start_two, tmp_path, rank):
    restarts = ["--max_restarts", "1"] if rank == 0 else []
    process = start_two(tmp_path, "--checkpoint_interval", 3, torchrun=restarts, KILL_AT=f"{rank} 8")
    _, err = process.communicate()
    if not restarts:
        assert process.returncode != 0 and read_checkpoint(tmp_path)["step"] == 6
        process = start_two(tmp_path, "--resume")
        _, err = process.communicate()
    assert process.returncode == 0 and "Resuming after batch 6 of 20." in err, err
    assert_same_run(tmp_path, straight)


def test_term_stops_both_after_the_same_batch(start_two, tmp_path):
    process = start_two(tmp_path, steps=10_000)
    while not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") < 20:
        assert process.poll() is None, process.communicate()
        signal.sigtimedwait([], 0.02)
    process.terminate()
    _, err = process.communicate()
    rows = read_rows(tmp_path)
    assert "Compile" not in err  # a run so long would be compiled on one rank
    assert read_checkpoint(tmp_path)["step"] == len(rows) == rows[-1]["step"] + 1
    first, second = read_notes(tmp_path)
    assert len(first) == len(second) == len(rows)


def test_divergence_on_the_second_rank_is_no_traceback(start_two, tmp_path):
    process = start_two(tmp_path, SPOIL_AT="1 2")
    _, err = process.communicate()
    assert process.returncode != 0
    assert "acgan.py: error: rank 1: the loss is no longer finite at step 2; there is no checkpoint yet" in err
    assert 'acgan.py", line' not in err and not (tmp_path / "acgan_gen.pth").exists()


def test_checkpoint_of_two_ranks_is_not_for_one(straight, train):
    before = (straight / "checkpoint.pt").read_bytes()
    result = train("--resume", straight, "--max_steps", 30)
    assert result.status == 2 and "the run has 2 ranks, not 1: start as many\n" in result.err
    assert (straight / "checkpoint.pt").read_bytes() == before
