"""A folder of the user's own images: trained on, resumed, drawn from, scored; damage is named."""

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, call, errors, read_board, stopped_after
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from shapes import CLASSES, make_folder

import evaluate
import generate
import train_judge
from data import Reading, folder, load_dataset, load_train_and_test
from data.batches import Batches
from data.memory import memory
from evaluation.scorecard import Counts, balanced
from run.weights import load_network
from utils import BadInput

SMALL = ["--dataset", "folder", "--batch_size", 16, "--img_size", 16, "--latent_dim", 4, "--log_interval", 1,
         "--sample_interval", 9]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "shapes", 70)


@pytest.fixture
def copy(tmp_path):
    """A small folder for one test to harm."""
    return make_folder(tmp_path / "copy", 4)


@pytest.fixture(scope="module")
def straight(shapes, train, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("straight")
    result = train(*SMALL, "--data_root", shapes, "--seed", 2, "--max_steps", 16, "--out_dir", out_dir)
    assert result.status == 0 and "Data: folder, 210 colour images of 3 classes." in result.err
    return out_dir


def test_folder_trains_and_resumes_bit_exactly_on_the_same_images_only(shapes, straight, train, tmp_path):
    resumed = tmp_path / "resumed"
    flags = [*SMALL, "--data_root", shapes]
    assert train(*flags, "--seed", 2, "--max_steps", 10, "--out_dir", resumed).status == 0
    assert train("--resume", resumed, "--data_root", shapes, "--max_steps", 16).status == 0
    assert_same_run(resumed, straight)
    moved = shutil.copytree(shapes, tmp_path / "moved")
    (moved / "red disc" / "1.png").rename(moved / "green box" / "red.png")
    renamed = shutil.copytree(shapes, tmp_path / "renamed")
    (renamed / "red disc").rename(renamed / "pink disc")
    others = {moved: "210 of 3 classes; with other labels", make_folder(tmp_path / "other", 5): "15 of 3 classes",
              renamed: "210 of 3 classes; 'pink disc' is in one of them only"}  # fmt: skip
    for other, here in others.items():
        line = errors(train("--resume", resumed, "--data_root", other, "--max_steps", 30))
        assert f"argument --resume: the checkpoint is from other images (210 of 3 classes, here {here}): name" in line
    assert "--data_root: --dataset folder needs it" in errors(train("--resume", resumed, "--max_steps", 30))
    assert_same_run(resumed, straight)
    again = shutil.copytree(shapes, tmp_path / "again")
    shutil.copy(again / "red disc" / "1.png", again / "red disc" / "2.png")
    result = train("--resume", resumed, "--data_root", again, "--max_steps", 17)
    assert result.status == 0 and "The images are not quite those of the checkpoint" in result.err


def test_names_of_the_classes_reach_the_record_tensorboard_and_generate(straight, tmp_path):
    assert json.loads((straight / "config.json").read_text())["classes"] == CLASSES
    (event,) = read_board(straight).Tensors("classes/text_summary")
    assert event.tensor_proto.string_val == [", ".join(CLASSES).encode()]
    grid = np.asarray(Image.open(straight / "images" / "9.png"))
    assert grid.shape == (10 * 18 + 2, 3 * 18 + 2, 3) and (grid[..., 0] != grid[..., 2]).any()  # in colour
    generator = load_network(straight / "acgan_gen.pth")
    assert generator.classes == CLASSES and generator.config["channels"] == 3
    flags = ["--weights", straight, "--out", tmp_path / "a.png"]
    result = call(generate.main, "--labels", "red disc,0", *flags)
    assert result.status == 0 and result.err == f"Weights: {straight / 'acgan_gen_ema.pth'}, after batch 16\n"
    assert Image.open(tmp_path / "a.png").size == (4 * (2 * 18 + 2), 4 * (5 * 18 + 2))
    assert "5 rows of 2 images, of red disc, " in result.out
    line = errors(call(generate.main, "--labels", "red", *flags))
    assert "argument --labels: 'red' is not a class of acgan_gen_ema.pth" in line
    assert ": choose from blue cross, green box, red disc" in line


def test_judge_for_them_can_be_trained_and_scores_with_it(shapes, straight, train, tmp_path, monkeypatch):
    flags = [*SMALL, "--data_root", shapes, "--seed", 2, "--n_epochs", 1, "--eval_interval", 1]
    line = errors(train(*flags, "--out_dir", tmp_path / "run"))
    assert "it knows 10 classes (0, 1, 2, ...) in grey, 32 pixels, but the generator draws 3 classes (blue" in line
    assert not (tmp_path / "run").exists()

    data = ["--dataset", "folder", "--data_root", shapes, "--device", "cpu"]
    judge = [*data, "--img_size", 16, "--out", tmp_path / "judge.pth"]
    assert "argument --test_root: --dataset folder needs it" in errors(call(train_judge.main, *judge))
    data += ["--test_root", make_folder(tmp_path / "test", 12, seed=1)]
    result = call(train_judge.main, *judge, "--test_root", tmp_path / "test", "--n_epochs", 8)
    assert result.status == 0 and float(re.search(r"([\d.]+)% of the 36 test images", result.out)[1]) > 80
    result = train(*flags, "--judge", tmp_path / "judge.pth", "--out_dir", tmp_path / "run")
    assert result.status == 0 and result.err.count("agreement") == 1, result.err
    weights = ["--weights", tmp_path / "run", "--judge", tmp_path / "judge.pth"]
    monkeypatch.setattr(evaluate, "QUICK", Counts(scored=100, cas=100, cas_epochs=1, pairs=20))
    result = call(evaluate.main, *weights, *data)
    assert result.status == 0 and "blue cross" in result.out
    assert "Warning: only 36 test images: FID, density and coverage are uncertain." in result.out
    assert "--dataset: mnist has other classes" in errors(call(evaluate.main, *weights, "--device", "cpu"))


def test_folder_beyond_the_memory_budget_is_decoded_into_a_file(shapes, straight, train, tmp_path, monkeypatch):
    in_memory = load_dataset("folder", shapes, 32)
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0)
    result = train(*SMALL, "--data_root", shapes, "--seed", 2, "--max_steps", 16, "--out_dir", tmp_path / "run")
    assert result.status == 0 and "exceed the memory budget; decoded once, into a temporary file" in result.err
    assert_same_run(tmp_path / "run", straight)
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0.25)
    monkeypatch.setattr(folder, "memory", lambda: 7.9 * in_memory.images.numel())  # twice suffice for one rank
    assert load_dataset("folder", shapes, 32).in_memory
    for name, value in dict(TORCHELASTIC_RUN_ID="none", RANK="0", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    on_disk = load_dataset("folder", shapes, 32, scratch=tmp_path)
    assert not on_disk.in_memory and torch.equal(on_disk.images, in_memory.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # the file has no name
    batches = Batches(on_disk, 32)
    torch.manual_seed(0)
    for indices in batches:
        assert torch.equal(batches.gather(indices)[0], Batches(in_memory, 32).gather(indices)[0])
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(BadInput, match="the images take 0.0 GiB of disk at this size, and .* has 0.0 GiB: free some"):
        load_dataset("folder", shapes, 32, scratch=tmp_path)


def test_bad_images_are_named_in_one_pass_and_left_out_on_request(copy, train, tmp_path, capsys):
    boxes = [copy / "green box" / f"{n}.png" for n in range(12)]
    for path in boxes:
        shutil.copy(copy / "red disc" / "0.png", path)
        path.write_bytes(path.read_bytes()[:-60])  # the header is whole
    boxes[0].write_bytes(b"")
    boxes[1].write_text("no picture")
    shutil.copy(copy / "red disc" / "1.png", copy / "green box" / "good.png")
    line = errors(train(*SMALL, "--data_root", copy, "--seed", 2, "--out_dir", tmp_path / "run"))
    assert "12 of 21 images cannot be read: " in line and line.count("green box") == 10 and "; and 2 more: " in line
    assert "0.png' (empty); " in line and "1.png' (of no kind that is read here); " in line and "truncated" in line
    assert line.endswith(": replace or delete them, or add --bad_images skip")
    assert not (tmp_path / "run").exists()

    flags = [*SMALL, "--data_root", copy, "--bad_images", "skip", "--seed", 2]
    result = train(*flags, "--max_steps", 1, "--out_dir", tmp_path / "run")
    assert result.status == 0 and "Left out: 12 images that cannot be read: " in result.err
    assert "Data: folder, 9 colour images of 3 classes." in result.err
    with stopped_after(2):
        result = train("--resume", tmp_path / "run", "--data_root", copy, "--max_steps", 3)
    assert result.status == 143 and "--bad_images" not in result.err.splitlines()[-1]  # the checkpoint has it
    assert train("--resume", tmp_path / "run", "--data_root", copy, "--max_steps", 3).status == 0

    (copy / "green box" / "good.png").unlink()
    with pytest.raises(BadInput, match="class 'green box' has no image that can be read: add some, or remove it"):
        load_dataset("folder", copy, 16, reading=Reading(skip_bad=True))


def test_metadata_that_cannot_be_read_do_not_matter(tmp_path, capsys):
    grey, broken = Image.new("L", (20, 20), 77), b"Exif\0\0MM\0*\0\0\0\x08\0\x05broken"
    texts, long = PngInfo(), "all metadata " * 200_000  # more than Pillow unpacks
    texts.add_text("note", long, zip=True)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    grey.save(tmp_path / "a" / "text.png", pnginfo=texts)
    grey.save(tmp_path / "a" / "exif.webp", exif=broken, lossless=True)
    grey.save(tmp_path / "b" / "exif.jpg", exif=broken, quality=100)
    grey.save(tmp_path / "b" / "exif.png", exif=broken)
    texts = PngInfo()
    texts.add_text("note", "short")
    grey.save(tmp_path / "b" / "checksum.png", pnginfo=texts)
    content = (tmp_path / "b" / "checksum.png").read_bytes()
    (tmp_path / "b" / "checksum.png").write_bytes(content.replace(b"short", b"shirt"))
    images = load_dataset("folder", tmp_path, 16).images
    assert len(images) == 5 and (images.int() - 77).abs().max() <= 1
    err = capsys.readouterr().err  # WebP counts as colour
    assert err == "Images: 4 in grey, 1 in colour; --channels 1 reads all as grey.\n"
    turned, exif = Image.linear_gradient("L"), Image.Exif()
    exif[274] = 6
    texts.add_text("note", long, zip=True)
    for name, metadata in (("plain.png", None), ("long.png", texts)):
        turned.save(tmp_path / "b" / name, exif=exif, pnginfo=metadata)
    images = load_dataset("folder", tmp_path, 16).images
    assert torch.equal(images[-1], images[-2]) and (images[-1, 0, 0] == images[-1, 0, 15]).all()  # turned
    for path in tmp_path.glob("*/*"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match="7 of 7 images cannot be read"):
        load_dataset("folder", tmp_path, 16)


def test_images_that_are_not_square_are_cropped_and_counted(tmp_path, capsys):
    for name, size in (("a", (40, 20)), ("b", (20, 20))):
        (tmp_path / name).mkdir()
        image = Image.new("L", size, 200)
        image.paste(0, (size[0] // 2 - 10, 0, size[0] // 2 + 10, 20))  # black in the middle square alone
        image.save(tmp_path / name / "1.png")
    assert load_dataset("folder", tmp_path, 20).images.max() == 0
    assert capsys.readouterr().err == "Images: 1 of 2 cropped to the middle square.\n"


def test_deep_grey_is_scaled_by_what_the_training_images_hold(tmp_path, train, capsys):
    for root, brightest in (("train", 4000), ("test", 900)):
        for name in ("a", "b"):
            (tmp_path / root / name).mkdir(parents=True)
            for n in range(2):
                ramp = np.linspace(100, brightest, 400).astype(np.uint16).reshape(20, 20)
                Image.fromarray(ramp).save(tmp_path / root / name / f"{n}.{('png', 'tif')[n]}")
    data = load_dataset("folder", tmp_path / "train", 20)
    assert data.white == 4095 and data.images.max() == 4000 * 255 // 4095
    assert "values from 100 to 4,000; 0 is taken as black, 4,095 as white." in capsys.readouterr().err
    train_set, test_set = load_train_and_test("folder", tmp_path / "train", tmp_path / "test", 20)
    assert torch.equal(train_set.images, data.images) and test_set.images.max() == 900 * 255 // 4095
    flags = [*SMALL, "--data_root", tmp_path / "train", "--batch_size", 2, "--seed", 2]
    assert train(*flags, "--max_steps", 1, "--out_dir", tmp_path / "run").status == 0
    assert load_network(tmp_path / "run" / "acgan_gen.pth").white == 4095
    Image.fromarray(np.full((20, 20), 60_000, np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    result = train("--resume", tmp_path / "run", "--data_root", tmp_path / "train", "--max_steps", 2)
    assert result.status == 0 and "0 is taken as black, 4,095 as white" in result.err
    for values, white in ((np.eye(20, dtype=np.float32), 1), (np.eye(20, dtype=np.int32) * 70_000, 2**17 - 1)):
        for name in ("a", "b"):
            shutil.rmtree(tmp_path / "train" / name)
            (tmp_path / "train" / name).mkdir()
            Image.fromarray(values).save(tmp_path / "train" / name / "0.tif")
        data = load_dataset("folder", tmp_path / "train", 20)
        assert data.white == white and (data.images[0, 0] > 100).equal(torch.eye(20) > 0)
    for tags in ({262: 0}, {339: 2}):  # white is zero, or signed bytes: Pillow reads both wrongly
        image = Image.fromarray(values.astype(np.uint16)) if 262 in tags else Image.new("L", (20, 20))
        image.save(tmp_path / "train" / "a" / "0.tif", tiffinfo=tags)
        with pytest.raises(BadInput, match="a TIFF of .*: such are not read"):
            load_dataset("folder", tmp_path / "train", 20)


def test_run_among_the_images_is_refused_and_an_earlier_one_skipped(copy, straight, train, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    for out_dir in ([], ["--out_dir", copy / "run"], ["--out_dir", "red disc/deeper"]):
        line = errors(train(*SMALL, "--data_root", copy, *out_dir))
        assert f"writes among the images of '{copy}': name a folder beside them, such as copy_run" in line
    monkeypatch.chdir(copy.parent)
    copy.rename("images")
    line = errors(train(*SMALL, "--data_root", "images"))
    assert "a run in '.' writes among the images of 'images': name a folder beside them, such as images_run" in line
    Path("images").rename(copy)
    monkeypatch.chdir(copy)
    assert sorted(os.listdir(copy)) == CLASSES
    wanted = load_dataset("folder", copy, 16)
    capsys.readouterr()
    for place in (copy, copy / "a run", copy / "red disc" / "deeper"):
        shutil.copytree(straight, place, dirs_exist_ok=True)
    found = load_dataset("folder", Path("."), 16)
    assert found.classes == CLASSES and torch.equal(found.images, wanted.images)
    assert (
        "Skipped: './a run', './images', './logs', './red disc/deeper', of an earlier run." in capsys.readouterr().err
    )


def test_folder_above_the_classes_is_recognised(tmp_path, copy):
    def refused(*parts):
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        for part in parts:
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            if part.endswith("*"):
                shutil.copytree(copy, root / part[:-1], dirs_exist_ok=True)
            else:
                Image.new("L", (9, 9)).save(root / part)
        try:
            load_dataset("folder", root, 16)
        except BadInput as error:
            return re.search(
                "holds parts of a data set, not its classes .*: name a part, such as '.*data/(.*)'", str(error)
            )[1]

    assert refused("TEST*", "Train*") == "Train"
    assert refused("seg_test*", "seg_train*", "pred/a.png") == "seg_train"
    assert refused("red disc/a.png", "cat/a.png", "val*") == "val"
    assert refused("train*", "val*", "train/a.png", "val/a.png") == "train"  # stray pictures
    assert refused("train*", "test/a.png", "labels/notes.png") == "train"
    assert refused("train station/inside/a.png", "train/a.png", "bus/a.png") is None
    assert refused("cat/2025/a.png", "dog/2025/a.png") is None
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(BadInput, match="holds 1 folder: make a folder of images for each class, .*, or name .*copy'$"):
        load_dataset("folder", tmp_path, 16)


def test_links_that_hide_images_are_named(copy):
    (copy / "a twin").symlink_to("green box")
    with pytest.raises(BadInput, match="green box' and .*/a twin' are the same folder: remove the link to it"):
        load_dataset("folder", copy, 16)
    (copy / "a twin").unlink()
    (copy / "elsewhere").symlink_to("no such place")
    with pytest.raises(BadInput, match="elsewhere' is a link to nothing: mend or remove it"):
        load_dataset("folder", copy, 16)


def test_images_that_are_left_out_decide_nothing(copy, monkeypatch):
    for path in copy.glob("*/*.png"):
        Image.open(path).convert("L").save(path)
    wanted = load_dataset("folder", copy, 16).images
    bad = copy / "red disc" / "bad.png"
    Image.effect_noise((40, 40), 99).convert("RGB").save(bad)
    bad.write_bytes(bad.read_bytes()[:-90])
    assert torch.equal(load_dataset("folder", copy, 16, reading=Reading(skip_bad=True)).images, wanted)
    for path in copy.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    monkeypatch.setattr(folder, "MEMORY_SHARE", 0)
    with pytest.raises(BadInput, match="13 of 13 images cannot be read"):
        load_dataset("folder", copy, 16)


def test_files_of_many_kinds_are_read_and_the_others_counted(tmp_path, capsys):
    picture = Image.new("RGB", (20, 20), (200, 0, 0))
    kinds = ["a.tif", "b.TIFF", "c.jfif", "d.gif", "e.ppm", "f.jp2", "g.avif"]
    for name in ("a", "b", "@eaDir", "__MACOSX"):
        (tmp_path / name / "@eaDir").mkdir(parents=True)
        picture.save(tmp_path / name / "@eaDir" / "thumbnail.png")
    for kind in kinds:
        picture.save(tmp_path / "a" / kind)
    picture.save(tmp_path / "b" / "moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 20))] * 3)
    picture.save(tmp_path / "loose.png")
    for name in ("x.heic", "y.heic", "notes"):
        (tmp_path / "b" / name).write_text("not read")
    data = load_dataset("folder", tmp_path, 16)
    assert data.classes == ["a", "b"] and data.labels.tolist() == [0] * len(kinds) + [1]
    assert ((data.images[:, 0].int() - 200).abs().max(), data.images[:, 1:].max()) <= (8, 8)
    wanted = "Skipped: 3 files of other kinds (2 .heic, 1 without a suffix); 1 image beside the classes' folders."
    assert capsys.readouterr().err.strip() == wanted


def test_channels_convert_a_folder_and_are_kept(copy, train, tmp_path):
    for path in (copy / "green box").iterdir():
        Image.open(path).convert("L").save(path)
    flags = [*SMALL, "--data_root", copy, "--seed", 2, "--max_steps", 1]
    assert (
        "Images: 4 in grey, 8 in colour; --channels 1 reads all as grey."
        in train(*flags, "--out_dir", tmp_path / "both").err
    )
    result = train(*flags, "--channels", 1, "--out_dir", tmp_path / "run")
    assert result.status == 0 and "Data: folder, 12 grey images" in result.err
    result = train("--resume", tmp_path / "run", "--data_root", copy, "--max_steps", 2)
    assert result.status == 0 and "Data: folder, 12 grey images" in result.err
    assert load_network(tmp_path / "run" / "acgan_gen.pth").config["channels"] == 1
    assert load_dataset("folder", copy, 16, reading=Reading(channels=3)).images.shape[1] == 3
    line = errors(train(*flags, "--channels", 2, "--out_dir", tmp_path / "two"))
    assert "argument --channels: images of a folder are read with 1 (grey) or 3, not 2" in line


def test_many_classes_come_in_natural_order_and_share_a_grid_of_twenty(tmp_path, train):
    names = [*map(str, range(22)), "cat", "cat2", "cat10"]
    for number, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (16, 16), 10 * number).save(tmp_path / "data" / name / "a.png")
    data = load_dataset("folder", tmp_path / "data", 16)
    assert data.classes == names and data.images[:, 0, 0, 0].tolist() == [10 * n for n in range(25)]
    known = sorted(names)  # as a checkpoint or a weight file of before has them
    data = load_dataset("folder", tmp_path / "data", 16, reading=Reading(known))
    assert data.classes == known and data.images[:, 0, 0, 0].tolist() == [10 * names.index(name) for name in known]
    flags = [*SMALL, "--data_root", tmp_path / "data", "--batch_size", 25, "--seed", 2, "--max_steps", 10]
    result = train(*flags, "--out_dir", tmp_path / "run")
    assert result.status == 0 and result.err.count("Sample grids: the first 20 of 25 classes.") == 1
    for grid in ("images/9.png", "images/fixed_z/9.png"):
        assert Image.open(tmp_path / "run" / grid).size == (20 * 18 + 2, 10 * 18 + 2)


def test_limits_of_memory_are_found_wherever_they_are_set(tmp_path):
    def limit(lines, **files):
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        (tmp_path / "root/proc/self").mkdir(parents=True)
        (tmp_path / "root/proc/self/cgroup").write_text(lines)
        for path, text in files.items():
            (tmp_path / "root/sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "root/sys/fs/cgroup" / path).write_text(text)
        return memory(tmp_path / "root")

    unlimited = limit("0::/\n")
    assert limit("0::/\n", **{"memory.max": "5000\n"}) == 5000  # a container's own group
    assert limit("0::/batch/job\n", **{"batch/job/memory.max": "max\n", "batch/memory.max": "4000\n"}) == 4000
    assert limit("0::/gone\n", **{"memory.max": "max\n"}) == unlimited
    v1 = "5:cpu,cpuacct:/job\n3:memory:/job\n0::/other\n"
    assert limit(v1, **{"memory/job/memory.limit_in_bytes": "3000\n", "memory.max": "9000"}) == 3000
    assert limit(v1, **{"memory/memory.limit_in_bytes": "9223372036854771712\n"}) == unlimited


def test_thin_picture_takes_little_memory(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (1, 200_000), 50).save(tmp_path / name / "thin.png")
    tracemalloc.start()
    assert load_dataset("folder", tmp_path, 16).images.float().mean() == 50
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_mixed_modes_become_one(tmp_path):
    red = Image.new("RGB", (40, 30), (200, 0, 0))
    (tmp_path / "a").mkdir(), (tmp_path / "b" / "deeper").mkdir(parents=True), (tmp_path / ".hidden").mkdir()
    red.save(tmp_path / "a" / "rgb.PNG")
    red.quantize(4).save(tmp_path / "a" / "palette.png")
    Image.new("RGBA", (30, 40), (200, 0, 0, 0)).save(tmp_path / "a" / "transparent.png")
    red.save(tmp_path / "b" / "deeper" / "photo.jpeg", quality=95)
    red.save(tmp_path / "b" / "deeper" / "small.WebP", quality=95)
    red.save(tmp_path / "b" / "deeper" / "plain.bmp")
    Image.fromarray(np.full((50, 50), 128 * 257, np.uint16)).save(tmp_path / "b" / "sixteen.png")
    Image.new("1", (20, 20), 1).save(tmp_path / "b" / "bits.png")
    (tmp_path / "b" / "notes.txt").write_text("skipped")
    (tmp_path / "b" / "._photo.png").write_text("skipped")
    images, labels, classes, *_ = load_dataset("folder", tmp_path, 16)
    assert classes == ["a", "b"] and labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    wanted = [(200, 0, 0)] * 5 + [(255, 255, 255)] * 2 + [(128, 128, 128)]
    found = sorted(tuple(row) for row in images.float().mean((2, 3)).round().int().tolist())
    assert np.abs(np.array(found) - np.array(sorted(wanted))).max() <= 2

    for path in [*(tmp_path / "a").glob("*"), *(tmp_path / "b" / "deeper").glob("*")]:
        path.unlink()
    Image.new("L", (20, 20), 9).save(tmp_path / "a" / "grey.png")
    assert load_dataset("folder", tmp_path, 16).images.shape == (3, 1, 16, 16)  # all grey


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may read everything")
def test_folder_that_cannot_be_read_is_named(copy):
    (copy / "green box" / "deeper").mkdir()
    (copy / "green box" / "deeper").chmod(0)
    with pytest.raises(BadInput, match="cannot read .*deeper"):
        load_dataset("folder", copy, 32)


def test_every_image_size_trains_in_colour(train, copy, tmp_path):
    for size in (28, 100):
        flags = [*SMALL, "--data_root", copy, "--img_size", size, "--batch_size", 4, "--seed", 0]
        assert train(*flags, "--max_steps", 1, "--out_dir", tmp_path / str(size)).status == 0
        grid = Image.open(tmp_path / str(size) / "images" / "0.png")
        assert grid.size == (3 * (size + 2) + 2, 10 * (size + 2) + 2)


def test_scores_of_too_few_images_are_refused(shapes):
    few = load_dataset("folder", shapes, 16)
    with pytest.raises(BadInput, match="class number 2 has 0 real images"):
        balanced(few.images[:71], few.labels[:71], 10, 3, 0)  # none of the third class
