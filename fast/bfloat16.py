"""Networks that compute in bfloat16 where autocast finds it safe: faster on some processors, and rounding more."""

import torch


class InBfloat16(torch.nn.Module):
    """A network that computes in bfloat16 where autocast finds it safe, and returns float32."""

    def __init__(self, network):
        super().__init__()
        self.module = network
        self.device_type = next(network.parameters()).device.type
        for layer in network.modules():
            if isinstance(layer, torch.nn.Sigmoid | torch.nn.Softmax):
                layer.register_forward_pre_hook(to_float32)

    def forward(self, *inputs):
        # no cache of cast weights: it would outlive a CUDA graph's capture
        with torch.autocast(self.device_type, dtype=torch.bfloat16, cache_enabled=False):
            out = self.module(*inputs)
        return tuple(tensor.float() for tensor in out) if isinstance(out, tuple) else out.float()


def to_float32(layer, inputs):
    """Hook D's last layers: in bfloat16 a probability near 1 would become 1, without a gradient."""
    return tuple(tensor.float() for tensor in inputs)
