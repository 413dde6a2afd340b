"""Draw with G: the noise and labels of the training, the tutorial's sample grid, and images in eval mode."""

import numpy as np
import torch

from models import Generator

CHUNK = 500  # images drawn at a time
GRID_CLASSES = 20  # columns of a sample grid, at most


def draw_noise(n: int, latent_dim: int, device: torch.device) -> torch.Tensor:
    """Draw z ~ N(0, 1), float32 (n, latent_dim): on the CPU from NumPy's stream, as the tutorial does."""
    if device.type == "cpu":
        return torch.from_numpy(np.random.normal(0, 1, (n, latent_dim))).float()
    return torch.randn(n, latent_dim, device=device)


def draw_labels(n: int, n_classes: int, device: torch.device) -> torch.Tensor:
    """Draw classes, uniform in [0, n_classes), int64 (n,), from the same stream as the noise."""
    if device.type == "cpu":
        return torch.from_numpy(np.random.randint(0, n_classes, n)).long()
    return torch.randint(n_classes, (n,), device=device)


def draw_graph_inputs(n_classes: int, latent_dim: int, img_size: int, channels: int) -> tuple[torch.Tensor, ...]:
    """Draw z, a label and an image as the tutorial does for its TensorBoard graphs: the label first, then z."""
    label, z = torch.randint(n_classes, (1,)), torch.randn(1, latent_dim)
    return z, label, torch.randn(1, channels, img_size, img_size)


@torch.no_grad()
def sample_image(generator, n_classes: int, latent_dim: int, device) -> torch.Tensor:
    """Draw 10 rows of every class, or of the first GRID_CLASSES: float32 (10 * columns, C, H, W) in [-1, 1].

    G stays in train mode, so drawing uses the batch's statistics and moves the running ones: a quirk, kept.
    """
    columns = min(n_classes, GRID_CLASSES)
    z = draw_noise(10 * columns, latent_dim, device)
    labels = torch.arange(columns, device=device).repeat(10)
    return generator(z, labels)


def fixed_noise(n_classes: int, latent_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z and labels of a grid like sample_image's: equal in every run, and no draw of the training."""
    columns = min(n_classes, GRID_CLASSES)
    z = torch.randn(10 * columns, latent_dim, generator=torch.Generator().manual_seed(0))
    return z, torch.arange(columns).repeat(10)


@torch.no_grad()
def draw_images(generator: Generator, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Draw G(z | y) in eval mode: each image depends only on its own z and y, and G stays as it is.

    From z, float32 (N, latent_dim), and labels, int64 (N,), to images, float32 (N, C, H, W) in [-1, 1], on the CPU.
    """
    device, mode = next(generator.parameters()).device, generator.training
    generator.eval()
    try:
        chunks = zip(z.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.cat([generator(z.to(device), y.to(device)).cpu() for z, y in chunks])
    finally:
        generator.train(mode)


def draw_set(generator: Generator, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw an image for each of `labels`, int64 (N,), as bytes: uint8 (N, C, H, W) in [0, 255].

    The noise comes from `seed` alone and is drawn on the CPU, so it is the same on every device.
    """
    noise = torch.Generator().manual_seed(seed)
    chunks = []
    for chunk in labels.split(CHUNK):
        z = torch.randn(len(chunk), generator.config["latent_dim"], generator=noise)
        imgs = draw_images(generator, z, chunk)
        chunks.append(imgs.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(chunks)
