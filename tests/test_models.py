"""The networks: the article's layers, every promised size, their fast layers, and weight files that rebuild them."""

import copy
import hashlib
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, errors
from torch import nn

import acgan
import departures
import evaluate
import fast
import generate
from models import Discriminator, Generator, weights_init_normal
from run.trained import start_from
from run.weights import WEIGHTS, load_network, save_network, update_ema
from utils import BadInput

EARLIER = ROOT / "tests" / "earlier_weights"  # small weight files of commit 0152d16, and what their networks computed
OUTPUTS = json.loads((EARLIER / "outputs.json").read_text())
TINY = ["--seed", 5, "--img_size", 16, "--latent_dim", 4, "--batch_size", 8]
DIGITS = list("0123456789")


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def stored(path):
    """The tensors of a weight file, by name."""
    return torch.load(path, weights_only=True)["state_dict"]


def assert_equal_states(ours, theirs):
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


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


@pytest.mark.faithful
def test_generator_has_the_articles_layers_in_its_order():
    article = nn.Sequential(
        nn.BatchNorm2d(128),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(128, 128, 3, stride=1, padding=1),
        nn.BatchNorm2d(128, 0.8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(128, 64, 3, stride=1, padding=1),
        nn.BatchNorm2d(64, 0.8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(64, 1, 3, stride=1, padding=1),
        nn.Tanh(),
    )
    assert repr(Generator().conv_blocks) == repr(article)


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
    for module in (Generator, departures.Generator):
        with pytest.raises(ValueError, match=next(iter(sizes))):
            module(**sizes)


def test_label_and_noise_both_reach_the_image():
    generator = Generator().eval()
    z, labels = torch.randn(1, 100), torch.tensor([3])
    assert not torch.equal(generator(z, labels), generator(z, labels + 1))
    assert not torch.equal(generator(z, labels), generator(-z, labels))


def test_ema_is_what_its_decay_says():
    source = nn.BatchNorm2d(3)
    ema, by_hand = copy.deepcopy(source), source.weight.detach().clone()
    for steps in range(1, 200):
        nn.init.normal_(source.weight)
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


@pytest.mark.faithful
@pytest.mark.parametrize(
    "config", [dict(img_size=16), dict(img_size=28, channels=3), dict(), dict(img_size=16, conditioning="both")]
)
def test_fast_layers_keep_parameters_and_random_streams_and_compute_the_same(config):
    torch.manual_seed(0)
    plain = departures.build("Generator", **config).apply(weights_init_normal).double()
    swapped, discriminator = copy.deepcopy(plain), departures.build("Discriminator", img_size=16)
    before, random, numpy_random = dict(swapped.named_parameters()), torch.get_rng_state(), np.random.get_state()[1]
    fast.use_fast_layers(swapped, discriminator)
    assert torch.equal(torch.get_rng_state(), random) and (np.random.get_state()[1] == numpy_random).all()
    after = dict(swapped.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(swapped.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(layer, nn.Upsample | nn.Conv2d) for layer in swapped.modules())
    assert discriminator.conv_blocks[3].weight.is_contiguous(memory_format=torch.channels_last)

    z, labels, outputs = torch.randn(4, 100, dtype=torch.float64), torch.arange(4), []
    for generator in (swapped, plain):
        outputs.append(generator(z, labels))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for (name, ours), theirs in zip(swapped.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("network", [Generator(7, 13, 28, 3), Discriminator(7, 28, 3)])
def test_weight_file_alone_rebuilds_the_network(network, tmp_path):
    classes = [f"class {number}" for number in range(7)]
    save_network(tmp_path / "weights.pth", network, classes, note="plain data")
    rebuilt = load_network(tmp_path / "weights.pth")
    assert type(rebuilt) is type(network) and rebuilt.config == network.config and rebuilt.classes == classes
    assert_equal_states(rebuilt.state_dict(), network.state_dict())
    assert torch.load(tmp_path / "weights.pth", weights_only=True)["note"] == "plain data"
    save_network(tmp_path / "weights.pth", network, classes[1:])
    with pytest.raises(BadInput, match="is corrupt, or is not a Generator or Discriminator of this project"):
        load_network(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("network", "config", "changes"),
    [
        ("Generator", {}, dict(bn_eps=1e-5)),
        ("Generator", dict(conditioning="concat"), dict(bn_eps=1e-5)),
        ("Discriminator", {}, dict(bn_eps=1e-5)),
        ("Discriminator", {}, dict(outputs="logits")),
    ],
)
def test_weight_file_keeps_the_mathematics_that_its_tensors_do_not_show(network, config, changes, tmp_path):
    plain = departures.build(network, img_size=16, **config)
    changed = departures.build(network, img_size=16, **config, **changes)
    changed.load_state_dict(plain.state_dict())  # the same tensors
    inputs = (torch.randn(4, 100), torch.arange(4)) if network == "Generator" else (torch.randn(4, 1, 16, 16),)
    outputs = []
    for number, saved in enumerate([plain, changed]):
        save_network(tmp_path / f"{number}.pth", saved, DIGITS)
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
    assert load_network(tmp_path / "old.pth").config == plain.config
    torch.save(packed | {"config": packed["config"] | {"later": 1}}, tmp_path / "later.pth")
    with pytest.raises(BadInput, match="is corrupt, or is not a Generator or Discriminator of this project"):
        load_network(tmp_path / "later.pth")


def test_bundled_weights_load():
    sums = {"acgan_gen.pth": "7f1688e891d0c07a", "acgan_dist.pth": "1556002e02b4699f",
            "best.pth": "f423826047f66fee"}  # fmt: skip
    for name, wanted in sums.items():
        digest = hashlib.sha256()
        for tensor in load_network(ROOT / "weights" / name).state_dict().values():
            digest.update(tensor.numpy().tobytes())
        assert digest.hexdigest()[:16] == wanted


def computed(network):
    """What the network of a file in EARLIER computes, as outputs.json has it."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if isinstance(network, Generator):
            return network(torch.randn(10, 4, generator=random), torch.arange(10)).flatten(1).mean(1).tolist()
        return [out.tolist() for out in network(torch.rand(4, 1, 16, 16, generator=random) * 2 - 1)]


@pytest.mark.parametrize("file", OUTPUTS)
def test_earlier_weight_file_loads_and_computes_what_it_did(file):
    network = load_network(EARLIER / file).eval()
    assert_equal_states(network.state_dict(), stored(EARLIER / file))
    assert type(network).__name__ == ("Discriminator" if "dist" in file else "Generator")
    for layers in ("plain", "fast"):
        if layers == "fast":
            fast.use_fast_layers(*([network] if isinstance(network, Generator) else [Generator(), network]))
        torch.testing.assert_close(computed(network), OUTPUTS[file], rtol=0, atol=1e-5)


def test_discriminator_of_a_width_that_is_no_longer_known_is_refused(tmp_path):
    packed = torch.load(EARLIER / "logits" / "acgan_dist.pth", weights_only=True)
    assert packed["config"]["width"] == 1
    packed["config"]["width"] = 2
    torch.save(packed, tmp_path / "wide.pth")
    with pytest.raises(BadInput, match="another width is no longer known: commit 2d0af8b"):
        load_network(tmp_path / "wide.pth")


def test_all_earlier_weight_files_are_tested():
    assert {path.relative_to(EARLIER).as_posix() for path in EARLIER.glob("*/*.pth")} == set(OUTPUTS)


@pytest.fixture(scope="module")
def begun(train, tmp_path_factory):
    """For each recipe, a run of one batch from earlier weights: its folder, and its networks before that batch."""
    runs = {}

    def watched(update):
        def watched_update(*inputs):
            seen.append([copy.deepcopy(network.state_dict()) for network in inputs[-8:-6]])
            return update(*inputs)

        return watched_update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acgan, "train_step", watched(acgan.train_step))
        patch.setattr(departures.Step, "__call__", watched(departures.Step.__call__))
        for recipe in ("faithful", "best"):
            seen, out_dir = [], tmp_path_factory.mktemp(recipe)
            flags = ["--recipe", recipe, "--init_from", EARLIER / recipe, "--max_steps", 1, "--out_dir", out_dir]
            result = train(*TINY, *flags)
            assert result.status == 0, result.err
            files = [EARLIER / recipe / name for name in WEIGHTS[:2]]
            words = "Generator: starts from {}.\nDiscriminator: starts from {}.\n".format(*files)
            assert words in result.err
            (networks,) = seen
            runs[recipe] = out_dir, networks
    return runs


@pytest.mark.parametrize("recipe", ["faithful", "best"])
def test_run_starts_from_the_tensors_of_earlier_weights(recipe, begun):
    for state, name in zip(begun[recipe][1], WEIGHTS[:2], strict=True):
        assert_equal_states(state, stored(EARLIER / recipe / name))


def snippets():
    """The Python of docs/outputs.md: how to load a weight file, how to draw with it, and how with models.py alone."""
    load, draw, alone, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "outputs.md").read_text(), re.DOTALL)
    return load, draw, alone


def test_faithful_weights_load_with_models_py_alone(begun, monkeypatch):
    files = [folder / name for folder in (ROOT / "weights", begun["faithful"][0]) for name in WEIGHTS[:2]]
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            path = Path(getattr(module, "__file__", None) or "/")
            if path.is_relative_to(ROOT) and ".venv" not in path.parts:
                patch.setitem(sys.modules, name, None)  # to import it would raise
        patch.setattr(sys, "path", [path for path in sys.path if path and Path(path) != ROOT])
        spec = importlib.util.spec_from_file_location("models", ROOT / "models.py")
        models = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(models)
        networks = []
        for file in files:
            packed = torch.load(file, weights_only=True)
            networks.append(getattr(models, packed["network"])(**packed["config"]).eval())
            networks[-1].load_state_dict(packed["state_dict"])
        patch.setitem(sys.modules, "models", models)
        patch.chdir(ROOT / "weights")
        exec(snippets()[2], documented := {})
    assert_equal_states(documented["G"].state_dict(), stored(ROOT / "weights" / "acgan_gen.pth"))
    for file, alone in zip(files, networks, strict=True):
        side = alone.config["img_size"]
        inputs = [torch.randn(3, 1, side, side)]
        if "latent_dim" in alone.config:
            inputs = [torch.randn(3, alone.config["latent_dim"]), torch.arange(3)]
        with torch.no_grad():
            for ours, theirs in zip(alone(*inputs), load_network(file).eval()(*inputs), strict=True):
                assert torch.equal(ours, theirs)


def test_documented_way_to_load_weights_works_beside_a_persons_own_modules(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("utils.py", "models.py", "data/__init__.py"):
        (tmp_path / name).write_text("raise RuntimeError('a module of the same name was imported')\n")
    shutil.copy(ROOT / "weights" / "acgan_gen.pth", tmp_path / "acgan_gen_ema.pth")
    load, draw, _ = snippets()
    assert load.startswith("import sys\n") and load.count('"/path/to/checkout"') == 1
    code = load.replace("/path/to/checkout", str(ROOT)) + draw + "print(sevens.shape, generator.training)\n"
    (tmp_path / "mine.py").write_text(code)
    result = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "torch.Size([16, 1, 32, 32]) False\n", result.stderr


def test_model_card_loads_each_weight_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    best, faithful, judge = re.findall(r"```python\n(.*?)```", Path("weights/README.md").read_text(), re.DOTALL)
    for block, files in ((best, {"generator": "best.pth"}), (judge, {"judge": "judge.pth"}),
                         (faithful, {"generator": "acgan_gen.pth", "discriminator": "acgan_dist.pth"})):  # fmt: skip
        exec(block, names := {})
        for network, file in files.items():
            assert_equal_states(names[network].state_dict(), stored(Path("weights") / file))


@pytest.mark.parametrize(
    "network",
    [Generator(7, 13, 28, 3), Discriminator(7, 48, 3)],
    ids=lambda network: type(network).__name__,
)
def test_bare_state_dict_of_a_network_of_the_tutorial_loads(network, tmp_path):
    state = network.state_dict()
    wrapped = nn.DataParallel(network).state_dict()
    for content, is_zip in ((state, True), (state, False), (wrapped, True), ({"state_dict": state}, True)):
        torch.save(content, tmp_path / "bare.pth", _use_new_zipfile_serialization=is_zip)
        loaded = load_network(tmp_path / "bare.pth")
        assert type(loaded) is type(network) and loaded.config == network.config
        assert loaded.classes == list("0123456") and loaded.step is None
        assert_equal_states(loaded.state_dict(), state)
    torch.save({name: tensor for name, tensor in state.items() if "bias" not in name}, tmp_path / "bare.pth")
    with pytest.raises(BadInput, match="is corrupt, or is not a Generator or Discriminator of this project"):
        load_network(tmp_path / "bare.pth")
    torch.save(state, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "bare.pth").read_bytes()
    (tmp_path / "bare.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="is corrupt, or is not a Generator or Discriminator of this project"):
        load_network(tmp_path / "bare.pth")


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_pickled_modules_are_refused_and_the_documented_lines_make_a_state_dict(tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    generator = Generator(img_size=16, latent_dim=4)
    (convert,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fidelity.md").read_text(), re.DOTALL)
    with monkeypatch.context() as patch:
        for network in (Generator, Discriminator):  # the original defines its classes in the script that it runs
            patch.setattr(network, "__module__", "__main__")
            patch.setattr(sys.modules["__main__"], network.__name__, network, raising=False)
        torch.save(generator, "acgan_gen.pth")
        torch.save(generator, "before_1_6.pth", _use_new_zipfile_serialization=False)
        Path("plain.pth").write_bytes(pickle.dumps({"G": generator}))
        exec(convert, {})
    for name in ("acgan_gen.pth", "before_1_6.pth", "plain.pth"):
        lines = [errors(call(main, flag, name, "--device", "cpu")) for main, flag in (
            (generate.main, "--weights"), (evaluate.main, "--weights"), (evaluate.main, "--judge"))]  # fmt: skip
        for line in [*lines, errors(train("--init_from", name))]:
            assert f"{name!r} holds whole pickled objects ('__main__.Generator'), and to load such can run code" in line
            assert "docs/fidelity.md" in line
    assert call(generate.main, "12", "--weights", "state_dict.pth", "--device", "cpu").status == 0
    assert_equal_states(load_network("state_dict.pth").state_dict(), generator.state_dict())


@pytest.mark.parametrize("switches", [({}, {}), (dict(conditioning="both"), dict(class_head="2k"))])
def test_classes_of_earlier_weights_are_taken_by_their_names(switches, tmp_path, capsys):
    def networks(n_classes):
        sizes = dict(n_classes=n_classes, img_size=16)
        kinds = zip(("Generator", "Discriminator"), switches, strict=True)
        return [departures.build(name, **sizes, **config) for name, config in kinds]

    def by_class(state):  # (classes, ...), or twice as many
        return [state[name] for name in ("label_emb.weight", "aux_layer.0.weight", "aux_layer.0.bias") if name in state]

    theirs, ours = ["dog", "ant", "eel"], ["ant", "bee", "cow", "dog"]
    files = [tmp_path / name for name in WEIGHTS[:2]]
    for file, network in zip(files, networks(3), strict=True):
        save_network(file, network, theirs, step=1200)
    started = networks(4)
    before = copy.deepcopy([network.state_dict() for network in started])
    start_from(tmp_path, *started, ours)
    kinds = zip(("Generator", "Discriminator"), files, strict=True)
    words = "after batch 1,200; 2 of 4 classes by name; new: bee, cow.\n"
    assert capsys.readouterr().err == "".join(f"{kind}: starts from {file}, {words}" for kind, file in kinds)
    for network, old, file in zip(started, before, files, strict=True):
        state, new = network.state_dict(), stored(file)
        for rows, were, given in zip(by_class(state), by_class(old), by_class(new), strict=True):
            halves = zip(rows.split(4), were.split(4), given.split(3), strict=True)
            assert all(torch.equal(ours[[0, 3]], theirs[[1, 0]]) for ours, _, theirs in halves)
            halves = zip(rows.split(4), were.split(4), strict=True)
            assert all(torch.equal(ours[[1, 2]], fresh[[1, 2]]) for ours, fresh in halves)
        assert all(torch.equal(state[name], new[name]) for name in state if state[name].shape == new[name].shape)

    # no name in common: by number, as long as there are as many
    started = networks(3)
    start_from(tmp_path, *started, ["x", "y", "z"])
    assert capsys.readouterr().err.count("after batch 1,200; classes by number, as no name is in common.\n") == 2
    for network, file in zip(started, files, strict=True):
        assert_equal_states(network.state_dict(), stored(file))
