"""The command line: every mistake gets one line that names the flag, exit status 2, and leaves no trace."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call, errors, files

import acgan


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n_epochs", 0], "--n_epochs: '0' is not a whole number from 1"),
        (["--n_epochs", 1.5], "--n_epochs: '1.5' is not a whole number"),
        (["--max_steps", 0], "--max_steps"),
        (["--batch_size", -1], "--batch_size"),
        (["--latent_dim", 0], "--latent_dim"),
        (["--latent_dim", 10**30], "--latent_dim"),
        (["--sample_interval", 0], "--sample_interval"),
        (["--log_interval", 0], "--log_interval"),
        (["--n_cpu", -3], "--n_cpu"),
        (["--lr", 0], "--lr: '0' is not a number above 0"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--b1", 1], r"--b1: '1' is not a number in \[0, 1\)"),
        (["--b2", -0.1], "--b2"),
        (["--seed", -1], "--seed: '-1' is not a whole number from 0 to 4294967295"),
        (["--seed", 2**32], "--seed"),
        (["--img_size", 30], "--img_size: '30' is not a multiple of 4 from 16"),
        (["--img_size", 10**30], "--img_size"),
        (["--img_size", 12], "--img_size"),
        (["--img_size", 16, "--batch_size", 59], "--batch_size: 59 leaves one image alone in a batch: choose another"),
        (["--n_classes", 11], "--n_classes: mnist has 10, not 11"),
        (["--channels", 3], "--channels: mnist has 1, not 3"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu' .*cuda"),
        (["--device", "cpu", "--cuda"], "--cuda: not allowed with argument --device"),
        (["--n_epoch", 3], r"--n_epoch 3 \(did you mean --n_epochs\?\)"),
        (["--quick"], r"--quick \(--help lists the flags\)"),
        (["--data_root", "."], "--data_root: --dataset mnist does not read it: did you mean --dataset folder"),
        (["--dataset", "folder"], "--data_root: --dataset folder needs it"),
        (["--dataset", "folder", "--data_root", "a" * 300], "there is no folder 'aaa"),
        (["--out_dir", "a_file/run"], "--out_dir: cannot write to 'a_file/run'"),
        (["--out_dir", "/proc/run"], "--out_dir: cannot write to '/proc/run'"),
        (["--out_dir", "in_the_way"], "--out_dir: .*images' is not a folder"),
        (["--out_dir", "a_run_of_others"], "--out_dir: .*config.json' is not from a run"),
        (["--resume"], "--resume: there is no checkpoint.pt in '.'"),
        (["--resume", "a_file"], "--resume: there is no checkpoint.pt in 'a_file'"),
        (["--resume", "in_the_way", "--out_dir", "b"], "--resume: a run continues in its own folder, 'in_the_way'"),
        (["--eval_interval", 1, "--judge", "none.pth"], "cannot read '.*none.pth'"),
        (["--eval_interval", 1, "--img_size", 28], "--judge: it knows 10 classes .* 32 pixels, but .* 28 pixels"),
    ],
)
def test_mistakes(flags, words, tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    (tmp_path / "in_the_way").mkdir()
    (tmp_path / "in_the_way" / "images").symlink_to("nowhere")
    (tmp_path / "a_run_of_others").mkdir()
    (tmp_path / "a_run_of_others" / "config.json").write_text('{"theirs": true}')
    before = files(tmp_path)
    if {"--device", "--cuda"} & set(flags):
        assert re.search(words, errors(call(acgan.main, "--seed", 0, *flags)))
    else:
        assert re.search(words, errors(train("--seed", 0, *flags)))
    assert files(tmp_path) == before and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--cuda"]])
def test_gpu_that_is_not_there(flags, tmp_path):
    line = errors(call(acgan.main, *flags, "--out_dir", tmp_path / "run"))
    assert "--device: cuda is not available here; PyTorch finds: cpu" in line
    assert not (tmp_path / "run").exists()


def test_help_states_every_default():
    text = " ".join(call(acgan.main, "--help").out.partition("training:")[2].split())
    defaults = vars(acgan.parse_args([]))
    next_flag = r" --(\w+ [A-Z{[]|cuda )"
    for flag in defaults:
        entry = re.search(rf"--{flag} [A-Z{{[]((?!{next_flag}).)*?\(default: (?P<default>[^()]*)\)", text)
        assert entry, flag
        if isinstance(defaults[flag], int | float):
            assert entry["default"] == str(defaults[flag])


@pytest.mark.faithful
def test_defaults_are_the_tutorials():
    opt = acgan.parse_args([])
    tutorial = dict(n_epochs=200, batch_size=64, lr=0.0002, b1=0.5, b2=0.999, n_cpu=8, latent_dim=100, img_size=32,
                    sample_interval=400, dataset="mnist", n_classes=None, channels=None)  # fmt: skip
    assert {name: getattr(opt, name) for name in tutorial} == tutorial


def test_commands_start_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / "generate.py", "7", "-n", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "generated.png").exists(), result.stderr
