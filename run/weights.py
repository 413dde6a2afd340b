"""Weight files: written, read as data, found in a run's folder, copied into a new run; and the EMA of G's weights."""

import os
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import departures
from utils import BadInput, announce, atomic_write, load_data

WEIGHTS = ("acgan_gen.pth", "acgan_dist.pth", "acgan_gen_ema.pth")  # of G, D and the EMA at the end of a run
BEST = ("acgan_gen_best.pth", "acgan_dist_best.pth")
BUNDLED_GENERATOR = Path(__file__).resolve().parent.parent / "weights" / "best.pth"
NETWORKS = {name: partial(departures.build, name) for name in ("Generator", "Discriminator")}
GENERATOR = {"Generator": NETWORKS["Generator"]}


def save_network(path: Path, network: nn.Module, classes: list[str], **more) -> None:
    """Write a weight file: the network's name, sizes, classes and state dict, and `more` plain data. Raises OSError."""
    packed = {
        "network": type(network).__name__,
        "config": dict(network.config),
        "classes": list(classes),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
    }
    atomic_write(path, lambda file: torch.save(packed | more, file))


def load_network(path, device="cpu", networks: dict = NETWORKS) -> nn.Module:
    """Rebuild a network from a weight file: `G = load_network("acgan_gen.pth")`; `G.classes` are its classes' names,
    and `G.white` is that of data.LabelledImages.

    The file is read as data (`weights_only=True`), never run as code. The network is in train mode, in which the
    tutorial draws its samples; call `.eval()` to use the running statistics. `networks` are those that the file may
    hold: by name, what builds each from its sizes.

    Raises BadInput if the file cannot be read, is corrupt, or holds none of these networks.
    """
    try:
        packed = load_data(path)
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are then replaced
            network = networks[packed["network"]](**packed["config"])
        network.load_state_dict(packed["state_dict"])
        for name, tensor in network.state_dict().items():
            if not torch.isfinite(tensor).all() or (name.endswith("running_var") and tensor.min() < 0):
                raise ValueError("a number in it is not finite, or a variance is negative")
        network.classes = [str(name) for name in packed.get("classes", range(network.config["n_classes"]))]
        network.white = int(packed.get("white", 0))
        if len(network.classes) != network.config["n_classes"]:
            raise ValueError("each class needs a name")
    except OSError as error:
        raise BadInput(
            f"cannot read {str(path)!r} ({error.strerror or error}): name a weight file or a run's folder"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        names = " or ".join(networks)
        raise BadInput(f"{str(path)!r} is corrupt, or is not a {names} of this project: name another file") from error
    return network.to(device)


def add_weights_flag(parser) -> None:
    """Add --weights: a file, or the folder of a run, which stands for its EMA weights."""

    def find(text: str) -> Path:
        return Path(text) / WEIGHTS[2] if os.path.isdir(text) else Path(text)

    parser.add_argument("--weights", type=find, default=BUNDLED_GENERATOR, metavar="PATH",
                        help="a weight file, or a run's folder, for its EMA (default: weights/best.pth)")  # fmt: skip


def start_from(path: Path, generator: nn.Module, discriminator: nn.Module) -> None:
    """Copy the weights of an earlier run's folder, or of one weight file, into networks that are about to be trained.

    Layers of other sizes are named, and stay as they are. Raises BadInput for a file that cannot be read, or one whose
    network computes something else from the same weights.
    """
    for network, file in zip((generator, discriminator), WEIGHTS, strict=False):
        kind = type(network).__name__
        if os.path.isdir(path):
            source = load_network(path / file, networks={kind: NETWORKS[kind]})
        elif type(source := load_network(path)).__name__ != kind:
            continue
        ours, theirs = (departures.TUTORIAL[kind] | each.config for each in (network, source))
        for name in departures.TUTORIAL[kind]:
            if theirs[name] != ours[name]:
                raise BadInput(f"argument --init_from: the weights of {str(path)!r} are for {name} {theirs[name]}, not "
                               f"{ours[name]}: give this run the --recipe and the switches of that one")  # fmt: skip
        own, new = network.state_dict(), source.state_dict()
        fresh = [name for name in own if name not in new or new[name].shape != own[name].shape]
        network.load_state_dict({name: new[name] for name in own if name not in fresh}, strict=False)
        kept = f"; new, as their sizes differ: {', '.join(fresh)}" if fresh else ""
        announce(f"{kind}: starts from {path}{kept}.")


@torch.no_grad()
def update_ema(ema: nn.Module, generator: nn.Module, decay: float, steps: int) -> None:
    """Move the EMA of G's weights and batch-norm statistics towards G as it is after `steps` batches.

    At a constant learning rate G's weights circle around a good place, and their average lies nearer to it:
    Yazici et al., "The Unusual Effectiveness of Averaging in GAN Training", arXiv:1806.04498.

    The average reaches back about 1 / (1 - decay) batches, at most a quarter of the run so far; a decay of 0 keeps it
    equal to G.
    """

    def floats(network):
        return [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]

    get_ema_multi_avg_fn(min(decay, steps / (steps + 4)))(floats(ema), floats(generator), None)
