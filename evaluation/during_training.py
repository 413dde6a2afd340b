"""Scores of G during its training, and the choice of the best one."""

import hashlib
import math
from pathlib import Path

import torch

from data import LabelledImages
from data.drawing import draw_set
from evaluation import metrics
from evaluation.judge import BUNDLED, load_judge
from evaluation.metrics import agreement, fid, show_to
from evaluation.scorecard import GOOD_JUDGE, balanced, check_judge
from run.weights import BEST
from utils import announce, load_data


class EpochScorer:
    """Scores the EMA of G every so many batches of a training, and keeps the best one.

    The images are compared with real *training* images, so that the test images play no part in the choice. The best
    has the lowest intra-FID. Scoring uses no random stream of the training. Raises BadInput if torchmetrics is missing,
    or the judge is for other images.
    """

    SCORED = 1000  # images of each class

    def __init__(self, interval: int, judge_path: Path | None, data: LabelledImages, device):
        self.interval = interval  # in batches
        metrics.check_torchmetrics("argument --eval_interval")
        self.judge = load_judge(judge_path, device, data.classes)
        check_judge(self.judge, data.classes, data.images.shape[-1], data.images.shape[1])
        self.judge_sha256 = hashlib.sha256((judge_path or BUNDLED).read_bytes()).hexdigest()
        self.n_classes = len(data.classes)
        self.real = show_to(self.judge, *balanced(data.images, data.labels, self.SCORED, self.n_classes, seed=0))
        recognised = agreement(self.real)
        if recognised < GOOD_JUDGE:
            announce(f"Warning: the judge recognises only {recognised:.1%} of the real images: its scores mean little.")

    def if_due(self, step: int, record, ema, discriminator) -> None:
        """Score the EMA if it is due after `step` batches; the run's record notes the scores, and keeps the best."""
        if step % self.interval:
            return
        scores = self.score_generator(ema)
        record.scores(step - 1, scores)
        best = scores["intra_fid"] < self.lowest_intra_fid(record.out_dir / BEST[0])
        if best:
            scored = {"step": step - 1} | scores
            record.best(ema, discriminator, step=step, scores=scored, judge_sha256=self.judge_sha256)
        text = f"agreement {scores['agreement']:.2%}, FID {scores['fid']:.3f}, intra-FID {scores['intra_fid']:.3f}"
        announce(f"After batch {step}: {text}{', the best so far' if best else ''}.")

    def score_generator(self, generator) -> dict[str, float]:
        """Return label agreement, FID and intra-FID of images from the same noise every time."""
        labels = torch.arange(self.n_classes).repeat(self.SCORED)
        drawn = show_to(self.judge, draw_set(generator, labels, seed=0), labels)
        scores = dict(agreement=agreement(drawn), fid=fid(self.real.features, drawn.features))
        return scores | {"intra_fid": metrics.intra_fid(self.real, drawn, self.n_classes)}

    def lowest_intra_fid(self, best_generator: Path) -> float:
        """Return the lowest intra-FID so far; infinite if no G is kept yet, or another judge scored it.

        A file that is there but cannot be read may be the best: nothing is lower.
        """
        try:
            packed = load_data(best_generator)
            return packed["scores"]["intra_fid"] if packed["judge_sha256"] == self.judge_sha256 else math.inf
        except OSError as error:
            return math.inf if isinstance(error, FileNotFoundError) else -math.inf
        except (ValueError, KeyError, TypeError):
            return math.inf
