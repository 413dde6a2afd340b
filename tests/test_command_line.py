"""The command line: every mistake gets one line that names the flag, exit status 2, and leaves no trace."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call, errors

import acgan


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


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's wheels bring another OpenMP elsewhere")
@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "70000"}])
@pytest.mark.parametrize("command", ["acgan.py", "evaluate.py"])
def test_threads_of_openmp_wait_briefly_unless_told_otherwise(command, own):
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | own
    words = [sys.executable, ROOT / command, "--help"]
    result = subprocess.run(words, env=env | {"OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{own.get('GOMP_SPINCOUNT', 3000)}'" in result.stderr  # as OpenMP itself read it
