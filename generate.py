"""Digits on request, from a trained generator."""

import torch

from models import Generator

CHUNK = 500  # images drawn at a time


@torch.no_grad()
def draw_images(generator: Generator, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Draw G(z | y) in eval mode: each image depends on its own z and y alone, and drawing changes nothing in G.

    Args:
        generator: on any device; left in the mode that it came in.
        z: float32 (N, latent_dim), on any device.
        labels: int64 (N,), on any device.

    Returns:
        Images, float32 (N, C, H, W) in [-1, 1], on the CPU.
    """
    device, mode = next(generator.parameters()).device, generator.training
    generator.eval()
    try:
        chunks = zip(z.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.cat([generator(z.to(device), y.to(device)).cpu() for z, y in chunks])
    finally:
        generator.train(mode)
