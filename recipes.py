"""The departures from the tutorial: their flags, named sets of them, and the networks and losses that options ask for.

training/departures.py has their mathematics. Every default is the tutorial's way. `--recipe NAME` sets other defaults;
a single flag given beside it wins.
"""

import argparse
from pathlib import Path

import torch

from cli import COUNT, number
from models import DeviationLinear, Discriminator, Generator, weights_init_normal
from training.departures import Objective, start_from
from utils import BadInput

# fmt: off
DEPARTURES = ("recipe", "class_loss", "bn_eps", "conditioning", "fake_class_loss", "class_head", "d_norm", "d_dropout",
              "d_width", "d_deviation", "r1", "r1_on", "pretrain_class_head", "lr_schedule")
RECIPES = {
    "faithful": {},
    "best": dict(class_loss="logits", bn_eps=1e-5, conditioning="both", class_head="2k", d_norm="none", d_dropout=0.0,
                 d_deviation="class", r1=0.05, r1_on="whole", lr_schedule="linear", lr=0.004, b1=0.0, b2=0.99,
                 ema=0.999),
}
# fmt: on


def add_departure_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each of DEPARTURES, and --init_from."""
    above_0 = number(float, "a number above 0, such as 0.00001", lambda value: value > 0)
    share = number(float, "a number in [0, 1), such as 0.25", lambda value: 0 <= value < 1)
    gamma = number(float, "a number of 0 or more, such as 0.2", lambda value: value >= 0)
    epochs = number(int, "a whole number of 0 or more", lambda value: 0 <= value < 2**31)
    best = ", ".join(f"--{name} {value}" for name, value in RECIPES["best"].items())
    # fmt: off
    add = parser.add_argument_group("departures from the tutorial").add_argument
    add("--recipe", choices=list(RECIPES), default="faithful", help="best: far better digits after 2,000 batches; it "
        f"sets {best}; a flag beside it wins")
    add("--class_loss", choices=["softmax_twice", "logits"], default="softmax_twice",
        help="logits: D returns logits, without the softmax before the cross-entropy")
    add("--bn_eps", type=above_0, default=0.8, metavar="X", help="eps of batch norm; PyTorch's own is 0.00001")
    add("--conditioning", choices=["multiply", "concat", "both"], default="multiply",
        help="how label embedding and noise meet; both: their product and the embedding")
    add("--fake_class_loss", choices=["on", "off"], default="on", help="whether D learns classes from generated images")
    add("--class_head", choices=["aux", "2k"], default="aux",
        help="2k: one output for each class of real images, and one for each of generated ones")
    add("--d_norm", choices=["batch", "none"], default="batch", help="batch norm in D")
    add("--d_dropout", type=share, default=0.25, metavar="P", help="share of D's channels that are dropped, in [0, 1)")
    add("--d_width", type=COUNT, default=1, metavar="N", help="multiplies the channels of each layer of D")
    add("--d_deviation", choices=["off", "on", "class"], default="off",
        help=f"on: D's validity also takes each feature's deviation within groups of {DeviationLinear.GROUP} images; "
        "class: each batch is sorted by class before, so that most groups are of one")
    add("--r1", type=gamma, default=0.0, metavar="GAMMA", help="R1 penalty on D's gradient at real images; 0: none")
    add("--r1_on", choices=["validity", "whole"], default="validity", help="what --r1 penalises: the slope of D's "
        "validity; or, with --class_head 2k, of all that G climbs: validity + log C[y] - log C[y + K]")
    add("--pretrain_class_head", type=epochs, default=0, metavar="N",
        help="epochs in which D's class head first learns the real images alone")
    add("--lr_schedule", choices=["constant", "linear"], default="constant",
        help="linear: --lr falls to 0 over the second half of the run")
    add("--init_from", type=Path, metavar="PATH", help="start G and D from the weights of a run's folder, or one of "
        "them from a file: to fine-tune on other images, say (default: random weights)")
    # fmt: on


def apply_recipe(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Let the recipe named in `argv` set the parser's defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?", default="faithful")
    parser.set_defaults(**RECIPES.get(first.parse_known_args(argv)[0].recipe, {}))


def check_departures(opt: argparse.Namespace) -> None:
    """Raise BadInput for switches that contradict each other, and for no weights to start from.

    A recipe's --r1_on gives way to a flag beside it that leaves it nothing to act on.
    """
    if opt.init_from and not opt.init_from.exists():
        raise BadInput(
            f"argument --init_from: there is no {str(opt.init_from)!r}: name a run's folder or a weight file"
        )
    if opt.class_head == "2k" and opt.fake_class_loss == "off":
        raise BadInput("argument --fake_class_loss: off leaves half of --class_head 2k untrained: drop one of the two")
    if opt.r1_on == "whole" and (not opt.r1 or opt.class_head != "2k"):
        if RECIPES[opt.recipe].get("r1_on") != "whole":
            raise BadInput("argument --r1_on: whole needs --r1 above 0 and --class_head 2k: add both, or drop it")
        opt.r1_on = "validity"


def build_networks(opt: argparse.Namespace, device: torch.device):
    """Return G, D and the inputs of their graphs, drawn in the tutorial's order, which fixes the random stream.

    Raises BadInput for weights that do not fit, and for a penalty that several GPUs cannot compute.
    """
    if device.type == "cuda" and opt.world_size > 1 and opt.r1 and opt.d_norm == "batch":
        raise BadInput("argument --r1: on several GPUs batch norm has no second derivative: add --d_norm none")
    outputs = "logits" if opt.class_loss == "logits" else "probabilities"
    generator = Generator(opt.n_classes, opt.latent_dim, opt.img_size, opt.channels, opt.conditioning, opt.bn_eps)
    discriminator = Discriminator(opt.n_classes, opt.img_size, opt.channels, opt.d_norm, opt.bn_eps, opt.d_dropout,
                                  outputs, opt.class_head, opt.d_width, opt.d_deviation != "off")  # fmt: skip
    generator.classes = discriminator.classes = opt.classes
    labels, z = torch.randint(opt.n_classes, (1,)), torch.randn(1, opt.latent_dim)  # labels first
    img = torch.randn(1, opt.channels, opt.img_size, opt.img_size)
    for network in (generator, discriminator):
        network.apply(weights_init_normal)
    if opt.init_from:
        start_from(opt.init_from, generator, discriminator)
    if device.type == "cpu":
        discriminator.to(memory_format=torch.channels_last)  # in which its convolutions are faster
    return generator.to(device), discriminator.to(device), (z.to(device), labels.to(device), img.to(device))


def build_objective(opt: argparse.Namespace) -> Objective:
    """Return the losses that the options ask for."""
    return Objective(logits=opt.class_loss == "logits", fake_class_loss=opt.fake_class_loss == "on",
                     twin_head=opt.class_head == "2k", r1=opt.r1, whole_r1=opt.r1_on == "whole")  # fmt: skip
