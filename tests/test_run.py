"""Small real runs: what they print, what they write, and how they stop."""

import json
import math
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import read_board, read_rows
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.utils import make_grid

from models import load_network
from runlog import CURVES
from utils import Stopped, StopRequest


@pytest.fixture(scope="module")
def epochs_run(run, tmp_path_factory):
    """Two epochs of three batches, the last smaller, and a bit of the third."""
    out_dir = tmp_path_factory.mktemp("epochs")
    flags = ["--batch_size", 24, "--img_size", 16, "--max_steps", 7, "--sample_interval", 3, "--log_interval", 2]
    result = run("--seed", 5, *flags, "--out_dir", out_dir, digits=60)
    assert result.returncode == 0, result.stderr
    return out_dir, result


def test_piped_run_prints_one_line_an_epoch_and_nothing_else(epochs_run):
    _, result = epochs_run
    assert result.stderr == ""
    assert [re.match(r"epoch +(\d+)/200 +batches (\d+) ", line).groups() for line in result.stdout.splitlines()] == [
        ("1", "3"),
        ("2", "6"),
        ("3", "7"),
    ]


def test_metrics_rows(epochs_run):
    rows = read_rows(epochs_run[0])
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (2, 0), (4, 1), (6, 2)]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    assert [rows[1]["d_acc_real"] * 12 % 1, rows[1]["d_acc"] * 24 % 1] == [0, 0]  # of the last, smaller batch


def test_grids_stand_at_their_steps_with_one_column_a_class(epochs_run):
    out_dir, _ = epochs_run
    for folder in ("images", "images/fixed_z"):
        assert sorted(path.name for path in (out_dir / folder).glob("*.png")) == ["0.png", "3.png", "6.png"]
    assert Image.open(out_dir / "images" / "6.png").size == (10 * 18 + 2, 10 * 18 + 2)


def test_tensorboard_has_the_tutorials_tags_and_the_curves(epochs_run):
    out_dir, _ = epochs_run
    board = read_board(out_dir)
    for tag in ("ACGAN_acc", "dist_loss", "gene_loss"):
        assert [event.step for event in board.Scalars(tag)] == [1, 2, 3]
    assert [event.step for event in board.Images("real_image")] == [1, 2, 3]
    assert [event.step for event in board.Images("fake_image")] == [0, 3, 6]
    nodes = " ".join(node.name for node in board.Graph().node)
    assert "Generator[generator]/" in nodes and "Discriminator[discriminator]/" in nodes
    rows = read_rows(out_dir)
    assert len(CURVES) == 11
    for key, tag in CURVES.items():
        assert [event.step for event in board.Scalars(tag)] == [row["step"] for row in rows]
        np.testing.assert_allclose([event.value for event in board.Scalars(tag)], [row[key] for row in rows], rtol=1e-6)


def test_config_repeats_the_run(epochs_run):
    config = json.loads((epochs_run[0] / "config.json").read_text())
    assert config["seed"] == 5 and config["device"] == "cpu"
    assert config["options"]["batch_size"] == 24 and config["options"]["lr"] == 0.0002
    assert config["versions"]["torch"] == torch.__version__


def test_weights_load_as_data_and_draw_what_the_last_grid_shows(epochs_run):
    out_dir, _ = epochs_run
    packed = torch.load(out_dir / "acgan_gen.pth", weights_only=True)
    assert packed["config"] == {"n_classes": 10, "latent_dim": 100, "img_size": 16, "channels": 1}
    np.random.seed(5)  # replay the run's NumPy stream up to the grid at step 6, drawn by the final weights
    for step in range(7):
        batch = (24, 24, 12)[step % 3]
        np.random.normal(0, 1, (batch, 100)), np.random.randint(0, 10, batch)
        z = np.random.normal(0, 1, (100, 100)) if step % 3 == 0 else None
    imgs = load_network(out_dir / "acgan_gen.pth")(torch.from_numpy(z).float(), torch.arange(100) % 10)
    grid = make_grid(imgs.detach(), nrow=10, normalize=True)[0].numpy() * 255
    shown = np.asarray(Image.open(out_dir / "images" / "6.png"))[..., 0]
    np.testing.assert_allclose(grid, shown, atol=1)
    validity, label = load_network(out_dir / "acgan_dist.pth")(imgs)
    assert validity.shape == (100, 1) and label.shape == (100, 10)


def test_running_average_changes_nothing_in_the_run(run, epochs_run, tmp_path):
    flags = ["--batch_size", 24, "--img_size", 16, "--max_steps", 7, "--sample_interval", 3, "--log_interval", 2]
    assert run("--seed", 5, *flags, "--ema", 0, "--out_dir", tmp_path, digits=60).returncode == 0
    out_dir, _ = epochs_run
    assert (tmp_path / "acgan_gen.pth").read_bytes() == (out_dir / "acgan_gen.pth").read_bytes()
    load = lambda path: load_network(path).state_dict()  # noqa: E731
    last, kept = load(out_dir / "acgan_gen.pth"), load(out_dir / "acgan_gen_ema.pth")
    assert last.keys() == kept.keys() and not torch.equal(last["l1.0.weight"], kept["l1.0.weight"])
    for name, tensor in load(tmp_path / "acgan_gen_ema.pth").items():
        if name.endswith(("weight", "bias")):  # the last grid moved G's statistics after the average was taken
            assert torch.equal(tensor, last[name])


def test_second_run_into_the_folder_leaves_the_first_ones_record_whole(run, tmp_path):
    flags = ["--batch_size", 16, "--img_size", 16, "--log_interval", 1, "--out_dir", tmp_path]
    assert run("--seed", 1, "--max_steps", 2, "--sample_interval", 1, *flags).returncode == 0
    first = json.loads((tmp_path / "config.json").read_text())
    first_rows = read_rows(tmp_path)
    first_weights = (tmp_path / "acgan_gen.pth").read_bytes()
    second = run("--max_steps", 3, *flags)
    kept = tmp_path / first["log_dir"]
    assert f"moved to {kept}" in second.stderr
    assert json.loads((kept / "config.json").read_text()) == first and read_rows(kept) == first_rows
    assert (kept / "acgan_gen.pth").read_bytes() == first_weights
    for folder in ("images", "images/fixed_z"):
        assert sorted(path.name for path in (kept / folder).glob("*.png")) == ["0.png", "1.png"]
        assert [path.name for path in (tmp_path / folder).glob("*.png")] == ["0.png"]
    assert len(read_rows(tmp_path)) == 3
    assert [event.step for event in read_board(tmp_path).Scalars("D_loss/total")] == [0, 1, 2]
    assert EventAccumulator(str(kept)).Reload().Scalars("D_loss/total")[-1].step == 1

    # without --seed one was drawn and printed: it repeats the run to the bit
    seed = re.search(r"--seed (\d+) repeats this run", second.stderr)[1]
    second_rows = read_rows(tmp_path)
    assert run("--seed", seed, "--max_steps", 3, *flags).returncode == 0
    assert read_rows(tmp_path) == second_rows != first_rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_mid_run_stops_soon_with_all_files_whole(start, tmp_path, number):
    process = start("--seed", 0, "--log_interval", 1, "--sample_interval", 1, "--out_dir", tmp_path)
    while not (tmp_path / "images" / "2.png").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == "" and re.fullmatch(
        r"Stopped by a signal after batch \d+; --resume goes on from .*checkpoint.pt\n", err
    )
    rows = read_rows(tmp_path)
    steps = [row["step"] for row in rows]
    assert steps == list(range(len(rows))) and f"after batch {steps[-1]};" in err
    for step in steps:
        Image.open(tmp_path / "images" / f"{step}.png").load()
    load_network(tmp_path / "acgan_gen.pth")
    assert not list(tmp_path.rglob(".*.part"))


def test_a_long_batch_is_not_waited_for_but_a_long_write_is(monkeypatch):
    monkeypatch.setattr(StopRequest, "PATIENCE", 0.05)
    with pytest.raises(Stopped), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.take_your_time()
        time.sleep(0.2)
    assert stop.requested and stop.exit_status == 143


def test_divergence_is_named_and_keeps_no_weights(run, tmp_path):
    result = run("--seed", 0, "--batch_size", 8, "--lr", 1e30, "--max_steps", 3, "--out_dir", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "acgan.py: error: the loss is no longer finite at batch 0; there is no checkpoint yet\n"
    assert not (tmp_path / "acgan_gen.pth").exists()


def test_reader_that_goes_away_ends_no_training(start, tmp_path):
    process = start(
        "--seed", 0, "--batch_size", 24, "--img_size", 16, "--max_steps", 7, "--out_dir", tmp_path, digits=60
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 0
    load_network(tmp_path / "acgan_gen.pth")


def test_memory_that_does_not_suffice_is_one_line(run, tmp_path):
    result = run("--seed", 0, "--latent_dim", 2**31 - 1, "--max_steps", 1, "--out_dir", tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.startswith("acgan.py: error: not enough memory") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_run_without_its_config_is_set_aside_too(run, tmp_path):
    flags = ["--seed", 1, "--batch_size", 16, "--img_size", 16, "--max_steps", 1, "--out_dir", tmp_path]
    assert run(*flags).returncode == 0
    (tmp_path / "config.json").unlink()
    weights = (tmp_path / "acgan_gen.pth").read_bytes()
    assert "moved to" in run(*flags).stderr
    assert [path.read_bytes() for path in (tmp_path / "logs").glob("*/acgan_gen.pth")] == [weights]


def test_two_runs_cannot_write_to_one_folder(start, run, tmp_path):
    flags = ["--seed", 1, "--batch_size", 16, "--img_size", 16, "--compile", "off", "--out_dir", tmp_path]
    process = start(*flags)
    while not (tmp_path / "images" / "0.png").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    result = run(*flags)
    assert result.returncode == 2 and "another run is writing to" in result.stderr
    process.terminate()
    process.communicate(timeout=60)
    assert load_network(tmp_path / "acgan_gen.pth")
