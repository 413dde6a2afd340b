"""What disks, machines and calling programs do: it costs one true line at most, and nothing of theirs is changed."""

import errno
import io
import json
import math
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from conftest import ROOT, call, errors, files, read_rows, stopped_after
from shapes import make_folder

import acgan
from evaluation.during_training import EpochScorer
from run.checkpoint import random_state, restore_random_state
from run.ranks import Ranks
from run.record import typed
from run.weights import load_network
from utils import BadInput, choose_device, print_line, run_command

SMALL = ["--seed", 5, "--batch_size", 24, "--img_size", 16, "--latent_dim", 4, "--log_interval", 1]


def refusal(number: int, *names) -> OSError:
    """The error of a system call."""
    return OSError(number, os.strerror(number), *names)


def refuse(monkeypatch, call: str, error: int, when) -> None:
    """Let a call of the system raise an error if when(its arguments) is true."""
    real = getattr(os, call)

    def sometimes(*args, **kwargs):
        if when(*args):
            raise refusal(error)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, sometimes)


# disks


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("fsync of folders", errno.EINVAL),
        ("fsync", errno.ENOTSUP),
        ("open", errno.EACCES),
        ("fsync of folders", errno.EIO),
    ],
)
def test_file_system_that_cannot_flush_is_no_error_but_a_failing_disk_is(call, error, train, tmp_path, monkeypatch):
    if call == "open":
        refuse(monkeypatch, "open", error, lambda path, *flags: str(path) == str(tmp_path))
    else:
        refuse(monkeypatch, "fsync", error, lambda file: call == "fsync" or stat.S_ISDIR(os.fstat(file).st_mode))
    result = train(*SMALL, "--max_steps", 2, "--checkpoint_interval", 1, "--out_dir", tmp_path)
    if error == errno.EIO:
        assert result.status == 2 and "Warning: no checkpoint after batch 1 (Input/output error)" in result.err
        assert result.err.splitlines()[-1].endswith("(Input/output error): mend that, or name another place")
    else:
        assert result.status == 0 and "Warning" not in result.err, result.err
        assert (tmp_path / "checkpoint.previous.pt").exists()


def test_earlier_run_moves_to_logs_on_another_disk_whole_or_not_at_all(train, tmp_path, monkeypatch):
    def on_another_disk(source, target):
        return ("logs" in Path(source).parts) != ("logs" in Path(target).parts)

    def held():
        """All that the folder holds, wherever it lies; but events and locks."""
        return sorted(content for path, content in files(tmp_path).items() if "events" not in path.name)

    refuse(monkeypatch, "replace", errno.EXDEV, on_another_disk)
    flags = [*SMALL, "--max_steps", 1, "--out_dir", tmp_path]
    assert train(*flags).status == 0
    first, (soft, hard) = held(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))  # less than the checkpoint
    try:
        line = errors(train(*flags))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(
        r"cannot write '.*/logs/.*/checkpoint.pt' \(File too large\): free space or name another place", line
    )
    assert held() == first and (tmp_path / "checkpoint.pt").exists() and not list(tmp_path.rglob("*.part"))
    result = train(*flags)
    assert result.status == 0 and "The earlier run's files were moved to" in result.err
    (log_dir,) = (path.parent for path in (tmp_path / "logs").rglob("config.json"))
    moved = [content for path, content in files(log_dir).items() if "events" not in path.name]
    assert sorted([*moved, b""]) == first  # .lock is empty, and stays


def test_earlier_runs_are_told_apart_by_their_files_as_local_time_may_go_back(train, tmp_path):
    logs = tmp_path / "logs"
    for n in range(3):
        assert train(*SMALL, "--max_steps", 1, "--out_dir", tmp_path).status == 0
        log_dir = Path(json.loads((tmp_path / "config.json").read_text())["log_dir"]).name
        (logs / log_dir).rename(logs / f"200{9 - n}-01-01_00-00-00")  # each looks older than the one before
        config = (tmp_path / "config.json").read_text().replace(log_dir, f"200{9 - n}-01-01_00-00-00")
        (tmp_path / "config.json").write_text(config)
    assert [path.parent.name[:4] for path in logs.glob("*/checkpoint.pt")] == ["2008"]


def test_linked_files_of_an_earlier_run_stay_where_they_are_and_can_be_read(train, tmp_path):
    (tmp_path / "store").mkdir()
    flags = [*SMALL, "--max_steps", 1, "--out_dir", tmp_path / "run"]
    assert train(*flags).status == 0
    (tmp_path / "run" / "acgan_gen.pth").rename(tmp_path / "store" / "g.pth")
    (tmp_path / "run" / "acgan_gen.pth").symlink_to("../store/g.pth")
    assert train(*flags).status == 0
    (moved,) = (tmp_path / "run" / "logs").glob("*/acgan_gen.pth")
    assert moved.is_symlink() and load_network(moved).step == 1 and (tmp_path / "store" / "g.pth").is_file()


def test_resumed_run_that_another_overtook_begins_nothing(train, tmp_path, monkeypatch):
    assert train(*SMALL, "--max_steps", 1, "--out_dir", tmp_path).status == 0
    in_start, here = acgan.make_plan, []

    def overtaken(*args):
        monkeypatch.setattr(acgan, "make_plan", in_start)
        here.append(train("--resume", tmp_path, "--max_steps", 3))  # while the other one reads its data
        return in_start(*args)

    monkeypatch.setattr(acgan, "make_plan", overtaken)
    line = errors(train("--resume", tmp_path, "--max_steps", 2))
    assert f"another run went on in '{tmp_path}' meanwhile: start again" in line
    assert here[0].status == 0 and len(read_rows(tmp_path)) == 3


def test_too_little_memory_is_not_taken_for_a_corrupt_checkpoint(train, tmp_path, monkeypatch):
    for n in (1, 2):
        assert train(*([] if n == 1 else ["--resume"]), *SMALL, "--max_steps", n, "--out_dir", tmp_path).status == 0
    before = files(tmp_path)
    for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. can't allocate memory")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error))
            assert "not enough memory: " in errors(train("--resume", tmp_path, "--max_steps", 3))
    assert files(tmp_path) == before


def test_places_that_have_no_name_or_lead_nowhere_are_one_line(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    folder = [*SMALL, "--dataset", "folder", "--data_root"]
    assert "writes among the images of '/'" in errors(train(*folder, "/", "--out_dir", "run"))
    assert "cannot read 'loop' (Too many levels" in errors(train(*folder, "loop", "--out_dir", "run"))
    assert "'loop' is a link to nothing: mend it" in errors(train(*SMALL, "--out_dir", "loop"))
    odd = os.fsdecode(b"im\xffges")
    make_folder(tmp_path / odd, 3)
    assert train(*folder, odd, "--max_steps", 1, "--out_dir", "run").status == 0  # a path that is no text


REFUSED = [
    (refusal(errno.ENOSPC, "x"), "cannot write 'x' (No space left on device): free space or name another place"),
    (refusal(errno.EDQUOT), "cannot write the output (Disk quota exceeded): free space"),
    (refusal(errno.EMFILE, "x"), "too many open files: raise the limit (ulimit -n)"),
    (refusal(errno.ENFILE), "too many open files: raise the limit (ulimit -n)"),
    (refusal(errno.ENOMEM), "not enough memory: lower it"),
    (refusal(errno.EAGAIN), "too many processes or threads ("),
    (RuntimeError("can't start new thread"), "too many processes or threads (can't start new thread): end some"),
    (refusal(errno.EACCES, "x"), "cannot read or write 'x' (Permission denied): mend that"),
    (refusal(errno.EBUSY, "x", None, "y"), "cannot read or write 'x' or 'y' (Device or resource busy): mend"),
    (OSError("in words"), "cannot read or write a file (in words): mend that"),
]


@pytest.mark.parametrize(("error", "words"), REFUSED, ids=[str(error) for error, _ in REFUSED])
def test_refusal_of_the_system_is_told_as_it_is(error, words, capsys):
    def fail():
        raise error

    assert run_command("a.py", fail, too_large="lower it") == 2
    assert capsys.readouterr().err.startswith(f"a.py: error: {words}")


def test_file_of_a_run_that_may_not_be_read_is_not_called_foreign(train, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def read_text(path, **encoding):
        raise refusal(errno.EACCES, path)

    monkeypatch.setattr(Path, "read_text", read_text)
    line = errors(train(*SMALL, "--max_steps", 1, "--out_dir", tmp_path))
    assert f"cannot read or write '{tmp_path}/config.json' (Permission denied): mend that" in line


def test_best_generator_that_cannot_be_read_is_not_replaced(tmp_path):
    def lowest(path):
        return EpochScorer.lowest_intra_fid(SimpleNamespace(judge_sha256=""), path)

    (tmp_path / "corrupt.pth").touch()
    assert lowest(tmp_path / "none.pth") == lowest(tmp_path / "corrupt.pth") == math.inf
    assert lowest(tmp_path / "corrupt.pth" / "file in a file") == -math.inf


# devices


@pytest.fixture
def old_card(monkeypatch):
    """A GPU that PyTorch finds and cannot use; a list of the devices on which that was tried."""
    tried = []

    def fail(*shape, device):
        tried.append(str(device))
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nand more")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 7))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    return tried


OLD_CARD = ("argument --device: Tesla K80 (compute capability 3.7) cannot compute here (CUDA error: no kernel image is "
            "available for execution on the device), and this PyTorch is built for sm_75 sm_80: add --device cpu, or "
            "install a PyTorch that is built for the card")  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--device", "cuda"]])
def test_card_that_this_pytorch_is_not_built_for_is_one_line(flags, old_card, tmp_path):
    line = errors(call(acgan.main, *flags, "--out_dir", tmp_path / "run"))
    assert line == f"acgan.py: error: {OLD_CARD}" and not (tmp_path / "run").exists()
    assert choose_device("cpu")[0].type == "cpu"


def test_each_rank_tries_its_own_card_alone(old_card, monkeypatch):
    for name, value in dict(TORCHELASTIC_RUN_ID="a", WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, RANK=1, LOCAL_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    device, _ = choose_device("auto")
    assert device.type == "cuda" and not old_card
    with pytest.raises(BadInput, match="Tesla K80"):
        Ranks(device)
    assert old_card == ["cuda:1"]


def test_card_whose_memory_is_taken_is_told_as_that(old_card, monkeypatch, tmp_path):
    def fail(*shape, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch, "ones", fail)
    assert "not enough memory: lower" in errors(call(acgan.main, "--out_dir", tmp_path / "run"))


def test_gpu_of_a_mac_is_taken_only_if_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device, line = choose_device("auto")
    assert device.type == "cpu" and "This Mac's GPU is there to try with --device mps: nobody has yet." in line
    assert choose_device("mps") == (torch.device("mps"), "Device: mps.")


def test_resumed_run_on_a_gpu_is_not_called_exact(monkeypatch):
    cpu, set_on_gpu = torch.device("cpu"), []
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_on_gpu.append)
    state = random_state(cpu)
    assert restore_random_state(state, cpu) == ""
    assert "another device" in restore_random_state(state, torch.device("cuda")) and not set_on_gpu
    of_gpu = state | {"device": "cuda", "on_device": "its state"}
    assert "algorithms anew" in restore_random_state(of_gpu, torch.device("cuda")) and set_on_gpu == ["its state"]


def test_command_to_type_is_quoted_for_the_shell_of_windows_too(monkeypatch):
    words = [r"C:\Program Files\Python\python.exe", "--data_root", "my pictures", "--seed", 3]
    assert typed(*words) == r"'C:\Program Files\Python\python.exe' --data_root 'my pictures' --seed 3"
    monkeypatch.setattr(sys, "platform", "win32")
    assert typed(*words) == r'"C:\Program Files\Python\python.exe" --data_root "my pictures" --seed 3'


# calling programs

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def program(monkeypatch):
    """A program with its own signal handlers and hook; program() is True while they are its own."""

    def handler(number, frame):
        pass

    def hook(args):
        raise AssertionError("the error of a thread reached the program")

    before = [(number, signal.signal(number, handler)) for number in SIGNALS]
    monkeypatch.setattr(threading, "excepthook", hook)
    yield lambda: threading.excepthook == hook and all(signal.getsignal(number) == handler for number in SIGNALS)
    for number, old in before:
        signal.signal(number, old)


@pytest.mark.parametrize("end", ["done", "bad input", "diverged", "stopped", "refused", "a bug"])
def test_program_has_its_own_handlers_back_however_a_run_ends(end, program, train, tmp_path, monkeypatch):
    flags = [*SMALL, "--max_steps", 2, "--out_dir", tmp_path]
    if end == "done":
        assert train(*flags).status == 0
    elif end == "bad input":
        assert train(*flags, "--img_size", 7).status == 2
    elif end == "diverged":
        assert train(*flags, "--lr", 1e30).status == 1
    elif end == "stopped":
        with stopped_after(1):
            assert train(*flags).status == 143
    elif end == "refused":
        refuse(monkeypatch, "replace", errno.EROFS, lambda source, target: str(target).endswith("config.json"))
        assert train(*flags).status == 2
    else:
        monkeypatch.setattr(acgan, "train_step", None)
        with pytest.raises(TypeError):
            train(*flags)
    assert program()


def test_outputs_are_as_before(monkeypatch):
    inside = []
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command("a.py", lambda: inside.append((sys.stdout.errors, sys.stderr)) or print_line("é")) == 0
    assert (sys.stdout, stream.errors, sys.stderr) == (stream, "strict", None)
    assert inside[0][0] == "backslashreplace" and inside[0][1] is not None
    assert stream.buffer.getvalue() == b"\\xe9\n"


def test_run_in_a_thread_of_a_notebook_trains(program, tmp_path, monkeypatch):
    class Output:
        """Less than a file, as a notebook's is."""

        def __init__(self):
            self.text = ""
            self.write = lambda text: setattr(self, "text", self.text + text)
            self.flush = lambda: None

    monkeypatch.setattr(acgan, "load_dataset", small.few(60))
    monkeypatch.setattr(sys, "stdout", out := Output())
    monkeypatch.setattr(sys, "stderr", Output())
    words, status = [str(word) for word in [*SMALL, "--device", "cpu", "--max_steps", 2, "--out_dir", tmp_path]], []
    thread = threading.Thread(target=lambda: status.append(acgan.main(words)))
    thread.start()
    thread.join()
    assert status == [0] and len(read_rows(tmp_path)) == 2 and out.text.count("epoch") == 1 and program()


def test_signal_while_the_handlers_are_put_back_is_no_traceback(program, monkeypatch):
    put_back = signal.signal

    def interrupted(number, handler):
        signal.raise_signal(signal.SIGINT)
        return put_back(number, handler)

    with monkeypatch.context() as patch:
        assert run_command("a.py", lambda: patch.setattr(signal, "signal", interrupted)) == 0
    assert program()


# other systems


def test_everything_runs_without_what_only_posix_has_in_a_folder_with_spaces_and_chinese_letters(tmp_path):
    folder = tmp_path / "my 数字"
    make_folder(folder / "images of mine", 4)
    script = Path(__file__).with_name("elsewhere.py")
    command = [sys.executable, "-X", "warn_default_encoding", script, folder]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "modules without SIGHUP, SIGKILL, fcntl, fork" in result.stdout
    assert {"drawn.png", "run", "mine", "images of mine"} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("script", ["acgan", "generate", "evaluate", "train_judge"])
def test_python_without_pytorch_is_told_which_one_has_it(script, tmp_path):
    command = [sys.executable, "-S", ROOT / f"{script}.py"]  # without the installed packages
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith(f"{script}.py: error: {sys.executable} has no PyTorch: type ")
    assert not any(tmp_path.iterdir())
