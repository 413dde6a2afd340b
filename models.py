"""The two networks of the ACGAN, as the tutorial prints them, and their initialisation. Needs PyTorch alone.

Odena, Olah, Shlens: "Conditional Image Synthesis with Auxiliary Classifier GANs", 2016, arXiv:1610.09585.
Layers, sizes and parameter names are those of the tutorial (GAN Step By Step, Step 5).
"""

import torch
from torch import nn


class Generator(nn.Module):
    """G(z | y): draws an image of class y from noise z (tutorial, "生成网络").

    `latent_dim` is the length of z and of the label embedding; `img_size` is the image side in pixels, a multiple of 4
    and at least 16. Raises ValueError for a size that cannot work.
    """

    def __init__(self, n_classes: int = 10, latent_dim: int = 100, img_size: int = 32, channels: int = 1):
        super().__init__()
        # what a weight file records beside the parameters
        self.config = dict(n_classes=n_classes, latent_dim=latent_dim, img_size=img_size, channels=channels)
        check_sizes(**self.config)

        self.label_emb = nn.Embedding(n_classes, latent_dim)
        self.init_size = img_size // 4  # side of the first feature map; two upsamplings follow
        self.l1 = nn.Sequential(nn.Linear(latent_dim, 128 * self.init_size**2))

        # BatchNorm2d(n, 0.8) sets eps, where momentum was meant: a quirk of the tutorial, kept.
        self.conv_blocks = nn.Sequential(  #                    (B, 128, s/4, s/4), s = img_size
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),  #                     (B, 128, s/2, s/2)
            nn.Conv2d(128, 128, 3, stride=1, padding=1),
            nn.BatchNorm2d(128, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),  #                     (B, 128, s, s)
            nn.Conv2d(128, 64, 3, stride=1, padding=1),  #      (B, 64, s, s)
            nn.BatchNorm2d(64, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, stride=1, padding=1),  # (B, channels, s, s)
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
        """Draw images from embedded labels and noise, both float32 (B, latent_dim); returns what forward does.

        It stands apart for embeddings between two classes, and as the part of G that is worth compiling.
        """
        gen_input = torch.mul(embedding, noise)
        out = self.l1(gen_input)
        out = out.view(out.shape[0], 128, self.init_size, self.init_size)
        img = self.conv_blocks(out)
        return img


class Discriminator(nn.Module):
    """D(x): is the image real, and which class does it show? (tutorial, "判别网络").

    Sizes are those of Generator. Raises ValueError for a size that cannot work.
    """

    def __init__(self, n_classes: int = 10, img_size: int = 32, channels: int = 1):
        super().__init__()
        self.config = dict(n_classes=n_classes, img_size=img_size, channels=channels)
        check_sizes(**self.config)

        def discriminator_block(in_filters, out_filters, bn=True):
            """Halve the image: (B, in, s, s) to (B, out, ceil(s/2), ceil(s/2))."""
            block = [nn.Conv2d(in_filters, out_filters, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(0.25)]
            if bn:
                block.append(nn.BatchNorm2d(out_filters, 0.8))  # eps here too
            return block

        self.conv_blocks = nn.Sequential(  #                 (B, channels, s, s), s = img_size
            *discriminator_block(channels, 16, bn=False),  # (B, 16, s/2, s/2)
            *discriminator_block(16, 32),  #                 (B, 32, s/4, s/4)
            *discriminator_block(32, 64),  #                 (B, 64, s/8, s/8)
            *discriminator_block(64, 128),  #                (B, 128, s/16, s/16)
        )

        ds_size = (img_size + 15) // 2**4  # rounded up, as each convolution rounds an odd side up: 28 ends at 2
        self.adv_layer = nn.Sequential(nn.Linear(128 * ds_size**2, 1), nn.Sigmoid())
        # The loss takes the softmax once more: another quirk, kept.
        self.aux_layer = nn.Sequential(nn.Linear(128 * ds_size**2, n_classes), nn.Softmax(dim=1))

    def forward(self, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge images, float32 (B, channels, img_size, img_size), in [-1, 1].

        Returns:
            validity: P(real), float32 (B, 1), in [0, 1];
            label: class probabilities, float32 (B, n_classes), each row sums to 1.
        """
        out = self.conv_blocks(img)
        out = out.flatten(1)  # (B, 128 * ds_size^2)
        validity = self.adv_layer(out)
        label = self.aux_layer(out)
        return validity, label


def check_sizes(**sizes: int) -> None:
    """Raise ValueError, naming the size, unless the networks can be built with these sizes."""
    for name, value in sizes.items():
        if name == "img_size" and (value < 16 or value % 4):
            raise ValueError(f"img_size is {value}, but must be a multiple of 4 and at least 16, such as 28 or 32")
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")


def weights_init_normal(module: nn.Module) -> None:
    """Re-initialise one layer in place, as DCGAN does; for `network.apply`.

    Convolution weights become N(0, 0.02), batch-norm weights N(1, 0.02) and their biases 0. Other layers stay.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.constant_(module.bias, 0.0)
