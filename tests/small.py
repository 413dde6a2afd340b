"""acgan.py on the first few real digits, for tests that need a process of their own: DIGITS=60 small.py FLAGS...

Other variables of the environment, all optional:
PAUSE_AT=B      the process stops itself, as by Ctrl-Z, when B batches are done, so no test depends on a moment in time.
NOTES=DIR       DIR/RANK.jsonl gets each batch's indices, the sum of its noise, and a hash of all parameters after it.
KILL_AT="R B"   rank R kills itself when B batches are done, unless torchrun has restarted it. "R B, R B": and again,
                when B batches are done after the first restart, and so on.
SPOIL_AT="R B"  rank R gets images that are not numbers in the batch after B batches.
RANKS="N M"     N ranks, which torchrun's agent forks from this process, and restarts up to M times.
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
    return digits(builtin.IDX[:2], 0, KEPT, img_size)


def digits(files: list[str], first: int, last: int, img_size: int = 32) -> LabelledImages:
    """The digits from `first` to before `last` of a pair of files."""
    images, labels = (builtin.read_idx(builtin.BUNDLED / name, "")[first:last] for name in files)
    images = builtin.resize(images[..., None], img_size)
    return LabelledImages(images, acgan.torch.tensor(labels).long(), [str(digit) for digit in range(10)])


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
    rank, restarts = os.environ.get("RANK", "0"), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    kills = dict(enumerate(os.environ.get("KILL_AT", "").split(", ")))

    def watched_gather(self, indices):
        seen.append(indices.tolist())
        return gather(self, indices)

    def watched(update):
        def watched_update(*inputs):
            *first, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels = inputs
            batches = next(done)
            if os.environ.get("PAUSE_AT") == str(batches):
                os.kill(os.getpid(), signal.SIGSTOP)
            if kills.get(restarts) == f"{rank} {batches}":
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


def main() -> None:
    watch()
    acgan.EpochScorer.SCORED = 50
    acgan.load_dataset = few(int(os.environ["DIGITS"]))
    sys.exit(acgan.main())


def fork_ranks(ranks: int, max_restarts: int) -> None:
    """Do what torchrun does, without the seconds that each rank's imports take."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    acgan.check_tensorboard()  # its import, too
    nodes = dict(min_nodes=1, max_nodes=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test")
    config = LaunchConfig(**nodes, nproc_per_node=ranks, max_restarts=max_restarts, start_method="fork")
    elastic_launch(config, main)()


if __name__ == "__main__":
    fork_ranks(*map(int, os.environ["RANKS"].split())) if "RANKS" in os.environ else main()
