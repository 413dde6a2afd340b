"""ACGAN on MNIST: a faithful and faster reproduction of "GAN Step By Step", Step 5.

Paper: Odena, Olah, Shlens, "Conditional Image Synthesis with Auxiliary Classifier GANs", arXiv:1610.09585.

    python acgan.py --n_epochs 200             # train; grids in images/, curves in logs/
    python acgan.py --max_steps 20 --seed 0    # a quick look
    python acgan.py --resume                   # continue after an interruption
    tensorboard --logdir logs                  # watch the curves
"""

import argparse
import copy
import math
import secrets
import sys
import zlib
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    import before_torch  # noqa: F401

import torch

from cli import COUNT, IMG_SIZE, SEED, OneLineParser, add_device_flag, number, report_error, run_command
from data import NAMES, LabelledImages, check_data_root, load_dataset
from data.batches import Batches
from drawing import draw_images, draw_labels, draw_noise, fixed_noise, sample_image
from evaluation.scorecard import EpochScorer
from models import update_ema
from recipes import DEPARTURES, add_departure_flags, apply_recipe, build_networks, build_objective, check_departures
from training import departures
from training.checkpoint import Checkpoints, check_finished, describe_last, has_checkpoint, read_checkpoint, restore
from training.distributed import LostRank, Ranks, was_restarted
from training.record import RunRecord, SilentRecord
from training.run_folder import check_out_dir
from training.speed import accelerate, choose_compile, tune_process
from utils import BadInput, Diverged, StopRequest, announce, choose_device, counted, nearest_folder, seed_everything

# fmt: off
# Options that change what is computed: a resumed run must have the checkpoint's.
MATHEMATICS = ("seed", "batch_size", "lr", "b1", "b2", "latent_dim", "n_classes", "img_size", "channels", "amp",
               "dataset", *DEPARTURES)
# Options that a resumed run takes from the checkpoint unless they are given.
CONTINUED = ("n_epochs", "sample_interval", "log_interval", "checkpoint_interval", "eval_interval", "judge", "ema",
             "compile", "n_cpu")
# fmt: on


def train_step(generator, discriminator, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels,
               objective=departures.Objective(), penalty=None):  # fmt: skip # noqa: B008 (it cannot change)
    """Update D once, then G once, on one batch (tutorial, "训练过程").

    Args:
        real_imgs, labels: real images, float32 (B, C, H, W) in [-1, 1], and their classes, int64 (B,).
        z, gen_labels: noise, float32 (B, latent_dim), and the classes to draw, int64 (B,).
        objective: the terms of both losses; by default the tutorial's.
        penalty: what D's loss gets besides, as a function of the real images and classes; None in the tutorial.

    Returns:
        0-d float tensors on the training device, which are recorded under these names: the losses and their parts, and
        the share of classes that D gets right before its update.
    """
    valid = torch.ones(len(labels), 1, device=labels.device)
    fake = torch.zeros(len(labels), 1, device=labels.device)

    gen_imgs = generator(z, gen_labels)  # one forward serves both updates

    # (1) Train Discriminator: minimise, as a mean over the four terms (P, by default: the softmax of D's softmax),
    #     L_D = - E log D(x) - E log P(c | x) - E log[1 - D(G(z|y))] - E log P(y | G(z|y))      (paper: max L_S + L_C)
    optimizer_D.zero_grad()

    real_pred, real_aux = discriminator(real_imgs)  # (B, 1), (B, n_classes)
    d_real_adv, d_real_aux = objective.adversarial(real_pred, valid), objective.real_class(real_aux, labels)
    d_real_loss = (d_real_adv + d_real_aux) / 2

    fake_pred, fake_aux = discriminator(gen_imgs.detach())
    d_fake_adv, d_fake_aux = objective.adversarial(fake_pred, fake), objective.fake_class(fake_aux, gen_labels)
    d_fake_loss = (d_fake_adv + d_fake_aux) / 2

    d_loss = (d_real_loss + d_fake_loss) / 2
    d_penalty = penalty(real_imgs, labels) if penalty else None
    (d_loss if d_penalty is None else d_loss + d_penalty).backward()
    optimizer_D.step()

    # (2) Train Generator: minimise, through the D just updated and on the same fakes,
    #     L_G = - E log D(G(z|y)) - E log P(y | G(z|y))                                         (paper: max L_C - L_S)
    optimizer_G.zero_grad()
    discriminator.requires_grad_(False)  # the gradients of its own weights are not needed

    validity, pred_label = discriminator(gen_imgs)
    g_adv, g_aux = objective.adversarial(validity, valid), objective.generator_class(pred_label, gen_labels)

    g_loss = (g_adv + g_aux) / 2
    g_loss.backward()
    optimizer_G.step()
    discriminator.requires_grad_(True)

    d_acc_real = (objective.recognised(real_aux) == labels).float().mean()
    d_acc_fake = (objective.recognised(fake_aux) == gen_labels).float().mean()
    metrics = dict(
        d_loss=d_loss, d_real_adv=d_real_adv, d_real_aux=d_real_aux, d_fake_adv=d_fake_adv, d_fake_aux=d_fake_aux,
        g_loss=g_loss, g_adv=g_adv, g_aux=g_aux,
        d_acc=(d_acc_real + d_acc_fake) / 2, d_acc_real=d_acc_real, d_acc_fake=d_acc_fake,
        **({} if d_penalty is None else {"d_penalty": d_penalty}),
    )  # fmt: skip
    return {name: value.detach() for name, value in metrics.items()}


def train(opt: argparse.Namespace, ranks: Ranks, batches: Batches, scorer: EpochScorer, checkpoint: dict | None) -> int:
    """Run the training, or the rest of it after `checkpoint`, up to batch `opt.total_steps`.

    Returns the exit status: 0, or 128 + the number of the signal that stopped it. Raises Diverged, LostRank, BadInput
    if the checkpoint does not fit, and OSError if the last checkpoint or the weights cannot be written.
    """
    seed_everything(opt.seed)
    device = ranks.device
    generator, discriminator, graph_inputs = build_networks(opt, device)
    objective = build_objective(opt)
    on_cuda = device.type == "cuda"  # there the step counts stay on the GPU, as a CUDA graph needs them
    adam = dict(lr=departures.first_rate(opt, device), betas=(opt.b1, opt.b2), fused=True, capturable=on_cuda)
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)
    ema = copy.deepcopy(generator)
    parts = dict(generator=generator, discriminator=discriminator, optimizer_G=optimizer_G, optimizer_D=optimizer_D,
                 batches=batches, ema=ema)  # fmt: skip
    step = restore(checkpoint, parts, device) if checkpoint else 0
    penalty = partial(objective.penalty, discriminator)

    def train_batch(generator, discriminator, indices, penalised):  # wrapped or compiled, of the same parameters
        real_imgs, labels = batches.gather(indices)
        z = draw_noise(len(indices), opt.latent_dim, device)
        gen_labels = batches.in_order(draw_labels(len(indices), opt.n_classes, device))
        return train_step(generator, discriminator, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels,
                          objective, penalty if penalised else None)  # fmt: skip

    networks = ranks.wrap(generator, discriminator)
    fast_batch = accelerate(train_batch, *networks, opt.batch_size, opt.compile, opt.amp, batches.in_memory)
    departures.pretrain_class_head(opt, step, networks[1], objective, batches)
    fixed_z, fixed_labels = fixed_noise(opt.n_classes, opt.latent_dim)

    Record = SilentRecord if ranks.rank else RunRecord
    with StopRequest() as stop, Record(opt, device, len(batches), step) as record:
        checkpoints = Checkpoints(opt, device, record, parts)
        record.graph(generator, discriminator, *graph_inputs)
        for epoch in range(step // len(batches), opt.n_epochs):
            for indices in record.progress(epoch, batches):
                ranks.reseed(opt.seed, step)
                departures.set_learning_rate(opt, step, optimizer_G, optimizer_D)
                metrics = fast_batch(indices, objective.penalised(step))
                update_ema(ema, generator, opt.ema, step + 1)

                if step % opt.sample_interval == 0:
                    fake_image = sample_image(generator, opt.n_classes, opt.latent_dim, device)
                    record.grid("fake_image", fake_image, step)
                    record.grid("fixed_z", draw_images(generator, fixed_z, fixed_labels), step)
                record.batch(step, metrics)
                step += 1  # from here on the batches done, not the number of this one
                ended = ranks.any(stop.requested) or step == opt.total_steps  # every rank must ask
                if batches.position == len(batches) or ended:
                    record.end_epoch(step - 1, batches.gather(indices)[0], metrics)
                scorer.if_due(step, record, ema, discriminator)
                if ended:
                    break
                checkpoints.save_if_due(step)  # after the scores, or a kill between the two would lose them
            if ended:
                break
        record.grid("fixed_z", draw_images(generator, fixed_z, fixed_labels), step - 1)
        checkpoints.finish(step, finished=step == opt.total_steps)
    return stop.exit_status if step < opt.total_steps else 0


def parse_args(argv: list[str] | None = None, saved: dict | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2.

    `saved`, the options of a checkpoint to resume, replace the defaults and pass the same checks as typed ones.
    """
    rate = number(float, "a number above 0, such as 0.0002", lambda value: value > 0)
    beta = number(float, "a number in [0, 1), such as 0.5", lambda value: 0 <= value < 1)
    parser = OneLineParser("acgan.py", "Train an auxiliary-classifier GAN as the tutorial does.")
    # fmt: off
    add = parser.add_argument_group("training").add_argument
    add("--n_epochs", type=COUNT, default=200, metavar="N", help="passes over the data")
    add("--max_steps", type=COUNT, metavar="N", help="stop after N batches, for a quick look (default: no limit)")
    add("--batch_size", type=COUNT, default=64, metavar="N", help="images a batch, on each rank of torchrun")
    add("--lr", type=rate, default=0.0002, metavar="X", help="Adam: learning rate of both networks")
    add("--b1", type=beta, default=0.5, metavar="X", help="Adam: decay of the gradient's mean, in [0, 1)")
    add("--b2", type=beta, default=0.999, metavar="X", help="Adam: decay of the squared gradient's mean, in [0, 1)")
    add("--ema", type=beta, default=0.9999, metavar="X",
        help="decay of the EMA of G's weights, in [0, 1): kept beside G, it plays no part in the training")
    add("--seed", type=SEED, metavar="N", help="seed of PyTorch and NumPy (default: one is drawn and printed)")
    add = parser.add_argument_group("networks").add_argument
    add("--latent_dim", type=COUNT, default=100, metavar="N", help="size of the noise z and of the label embedding")
    add("--img_size", type=IMG_SIZE, default=32, metavar="N", help="image side, pixels: a multiple of 4, at least 16")
    add("--n_classes", type=COUNT, metavar="N", help="classes, only as a check (default: those of the data)")
    add("--channels", type=COUNT, metavar="N", help="image channels, only as a check (default: those of the data)")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=NAMES, default="mnist",
        help="images to learn; folder reads PNG, JPEG, WebP and BMP from DATA_ROOT/CLASS/, cropped to squares")
    add("--data_root", type=Path, metavar="DIR", help="folder of your classes' folders, or of the files of a set "
        "other than mnist, which is bundled (default: data/downloads beside acgan.py)")
    add("--n_cpu", type=COUNT, default=8, metavar="N", help="workers, at most one a core, that decode a large folder")
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
    add("--log_interval", type=COUNT, default=50, metavar="N", help="batches between rows of metrics.jsonl, and points")
    add("--eval_interval", type=COUNT, metavar="N", help="epochs between scores of the EMA, of which the best is kept; "
        "needs requirements-eval.txt (default: no scores)")
    add("--judge", type=Path, metavar="FILE", help="judge for the scores, of train_judge.py (default: the bundled one)")
    # fmt: on
    add_departure_flags(parser)

    argv = sys.argv[1:] if argv is None else argv
    apply_recipe(parser, argv)
    if saved is not None:
        given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(MATHEMATICS)))
        if given.init_from and given.resume is not None:  # torchrun's restart is typed as the run was begun
            parser.error("argument --init_from: a run that continues has begun already: drop it")
        typed = {name: getattr(given, name) for name in MATHEMATICS if getattr(given, name) is not None}
        saved = {name: parser.get_default(name) for name in DEPARTURES} | saved  # a run from before there were any
        wrong = [f"--{name} {saved.get(name)}, not {new}" for name, new in typed.items() if new != saved.get(name)]
        if wrong:
            parser.error(f"argument --resume: the checkpoint has {'; '.join(wrong)}: drop these flags to continue")
        kept = {name: saved.get(name) for name in MATHEMATICS + CONTINUED}
        if None in [kept[name] for name in MATHEMATICS]:
            parser.error("argument --resume: the checkpoint is corrupt, as it lacks options: name another run")
        argv = [f"--{name}={value}" for name, value in kept.items() if value is not None] + argv
    opt = parser.parse_args(argv)
    check_departures(opt)
    if opt.resume and opt.out_dir not in (None, Path(opt.resume)):
        parser.error(f"argument --resume: a run continues in its own folder, {opt.resume!r}: drop --out_dir")
    opt.out_dir = Path(opt.resume or opt.out_dir or ".")
    opt.judge = opt.judge and opt.judge.absolute()  # a resumed run may start in another folder
    return opt


def check_data(opt: argparse.Namespace, data: LabelledImages, batches: Batches, checkpoint: dict | None) -> None:
    """Set the options that depend on the data: classes, channels, a checksum, the run's number of batches.

    Raises BadInput if they differ from those asked for or those of the checkpoint, or if no batch is left to do.
    """
    opt.classes, opt.n_images = data.classes, len(data.labels)
    opt.labels_crc32 = zlib.crc32(data.labels.numpy().tobytes())
    if checkpoint and any(checkpoint["options"][k] != getattr(opt, k) for k in ("classes", "n_images", "labels_crc32")):
        raise BadInput("argument --resume: the checkpoint is from other images: name its own --data_root")
    for name, found in [("n_classes", len(data.classes)), ("channels", data.images.shape[1])]:
        if getattr(opt, name) not in (None, found):
            raise BadInput(f"argument --{name}: {opt.dataset} has {found}, not {getattr(opt, name)}: drop the flag")
        setattr(opt, name, found)
    batches.check(opt.img_size)
    opt.total_steps = min(opt.max_steps or math.inf, opt.n_epochs * len(batches))
    departures.set_schedule(opt, checkpoint)
    if checkpoint and checkpoint["step"] >= opt.total_steps:
        raise BadInput(f"argument --resume: {checkpoint['step']:,} batches are done: raise --n_epochs or --max_steps")


def start(argv: list[str] | None) -> int:
    """Check everything first, then train. Returns the exit status; raises what cli.run_command reports."""
    opt = parse_args(argv)
    checkpoint = None
    if opt.resume is not None or (was_restarted() and has_checkpoint(opt.out_dir)):
        checkpoint = read_checkpoint(opt.out_dir)
        opt = parse_args(argv, checkpoint["options"])
    check_data_root(opt.dataset, opt.data_root)
    device, _ = choose_device(opt.device)
    tune_process(device, checkpoint["options"].get("threads") if checkpoint else None)
    ranks = Ranks(device)
    opt.world_size, opt.threads = ranks.world_size, torch.get_num_threads()
    if checkpoint and checkpoint["options"]["world_size"] != opt.world_size:
        wanted = checkpoint["options"]["world_size"]
        raise BadInput(f"argument --resume: the run has {wanted} ranks, not {opt.world_size}: start as many")
    check_out_dir(opt.out_dir)
    if not checkpoint:
        check_finished(opt.out_dir)
    try:
        with ranks.rank_0_first():  # it alone downloads
            data = load_dataset(opt.dataset, opt.data_root, opt.img_size, opt.n_cpu, nearest_folder(opt.out_dir))
        batches = Batches(data, opt.batch_size, ranks.device, ranks, by_class=opt.d_deviation == "class")
        check_data(opt, data, batches, checkpoint)
        opt.compile = choose_compile(opt, ranks.device)
        interval = opt.eval_interval * len(batches) if opt.eval_interval and not ranks.rank else None
        scorer = EpochScorer(interval, opt.judge, data, ranks.device)
        if opt.seed is None:
            opt.seed = ranks.broadcast(secrets.randbelow(2**32))  # the range that NumPy accepts
            announce(f"Seed: {opt.seed}; --seed {opt.seed} repeats this run.")
        announce(choose_device(opt.device)[1])  # with the threads that are set by now
        kind = "grey" if opt.channels == 1 else "colour"
        announce(f"Data: {opt.dataset}, {counted(opt.n_images, f'{kind} image')} of {opt.n_classes} classes.")
        if checkpoint:
            announce(f"Resuming after batch {checkpoint['step']:,} of {opt.total_steps:,}.")
            if any(checkpoint["options"][name] != getattr(opt, name) for name in ("sample_interval", "compile")):
                announce("Another --sample_interval or --compile: the run resumes, but not bit-exactly.")
        status = train(opt, ranks, batches, scorer, checkpoint)
    except (Diverged, LostRank) as error:
        report_error("acgan.py", f"{error}; {describe_last(opt.out_dir)}")
        return 1
    ranks.close()
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status: that of cli.run_command, or 1 if the training failed."""
    too_large = "lower --batch_size, --img_size, --latent_dim or --d_width"
    return run_command("acgan.py", lambda: start(argv), too_large, stopped="what the last checkpoint holds is kept")


if __name__ == "__main__":
    sys.exit(main())
