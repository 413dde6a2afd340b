"""The tutorial's own way to compute: G with Upsample and Conv2d; the reference of tests and benchmarks."""

import copy

import torch
from torch import nn

from convolutions import NarrowConv2d, UpsampleConv2d
from models import Generator


def plain_generator(generator: Generator) -> Generator:
    """Copy G, with the same parameters and names, that upsamples and then convolves as the tutorial does."""
    plain = copy.deepcopy(generator)
    for number, layer in enumerate(plain.conv_blocks):
        if isinstance(layer, UpsampleConv2d | NarrowConv2d):
            with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are then replaced
                conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, stride=1, padding=1)
            conv.to(layer.weight.device, layer.weight.dtype).load_state_dict(layer.state_dict())
            plain.conv_blocks[number] = conv
        if isinstance(layer, UpsampleConv2d):
            plain.conv_blocks[number - 1] = nn.Upsample(scale_factor=2)
    return plain
