"""The metrics: they look at images, labels and the judge's features, and never at D's output.

Agreement, FID and same-class MS-SSIM after Odena et al. (arXiv:1610.09585) and Heusel et al. (arXiv:1706.08500);
density and coverage: Naeem et al. (arXiv:2002.09797); classification accuracy score (CAS): Ravuri and Vinyals
(arXiv:1905.10887). FID and MS-SSIM are torchmetrics' own; see requirements-eval.txt.
"""

import importlib.util
from dataclasses import dataclass

import torch

from evaluation.judge import Judge, judge_images, train_classifier
from utils import BadInput

NEAREST = 5  # k of density and coverage
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001)  # the first three of the usual five scales; 32 px has no room for more
MS_SSIM_SMALL = 28  # pixels; images below have room for two scales only
MS_SSIM_SIGMA = 0.8  # pixels: a window of 7, where the usual 1.5 gives 11


@dataclass
class Judged:
    """Images, the classes they should show, and what the judge sees in them.

    images: uint8 (N, C, H, W); labels and recognised: int64 (N,); features: float32 (N, F).
    """

    images: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    recognised: torch.Tensor

    def of_class(self, label: int) -> "Judged":
        """Return the images of one class."""
        at = self.labels == label
        return Judged(self.images[at], self.labels[at], self.features[at], self.recognised[at])


def show_to(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> Judged:
    """Return what the judge sees in images, uint8 (N, C, H, W), with labels, int64 (N,)."""
    return Judged(images, labels, *judge_images(judge, images))


def check_torchmetrics(needed_by: str) -> None:
    """Raise BadInput unless torchmetrics can be imported."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise BadInput(f"{needed_by} needs torchmetrics: pip install -r requirements-eval.txt")


def agreement(judged: Judged) -> float:
    """Return the share of the images that are recognised as the class they should show, in [0, 1]."""
    return (judged.recognised == judged.labels).double().mean().item()


def fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return the Fréchet distance between two sets of features, float32 (N, F) and (M, F); 0 is best.

    It depends on the feature space, so compare it only with another of the same judge.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # here, as it takes seconds

    extractor = torch.nn.Identity()  # the input already is features
    extractor.num_features = real.shape[1]
    metric = FrechetInceptionDistance(extractor).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(metric.compute().item(), 0.0)  # in this order, nan stays nan


def intra_fid(real: Judged, fake: Judged, n_classes: int) -> float:
    """Return the mean of the classes' FIDs: it sees wrong classes and missing variety alike."""
    parts = [(real.of_class(label), fake.of_class(label)) for label in range(n_classes)]
    return sum(fid(ours.features, theirs.features) for ours, theirs in parts) / n_classes


def density_and_coverage(real: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """Measure how well fakes lie among real features, float32 (N, F), and how much of the real set has fakes near it.

    Around each real image lies a ball that just reaches its k-th nearest real neighbour. Density is the mean number
    of balls that a fake lies in, over k: about 1 for real images, and it can exceed 1. Coverage is the share of the
    balls that hold a fake.
    """
    k = min(NEAREST, len(real) - 1)
    inside, covered = 0, 0
    for chunk in real.split(1000):
        radius = torch.cdist(chunk, real).kthvalue(k + 1, dim=1).values  # the nearest is the image itself
        within = torch.cdist(chunk, fake) < radius[:, None]
        inside += within.sum().item()
        covered += within.any(1).sum().item()
    return inside / (k * len(fake)), covered / len(real)


def same_class_ms_ssim(images: torch.Tensor, pairs: int, seed: int) -> float:
    """Return the mean MS-SSIM over random pairs of the images of one class, in [0, 1]: alike images score high.

    It is the paper's measure of diversity, in a variant that fits 32 pixels: three scales, a Gaussian window of 7. The
    images are uint8 (N, C, H, W), N at least 2; none is paired with itself.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(images), (pairs,), generator=generator)
    second = (first + torch.randint(1, len(images), (pairs,), generator=generator)) % len(images)
    betas = MS_SSIM_BETAS if images.shape[-1] >= MS_SSIM_SMALL else MS_SSIM_BETAS[:2]
    values = ms_ssim(
        images[first].float() / 255, images[second].float() / 255, sigma=MS_SSIM_SIGMA, kernel_size=7, data_range=1.0,
        betas=tuple(beta / sum(betas) for beta in betas), reduction="none",
    )  # fmt: skip
    return values.mean().item()


def classification_accuracy_score(images, labels, test_images, test_labels, epochs: int, seed: int, device) -> float:
    """Return the CAS: train a classifier on these images alone, and test it on real ones; a share in [0, 1].

    Images are uint8 (N, C, H, W), labels int64 (N,); the other arguments are those of train_classifier.
    """
    n_classes = int(test_labels.max()) + 1
    classifier = train_classifier(images, labels, n_classes, epochs, seed, device, jitter=False)
    return (judge_images(classifier, test_images)[1] == test_labels).double().mean().item()


def scores_by_class(real: Judged, fake: Judged, pairs: int, seed: int, n_classes: int) -> list[dict]:
    """Return agreement, FID, density, coverage and MS-SSIM of each class's fakes against its real images."""

    def row(real: Judged, fake: Judged) -> dict[str, float]:
        density, coverage = density_and_coverage(real.features, fake.features)
        ms_ssim = same_class_ms_ssim(fake.images, pairs, seed)
        scores = dict(agreement=agreement(fake), fid=fid(real.features, fake.features))
        return scores | dict(density=density, coverage=coverage, ms_ssim=ms_ssim)

    return [row(real.of_class(label), fake.of_class(label)) for label in range(n_classes)]
