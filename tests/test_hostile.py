"""Hostile input, one row each: every command answers with one line and exit status 2, and writes nothing."""

import os
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, errors
from PIL import Image
from shapes import make_folder

import acgan
import evaluate
import generate
import train_judge
from evaluation.judge import load_judge
from models import Discriminator, Generator
from run.weights import save_network

COMMANDS = {"generate": generate.main, "evaluate": evaluate.main, "train_judge": train_judge.main}
OTHER_DEVICES = ("--device", "--cuda")


class RunsCode:
    def __reduce__(self):
        return (open, ("code was run", "w"))


HOSTILE = [  # the command line, and a part of the line that it must print
    # numbers
    ("acgan --n_epochs 0", "--n_epochs: '0' is not a whole number from 1"),
    ("acgan --n_epochs 1.5", "--n_epochs: '1.5' is not a whole number"),
    ("acgan --n_epochs ''", "--n_epochs: '' is not a whole number"),
    ("acgan --max_steps 0", "--max_steps: '0' is not"),
    ("acgan --batch_size -1", "--batch_size: '-1' is not"),
    ("acgan --latent_dim 0", "--latent_dim: '0' is not"),
    (f"acgan --latent_dim {10**30}", "--latent_dim: '1000"),
    ("acgan --sample_interval 0", "--sample_interval: '0' is not"),
    ("acgan --log_interval 0", "--log_interval: '0' is not"),
    ("acgan --checkpoint_interval x", "--checkpoint_interval: 'x' is not a whole number"),
    ("acgan --eval_interval 0", "--eval_interval: '0' is not"),
    ("acgan --n_cpu -3", "--n_cpu: '-3' is not"),
    ("acgan --lr 0", "--lr: '0' is not a number above 0"),
    ("acgan --lr nan", "--lr: 'nan' is not"),
    ("acgan --lr inf", "--lr: 'inf' is not"),
    ("acgan --lr 0x1", "--lr: '0x1' is not"),
    ("acgan --b1 1", "--b1: '1' is not a number in [0, 1)"),
    ("acgan --b2 -0.1", "--b2: '-0.1' is not"),
    ("acgan --ema 1", "--ema: '1' is not a number in [0, 1)"),
    ("acgan --seed -1", "--seed: '-1' is not a whole number from 0 to 4294967295"),
    (f"acgan --seed {2**32}", "--seed: '4294967296' is not"),
    ("acgan --img_size 30", "--img_size: '30' is not a multiple of 4 from 16"),
    ("acgan --img_size 12", "--img_size: '12' is not"),
    (f"acgan --img_size {10**30}", "--img_size: '1000"),
    ("acgan --img_size 16 --batch_size 59", "--batch_size: 59 leaves one image alone in a batch: choose another"),
    ("acgan --img_size 16 --batch_size 29 --d_steps 2", "--batch_size: 29 leaves one image alone in a batch: choose"),
    ("generate -n 0", "-n: '0' is not a whole number"),
    ("generate -n 2000", "-n: more than 10,000 images do not fit one picture: lower it, or use --npz"),
    ("generate --scale 0", "--scale: '0' is not a whole number"),
    ("generate --scale 1000", "--scale: 1000 makes more than 100,000,000 pixels: lower it, or -n"),
    ("generate --seed x", "--seed: 'x' is not a whole number"),
    ("evaluate --seed -1", "--seed: '-1' is not a whole number"),
    ("train_judge --n_epochs 0 --out judge.pth", "--n_epochs: '0' is not a whole number"),
    # flags that do not exist, or contradict each other
    ("acgan --n_epoch 3", "unrecognized arguments: --n_epoch 3 (--help lists the flags)"),
    ("acgan --quick", "--quick (--help lists the flags)"),
    ("acgan 3", "unrecognized arguments: 3"),
    ("acgan --device tpu", "--device: invalid choice: 'tpu'"),
    ("acgan --device cpu --cuda", "--cuda: not allowed with argument --device"),
    ("acgan --r1 0.2 --r1_on whole", "--r1_on: whole needs --r1 above 0 and --class_head 2k"),
    ("acgan --r1 0.2 --r1_end 0.1", "--r1_end: it needs --r1 above 0 and --lr_schedule linear"),
    ("acgan --lr_fall 1", "--lr_fall: it needs --lr_schedule linear"),
    ("acgan --lr_fall 0", "--lr_fall: '0' is not a number in (0, 1]"),
    ("acgan --r1_end 1.5", "--r1_end: '1.5' is not a number in [0, 1]"),
    ("acgan --class_head 2k --fake_class_loss off", "--fake_class_loss: off leaves half of --class_head 2k untrained"),
    ("acgan --recipe worst", "--recipe: invalid choice: 'worst'"),
    ("acgan --r1 -1", "--r1: '-1' is not a number of 0 or more"),
    ("acgan --bn_eps 0", "--bn_eps: '0' is not a number above 0"),
    ("acgan --d_dropout 1", "--d_dropout: '1' is not a number in [0, 1)"),
    ("acgan --conditioning add", "--conditioning: invalid choice: 'add'"),
    ("acgan --pretrain_class_head -1", "--pretrain_class_head: '-1' is not a whole number of 0 or more"),
    ("acgan --lr_schedule cosine", "--lr_schedule: invalid choice: 'cosine'"),
    ("acgan --init_from nowhere", "--init_from: there is no 'nowhere': name a run's folder or a weight file"),
    ("acgan --compile maybe", "--compile: invalid choice: 'maybe'"),
    ("acgan --n_classes 11", "--n_classes: mnist has 10, not 11: drop the flag"),
    ("acgan --channels 3", "--channels: mnist has 1, not 3: drop the flag"),
    ("evaluate --fulll", "unrecognized arguments: --fulll (--help lists the flags)"),
    ("generate 12 --labels 3", "not allowed with argument"),
    ("generate --npz a.npz --out b.png", "--npz: not allowed with argument --out"),
    ("generate --npz a.npz --scale 2", "--npz: not allowed with argument --scale"),
    ("generate --npz a.npz --interpolate 1 2", "--npz: not allowed with argument --interpolate"),
    ("generate --steps 3", "--steps: only with argument --interpolate"),
    ("generate --interpolate 3 4 --steps 1", "--steps: a row has at least 2 images"),
    # classes
    ("generate 20x6", "digits: 'x' is not a class of best.pth: choose from 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    ("generate ''", "digits: '' is not a class"),
    ("generate ２", "digits: '２' is not a class"),
    ("generate --labels 3,12", "--labels: '12' is not a class"),
    ("generate --labels ''", "--labels: '' is not a class"),
    ("generate --interpolate 3 a", "--interpolate: 'a' is not a class"),
    # data
    ("acgan --dataset imagenet", "--dataset: invalid choice: 'imagenet'"),
    ("acgan --data_root .", "--data_root: --dataset mnist does not read it: did you mean --dataset folder?"),
    ("evaluate --data_root .", "--data_root: --dataset mnist does not read it"),
    ("evaluate --test_root .", "--test_root: mnist has its own test images"),
    ("train_judge --out a.pth --test_root .", "--test_root: mnist has its own test images"),
    ("train_judge --dataset folder --data_root good --out a.pth", "--test_root: --dataset folder needs it"),
    ("train_judge --channels 3 --out a.pth", "--channels: mnist has 1, not 3: drop the flag"),
    ("acgan --dataset folder", "--data_root: --dataset folder needs it: name the folder of your classes' folders"),
    ("acgan --dataset folder --data_root none", "'none' is missing: name a folder that holds a folder for each class"),
    (f"acgan --dataset folder --data_root {'a' * 300}", "aaa' (File name too long): allow reading it"),
    ("acgan --dataset folder --data_root text.pth", "'text.pth' is a file: name a folder that"),
    (
        "acgan --dataset folder --data_root empty",
        "'empty' holds 0 folders: make a folder of images for each class, two",
    ),
    ("acgan --dataset folder --data_root 'one class'", "'one class' holds 1 folder: make a folder of images for each"),
    ("acgan --dataset folder --data_root 'good/green box'", "green box' holds 0 folders and 4 images: make a folder"),
    ("acgan --dataset folder --data_root 'empty class'", "holds no image: add some (PNG, JPEG, ...), or remove"),
    ("acgan --dataset folder --data_root text", "2.png' (of no kind that is read here): replace or delete it, or add"),
    ("acgan --dataset folder --data_root postscript", "2.png' (of no kind that is read here): replace"),
    ("acgan --dataset folder --data_root pipe", "2.png' (not a file): replace"),
    ("acgan --dataset folder --data_root dangling", "2.png' (missing, or a link to nothing): replace"),
    (
        "acgan --dataset folder --data_root 'zero bytes'",
        "an image cannot be read: 'zero bytes/green box/2.png' (empty): rep",
    ),
    ("acgan --dataset folder --data_root truncated", "2.png' (image file is truncated"),
    ("acgan --dataset folder --data_root webp", "2.webp' ("),
    (
        "acgan --dataset folder --data_root loop",
        "box/self' and 'loop/green box' are the same folder: remove the link to it",
    ),
    ("acgan --dataset folder --data_root name", r"'green\nbox' cannot be printed as the name of a class: rename"),
    (
        "acgan --dataset folder --data_root good --channels 2",
        "--channels: images of a folder are read with 1 (grey) or",
    ),
    ("acgan --dataset folder --data_root good --bad_images drop", "--bad_images: invalid choice: 'drop'"),
    (
        "acgan --dataset folder --data_root good --out_dir good/run",
        "a run in 'good/run' writes among the images of 'good': name a",
    ),
    ("acgan --dataset folder --data_root good --n_classes 10", "--n_classes: folder has 3, not 10"),
    # places to write to
    ("acgan --out_dir text.pth/run", "--out_dir: cannot write to 'text.pth/run'"),
    ("acgan --out_dir /proc/run", "--out_dir: cannot write to '/proc/run'"),
    ("acgan --out_dir in_the_way", "images' is not a folder: name another folder"),
    ("acgan --out_dir in_the_weights_way", "acgan_gen_best.pth' is not a file: name another folder"),
    ("acgan --out_dir of_others", "config.json' is not from a run: name another folder"),
    ("generate 1 --out .", "--out: '.' is a folder: name a file"),
    ("generate 1 --out a.jpg", "--out: 'a.jpg' does not end in .png: name a file that does"),
    ("generate 1 --out /dev/null", "--out: '/dev/null' is a device or a pipe: name a file"),
    ("generate 1 --out text.pth/a.png", "--out: cannot write to 'text.pth'"),
    ("generate --npz /tmp", "--npz: '/tmp' is a folder: name a file"),
    ("generate --npz /proc/a.npz", "--npz: cannot write to '/proc'"),
    ("train_judge --out a.txt", "--out: 'a.txt' does not end in .pth"),
    # weight files
    ("generate 1 --weights none.pth", "cannot read 'none.pth' (No such file or directory): name a weight file"),
    (
        "generate 1 --weights empty",
        "'empty' has no acgan_gen_ema.pth, and no checkpoint that can be read: name a weight file",
    ),
    ("generate 1 --weights text.pth", "'text.pth' is corrupt, or is not a Generator of this project"),
    ("generate 1 --weights pipe/pipe", "'pipe/pipe' is corrupt, or is not a Generator"),
    ("generate 1 --weights truncated.pth", "'truncated.pth' is corrupt, or is not a Generator"),
    ("generate 1 --weights flipped.pth", "'flipped.pth' is corrupt, or is not a Generator"),
    ("generate 1 --weights code.pth", "'code.pth' holds whole pickled objects ("),
    ("generate 1 --weights code_in_zip.pth", "'code_in_zip.pth' holds whole pickled objects ("),
    ("generate 1 --weights nan.pth", "'nan.pth' is corrupt, or is not a Generator"),
    ("generate 1 --weights other_shape.pth", "'other_shape.pth' is corrupt, or is not a Generator"),
    ("generate 1 --weights other_maths.pth", "'other_maths.pth' is corrupt, or is not a Generator"),
    ("generate 1 --weights judge.pth", "'judge.pth' is corrupt, or is not a Generator"),
    ("evaluate --weights none.pth", "cannot read 'none.pth' (No such file or directory)"),
    ("evaluate --weights dist.pth", "'dist.pth' is corrupt, or is not a Generator"),
    (
        "evaluate --weights wide.pth",
        "--judge: it knows 10 classes (0, 1, 2, ...) in grey, 32 pixels, but the generator",
    ),
    ("evaluate --judge dist.pth", "'dist.pth' is corrupt, or is not a Judge"),
    ("acgan --init_from text.pth", "'text.pth' is corrupt, or is not a Generator or Discriminator of this project"),
    ("acgan --eval_interval 1 --judge none.pth", "none.pth' (No such file or directory): name a judge, of"),
    (
        "acgan --eval_interval 1 --img_size 28",
        "--judge: it knows 10 classes (0, 1, 2, ...) in grey, 32 pixels, but the",
    ),
    # runs to continue
    ("acgan --resume", "--resume: there is no checkpoint.pt in '.': name the folder of a run"),
    ("acgan --resume text.pth", "--resume: there is no checkpoint.pt in 'text.pth'"),
    ("acgan --resume empty --out_dir b", "--resume: a run continues in its own folder, 'empty': drop --out_dir"),
    ("acgan --resume weights_as_run", "checkpoint.pt' is corrupt, or is not a checkpoint: name another run"),
    ("acgan --out_dir weights_as_run", "holds an unfinished run (batches done: unknown): add --resume to continue"),
]


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    """A folder with all the files that HOSTILE names."""
    at = tmp_path_factory.mktemp("mess")
    make_folder(at / "good", 4)
    for name in ("one class", "empty class", "text", "postscript", "pipe", "dangling", "zero bytes", "truncated",
                 "webp", "loop", "name"):  # fmt: skip
        shutil.copytree(at / "good", at / name)
    (at / "empty").mkdir()
    for other in sorted((at / "one class").iterdir())[1:]:
        shutil.rmtree(other)
    for image in (at / "empty class" / "green box").iterdir():
        image.unlink()

    def second(name):
        path = at / name / "green box" / "2.png"
        path.unlink()
        return path

    whole = (at / "good" / "green box" / "2.png").read_bytes()
    second("text").write_text("no image")
    Image.new("RGB", (40, 40)).save(second("postscript"), "EPS")  # Pillow would start a program
    os.mkfifo(second("pipe"))
    os.mkfifo(at / "pipe" / "pipe")
    second("dangling").symlink_to("nowhere.png")
    second("zero bytes").touch()
    second("truncated").write_bytes(whole[:-60])
    Image.effect_noise((40, 40), 50).save(webp := second("webp").with_suffix(".webp"))
    webp.write_bytes(webp.read_bytes()[:-300])
    (at / "loop" / "green box" / "self").symlink_to(at / "loop" / "green box")
    (at / "name" / "green box").rename(at / "name" / "green\nbox")

    (at / "in_the_way").mkdir()
    (at / "in_the_way" / "images").symlink_to("nowhere")
    (at / "in_the_weights_way" / "acgan_gen_best.pth").mkdir(parents=True)
    (at / "of_others").mkdir()
    (at / "of_others" / "config.json").write_text('{"theirs": true}')

    def save(name, network):
        save_network(at / name, network, [str(digit) for digit in range(10)])

    (at / "text.pth").write_text("no weights")
    save("dist.pth", Discriminator(img_size=16))
    save("judge.pth", load_judge(None))
    save("wide.pth", Generator(img_size=64))
    network = Generator(img_size=16)
    save("good.pth", network)
    whole = bytearray((at / "good.pth").read_bytes())
    (at / "truncated.pth").write_bytes(whole[:-1000])
    whole[len(whole) // 2] ^= 1
    (at / "flipped.pth").write_bytes(whole)
    (at / "code.pth").write_bytes(pickle.dumps(RunsCode(), 2))
    torch.save({"network": "Generator", "config": RunsCode()}, at / "code_in_zip.pth")
    network.config |= {"latent_dim": 50}
    save("other_shape.pth", network)
    network.config |= {"latent_dim": 100, "conditioning": "add"}
    save("other_maths.pth", network)
    network.config["conditioning"] = "multiply"
    torch.nn.init.constant_(network.label_emb.weight, float("nan"))
    save("nan.pth", network)
    (at / "weights_as_run").mkdir()
    shutil.copy(at / "good.pth", at / "weights_as_run" / "checkpoint.pt")
    return at


def listing(folder: Path):
    """Every name in a folder with its size and the time of its last change."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize(("line", "words"), HOSTILE, ids=[line[:60] for line, _ in HOSTILE])
def test_hostile_input_gets_one_line_and_writes_nothing(line, words, mess, monkeypatch, train):
    monkeypatch.chdir(mess)
    command, *flags = shlex.split(line)
    before = listing(mess)
    if command != "acgan":
        result = call(COMMANDS[command], *flags, "--device", "cpu")
    elif set(OTHER_DEVICES) & set(flags):
        result = call(acgan.main, "--seed", 0, *flags)
    else:
        result = train("--seed", 0, *flags)
    assert words in errors(result), result.err
    assert listing(mess) == before


def test_the_documents_state_the_number_of_rows():
    text = (Path(__file__).parent.parent / "docs" / "outputs.md").read_text()
    assert f"{len(HOSTILE)} hostile inputs" in text and len(HOSTILE) >= 70
