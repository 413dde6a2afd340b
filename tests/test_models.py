"""The networks: the tutorial's names and counts, every promised size, and weight files that rebuild them."""

import copy
import hashlib

import pytest
import torch
from conftest import ROOT

from models import Discriminator, Generator, load_network, save_network, update_ema, weights_init_normal
from utils import BadInput


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.faithful
def test_parameters_are_the_tutorials():
    generator, discriminator = Generator(), Discriminator()
    assert (count(generator), count(discriminator)) == (1_050_985, 103_243)
    assert [name for name, _ in generator.named_parameters()] == [
        "label_emb.weight",
        "l1.0.weight",
        "l1.0.bias",
        *(f"conv_blocks.{n}.{part}" for n in (0, 2, 3, 6, 7, 9) for part in ("weight", "bias")),
    ]
    assert [name for name, _ in discriminator.named_parameters()] == [
        *(f"conv_blocks.{n}.{part}" for n in (0, 3, 6, 7, 10, 11, 14) for part in ("weight", "bias")),
        *(f"{layer}.0.{part}" for layer in ("adv_layer", "aux_layer") for part in ("weight", "bias")),
    ]


@pytest.mark.parametrize("img_size", [16, 20, 24, 28, 32, 36, 48, 64])
@pytest.mark.parametrize(("channels", "n_classes", "latent_dim"), [(1, 10, 100), (3, 7, 13)])
def test_shapes_and_ranges(img_size, channels, n_classes, latent_dim):
    generator = Generator(n_classes, latent_dim, img_size, channels)
    discriminator = Discriminator(n_classes, img_size, channels)
    imgs = generator(torch.randn(4, latent_dim), torch.randint(n_classes, (4,)))
    assert imgs.shape == (4, channels, img_size, img_size)
    assert imgs.abs().max() <= 1
    validity, label = discriminator(imgs)
    assert validity.shape == (4, 1) and label.shape == (4, n_classes)
    assert ((validity >= 0) & (validity <= 1)).all()
    torch.testing.assert_close(label.sum(1), torch.ones(4))


@pytest.mark.parametrize(
    "sizes", [{"img_size": 12}, {"img_size": 30}, {"channels": 0}, {"n_classes": 0}, {"latent_dim": -1}]
)
def test_sizes_that_cannot_work_are_named(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        Generator(**sizes)


def test_label_and_noise_both_reach_the_image():
    generator = Generator().eval()
    z, labels = torch.randn(1, 100), torch.tensor([3])
    assert not torch.equal(generator(z, labels), generator(z, labels + 1))
    assert not torch.equal(generator(z, labels), generator(-z, labels))


def test_ema_is_what_its_decay_says():
    source = torch.nn.BatchNorm2d(3)
    ema, by_hand = copy.deepcopy(source), source.weight.detach().clone()
    for steps in range(1, 200):
        torch.nn.init.normal_(source.weight)
        source.running_mean.fill_(steps)
        update_ema(ema, source, 0.9, steps)
        decay = min(0.9, steps / (steps + 4))
        by_hand = decay * by_hand + (1 - decay) * source.weight.detach()
    torch.testing.assert_close(ema.weight.detach(), by_hand)
    assert ema.running_mean[0].item() == pytest.approx(199 - 9, abs=0.1)  # it reaches back ten batches
    assert not ema.weight.equal(source.weight)
    update_ema(ema, source, 0, 7)
    assert torch.equal(ema.weight, source.weight)


@pytest.mark.faithful
def test_init_touches_convolutions_and_norms_only():
    torch.manual_seed(0)
    generator = Generator()
    before = {name: parameter.clone() for name, parameter in generator.named_parameters()}
    generator.apply(weights_init_normal)
    after = {name: parameter.detach() for name, parameter in generator.named_parameters()}
    for name in ("label_emb.weight", "l1.0.weight", "l1.0.bias", "conv_blocks.2.bias"):
        assert torch.equal(before[name], after[name])
    assert after["conv_blocks.2.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert after["conv_blocks.3.weight"].mean() == pytest.approx(1, abs=0.01)
    assert after["conv_blocks.3.weight"].std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("network", [Generator(7, 13, 28, 3), Discriminator(7, 28, 3)])
def test_weight_file_alone_rebuilds_the_network(network, tmp_path):
    save_network(tmp_path / "weights.pth", network, note="plain data")
    rebuilt = load_network(tmp_path / "weights.pth")
    assert type(rebuilt) is type(network) and rebuilt.config == network.config
    for name, tensor in network.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor)
    assert torch.load(tmp_path / "weights.pth", weights_only=True)["note"] == "plain data"


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        (Generator(img_size=16), dict(bn_eps=1e-5)),
        (Generator(img_size=16, conditioning="concat"), dict(bn_eps=1e-5)),
        (Discriminator(img_size=16), dict(bn_eps=1e-5)),
        (Discriminator(img_size=16), dict(outputs="logits")),
    ],
)
def test_weight_file_keeps_the_mathematics_that_its_tensors_do_not_show(network, changes, tmp_path):
    config, state = network.config, network.state_dict()
    changed = type(network)(**(config | changes))
    changed.load_state_dict(state)  # the same tensors
    inputs = (torch.randn(4, 100), torch.arange(4)) if isinstance(network, Generator) else (torch.randn(4, 1, 16, 16),)
    outputs = []
    for number, saved in enumerate([network, changed]):
        save_network(tmp_path / f"{number}.pth", saved)
        loaded = load_network(tmp_path / f"{number}.pth").eval()
        assert loaded.config == saved.config
        outputs.append(torch.cat([out.detach().flatten() for out in loaded(*inputs)]))
        torch.testing.assert_close(outputs[-1], torch.cat([out.detach().flatten() for out in saved.eval()(*inputs)]))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3

    # a file from before these were recorded has the tutorial's; one of a later version, with more, is refused
    packed = torch.load(tmp_path / "1.pth", weights_only=True)
    for name in changes:
        del packed["config"][name]
    torch.save(packed, tmp_path / "old.pth")
    assert load_network(tmp_path / "old.pth").config == config
    torch.save(packed | {"config": packed["config"] | {"later": 1}}, tmp_path / "later.pth")
    with pytest.raises(BadInput, match="is corrupt, or is not a Generator or Discriminator of this project"):
        load_network(tmp_path / "later.pth")


def test_bundled_weights_load():
    sums = {"acgan_gen.pth": "7f1688e891d0c07a", "acgan_dist.pth": "1556002e02b4699f",
            "best.pth": "7634f631543695c3"}  # fmt: skip
    for name, wanted in sums.items():
        digest = hashlib.sha256()
        for tensor in load_network(ROOT / "weights" / name).state_dict().values():
            digest.update(tensor.numpy().tobytes())
        assert digest.hexdigest()[:16] == wanted
