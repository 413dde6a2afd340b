"""The departures from the tutorial: each switch changes what it should, in every kind of run, and nothing else."""

import json
import re

import numpy as np
import pytest
import small
import torch
from conftest import assert_same_run, call, differing, errors, read_rows, stopped_after
from torch import nn

import acgan
import departures
import fast
import generate
from benchmarks import recipe
from data.batches import Batches
from departures import RECIPES, Step, with_logit
from fast.bfloat16 import InBfloat16
from models import Discriminator, Generator, weights_init_normal
from run.checkpoint import NEWEST
from run.resume import MATHEMATICS
from run.trained import FILES, load_trained
from run.weights import NETWORKS, load_network

SMALL = ["--seed", 6, "--batch_size", 24, "--img_size", 16, "--latent_dim", 4, "--log_interval", 1,
         "--sample_interval", 4]  # fmt: skip
SWITCHES = [  # every one of them away from the tutorial
    ["--class_loss", "logits"],
    ["--bn_eps", 1e-5],
    ["--conditioning", "concat"],
    ["--fake_class_loss", "off"],
    ["--class_head", "2k"],
    ["--d_norm", "none"],
    ["--d_dropout", 0],
    ["--d_deviation", "class"],
    ["--d_steps", 2],
    ["--r1", 0.2],
    ["--r1_on", "whole", "--r1", 0.2, "--class_head", "2k"],
    ["--r1_end", 0.1, "--r1", 0.2, "--lr_schedule", "linear"],
    ["--pretrain_class_head", 1],
    ["--lr_schedule", "linear"],
    ["--lr_fall", 1, "--lr_schedule", "linear"],
]
BEST = ["--recipe", "best"]
OTHERS = ["--conditioning", "concat", "--fake_class_loss", "off", "--d_steps", 2,
          "--r1", 0.2, "--pretrain_class_head", 1]  # what the recipe leaves out  # fmt: skip


def options(*flags):
    return acgan.parse_args([str(flag) for flag in flags])


def networks(*flags):
    opt = options(*flags)
    torch.manual_seed(0)
    return departures.networks(opt, 10, 1) or (Generator(img_size=opt.img_size), Discriminator(img_size=opt.img_size))


@pytest.mark.faithful
def test_without_switches_nothing_departs():
    opt = options()
    assert options("--recipe", "faithful") == opt
    assert departures.networks(opt, 10, 1) is None and departures.step(opt, 100) is None
    assert departures.networks(options(*BEST), 10, 1) and departures.step(options(*BEST), 100)
    assert {flags[0][2:] for flags in SWITCHES} == set(departures.FLAGS) - {"recipe"}
    assert set(departures.FLAGS) < set(MATHEMATICS)  # so a resumed run has the same


@pytest.mark.faithful
@pytest.mark.parametrize("layers", ["plain", "fast"])
def test_step_from_which_nothing_departs_equals_the_tutorials_bit_for_bit(layers):
    results = []
    for module, update in [(acgan, acgan.train_step), (departures, Step())]:
        acgan.seed_everything(0)
        generator, discriminator = module.Generator(img_size=16), module.Discriminator(img_size=16)
        generator.apply(weights_init_normal), discriminator.apply(weights_init_normal)
        if layers == "fast":
            fast.use_fast_layers(generator, discriminator)
        adam = dict(lr=0.0002, betas=(0.5, 0.999), fused=True)
        optimizers = [torch.optim.Adam(network.parameters(), **adam) for network in (generator, discriminator)]
        batches, rows = Batches(small.few(150)("mnist", None, 16), 32), []  # five, the last of 22
        for number, indices in enumerate(batches):
            if module is departures:
                assert not update.prepare(number, *optimizers) and optimizers[0].param_groups[0]["lr"] == 0.0002
            z = torch.from_numpy(np.random.normal(0, 1, (len(indices), 100))).float()
            gen_labels = torch.from_numpy(np.random.randint(0, 10, len(indices)))
            rows.append(update(generator, discriminator, *optimizers, *batches.gather(indices), z, gen_labels))
        results.append([rows, generator.state_dict(), discriminator.state_dict()])
        results[-1] += [optimizer.state_dict()["state"] for optimizer in optimizers]
        results[-1] += [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())]
    assert len(results[0][0]) == 5 and list(results[0][0][0]) == list(results[1][0][0])
    assert differing(*results) == []


def one_batch(*flags):
    """What one batch at a rate of 0 records, D's outputs for its real and its drawn images, and their classes."""
    flags = ["--img_size", 16, "--d_dropout", 0, *flags]
    generator, discriminator = networks(*flags)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0) for network in (generator, discriminator)]
    digits = Batches(small.first_digits(16), 8)
    real_imgs, labels = digits.gather(torch.arange(8))
    z, gen_labels = torch.randn(8, 100), torch.arange(1, 9)
    step = departures.step(options(*flags), 100)
    metrics = step(generator, discriminator, *optimizers, real_imgs, labels, z, gen_labels)
    with torch.no_grad():
        shown = discriminator(real_imgs), discriminator(generator(z, gen_labels))
    return metrics, *shown, labels, gen_labels


def test_logits_are_those_of_the_probabilities_and_the_losses_take_them():
    plain, logits = (departures.build("Discriminator", img_size=16, outputs=outputs).eval()
                     for outputs in ("probabilities", "logits"))  # fmt: skip
    logits.load_state_dict(plain.state_dict())
    imgs = torch.randn(4, 1, 16, 16)
    (validity, label), (raw_validity, raw_label) = plain(imgs), logits(imgs)
    torch.testing.assert_close(raw_label.softmax(1), label)
    torch.testing.assert_close(raw_validity.sigmoid(), validity)

    metrics, (real, real_class), (drawn, drawn_class), labels, gen_labels = one_batch("--class_loss", "logits")
    wanted = dict(
        d_real_adv=-real.sigmoid().log().mean(),
        d_real_aux=-real_class.softmax(1)[range(8), labels].log().mean(),
        d_fake_adv=-(1 - drawn.sigmoid()).log().mean(),
        d_fake_aux=-drawn_class.softmax(1)[range(8), gen_labels].log().mean(),
        g_adv=-drawn.sigmoid().log().mean(),
        g_aux=-drawn_class.softmax(1)[range(8), gen_labels].log().mean(),
    )
    for name, value in wanted.items():
        torch.testing.assert_close(metrics[name], value, msg=name)
    torch.testing.assert_close(metrics["d_loss"], sum(list(wanted.values())[:4]) / 4)
    torch.testing.assert_close(metrics["g_loss"], (metrics["g_adv"] + metrics["g_aux"]) / 2)


def test_twin_head_has_an_output_for_real_and_for_generated_of_each_class():
    flags = ["--class_head", "2k", "--class_loss", "logits"]
    metrics, (_, real_class), (_, drawn_class), labels, gen_labels = one_batch(*flags)
    assert real_class.shape == (8, 20)
    real, drawn = real_class.softmax(1).log(), drawn_class.softmax(1).log()
    torch.testing.assert_close(metrics["d_real_aux"], -real[range(8), labels].mean())
    torch.testing.assert_close(metrics["d_fake_aux"], -drawn[range(8), gen_labels + 10].mean())
    gap = drawn[range(8), gen_labels] - drawn[range(8), gen_labels + 10]
    torch.testing.assert_close(metrics["g_aux"], -gap.mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(metrics["d_acc_real"], (real.argmax(1) % 10 == labels).float().mean())
    torch.testing.assert_close(metrics["d_acc_fake"], (drawn.argmax(1) % 10 == gen_labels).float().mean())
    logits = torch.zeros(2, 6)  # three classes
    logits[0, 1], logits[1, 5] = 2.0, 1.0
    assert Step(twin_head=True).recognised(logits).tolist() == [1, 2]


def test_class_loss_on_generated_images_can_be_off():
    metrics, *_ = one_batch("--fake_class_loss", "off")
    assert metrics["d_fake_aux"] == 0 and metrics["d_real_aux"] > 0 and metrics["g_aux"] > 0
    parts = metrics["d_real_adv"] + metrics["d_real_aux"] + metrics["d_fake_adv"]
    torch.testing.assert_close(metrics["d_loss"], parts / 4)


def test_concat_gives_the_first_layer_twice_the_inputs():
    multiply, concat = networks()[0], networks("--conditioning", "concat")[0]
    assert multiply.l1[0].in_features == 100 and concat.l1[0].in_features == 200
    z, labels = torch.randn(3, 100), torch.tensor([1, 2, 3])
    inputs = torch.cat([concat.label_emb(labels), z], 1)
    wanted = concat.conv_blocks(concat.l1(inputs).view(3, 128, 8, 8))
    torch.testing.assert_close(concat(z, labels), wanted)
    both = networks("--conditioning", "both")[0]
    product = torch.cat([both.label_emb(labels), both.label_emb(labels) * z], 1)
    torch.testing.assert_close(both(z, labels), both.conv_blocks(both.l1(product).view(3, 128, 8, 8)))


def test_deviation_of_a_group_of_images_changes_their_validity_alone():
    discriminator = networks("--d_deviation", "class", "--d_dropout", 0, "--d_norm", "none")[1]
    imgs = torch.randn(8, 1, 32, 32)
    layer = discriminator.adv_layer[0]
    for n, size in [(8, 4), (3, 3)]:  # three images are one group
        features = discriminator.conv_blocks(imgs[:n]).flatten(1)
        deviation = torch.cat([group.std(0, unbiased=False).expand(size, -1) for group in features.split(size)])
        wanted = torch.cat([features, deviation], 1) @ layer.weight.T + layer.bias
        torch.testing.assert_close(with_logit(discriminator, imgs[:n])[0], wanted, atol=1e-4, rtol=1e-4)
    (validity, label), (short, short_label) = discriminator(imgs), discriminator(imgs[:3])
    assert len(short) == 3 and not torch.allclose(short, validity[:3])
    torch.testing.assert_close(short_label, label[:3])
    alike = imgs[:1].expand(4, -1, -1, -1).clone().requires_grad_()
    discriminator(alike)[0].sum().backward()
    assert alike.grad.isfinite().all()


def test_deviation_by_class_sorts_each_batch_and_changes_nothing_else(train, tmp_path, monkeypatch):
    seen, train_step = {"as drawn": [], "sorted": []}, acgan.train_step

    def batches(data, batch_size, device, ranks, by_class, shares):
        return Batches(data, batch_size, device, ranks, by_class and kind == "sorted", shares)

    def watched(*networks_and_optimizers_and_batch):
        real_imgs, labels, z, gen_labels = networks_and_optimizers_and_batch[4:]
        seen[kind].append([real_imgs.sum((1, 2, 3)), labels, z, gen_labels])
        return train_step(*networks_and_optimizers_and_batch)

    monkeypatch.setattr(acgan, "train_step", watched)
    monkeypatch.setattr(acgan, "Batches", batches)
    for kind in seen:
        train(*SMALL, "--d_deviation", "class", "--max_steps", 3, "--out_dir", tmp_path / kind)
    assert list(map(len, seen.values())) == [3, 3]
    for (imgs, labels, z, gen_labels), sorted_batch in zip(*seen.values(), strict=True):
        order = labels.argsort(stable=True)
        assert not torch.equal(labels, labels[order])
        wanted = [imgs[order], labels[order], z, gen_labels.sort().values]
        for ours, theirs in zip(sorted_batch, wanted, strict=True):
            assert torch.equal(ours, theirs)


class LinearDiscriminator(nn.Module):
    """D of 16 x 16 pixels whose outputs are linear: the validity's logit, and those of 2 * 3 classes."""

    def __init__(self):
        super().__init__()
        self.conv_blocks = nn.Identity()
        self.adv_layer = nn.Sequential(nn.Linear(16 * 16, 1), nn.Sigmoid())
        self.aux_layer = nn.Linear(16 * 16, 6)


def test_each_d_step_takes_its_share_of_the_real_images_and_all_of_the_same_fakes(train, tmp_path):
    generator, discriminator = networks("--img_size", 16)
    adam = [torch.optim.Adam(network.parameters()) for network in (generator, discriminator)]
    shown = []
    discriminator.register_forward_hook(lambda module, inputs, output: shown.append(inputs[0].detach().clone()))
    real_imgs, labels = Batches(small.first_digits(16), 8).gather(torch.arange(8))
    Step(d_steps=3)(generator, discriminator, *adam, real_imgs, labels, torch.randn(3, 100), torch.arange(3))
    shares, fakes = shown[0:6:2], [*shown[1:6:2], shown[6]]
    assert len(shown) == 7 and all(map(torch.equal, shares, [real_imgs[n::3] for n in range(3)]))
    assert all(torch.equal(fakes[0], other) for other in fakes)
    assert [int(optimizer.state_dict()["state"][0]["step"]) for optimizer in adam] == [1, 3]
    result = train(*SMALL, "--d_steps", 2, "--max_steps", 3, "--out_dir", tmp_path)  # 60 digits: 48 and 12 a batch
    assert result.status == 0 and [row["epoch"] for row in read_rows(tmp_path)] == [0, 0, 1]


def test_penalty_of_a_linear_discriminator_is_that_of_its_slope():
    discriminator, step = LinearDiscriminator(), Step(r1=0.2)
    slope, imgs = discriminator.adv_layer[0].weight, torch.randn(5, 1, 16, 16)
    penalty = step.penalty(discriminator, imgs, torch.arange(5), step.r1)
    torch.testing.assert_close(penalty, 0.2 / 2 * 4 * slope.square().sum())  # every fourth batch, times four
    penalty.backward()
    torch.testing.assert_close(slope.grad, 0.2 * 4 * slope.detach())
    assert torch.equal(step.penalty(InBfloat16(discriminator), imgs, torch.arange(5), step.r1), penalty)  # in float32
    assert [step.prepare(number) for number in range(5)] == [True, False, False, False, True]
    assert not any(Step().prepare(number) for number in range(5))


def test_whole_penalty_is_on_the_slope_of_validity_and_class_terms_together():
    discriminator, labels = LinearDiscriminator(), torch.tensor([2, 0, 1, 1])
    step = departures.step(options("--class_head", "2k", "--r1", 0.3, "--r1_on", "whole"), 100)
    penalty = step.penalty(discriminator, torch.randn(4, 1, 16, 16), labels, step.r1)
    classes = discriminator.aux_layer.weight
    # log C[y] - log C[y + K] is linear in what the class head returns
    slopes = discriminator.adv_layer[0].weight + classes[labels] - classes[3 + labels]
    torch.testing.assert_close(penalty, 0.3 / 2 * 4 * slopes.square().sum(1).mean())
    penalty.backward()
    assert classes.grad.abs().sum() > 0


def test_gamma_falls_with_the_rate_to_what_is_to_be_left(train, tmp_path):
    flags = ["--r1", 0.2, "--lr_schedule", "linear", "--lr", 0.01]
    step = departures.step(options(*flags, "--r1_end", 0.1), 10)
    for is_tensor in (False, True):  # as a CUDA graph reads it
        optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.01, capturable=is_tensor)
        for number, left in [(0, 1), (5, 1), (7, 0.6), (10, 0)]:
            step.prepare(number, optimizer)
            assert float(step.gamma(optimizer)) == pytest.approx(0.2 * (0.1 + 0.9 * left))
    for end in (0.1, 1):
        train(*SMALL, *flags, "--r1_end", end, "--n_epochs", 3, "--out_dir", tmp_path / str(end))
    falling, constant = ([row["d_penalty"] for row in read_rows(tmp_path / end) if "d_penalty" in row]
                         for end in ("0.1", "1"))  # fmt: skip
    assert falling[:2] == constant[:2] and falling[2] == pytest.approx(constant[2] * (0.1 + 0.9 * 2 / 9), rel=1e-5)


def test_norm_and_dropout_of_d_can_be_off():
    imgs = torch.randn(4, 1, 32, 32)
    discriminator = networks("--d_norm", "none", "--d_dropout", 0)[1].train()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in discriminator.modules())
    assert torch.equal(discriminator(imgs)[1], discriminator(imgs)[1])
    discriminator = networks()[1].train()
    assert not torch.equal(discriminator(imgs)[1], discriminator(imgs)[1])


def test_pretrained_class_head_recognises_real_digits(capsys):
    opt = options("--pretrain_class_head", 10, "--lr", 0.002)
    discriminator = networks("--img_size", 16, "--class_loss", "logits", "--d_dropout", 0)[1]
    batches = Batches(small.first_digits(16), 32)
    departures.pretrain_class_head(opt, discriminator, batches)
    assert re.match(r"Pretrained D's class head: [89]\d.\d\d% of the classes were right", capsys.readouterr().err)
    real_imgs, labels = batches.gather(torch.arange(small.KEPT))
    with torch.no_grad():
        assert (discriminator.eval()(real_imgs)[1].argmax(1) == labels).float().mean() > 0.9


def test_pretraining_that_diverges_does_not_call_an_earlier_runs_checkpoint_its_own(train, tmp_path):
    assert train(*SMALL, "--max_steps", 1, "--out_dir", tmp_path).status == 0
    flags = ["--pretrain_class_head", 3, "--lr", 1e30, "--class_loss", "logits", "--out_dir", tmp_path]
    result = train(*SMALL, *flags)
    assert result.status == 1 and result.err.endswith("is pretrained; there is no checkpoint yet\n")
    assert (tmp_path / NEWEST).exists()


def test_image_alone_in_a_batch_is_fine_without_batch_norm(train, tmp_path):
    flags = [*SMALL, *BEST, "--d_steps", 1, "--batch_size", 15, "--n_epochs", 4, "--out_dir", tmp_path]
    assert train(*flags, digits=16).status == 0 and len(read_rows(tmp_path)) == 8


@pytest.mark.parametrize("part", [0.5, 1])
def test_rate_falls_to_0_over_the_last_part_also_when_resumed(part, train, tmp_path, monkeypatch):
    rates, prepare = [], Step.prepare

    def watched(self, step, *optimizers):
        penalised = prepare(self, step, *optimizers)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        return penalised

    monkeypatch.setattr(Step, "prepare", watched)
    flags = [*SMALL, "--lr_schedule", "linear", "--lr", 0.01, "--lr_fall", part]
    wanted = [0.01 * min(1, (1 - step / 9) / part) for step in range(9)]
    with stopped_after(6):
        assert train(*flags, "--max_steps", 9, "--out_dir", tmp_path / "run").status == 143
    line = errors(train("--resume", tmp_path / "run", "--n_epochs", 2))
    assert "argument --resume: 6 batches are done: raise --n_epochs or --max_steps" in line
    line = errors(train("--resume", tmp_path / "run", "--max_steps", 12))
    assert "argument --max_steps: this run's rate falls to 0 by batch 9: drop the flag, or" in line
    line = errors(train("--resume", tmp_path / "run", "--n_epochs", 400))
    assert "argument --n_epochs: this run's rate falls to 0 by batch 9: drop the flag, or" in line
    assert len(rates) == 6 and train("--resume", tmp_path / "run").status == 0
    assert [rate for rate, _ in rates] == [rate for _, rate in rates] == pytest.approx(wanted)
    line = errors(train("--resume", tmp_path / "run", "--n_epochs", 4))
    assert "argument --resume: this run's rate fell to 0 by its end, batch 9: start a longer one" in line
    line = errors(train("--resume", tmp_path / "run", "--max_steps", 12))
    assert "batch 9: start a longer one in another folder, from the beginning or with --init_from" in line


def test_rate_that_a_graph_reads_keeps_its_place_in_memory():
    step, parameter = Step(falling_from=0.01, schedule_steps=10), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=0.01, capturable=True)
    places = set()
    for number, rate in [(0, 0.01), (7, 0.006), (9, 0.002)]:
        step.prepare(number, optimizer)
        places.add(optimizer.param_groups[0]["lr"].data_ptr())
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(rate)
    assert len(places) == 1


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """A run without switches."""
    out_dir = tmp_path_factory.mktemp("plain")
    assert train(*SMALL, "--max_steps", 4, "--out_dir", out_dir).status == 0
    return out_dir


@pytest.mark.parametrize("flags", SWITCHES, ids=lambda flags: " ".join(map(str, flags)))
def test_every_switch_trains_otherwise(flags, plain, train, tmp_path):
    result = train(*SMALL, *flags, "--max_steps", 4, "--out_dir", tmp_path)
    assert result.status == 0, result.err
    ours, theirs = ([row["g_loss"] for row in read_rows(folder)] for folder in (tmp_path, plain))
    assert len(ours) == len(theirs) == 4 and ours != theirs


@pytest.mark.parametrize(
    ("flags", "contradiction", "same"),
    [
        ([*BEST, "--n_epochs", 9], ["--d_norm", "batch"], ["--lr_fall", 1.0]),
        ([*OTHERS, "--n_epochs", 4], ["--fake_class_loss", "on"], ["--d_steps", 2]),
    ],
    ids=["best", "others"],
)
def test_run_with_switches_resumes_bit_exactly_and_its_weights_draw(flags, contradiction, same, train, tmp_path):
    flags = [*SMALL, *flags]  # nine batches, and eight
    assert train(*flags, "--out_dir", tmp_path / "straight").status == 0
    with stopped_after(5):
        assert train(*flags, "--out_dir", tmp_path / "run").status == 143
    line = errors(train("--resume", tmp_path / "run", *contradiction))
    assert f"argument --resume: the checkpoint has {contradiction[0]} " in line
    result = train("--resume", tmp_path / "run", *same)
    assert result.status == 0 and "Pretrained" not in result.err
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    weights = ["--weights", tmp_path / "run", "--out", tmp_path / "a.png", "--device", "cpu"]
    assert call(generate.main, "2026", *weights).status == 0
    for part, file in FILES.items():  # the checkpoint alone rebuilds the same networks
        weights = load_network(tmp_path / "run" / file)
        (tmp_path / "run" / file).unlink()
        network = load_trained(tmp_path / "run", part, networks=NETWORKS)
        assert network.config == weights.config and network.file.name == NEWEST
        assert all(map(torch.equal, network.state_dict().values(), weights.state_dict().values()))


def test_runs_with_switches_have_every_switch():
    names = {flag[2:] for flag in OTHERS if str(flag).startswith("--")}
    assert names | set(RECIPES["best"]) >= set(departures.FLAGS) - {"recipe"}


def test_recipe_sets_defaults_and_a_flag_beside_it_wins():
    best, mixed = options(*BEST), options("--r1", 3, "--recipe=best", "--lr", 0.5)
    assert {name: getattr(best, name) for name in RECIPES["best"]} == RECIPES["best"]
    assert (mixed.r1, mixed.lr, mixed.class_head) == (3, 0.5, best.class_head)
    assert departures.step(best, 100).whole_r1
    shown = call(acgan.main, *BEST, "--help").out
    assert re.search(r"--r1 GAMMA .*\(default:\s+0\.05\)", " ".join(shown.split()))
    for without in (["--r1", 0], ["--class_head", "aux"]):  # nothing is left for the recipe's --r1_on whole to act on
        assert not departures.step(options(*BEST, *without), 100).whole_r1


def test_run_can_start_from_one_file_with_layers_of_other_sizes_and_not_from_another_function(plain, train, tmp_path):
    flags = [*SMALL, "--max_steps", 1, "--latent_dim", 3, "--init_from", plain / "acgan_gen.pth"]
    result = train(*flags, "--out_dir", tmp_path / "resized")
    assert "acgan_gen.pth, after batch 4; new, as their sizes differ: label_emb.weight, l1.0.weight.\n" in result.err
    assert "Discriminator" not in result.err
    result = train("--resume", tmp_path / "resized", "--max_steps", 2)
    assert "starts from" not in result.err
    config = json.loads((tmp_path / "resized" / "config.json").read_text())
    assert config["options"]["init_from"] == str(plain / "acgan_gen.pth") and len(read_rows(tmp_path / "resized")) == 2
    flags = [*SMALL, "--max_steps", 1, "--init_from", plain]
    line = errors(train(*flags, "--bn_eps", 1e-5, "--out_dir", tmp_path / "other"))
    assert "--init_from: the weights of" in line and "are for bn_eps 0.8, not 1e-05: give this run" in line
    line = errors(train("--resume", plain, *flags[-2:]))
    assert "--init_from: a run that continues has begun already" in line
    assert not (tmp_path / "other").exists()


def test_networks_of_the_best_recipe_have_the_tutorials_convolutions():
    generator, discriminator = networks(*BEST)
    for network, plain in [(generator, Generator()), (discriminator, Discriminator())]:
        shapes, wanted = ([layer.weight.shape for layer in net.modules() if isinstance(layer, nn.Conv2d)]
                          for net in (network, plain))  # fmt: skip
        assert shapes == wanted
    assert (generator.l1[0].in_features, discriminator.aux_layer[0].out_features) == (200, 20)


def test_rows_of_the_search_make_a_table_and_a_cut_one_is_left_out(tmp_path):
    scores = dict(agreement=0.5, fid=1.0, coverage=0.5, ms_ssim=0.4)
    rows = [dict(name="a", seed=seed, batches=1000, cas=cas, **scores) for seed, cas in [(0, 0.9), (1, 0.8)]]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"name": "b", "se')
    assert recipe.read_rows(path) == rows
    assert recipe.table(rows).splitlines()[-1] == (
        "| a | 1,000 | 2 | 0.500 | 1.000 | 0.500 | 0.850 | 0.400 | 0.800 to 0.900 |"
    )
    gone = {"--d_width", "on"}  # flags of an earlier commit, which the module names
    names = {row["name"] for row in recipe.read_rows(recipe.ROWS) if not gone & set(row["flags"])}
    assert names and names <= set(recipe.VARIANTS)  # each committed row has its command
