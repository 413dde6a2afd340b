"""G's convolutions, computed in less time: layers with the parameters and the results of those that they replace."""

import torch
import torch.nn.functional as F
from torch import nn

from models import Discriminator, Generator


def use_fast_layers(generator: Generator, discriminator: Discriminator | None = None) -> None:
    """Swap G's layers for faster ones, in place, and let D compute channels last on a CPU, where that is faster.

    Parameters are the same objects under the same names, and no random number is drawn. Results differ by rounding.
    """
    blocks = generator.conv_blocks
    for number, layer in enumerate(blocks):
        if isinstance(layer, nn.Conv2d):
            upsamples = isinstance(blocks[number - 1], nn.Upsample)
            blocks[number] = UpsampleConv2d(layer) if upsamples else NarrowConv2d(layer)
            if upsamples:
                blocks[number - 1] = nn.Identity()  # it is in the next layer; the place keeps the parameters' names
    if discriminator is not None and next(discriminator.parameters()).device.type == "cpu":
        discriminator.to(memory_format=torch.channels_last)


class UpsampleConv2d(nn.Module):
    """Upsample(scale_factor=2), nearest, then Conv2d(3x3, padding=1), with fewer multiplications.

    Along one axis the doubled image is u[2i] = u[2i+1] = x[i], so with the kernel (w0, w1, w2)

        y[2i]   = w0 x[i-1] + (w1 + w2) x[i]
        y[2i+1] = (w0 + w1) x[i] + w2 x[i+1]

    `fold`: that is a transposed convolution with stride 2, padding 1 and the kernel (w2, w1+w2, w0+w1, w0). With the
    same along the other axis: 16 multiplications for 4 pixels instead of 36.

    `share`: a pair of pixels b = x[i], c = x[i+1] with its neighbours a and d gives four outputs, which share five
    products:

        m0 = w0 (a - c)                         y[2i]   = m0 + m1 + m2
        m1 = (w0 + w1 + w2) (b + c) / 2         y[2i+1] = m1 - m3
        m2 = (w0 - w1 - w2) (c - b) / 2         y[2i+2] = m1 - m2
        m3 = (w0 + w1 - w2) (c - b) / 2         y[2i+3] = m1 + m3 + m4
        m4 = w2 (d - b)

    With the same along the other axis: 25 multiplications for 16 pixels instead of 144. It is Winograd's way to
    convolve (arXiv:1509.09308), at the points 0, 1, -1 and infinity, of both kernels above at once. The many sums are
    cheap only where a compiler joins them; an eager G folds.

    Both agree with the plain pair but for rounding, borders included.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float (B, in_channels, h, w) to (B, out_channels, 2h, 2w)."""
        return self.share(x) if torch.compiler.is_compiling() and on_cpu(x) else self.fold(x)

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """Do what forward does by one transposed convolution."""
        weight = self.weight.transpose(0, 1)  # (in, out, 3, 3), as conv_transpose2d wants it
        for axis in (2, 3):
            w0, w1, w2 = weight.unbind(axis)
            weight = torch.stack([w2, w1 + w2, w0 + w1, w0], axis)  # finally (in, out, 4, 4)
        return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Do what forward does by 25 matrix products."""
        kernels = on_both_axes(mixed_kernel, [row.unbind(2) for row in self.weight.unbind(2)])
        return SharedProducts.apply(x, self.bias, *grouped(kernels, 0))


# `share` along one axis, and the transposes of its parts for the gradient. Parts come in the order of the products
# m0, m1, m4, m2 and m3; the last two have their pixels in common.


def mixed_kernel(w0, w1, w2):
    """Return the kernels' side of the five products; any three tensors of one shape, as all below."""
    return w0, w0 + w1 + w2, w2, w0 - w1 - w2, w0 + w1 - w2


def mixed_pixels(x, axis: int, pairs: int):
    """Return the pixels' side of the products, for each pair of pixels of an image padded along `axis`."""
    before = (slice(None),) * axis
    a, b, c, d = (x[(*before, slice(first, first + 2 * pairs - 1, 2))] for first in range(4))
    return a - c, (b + c) / 2, d - b, (c - b) / 2


def mixed_pixels_back(g0, g1, g4, g23, axis: int):
    """Return the gradient to the first and the second pixel of each pair."""
    last = [0, 0] * (g0.dim() - 1 - axis)  # the axes after it, which F.pad wants first
    from_before = F.pad(g4.narrow(axis, 0, g4.shape[axis] - 1), [*last, 1, 0])
    from_behind = F.pad(g0.narrow(axis, 1, g0.shape[axis] - 1), [*last, 0, 1])
    return (g1 - g23) / 2 - g4 + from_before, (g1 + g23) / 2 - g0 + from_behind


def outputs(m0, m1, m4, m2, m3):
    """Return the four outputs of the five products."""
    return m0 + m1 + m2, m1 - m3, m1 - m2, m1 + m3 + m4


def outputs_back(y0, y1, y2, y3):
    """Return the gradients to the five products."""
    return y0, y0 + y1 + y2 + y3, y3, y0 - y2, y3 - y1


# With both axes there are 4 x 4 mixed pixels. Nine of them meet one kernel each, six meet two, and one meets four.


def grouped_pixels(parts, axis: int):
    """Stack the 4 x 4 parts, each (..., C), in these three groups, along a new axis of 9, 6 and 1."""
    single = [part for row in parts[:3] for part in row[:3]]
    double = [*(row[3] for row in parts[:3]), *parts[3][:3]]
    return torch.stack(single, axis), torch.stack(double, axis), parts[3][3].unsqueeze(axis)


def ungrouped_pixels(groups):
    """Return the 4 x 4 parts of what `grouped_pixels` has stacked along axis 3."""
    single, double, (last,) = (group.unbind(3) for group in groups)
    return [(*single[3 * row : 3 * row + 3], double[row]) for row in range(3)] + [(*double[3:], last)]


def grouped(parts, axis: int):
    """Stack 5 x 5 kernels or products likewise; those of the same pixels come after each other along the next axis."""
    single = [part for row in parts[:3] for part in row[:3]]
    double = [part for row in parts[:3] for part in row[3:]]
    double += [parts[row][column] for column in range(3) for row in (3, 4)]
    quadruple = [part for row in parts[3:] for part in row[3:]]
    counts = (single, 1), (double, 2), (quadruple, 4)
    return [torch.stack(group, axis).unflatten(axis, (-1, n)).flatten(axis + 1, axis + 2) for group, n in counts]


def ungrouped(groups):
    """Return the 5 x 5 parts of what `grouped` has stacked along axis 3."""
    parts = [group.unflatten(4, (n, -1)).flatten(3, 4).unbind(3) for group, n in zip(groups, (1, 2, 4), strict=True)]
    single, double, quadruple = parts
    rows = [(*single[3 * row : 3 * row + 3], *double[2 * row : 2 * row + 2]) for row in range(3)]
    return [*rows, *((*double[6 + row :: 2], *quadruple[2 * row : 2 * row + 2]) for row in range(2))]


def on_both_axes(transform, parts):
    """Apply `transform` to each column of the parts, then to each row of the results."""
    by_column = zip(*(transform(*column) for column in zip(*parts, strict=True)), strict=True)
    return [transform(*row) for row in by_column]


class SharedProducts(torch.autograd.Function):
    """`share` for grouped kernels, float (N, out, in), of an image, float (B, in, h, w). Its gradient is written out.

    Autograd's own would scatter where this gathers, which is slower once compiled.
    """

    @staticmethod
    def forward(ctx, x, bias, *kernels):
        batch, _, h, w = x.shape
        rows, columns = (h + 1) // 2, (w + 1) // 2  # of pairs; an odd side ends with one more zero
        # 6-D on purpose: Inductor lays out 4-D and 5-D tensors as channels-last images
        padded = F.pad(x.permute(0, 2, 3, 1)[None, None], (0, 0, 1, 1 + w % 2, 1, 1 + h % 2))
        pixels = grouped_pixels([mixed_pixels(row, 4, columns) for row in mixed_pixels(padded, 3, rows)], 5)
        pixels = [group[0, 0] for group in pixels]
        ctx.save_for_backward(*pixels, *kernels)
        ctx.size = h, w
        y = on_both_axes(outputs, ungrouped(list(map(multiply, pixels, kernels))))
        y = bias + torch.stack([torch.stack(row, 3) for row in y], 2)  # (B, rows, 4, columns, 4, out)
        return y.view(batch, 4 * rows, 4 * columns, -1)[:, : 2 * h, : 2 * w].permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        pixels, kernels = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        (h, w), (batch, rows, columns) = ctx.size, pixels[0].shape[:3]
        y = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 2 * (w % 2), 0, 2 * (h % 2)))
        y = y.reshape(batch, rows, 4, columns, 4, -1)
        m = grouped(on_both_axes(outputs_back, [row.unbind(3) for row in y.unbind(2)]), 3)
        to_kernels = map(multiply_back, m, pixels)
        parts = ungrouped_pixels(
            [multiply(group, kernel.transpose(1, 2)) for group, kernel in zip(m, kernels, strict=True)]
        )
        x = zip(*(mixed_pixels_back(*column, 1) for column in zip(*parts, strict=True)), strict=True)
        x = torch.stack([torch.stack(mixed_pixels_back(*row, 2), 3) for row in x], 2)
        x = x.view(batch, 2 * rows, 2 * columns, -1)[:, :h, :w]
        to_bias = m[0][:, :, :, 4].sum((0, 1, 2))  # m1 of both axes has the sums of 16 pixels
        return x.permute(0, 3, 1, 2), to_bias, *to_kernels


# Both are opaque to the compiler, which would copy what they read into the layout of another library call.


@torch.library.custom_op("acgan::multiply", mutates_args=())
def multiply(pixels: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Multiply (B, h, w, N, C) by (N, O, C), both float: N matrix products, (B, h, w, N, O)."""
    # a grouped 1x1 convolution, channels last, of one high image: a little faster than of many small ones
    image = pixels.flatten(3).flatten(0, 1)[None].permute(0, 3, 1, 2)  # (1, N * C, B * h, w)
    out = F.conv2d(image, kernels.reshape(-1, kernels.shape[2], 1, 1), groups=len(kernels))
    return out.permute(0, 2, 3, 1).reshape(*pixels.shape[:4], -1)


@multiply.register_fake
def _(pixels, kernels):
    return pixels.new_empty(*pixels.shape[:4], kernels.shape[1])


@torch.library.custom_op("acgan::multiply_back", mutates_args=())
def multiply_back(grad: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the gradient to the kernels, (N, O, C), from that to the products, (B, h, w, N, O)."""
    return torch.bmm(grad.flatten(0, 2).permute(1, 2, 0), pixels.flatten(0, 2).transpose(0, 1))


@multiply_back.register_fake
def _(grad, pixels):
    return pixels.new_empty(*grad.shape[3:], pixels.shape[4])


class NarrowConv2d(nn.Module):
    """Conv2d(3x3, padding=1) to few channels, too few to fill the vectors of a library's convolution.

    `sum_taps`, on a CPU: each pixel is multiplied by all nine taps of the kernel at once, and the nine results are
    shifted and added.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float (B, in_channels, h, w) to (B, out_channels, h, w)."""
        return self.sum_taps(x) if on_cpu(x) else F.conv2d(x, self.weight, self.bias, padding=1)

    def sum_taps(self, x: torch.Tensor) -> torch.Tensor:
        """Do what forward does by one matrix product."""
        taps = self.weight.permute(2, 3, 0, 1).reshape(-1, self.weight.shape[1], 1, 1)
        return ShiftedSum.apply(F.conv2d(x, taps)) + self.bias[:, None, None]


class ShiftedSum(torch.autograd.Function):
    """The sum of nine images, float (B, 9 * out, h, w), each shifted as its tap wants. Its gradient is written out."""

    @staticmethod
    def forward(ctx, products):
        parts = products.unflatten(1, (9, -1)).unbind(1)
        return sum(shifted(part, 1 - tap // 3, 1 - tap % 3) for tap, part in enumerate(parts))

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([shifted(grad, tap // 3 - 1, tap % 3 - 1) for tap in range(9)], 1)


def shifted(x, down: int, right: int):
    """Shift images, (B, C, h, w), by at most one pixel along each axis; zeros come in."""
    h, w = x.shape[2:]
    return F.pad(x, (1, 1, 1, 1))[:, :, 1 - down : 1 - down + h, 1 - right : 1 - right + w]


def on_cpu(x: torch.Tensor) -> bool:
    """Say whether a CPU computes this, and not in bfloat16, in which its library's convolutions are faster."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
