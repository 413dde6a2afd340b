"""walkthrough.ipynb in a real kernel: from top to bottom, and interrupted."""

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


@pytest.fixture
def environment(monkeypatch):
    """Let a kernel find the project from another folder, and train for as many batches as a test wants."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return lambda steps: monkeypatch.setenv("WALKTHROUGH_STEPS", str(steps))


def test_notebook_runs_from_top_to_bottom(tmp_path, environment):
    environment(2)
    notebook = NOTEBOOK.copy()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [[output for output in cell.outputs if "image/png" in output.get("data", {})]
             for cell in notebook.cells if cell.cell_type == "code"]  # fmt: skip
    assert sum(map(len, shown)) >= 10
    for name in ("best/acgan_gen_ema.pth", "2026.png", "3_to_8.png", "own/images/film.gif", "own.png"):
        assert (tmp_path / "walkthrough" / name).exists(), name


def test_interrupt_stops_the_training_cell_and_running_it_again_goes_on(tmp_path, environment):
    environment(100_000)
    first, training = (next(cell.source for cell in NOTEBOOK.cells if line in cell.source)
                       for line in ("import acgan", "def train("))  # fmt: skip
    manager, client = start_new_kernel(cwd=str(tmp_path))
    run = tmp_path / "walkthrough" / "best"

    def interrupted(rows: int, again: bool) -> int:
        """Run the training cell, interrupt it after so many rows, and return the batches that its checkpoint has."""
        asked = client.execute(training)
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < rows:
            assert time.monotonic() < end
            time.sleep(0.2)
        manager.interrupt_kernel()
        if again:
            time.sleep(1.1)
            manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        assert reply["parent_header"]["msg_id"] == asked and reply["content"]["ename"] == "KeyboardInterrupt"
        return read_checkpoint(run)["step"]

    try:
        end = time.monotonic() + 200
        client.execute(first, reply=True, timeout=60)
        training = training.replace('"--sample_interval", 20', '"--log_interval", 5, "--compile", "off"')
        done = interrupted(1, again=False)
        assert interrupted(done // 5 + 2, again=True) >= done
        assert client.execute("1 + 1", reply=True, timeout=60)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
