"""How good are generated images? Measures that look at images and labels, and never at the GAN's own opinion.

Agreement, FID and same-class MS-SSIM after Odena et al. (arXiv:1610.09585) and Heusel et al. (arXiv:1706.08500);
density and coverage: Naeem et al. (arXiv:2002.09797); classification accuracy score (CAS): Ravuri and Vinyals
(arXiv:1905.10887). FID and MS-SSIM are torchmetrics' own; see requirements-eval.txt.
"""

import importlib.util
from dataclasses import dataclass

import torch

from judge import Judge, judge_images, train_classifier
from utils import BadInput

NEAREST = 5  # k of density and coverage
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001)  # the first three of the usual five scales; 32 px has no room for more
MS_SSIM_SMALL = 28  # pixels; images below have room for two scales only
MS_SSIM_SIGMA = 0.8  # pixels: a window of 7, where the usual 1.5 gives 11


@dataclass
class Judged:
    """Images, the classes they were asked or labelled to be, and what the judge makes of them.

    images: uint8 (N, C, H, W); labels and recognised: int64 (N,); features: float32 (N, F).
    """

    images: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    recognised: torch.Tensor

    def of_class(self, label: int) -> "Judged":
        """Those of one class."""
        at = self.labels == label
        return Judged(self.images[at], self.labels[at], self.features[at], self.recognised[at])


def show_to(judge: Judge, images: torch.Tensor, labels: torch.Tensor) -> Judged:
    """Have the judge look at images, uint8 (N, C, H, W), with labels, int64 (N,)."""
    return Judged(images, labels, *judge_images(judge, images))


def check_torchmetrics(needed_by: str) -> None:
    """Raise BadInput unless torchmetrics can be imported."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise BadInput(f"{needed_by} needs torchmetrics: pip install -r requirements-eval.txt")


def agreement(judged: Judged) -> float:
    """Share of the images that are recognised as the class they were asked to be, in [0, 1]."""
    return (judged.recognised == judged.labels).double().mean().item()


class PassThrough(torch.nn.Module):
    """A "feature extractor" for torchmetrics that is handed features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def fid(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Fréchet distance between two sets of features, float32 (N, F) and (M, F); 0 is best.

    It depends on the feature space, so it compares only with another of the same judge.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # here, as it takes seconds

    metric = FrechetInceptionDistance(PassThrough(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(metric.compute().item(), 0.0)  # in this order, nan stays nan


def density_and_coverage(real: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """How well fakes lie among real features, and how much of the real set has fakes near it.

    Around each real image lies a ball that just reaches its k-th nearest real neighbour. Density: balls that a fake
    lies in, on average, over k; about 1 for real images, and can exceed it. Coverage: share of the balls with a fake.

    Args:
        real, fake: features, float32 (N, F) and (M, F).
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
    """Mean MS-SSIM over random pairs of the images of one class, in [0, 1]: the more alike, the higher.

    The paper's measure of diversity, in a variant that fits 32 pixels: three scales and a Gaussian window of 7.

    Args:
        images: uint8 (N, C, H, W), N at least 2.
        pairs: number of pairs; no image is paired with itself.
        seed: of the pairs.
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
    """CAS: train a classifier on these images alone, test it on real ones; the share it gets right, in [0, 1].

    Args:
        images, labels: the training set, uint8 (N, C, H, W) and int64 (N,).
        test_images, test_labels: the real test set, likewise.
        epochs: passes over the training set.
        seed: of the classifier.
        device: where to train.
    """
    n_classes = int(test_labels.max()) + 1
    classifier = train_classifier(images, labels, n_classes, epochs, seed, device, jitter=False)
    return (judge_images(classifier, test_images)[1] == test_labels).double().mean().item()


def scores_by_class(real: Judged, fake: Judged, pairs: int, seed: int, n_classes: int) -> list[dict]:
    """For each class: agreement, FID, density, coverage, MS-SSIM, of the fakes asked for against the real of it."""
    rows = []
    for label in range(n_classes):
        real_part, fake_part = real.of_class(label), fake.of_class(label)
        density, coverage = density_and_coverage(real_part.features, fake_part.features)
        rows.append(
            {
                "agreement": agreement(fake_part),
                "fid": fid(real_part.features, fake_part.features),
                "density": density,
                "coverage": coverage,
                "ms_ssim": same_class_ms_ssim(fake_part.images, pairs, seed),
            }
        )
    return rows
