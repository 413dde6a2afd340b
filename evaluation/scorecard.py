"""The scorecard of generated images, each figure beside that of real ones; and scores of G during its training."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data import LabelledImages
from drawing import draw_set
from evaluation import metrics
from evaluation.judge import BUNDLED, Judge, load_judge, train_classifier
from evaluation.metrics import Judged, agreement, fid, show_to
from evaluation.real_scores import kept_or_computed
from models import Discriminator, Generator
from utils import BadInput, announce, load_data


@dataclass(frozen=True)
class Counts:
    """Images a class that each metric takes, the passes of CAS over its own, and pairs a class for MS-SSIM."""

    scored: int
    cas: int
    cas_epochs: int
    pairs: int


QUICK = Counts(scored=1000, cas=3000, cas_epochs=2, pairs=200)
FULL = Counts(scored=5000, cas=5000, cas_epochs=5, pairs=1000)
GOOD_JUDGE = 0.95  # of the real images recognised; a judge below it measures itself
READER_EPOCHS = 2
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
PARTS = {1: "read_whole", 2: "read_half", 4: "read_quarter", 8: "read_eighth"}  # of the side
RESOLUTION_ROWS = [(key, f"read at 1/{part} of the side", "as real", "{:.2%}") for part, key in PARTS.items()]
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


STAGES = 8  # that scorecard() names as it gets to them


def unseen(stage: str) -> None:
    """Show no stage of the scoring to anybody."""


def score(images, labels, real: Judged, judge: Judge, counts: Counts, seed: int = 0, device="cpu", stage=unseen):
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


def agreement_by_resolution(drawn, train_set, test_set, n_classes: int, seed: int = 0, device="cpu") -> dict:
    """Return the agreement of images, and of the test images, that went through fewer pixels (paper, section 4.1).

    Each set is a pair of images, uint8 (N, C, H, W), and labels, int64 (N,). The judge has only seen sharp images. So
    these are read by a classifier of the training images, a part of which went through each of PARTS. Returns
    {key: {"generated": x, "real": y}}.
    """
    real_images, real_labels = train_set
    shares = [metrics.blurred(real_images[number :: len(PARTS)], part) for number, part in enumerate(PARTS)]
    known = torch.cat([real_labels[number :: len(PARTS)] for number in range(len(PARTS))])
    reader = train_classifier(torch.cat(shares), known, n_classes, READER_EPOCHS, seed, device, jitter=False)
    sets = {"generated": drawn, "real": test_set}

    def read(images, labels, part: int) -> float:
        return agreement(show_to(reader, metrics.blurred(images, part), labels))

    return {key: {who: read(*pair, part) for who, pair in sets.items()} for part, key in PARTS.items()}


def scorecard(images, labels, train_set, test_set, judge: Judge, counts: Counts, seed: int = 0, device="cpu",
              stage=unseen) -> dict:  # fmt: skip
    """Score images beside real ones: as many training images, scored the same way against the test set.

    The judge was trained on the training images. So their agreement is replaced by that of the test images. `stage` is
    called with the name of each of the STAGES as it begins; those of the real images are left out if their scores are
    kept. Returns
    {"scores": {metric: {"generated": x, "real": y}}, "by_class": {name: the same}, "warnings": [...]}. Raises BadInput.
    """
    n_classes = judge.config["n_classes"]
    balanced(*test_set, 2, n_classes, seed)  # raises for a class without images
    real = show_to(judge, *test_set)
    floor_set = balanced(*train_set, max(counts.scored, counts.cas), n_classes, seed)

    def scored(whose: str, images, labels):
        return score(images, labels, real, judge, counts, seed, device, lambda name: stage(f"{whose} images: {name}"))

    generated, generated_rows = scored("Generated", images, labels)
    inputs = *floor_set, *test_set, *judge.state_dict().values(), counts, seed, device
    floor, floor_rows = kept_or_computed(lambda: scored("Real", *floor_set), *inputs)
    floor["agreement"] = agreement(real)
    for label, row in enumerate(floor_rows):
        row["agreement"] = agreement(real.of_class(label))

    def side_by_side(ours, theirs):
        return {name: {"generated": ours[name], "real": theirs[name]} for name in ours}

    rows = zip(judge.classes, generated_rows, floor_rows, strict=True)
    by_class = {name: side_by_side(ours, theirs) for name, ours, theirs in rows}
    alike = [name for name, row in by_class.items() if collapsed(**row["ms_ssim"])]
    warnings = [f"class {name} has collapsed: its images are too much alike" for name in alike]
    if floor["agreement"] < GOOD_JUDGE:
        warnings.append(f"the judge recognises only {floor['agreement']:.1%} of the real images: train a better one")
    if len(floor_set[1]) < len(labels):
        warnings.append(f"only {len(floor_set[1]):,} training images beside {len(labels):,} generated ones, as the "
                        "classes are small: the scores of real images suffer")  # fmt: skip
    if len(real.labels) < FEW_IMAGES:
        warnings.append(f"only {len(real.labels):,} test images: FID, density and coverage are uncertain")
    return {"scores": side_by_side(generated, floor), "by_class": by_class, "warnings": warnings}


def table(card: dict) -> str:
    """Return the scorecard of evaluate.py as text of at most 80 columns."""
    lines = [
        f"{card['weights']}: {card['images']:,} images, seed {card['seed']}, beside real training images,",
        f"both against the {card['test_images']:,} test images. FID, density and coverage use",
        f"{card['feature_space']}\n",
        f"{'':34}{'good':>8}{'generated':>12}{'real':>10}",
    ]
    for key, name, good, form in [row for row in ROWS + RESOLUTION_ROWS if row[0] in card["scores"]]:
        ours, theirs = (form.format(card["scores"][key][who]) for who in ("generated", "real"))
        lines.append(f"{name:34}{good:>8}{ours:>12}{theirs:>10}")
    lines += ["", f"{'class':12}" + "".join(f"{key.replace('_', '-'):>13}" for key, *_ in CLASS_ROWS)]
    for name, row in card["by_class"].items():
        pairs = [[short(row[key][who], form) for who in ("generated", "real")] for key, *_, form in CLASS_ROWS]
        lines.append(f"{name[:12]:<12}" + "".join(f"{f'{ours} ({theirs})':>13}" for ours, theirs in pairs))
    lines += ["", "In brackets: real images. Agreement in %. CAS: trained on these, tested on real."]
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
        raise BadInput(f"argument --judge: it knows {kind(*knows)}, but the generator draws {kind(*wanted)}")


class EpochScorer:
    """Scores the EMA of G every so many batches of a training, and keeps the best one.

    The images are compared with real *training* images, so that the test images play no part in the choice. The best
    has the lowest intra-FID. Scoring uses no random stream of the training. Without an `interval`, in batches, there
    are no scores. Raises BadInput if torchmetrics is missing, or the judge is for other images.
    """

    SCORED = 1000  # images of each class

    def __init__(self, interval: int | None, judge_path: Path | None, data: LabelledImages, device):
        self.interval = interval
        if interval is None:
            return
        metrics.check_torchmetrics("argument --eval_interval")
        self.judge = load_judge(judge_path, device)
        check_judge(self.judge, data.classes, data.images.shape[-1], data.images.shape[1])
        self.judge_sha256 = hashlib.sha256((judge_path or BUNDLED).read_bytes()).hexdigest()
        self.n_classes = len(data.classes)
        self.real = show_to(self.judge, *balanced(data.images, data.labels, self.SCORED, self.n_classes, seed=0))
        recognised = agreement(self.real)
        if recognised < GOOD_JUDGE:
            announce(f"Warning: the judge recognises only {recognised:.1%} of the real images: its scores mean little.")

    def if_due(self, step: int, record, ema: Generator, discriminator: Discriminator) -> None:
        """Score the EMA if it is due after `step` batches; the RunRecord notes the scores, and keeps the best."""
        if self.interval is None or step % self.interval:
            return
        scores = self.score(ema)
        record.scores(step - 1, scores)
        best = scores["intra_fid"] < self.lowest_intra_fid(record.best_generator)
        if best:
            record.best(ema, discriminator, scores={"step": step - 1} | scores, judge_sha256=self.judge_sha256)
        text = f"agreement {scores['agreement']:.2%}, FID {scores['fid']:.3f}, intra-FID {scores['intra_fid']:.3f}"
        announce(f"After batch {step}: {text}{', the best so far' if best else ''}.")

    def score(self, generator: Generator) -> dict[str, float]:
        """Return label agreement, FID and intra-FID of images from the same noise every time."""
        labels = torch.arange(self.n_classes).repeat(self.SCORED)
        drawn = show_to(self.judge, draw_set(generator, labels, seed=0), labels)
        scores = dict(agreement=agreement(drawn), fid=fid(self.real.features, drawn.features))
        return scores | {"intra_fid": metrics.intra_fid(self.real, drawn, self.n_classes)}

    def lowest_intra_fid(self, best_generator: Path) -> float:
        """Return the lowest intra-FID so far; infinite if no G is kept yet, or another judge scored it."""
        try:
            packed = load_data(best_generator)
            return packed["scores"]["intra_fid"] if packed["judge_sha256"] == self.judge_sha256 else math.inf
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf
