"""What a run decides once, from its options, its images and its machine."""

import argparse
import math
import secrets
import zlib
from dataclasses import dataclass

import torch

from data import LabelledImages
from data.batches import Batches
from fast.compile import choose_compile
from run.ranks import Ranks
from utils import BadInput, announce


@dataclass(frozen=True)
class Plan:
    """The decisions; the checkpoint keeps them, and a resumed run has the same.

    compile: "on" or "off". threads: PyTorch's, among which sums on a CPU are split. classes: their names, by label.
    labels_crc32: a checksum of the images' labels. total_steps: the batch at which the run ends. schedule_steps: the
    batches that a falling rate is planned for.
    """

    seed: int
    compile: str
    threads: int
    world_size: int
    classes: list[str]
    n_classes: int
    channels: int
    n_images: int
    labels_crc32: int
    total_steps: int
    schedule_steps: int


def make_plan(
    opt: argparse.Namespace, data: LabelledImages, batches: Batches, ranks: Ranks, before: dict | None
) -> Plan:
    """Decide all; `before`, the plan of the checkpoint to resume, is kept where it matters.

    Raises BadInput for options that do not fit the images, the machine or the checkpoint, and if no batch is left.
    """
    found = dict(
        classes=data.classes, n_images=len(data.labels), labels_crc32=zlib.crc32(data.labels.numpy().tobytes())
    )
    if before and any(before[name] != value for name, value in found.items()):
        raise BadInput("argument --resume: the checkpoint is from other images: name its own --data_root")
    found |= dict(n_classes=len(data.classes), channels=data.images.shape[1])
    for name in ("n_classes", "channels"):
        if getattr(opt, name) not in (None, found[name]):
            wrong = f"{opt.dataset} has {found[name]}, not {getattr(opt, name)}"
            raise BadInput(f"argument --{name}: {wrong}: drop the flag")
    batches.check(opt.img_size)
    if ranks.device.type == "cuda" and ranks.world_size > 1 and opt.r1 and opt.d_norm == "batch":
        raise BadInput("argument --r1: on several GPUs batch norm has no second derivative: add --d_norm none")
    total_steps = min(opt.max_steps or math.inf, opt.n_epochs * len(batches))
    schedule_steps = before["schedule_steps"] if before else total_steps
    if opt.lr_schedule == "linear" and total_steps > schedule_steps:
        raise BadInput(f"argument --lr_schedule: the rate of this run is 0 after batch {schedule_steps:,}: add "
                       f"--max_steps {schedule_steps}, or start another run with --init_from")  # fmt: skip
    compile = choose_compile(opt, ranks.device, ranks.world_size, total_steps, len(data.labels))
    seed = opt.seed
    if seed is None:
        seed = ranks.broadcast(secrets.randbelow(2**32))  # the range that NumPy accepts
        announce(f"Seed: {seed}; --seed {seed} repeats this run.")
    return Plan(seed=seed, compile=compile, threads=torch.get_num_threads(), world_size=ranks.world_size,
                total_steps=total_steps, schedule_steps=schedule_steps, **found)  # fmt: skip
