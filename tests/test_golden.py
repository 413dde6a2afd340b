"""The run that must print what the tutorial's own script printed."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import read_rows
from PIL import Image

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tutorial_seed0.json").read_text())


pytestmark = pytest.mark.faithful


@pytest.fixture(scope="module")
def golden_run(start, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("golden")
    flags = ["--seed", GOLDEN["seed"], *GOLDEN["args"], "--log_interval", 1, "--max_steps", len(GOLDEN["batches"])]
    process = start(*flags, "--out_dir", out_dir, digits=None, env={"OMP_NUM_THREADS": "2"})
    _, err = process.communicate()
    assert process.returncode == 0, err
    return out_dir


def test_losses_and_accuracies_are_the_tutorials(golden_run):
    rows = read_rows(golden_run)
    assert [row["step"] for row in rows] == list(range(20))
    for row, batch in zip(rows, GOLDEN["batches"], strict=True):
        assert row["d_loss"] == pytest.approx(batch["d_loss"], rel=1e-5)
        assert row["g_loss"] == pytest.approx(batch["g_loss"], rel=1e-5)
        assert row["d_acc"] == batch["d_acc"]


def test_sample_grids_are_the_tutorials(golden_run):
    for step, means in GOLDEN["grid_cell_means"].items():
        grid = np.asarray(Image.open(golden_run / "images" / f"{step}.png").convert("L")) / 255
        assert grid.shape == (342, 342)  # ten cells of 32 pixels, each with 2 pixels before it, and 2 at the end
        cells = grid[2:, 2:].reshape(10, 34, 10, 34)[:, :32, :, :32].mean(axis=(1, 3))
        np.testing.assert_allclose(cells, means, atol=0.002)


def test_parts_add_up_to_the_losses(golden_run):
    for row in read_rows(golden_run):
        d_parts = [row[key] for key in ("d_real_adv", "d_real_aux", "d_fake_adv", "d_fake_aux")]
        assert row["d_loss"] == pytest.approx(np.mean(d_parts), rel=1e-6)
        assert row["g_loss"] == pytest.approx((row["g_adv"] + row["g_aux"]) / 2, rel=1e-6)
        assert row["d_acc"] == pytest.approx((row["d_acc_real"] + row["d_acc_fake"]) / 2)
