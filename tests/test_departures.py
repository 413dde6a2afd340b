"""The departures from the tutorial: each switch changes what it should, in every kind of run, and nothing else."""

import json
import re

import pytest
import small
import torch
import torch.nn.functional as F
from conftest import assert_same_run, call, errors, read_rows

import acgan
import generate
from benchmarks import recipe
from data.batches import Batches
from models import Discriminator, Generator, load_network
from recipes import DEPARTURES, RECIPES, build_networks, build_objective
from training import departures
from training.departures import Objective

SMALL = ["--seed", 6, "--batch_size", 24, "--img_size", 16, "--log_interval", 1, "--sample_interval", 4]
SWITCHES = [  # every one of them away from the tutorial
    ["--class_loss", "logits"],
    ["--bn_eps", 1e-5],
    ["--conditioning", "concat"],
    ["--fake_class_loss", "off"],
    ["--class_head", "2k"],
    ["--d_norm", "none"],
    ["--d_dropout", 0],
    ["--d_width", 2],
    ["--d_deviation", "on"],
    ["--r1", 0.2],
    ["--r1_on", "whole", "--r1", 0.2, "--class_head", "2k"],
    ["--pretrain_class_head", 1],
    ["--lr_schedule", "linear"],
]


def options(*flags):
    opt = acgan.parse_args([str(flag) for flag in flags])
    opt.n_classes, opt.channels, opt.classes = 10, 1, list("0123456789")
    return opt


def networks(*flags):
    torch.manual_seed(0)
    return build_networks(options(*flags), torch.device("cpu"))[:2]


@pytest.mark.faithful
def test_without_switches_all_is_the_tutorials():
    opt = options()
    assert options("--recipe", "faithful").__dict__ == opt.__dict__
    generator, discriminator = networks()
    for network in (generator, discriminator):
        assert network.config.items() >= network.TUTORIAL.items()
    assert build_objective(opt) == Objective()
    assert all(departures.learning_rate(opt, step) == 0.0002 for step in (0, 10**6))
    assert not any(Objective().penalised(step) for step in range(10))
    assert {flags[0][2:] for flags in SWITCHES} == set(DEPARTURES) - {"recipe"}


@pytest.mark.faithful
def test_terms_are_those_of_the_tutorials_loss_modules():
    probabilities, labels = torch.rand(8, 10).softmax(1), torch.arange(8)
    validity, target = torch.rand(8, 1), torch.ones(8, 1)
    terms = Objective()
    assert torch.equal(terms.adversarial(validity, target), torch.nn.BCELoss()(validity, target))
    for term in (terms.real_class, terms.fake_class, terms.generator_class):
        assert torch.equal(term(probabilities, labels), torch.nn.CrossEntropyLoss()(probabilities, labels))


def test_logits_are_those_of_the_probabilities_and_the_losses_take_them():
    plain, logits = (Discriminator(img_size=16, outputs=outputs).eval() for outputs in ("probabilities", "logits"))
    logits.load_state_dict(plain.state_dict())
    imgs, labels, target = torch.randn(4, 1, 16, 16), torch.arange(4), torch.ones(4, 1)
    (validity, label), (raw_validity, raw_label) = plain(imgs), logits(imgs)
    torch.testing.assert_close(raw_label.softmax(1), label)
    torch.testing.assert_close(raw_validity.sigmoid(), validity)
    terms = build_objective(options("--class_loss", "logits"))
    torch.testing.assert_close(terms.real_class(raw_label, labels), -label[range(4), labels].log().mean())
    torch.testing.assert_close(terms.adversarial(raw_validity, target), F.binary_cross_entropy(validity, target))


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


def test_width_multiplies_the_channels_of_the_discriminator_alone():
    generator, discriminator = networks("--d_width", 3)
    convolutions = [layer for layer in discriminator.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [48, 96, 192, 384]
    assert [tuple(output.shape) for output in discriminator(torch.randn(2, 1, 32, 32))] == [(2, 1), (2, 10)]
    assert generator.config == networks()[0].config


def test_deviation_of_a_group_of_images_changes_their_validity_alone():
    discriminator = networks("--d_deviation", "on", "--d_dropout", 0, "--d_norm", "none")[1]
    imgs = torch.randn(8, 1, 32, 32)
    features = discriminator.conv_blocks(imgs).flatten(1)
    deviation = torch.cat([group.std(0, unbiased=False).expand(4, -1) for group in features.split(4)])
    layer = discriminator.adv_layer[0]
    wanted = torch.cat([features, deviation], 1) @ layer.weight.T + layer.bias
    torch.testing.assert_close(discriminator.with_logit(imgs)[0], wanted, atol=1e-4, rtol=1e-4)
    (validity, label), (short, short_label) = discriminator(imgs), discriminator(imgs[:3])
    assert len(short) == 3 and not torch.allclose(short, validity[:3])  # three images are one group
    torch.testing.assert_close(short_label, label[:3])
    alike = imgs[:1].expand(4, -1, -1, -1).clone().requires_grad_()
    discriminator(alike)[0].sum().backward()
    assert alike.grad.isfinite().all()


def test_deviation_by_class_sorts_each_batch_and_changes_nothing_else(train, tmp_path, monkeypatch):
    seen, train_step = {"on": [], "class": []}, acgan.train_step

    def watched(generator, discriminator, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels, *others):
        seen[kind].append([real_imgs.sum((1, 2, 3)), labels, z, gen_labels])
        return train_step(generator, discriminator, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels, *others)

    monkeypatch.setattr(acgan, "train_step", watched)
    for kind in seen:
        train(*SMALL, "--d_deviation", kind, "--max_steps", 3, "--out_dir", tmp_path / kind)
    assert len(seen["on"]) == len(seen["class"]) == 3
    for (imgs, labels, z, gen_labels), sorted_batch in zip(*seen.values(), strict=True):
        order = labels.argsort(stable=True)
        assert not torch.equal(labels, labels[order])
        wanted = [imgs[order], labels[order], z, gen_labels.sort().values]
        for ours, theirs in zip(sorted_batch, wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_twin_head_has_an_output_for_real_and_for_generated_of_each_class():
    discriminator = networks("--class_head", "2k")[1]
    assert discriminator(torch.randn(2, 1, 32, 32))[1].shape == (2, 20)
    terms = build_objective(options("--class_head", "2k", "--class_loss", "logits"))
    logits = torch.zeros(2, 6)  # three classes
    logits[0, 1], logits[1, 5] = 2.0, 1.0
    first, second = torch.tensor([2.0]).exp() + 5, torch.tensor([1.0]).exp() + 5  # the softmax's denominators
    labels = torch.tensor([1, 2])
    torch.testing.assert_close(terms.real_class(logits, labels), (first.log() - 2 + second.log()).mean() / 2)
    torch.testing.assert_close(terms.fake_class(logits, labels), (first.log() + second.log() - 1).mean() / 2)
    assert terms.generator_class(logits, labels).item() == pytest.approx((-2 + 1) / 2)
    assert terms.recognised(logits).tolist() == [1, 2]


def test_class_loss_on_generated_images_can_be_off():
    terms = build_objective(options("--fake_class_loss", "off"))
    assert terms.fake_class(torch.rand(4, 10), torch.arange(4)).item() == 0
    assert terms.real_class(torch.rand(4, 10), torch.arange(4)).item() > 0


def test_penalty_of_a_linear_discriminator_is_that_of_its_slope():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.full((1, 16 * 16), 0.5))

        def with_logit(self, img):
            return img.flatten(1) @ self.slope.T, None

    discriminator, terms = Linear(), Objective(r1=0.2)
    penalty = terms.penalty(discriminator, torch.randn(5, 1, 16, 16), torch.arange(5))
    assert penalty.item() == pytest.approx(0.2 / 2 * 4 * (16 * 16 * 0.25))  # every fourth batch, times four
    penalty.backward()
    torch.testing.assert_close(discriminator.slope.grad, 0.2 * 4 * discriminator.slope.detach())
    assert [terms.penalised(step) for step in range(5)] == [True, False, False, False, True]


def test_whole_penalty_is_on_the_slope_of_validity_and_class_terms_together():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slopes = torch.nn.Parameter(torch.randn(7, 16 * 16))  # of the validity, then of 2 * 3 classes

        def with_logit(self, img):
            out = img.flatten(1) @ self.slopes.T
            return out[:, :1], out[:, 1:]

    discriminator, labels = Linear(), torch.tensor([2, 0, 1, 1])
    terms = build_objective(options("--class_head", "2k", "--r1", 0.3, "--r1_on", "whole"))
    penalty = terms.penalty(discriminator, torch.randn(4, 1, 16, 16), labels)
    slopes = discriminator.slopes[0] + discriminator.slopes[1 + labels] - discriminator.slopes[4 + labels]
    torch.testing.assert_close(penalty, 0.3 / 2 * 4 * slopes.square().sum(1).mean())  # log C[y] - log C[y + K]: linear
    penalty.backward()
    assert discriminator.slopes.grad[1:].abs().sum() > 0


def test_norm_and_dropout_of_d_can_be_off():
    kinds = {type(layer) for layer in networks("--d_norm", "none", "--d_dropout", 0)[1].modules()}
    assert torch.nn.BatchNorm2d not in kinds
    discriminator = networks("--d_norm", "none", "--d_dropout", 0)[1].train()
    imgs = torch.randn(4, 1, 32, 32)
    assert torch.equal(discriminator(imgs)[1], discriminator(imgs)[1])
    discriminator = networks()[1].train()
    assert not torch.equal(discriminator(imgs)[1], discriminator(imgs)[1])


def test_pretrained_class_head_recognises_real_digits():
    opt = options("--pretrain_class_head", 12, "--lr", 0.002, "--class_loss", "logits", "--d_dropout", 0)
    discriminator, batches = networks("--class_loss", "logits")[1], Batches(small.first_digits(32), 32)
    departures.pretrain_class_head(opt, 0, discriminator, build_objective(opt), batches)
    real_imgs, labels = batches.gather(torch.arange(small.KEPT))
    with torch.no_grad():
        assert (discriminator.eval()(real_imgs)[1].argmax(1) == labels).float().mean() > 0.9


def test_rate_falls_to_0_over_the_second_half_also_when_resumed(train, tmp_path, monkeypatch):
    rates, set_rate = [], departures.set_learning_rate

    def watched(opt, step, *optimizers):
        set_rate(opt, step, *optimizers)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])

    monkeypatch.setattr(departures, "set_learning_rate", watched)
    flags = [*SMALL, "--lr_schedule", "linear", "--lr", 0.01, "--n_epochs", 3]  # nine batches
    assert train(*flags, "--out_dir", tmp_path / "straight").status == 0
    wanted = [0.01] * 5 + [0.01 * 2 * (1 - step / 9) for step in (5, 6, 7, 8)]
    assert [rate for rate, _ in rates] == [rate for _, rate in rates] == pytest.approx(wanted)
    rates.clear()
    assert train(*flags, "--out_dir", tmp_path / "run", "--max_steps", 6).status == 0
    assert rates[-1][0] == pytest.approx(0.01 * 2 * (1 - 5 / 6))  # it was planned for six
    line = errors(train("--resume", tmp_path / "run"))
    assert "--lr_schedule: the rate of this run is 0 after batch 6: add --max_steps 6, or" in line


@pytest.mark.parametrize("flags", [["--recipe", "best"], *SWITCHES], ids=lambda flags: " ".join(map(str, flags)))
def test_every_switch_trains_otherwise_and_resumes_bit_exactly(flags, train, start, tmp_path):
    plain = train(*SMALL, "--max_steps", 8, "--out_dir", tmp_path / "plain")
    result = train(*SMALL, *flags, "--n_epochs", 3, "--out_dir", tmp_path / "straight")
    assert plain.status == result.status == 0, result.err
    plain, ours = (read_rows(tmp_path / name)[-2 + at]["g_loss"] for name, at in [("plain", 1), ("straight", 0)])
    assert plain != ours
    process = start(*SMALL, *flags, "--n_epochs", 3, "--out_dir", tmp_path / "run", pause_at=5)
    process.terminate()
    process.send_signal(18)  # SIGCONT
    _, err = process.communicate()
    assert process.returncode == 143, err
    other = ["--lr_schedule", "constant"] if "linear" in flags else ["--lr_schedule", "linear"]
    if "best" not in flags:
        assert "the checkpoint has --lr_schedule" in errors(train("--resume", tmp_path / "run", *other))
    assert train("--resume", tmp_path / "run").status == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    flags = ["--weights", tmp_path / "run", "--out", tmp_path / "a.png", "--device", "cpu"]
    assert call(generate.main, "2026", *flags).status == 0


def test_recipe_sets_defaults_and_a_flag_beside_it_wins():
    best, mixed = options("--recipe", "best"), options("--r1", 3, "--recipe=best", "--lr", 0.5)
    assert {name: getattr(best, name) for name in RECIPES["best"]} == RECIPES["best"]
    assert (mixed.r1, mixed.lr, mixed.class_head) == (3, 0.5, best.class_head)
    shown = call(acgan.main, "--recipe", "best", "--help").out
    assert re.search(r"--r1 GAMMA .*\(default:\s+0\.05\)", " ".join(shown.split()))
    for without in (["--r1", 0], ["--class_head", "aux"]):  # nothing is left for the recipe's --r1_on whole to act on
        assert options("--recipe", "best", *without).r1_on == "validity"


def test_compiled_penalised_run_equals_an_eager_one(train, tmp_path):
    flags = [*SMALL, "--recipe", "best", "--lr", 0.0002, "--max_steps", 6]  # at the recipe's own, rounding grows fast
    for how in ("on", "off"):
        assert train(*flags, "--compile", how, "--out_dir", tmp_path / how).status == 0
    ours, theirs = (read_rows(tmp_path / how) for how in ("on", "off"))
    for name in ("d_loss", "g_loss", "d_penalty"):
        wanted = [row.get(name, 0) for row in theirs]
        assert [row.get(name, 0) for row in ours] == pytest.approx(wanted, rel=1e-5)
    assert ["d_penalty" in row for row in ours] == [True, False, False, False, True, False]


def test_run_can_start_from_the_weights_of_another(train, tmp_path):
    assert train(*SMALL, "--max_steps", 3, "--out_dir", tmp_path / "first").status == 0
    flags = [*SMALL, "--max_steps", 1, "--lr", 1e-12, "--init_from", tmp_path / "first"]
    result = train(*flags, "--out_dir", tmp_path / "second")
    assert f"Generator: starts from {tmp_path / 'first'}.\nDiscriminator: starts from" in result.err
    for name in ("acgan_gen.pth", "acgan_dist.pth"):
        first, second = (load_network(tmp_path / run / name) for run in ("first", "second"))
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    resized = [*flags[:-2], "--latent_dim", 50, "--init_from", tmp_path / "first" / "acgan_gen.pth"]
    result = train(*resized, "--out_dir", tmp_path / "third")
    assert "acgan_gen.pth; new, as their sizes differ: label_emb.weight, l1.0.weight.\n" in result.err
    assert "Discriminator" not in result.err
    line = errors(train(*flags, "--bn_eps", 1e-5, "--out_dir", tmp_path / "fourth"))
    assert "--init_from: the weights of" in line and "are for bn_eps 0.8, not 1e-05: give this run" in line
    line = errors(train("--resume", tmp_path / "first", *flags[-2:]))
    assert "--init_from: a run that continues has begun already" in line
    assert not (tmp_path / "fourth").exists()


def test_networks_of_the_best_recipe_have_the_tutorials_convolutions():
    generator, discriminator = networks("--recipe", "best")
    for network, plain in [(generator, Generator()), (discriminator, Discriminator())]:
        shapes, wanted = ([layer.weight.shape for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)]
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
    names = {row["name"] for row in recipe.read_rows(recipe.ROWS)}
    assert names and names <= set(recipe.VARIANTS)  # each committed row has its command
