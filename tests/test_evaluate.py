"""The scorecard: it tells good from bad, on few digits. benchmarks/scorecard.py scores the bundled weights in full."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from conftest import ROOT, call, on_terminal, read_board, read_rows
from PIL import Image

import evaluate
from cli import BUNDLED_GENERATOR
from data import load_dataset
from drawing import draw_set
from evaluation import judge as judge_module
from evaluation import metrics, real_scores
from evaluation import scorecard as scorecard_module
from evaluation.judge import judge_images, load_judge
from evaluation.metrics import Judged, blurred, density_and_coverage, fid, most_missed, same_class_ms_ssim, show_to
from evaluation.scorecard import Counts, balanced, collapsed, score, scorecard
from models import Generator, load_network, save_network, weights_init_normal

FEW = Counts(scored=100, cas=120, cas_epochs=4, pairs=20)


@pytest.fixture(scope="module")
def judge():
    return load_judge(None)


@pytest.fixture(scope="module")
def train_set():
    return load_dataset("mnist", None, 32)[:2]


@pytest.fixture(scope="module")
def test_set():
    images, labels, *_ = load_dataset("mnist", None, 32, train=False)
    return images[:1500], labels[:1500]


def test_the_judge_knows_the_test_digits(judge, test_set):
    images, labels = test_set
    assert (judge_images(judge, images)[1] == labels).double().mean() >= 0.99
    assert judge_module.BUNDLED.stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def scored(judge, train_set, test_set):
    """Scores of real digits and of the bundled generator, and of four that are bad in one way each."""
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(FEW.cas)
    drawn = draw_set(load_network(BUNDLED_GENERATOR), labels, seed=0)
    untrained = draw_set(Generator().apply(weights_init_normal), labels, seed=0)
    real, real_labels = balanced(train_set[0][30_000:40_000], train_set[1][30_000:40_000], FEW.cas, 10, seed=1)
    candidates = {
        "real": (real, real_labels),
        "drawn": (drawn, labels),
        "untrained": (untrained, labels),
        "permuted": (drawn, labels.roll(1)),
        "mixed": (drawn, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]),
        "repeated": (drawn[:10].repeat(FEW.cas, 1, 1, 1), labels),
    }
    few_test = show_to(judge, *test_set)
    return {name: score(*pair, few_test, judge, FEW) for name, pair in candidates.items()}


def of(scored, metric):
    return {name: scores[metric] for name, (scores, _) in scored.items()}


def test_agreement_falls_with_wrong_classes(scored):
    values = of(scored, "agreement")
    assert values["real"] > 0.98 and values["drawn"] > 0.96
    assert values["untrained"] < 0.3 and values["permuted"] < 0.05 and 0.05 < values["mixed"] < 0.2


def test_fid_grows_with_bad_images_and_intra_fid_with_wrong_classes_too(scored):
    values, by_class = of(scored, "fid"), of(scored, "intra_fid")
    assert values["real"] < 0.2 < 3 < values["untrained"] and values["repeated"] > 3 * values["drawn"]
    assert values["real"] < values["drawn"] < values["repeated"] < values["untrained"]
    assert values["permuted"] == pytest.approx(values["drawn"], rel=1e-6)  # it does not look at classes
    assert by_class["real"] < by_class["drawn"] < by_class["repeated"]
    assert by_class["permuted"] > 5 * by_class["drawn"] and by_class["mixed"] > 3 * by_class["drawn"]


def test_density_and_coverage_fall_with_bad_images_and_with_missing_variety(scored):
    density, coverage = of(scored, "density"), of(scored, "coverage")
    assert density["untrained"] < 0.1 < density["drawn"]
    assert coverage["real"] > coverage["drawn"] > 3 * max(coverage["untrained"], coverage["repeated"])


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
    assert min(values["real"], values["drawn"]) > 0.75  # so few images do not tell these two apart
    assert values["repeated"] < values["drawn"] - 0.2 and values["untrained"] < values["drawn"] - 0.2
    assert values["permuted"] < 0.15 and values["mixed"] < 0.6


def test_scorecard_puts_the_real_floor_beside_and_warns(judge, train_set, test_set):
    counts = Counts(scored=30, cas=30, cas_epochs=1, pairs=20)
    few_test = tuple(tensor[:900] for tensor in test_set)
    labels = torch.arange(10).repeat(30)
    images = draw_set(load_network(BUNDLED_GENERATOR), labels, seed=0)
    images[7::10] = images[7].clone()
    card = scorecard(images, labels, train_set, few_test, judge, counts)
    floor, _ = score(*balanced(*train_set, 30, 10, seed=0), show_to(judge, *few_test), judge, counts)
    for name, value in floor.items():
        assert card["scores"][name]["real"] == value or name == "agreement"
    right = judge_images(judge, few_test[0])[1] == few_test[1]
    assert card["scores"]["agreement"]["real"] == right.double().mean()
    few = "only 900 test images: FID, density and coverage are uncertain"
    assert card["warnings"] == ["class 7 has collapsed: its images are too much alike", few]


def test_scores_of_real_images_are_kept_for_the_same_question_alone(judge, train_set, test_set, monkeypatch, kept):
    counts, trained = Counts(scored=10, cas=10, cas_epochs=1, pairs=5), []
    few_test, labels = tuple(tensor[:300] for tensor in test_set), torch.arange(10).repeat(10)
    images = draw_set(load_network(BUNDLED_GENERATOR), labels, seed=0)
    train_one = metrics.train_classifier

    def counted(*args, **flags):
        trained.append(1)
        return train_one(*args, **flags)

    def card_and_trainings(drawn=images, test=few_test, judge=judge, counts=counts, seed=0):
        trained.clear()
        return scorecard(drawn, labels, train_set, test, judge, counts, seed), len(trained)

    monkeypatch.setattr(metrics, "train_classifier", counted)

    first, trainings = card_and_trainings()
    assert trainings == 2 and card_and_trainings() == (first, 1)  # the real ones' figures are the same, bit for bit
    other, trainings = card_and_trainings(images.flip(3))  # another generator
    assert trainings == 1 and other["scores"]["cas"]["real"] == first["scores"]["cas"]["real"]
    assert other["scores"]["fid"]["real"] == first["scores"]["fid"]["real"] < other["scores"]["fid"]["generated"]
    judge_of_others = copy.deepcopy(judge)
    judge_of_others.features[0].weight.data[0] *= 1.01
    for changed in (dict(seed=1), dict(counts=dataclasses.replace(counts, pairs=6)), dict(judge=judge_of_others),
                    dict(test=tuple(tensor[1:] for tensor in few_test))):  # fmt: skip
        assert card_and_trainings(**changed)[1] == 2, changed
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert card_and_trainings() == (first, 2)  # a cut file is replaced
    assert card_and_trainings() == (first, 1)
    monkeypatch.setattr(real_scores, "KEPT", ROOT / "README.md" / "kept")  # cannot be written
    assert card_and_trainings() == (first, 2)


def test_metrics_against_cases_worked_out_by_hand():
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


def test_fewer_pixels_lose_what_is_small(judge, test_set):
    flat = torch.full((2, 1, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(blurred(flat, 8), flat)
    stripes = (torch.arange(32) % 2 * 200).to(torch.uint8).expand(1, 1, 32, 32)
    inner = blurred(stripes, 4)[..., 8:24]
    assert inner.min() >= 95 and inner.max() <= 105  # finer than what is left, so only their mean remains


def test_fewer_pixels_are_read_less_well(train_set, test_set):
    drawn = test_set[0][:300].flip(3), test_set[1][:300]  # mirrored, so that most are hard to read
    part = [tensor[:6000] for tensor in train_set]
    shares = scorecard_module.agreement_by_resolution(drawn, part, test_set, 10)
    real, mirrored = ([pair[who] for pair in shares.values()] for who in ("real", "generated"))
    assert list(shares) == ["read_whole", "read_half", "read_quarter", "read_eighth"]
    assert min(real[:3]) > 0.85 and real[3] < real[2] - 0.05
    assert all(theirs < ours - 0.1 for ours, theirs in zip(real, mirrored, strict=True))


def test_missed_are_the_real_images_farthest_from_any_generated_one():
    features, labels = torch.tensor([[0.0], [9], [4], [50]]), torch.tensor([0, 0, 0, 1])
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    real, fake = Judged(images, labels, features, labels), Judged(None, None, torch.tensor([[1.0], [49], [20]]), None)
    assert most_missed(real, fake, 0, 2)[:, 0, 0, 0].tolist() == [1, 2]
    assert most_missed(real, fake, 1, 1)[:, 0, 0, 0].tolist() == [3]


def test_table_fits_80_columns_and_is_the_json(judge, train_set, test_set, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "QUICK", Counts(scored=20, cas=20, cas_epochs=1, pairs=5))
    part = scorecard_module.LabelledImages(*train_set, list("0123456789"))
    halves = (
        part._replace(images=part.images[:3000], labels=part.labels[:3000]),
        part._replace(images=test_set[0], labels=test_set[1]),
    )
    monkeypatch.setattr(evaluate, "load_train_and_test", lambda *args: halves)
    result = call(evaluate.main, "--device", "cpu")
    assert result.status == 0 and result.err.startswith(f"Weights: {BUNDLED_GENERATOR}\n")
    assert "no Inception FID" in result.out and "200 images, seed 0" in result.out
    assert max(len(line) for line in result.out.splitlines()[1:]) <= 80
    more = ["--resolution", "--missed", tmp_path / "missed.png"]
    card = json.loads(call(evaluate.main, "--json", "--device", "cpu", *more).out)
    assert {"read_whole", "read_eighth"} < card["scores"].keys()
    assert Image.open(tmp_path / "missed.png").size == (10 * 34 + 2, 10 * 34 + 2)
    assert f"{card['scores']['agreement']['generated']:.2%}" in result.out and len(card["scores"]) == 7 + 4
    assert card["images"] == 200 and card["test_images"] == 1500


def test_terminal_shows_the_stages_in_80_columns(tmp_path):
    few = "import evaluate; evaluate.QUICK = evaluate.QUICK.__class__(20, 20, 1, 5)"
    few += f"; from evaluation import real_scores; real_scores.KEPT = real_scores.Path({str(tmp_path)!r})"
    shown = on_terminal("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {few}; sys.exit(evaluate.main())")
    assert shown.status == 0, shown.lines
    bars = [line for line in shown.lines if "|" in line and "/10" in line]
    stages = ["Reading the real images", "Drawing 200 images", "Generated images: coverage", "Real images: CAS"]
    assert all(any(line.startswith(stage) for line in bars) for stage in stages), bars
    assert max(len(line) for line in bars) <= 80 and "10/10" in bars[-1]


def test_scores_during_training_change_nothing_in_it_and_keep_the_best(train, tmp_path):
    flags = ["--seed", 3, "--batch_size", 64, "--log_interval", 2, "--n_epochs", 4]
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    assert train(*flags, "--out_dir", plain, digits=320).status == 0
    # a run that ends at an epoch's end, and is extended: its scores are part of its last checkpoint
    flags += ["--eval_interval", 2, "--out_dir", scored]
    assert train(*flags, "--max_steps", 10, digits=320).err.count("agreement") == 1
    result = train("--resume", scored, digits=320)
    assert result.status == 0 and result.err.count("agreement") == 1, result.err
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

    scorer = scorecard_module.EpochScorer(None, None, None, "cpu")
    scorer.judge_sha256 = torch.load(scored / "acgan_gen_best.pth", weights_only=True)["judge_sha256"]
    assert scorer.lowest_intra_fid(scored / "acgan_gen_best.pth") == best["intra_fid"]
    scorer.judge_sha256 = "of another judge"  # whose features have another scale
    assert scorer.lowest_intra_fid(scored / "acgan_gen_best.pth") == math.inf


def test_judge_that_is_no_good_is_warned_of(train, tmp_path):
    save_network(tmp_path / "judge.pth", judge_module.Judge(img_size=16))
    flags = ["--seed", 3, "--img_size", 16, "--max_steps", 1, "--eval_interval", 1, "--judge", tmp_path / "judge.pth"]
    assert "Warning: the judge recognises only" in train(*flags, "--out_dir", tmp_path / "run", digits=320).err
