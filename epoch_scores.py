"""Scores of G during a training, and the best G so far kept beside the last."""

import contextlib
import hashlib
import math
from pathlib import Path

import torch

from dataset import LabelledImages
from evaluate import balanced, check_judge
from generate import draw_set
from judge import load_judge
from models import pack_network
from run_folder import BEST
from scores import agreement, check_torchmetrics, fid, show_to
from utils import Stopped, announce, load_data


class EpochScores:
    """Scores G every so many epochs of a training, and keeps the best one.

    The images are compared with real training digits, so that the test digits have no part in the choice. The best G
    has the lowest mean FID of the classes, which sees wrong classes and missing variety alike. The random streams of
    the training are left alone.

    Args:
        interval: epochs between scores; None for none at all.
        judge_path: file of the judge.
        generator, discriminator: of the training, or G's running average; scored as they are at the time.
        data: the training set.
        steps_per_epoch: batches an epoch.

    Raises:
        BadInput: torchmetrics or the judge is missing, or the judge is for other images.
    """

    SCORED = 1000  # images of each class

    def __init__(self, interval, judge_path: Path, generator, discriminator, data: LabelledImages, steps_per_epoch):
        self.interval, self.steps_per_epoch = interval, steps_per_epoch
        self.generator, self.discriminator = generator, discriminator
        if interval is None:
            return
        check_torchmetrics("argument --eval_interval")
        self.judge = load_judge(judge_path, next(generator.parameters()).device)
        check_judge(self.judge, generator)
        self.judge_sha256 = hashlib.sha256(judge_path.read_bytes()).hexdigest()
        self.n_classes = generator.config["n_classes"]
        self.real = show_to(self.judge, *balanced(data.images, data.labels, self.SCORED, self.n_classes, seed=0))

    def begin(self, log, steps: int) -> None:
        """Record in `log`, a RunLog, after `steps` batches; a scoring that was cut short there is made up for."""
        self.log = log
        if self.interval is None:
            return
        if steps and steps % self.steps_per_epoch == 0 and log.scored_step != steps - 1:
            self.after_epoch(steps // self.steps_per_epoch - 1)

    def after_epoch(self, epoch: int) -> None:
        """Score G, if it is time to, after `epoch`, counted from 0; record it, and keep G if it is the best yet."""
        if self.interval is None or (epoch + 1) % self.interval:
            return
        with contextlib.suppress(Stopped):  # the loop, which knows of the signal too, ends the run in good order
            step, scores = (epoch + 1) * self.steps_per_epoch - 1, self.score()
            self.log.scores(step, scores)
            best = scores["intra_fid"] < self.lowest_intra_fid()
            kept = best and self.log.save_best(self.packed({"step": step} | scores))
            text = f"agreement {scores['agreement']:.2%}, FID {scores['fid']:.3f}, intra-FID {scores['intra_fid']:.3f}"
            announce(f"After batch {step}: {text}{', the best so far' if kept else ''}.")

    def score(self) -> dict[str, float]:
        """Label agreement, FID and the mean of the classes' FIDs, of images from the same noise every time."""
        labels = torch.arange(self.n_classes).repeat(self.SCORED)
        images = torch.cat(list(draw_set(self.generator, labels, seed=0)))
        drawn = show_to(self.judge, images, labels)
        parts = [(self.real.of_class(label), drawn.of_class(label)) for label in range(self.n_classes)]
        return {
            "agreement": agreement(drawn),
            "fid": fid(self.real.features, drawn.features),
            "intra_fid": sum(fid(ours.features, theirs.features) for ours, theirs in parts) / self.n_classes,
        }

    def lowest_intra_fid(self) -> float:
        """That of the best G kept so far; infinite if there is none, or another judge scored it."""
        try:
            packed = load_data(self.log.out_dir / BEST[0])
            return packed["scores"]["intra_fid"] if packed["judge_sha256"] == self.judge_sha256 else math.inf
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf

    def packed(self, scores: dict[str, float]) -> dict[str, dict]:
        """G and its D as they are now, with what they are worth, by the names of their files."""
        more = {"scores": scores, "judge_sha256": self.judge_sha256}
        # G last: its scores are those compared, so after a fault between the two both are written again
        return {
            BEST[1]: pack_network(self.discriminator) | more,
            BEST[0]: pack_network(self.generator) | more,
        }
