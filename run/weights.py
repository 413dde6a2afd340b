"""Weight files: written, read as data and rebuilt, also a bare state dict with the tutorial's names; and G's EMA."""

import contextlib
import math
import os
import pickletools
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import departures
from utils import BadInput, atomic_write, load_data

WEIGHTS = ("acgan_gen.pth", "acgan_dist.pth", "acgan_gen_ema.pth")  # of G, D and the EMA at the end of a run
BEST = ("acgan_gen_best.pth", "acgan_dist_best.pth")
BUNDLED_GENERATOR = Path(__file__).resolve().parent.parent / "weights" / "best.pth"
NETWORKS = {name: partial(departures.build, name) for name in ("Generator", "Discriminator")}
GENERATOR = {"Generator": NETWORKS["Generator"]}


def save_network(path: Path, network: nn.Module, classes: list[str], **more) -> None:
    """Write a weight file: the network's name, sizes, classes and state dict, and `more` plain data. Raises OSError.

    Those of a run have its batches done among it, as `step`.
    """
    packed = {
        "network": type(network).__name__,
        "config": dict(network.config),
        "classes": list(classes),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
    }
    atomic_write(path, lambda file: torch.save(packed | more, file))


def load_network(path, device="cpu", networks: dict = NETWORKS) -> nn.Module:
    """Rebuild a network from a weight file: `G = load_network("acgan_gen.pth")`.

    `G.classes` are its classes' names; `G.step` is after how many batches it was written, None if the file does not say
    so; `G.white` is that of data.LabelledImages. The file is read as data (`weights_only=True`), never run as code. The
    network is in train mode, in which the tutorial draws its samples; call `.eval()` to use the running statistics.
    `networks` are those that the file may hold: by name, what builds each from its sizes.

    Raises BadInput if the file cannot be read, is corrupt, or holds none of these networks.
    """
    with reading(path, networks):
        return rebuild(load_data(path), networks).to(device)


@contextlib.contextmanager
def reading(path, networks: dict):
    """Turn the errors of a block that reads one of `networks` from a file into BadInput."""
    try:
        yield
    except OSError as error:
        what = "a judge, of train_judge.py" if "Judge" in networks else "a weight file or a run's folder"
        raise BadInput(f"cannot read {str(path)!r} ({error.strerror or error}): name {what}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        if name := pickled_object(path):
            raise BadInput(f"{str(path)!r} holds whole pickled objects ({name!r}), and to load such can run code: "
                           "if you trust it, make a state dict of it as docs/fidelity.md says") from error  # fmt: skip
        names = " or ".join(networks)
        raise BadInput(f"{str(path)!r} is corrupt, or is not a {names} of this project: name another file") from error


def rebuild(packed: dict, networks: dict) -> nn.Module:
    """Rebuild a network from what a weight file holds. What is none raises one of the errors that `reading` knows."""
    packed = packed if "network" in packed else with_sizes(packed)
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are then replaced
        network = networks[packed["network"]](**packed["config"])
    network.load_state_dict(packed["state_dict"])
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all() or (name.endswith("running_var") and tensor.min() < 0):
            raise ValueError("a number in it is not finite, or a variance is negative")
    network.classes = [str(name) for name in packed.get("classes", range(network.config["n_classes"]))]
    if len(network.classes) != network.config["n_classes"]:
        raise ValueError("each class needs a name")
    network.step, network.white = batches_of(packed), int(packed.get("white", 0))
    return network


def batches_of(packed: dict) -> int | None:
    """Return after how many batches a weight file was written, or None if it does not say. Raises ValueError."""
    step = packed.get("step")
    if type(step) not in (int, type(None)):
        raise ValueError("its batches are no number")
    return step


def with_sizes(state: dict) -> dict:
    """Return what a weight file would hold, for a bare state dict of one of the tutorial's own networks.

    The tensors tell its sizes, but for D's img_size, which is taken as a multiple of 16. Its classes are numbers.
    """
    state = state.get("state_dict", state.get("model", state))
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}  # of nn.DataParallel
    if "label_emb.weight" in state:
        n_classes, latent_dim = state["label_emb.weight"].shape
        side = 4 * math.isqrt(len(state["l1.0.weight"]) // 128)
        sizes = dict(latent_dim=latent_dim, img_size=side, channels=len(state["conv_blocks.9.weight"]))
    else:
        n_classes = len(state["aux_layer.0.weight"])
        side = 16 * math.isqrt(state["adv_layer.0.weight"].shape[1] // 128)
        sizes = dict(img_size=side, channels=state["conv_blocks.0.weight"].shape[1])
    network = "Generator" if "latent_dim" in sizes else "Discriminator"
    return dict(network=network, config=dict(n_classes=n_classes, **sizes), state_dict=state)


def pickled_object(path) -> str | None:
    """Return the first object beside tensors that a pickle asks for, such as "__main__.Generator". Nothing is run."""
    if not os.path.isfile(path):  # a pipe may never end
        return None
    names, strings = [], []
    with contextlib.suppress(Exception), open(path, "rb") as file:  # whatever a file that is no pickle raises
        is_zip = zipfile.is_zipfile(file)
        file.seek(0)
        if is_zip:  # torch.save's
            archive = zipfile.ZipFile(file)
            file = archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        for _ in range(4):  # files from before PyTorch 1.6 begin with three others
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    names.append(".".join(argument.split(" ") if argument else strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    of_data = ("collections.", "torch.")
    return next((name for name in names if not name.startswith(of_data) or name.startswith("torch.nn.modules.")), None)


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
