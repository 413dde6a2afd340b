"""The scorecard: it tells good from bad, on few digits. benchmarks/scorecard.py scores the bundled weights in full."""

import hashlib
import json
import math

import pytest
import small
import torch
import torch.nn.functional as F
from conftest import ROOT, call, on_terminal, read_board, read_rows

import evaluate
import fast
from data import LabelledImages, builtin
from data.drawing import draw_set
from evaluation import judge as judge_module
from evaluation import metrics
from evaluation import scorecard as scorecard_module
from evaluation.during_training import EpochScorer
from evaluation.judge import Judge, judge_images, load_judge
from evaluation.metrics import agreement, density_and_coverage, fid, same_class_ms_ssim, show_to
from evaluation.scorecard import DRAWING, SCORING, Counts, balanced, check_judge, collapsed, score_images, scorecard
from models import Generator, weights_init_normal
from run.weights import BUNDLED_GENERATOR, load_network, save_network
from utils import BadInput

FEW = Counts(scored=100, cas=100, cas_epochs=4, pairs=20)
CLASSES = list("0123456789")
COMMITTED = json.loads((ROOT / "weights" / "scorecard.json").read_text())


@pytest.fixture(scope="module")
def judge():
    return load_judge(None)


@pytest.fixture(scope="module")
def train_set():
    return small.digits(builtin.IDX[:2], 30_000, 33_000)[:2]


@pytest.fixture(scope="module")
def test_set():
    return small.digits(builtin.IDX[2:], 0, 1500)[:2]


@pytest.fixture(scope="module")
def shown(judge, test_set):
    return show_to(judge, *test_set)


def test_the_judge_knows_the_test_digits(shown):
    assert (shown.recognised == shown.labels).double().mean() >= 0.99
    assert judge_module.BUNDLED.stat().st_size < 1_000_000


def halved(images):
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def bundled_generator(path=BUNDLED_GENERATOR):
    generator = load_network(path)
    fast.use_fast_layers(generator)
    return generator


@pytest.fixture(scope="module")
def scored(judge, train_set, shown):
    """Scores of real digits and of the bundled generators, and of four that are bad in one way each.

    The classifiers of CAS are trained and tested on images of half the side, in a quarter of the time.
    """
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(FEW.cas)
    drawn = draw_set(bundled_generator(), labels, seed=0)
    untrained = draw_set(Generator().apply(weights_init_normal), labels[:200], seed=0)
    candidates = {
        "real": balanced(*train_set, FEW.cas, 10, seed=1),
        "drawn": (drawn, labels),
        "faithful": (draw_set(bundled_generator(ROOT / "weights" / "acgan_gen.pth"), labels, seed=0), labels),
        "untrained": (untrained.repeat(FEW.cas // 20, 1, 1, 1), labels),
        "permuted": (drawn, labels.roll(1)),
        "mixed": (drawn, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]),
        "repeated": (drawn[:10].repeat(FEW.cas, 1, 1, 1), labels),
    }
    cas = metrics.classification_accuracy_score

    def small_cas(images, labels, test_images, test_labels, *others):
        return cas(halved(images), labels, halved(test_images[:800]), test_labels[:800], *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "classification_accuracy_score", small_cas)
        return {name: score_images(*pair, shown, judge, FEW) for name, pair in candidates.items()}


def of(scored, metric):
    return {name: scores[metric] for name, (scores, _) in scored.items()}


def test_agreement_falls_with_wrong_classes(scored):
    values = of(scored, "agreement")
    assert values["real"] > 0.98 and values["drawn"] > 0.96
    assert values["untrained"] < 0.3 and values["permuted"] < 0.05 and 0.05 < values["mixed"] < 0.2


def test_fid_grows_with_bad_images_and_intra_fid_with_wrong_classes_too(scored):
    values, by_class = of(scored, "fid"), of(scored, "intra_fid")
    assert values["real"] < 0.2 < 3 < values["untrained"] and values["repeated"] > 3 * values["drawn"]
    assert max(values["real"], values["drawn"]) < values["faithful"] < values["repeated"] < values["untrained"]
    assert values["permuted"] == pytest.approx(values["drawn"], rel=1e-6)  # it does not look at classes
    assert max(by_class["real"], by_class["drawn"]) < by_class["faithful"] < by_class["repeated"]
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
    assert min(values["real"], values["drawn"]) > 0.85  # so few images do not tell these two apart
    assert values["repeated"] < values["drawn"] - 0.2 and values["untrained"] < values["drawn"] - 0.2
    assert values["permuted"] < 0.15 and values["mixed"] < 0.6


def test_scorecard_puts_the_real_floor_beside_and_warns(judge, train_set, test_set, monkeypatch):
    counts, stages, draw = Counts(scored=30, cas=30, cas_epochs=1, pairs=20), [], draw_set
    few_test = tuple(tensor[:900] for tensor in test_set)

    def draw_the_same_seven(*args):
        images = draw(*args)
        images[7::10] = images[7].clone()
        return images

    monkeypatch.setattr(scorecard_module, "draw_set", draw_the_same_seven)
    card = scorecard(bundled_generator(), train_set, few_test, judge, counts, stage=stages.append)
    assert len(stages) == DRAWING + 2 * SCORING and card["real_scores"] == "computed"
    few_shown = show_to(judge, *few_test)
    floor, _ = score_images(*balanced(*train_set, 30, 10, seed=0), few_shown, judge, counts)
    for name, value in floor.items():
        assert card["scores"][name]["real"] == value or name == "agreement"
    right = judge_images(judge, few_test[0])[1] == few_test[1]
    assert card["scores"]["agreement"]["real"] == right.double().mean()
    few = "only 900 test images: FID, density and coverage are uncertain"
    assert card["warnings"] == ["class 7 has collapsed: its images are too much alike", few]


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


@pytest.fixture
def few_digits(train_set, test_set, monkeypatch):
    """evaluate.py on these digits, with few images for each score."""
    counts = Counts(scored=20, cas=20, cas_epochs=1, pairs=5)
    monkeypatch.setattr(evaluate, "QUICK", counts)
    monkeypatch.setattr(evaluate, "FULL", counts)
    halves = [LabelledImages(*part, CLASSES) for part in (train_set, test_set)]
    monkeypatch.setattr(evaluate, "load_train_and_test", lambda *args: halves)


def test_table_fits_80_columns_and_is_the_json_with_the_committed_scores_of_real_digits(few_digits):
    result = call(evaluate.main, "--device", "cpu")
    assert result.status == 0 and result.err.startswith(f"Weights: {BUNDLED_GENERATOR}, after batch 13,132\n")
    assert "no Inception FID" in result.out and "200 images, seed 0" in result.out
    assert max(len(line) for line in result.out.splitlines()[1:]) <= 80
    assert "The real digits' figures are" in result.out and "weights/scorecard.json" in result.out
    card = json.loads(call(evaluate.main, "--json", "--device", "cpu").out)
    assert f"{card['scores']['agreement']['generated']:.2%}" in result.out and len(card["scores"]) == 7
    assert card["images"] == 200 and card["test_images"] == 1500 and card["real_scores"] == "scorecard.json"

    def real(card):
        rows = (card["scores"], *card["by_class"].values())
        return [{name: pair["real"] for name, pair in row.items()} for row in rows]

    assert all(real(committed) == real(card) for committed in COMMITTED.values())


def test_scores_of_real_digits_are_computed_for_any_other_question(few_digits, monkeypatch):
    result = call(evaluate.main, "--seed", 1, "--device", "cpu")
    assert result.status == 0 and "scorecard.json" not in result.out
    taken = []

    def note(*args):
        taken.append(args[-1])
        raise evaluate.BadInput("that is enough")

    monkeypatch.setattr(evaluate, "scorecard", note)
    for flags in ([], ["--full"], ["--judge", judge_module.BUNDLED], ["--seed", 1], ["--dataset", "kmnist"]):
        assert call(evaluate.main, *flags, "--device", "cpu").status == 2
    assert taken[0] == scorecard_module.committed_real_scores() and taken[1:] == [None] * 4


def test_terminal_shows_the_stages_in_80_columns(few_digits):
    shown = on_terminal(evaluate.main, "--device", "cpu")
    assert shown.status == 0, shown.lines
    bars = [line for line in shown.lines if "|" in line and "/6" in line]
    stages = ["Reading the real images", "Drawing 200 images", "Generated images: coverage", "Generated images: CAS"]
    assert all(any(line.startswith(stage) for line in bars) for stage in stages), bars
    assert max(len(line) for line in bars) <= 80 and "6/6" in bars[-1]


def test_scores_during_training_change_nothing_in_it_and_keep_the_best(train, tmp_path):
    torch.manual_seed(0)
    judges = {name: tmp_path / name for name in ("judge.pth", "another.pth")}
    judge = Judge(img_size=16)  # untrained
    save_network(judges["judge.pth"], judge, CLASSES)
    flags = ["--seed", 3, "--batch_size", 16, "--img_size", 16, "--latent_dim", 4, "--log_interval", 2, "--n_epochs", 4]
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    assert train(*flags, "--out_dir", plain, digits=80).status == 0
    # a run that ends at an epoch's end, and is extended: its scores are part of its last checkpoint
    flags += ["--eval_interval", 2, "--judge", judges["judge.pth"], "--out_dir", scored]
    result = train(*flags, "--max_steps", 9, digits=80)
    assert "No scores: --eval_interval 2 is 10 batches, and the run ends after 9.\n" in result.err
    result = train("--resume", scored, "--max_steps", 10, digits=80)
    assert result.err.count(": agreement") == 1 and "Warning: the judge recognises only" in result.err
    result = train("--resume", scored, digits=80)
    assert result.status == 0 and result.err.count(": agreement") == 1, result.err
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

    # of another judge the first scores are the best: its features have another scale
    judge.features[-4].weight.data *= 100
    save_network(judges["another.pth"], judge, CLASSES)
    result = train("--resume", scored, "--judge", judges["another.pth"], "--n_epochs", 6, digits=80)
    assert result.err.count("the best so far") == 1
    packed = torch.load(scored / "acgan_gen_best.pth", weights_only=True)
    assert packed["scores"]["step"] == 29 and packed["scores"]["intra_fid"] > 100 * best["intra_fid"]
    assert packed["judge_sha256"] == hashlib.sha256(judges["another.pth"].read_bytes()).hexdigest()


def test_a_worse_score_does_not_replace_the_best(train, tmp_path):
    torch.manual_seed(0)
    save_network(tmp_path / "judge.pth", Judge(img_size=16), CLASSES)
    flags = ["--seed", 3, "--batch_size", 16, "--img_size", 16, "--latent_dim", 4, "--eval_interval", 1]
    flags += ["--judge", tmp_path / "judge.pth", "--out_dir", tmp_path / "run"]
    assert train(*flags, "--n_epochs", 1, digits=80).status == 0
    best = tmp_path / "run" / "acgan_gen_best.pth"
    packed = torch.load(best, weights_only=True)
    packed["scores"]["intra_fid"] = 0.0
    torch.save(packed, best)
    before = best.read_bytes()
    result = train("--resume", tmp_path / "run", "--n_epochs", 2, digits=80)
    assert result.status == 0 and ": agreement" in result.err and "best so far" not in result.err
    assert best.read_bytes() == before


def test_judge_that_lists_the_classes_in_another_order_judges_the_same(judge, test_set, tmp_path):
    images, labels = (part[:200] for part in test_set)
    path, other = tmp_path / "judge.pth", load_judge(None, classes=CLASSES[::-1])
    assert other.classes == CLASSES[::-1]
    assert torch.equal(judge_images(other, images)[1], 9 - judge_images(judge, images)[1])
    save_network(path, other, other.classes)
    again = load_judge(path, classes=CLASSES)
    assert again.classes == CLASSES and torch.equal(again.head.weight, judge.head.weight)
    assert torch.equal(again.head.bias, judge.head.bias)
    scorer = EpochScorer(1, path, LabelledImages(images, labels, CLASSES), "cpu")
    assert agreement(scorer.real) > 0.95
    others = [*CLASSES[1:], "ten"]  # another set of classes is refused as before
    with pytest.raises(BadInput, match="argument --judge: it knows 10 classes"):
        check_judge(load_judge(path, classes=others), others, 32, 1)
