"""ACGAN on MNIST: faithful to "GAN Step By Step", Step 5, and faster.

python acgan.py --n_epochs 200             # train; grids in images/
python acgan.py --recipe best              # far better digits, sooner
python acgan.py --resume                   # go on after an interruption
tensorboard --logdir logs                  # watch the curves

Paper: Odena, Olah, Shlens, "Conditional Image Synthesis with Auxiliary
Classifier GANs", arXiv:1610.09585. What a recipe changes: departures.py.
"""

import argparse
import copy
import sys
from pathlib import Path

if __name__ == "__main__":
    import before_torch  # noqa: F401

import torch
from torch import nn

import departures
import fast
from data import NAMES, add_bad_images_flag, check_data_root, load_dataset
from data.batches import Batches
from data.drawing import draw_graph_inputs, draw_labels, draw_noise, sample_image
from evaluation.during_training import EpochScorer
from fast.process import tune_process
from models import Discriminator, Generator, weights_init_normal
from run.checkpoint import Checkpoints, check_finished, describe_last, has_checkpoint, read_to_resume, restore
from run.folder import check_out_dir
from run.loop import Run
from run.plan import Plan, how_to_read, make_plan
from run.ranks import LostRank, Ranks, was_restarted
from run.record import check_tensorboard
from run.resume import CONTINUED, with_saved_options
from run.trained import start_from
from run.weights import update_ema
from utils import (
    COUNT,
    IMG_SIZE,
    SEED,
    BadInput,
    Diverged,
    OneLineParser,
    add_device_flag,
    announce,
    choose_device,
    counted,
    nearest_folder,
    number,
    report_error,
    run_command,
    seed_everything,
)

adversarial_loss, auxiliary_loss = nn.BCELoss(), nn.CrossEntropyLoss()


def train_step(generator, discriminator, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels) -> dict:
    """Update D once, then G once, on one batch (tutorial, "训练过程"). Where it departs, departures.Step does it.

    Args:
        real_imgs, labels: real images, float32 (B, C, H, W) in [-1, 1], and their classes, int64 (B,).
        z, gen_labels: noise, float32 (B, latent_dim), and the classes to draw, int64 (B,).

    Returns:
        0-d float tensors on the training device, which are recorded under these names: the losses and their parts, and
        the share of classes that D gets right before its update.
    """
    valid = torch.ones(len(labels), 1, device=labels.device)
    fake = torch.zeros(len(labels), 1, device=labels.device)

    gen_imgs = generator(z, gen_labels)  # one forward serves both updates

    # (1) Train Discriminator: minimise the mean of the four terms (P: the softmax of D's softmax, a quirk)
    #     L_D = - E log D(x) - E log P(c | x) - E log[1 - D(G(z|y))] - E log P(y | G(z|y))      (paper: max L_S + L_C)
    optimizer_D.zero_grad()

    real_pred, real_aux = discriminator(real_imgs)  # (B, 1), (B, n_classes)
    d_real_adv, d_real_aux = adversarial_loss(real_pred, valid), auxiliary_loss(real_aux, labels)
    d_real_loss = (d_real_adv + d_real_aux) / 2

    fake_pred, fake_aux = discriminator(gen_imgs.detach())
    d_fake_adv, d_fake_aux = adversarial_loss(fake_pred, fake), auxiliary_loss(fake_aux, gen_labels)
    d_fake_loss = (d_fake_adv + d_fake_aux) / 2

    d_loss = (d_real_loss + d_fake_loss) / 2
    d_loss.backward()
    optimizer_D.step()

    # (2) Train Generator: minimise the mean of two terms, through the D just updated and on the same fakes
    #     L_G = - E log D(G(z|y)) - E log P(y | G(z|y))                                         (paper: max L_C - L_S)
    optimizer_G.zero_grad()
    discriminator.requires_grad_(False)  # only faster: nobody needs the gradients of D's own weights here

    validity, pred_label = discriminator(gen_imgs)
    g_adv, g_aux = adversarial_loss(validity, valid), auxiliary_loss(pred_label, gen_labels)

    g_loss = (g_adv + g_aux) / 2
    g_loss.backward()
    optimizer_G.step()
    discriminator.requires_grad_(True)

    d_acc_real = (real_aux.argmax(1) == labels).float().mean()
    d_acc_fake = (fake_aux.argmax(1) == gen_labels).float().mean()
    metrics = dict(
        d_loss=d_loss, d_real_adv=d_real_adv, d_real_aux=d_real_aux, d_fake_adv=d_fake_adv, d_fake_aux=d_fake_aux,
        g_loss=g_loss, g_adv=g_adv, g_aux=g_aux,
        d_acc=(d_acc_real + d_acc_fake) / 2, d_acc_real=d_acc_real, d_acc_fake=d_acc_fake,
    )  # fmt: skip
    return {name: value.detach() for name, value in metrics.items()}


def train(opt: argparse.Namespace, plan: Plan, ranks: Ranks, batches: Batches, scorer, checkpoint: dict | None) -> int:
    """Run the training, or the rest of it after `checkpoint`, up to batch `plan.total_steps`.

    Returns the exit status: 0, or 128 + the number of the signal that stopped it. Raises Diverged and LostRank;
    BadInput if checkpoint or --init_from do not fit; OSError if the last checkpoint or the weights cannot be written.
    """
    # The random numbers are drawn in the tutorial's order: G, D, what its graphs take, then the initialisation.
    seed_everything(plan.seed)
    generator, discriminator = departures.networks(opt, plan.n_classes, plan.channels) or (
        Generator(plan.n_classes, opt.latent_dim, opt.img_size, plan.channels),
        Discriminator(plan.n_classes, opt.img_size, plan.channels),
    )
    graph_inputs = draw_graph_inputs(plan.n_classes, opt.latent_dim, opt.img_size, plan.channels)
    generator.apply(weights_init_normal)
    discriminator.apply(weights_init_normal)
    if opt.init_from and not checkpoint:
        start_from(opt.init_from, generator, discriminator, plan.classes)
    as_printed = copy.deepcopy((generator, discriminator))  # for TensorBoard's graph

    device = ranks.device
    generator, discriminator = generator.to(device), discriminator.to(device)
    fast.use_fast_layers(generator, discriminator)
    adam = dict(lr=opt.lr, betas=(opt.b1, opt.b2), fused=True, capturable=device.type == "cuda")
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)
    ema = copy.deepcopy(generator)  # the average of G's weights: it plays no part in the training
    parts = dict(generator=generator, discriminator=discriminator, optimizer_G=optimizer_G, optimizer_D=optimizer_D,
                 batches=batches, ema=ema)  # fmt: skip
    done = restore(checkpoint, parts, device) if checkpoint else 0

    update = departures.step(opt, plan.schedule_steps) or train_step

    def train_batch(G, D, indices):
        real_imgs, labels = batches.gather(indices)
        n_fakes = batches.n_fakes(indices)  # in the tutorial as many as real ones
        z = draw_noise(n_fakes, opt.latent_dim, device)
        gen_labels = batches.in_order(draw_labels(n_fakes, plan.n_classes, device))
        return update(G, D, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels)

    networks = ranks.wrap(generator, discriminator)
    fast_batch = fast.batch(train_batch, update, networks, (optimizer_G, optimizer_D), opt, plan, batches)
    if opt.pretrain_class_head and not done:
        departures.pretrain_class_head(opt, networks[1], batches)

    with Run(opt, plan, ranks, batches, parts, scorer, done) as run:
        run.graph(*as_printed, *graph_inputs)
        del as_printed
        for epoch in run.epochs():
            for indices in run.batches(epoch):
                metrics = fast_batch(indices, run.step)
                update_ema(ema, generator, opt.ema, run.step + 1)
                if run.step % opt.sample_interval == 0:
                    run.grids(sample_image(generator, plan.n_classes, opt.latent_dim, device))
                run.after_batch(metrics)  # the row, the epoch's end, scores, a checkpoint: what is due
        return run.finish()


def parse_args(argv: list[str] | None = None, saved: dict | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2.

    `saved`, the options of a checkpoint to resume, replace the defaults and pass the same checks as typed ones.
    """
    rate = number(float, "a number above 0, such as 0.0002", lambda value: value > 0)
    beta = number(float, "a number in [0, 1), such as 0.5", lambda value: 0 <= value < 1)
    parser = OneLineParser("acgan.py", __doc__)
    # fmt: off
    add = parser.add_argument_group("training").add_argument
    add("--n_epochs", type=COUNT, default=200, metavar="N", help="passes over the data")
    add("--max_steps", type=COUNT, metavar="N", help="end after N batches, in which --lr_schedule "
        "linear brings the rate to 0; --resume needs it typed again (default: no limit)")
    add("--batch_size", type=COUNT, default=64, metavar="N", help="images a batch, on each rank of torchrun")
    add("--lr", type=rate, default=0.0002, metavar="X", help="Adam: learning rate of both networks")
    add("--b1", type=beta, default=0.5, metavar="X", help="Adam: decay of the gradient's mean, in [0, 1)")
    add("--b2", type=beta, default=0.999, metavar="X", help="Adam: decay of the squared gradient's mean, in [0, 1)")
    add("--ema", type=beta, default=0.9999, metavar="X",
        help="decay of the EMA of G's weights, in [0, 1): kept beside G, it plays no part in the training")
    add("--seed", type=SEED, metavar="N", help="seed of PyTorch and NumPy (default: one is drawn and printed)")
    add("--init_from", type=Path, metavar="PATH", help="start G and D from a run's folder, or one of them from a "
        "weight file, matching classes by name: to fine-tune on other images, say (default: random weights)")
    add = parser.add_argument_group("networks").add_argument
    add("--latent_dim", type=COUNT, default=100, metavar="N", help="size of the noise z and of the label embedding")
    add("--img_size", type=IMG_SIZE, default=32, metavar="N", help="image side, pixels: a multiple of 4, at least 16")
    add("--n_classes", type=COUNT, metavar="N", help="classes, only as a check (default: those of the data)")
    add("--channels", type=COUNT, metavar="N", help="image channels: 1 or 3 turns a folder's images into grey or "
        "colour, else only a check (default: those of the data)")
    add = (group := parser.add_argument_group("data")).add_argument
    add("--dataset", choices=NAMES, default="mnist",
        help="images to learn; folder reads PNG, JPEG, WebP and more from DATA_ROOT/CLASS/, cropped to squares")
    add("--data_root", type=Path, metavar="DIR", help="folder of your classes' folders, or of the files of a set "
        "other than mnist, which is bundled (default: data/downloads beside acgan.py)")
    add("--n_cpu", type=COUNT, default=8, metavar="N", help="threads, at most one a core, that decode large files")
    add_bad_images_flag(group)
    group = parser.add_argument_group("speed")
    add = group.add_argument
    add_device_flag(group := group.add_mutually_exclusive_group())
    group.add_argument("--cuda", dest="device", action="store_const", const="cuda", default="auto",
                       help="the same as --device cuda; in the tutorial's script it turns the GPU off (default: off)")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile G; auto does so on "
        "a CPU, on one rank, in runs long enough to win the time back")
    add("--amp", choices=["off", "bf16"], default="off", help="bf16: compute in bfloat16 where safe, rounding more")
    add = parser.add_argument_group("what a run writes").add_argument
    add("--out_dir", type=Path, metavar="DIR", help="folder for all that a run writes (default: the current folder)")
    add("--resume", nargs="?", const="", metavar="RUN", help="continue the run in folder RUN (default: --out_dir) with "
        f"its options; of those that it keeps, only {', '.join(f'--{name}' for name in CONTINUED)} may differ")
    add("--checkpoint_interval", type=COUNT, metavar="N",
        help=f"batches between checkpoints (default: one every {Checkpoints.SECONDS} seconds)")
    add("--sample_interval", type=COUNT, default=400, metavar="N", help="batches between sample grids")
    add("--log_interval", type=COUNT, default=50, metavar="N", help="batches between rows of metrics.jsonl, "
        "and between TensorBoard's points")
    add("--eval_interval", type=COUNT, metavar="N", help="epochs between scores of the EMA, of which the best is kept; "
        "needs requirements-eval.txt (default: no scores)")
    add("--judge", type=Path, metavar="FILE", help="judge for the scores, of train_judge.py (default: the bundled one)")
    # fmt: on
    departures.add_flags(parser)

    argv = sys.argv[1:] if argv is None else argv
    if saved is None:
        departures.apply_recipe(parser, argv)
    else:
        argv = with_saved_options(parser, argv, saved)
    opt = parser.parse_args(argv)
    if opt.init_from and not saved and not opt.init_from.exists():
        parser.error(f"argument --init_from: there is no {str(opt.init_from)!r}: name a run's folder or a weight file")
    if opt.resume and opt.out_dir not in (None, Path(opt.resume)):
        parser.error(f"argument --resume: a run continues in its own folder, {opt.resume!r}: drop --out_dir")
    opt.out_dir = Path(opt.resume or opt.out_dir or ".")
    opt.judge = opt.judge and opt.judge.absolute()  # a resumed run may start in another folder
    return opt


def start(argv: list[str] | None) -> int:
    """Check everything first, then train. Returns the exit status; raises what utils.run_command reports."""
    opt, checkpoint = parse_args(argv), None
    if opt.resume is not None or (was_restarted() and has_checkpoint(opt.out_dir)):
        checkpoint = read_to_resume(opt.out_dir)
        opt = parse_args(argv, checkpoint["options"] | checkpoint["plan"])
    departures.check(opt)
    before = checkpoint["plan"] if checkpoint else None
    check_data_root(opt.dataset, opt.data_root, None if checkpoint else opt.out_dir)
    device, _ = choose_device(opt.device)
    tune_process(device, before["threads"] if before else None)
    ranks = Ranks(device)
    if before and before["world_size"] != ranks.world_size:
        wanted = before["world_size"]
        raise BadInput(f"argument --resume: the run has {wanted} ranks, not {ranks.world_size}: start as many")
    check_out_dir(opt.out_dir)
    if not checkpoint:
        check_finished(opt.out_dir)
    if not ranks.rank:
        check_tensorboard()
    try:
        with ranks.rank_0_first():  # it alone downloads, and scores
            scratch, reading = nearest_folder(opt.out_dir), how_to_read(opt, before)
            data = load_dataset(opt.dataset, opt.data_root, opt.img_size, opt.n_cpu, scratch, reading)
            batches = Batches(data, opt.batch_size, ranks.device, ranks, opt.d_deviation == "class", opt.d_steps)
            scorer = None
            if opt.eval_interval and not ranks.rank:
                scorer = EpochScorer(opt.eval_interval * len(batches), opt.judge, data, ranks.device)
        plan = make_plan(opt, data, batches, ranks, checkpoint)
        if opt.seed is None:
            announce(f"Seed: {plan.seed}; --seed {plan.seed} repeats this run.")
        announce(choose_device(opt.device)[1])  # with the threads that are set by now
        kind = "grey" if plan.channels == 1 else "colour"
        announce(f"Data: {opt.dataset}, {counted(plan.n_images, f'{kind} image')} of {plan.n_classes} classes.")
        if checkpoint:
            announce(f"Resuming after batch {checkpoint['step']:,} of {plan.total_steps:,}.")
            if checkpoint["options"].get("sample_interval") != opt.sample_interval or before["compile"] != plan.compile:
                announce("Another --sample_interval or --compile: the run resumes, but not bit-exactly.")
        status = train(opt, plan, ranks, batches, scorer, checkpoint)
    except (Diverged, LostRank) as error:
        report_error("acgan.py", f"{error}; {describe_last(opt.out_dir, checkpoint)}")
        return 1
    ranks.close()
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status: that of utils.run_command, or 1 if the training failed."""
    too_large = "lower --batch_size, --img_size or --latent_dim"
    return run_command("acgan.py", lambda: start(argv), too_large, stopped="what the last checkpoint holds is kept")


if __name__ == "__main__":
    sys.exit(main())
