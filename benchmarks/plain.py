"""The tutorial's own way to compute: G with Upsample and Conv2d; the reference of tests and benchmarks."""

import copy

import torch
from torch import nn

from models import Generator
from upsampling import UpsampleConv2d


def plain_generator(generator: Generator) -> Generator:
    """Copy G, with the same parameters and names, that upsamples and then convolves as the tutorial does."""
    plain = copy.deepcopy(generator)
    for number, layer in enumerate(plain.conv_blocks):
        if isinstance(layer, UpsampleConv2d):
            with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are then replaced
                conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, stride=1, padding=1)
            conv.to(layer.weight.device, layer.weight.dtype).load_state_dict(layer.state_dict())
            plain.conv_blocks[number - 1], plain.conv_blocks[number] = nn.Upsample(scale_factor=2), conv
    return plain
