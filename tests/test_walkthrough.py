"""walkthrough.ipynb in a real kernel: from top to bottom, and interrupted. Its committed outputs are of a whole run."""

import copy
import os
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from run.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = nbformat.read(ROOT / "walkthrough.ipynb", as_version=4)
PICTURES = 11  # in its outputs
# so that a second interrupt comes while the run writes its last files
SLOW_END = """
import time
from run.record import Record
finish = Record.finish
Record.finish = lambda *inputs: (time.sleep(5), finish(*inputs))
"""


def pictures(notebook) -> int:
    """How many PNGs and GIFs the cells show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum(output.get("data", {}).keys() & {"image/png", "image/gif"} != set() for output in outputs)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Let a kernel find the project from another folder, and train for as many batches as a test wants."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # a person's own startup files stay out
    monkeypatch.delenv("MPLBACKEND", raising=False)
    return lambda steps: monkeypatch.setenv("WALKTHROUGH_STEPS", str(steps))


def test_notebook_runs_from_top_to_bottom(tmp_path, environment):
    environment(2)
    notebook = copy.deepcopy(NOTEBOOK)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == PICTURES
    for name in ("best/acgan_gen_ema.pth", "2026.png", "3_to_8.png", "own/images/film.gif", "own.png"):
        assert (tmp_path / "walkthrough" / name).exists(), name


def test_committed_outputs_are_of_a_whole_run():
    assert pictures(NOTEBOOK) == PICTURES
    outputs = [output for cell in NOTEBOOK.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "batches 400 " in "".join(output.get("text", "") for output in outputs)
    assert (ROOT / "walkthrough.ipynb").stat().st_size < 1_500_000


def test_interrupt_stops_the_training_cell_and_running_it_again_goes_on(tmp_path, environment):
    environment(100_000)
    first, training = (next(cell.source for cell in NOTEBOOK.cells if line in cell.source)
                       for line in ("import acgan", "def train("))  # fmt: skip
    assert '"--sample_interval", 40' in training
    training = training.replace('"--sample_interval", 40', '"--log_interval", 5, "--compile", "off"')
    manager, client = start_new_kernel(cwd=str(tmp_path))
    run = tmp_path / "walkthrough" / "best"

    def ask(source: str) -> dict:
        return client.execute(source, reply=True, timeout=180)["content"]

    def interrupted(rows: int, again: bool) -> int:
        """Run the training cell, interrupt it after so many rows, and return the batches that its checkpoint has."""
        asked, end = client.execute(training), time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < rows:
            assert time.monotonic() < end
            time.sleep(0.2)
        manager.interrupt_kernel()
        if again:
            time.sleep(2)
            manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        assert reply["parent_header"]["msg_id"] == asked and reply["content"]["ename"] == "KeyboardInterrupt"
        return read_checkpoint(run)["step"]

    try:
        assert ask(first)["status"] == "ok"
        done = interrupted(1, again=False)
        assert (run / "acgan_gen_ema.pth").exists()
        assert ask(SLOW_END)["status"] == "ok"
        assert interrupted(done // 5 + 2, again=True) > done
        assert ask("1 + 1")["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
