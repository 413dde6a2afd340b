"""Runs that must print what an earlier script printed: the tutorial's own, and for the recipe this one's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, read_rows
from PIL import Image

import acgan

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tutorial_seed0.json").read_text())
RECIPE = json.loads((Path(__file__).parent / "golden" / "recipe_best_seed0.json").read_text())


@pytest.fixture(scope="module")
def golden_run(start, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("golden")
    flags = ["--seed", GOLDEN["seed"], *GOLDEN["args"], "--log_interval", 1, "--max_steps", len(GOLDEN["batches"])]
    process = start(*flags, "--out_dir", out_dir, digits=None, env={"OMP_NUM_THREADS": "2"})
    _, err = process.communicate()
    assert process.returncode == 0, err
    return out_dir


@pytest.mark.faithful
def test_losses_and_accuracies_are_the_tutorials(golden_run):
    rows = read_rows(golden_run)
    assert [row["step"] for row in rows] == list(range(20))
    for row, batch in zip(rows, GOLDEN["batches"], strict=True):
        assert row["d_loss"] == pytest.approx(batch["d_loss"], rel=1e-5)
        assert row["g_loss"] == pytest.approx(batch["g_loss"], rel=1e-5)
        assert row["d_acc"] == batch["d_acc"]


@pytest.mark.faithful
def test_sample_grids_are_the_tutorials(golden_run):
    for step, means in GOLDEN["grid_cell_means"].items():
        grid = np.asarray(Image.open(golden_run / "images" / f"{step}.png").convert("L")) / 255
        assert grid.shape == (342, 342)  # ten cells of 32 pixels, each with 2 pixels before it, and 2 at the end
        cells = grid[2:, 2:].reshape(10, 34, 10, 34)[:, :32, :, :32].mean(axis=(1, 3))
        np.testing.assert_allclose(cells, means, atol=0.002)


@pytest.mark.faithful
def test_parts_add_up_to_the_losses(golden_run):
    for row in read_rows(golden_run):
        d_parts = [row[key] for key in ("d_real_adv", "d_real_aux", "d_fake_adv", "d_fake_aux")]
        assert row["d_loss"] == pytest.approx(np.mean(d_parts), rel=1e-6)
        assert row["g_loss"] == pytest.approx((row["g_adv"] + row["g_aux"]) / 2, rel=1e-6)
        assert row["d_acc"] == pytest.approx((row["d_acc_real"] + row["d_acc_fake"]) / 2)


def test_recipe_computes_what_it_did(tmp_path):
    instructions, batches = torch.backends.cpu.get_cpu_capability(), RECIPE["batches"]
    wanted, rel = batches.get(instructions, batches["AVX2"]), 1e-4  # AVX2 and AVX-512 differ by up to 2e-5
    flags = ["--seed", RECIPE["seed"], *RECIPE["args"], "--log_interval", 1, "--max_steps", len(wanted)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = call(acgan.main, "--device", "cpu", *flags, "--out_dir", tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert result.status == 0, result.err
    rows = read_rows(tmp_path)
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]  # every fourth batch has the penalty
    for ours, theirs in zip(rows, wanted, strict=True):
        for name in ("step", "epoch", "d_acc", "d_acc_real", "d_acc_fake"):
            assert ours[name] == theirs[name]
        for name in ("d_loss", "d_real_adv", "d_real_aux", "d_fake_adv", "d_fake_aux", "g_loss", "g_adv"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel)  # g_aux, near 0, is what g_adv lacks to g_loss
        if "d_penalty" in theirs:
            assert ours["d_penalty"] == pytest.approx(theirs["d_penalty"], rel=10 * rel)
