"""What a run may do otherwise than the tutorial: its losses, its learning rate, and how its networks begin.

Everything here is off by default. recipes.py has the flags, and models.py what changes in the networks.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from models import Discriminator, Generator, load_network
from training.run_folder import WEIGHTS
from utils import BadInput, Diverged, announce, on_terminal

R1_EVERY = 4  # batches; the penalty is multiplied by as much
WEIGHTS_OF = dict(zip((Generator, Discriminator), WEIGHTS, strict=False))  # in a run's folder


@dataclass(frozen=True)
class Objective:
    """The terms of both losses. As it stands, they are the tutorial's.

    logits: D returns logits, and the losses take them: without the tutorial's second softmax.
    fake_class_loss: D learns classes from generated images, too.
    twin_head: D's class head has an output for each class of real images, and K more for those of generated ones
        (the discriminative classifier of ADC-GAN, arXiv:2107.10060).
    r1: gamma of the penalty on D's gradient at real images (arXiv:1801.04406); 0 for none.
    """

    logits: bool = False
    fake_class_loss: bool = True
    twin_head: bool = False
    r1: float = 0.0

    def adversarial(self, validity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of D's first output, (B, 1)."""
        return (F.binary_cross_entropy_with_logits if self.logits else F.binary_cross_entropy)(validity, target)

    def real_class(self, label: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """D's class loss on real images: - log C[y], where C is the softmax of D's second output.

        In the tutorial that output is a softmax already: its softmax twice.
        """
        return F.cross_entropy(label, labels)

    def fake_class(self, label: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """D's class loss on generated images: - log C[y], or - log C[y + K] with the twin head."""
        if not self.fake_class_loss:
            return label.new_zeros(())
        return F.cross_entropy(label, labels + self.n_classes(label) * self.twin_head)

    def generator_class(self, label: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """G's class loss: - log C[y], or - (log C[y] - log C[y + K]) with the twin head."""
        loss = F.cross_entropy(label, labels)
        return loss - F.cross_entropy(label, labels + self.n_classes(label)) if self.twin_head else loss

    def recognised(self, label: torch.Tensor) -> torch.Tensor:
        """The class that D sees in each image, int64 (B,), be it real or generated."""
        return label.argmax(1) % self.n_classes(label)

    def n_classes(self, label: torch.Tensor) -> int:
        """K, by the width of D's second output."""
        return label.shape[1] // (1 + self.twin_head)

    def penalised(self, step: int) -> bool:
        """Return True if D's loss gets the penalty in batch `step`."""
        return self.r1 > 0 and step % R1_EVERY == 0

    def penalty(self, discriminator: Discriminator, real_imgs: torch.Tensor) -> torch.Tensor:
        """R1: gamma / 2 * E |grad_x D(x)|^2 at real images, D being its logit; for one batch in R1_EVERY."""
        real_imgs = real_imgs.detach().requires_grad_()
        validity = discriminator.validity_logit(real_imgs)
        (gradient,) = torch.autograd.grad(validity.sum(), real_imgs, create_graph=True)
        return self.r1 / 2 * R1_EVERY * gradient.square().sum((1, 2, 3)).mean()


def set_schedule(opt, checkpoint: dict | None) -> None:
    """Set opt.schedule_steps, the batches that the rate is planned for: a resumed run keeps those that it began with.

    Raises BadInput if the run would go on after its rate has reached 0.
    """
    opt.schedule_steps = checkpoint["options"].get("schedule_steps", opt.total_steps) if checkpoint else opt.total_steps
    if type(opt.schedule_steps) is not int or opt.schedule_steps < 1:
        raise BadInput("argument --resume: the checkpoint is corrupt, as its schedule has no length: name another run")
    if opt.lr_schedule == "linear" and opt.total_steps > opt.schedule_steps:
        raise BadInput(f"argument --lr_schedule: the rate of this run is 0 after batch {opt.schedule_steps:,}: lower "
                       "--n_epochs or --max_steps, or start another run with --init_from")  # fmt: skip


def first_rate(opt, device: torch.device) -> float | torch.Tensor:
    """Return the rate to build Adam with: a tensor where it changes and a CUDA graph reads it."""
    changes = opt.lr_schedule != "constant" and device.type == "cuda"
    return torch.tensor(opt.lr, device=device) if changes else opt.lr


def learning_rate(opt, step: int) -> float:
    """Return Adam's rate for batch `step`: --lr; the linear schedule lowers it to 0 in the second half of the run."""
    if opt.lr_schedule == "constant":
        return opt.lr
    return opt.lr * min(1.0, 2 * (1 - step / opt.schedule_steps))


def set_learning_rate(opt, step: int, *optimizers: torch.optim.Optimizer) -> None:
    """Set the rate for batch `step`; one that is a tensor, as CUDA graphs need it, keeps its place in memory."""
    rate = learning_rate(opt, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def pretrain_class_head(opt, step: int, discriminator, objective: Objective, batches) -> None:
    """Train D's trunk and class head as a classifier of the real images, before the first batch of the GAN.

    It is the tutorial's claim that a pretrained CNN speeds ACGAN up, which its script does not try. Raises Diverged.
    """
    epochs = opt.pretrain_class_head
    if step or not epochs:
        return
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=opt.lr)
    bar = tqdm(total=epochs * len(batches), desc="Pretraining D's class head", leave=False, disable=not on_terminal())
    for _ in range(epochs):
        right, seen = 0, 0
        for indices in batches:
            real_imgs, labels = batches.gather(indices)
            validity, label = discriminator(real_imgs)
            loss = objective.real_class(label, labels) + 0 * validity.sum()  # several ranks need all gradients
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right, seen = right + (objective.recognised(label) == labels).sum(), seen + len(labels)
            bar.update()
    bar.close()
    if not torch.isfinite(loss):
        raise Diverged("the class loss is no longer finite while D's class head is pretrained")
    announce(f"Pretrained D's class head: {int(right) / seen:.2%} of the classes were right in its last epoch.")


def start_from(path: Path, *networks: nn.Module) -> None:
    """Copy the weights of an earlier run's folder, or of one weight file, into networks that are about to be trained.

    Layers of other sizes are named, and stay as they are. Raises BadInput for a file that cannot be read, or one whose
    network computes something else from the same weights.
    """
    for network in networks:
        kind = type(network)
        if os.path.isdir(path):
            source = load_network(path / WEIGHTS_OF[kind], kinds=(kind,))
        elif type(source := load_network(path)) is not kind:
            continue
        for name in kind.TUTORIAL:
            if source.config[name] != network.config[name]:
                raise BadInput(f"argument --init_from: the weights of {str(path)!r} are for {name} "
                               f"{source.config[name]}, not {network.config[name]}: give this run the --recipe and "
                               "the switches of that one")  # fmt: skip
        own, theirs = network.state_dict(), source.state_dict()
        fresh = [name for name in own if name not in theirs or theirs[name].shape != own[name].shape]
        network.load_state_dict({name: theirs[name] for name in own if name not in fresh}, strict=False)
        kept = f"; new, as their sizes differ: {', '.join(fresh)}" if fresh else ""
        announce(f"{kind.__name__}: starts from {path}{kept}.")
