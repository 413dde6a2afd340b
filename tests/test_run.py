"""Small real runs: what they print, what they write, and how they stop."""

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import small
import torch
from conftest import ROOT, call, errors, files, on_terminal, read_board, read_rows
from PIL import Image
from torchvision.utils import make_grid

import acgan
import generate
from run import record
from run.plan import Plan
from run.record import Record
from run.weights import load_network
from utils import Stopped, StopRequest

SMALL = ["--batch_size", 24, "--img_size", 16, "--latent_dim", 4]
WEIGHTS = ("acgan_gen.pth", "acgan_dist.pth", "acgan_gen_ema.pth")


@pytest.fixture(scope="module")
def epochs_run(train, tmp_path_factory):
    """Two epochs of three batches, the last smaller, and a bit of the third."""
    out_dir = tmp_path_factory.mktemp("epochs")
    flags = [*SMALL, "--max_steps", 7, "--sample_interval", 3, "--log_interval", 2]
    result = train("--seed", 5, *flags, "--out_dir", out_dir)
    assert result.status == 0, result.err
    return out_dir, result


def words_after_python(command: str, script: str) -> list[str]:
    """The flags of a command that this Python is told to run `script` with."""
    python, path, *flags = shlex.split(command)
    assert Path(python).absolute() == Path(sys.executable) and Path(path).resolve() == ROOT / script
    return flags


def test_piped_run_without_a_screen_says_where_its_pictures_are_once_and_how_far_it_is(train, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(record, "PIPED_INTERVAL", 0)
    result = train(*SMALL, "--sample_interval", 1, "--max_steps", 3, "--seed", 1, "--out_dir", tmp_path)
    images = tmp_path / "images"
    line = f"Sample grids: {images}. No screen here: copy them (scp), or serve them on port 8000: "
    assert result.status == 0 and result.err.count("Sample grids: ") == 1 and line in result.err
    assert f"-m http.server --directory {images}\n" in result.err
    assert re.search(
        r"^Epoch 1/1, batch 2 of \d+, left 0:00:0\d, D Loss \d\.\d{3}, G Loss .*, Acc .*%$", result.err, re.M
    )


def test_piped_run_prints_a_line_an_epoch_and_says_what_it_does(epochs_run):
    out_dir, result = epochs_run
    lines = [re.match(r"epoch +(\d+)/3 +batches (\d+) ", line).groups() for line in result.out.splitlines()]
    assert lines == [("1", "3"), ("2", "6"), ("3", "7")]
    *lines, last = result.err.splitlines()
    assert lines == [
        "Device: cpu.",
        "Data: mnist, 60 grey images of 10 classes.",
        "Done: acgan_gen.pth, acgan_dist.pth, acgan_gen_ema.pth, images/fixed_z/6.png and images/film.gif are in "
        f"{out_dir}",
    ]
    assert last.startswith("To draw with them: ") and last.endswith(f"generate.py --weights {out_dir}")
    flags = words_after_python(last.removeprefix("To draw with them: "), "generate.py")
    assert call(generate.main, *flags, "3", "--out", out_dir / "three.png").status == 0
    assert (out_dir / "three.png").exists()


def test_bar_of_80_columns_shows_all_figures_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(acgan, "load_dataset", small.few(60))
    flags = ["--device", "cpu", "--seed", 0, *SMALL, "--max_steps", 7, "--out_dir", tmp_path]
    shown = on_terminal(acgan.main, *flags)
    assert shown.status == 0
    lines = [line for line in shown.lines if line.startswith("Epoch")]
    assert max(len(line) for line in lines) <= 80
    last = [line.rstrip() for line in lines if line.startswith("Epoch 3/3")][-1]
    assert re.search(r"\| 1/1, left 0:00:00, D Loss \d\.\d{3}, G Loss \d\.\d{3}, Acc \d+\.\d%$", last), last


def test_terminal_of_no_width_gets_lines_in_place_of_bars(tmp_path, monkeypatch):
    monkeypatch.setattr(acgan, "load_dataset", small.few(60))
    flags = ["--device", "cpu", "--seed", 0, *SMALL, "--max_steps", 3, "--out_dir", tmp_path]
    shown = on_terminal(acgan.main, *flags, columns=0)
    assert shown.status == 0 and any(line.startswith("epoch   1/1  batches 3 ") for line in shown.lines)


def test_metrics_rows(epochs_run):
    rows = read_rows(epochs_run[0])
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (2, 0), (4, 1), (6, 2)]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
    assert rows[1]["d_acc_real"] * 12 == pytest.approx(round(rows[1]["d_acc_real"] * 12))  # of the last, smaller batch


def test_grids_stand_at_their_steps_with_one_column_a_class(epochs_run):
    out_dir, _ = epochs_run
    assert sorted(path.name for path in (out_dir / "images").glob("*.png")) == ["0.png", "3.png", "6.png"]
    assert sorted(path.name for path in (out_dir / "images/fixed_z").glob("*.png")) == ["0.png", "3.png", "6.png"]
    assert Image.open(out_dir / "images" / "6.png").size == (10 * 18 + 2, 10 * 18 + 2)
    with Image.open(out_dir / "images" / "film.gif") as film:
        assert film.n_frames == 3 and film.size == (182, 182 + 14) and film.info["loop"] == 0
        film.seek(2)
        shown = np.asarray(film.convert("L"), int)[14:]
    last = np.asarray(Image.open(out_dir / "images" / "fixed_z" / "6.png").convert("L"), int)
    assert np.abs(shown - last).mean() < 4  # 32 greys


def test_tensorboard_has_the_tutorials_tags_and_every_metric(epochs_run):
    out_dir, _ = epochs_run
    board, rows = read_board(out_dir), read_rows(out_dir)
    for tag in ("ACGAN_acc", "dist_loss", "gene_loss"):
        assert [event.step for event in board.Scalars(tag)] == [1, 2]
    assert [event.step for event in board.Images("real_image")] == [1, 2]
    for tag, folder in (("fake_image", "images"), ("fixed_z", "images/fixed_z")):
        assert sorted({event.step for event in board.Images(tag)}) == [0, 3, 6]
        for event in board.Images(tag):  # encoded once
            assert event.encoded_image_string == (out_dir / folder / f"{event.step}.png").read_bytes()
            assert (event.width, event.height) == (182, 182)
    metrics = rows[0].keys() - {"step", "epoch"}
    assert {tag for tag in board.Tags()["scalars"] if tag.startswith("batch/")} == {f"batch/{key}" for key in metrics}
    for key in metrics:
        points = [(event.step, event.value) for event in board.Scalars(f"batch/{key}")]
        assert points == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]
    assert b"- batch_size: 24" in board.Tensors("options/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboards_graph_shows_both_networks_in_the_articles_layers(epochs_run):
    names = {node.name for node in read_board(epochs_run[0]).Graph().node}
    layers = {
        "Generator[generator]": ["Upsample[1]", "Conv2d[2]", "Upsample[5]", "Conv2d[6]", "Conv2d[9]", "Tanh[10]"],
        "Discriminator[discriminator]": ["Conv2d[0]", "Conv2d[3]", "Conv2d[7]", "Conv2d[11]"],
    }
    for network, shown in layers.items():
        for layer in shown:
            assert any(f"/{network}/Sequential[conv_blocks]/{layer}/" in name for name in names), layer


def test_graph_that_cannot_be_drawn_is_one_warning(train, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no tracer in this Python\nand more about it")

    monkeypatch.setattr(torch.jit, "trace", fail)
    result = train("--seed", 5, *SMALL, "--max_steps", 2, "--log_interval", 1, "--out_dir", tmp_path)
    assert result.status == 0 and result.err.count("Warning") == 1 and "more about it" not in result.err
    assert "TensorBoard gets no graph of the networks (no tracer in this Python); training continues.\n" in result.err
    assert len(result.out.splitlines()) == 1, result.out  # the epoch's
    board = read_board(tmp_path)
    assert not board.Tags()["graph"] and len(board.Scalars("batch/d_loss")) == 2
    assert load_network(tmp_path / "acgan_gen.pth")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow itself is installed")
@pytest.mark.parametrize("broken", ["tensorflow", "tensorboard"])
def test_tensorboard_that_cannot_be_imported_is_one_line_and_nothing_is_written(train, tmp_path, monkeypatch, broken):
    (tmp_path / "path" / broken).mkdir(parents=True)
    if broken == "tensorboard":
        (tmp_path / "path" / broken / "__init__.py").write_text("raise ImportError('a part of it is missing')")
    why = {"tensorflow": r"module 'tensorflow' .*", "tensorboard": "a part of it is missing"}[broken]
    monkeypatch.syspath_prepend(tmp_path / "path")
    with mock.patch.dict(sys.modules):  # what the import leaves is forgotten
        for name in list(sys.modules):
            if name.removeprefix("torch.utils.").startswith(("tensorflow", "tensorboard")):
                del sys.modules[name]
        result = train("--seed", 5, *SMALL, "--max_steps", 1, "--out_dir", tmp_path / "run")
    line = errors(result)
    assert re.search(rf"TensorBoard cannot be imported \({why}\): pip install --force-reinstall tensorboard, or", line)
    assert "a folder named tensorflow" in line and not (tmp_path / "run").exists()


def test_config_repeats_the_run(epochs_run):
    config = json.loads((epochs_run[0] / "config.json").read_text())
    assert config["seed"] == 5 and config["device"] == "cpu" and config["classes"] == list("0123456789")
    assert config["options"]["batch_size"] == 24 and config["options"]["lr"] == 0.0002
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.faithful
def test_weights_load_as_data_and_draw_what_the_last_grid_shows(epochs_run):
    out_dir, _ = epochs_run
    packed = torch.load(out_dir / "acgan_gen.pth", weights_only=True)
    assert packed["config"] == {"n_classes": 10, "latent_dim": 4, "img_size": 16, "channels": 1}
    np.random.seed(5)  # replay the run's NumPy stream up to the grid at step 6, drawn by the final weights
    for step in range(7):
        batch = (24, 24, 12)[step % 3]
        np.random.normal(0, 1, (batch, 4)), np.random.randint(0, 10, batch)
        z = np.random.normal(0, 1, (100, 4)) if step % 3 == 0 else None
    imgs = load_network(out_dir / "acgan_gen.pth")(torch.from_numpy(z).float(), torch.arange(100) % 10)
    grid = make_grid(imgs.detach(), nrow=10, normalize=True)[0].numpy() * 255
    shown = np.asarray(Image.open(out_dir / "images" / "6.png"))[..., 0]
    np.testing.assert_allclose(grid, shown, atol=1)
    validity, label = load_network(out_dir / "acgan_dist.pth")(imgs)
    assert validity.shape == (100, 1) and label.shape == (100, 10)


def test_ema_changes_nothing_in_the_run(train, epochs_run, tmp_path):
    flags = [*SMALL, "--max_steps", 7, "--sample_interval", 3, "--log_interval", 2]
    assert train("--seed", 5, *flags, "--ema", 0, "--out_dir", tmp_path).status == 0
    out_dir, _ = epochs_run
    assert (tmp_path / "acgan_gen.pth").read_bytes() == (out_dir / "acgan_gen.pth").read_bytes()
    last, kept = (load_network(out_dir / name).state_dict() for name in ("acgan_gen.pth", "acgan_gen_ema.pth"))
    assert last.keys() == kept.keys() and not torch.equal(last["l1.0.weight"], kept["l1.0.weight"])
    for name, tensor in load_network(tmp_path / "acgan_gen_ema.pth").state_dict().items():
        if name.endswith(("weight", "bias")):  # the last grid moved G's statistics after the EMA was updated
            assert torch.equal(tensor, last[name])


def test_second_run_into_the_folder_leaves_the_first_ones_record_whole(train, tmp_path):
    """And leaves other people's files alone; a third one drops the first one's checkpoint alone."""
    names = (
        ".video.part",
        "images/2024-holiday.png",
        "images/007.png",
        "images/1.jpg",
        "logs/mine/checkpoint.pt",
        ".lock",
    )
    theirs = {name: tmp_path / name for name in names}
    for path in theirs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not ours")
    (tmp_path / ".acgan-123.part").write_text("ours, of a killed run")
    flags = [*SMALL, "--log_interval", 1, "--out_dir", tmp_path]
    assert train("--seed", 1, "--max_steps", 2, "--sample_interval", 1, *flags).status == 0
    assert not (tmp_path / ".acgan-123.part").exists()
    first = json.loads((tmp_path / "config.json").read_text())
    first_rows, first_weights = read_rows(tmp_path), [(tmp_path / name).read_bytes() for name in WEIGHTS]
    second = train("--max_steps", 3, *flags)
    kept = tmp_path / first["log_dir"]
    assert f"moved to {kept}" in second.err and "deleted" not in second.err
    assert json.loads((kept / "config.json").read_text()) == first and read_rows(kept) == first_rows
    assert [(kept / name).read_bytes() for name in WEIGHTS] == first_weights
    assert sorted(path.name for path in (kept / "images").glob("*.png")) == ["0.png", "1.png"]
    assert sorted(path.name for path in (tmp_path / "images").glob("[0-9].png")) == ["0.png"]
    assert (kept / "images" / "film.gif").exists() and all(path.read_text() == "not ours" for path in theirs.values())
    assert [event.step for event in read_board(tmp_path).Scalars("batch/d_loss")] == [0, 1, 2]

    # without --seed one was drawn and printed: it repeats the run bit by bit
    seed, second_rows = re.search(r"--seed (\d+) repeats this run", second.err)[1], read_rows(tmp_path)
    second_kept = tmp_path / json.loads((tmp_path / "config.json").read_text())["log_dir"]
    unfinished, unreadable = (tmp_path / "logs" / name for name in ("2020-02-02_20-20-20", "2020-02-02_20-20-20_2"))
    for path in (unfinished, unreadable):  # one was resumed where it had been moved, and stopped
        path.mkdir()
    packed = torch.load(kept / "checkpoint.pt", weights_only=True)
    torch.save(packed | {"finished": False}, unfinished / "checkpoint.pt")
    (unreadable / "checkpoint.pt").write_text("not a checkpoint")
    before = files(kept)
    third = train("--seed", seed, "--max_steps", 3, *flags)
    assert third.status == 0 and read_rows(tmp_path) == second_rows != first_rows
    assert "Checkpoints of runs before that one were deleted; their weights, rows and grids stay.\n" in third.err
    for folder in (tmp_path, second_kept, unfinished, unreadable):
        assert (folder / "checkpoint.pt").exists()
    assert files(kept) == {path: content for path, content in before.items() if path.name != "checkpoint.pt"} != before
    assert all(path.read_text() == "not ours" for path in theirs.values())


def test_grids_of_others_under_our_names_are_moved_not_overwritten(train, tmp_path):
    theirs = {name: tmp_path / "images" / name for name in ("0.png", "fixed_z/0.png", "film.gif")}
    (tmp_path / "images" / "fixed_z").mkdir(parents=True)
    for name, path in theirs.items():
        path.write_text(name)
    result = train("--seed", 1, *SMALL, "--max_steps", 1, "--out_dir", tmp_path)
    assert result.status == 0 and "moved to" in result.err
    (kept,) = (tmp_path / "logs").glob("*/images")
    assert all((kept / name).read_text() == name and theirs[name].read_bytes() != name.encode() for name in theirs)

    # a run without its config.json is moved aside too
    (tmp_path / "config.json").unlink()
    weights = (tmp_path / "acgan_gen.pth").read_bytes()
    assert "moved to" in train("--seed", 1, *SMALL, "--max_steps", 1, "--out_dir", tmp_path).err
    assert [path.read_bytes() for path in (tmp_path / "logs").glob("*/acgan_gen.pth")] == [weights]


def test_ctrl_c_in_mid_run_keeps_the_running_batch_with_all_files_whole(start, train, tmp_path):
    flags = ["--seed", 0, *SMALL, "--log_interval", 1, "--sample_interval", 1, "--out_dir", tmp_path]
    process = start(*flags, "--max_steps", 50, pause_at=4)
    assert "another run writes to" in errors(train(*flags))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    assert process.returncode == 130 and out.count("\n") == 2  # the whole epoch, and the one that was stopped
    files, last = err.splitlines()[2:]
    assert files.startswith("So far: acgan_gen.pth,") and "images/fixed_z/4.png and images/film.gif are in" in files
    said, command = last.split("; to continue: ")
    assert said == "Stopped after batch 5 of 50"
    flags = words_after_python(command, "acgan.py")
    assert flags == ["--resume", str(tmp_path), "--max_steps", "50", "--device", "cpu"]
    assert call(acgan.main, *flags, "--help").status == 0
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(5))
    for step in range(5):
        Image.open(tmp_path / "images" / f"{step}.png").load()
    assert load_network(tmp_path / "acgan_gen.pth") and (tmp_path / "images" / "film.gif").exists()
    assert not list(tmp_path.rglob(".*.part"))


def test_first_signal_waits_for_the_batch_and_a_second_one_does_not(monkeypatch):
    monkeypatch.setattr(StopRequest, "SAME_SIGNAL", 0.05)
    with pytest.raises(Stopped) as stopped, StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # one that torchrun passes on
        assert stop.requested and stop.exit_status == 143
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert stopped.value.exit_status == 130


def test_second_signal_ends_a_run_at_once(train, tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequest, "SAME_SIGNAL", 0.0)

    def long_batch(*inputs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(acgan, "train_step", long_batch)
    result = train("--seed", 0, *SMALL, "--out_dir", tmp_path)
    assert result.status == 130 and result.err.endswith("Stopped: what the last checkpoint holds is kept.\n")
    assert "Traceback" not in result.err and not (tmp_path / "acgan_gen.pth").exists()


def test_divergence_is_named_and_keeps_no_weights(train, tmp_path):
    result = train("--seed", 0, *SMALL, "--lr", 1e30, "--max_steps", 3, "--out_dir", tmp_path)
    assert result.status == 1
    assert result.err.splitlines()[2:] == [
        "acgan.py: error: the loss is no longer finite at step 0; there is no checkpoint yet"
    ]
    assert not (tmp_path / "acgan_gen.pth").exists()


def test_reader_that_goes_away_does_not_end_training(tmp_path, monkeypatch):
    monkeypatch.setattr(acgan, "load_dataset", small.few(60))
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--device", "cpu", "--seed", 0, *SMALL, "--max_steps", 7, "--out_dir", tmp_path]
    with open(writer, "w") as gone, contextlib.redirect_stdout(gone), contextlib.redirect_stderr(io.StringIO()) as err:
        assert acgan.main([str(flag) for flag in flags]) == 0
        print("what follows is lost in silence", flush=True)
    assert "Traceback" not in err.getvalue() and load_network(tmp_path / "acgan_gen.pth")


def test_memory_that_does_not_suffice_is_one_line(train, tmp_path):
    flags = ["--img_size", 256, "--latent_dim", 10**7, "--max_steps", 1]  # 20 TB in G's first layer
    result = train("--seed", 0, *SMALL, *flags, "--out_dir", tmp_path / "run")
    assert result.status == 2 and "acgan.py: error: not enough memory: lower --batch_size" in result.err
    assert not (tmp_path / "run").exists()


def test_rows_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path):
    opt = acgan.parse_args(["--seed", "0", "--log_interval", "1", "--out_dir", str(tmp_path)])
    plan = Plan(seed=0, compile="off", threads=1, world_size=1, classes=["a", "b"], n_classes=2, channels=1,
                n_images=9, labels_crc32=0, total_steps=10, schedule_steps=10)  # fmt: skip
    metrics = dict(d_loss=torch.tensor(1.0), g_loss=torch.tensor(2.0), d_acc=torch.tensor(0.5))
    with contextlib.closing(Record(opt, plan, "cpu", 10, 0)) as record:
        list(record.progress(0, 0, []))
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        record.batch(0, metrics)
        record.batch(1, metrics)
        (tmp_path / "metrics.jsonl").unlink()
        record.batch(2, metrics)
        assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2]


def test_film_leaves_out_what_is_no_grid_of_this_run(train, tmp_path):
    flags = ["--seed", 0, *SMALL, "--sample_interval", 1, "--out_dir", tmp_path]
    assert train(*flags, "--max_steps", 5).status == 0
    grids = tmp_path / "images" / "fixed_z"
    (grids / "1.png").write_text("no picture")
    (grids / "9.png").write_bytes((grids / "2.png").read_bytes())  # later than the run
    Image.new("L", (9, 9)).save(grids / "3.png")
    before = files(tmp_path / "logs")
    assert train("--resume", tmp_path, "--max_steps", 6).status == 0
    with Image.open(tmp_path / "images" / "film.gif") as film:
        assert film.n_frames == 4  # 0, 2, 4, 5
    assert before.items() <= files(tmp_path / "logs").items()
