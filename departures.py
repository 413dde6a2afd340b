"""Every departure from the tutorial: flags, recipes, variants of both networks, losses, and a step of its own.

Every default is the tutorial's way, and then its own networks and step are used. `--recipe NAME` sets other defaults; a
single flag given beside it wins.
"""

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import models
from utils import COUNT, BadInput, Diverged, announce, number, on_terminal

RECIPES = {
    "faithful": {},
    "best": dict(  # what each brings, by the rows behind docs/quirks.md and docs/search.md
        class_loss="logits",  # alone no difference that three seeds show
        class_head="2k",  # alone: agreement and CAS up by 5 and 3 points
        bn_eps=1e-5,  # alone: coverage up by 0.2
        d_norm="none", d_dropout=0.0,  # R1 steadies D instead; to leave out dropout alone harms
        conditioning="both",  # agreement from 95 to 99 %, FID to a third; its cost in CAS the next one repays
        d_deviation="class",  # CAS from 95.6 to 97.3 %, coverage from 0.76 to 0.82
        d_steps=4,  # coverage from 0.73 to 0.85 after 800 batches
        r1=0.05, r1_on="whole",  # FID from 0.029 to 0.025, and long runs grow better, not worse
        r1_end=0.1,  # agreement up by 0.2 points, coverage by 0.008
        lr=0.004, lr_schedule="linear",  # coverage from 0.34 at 0.001 to 0.72 at 0.003
        lr_fall=1.0,  # with the fourth D step: CAS up by 0.3 points
        b1=0.0, b2=0.99, ema=0.999,  # usual beside R1; never varied alone
    ),
}  # fmt: skip
FLAGS = ("recipe", "class_loss", "bn_eps", "conditioning", "fake_class_loss", "class_head", "d_norm", "d_dropout",
         "d_deviation", "d_steps", "r1", "r1_on", "r1_end", "pretrain_class_head", "lr_schedule",
         "lr_fall")  # fmt: skip
TUTORIAL = {  # what a network of the tutorial has for each option of its variants below
    "Generator": dict(conditioning="multiply", bn_eps=0.8),
    "Discriminator": dict(norm="batch", bn_eps=0.8, dropout=0.25, outputs="probabilities", class_head="aux",
                          deviation=False),
}  # fmt: skip
R1_EVERY = 4  # batches; the penalty is multiplied by as much
GROUP = 4  # images in a row, for D's deviation


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each of FLAGS."""
    above_0 = number(float, "a number above 0, such as 0.00001", lambda value: value > 0)
    share = number(float, "a number in [0, 1), such as 0.25", lambda value: 0 <= value < 1)
    gamma = number(float, "a number of 0 or more, such as 0.2", lambda value: value >= 0)
    part = number(float, "a number in [0, 1], such as 0.1", lambda value: 0 <= value <= 1)
    last = number(float, "a number in (0, 1], such as 0.5", lambda value: 0 < value <= 1)
    epochs = number(int, "a whole number of 0 or more", lambda value: 0 <= value < 2**31)
    best = ", ".join(f"--{name} {value}" for name, value in RECIPES["best"].items())
    # fmt: off
    add = parser.add_argument_group("departures from the tutorial").add_argument
    add("--recipe", choices=list(RECIPES), default="faithful", help="best: far better digits after 1,000 batches; it "
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
    add("--d_deviation", choices=["off", "class"], default="off",
        help=f"class: D's validity also takes each feature's deviation within groups of {GROUP} images; each batch is "
        "sorted by class before, so that most groups are of one")
    add("--d_steps", type=COUNT, default=1, metavar="K", help="updates of D for one of G: a batch then has K times "
        "--batch_size real images, a share for each update, and --batch_size generated ones, the same for all; so an "
        "epoch has fewer batches")
    add("--r1", type=gamma, default=0.0, metavar="GAMMA", help="R1 penalty on D's gradient at real images, in one "
        f"batch of {R1_EVERY} and times {R1_EVERY}; 0: none")
    add("--r1_on", choices=["validity", "whole"], default="validity", help="what --r1 penalises: the slope of D's "
        "validity; or, with --class_head 2k, of all that G climbs: validity + log C[y] - log C[y + K]")
    add("--r1_end", type=part, default=1.0, metavar="X", help="what is left of --r1 at the end, if it falls with "
        "the rate (--lr_schedule linear), in [0, 1]; 1: it stays")
    add("--pretrain_class_head", type=epochs, default=0, metavar="N",
        help="epochs in which D's class head first learns the real images alone")
    add("--lr_schedule", choices=["constant", "linear"], default="constant",
        help="linear: --lr falls to 0 over the last --lr_fall of the run")
    add("--lr_fall", type=last, default=0.5, metavar="X", help="part of the run, at its end, over "
        "which --lr_schedule linear lets the rate fall, in (0, 1]")
    # fmt: on


def apply_recipe(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Let the recipe named in `argv` set the parser's defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?", default="faithful")
    parser.set_defaults(**RECIPES.get(first.parse_known_args(argv)[0].recipe, {}))


def check(opt: argparse.Namespace) -> None:
    """Raise BadInput for switches that contradict each other."""
    if opt.class_head == "2k" and opt.fake_class_loss == "off":
        raise BadInput("argument --fake_class_loss: off leaves half of --class_head 2k untrained: drop one of the two")
    falls = opt.lr_schedule == "linear"

    def typed(name: str, idle) -> bool:  # what a recipe sets gives way to flags beside it
        return getattr(opt, name) not in (idle, RECIPES[opt.recipe].get(name))

    if typed("r1_on", "validity") and not penalises_whole(opt):
        raise BadInput("argument --r1_on: whole needs --r1 above 0 and --class_head 2k: add both, or drop it")
    if typed("lr_fall", 0.5) and not falls:
        raise BadInput("argument --lr_fall: it needs --lr_schedule linear: add it, or drop both")
    if typed("r1_end", 1.0) and not (opt.r1 > 0 and falls):
        raise BadInput("argument --r1_end: it needs --r1 above 0 and --lr_schedule linear: add both, or drop it")


def penalises_whole(opt: argparse.Namespace) -> bool:
    """Say whether R1 is on all that G climbs."""
    return opt.r1_on == "whole" and opt.r1 > 0 and opt.class_head == "2k"


# ---------
#  Networks
# ---------


class Generator(models.Generator):
    """The tutorial's G with another eps, or another way for the label embedding to meet the noise.

    `conditioning` is "multiply", "concat", or "both": their product and the embedding. Raises ValueError.
    """

    def __init__(self, n_classes: int = 10, latent_dim: int = 100, img_size: int = 32, channels: int = 1,
                 conditioning: str = "multiply", bn_eps: float = 0.8):  # fmt: skip
        nn.Module.__init__(self)  # not the tutorial's layers: each is drawn in its own place
        sizes = dict(n_classes=n_classes, latent_dim=latent_dim, img_size=img_size, channels=channels)
        models.check_sizes(**sizes)
        check_choice("conditioning", conditioning, ("multiply", "concat", "both"))
        self.config = sizes | dict(conditioning=conditioning, bn_eps=bn_eps)
        self.conditioning = conditioning

        self.label_emb = nn.Embedding(n_classes, latent_dim)
        self.init_size = img_size // 4
        n_inputs = latent_dim if conditioning == "multiply" else 2 * latent_dim
        self.l1 = nn.Sequential(nn.Linear(n_inputs, 128 * self.init_size**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, stride=1, padding=1),
            nn.BatchNorm2d(128, bn_eps),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, stride=1, padding=1),
            nn.BatchNorm2d(64, bn_eps),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def decode(self, embedding: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draw images from embedded labels and noise, both float32 (B, latent_dim)."""
        gen_input = noise if self.conditioning == "concat" else torch.mul(embedding, noise)
        if self.conditioning != "multiply":
            gen_input = torch.cat([embedding, gen_input], 1)
        out = self.l1(gen_input)
        return self.conv_blocks(out.view(out.shape[0], 128, self.init_size, self.init_size))


class Discriminator(models.Discriminator):
    """The tutorial's D with other layers.

    `norm` is "batch" or "none", `dropout` the share of the channels in [0, 1). `outputs` are "probabilities", or the
    "logits" that they are made of: both of any value. `class_head` "2k" has n_classes more outputs, for the classes of
    generated images. With `deviation` the validity also depends on how much neighbours in the batch differ. Raises
    ValueError.
    """

    def __init__(self, n_classes: int = 10, img_size: int = 32, channels: int = 1, norm: str = "batch",
                 bn_eps: float = 0.8, dropout: float = 0.25, outputs: str = "probabilities",
                 class_head: str = "aux", deviation: bool = False):  # fmt: skip
        nn.Module.__init__(self)
        sizes = dict(n_classes=n_classes, img_size=img_size, channels=channels)
        models.check_sizes(**sizes)
        check_choice("norm", norm, ("batch", "none"))
        check_choice("outputs", outputs, ("probabilities", "logits"))
        check_choice("class_head", class_head, ("aux", "2k"))
        self.config = sizes | dict(norm=norm, bn_eps=bn_eps, dropout=dropout, outputs=outputs, class_head=class_head,
                                   deviation=deviation)  # fmt: skip

        def discriminator_block(in_filters, out_filters, bn=True):
            conv = nn.Conv2d(in_filters, out_filters, 3, 2, 1)
            block = [conv, nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(dropout)]
            if bn and norm == "batch":
                block.append(nn.BatchNorm2d(out_filters, bn_eps))
            return block

        self.conv_blocks = nn.Sequential(
            *discriminator_block(channels, 16, bn=False),
            *discriminator_block(16, 32),
            *discriminator_block(32, 64),
            *discriminator_block(64, 128),
        )
        n_features = 128 * (-(-img_size // 16)) ** 2
        self.adv_layer = nn.Sequential((DeviationLinear if deviation else nn.Linear)(n_features, 1), nn.Sigmoid())
        n_labels = n_classes * (2 if class_head == "2k" else 1)
        self.aux_layer = nn.Sequential(nn.Linear(n_features, n_labels), nn.Softmax(dim=1))
        if outputs == "logits":
            self.adv_layer[1] = self.aux_layer[1] = nn.Identity()


class DeviationLinear(nn.Linear):
    """A linear layer that also takes each feature's standard deviation within a group of images.

    So D sees whether generated images are too much alike: minibatch deviation, arXiv:1710.10196, feature by feature. A
    group is GROUP images in a row; in a batch that is no multiple of it, all images.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(2 * in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float (B, in_features) to (B, out_features)."""
        group = len(x) if len(x) % GROUP else GROUP
        deviation = torch.sqrt(x.view(-1, group, x.shape[1]).var(1, unbiased=False) + 1e-8)  # its slope at 0 is finite
        return super().forward(torch.cat([x, deviation.repeat_interleave(group, 0)], 1))


def check_choice(name: str, value: str, possible: tuple[str, ...]) -> None:
    """Raise ValueError, naming the argument, unless the value is among the possible ones."""
    if value not in possible:
        raise ValueError(f"{name} is {value!r}, but must be one of {possible}")


def configs(opt: argparse.Namespace, n_classes: int, channels: int) -> dict[str, dict]:
    """Return what `build` takes for G and D as the options ask for, by their names."""
    sizes = dict(n_classes=n_classes, img_size=opt.img_size, channels=channels)
    g_options = dict(conditioning=opt.conditioning, bn_eps=opt.bn_eps)
    d_options = dict(norm=opt.d_norm, bn_eps=opt.bn_eps, dropout=opt.d_dropout,
                     outputs="logits" if opt.class_loss == "logits" else "probabilities", class_head=opt.class_head,
                     deviation=opt.d_deviation != "off")  # fmt: skip
    return {"Generator": sizes | dict(latent_dim=opt.latent_dim) | g_options, "Discriminator": sizes | d_options}


def networks(opt: argparse.Namespace, n_classes: int, channels: int):
    """Return G and D, drawn in this order, as the options ask for; None if both are the tutorial's."""
    wanted = configs(opt, n_classes, channels)
    if all(wanted[name].items() >= TUTORIAL[name].items() for name in wanted):
        return None
    return build("Generator", **wanted["Generator"]), build("Discriminator", **wanted["Discriminator"])


def build(network: str, **config) -> nn.Module:
    """Build a "Generator" or "Discriminator" from a weight file's `config`: the tutorial's class if nothing departs.

    What `config` lacks is as in the tutorial. Raises ValueError, TypeError, KeyError or BadInput for what cannot be
    built.
    """
    if config.pop("width", 1) != 1:  # --d_width of earlier versions
        raise BadInput("a D of another width is no longer known: commit 2d0af8b is the last that reads it")
    departing = TUTORIAL[network] | config
    if departing.items() >= TUTORIAL[network].items():
        return getattr(models, network)(**{name: config[name] for name in config if name not in TUTORIAL[network]})
    return {"Generator": Generator, "Discriminator": Discriminator}[network](**departing)


# -------
#  A step
# -------


def step(opt: argparse.Namespace, schedule_steps: int):
    """Return what takes the place of acgan.train_step, in a run of `schedule_steps` batches; None if nothing does."""
    new = Step(logits=opt.class_loss == "logits", fake_class_loss=opt.fake_class_loss == "on",
               twin_head=opt.class_head == "2k", d_steps=opt.d_steps, r1=opt.r1,
               whole_r1=penalises_whole(opt))  # fmt: skip
    if opt.lr_schedule == "linear":
        new.falling_from, new.schedule_steps, new.lr_fall, new.r1_end = opt.lr, schedule_steps, opt.lr_fall, opt.r1_end
    return None if new == Step() else new


@dataclass
class Step:
    """An update that departs from the tutorial's. As it stands, it does what acgan.train_step does, bit for bit.

    logits: D returns logits, and the losses take them: without the tutorial's second softmax.
    fake_class_loss: D learns classes from generated images, too.
    twin_head: D's class head has an output for each class of real images, and K more for those of generated ones
        (the discriminative classifier of ADC-GAN, arXiv:2107.10060).
    d_steps: D is updated so many times for one update of G, each time on its share of the real images, and always on
        the same generated ones: D has under a hundredth of G's multiplications.
    r1: gamma of the penalty on D's gradient at real images (arXiv:1801.04406); 0 for none.
    whole_r1: it is on the gradient of all that G climbs, the class term too, not of the validity alone. The twin head
        tells real from generated by itself: left free, it grows steep, and G draws typical images only.
    falling_from: Adam's rate, if it falls to 0 over the last `lr_fall` of `schedule_steps` batches.
    r1_end: what is left of gamma then, as it falls with the rate (R3GAN, arXiv:2501.05441); 1 if it stays.

    Below, `pred_label` is D's second output, float32 (B, K), or (B, 2K) with the twin head; `labels` are the classes
    that the images have or should have, int64 (B,), of K classes. Each loss is a 0-d mean over the batch.
    """

    logits: bool = False
    fake_class_loss: bool = True
    twin_head: bool = False
    d_steps: int = 1
    r1: float = 0.0
    whole_r1: bool = False
    falling_from: float | None = None
    schedule_steps: int = 0
    lr_fall: float = 0.5
    r1_end: float = 1.0
    penalised = False  # whether the batch at hand has the penalty: no field, as it changes

    def prepare(self, step: int, *optimizers: torch.optim.Optimizer) -> bool:
        """Set the rate of batch `step`, and decide whether it has the penalty, which is returned.

        A rate that a CUDA graph reads is a tensor, which keeps its place in memory.
        """
        self.penalised = self.r1 > 0 and step % R1_EVERY == 0
        if self.falling_from is not None:
            rate = self.falling_from * min(1.0, (1 - step / self.schedule_steps) / self.lr_fall)
            for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = torch.tensor(rate, device=group["params"][0].device) if group["capturable"] else rate
        return self.penalised

    def __call__(self, generator, discriminator, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels) -> dict:
        """Update D `d_steps` times, then G once, on one batch; see acgan.train_step, whose losses these replace."""
        gen_imgs = generator(z, gen_labels)
        fake = torch.zeros(len(gen_labels), 1, device=labels.device)

        for first in range(min(self.d_steps, len(labels))):
            share, classes = real_imgs[first :: self.d_steps], labels[first :: self.d_steps]
            optimizer_D.zero_grad()
            real_pred, real_aux = discriminator(share)
            d_real_adv = self.adversarial(real_pred, torch.ones(len(share), 1, device=share.device))
            d_real_aux = F.cross_entropy(real_aux, classes)
            d_real_loss = (d_real_adv + d_real_aux) / 2
            fake_pred, fake_aux = discriminator(gen_imgs.detach())
            d_fake_adv, d_fake_aux = self.adversarial(fake_pred, fake), self.fake_class(fake_aux, gen_labels)
            d_fake_loss = (d_fake_adv + d_fake_aux) / 2
            d_loss = (d_real_loss + d_fake_loss) / 2
            d_penalty = self.penalty(discriminator, share, classes, self.gamma(optimizer_D)) if self.penalised else None
            (d_loss if d_penalty is None else d_loss + d_penalty).backward()
            optimizer_D.step()

        optimizer_G.zero_grad()
        discriminator.requires_grad_(False)
        validity, pred_label = discriminator(gen_imgs)
        valid = torch.ones(len(gen_labels), 1, device=labels.device)
        g_adv, g_aux = self.adversarial(validity, valid), self.generator_class(pred_label, gen_labels)
        g_loss = (g_adv + g_aux) / 2
        g_loss.backward()
        optimizer_G.step()
        discriminator.requires_grad_(True)

        d_acc_real = (self.recognised(real_aux) == classes).float().mean()
        d_acc_fake = (self.recognised(fake_aux) == gen_labels).float().mean()
        metrics = dict(
            d_loss=d_loss, d_real_adv=d_real_adv, d_real_aux=d_real_aux, d_fake_adv=d_fake_adv, d_fake_aux=d_fake_aux,
            g_loss=g_loss, g_adv=g_adv, g_aux=g_aux,
            d_acc=(d_acc_real + d_acc_fake) / 2, d_acc_real=d_acc_real, d_acc_fake=d_acc_fake,
            **({} if d_penalty is None else {"d_penalty": d_penalty}),
        )  # fmt: skip
        return {name: value.detach() for name, value in metrics.items()}

    def adversarial(self, validity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of D's first output, (B, 1)."""
        return (F.binary_cross_entropy_with_logits if self.logits else F.binary_cross_entropy)(validity, target)

    def fake_class(self, pred_label: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """D's class loss on generated images: - log C[y], or - log C[y + K] with the twin head.

        C is the softmax of D's second output, which in the tutorial is a softmax already.
        """
        if not self.fake_class_loss:
            return pred_label.new_zeros(())
        return F.cross_entropy(pred_label, labels + self.n_classes(pred_label) * self.twin_head)

    def generator_class(self, pred_label: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """G's class loss: - log C[y], or - (log C[y] - log C[y + K]) with the twin head."""
        loss = F.cross_entropy(pred_label, labels)
        return loss - F.cross_entropy(pred_label, labels + self.n_classes(pred_label)) if self.twin_head else loss

    def recognised(self, pred_label: torch.Tensor) -> torch.Tensor:
        """The class that D sees in each image, int64 (B,), be it real or generated."""
        return pred_label.argmax(1) % self.n_classes(pred_label)

    def n_classes(self, pred_label: torch.Tensor) -> int:
        """K, the number of classes, by the width of D's second output."""
        return pred_label.shape[1] // (1 + self.twin_head)

    def gamma(self, optimizer_D: torch.optim.Optimizer):
        """Gamma at the optimizer's rate: a number, or a tensor if the rate is one."""
        if self.r1_end == 1:
            return self.r1
        return self.r1 * (self.r1_end + (1 - self.r1_end) * optimizer_D.param_groups[0]["lr"] / self.falling_from)

    def penalty(self, discriminator: nn.Module, real_imgs: torch.Tensor, labels: torch.Tensor, gamma) -> torch.Tensor:
        """R1: gamma / 2 * E |grad_x D(x, y)|^2 at real images of the class y, for one batch in R1_EVERY.

        D(x, y) is the logit of its validity, with `whole_r1` plus log C[y] - log C[y + K].
        """
        while hasattr(discriminator, "module"):  # wrapped for several ranks, or in bfloat16
            discriminator = discriminator.module
        real_imgs = real_imgs.detach().requires_grad_()
        validity, pred_label = with_logit(discriminator, real_imgs)
        logits = validity.sum()
        if self.whole_r1:
            logits = logits - len(labels) * self.generator_class(pred_label, labels)
        (gradient,) = torch.autograd.grad(logits, real_imgs, create_graph=True)
        return gamma / 2 * R1_EVERY * gradient.square().sum((1, 2, 3)).mean()


def with_logit(discriminator: nn.Module, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D's outputs, but its validity as a logit, float32 (B, 1), even where D's own is a probability."""
    out = discriminator.conv_blocks(img).flatten(1)
    return discriminator.adv_layer[0](out), discriminator.aux_layer(out)


def pretrain_class_head(opt: argparse.Namespace, discriminator: nn.Module, batches) -> None:
    """Train D's trunk and class head as a classifier of the real images, before the first batch of a new run.

    It is the tutorial's claim that a pretrained CNN speeds ACGAN up, which its script does not try. Raises Diverged.
    """
    epochs = opt.pretrain_class_head
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=opt.lr)
    recognised = Step(twin_head=opt.class_head == "2k").recognised
    bar = tqdm(total=epochs * len(batches), desc="Pretraining D's class head", leave=False, disable=not on_terminal())
    for _ in range(epochs):
        right, seen = 0, 0
        for indices in batches:
            real_imgs, labels = batches.gather(indices)
            validity, label = discriminator(real_imgs)
            loss = F.cross_entropy(label, labels) + 0 * validity.sum()  # several ranks need all gradients
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right, seen = right + (recognised(label) == labels).sum(), seen + len(labels)
            bar.update()
    bar.close()
    if not torch.isfinite(loss):
        raise Diverged("the class loss is no longer finite while D's class head is pretrained")
    announce(f"Pretrained D's class head: {int(right) / seen:.2%} of the classes were right in its last epoch.")
