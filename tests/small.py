"""acgan.py on the first few real digits, for tests that need a process of their own: DIGITS=60 small.py FLAGS...

Other variables of the environment, all optional:
PAUSE_AT=B      the process stops itself, as by Ctrl-Z, when B batches are done, so no test depends on a moment in time.
NOTES=DIR       DIR/RANK.jsonl gets each batch's indices, the sum of its noise, and a hash of all parameters after it.
KILL_AT="R B"   rank R kills itself when B batches are done, unless torchrun has restarted it.
SPOIL_AT="R B"  rank R gets images that are not numbers in the batch after B batches.
"""

import functools
import hashlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import acgan  # noqa: E402 (needs the path above)
import departures  # noqa: E402
from data import LabelledImages, builtin, load_dataset  # noqa: E402
from data.batches import Batches  # noqa: E402

KEPT = 1000  # digits


@functools.cache
def first_digits(img_size: int) -> LabelledImages:
    """The first KEPT training digits."""
    images, labels = (builtin.read_idx(builtin.BUNDLED / name, "") for name in builtin.IDX[:2])
    images = builtin.resize(images[:KEPT, ..., None], img_size)
    return LabelledImages(images, acgan.torch.tensor(labels[:KEPT]).long(), [str(digit) for digit in range(10)])


def few(n: int):
    """A stand-in for load_dataset that returns the first `n` digits for MNIST."""

    def load(name, data_root, img_size, *args, **kwargs):
        if name != "mnist":
            return load_dataset(name, data_root, img_size, *args, **kwargs)
        digits = first_digits(img_size)
        return digits._replace(images=digits.images[:n], labels=digits.labels[:n])

    return load


def watch() -> None:
    """Do in each batch what the environment asks for."""
    gather, seen, done = Batches.gather, [], itertools.count()
    rank, restarted = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def watched_gather(self, indices):
        seen.append(indices.tolist())
        return gather(self, indices)

    def watched(update):
        def watched_update(*inputs):
            *first, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels = inputs
            batches = next(done)
            if os.environ.get("PAUSE_AT") == str(batches):
                os.kill(os.getpid(), signal.SIGSTOP)
            if os.environ.get("KILL_AT") == f"{rank} {batches}" and not restarted:
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ.get("SPOIL_AT") == f"{rank} {batches}":
                real_imgs = real_imgs * float("nan")
            metrics = update(*first, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels)
            if "NOTES" in os.environ:
                digest = hashlib.sha256()
                for optimizer in (optimizer_G, optimizer_D):
                    for parameter in optimizer.param_groups[0]["params"]:
                        digest.update(parameter.detach().numpy().tobytes())
                note = {"indices": seen[-1], "z": z.sum().item(), "parameters": digest.hexdigest()}
                with open(Path(os.environ["NOTES"]) / f"{rank}.jsonl", "a") as file:
                    print(json.dumps(note), file=file)
            return metrics

        return watched_update

    acgan.train_step, Batches.gather = watched(acgan.train_step), watched_gather
    departures.Step.__call__ = watched(departures.Step.__call__)


if __name__ == "__main__":
    watch()
    acgan.EpochScorer.SCORED = 50
    acgan.load_dataset = few(int(os.environ["DIGITS"]))
    sys.exit(acgan.main())
