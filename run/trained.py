"""Trained networks: of a weight file, of a checkpoint, or of a run's folder, of which the most trained is taken."""

import argparse
import contextlib
import os
from pathlib import Path

from torch import nn

import departures
from run.checkpoint import FORMAT, NEWEST, checked, has_checkpoint, read_checkpoint
from run.weights import BUNDLED_GENERATOR, GENERATOR, NETWORKS, WEIGHTS, batches_of, reading, rebuild
from utils import BadInput, announce, load_data

FILES = dict(zip(("generator", "discriminator", "ema"), WEIGHTS, strict=True))  # by their name in a checkpoint
BY_CLASS = ("label_emb.weight", "aux_layer.0.weight", "aux_layer.0.bias")  # a row a class; two with a twin head
SHOWN = 20  # names of classes


def add_weights_flag(parser) -> None:
    """Add --weights: what load_trained reads, of which an EMA is wanted."""
    parser.add_argument("--weights", type=Path, default=BUNDLED_GENERATOR, metavar="PATH",
                        help="a weight file; or a run's folder or checkpoint, for its latest EMA "
                             "(default: weights/best.pth)")  # fmt: skip


def load_trained(path: Path, part: str, device="cpu", networks: dict = GENERATOR) -> nn.Module:
    """Rebuild a network from a weight file, a checkpoint or the folder of a run, as run.weights.load_network does.

    `part` is the one that is wanted of a run: "generator", "discriminator" or "ema". A run that was killed has left a
    checkpoint alone, or one that is newer than the weights in its folder: then the network is the checkpoint's. The
    network's `file` is the path that was read, and its `origin` says so in words, with the batch. Raises BadInput.
    """
    note = ""
    if os.path.isdir(path):
        path, packed, note = further_trained(path, part, networks)
    else:
        with reading(path, networks):
            packed = load_data(path)
            packed = checked(packed, path) if "format" in packed else packed
    with reading(path, networks):
        network = rebuild(of_checkpoint(packed, part) if "format" in packed else packed, networks)
    network.file, network.origin = path, f"{path}{after(network.step)}{note}"
    return network.to(device)


def after(step: int | None) -> str:
    """Return after which batch something was written, in words, or nothing if that is not known."""
    return "" if step is None else f", after batch {step:,}"


def further_trained(folder: Path, part: str, networks: dict) -> tuple[Path, dict, str]:
    """Return which file of a run has `part` after more batches, what it holds, and a note if another is passed over.

    Weights that do not say their batch are those of the end, unless the checkpoint is of a run that has not ended.
    """
    file, checkpoint = folder / FILES[part], None
    with contextlib.suppress(BadInput):
        checkpoint = read_checkpoint(folder, quiet=True)
    if not os.path.exists(file):
        if checkpoint is None:
            raise BadInput(f"{str(folder)!r} has no {file.name}, and no checkpoint that can be read: "
                           "name a weight file or a run's folder")  # fmt: skip
        return checkpoint["file"], checkpoint, ""
    try:
        with reading(file, networks):
            packed = load_data(file)
            step = batches_of(packed)
    except BadInput:
        if checkpoint is None or checkpoint["format"] != FORMAT:
            raise
        return checkpoint["file"], checkpoint, f"; {file.name} cannot be read"
    if checkpoint is None:
        return file, packed, f"; {NEWEST} beside it cannot be read" if has_checkpoint(folder) else ""
    if checkpoint["finished"] if step is None else step >= checkpoint["step"]:
        return file, packed, ""
    if checkpoint["format"] != FORMAT:
        return file, packed, f"; {NEWEST} beside it is from an older version, and cannot be read"
    return checkpoint["file"], checkpoint, f"; passed over: {file.name}{after(step) or ', of an unknown batch'}"


def of_checkpoint(checkpoint: dict, part: str) -> dict:
    """Return what a weight file of one part of a checkpoint would hold. Raises BadInput for one of an older format."""
    if checkpoint["format"] != FORMAT:
        raise BadInput(f"{str(checkpoint['file'])!r} is from an older version of this script: "
                       "end the run with that version, which writes its weights")  # fmt: skip
    parser, plan = argparse.ArgumentParser(), checkpoint["plan"]
    departures.add_flags(parser)  # a switch that is younger than the checkpoint has its default
    opt = parser.parse_args([], argparse.Namespace(**checkpoint["options"]))
    network = "Discriminator" if part == "discriminator" else "Generator"
    config = departures.configs(opt, plan["n_classes"], plan["channels"])[network]
    return dict(network=network, config=config, classes=plan["classes"], state_dict=checkpoint["parts"][part],
                step=checkpoint["step"], white=plan.get("white", 0))  # fmt: skip


def start_from(path: Path, generator: nn.Module, discriminator: nn.Module, classes: list[str]) -> None:
    """Copy trained weights into networks that are about to be trained on `classes`: of a run, or of one weight file.

    Classes are matched by name or, where none is in common, by number. Layers of other sizes are named, and stay as
    they are. Raises BadInput for a file that cannot be read, or one whose network computes something else from the same
    weights.
    """
    for part, network in (("generator", generator), ("discriminator", discriminator)):
        kind = type(network).__name__
        source = load_trained(path, part, networks={kind: NETWORKS[kind]} if os.path.isdir(path) else NETWORKS)
        if type(source).__name__ != kind:
            continue
        ours, theirs = (departures.TUTORIAL[kind] | each.config for each in (network, source))
        for name in departures.TUTORIAL[kind]:
            if theirs[name] != ours[name]:
                raise BadInput(f"argument --init_from: the weights of {str(path)!r} are for {name} {theirs[name]}, not "
                               f"{ours[name]}: give this run the --recipe and the switches of that one")  # fmt: skip
        own, new = network.state_dict(), source.state_dict()
        new |= rows_by_name(own, new, classes, source.classes)
        fresh = [name for name in own if name not in new or new[name].shape != own[name].shape]
        network.load_state_dict({name: new[name] for name in own if name not in fresh}, strict=False)
        matched = "" if own.keys() & BY_CLASS <= set(fresh) else how_matched(classes, source.classes)
        kept = f"; new, as their sizes differ: {', '.join(fresh)}" if fresh else ""
        announce(f"{kind}: starts from {source.origin}{matched}{kept}.")


def rows_by_name(own: dict, new: dict, ours: list[str], theirs: list[str]) -> dict:
    """Return those layers of `own` that have a row a class, with the rows of `new` for the classes that both have.

    `own` and `new` are state dicts, for the classes `ours` and `theirs`. Other rows stay, and so do layers whose rows
    are of another length. Nothing is returned if no class is in common.
    """
    common = [name for name in ours if name in theirs]
    here, there = ([classes.index(name) for name in common] for classes in (ours, theirs))
    merged = {}
    for layer in own.keys() & BY_CLASS if common else ():
        rows = own[layer].unflatten(0, (-1, len(ours))).clone()  # (1, classes, ...), or 2 of a twin head
        given = new[layer].unflatten(0, (-1, len(theirs)))
        if rows.shape[2:] == given.shape[2:]:
            rows[:, here] = given[:, there]
            merged[layer] = rows.flatten(0, 1)
    return merged


def how_matched(ours: list[str], theirs: list[str]) -> str:
    """Return in words how classes are matched; nothing if they are the same."""
    if ours == theirs:
        return ""
    new = [name for name in ours if name not in theirs]
    if len(new) == len(ours):
        return "; classes by number, as no name is in common"
    text = f"; {len(ours) - len(new)} of {len(ours)} classes by name"
    return text + (f"; new: {', '.join(new[:SHOWN])}{', ...' if len(new) > SHOWN else ''}" if new else "")
