"""Two processes on one machine, over gloo: equal parameters, divided data, repeatable; one that dies loses nothing."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_same_run, read_rows

from batches import ShuffledBatches
from checkpoint import read_checkpoint

DIGITS, BATCH, STEPS = 205, 8, 20  # 13 batches an epoch for each of two, the last of 7 and of 6
FLAGS = ["--seed", 3, "--batch_size", BATCH, "--img_size", 16, "--latent_dim", 8, "--log_interval", 1,
         "--sample_interval", 7, "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def start_two(data_root):
    """start_two(notes, *flags): torchrun with two processes, each of which writes down what it does."""

    def start(notes, *flags, torchrun=(), steps=STEPS, kill_at=""):
        notes.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *torchrun,
                   ROOT / "tests" / "watched.py", DIGITS, notes, "--data_root", data_root, *FLAGS, *flags,
                   "--max_steps", steps]  # fmt: skip
        return subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"KILL_AT": kill_at},
        )  # fmt: skip

    return start


def read_notes(notes):
    """What each process did, batch by batch."""
    return [[json.loads(line) for line in (notes / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]


@pytest.fixture(scope="module")
def straight(start_two, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("straight")
    process = start_two(out_dir / "notes", "--out_dir", out_dir)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 2 and "13" in out  # one process talks: a line an epoch
    return out_dir


def test_parameters_are_equal_after_every_batch_though_images_and_noise_differ(straight):
    first, second = read_notes(straight / "notes")
    assert len(first) == len(second) == STEPS
    assert not {batch["z"] for batch in first} & {batch["z"] for batch in second}  # each its own noise
    hashes = [batch["parameters"] for batch in first]
    assert hashes == [batch["parameters"] for batch in second] and len(set(hashes)) == STEPS


def test_shares_are_disjoint_and_cover_the_epoch(straight):
    first, second = read_notes(straight / "notes")
    taken = [batch["indices"] for part in (first[:13], second[:13]) for batch in part]
    assert sorted(index for indices in taken for index in indices) == list(range(DIGITS))
    assert [len(indices) for indices in taken] == [8] * 12 + [7] + [8] * 12 + [6]


@pytest.mark.parametrize(
    ("n", "batch_size", "world"), [(100, 8, 3), (97, 8, 3), (98, 8, 3), (7, 8, 3), (64, 8, 4), (60000, 64, 8)]
)
def test_any_number_of_processes_shares_an_epoch(n, batch_size, world):
    shares = []
    for rank in range(world):
        torch.manual_seed(0)
        batches = ShuffledBatches(torch.zeros(n, 1), torch.zeros(n), batch_size, rank=rank, world=world)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
    sizes = [len(indices) for share in shares for indices in share]
    assert torch.cat([indices for share in shares for indices in share]).sort().values.tolist() == list(range(n))
    assert min(sizes) == batches.smallest() >= 1 and max(sizes) <= batch_size + 1


def test_same_seed_repeats(straight, start_two, tmp_path):
    process = start_two(tmp_path / "notes", "--out_dir", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert read_notes(tmp_path / "notes") == read_notes(straight / "notes")
    assert_same_run(tmp_path, straight)


def test_lost_process_ends_the_run_and_resuming_loses_nothing(straight, start_two, tmp_path):
    flags = ["--out_dir", tmp_path, "--checkpoint_interval", 3]
    process = start_two(tmp_path / "notes", *flags, kill_at="1 8")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert read_checkpoint(tmp_path)["steps"] == 6
    assert "checkpoint" in err  # the survivor says where the last one is, or that it was stopped
    process = start_two(tmp_path / "notes", "--resume", "--out_dir", tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert_same_run(tmp_path, straight)


def test_restart_by_torchrun_goes_on_by_itself(straight, start_two, tmp_path):
    flags = ["--out_dir", tmp_path, "--checkpoint_interval", 3]
    process = start_two(
        tmp_path / "notes", *flags, torchrun=["--max_restarts", "1"], kill_at="0 8"
    )  # the one that writes
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert_same_run(tmp_path, straight)
    assert json.loads((tmp_path / "config.json").read_text())["resumed_after"] == 6


def test_term_stops_both_after_the_same_batch(start_two, tmp_path):
    process = start_two(tmp_path / "notes", "--out_dir", tmp_path, "--n_epochs", 1000, steps=10_000)
    rows = tmp_path / "metrics.jsonl"
    while not rows.exists() or rows.read_bytes().count(b"\n") < 40:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "Compile" not in err  # a run so long would be compiled if it were alone
    rows = read_rows(tmp_path)
    assert read_checkpoint(tmp_path)["steps"] == len(rows) == rows[-1]["step"] + 1
    first, second = read_notes(tmp_path / "notes")
    assert len(first) == len(second) == len(rows)


def test_finished_run_goes_on_from_the_end_of_its_epoch(start_two, tmp_path):
    process = start_two(tmp_path / "notes", "--out_dir", tmp_path, "--n_epochs", 1)
    assert process.wait(60) == 0 and len(read_rows(tmp_path)) == 13
    process = start_two(tmp_path / "notes", "--resume", "--n_epochs", 2, "--out_dir", tmp_path, steps=15)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(read_rows(tmp_path)) == 15


def test_checkpoint_of_two_is_not_for_one(straight, run):
    before = (straight / "checkpoint.pt").read_bytes()
    result = run("--resume", "--max_steps", 30, "--out_dir", straight)
    assert result.returncode == 2
    assert result.stderr.endswith("the checkpoint is of 2 processes, not of 1: start as many\n")
    assert (straight / "checkpoint.pt").read_bytes() == before


def test_compiling_is_for_one_process(start_two, tmp_path):
    process = start_two(tmp_path / "notes", "--compile", "on", "--out_dir", tmp_path / "run")
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode != 0 and err.count("acgan.py: error: argument --compile: on works in one process only") == 1
    )
    assert not (tmp_path / "run").exists()


def test_synchronised_norms_need_a_gpu(run, tmp_path):
    result = run("--sync_bn", "on", "--seed", 0, "--out_dir", tmp_path / "run")
    assert result.returncode == 2 and "argument --sync_bn: " in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
