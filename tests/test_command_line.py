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


LINUX = sys.platform == "linux"  # elsewhere PyTorch's wheels bring another OpenMP


@pytest.mark.parametrize("line", ["acgan.py --device cpu --seed 0 --max_steps 1 --img_size 16 --latent_dim 4",
                                  "generate.py 7 -n 1", "evaluate.py --help"])  # fmt: skip
def test_commands_start_from_a_folder_with_modules_of_the_same_names(line, tmp_path):
    """And OpenMP's threads wait briefly."""
    for name in ("utils", "models", "departures", "data"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a foreign module')")
    script, *flags = line.split()
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, ROOT / script, *flags]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "foreign" not in result.stderr, result.stderr
    written = {"acgan.py": "acgan_gen_ema.pth", "generate.py": "generated.png"}
    assert script not in written or (tmp_path / written[script]).exists()
    assert not LINUX or "GOMP_SPINCOUNT = '3000'" in result.stderr  # as OpenMP itself read it


def test_how_long_threads_wait_can_be_chosen():
    command = [sys.executable, "-c", "import before_torch, os; print(os.environ['GOMP_SPINCOUNT'])"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"GOMP_SPINCOUNT": "70000"}, capture_output=True)
    assert result.stdout == b"70000\n"
