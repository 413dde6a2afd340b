"""The two networks of the ACGAN, their initialisation, the EMA of G, and weight files.

Odena, Olah, Shlens: "Conditional Image Synthesis with Auxiliary Classifier GANs", 2016, arXiv:1610.09585.
Layers, sizes and parameter names are those of the tutorial (GAN Step By Step, Step 5).
"""

from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from convolutions import NarrowConv2d, UpsampleConv2d
from utils import BadInput, atomic_write, load_data


class Generator(nn.Module):
    """G(z | y): draws an image of class y from noise z (tutorial, "生成网络").

    `latent_dim` is the length of z and of the label embedding; `img_size` is the image side in pixels, a multiple of 4
    and at least 16. `conditioning` says how the two meet: "multiply", "concat", or "both": their product and the
    embedding. Raises ValueError for a value that cannot work. A weight file records all of them; one that lacks some
    was trained with those in TUTORIAL.
    """

    TUTORIAL = dict(conditioning="multiply", bn_eps=0.8)

    def __init__(self, n_classes: int = 10, latent_dim: int = 100, img_size: int = 32, channels: int = 1,
                 conditioning: str = "multiply", bn_eps: float = 0.8):  # fmt: skip
        super().__init__()
        check_sizes(n_classes=n_classes, latent_dim=latent_dim, img_size=img_size, channels=channels)
        check_choices(conditioning=(conditioning, ("multiply", "concat", "both")))
        self.config = dict(n_classes=n_classes, latent_dim=latent_dim, img_size=img_size, channels=channels,
                           conditioning=conditioning, bn_eps=bn_eps)  # fmt: skip
        self.classes = [str(label) for label in range(n_classes)]  # the data set's names replace these

        self.label_emb = nn.Embedding(n_classes, latent_dim)
        self.init_size = img_size // 4  # side of the first feature map; two upsamplings follow
        self.conditioning = conditioning
        n_inputs = latent_dim if conditioning == "multiply" else 2 * latent_dim
        self.l1 = nn.Sequential(nn.Linear(n_inputs, 128 * self.init_size**2))

        # BatchNorm2d(n, 0.8) sets eps, where momentum was meant: a quirk of the tutorial, kept.
        self.conv_blocks = nn.Sequential(  #            (B, 128, s/4, s/4), s = img_size
            nn.BatchNorm2d(128),
            nn.Identity(),  # the tutorial's Upsample, part of the next layer; keeps the parameters' names
            UpsampleConv2d(128, 128),  #                (B, 128, s/2, s/2)
            nn.BatchNorm2d(128, bn_eps),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Identity(),  # likewise
            UpsampleConv2d(128, 64),  #                 (B, 64, s, s)
            nn.BatchNorm2d(64, bn_eps),
            nn.LeakyReLU(0.2, inplace=True),
            NarrowConv2d(64, channels),  #              (B, channels, s, s)
            nn.Tanh(),
        )

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Draw one image for each pair of noise and label.

        Args:
            noise: z ~ N(0, 1), float32 (B, latent_dim).
            labels: classes y, int64 (B,), in [0, n_classes).

        Returns:
            Images, float32 (B, channels, img_size, img_size), in [-1, 1].
        """
        return self.decode(self.label_emb(labels), noise)

    def decode(self, embedding: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draw images from embedded labels and noise, both float32 (B, latent_dim); returns what forward does."""
        gen_input = noise if self.conditioning == "concat" else torch.mul(embedding, noise)
        if self.conditioning != "multiply":
            gen_input = torch.cat([embedding, gen_input], 1)
        out = self.l1(gen_input)
        out = out.view(out.shape[0], 128, self.init_size, self.init_size)
        return self.conv_blocks(out)


class DeviationLinear(nn.Linear):
    """A linear layer that also takes each feature's standard deviation within a group of images.

    So D sees whether generated images are too much alike: minibatch deviation, arXiv:1710.10196, feature by feature. A
    group is GROUP images in a row; in a batch that is no multiple of it, all images.
    """

    GROUP = 4

    def __init__(self, in_features: int, out_features: int):
        super().__init__(2 * in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float (B, in_features) to (B, out_features)."""
        group = len(x) if len(x) % self.GROUP else self.GROUP
        deviation = torch.sqrt(x.view(-1, group, x.shape[1]).var(1, unbiased=False) + 1e-8)  # its slope at 0 is finite
        return super().forward(torch.cat([x, deviation.repeat_interleave(group, 0)], 1))


class Discriminator(nn.Module):
    """D(x): is the image real, and which class does it show? (tutorial, "判别网络").

    Sizes are those of Generator. `norm` is "batch" or "none", `dropout` the share of the channels in [0, 1). `outputs`
    are "probabilities", or the "logits" that they are made of. `class_head` "2k" has n_classes more outputs, for the
    classes of generated images. `width` multiplies the channels of each layer. With `deviation` the validity also
    depends on how much neighbours in the batch differ. Weight files record all, as those of Generator do.
    """

    TUTORIAL = dict(norm="batch", bn_eps=0.8, dropout=0.25, outputs="probabilities", class_head="aux", width=1,
                    deviation=False)  # fmt: skip

    def __init__(self, n_classes: int = 10, img_size: int = 32, channels: int = 1, norm: str = "batch",
                 bn_eps: float = 0.8, dropout: float = 0.25, outputs: str = "probabilities",
                 class_head: str = "aux", width: int = 1, deviation: bool = False):  # fmt: skip
        super().__init__()
        check_sizes(n_classes=n_classes, img_size=img_size, channels=channels, width=width)
        check_choices(norm=(norm, ("batch", "none")), outputs=(outputs, ("probabilities", "logits")),
                      class_head=(class_head, ("aux", "2k")))  # fmt: skip
        self.config = dict(n_classes=n_classes, img_size=img_size, channels=channels, norm=norm, bn_eps=bn_eps,
                           dropout=dropout, outputs=outputs, class_head=class_head, width=width,
                           deviation=deviation)  # fmt: skip
        self.classes = [str(label) for label in range(n_classes)]  # the data set's names replace these

        def discriminator_block(in_filters, out_filters, bn=True):
            """Halve the image: (B, in, s, s) to (B, out, ceil(s/2), ceil(s/2))."""
            block = [
                nn.Conv2d(in_filters, out_filters, 3, 2, 1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout2d(dropout),
            ]
            if bn and norm == "batch":
                block.append(nn.BatchNorm2d(out_filters, bn_eps))  # the tutorial's 0.8 is eps here too
            return block

        self.conv_blocks = nn.Sequential(  #                         (B, channels, s, s), s = img_size
            *discriminator_block(channels, 16 * width, bn=False),  # (B, 16 * width, s/2, s/2)
            *discriminator_block(16 * width, 32 * width),  #         (B, 32 * width, s/4, s/4)
            *discriminator_block(32 * width, 64 * width),  #         (B, 64 * width, s/8, s/8)
            *discriminator_block(64 * width, 128 * width),  #        (B, 128 * width, s/16, s/16)
        )

        # Each convolution rounds an odd side up, so 28 ends at 2; for multiples of 16 it is img_size / 16.
        ds_size = -(-img_size // 16)
        n_features = 128 * width * ds_size**2
        self.adv_layer = nn.Sequential((DeviationLinear if deviation else nn.Linear)(n_features, 1), nn.Sigmoid())
        n_labels = n_classes * (2 if class_head == "2k" else 1)
        self.aux_layer = nn.Sequential(nn.Linear(n_features, n_labels), nn.Softmax(dim=1))
        if outputs == "logits":
            self.adv_layer[1] = self.aux_layer[1] = nn.Identity()

    def forward(self, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge images, float32 (B, channels, img_size, img_size), in [-1, 1].

        Returns:
            validity: P(real), float32 (B, 1), in [0, 1];
            label: class probabilities, float32 (B, n_classes) or (B, 2 * n_classes), each row sums to 1;
            or both as logits, of any value.
        """
        out = self.conv_blocks(img).flatten(1)  # (B, n_features)
        validity = self.adv_layer(out)
        label = self.aux_layer(out)
        return validity, label

    def with_logit(self, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what forward does, but the logit of P(real), float32 (B, 1), whatever the outputs are."""
        out = self.conv_blocks(img).flatten(1)
        return self.adv_layer[0](out), self.aux_layer(out)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError, naming the size, unless the networks can be built with these sizes."""
    for name, value in sizes.items():
        if name == "img_size" and (value < 16 or value % 4):
            raise ValueError(f"img_size is {value}, but must be a multiple of 4 and at least 16, such as 28 or 32")
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")


def check_choices(**choices: tuple[str, tuple]) -> None:
    """Raise ValueError, naming the argument, unless each value is among its possible ones."""
    for name, (value, possible) in choices.items():
        if value not in possible:
            raise ValueError(f"{name} is {value!r}, but must be one of {possible}")


def weights_init_normal(module: nn.Module) -> None:
    """Re-initialise one layer in place, as DCGAN does; for `network.apply`.

    Convolution weights become N(0, 0.02), batch-norm weights N(1, 0.02) and their biases 0. Other layers stay.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.constant_(module.bias, 0.0)


@torch.no_grad()
def update_ema(ema: Generator, generator: Generator, decay: float, steps: int) -> None:
    """Move the EMA of G's weights and batch-norm statistics towards G as it is after `steps` batches.

    At a constant learning rate G's weights circle around a good place, and their average lies nearer to it:
    Yazici et al., "The Unusual Effectiveness of Averaging in GAN Training", arXiv:1806.04498.

    The average reaches back about 1 / (1 - decay) batches, at most a quarter of the run so far; a decay of 0 keeps it
    equal to G.
    """

    def floats(network):
        return [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]

    get_ema_multi_avg_fn(min(decay, steps / (steps + 4)))(floats(ema), floats(generator), None)


def save_network(path: Path, network: nn.Module, **more) -> None:
    """Write a weight file: the network's name, sizes, classes and state dict, and `more` plain data. Raises OSError."""
    packed = {
        "network": type(network).__name__,
        "config": dict(network.config),
        "classes": list(network.classes),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
    }
    atomic_write(path, lambda file: torch.save(packed | more, file))


def load_network(path, device="cpu", kinds=(Generator, Discriminator)) -> nn.Module:
    """Rebuild a network from a weight file: `G = load_network("acgan_gen.pth")`.

    The file is read as data (`weights_only=True`), never run as code. The network is in train mode, in which the
    tutorial draws its samples; call `.eval()` to use the running statistics.

    Raises BadInput if the file cannot be read, is corrupt, or holds no network of these kinds.
    """
    names = {kind.__name__: kind for kind in kinds}
    try:
        packed = load_data(path)
        if packed["config"]["n_classes"] > 10**6:
            raise ValueError("a list of so many names does not fit into memory")
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are then replaced
            kind = names[packed["network"]]
            network = kind(**(getattr(kind, "TUTORIAL", {}) | packed["config"]))
        network.load_state_dict(packed["state_dict"])
        for name, tensor in network.state_dict().items():
            if not torch.isfinite(tensor).all() or (name.endswith("running_var") and tensor.min() < 0):
                raise ValueError("a number in it is not finite, or a variance is negative")
        network.classes = [str(name) for name in packed.get("classes", network.classes)]
        if len(network.classes) != network.config["n_classes"]:
            raise ValueError("each class needs a name")
    except OSError as error:
        raise BadInput(
            f"cannot read {str(path)!r} ({error.strerror or error}): name a weight file or a run's folder"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        kinds = " or ".join(names)
        raise BadInput(f"{str(path)!r} is corrupt, or is not a {kinds} of this project: name another file") from error
    return network.to(device)
