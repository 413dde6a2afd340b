"""The scorecard of generated images, each figure beside that of real ones."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data.drawing import draw_set
from evaluation import metrics
from evaluation.judge import Judge
from evaluation.metrics import Judged, agreement, fid, show_to
from utils import BadInput

COMMITTED = Path(__file__).resolve().parent.parent / "weights" / "scorecard.json"  # of the bundled weights


@dataclass(frozen=True)
class Counts:
    """Images a class that each metric takes, the passes of CAS over its own, and pairs a class for MS-SSIM."""

    scored: int
    cas: int
    cas_epochs: int
    pairs: int


QUICK = Counts(scored=1000, cas=3000, cas_epochs=2, pairs=200)
FULL = Counts(scored=3000, cas=5000, cas_epochs=5, pairs=1000)
GOOD_JUDGE = 0.95  # of the real images recognised; a judge below it measures itself
FEW_IMAGES = 1000  # a covariance of 128 features from fewer is too noisy for an FID

# key, its name in the table, which way is good, and its format
ROWS = [
    ("agreement", "label agreement", "up", "{:.2%}"),
    ("fid", "FID, in the judge's features", "down", "{:.3f}"),
    ("intra_fid", "intra-FID, mean of the classes", "down", "{:.3f}"),
    ("density", "density", "up", "{:.3f}"),
    ("coverage", "coverage", "up", "{:.3f}"),
    ("ms_ssim", "same-class MS-SSIM", "as real", "{:.3f}"),
    ("cas", "CAS", "up", "{:.2%}"),
]
CLASS_ROWS = [row for row in ROWS if row[0] in ("agreement", "fid", "density", "coverage", "ms_ssim")]


def balanced(images, labels, per_class: int, n_classes: int, seed: int):
    """Take `per_class` random images and labels of each class, the classes in turn, or as many as the smallest has.

    Raises BadInput if a class has fewer than two images.
    """
    counts = torch.bincount(labels, minlength=n_classes)
    if counts.min() < 2:
        raise BadInput(
            f"class number {int(counts.argmin())} has {int(counts.min())} real images: add some, to have two"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    per_class = min(per_class, int(counts.min()))
    by_class = [order[labels[order] == label][:per_class] for label in range(n_classes)]
    indices = torch.stack(by_class, 1).flatten()
    return images[indices], labels[indices]


def collapsed(generated: float, real: float) -> bool:
    """Return True if a class's MS-SSIM exceeds that of real images by a quarter of the distance to 1."""
    return generated > real + (1 - real) / 4


DRAWING, SCORING = 1, 4  # stages that scorecard() names: once, and for generated and for real images


def unseen(stage: str) -> None:
    """Show no stage of the scoring to anybody."""


def score_images(images, labels, real: Judged, judge: Judge, counts: Counts, seed: int = 0, device="cpu", stage=unseen):
    """Score images, uint8 (N, C, H, W), the classes in turn and as many as `counts` says, against the real test set.

    `seed` is that of the pairs and of the CAS classifier. `stage` is called with the name of each stage as it begins.
    Returns the scores by their key in ROWS, and those by class.
    """
    n_classes = judge.config["n_classes"]
    n_scored, n_cas = counts.scored * n_classes, counts.cas * n_classes
    stage("judging")
    shown = show_to(judge, images[:n_scored], labels[:n_scored])
    stage("class by class")
    by_class = metrics.scores_by_class(real, shown, counts.pairs, seed, n_classes)
    stage("coverage")
    density, coverage = metrics.density_and_coverage(real.features, shown.features)
    mean = {key: sum(row[key] for row in by_class) / n_classes for key in ("fid", "ms_ssim")}
    stage("CAS")
    cas_set = images[:n_cas], labels[:n_cas], real.images, real.labels
    cas = metrics.classification_accuracy_score(*cas_set, counts.cas_epochs, seed, device)
    scores = dict(agreement=agreement(shown), fid=fid(real.features, shown.features), intra_fid=mean["fid"],
                  density=density, coverage=coverage, ms_ssim=mean["ms_ssim"], cas=cas)  # fmt: skip
    return scores, by_class


def committed_real_scores() -> tuple[dict, list[dict]]:
    """Return the scores of MNIST's real digits, and those by class, for the bundled judge, QUICK and seed 0."""
    card = next(iter(json.loads(COMMITTED.read_text(encoding="utf-8")).values()))  # the real half is the same in each

    def real(scores):
        return {name: pair["real"] for name, pair in scores.items()}

    return real(card["scores"]), [real(row) for row in card["by_class"].values()]


def scorecard(generator, train_set, test_set, judge: Judge, counts: Counts, seed: int = 0, device="cpu", stage=unseen,
              real_scores=None) -> dict:  # fmt: skip
    """Score what G draws beside real images: as many training images, scored the same way against the test set.

    Each set is a pair of images, uint8 (N, C, H, W), and labels, int64 (N,). The judge was trained on the training
    images, so their agreement is replaced by that of the test images. `stage` is called with the name of each stage
    as it begins. `real_scores`, of committed_real_scores(), take the place of those computed here. Returns
    {"scores": {metric: {"generated": x, "real": y}}, "by_class": {name: the same}, "warnings": [...], ...}: plain data.
    Raises BadInput.
    """
    n_classes = judge.config["n_classes"]
    balanced(*test_set, 2, n_classes, seed)  # raises for a class without images
    labels = torch.arange(n_classes).repeat(max(counts.scored, counts.cas))
    stage(f"Drawing {len(labels):,} images")
    images = draw_set(generator, labels, seed)
    real = show_to(judge, *test_set)

    def scored(whose: str, images, labels):
        return score_images(
            images, labels, real, judge, counts, seed, device, lambda name: stage(f"{whose} images: {name}")
        )

    generated, generated_rows = scored("Generated", images, labels)
    n_real = len(labels)
    if real_scores is None:
        floor_set = balanced(*train_set, max(counts.scored, counts.cas), n_classes, seed)
        n_real = len(floor_set[1])
        floor, floor_rows = scored("Real", *floor_set)
        floor["agreement"] = agreement(real)
        for label, row in enumerate(floor_rows):
            row["agreement"] = agreement(real.of_class(label))
    else:
        floor, floor_rows = real_scores

    def side_by_side(ours, theirs):
        return {name: {"generated": ours[name], "real": theirs[name]} for name in ours}

    rows = zip(judge.classes, generated_rows, floor_rows, strict=True)
    by_class = {name: side_by_side(ours, theirs) for name, ours, theirs in rows}
    alike = [name for name, row in by_class.items() if collapsed(**row["ms_ssim"])]
    warnings = [f"class {name} has collapsed: its images are too much alike" for name in alike]
    if floor["agreement"] < GOOD_JUDGE:
        warnings.append(f"the judge recognises only {floor['agreement']:.1%} of the real images: train a better one")
    if n_real < len(labels):
        warnings.append(f"only {n_real:,} training images beside {len(labels):,} generated ones, as the classes are "
                        "small: the scores of real images suffer")  # fmt: skip
    if len(real.labels) < FEW_IMAGES:
        warnings.append(f"only {len(real.labels):,} test images: FID, density and coverage are uncertain")
    features = f"the judge's last {judge.head.in_features} features: this is no Inception FID."
    return dict(images=counts.scored * n_classes, cas_images=counts.cas * n_classes, test_images=len(real.labels),
                seed=seed, feature_space=features, real_scores="computed" if real_scores is None else COMMITTED.name,
                scores=side_by_side(generated, floor), by_class=by_class, warnings=warnings)  # fmt: skip


def table(card: dict) -> str:
    """Return the scorecard of evaluate.py as text of at most 80 columns."""
    lines = [
        f"{card['weights']}: {card['images']:,} images, seed {card['seed']}, beside real training images,",
        f"both against the {card['test_images']:,} test images. FID, density and coverage use",
        f"{card['feature_space']}\n",
        f"{'':34}{'good':>8}{'generated':>12}{'real':>10}",
    ]
    for key, name, good, form in ROWS:
        ours, theirs = (form.format(card["scores"][key][who]) for who in ("generated", "real"))
        lines.append(f"{name:34}{good:>8}{ours:>12}{theirs:>10}")
    lines += ["", f"{'class':12}" + "".join(f"{key.replace('_', '-'):>13}" for key, *_ in CLASS_ROWS)]
    for name, row in card["by_class"].items():
        pairs = [[short(row[key][who], form) for who in ("generated", "real")] for key, *_, form in CLASS_ROWS]
        lines.append(f"{name[:12]:<12}" + "".join(f"{f'{ours} ({theirs})':>13}" for ours, theirs in pairs))
    lines += ["", "In brackets: real images. Agreement in %. CAS: trained on these, tested on real."]
    if card["real_scores"] == COMMITTED.name:
        lines.append("The real digits' figures are read from weights/scorecard.json.")
    lines += [f"Warning: {warning}." for warning in card["warnings"]]
    return "\n".join(lines)


def short(value: float, form: str) -> str:
    """Return a figure of the class table: a share in percent, all else with two decimals."""
    return f"{100 * value:.1f}" if form.endswith("%}") else f"{value:.2f}"


def check_judge(judge: Judge, classes: list[str], img_size: int, channels: int) -> None:
    """Raise BadInput unless the judge was trained for images of these classes, this size and these channels."""

    def kind(names, size, channels):
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"{len(names)} classes ({some}) in {'grey' if channels == 1 else 'colour'}, {size} pixels"

    knows, wanted = (judge.classes, judge.config["img_size"], judge.config["channels"]), (classes, img_size, channels)
    if knows != wanted:
        raise BadInput(f"argument --judge: it knows {kind(*knows)}, but the generator draws {kind(*wanted)}: "
                       "train one with train_judge.py")  # fmt: skip
