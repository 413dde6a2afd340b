"""What a run decides once, from its options, its images and its machine."""

import argparse
import math
import secrets
import zlib
from dataclasses import dataclass

import torch

from data import LabelledImages
from data.batches import Batches
from data.folder import Reading
from fast.compile import choose_compile
from run.ranks import Ranks
from utils import BadInput, announce


@dataclass
class Plan:
    """The decisions; the checkpoint keeps them. A resumed run has the same, but may end later or compile otherwise.

    compile: "on" or "off", which it also becomes if compiling fails. threads: PyTorch's, among which sums on a CPU are
    split. classes: their names, by label. labels_crc32, images_crc32: checksums. total_steps: the batch at which the
    run ends. schedule_steps: the batches that a falling rate is planned for. white: that of data.LabelledImages.
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
    white: int = 0
    images_crc32: int = 0


def how_to_read(opt: argparse.Namespace, before: dict | None) -> Reading:
    """Return how a folder's images are read: as the options say, and for a resumed run as `before`, in its plan."""
    skip_bad = opt.bad_images == "skip"
    if not before:
        return Reading(channels=opt.channels, skip_bad=skip_bad)
    return Reading(before["classes"], before["channels"], before.get("white", 0), skip_bad)


def make_plan(opt: argparse.Namespace, data: LabelledImages, batches: Batches, ranks: Ranks, checkpoint) -> Plan:
    """Decide all; of a `checkpoint` to resume, the plan is kept where it matters.

    Raises BadInput for options that do not fit the images, the machine or the checkpoint, and if no batch is left.
    """
    before = checkpoint["plan"] if checkpoint else None
    found = dict(classes=data.classes, n_images=len(data.labels))
    found["labels_crc32"] = zlib.crc32(data.labels.numpy().tobytes())
    if before and any(before[name] != value for name, value in found.items()):
        then, now = (f"{n:,} of {k} classes" for n, k in ((before["n_images"], len(before["classes"])),
                                                         (len(data.labels), len(data.classes))))  # fmt: skip
        only = sorted({*before["classes"]} ^ {*data.classes})
        hint = f"; {only[0]!r} is in one of them only" if only else "; with other labels" if then == now else ""
        raise BadInput(f"argument --resume: the checkpoint is from other images ({then}, here {now}{hint}): name its "
                       "own --data_root, put the images back, or start a new run with --init_from")  # fmt: skip
    images_crc32 = 0
    for chunk in data.images.split(1000):
        images_crc32 = zlib.crc32(chunk.contiguous().numpy(), images_crc32)
    if before and before.get("images_crc32", images_crc32) != images_crc32:
        announce("The images are not quite those of the checkpoint, or another version decoded them: the run resumes, "
                 "but not bit-exactly.")  # fmt: skip
    found |= dict(n_classes=len(data.classes), channels=data.images.shape[1])
    for name in ("n_classes", "channels"):
        if getattr(opt, name) not in (None, found[name]):
            wrong = f"{opt.dataset} has {found[name]}, not {getattr(opt, name)}"
            raise BadInput(f"argument --{name}: {wrong}: drop the flag")
    batches.check(opt.img_size, opt.d_norm)
    if ranks.device.type == "cuda" and ranks.world_size > 1 and opt.r1 and opt.d_norm == "batch":
        raise BadInput("argument --r1: on several GPUs batch norm has no second derivative: add --d_norm none")
    total_steps = min(opt.max_steps or math.inf, opt.n_epochs * len(batches))
    schedule_steps = before["schedule_steps"] if before else total_steps
    falls = opt.lr_schedule == "linear"
    longer = "max_steps" if total_steps > schedule_steps else ""
    if falls and not opt.max_steps:  # a resumed run ends where its rate is 0, unless more was typed
        longer = "n_epochs" if longer and opt.n_epochs > checkpoint["options"]["n_epochs"] else ""
        total_steps = min(total_steps, schedule_steps)
    if checkpoint and falls and checkpoint["step"] >= schedule_steps:
        raise BadInput(f"argument --resume: this run's rate fell to 0 by its end, batch {schedule_steps:,}: start a "
                       "longer one in another folder, from the beginning or with --init_from")  # fmt: skip
    if checkpoint and checkpoint["step"] >= total_steps:
        raise BadInput(f"argument --resume: {checkpoint['step']:,} batches are done: raise --n_epochs or --max_steps")
    if falls and longer:
        raise BadInput(f"argument --{longer}: this run's rate falls to 0 by batch {schedule_steps:,}: drop the flag, "
                       "or start a longer one with --init_from")  # fmt: skip
    if opt.eval_interval and opt.eval_interval * len(batches) > total_steps:
        due = f"--eval_interval {opt.eval_interval} is {opt.eval_interval * len(batches):,} batches"
        announce(f"No scores: {due}, and the run ends after {total_steps:,}.")
    has_full_batch = len(data.labels) >= batches.batch_size
    compile = choose_compile(opt, ranks.device, ranks.world_size, total_steps, has_full_batch)
    # the range that NumPy accepts
    seed = ranks.broadcast(secrets.randbelow(2**32)) if opt.seed is None else opt.seed
    return Plan(seed=seed, compile=compile, threads=torch.get_num_threads(), world_size=ranks.world_size,
                total_steps=total_steps, schedule_steps=schedule_steps, white=data.white, images_crc32=images_crc32,
                **found)  # fmt: skip
