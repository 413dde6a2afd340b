"""The scorecard: it tells good from bad, and the committed one is what the committed weights get."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_board, read_rows

import evaluate
from dataset import load_dataset
from epoch_scores import EpochScores
from evaluate import Counts, balanced, collapsed, load_discriminator, score, scorecard
from generate import WEIGHTS, draw_set, load_generator
from judge import WEIGHTS as JUDGE_WEIGHTS
from judge import Judge, judge_images, load_judge
from models import load_network, pack_network, write_weights
from runlog import RunLog
from scores import density_and_coverage, fid, same_class_ms_ssim, show_to

FEW = Counts(scored=150, cas=200, cas_epochs=3, pairs=30)


@pytest.fixture(scope="module")
def judge():
    return load_judge(JUDGE_WEIGHTS)


@pytest.fixture(scope="module")
def train_set(data_root):
    return load_dataset("mnist", data_root, 32)[:2]


@pytest.fixture(scope="module")
def test_set(data_root):
    return load_dataset("mnist", data_root, 32, train=False)[:2]


def test_the_judge_knows_the_test_digits(judge, test_set):
    images, labels = test_set
    assert (judge_images(judge, images)[1] == labels).double().mean() >= 0.995
    assert JUDGE_WEIGHTS.stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def scored(judge, train_set, test_set, run, tmp_path_factory):
    """Scores of real digits and of the committed generator, and of four that are bad in one way each."""
    early_dir = tmp_path_factory.mktemp("early")
    assert run("--seed", 0, "--max_steps", 60, "--out_dir", early_dir).returncode == 0
    labels = torch.arange(10).repeat(FEW.cas)
    drawn = torch.cat(list(draw_set(load_generator(WEIGHTS), labels, seed=0)))
    early = torch.cat(list(draw_set(load_generator(early_dir / "acgan_gen.pth"), labels, seed=0)))
    real, real_labels = balanced(train_set[0][30_000:], train_set[1][30_000:], FEW.cas, 10, seed=1)
    candidates = {
        "real": (real, real_labels),
        "drawn": (drawn, labels),
        "early": (early, labels),
        "permuted": (drawn, labels.roll(1)),
        "mixed": (drawn, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]),
        "repeated": (drawn[:10].repeat(FEW.cas, 1, 1, 1), labels),
    }
    few_test = show_to(judge, *(tensor[:2000] for tensor in test_set))
    return {name: score(*pair, few_test, judge, FEW) for name, pair in candidates.items()}


def of(scored, measure):
    return {name: scores[measure] for name, (scores, _) in scored.items()}


def test_agreement_falls_with_wrong_classes(scored):
    values = of(scored, "agreement")
    assert values["real"] > 0.98 and values["drawn"] > 0.96
    assert values["early"] < 0.6 and values["permuted"] < 0.05 and 0.05 < values["mixed"] < 0.2


def test_fid_grows_with_bad_images_and_the_one_by_class_with_wrong_classes_too(scored):
    values, by_class = of(scored, "fid"), of(scored, "intra_fid")
    assert values["real"] < 0.1 < 3 < values["early"] and values["repeated"] > 5 * values["drawn"]
    assert values["real"] < values["drawn"] < values["repeated"] < values["early"]
    assert values["permuted"] == pytest.approx(values["drawn"], rel=1e-6)  # it does not look at classes
    assert by_class["real"] < by_class["drawn"] < by_class["repeated"]
    assert by_class["permuted"] > 10 * by_class["drawn"] and by_class["mixed"] > 5 * by_class["drawn"]


def test_density_and_coverage_fall_with_bad_images_and_with_missing_variety(scored):
    density, coverage = of(scored, "density"), of(scored, "coverage")
    assert density["early"] < 0.1 < density["drawn"]
    assert coverage["real"] > coverage["drawn"] > 3 * max(coverage["early"], coverage["repeated"])


def test_ms_ssim_names_the_classes_that_collapsed(scored):
    values = of(scored, "ms_ssim")
    assert values["repeated"] == pytest.approx(1)
    assert values["mixed"] < values["drawn"] < 0.6
    similar = {name: [row["ms_ssim"] for row in by_class] for name, (_, by_class) in scored.items()}
    for label in range(10):
        real = similar["real"][label]
        assert collapsed(similar["repeated"][label], real) and not collapsed(similar["drawn"][label], real)


def test_cas_falls_with_wrong_classes_and_with_missing_variety(scored):
    values = of(scored, "cas")
    assert min(values["real"], values["drawn"]) > 0.85  # so few images do not tell these two apart
    assert values["repeated"] < values["drawn"] - 0.2 and values["early"] < values["drawn"] - 0.2
    assert values["permuted"] < 0.1 and values["mixed"] < 0.6


def test_scorecard_puts_the_real_floor_beside_and_warns_of_a_collapse(judge, train_set, test_set):
    counts = Counts(scored=30, cas=30, cas_epochs=1, pairs=20)
    few_test = tuple(tensor[:1000] for tensor in test_set)
    labels = torch.arange(10).repeat(30)
    images = torch.cat(list(draw_set(load_generator(WEIGHTS), labels, seed=0)))
    images[7::10] = images[7].clone()
    card = scorecard(images, labels, train_set, few_test, judge, counts)
    floor, _ = score(*balanced(*train_set, 30, 10, seed=0), show_to(judge, *few_test), judge, counts)
    for name, value in floor.items():
        assert card["scores"][name]["real"] == value or name == "agreement"
    right = judge_images(judge, few_test[0])[1] == few_test[1]
    assert card["scores"]["agreement"]["real"] == right.double().mean()
    assert card["warnings"] == ["class 7 has collapsed: its images are too much alike"]


def test_measures_against_cases_worked_out_by_hand():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 4, generator=generator)
    assert fid(features, features) == pytest.approx(0, abs=1e-6)
    assert fid(features, features + 3) == pytest.approx(4 * 9, rel=1e-4)  # equal covariances: the means' distance
    spread = ((3 - 1) ** 2 * features.var(0)).sum().item()
    assert fid(features, (features - features.mean(0)) * 3 + features.mean(0)) == pytest.approx(spread, rel=1e-4)
    points = torch.arange(8.0)[:, None]  # k = 5: the ball of each reaches five neighbours
    assert density_and_coverage(points, points + 100) == (0, 0)
    assert density_and_coverage(points, points[:1]) == pytest.approx((3 / 5, 3 / 8))  # in the balls around 0, 1 and 2
    assert math.isnan(fid(features, features * float("nan")))  # and not 0, the best
    small = torch.randint(256, (4, 1, 16, 16), generator=generator, dtype=torch.uint8)
    assert -0.5 < same_class_ms_ssim(small, 5, 0) < 0.5
    one = torch.randint(256, (1, 1, 32, 32), generator=generator, dtype=torch.uint8)
    assert same_class_ms_ssim(one.repeat(3, 1, 1, 1), 5, 0) == pytest.approx(1)


def script(name, *flags):
    command = [sys.executable, ROOT / name, *flags]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


def test_committed_scorecard_is_what_the_committed_weights_get(data_root):
    committed = json.loads((WEIGHTS.parent / "scorecard.json").read_text())
    result = script("evaluate.py", "--json", "--data_root", data_root, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    card = json.loads(result.stdout)
    for key in ("images", "cas_images", "test_images", "seed", "feature_space", "warnings"):
        assert card[key] == committed[key]
    tolerance = {"agreement": 0.002, "cas": 0.01, "d_accuracy": 0.002}  # shares; other processors train CAS otherwise
    assert card["scores"].keys() == committed["scores"].keys() and len(card["scores"]) == 9
    for name, pair in card["scores"].items():
        for who, value in pair.items():
            wanted = committed["scores"][name][who]
            assert value == pytest.approx(wanted, abs=tolerance.get(name), rel=None if name in tolerance else 0.02)


def test_table_and_its_numbers(data_root, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "QUICK", Counts(scored=20, cas=20, cas_epochs=1, pairs=5))
    flags = ["--data_root", data_root, "--device", "cpu"]
    assert evaluate.main([str(flag) for flag in flags]) == 0
    text = capsys.readouterr().out
    assert "no Inception FID" in text and "D's own accuracy" in text and "200 images, seed 0" in text
    assert evaluate.main([str(flag) for flag in [*flags, "--json"]]) == 0
    card = json.loads(capsys.readouterr().out)
    assert f"{card['scores']['agreement']['generated']:.2%}" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["missing.pth"], "argument --weights: cannot read 'missing.pth' (No such file or directory)"),
        (["text.pth"], "argument --weights: text.pth is damaged, or is no Generator that this project wrote"),
        (
            ["wide.pth"],
            "argument --judge: it knows 10 classes (0, 1, 2, ...) in grey, 32 pixels, but the generator draws",
        ),
        (["--judge", "text.pth"], "argument --judge: text.pth is damaged, or is no Judge that this project wrote"),
        (["--discriminator", "wide_dist.pth"], "argument --discriminator: 'wide_dist.pth' is for other images"),
        (["--fulll"], "did you mean --full?"),
    ],
)
def test_mistakes(flags, words, capsys, tmp_path, monkeypatch):
    from models import Discriminator, Generator

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    write_weights(tmp_path / "wide.pth", pack_network(Generator(img_size=64)))
    write_weights(tmp_path / "wide_dist.pth", pack_network(Discriminator(img_size=64)))
    try:
        status = evaluate.main([*flags, "--device", "cpu"])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("evaluate.py: error: ") and words in err


def test_scores_during_training_change_nothing_in_it_and_keep_the_best(run, tmp_path, data_root):
    flags = ["--seed", 3, "--batch_size", 64, "--log_interval", 2, "--n_epochs", 4]
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    assert run(*flags, "--out_dir", plain, digits=320).returncode == 0
    result = run(*flags, "--eval_interval", 2, "--out_dir", scored, digits=320)
    assert result.returncode == 0 and result.stderr.count("agreement") == 2, result.stderr
    assert (plain / "acgan_gen.pth").read_bytes() == (scored / "acgan_gen.pth").read_bytes()
    rows = [row for row in read_rows(scored) if "agreement" in row]
    assert [row for row in read_rows(scored) if "agreement" not in row] == read_rows(plain)
    assert [(row["step"], row["epoch"]) for row in rows] == [(9, 1), (19, 3)]
    board = read_board(scored)
    for name in ("agreement", "fid", "intra_fid"):
        assert [event.value for event in board.Scalars(f"score/{name}")] == pytest.approx([row[name] for row in rows])
    best = min(rows, key=lambda row: row["intra_fid"])
    kept = torch.load(scored / "acgan_gen_best.pth", weights_only=True)["scores"]
    assert kept == {name: best[name] for name in ("step", "agreement", "fid", "intra_fid")}
    assert load_network(scored / "acgan_gen_best.pth") and load_network(scored / "acgan_dist_best.pth")
    average = scored / "acgan_gen_ema.pth"
    assert load_discriminator(None, average, load_generator(average), "cpu")  # that of the run, acgan_dist.pth

    again = EpochScores(1, JUDGE_WEIGHTS, load_generator(average), None, load_dataset("mnist", data_root, 32), 5)
    again.log = RunLog.__new__(RunLog)
    again.log.out_dir = scored
    assert again.lowest_intra_fid() == best["intra_fid"]
    again.judge_sha256 = "of another judge"  # whose features have another scale
    assert again.lowest_intra_fid() == math.inf

    # an epoch whose scoring was cut short is scored by the resumed run
    assert run(*flags, "--max_steps", 10, "--out_dir", tmp_path / "cut", digits=320).returncode == 0
    again = ["--resume", "--eval_interval", 2, "--out_dir", tmp_path / "cut"]
    assert run(*again, digits=320).returncode == 0
    assert [row for row in read_rows(tmp_path / "cut") if "agreement" in row] == rows


def test_judge_of_another_size_is_refused_before_the_first_batch(run, tmp_path):
    write_weights(tmp_path / "judge.pth", pack_network(Judge(img_size=28)))
    result = run("--eval_interval", 1, "--seed", 0, "--judge", tmp_path / "judge.pth", "--out_dir", tmp_path / "run")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "argument --judge: it knows" in result.stderr
    assert not (tmp_path / "run").exists()
