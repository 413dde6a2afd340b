"""The studies in benchmarks/: they go on after a kill, their intervals are right, and their data is what they say."""

import contextlib
import io
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import small
import torch
from conftest import ROOT

import acgan
from benchmarks import cells, overlap, quirks
from benchmarks.missed import farthest
from benchmarks.resolution import agreement_by_resolution, blurred
from data import builtin
from evaluation.metrics import Judged

STUDY = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import small, test_studies
small.watch()
test_studies.study_here(*sys.argv[1:])
"""
NETWORK = "--batch_size 8 --latent_dim 4 --compile off --device cpu --checkpoint_interval 2"


def study_here(*flags):
    """Run benchmarks.quirks with `flags` on the first digits, all its cells in this process."""

    def run_cells(module, cells, *argv, jobs):
        for cell in cells:
            quirks.run_cell(*cell, quirks.parse_args(argv))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acgan, "load_dataset", small.few(64))
        patch.setattr(acgan, "update_ema", acgan.update_ema)  # which a cell replaces
        patch.setattr(quirks, "load_train_and_test", lambda *args: (None, small.few(300)("mnist", None, 32)))
        patch.setattr(quirks, "run_cells", run_cells)
        patch.setattr(sys, "argv", ["quirks.py", *map(str, flags)])
        quirks.main()


def study(folder, **env):
    """Run two variants for 4 batches each; with `env`, in a process of its own."""
    flags = ["--seeds", 1, "--only", "faithful", "--only", "best", "--points", 2, 4, "--scored", 8]
    flags += [f"--flags={NETWORK}", "--work", folder / "work", "--rows", folder / "rows.jsonl"]
    flags += ["--page", folder / "page.md", "--plot", folder / "plot.png"]
    if env:
        command = [sys.executable, "-c", STUDY, *map(str, flags)]
        return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        study_here(*flags)
    return SimpleNamespace(stderr=err.getvalue())


def test_a_killed_study_goes_on_to_the_same_table(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    study(whole)
    assert study(killed, KILL_AT="0 7").returncode == -9  # in the second cell, after its first two batches
    assert {row["name"] for row in cells.read_rows(killed / "rows.jsonl")} == {"faithful"}
    assert (killed / "work" / "best_4_0" / "ema_2.pth").exists()
    assert "| faithful | 4 | 1 |" in (killed / "page-scores.md").read_text()  # a page stands after each cell
    with open(killed / "rows.jsonl", "a") as file:
        file.write('{"name": "best", "se')  # a row that the kill cut off
    result = study(killed)
    assert "Resuming after batch 2 of 4" in result.stderr, result.stderr
    assert cells.read_rows(killed / "rows.jsonl") == cells.read_rows(whole / "rows.jsonl")
    assert len(cells.read_rows(whole / "rows.jsonl")) == 2 * 2
    for page in ("page.md", "page-scores.md"):
        assert (killed / page).read_text() == (whole / page).read_text()
    assert "| best | 4 | 1 |" in (whole / "page-scores.md").read_text()
    assert (whole / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list((whole / "work").iterdir()) == []  # runs that have their rows are removed


def test_as_many_cells_as_asked_for_run_at_once(monkeypatch):
    two_at_once = threading.Barrier(2, timeout=20)  # breaks if one of them is alone

    def run(command, cwd):
        two_at_once.wait()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cells.subprocess, "run", run)
    cells.run_cells("quirks", [("faithful", seed) for seed in range(4)], jobs=2)


def test_a_cell_that_fails_ends_the_study(monkeypatch):
    started = []

    def run(command, cwd):
        started.append(command[-1])
        return subprocess.CompletedProcess(command, 1 if command[-1] == "1" else 0)

    monkeypatch.setattr(cells.subprocess, "run", run)
    with pytest.raises(SystemExit, match="quirks.py: error: faithful, 1 ended with status 1"):
        cells.run_cells("quirks", [("faithful", seed) for seed in range(30)])
    assert started == ["0", "1"]


def test_intervals_against_hand_computed_ones():
    assert cells.mean_and_interval([1.0, 2.0, 3.0]) == (2, pytest.approx(4.30265 / 3**0.5, rel=1e-5))
    assert cells.mean_and_interval([0.5]) == (0.5, None)


def rows_of(**by_name):
    """Rows of an EMA whose three scores are all the same, for each name a value a seed."""
    keys = quirks.JUDGED_BY
    return [dict(name=name.replace("_", " "), seed=seed, batches=9, ema=dict.fromkeys(keys, value), raw={})
            for name, values in by_name.items() for seed, value in enumerate(values)]  # fmt: skip


def test_differences_are_those_of_the_same_seed():
    rows = rows_of(faithful=[0.1, 0.5, 0.3], best=[0.3, 0.8])
    assert quirks.differences(rows, "best", 9, "cas") == pytest.approx([0.2, 0.3])
    assert quirks.differences(rows, "best", 8, "cas") == []


def test_verdicts_follow_from_the_intervals():
    def of(agreement, coverage, cas, seeds=3):
        return quirks.verdict(dict(agreement=agreement, coverage=coverage, cas=cas), seeds)

    nothing = (0.01, 0.02)
    assert of(nothing, nothing, (-0.01, 0.02)) == "no difference that this study can see"
    assert of((0.03, 0.02), nothing, nothing) == "**helps**: agreement up; coverage, CAS undecided"
    assert of(nothing, (-0.03, 0.02), (-0.5, 0.1)) == "**harms**: coverage, CAS down; agreement undecided"
    assert of((0.03, 0.02), (-0.03, 0.02), (0.03, 0.02)) == "a trade: agreement, CAS up; coverage down"
    assert of((0.5, None), (0.5, None), (0.5, None), seeds=1) == "fewer than 3 seeds: undecided"
    assert of((0.5, 0.1), (0.5, 0.1), (0.5, 0.1), seeds=2) == "fewer than 3 seeds: undecided"


def test_last_gains_are_those_of_the_last_five_epochs():
    rows = [row | {"batches": at} for at, value in zip(quirks.LONG[-3:], (0.1, 0.5, 0.75), strict=True)
            for row in rows_of(faithful=[value])]  # fmt: skip
    assert quirks.last_gains(rows)[-1:] == ["- faithful: agreement +25.0, coverage +0.250, CAS +25.0."]


def test_overlapping_digits_have_the_shares_that_they_claim():
    digits = small.first_digits(32)
    data = overlap.overlapping(digits)
    assert data.classes == ["A", "B"]
    found = {image.numpy().tobytes(): int(label) for image, label in zip(digits.images, digits.labels, strict=True)}
    drawn = torch.tensor([found[image.numpy().tobytes()] for image in data.images])
    for label, own in enumerate((1, 2)):
        of_class = drawn[data.labels == label]
        assert len(of_class) == 2 * (of_class == 0).sum() == 2 * (of_class == own).sum() > 90
    assert len({image.numpy().tobytes() for image in data.images}) == len(data.images)  # no zero is in both


def test_overlap_section_shows_the_shares():
    row = dict(name="faithful", batches=3000, A={"0": 0.25, "1": 0.75}, B={"0": 0.5, "2": 0.5})
    rows = [row | {"seed": 0}, row | {"seed": 1, "A": {"0": 0.35, "1": 0.65}}]
    text = "\n".join(overlap.section(rows))
    half = 12.7062 * (5 * 2**0.5) / 2**0.5  # t of one degree of freedom, times the standard error
    assert f"| faithful | 2 | 30.0 ± {half:.1f} | 70.0 ± {half:.1f} | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text


def test_fewer_pixels_lose_what_is_small():
    flat = torch.full((2, 1, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(blurred(flat, 8), flat)
    stripes = (torch.arange(32) % 2 * 200).to(torch.uint8).expand(1, 1, 32, 32)
    inner = blurred(stripes, 4)[..., 8:24]
    assert inner.min() >= 95 and inner.max() <= 105  # finer than what is left, so only their mean remains


def test_fewer_pixels_are_read_less_well():
    train_set = small.digits(builtin.IDX[:2], 0, 4000, img_size=16)[:2]
    test_set = small.digits(builtin.IDX[2:], 0, 400, img_size=16)[:2]
    mirrored = test_set[0].flip(3), test_set[1]  # so that most are hard to read
    shares = agreement_by_resolution(mirrored, train_set, test_set, 10)
    assert list(shares) == [1, 2, 4, 8]
    real, mirrored = ([pair[who] for pair in shares.values()] for who in ("real", "generated"))
    assert min(real[:2]) > 0.85 and real[3] < real[2] - 0.05 < real[1] - 0.1
    assert all(theirs < ours - 0.1 for ours, theirs in zip(real[:3], mirrored[:3], strict=True))


def test_missed_are_the_real_images_farthest_from_any_generated_one():
    features, labels = torch.tensor([[0.0], [9], [4], [50]]), torch.tensor([0, 0, 0, 1])
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    real, fake = Judged(images, labels, features, labels), Judged(None, None, torch.tensor([[1.0], [49], [20]]), None)
    assert farthest(real, fake, 0, 2)[:, 0, 0, 0].tolist() == [1, 2]
    assert farthest(real, fake, 1, 1)[:, 0, 0, 0].tolist() == [3]
