"""ACGAN on MNIST: a faithful and faster reproduction of "GAN Step By Step", Step 5.

Paper: Odena, Olah, Shlens, "Conditional Image Synthesis with Auxiliary Classifier GANs", arXiv:1610.09585.

    python acgan.py --n_epochs 200             # train; grids in images/, curves in logs/
    python acgan.py --max_steps 20 --seed 0    # a quick look
    python acgan.py --resume                   # go on after an interruption
    tensorboard --logdir logs                  # watch the curves

Measured: 11.5 batches/s on 2 CPU cores, so 200 epochs in 4.5 hours, 3.1 times as fast as the tutorial's loop; the first
20 batches' losses within 1.2e-6 of what the tutorial's script printed. README.md says how.
"""

import argparse
import math
import signal
import sys
import zlib
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below: no traceback

import numpy as np
import torch

from averaging import RunningAverage
from batches import batches_of
from checkpoint import (
    CONTINUED,
    MATHEMATICS,
    NEWEST,
    Checkpoints,
    begun_by_this_torchrun,
    check_nothing_unfinished,
    describe_last,
    read_checkpoint,
    restore,
)
from command_line import SEED, WHOLE, OneLineParser, device_flag, exit_status, flag, number, tell_error
from dataset import MANY, NAMES, LabelledImages, load_dataset, workers_for
from epoch_scores import EpochScores
from generate import draw_images
from judge import WEIGHTS as JUDGE
from models import Discriminator, Generator, weights_init_normal
from processes import Processes
from run_folder import check_out_dir, check_records, earlier_log_dir, same_folder
from runlog import RunLog, SilentLog
from speed import accelerate, tune_process
from utils import (
    BadInput,
    Diverged,
    StopRequest,
    announce,
    choose_device,
    draw_seed,
    on_terminal,
    seed_everything,
)

HERE = Path(__file__).resolve().parent


def train_step(generator, discriminator, optimizer_G, optimizer_D, real_imgs, labels, z, gen_labels):
    """Update D once, then G once, on one batch (tutorial, "训练过程").

    Args:
        real_imgs, labels: real images, float32 (B, C, H, W) in [-1, 1], and their classes, int64 (B,).
        z, gen_labels: noise, float32 (B, latent_dim), and the classes to draw, int64 (B,).

    Returns:
        0-d tensors on the training device: each loss with its parts, and how many of the B real and of the B
        fake images D classified right, before its update.
    """
    adversarial_loss = torch.nn.BCELoss()
    auxiliary_loss = torch.nn.CrossEntropyLoss()  # takes logits, but gets probabilities: the tutorial's softmax twice
    valid = torch.ones(len(labels), 1, device=labels.device)
    fake = torch.zeros(len(labels), 1, device=labels.device)

    gen_imgs = generator(z, gen_labels)  # one forward serves both updates

    # (1) Train Discriminator: minimise, as a mean over the four terms,
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

    # (2) Train Generator: minimise, through the D just updated and on the same fakes,
    #     L_G = - E log D(G(z|y)) - E log P(y | G(z|y))                                         (paper: max L_C - L_S)
    optimizer_G.zero_grad()

    validity, pred_label = discriminator(gen_imgs)
    g_adv, g_aux = adversarial_loss(validity, valid), auxiliary_loss(pred_label, gen_labels)

    g_loss = (g_adv + g_aux) / 2
    g_loss.backward()
    optimizer_G.step()

    metrics = {
        "d_loss": d_loss,
        "d_real_adv": d_real_adv,
        "d_real_aux": d_real_aux,
        "d_fake_adv": d_fake_adv,
        "d_fake_aux": d_fake_aux,
        "g_loss": g_loss,
        "g_adv": g_adv,
        "g_aux": g_aux,
        "real_correct": (real_aux.argmax(1) == labels).sum(),
        "fake_correct": (fake_aux.argmax(1) == gen_labels).sum(),
    }
    return {name: value.detach() for name, value in metrics.items()}


def draw_noise(n: int, latent_dim: int, device: torch.device) -> torch.Tensor:
    """z ~ N(0, 1), float32 (n, latent_dim): from NumPy's stream on the CPU, as the tutorial, else on the device."""
    if device.type == "cpu":
        return torch.from_numpy(np.random.normal(0, 1, (n, latent_dim))).float()
    return torch.randn(n, latent_dim, device=device)


def draw_labels(n: int, n_classes: int, device: torch.device) -> torch.Tensor:
    """Classes to draw, uniform in [0, n_classes), int64 (n,); from the same source as the noise."""
    if device.type == "cpu":
        return torch.from_numpy(np.random.randint(0, n_classes, n)).long()
    return torch.randint(n_classes, (n,), device=device)


@torch.no_grad()
def sample_image(generator, n_classes: int, latent_dim: int, device) -> torch.Tensor:
    """Draw 10 rows of every class, one column a class: float32 (10 * n_classes, C, H, W) in [-1, 1].

    G stays in train mode, so drawing uses the batch's statistics and moves the running ones: a quirk, kept.
    """
    z = draw_noise(10 * n_classes, latent_dim, device)
    labels = torch.arange(n_classes, device=device).repeat(10)
    return generator(z, labels)


def fixed_noise(n_classes: int, latent_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """z and labels of a grid laid out as sample_image's, the same in every run; draws from neither random stream."""
    z = torch.randn(10 * n_classes, latent_dim, generator=torch.Generator().manual_seed(0))
    return z, torch.arange(n_classes).repeat(10)


def train(
    opt: argparse.Namespace,
    processes: Processes,
    data: LabelledImages,
    checkpoint: dict | None = None,
) -> int:
    """Run the whole training in the tutorial's order of events, which fixes the random stream.

    Args:
        opt: the options of parse_args.
        processes: this process among those that train together; often it is alone.
        data: the training set.
        checkpoint: of read_checkpoint, to go on from; `opt` must have its options.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        Diverged: a loss is no longer finite.
        BadInput: the checkpoint does not fit or leaves nothing to do, or another run writes to the folder.
        OSError: the checkpoint or the weights could not be written at the end.
    """
    seed_everything(opt.seed)
    generator = Generator(opt.n_classes, opt.latent_dim, opt.img_size, opt.channels, opt.upsample == "folded")
    discriminator = Discriminator(opt.n_classes, opt.img_size, opt.channels)
    generator.classes = discriminator.classes = data.classes
    device = processes.device
    batches = batches_of(data.images, data.labels, opt.batch_size, device, workers_for(opt.n_cpu), **processes.shard())
    steps, max_steps = batches_done_and_wanted(opt, batches, checkpoint)

    # what the tutorial draws here for the graphs, labels first
    graph_label, graph_z = torch.randint(opt.n_classes, (1,)), torch.randn(1, opt.latent_dim)
    graph_img = torch.randn(1, opt.channels, opt.img_size, opt.img_size)

    generator.apply(weights_init_normal).to(device)
    discriminator.apply(weights_init_normal).to(device)
    if opt.sync_bn == "on":
        processes.synchronise_norms(generator, discriminator)
    # capturable: the step counts stay on the GPU, as a CUDA graph needs them
    adam = dict(lr=opt.lr, betas=(opt.b1, opt.b2), fused=True, capturable=device.type == "cuda")
    optimizer_G = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_D = torch.optim.Adam(discriminator.parameters(), **adam)

    averaged = RunningAverage(generator, opt.ema)
    parts = dict(generator=generator, discriminator=discriminator, optimizer_G=optimizer_G, optimizer_D=optimizer_D,
                 batches=batches, averaged=averaged)  # fmt: skip
    if checkpoint:
        restore(checkpoint, device, **parts)
    networks = processes.wrap(generator, discriminator)

    fixed_z = fixed_noise(opt.n_classes, opt.latent_dim)
    eval_interval = opt.eval_interval if processes.first else None
    scores = EpochScores(eval_interval, opt.judge, averaged.network, discriminator, data, len(batches))
    options = options_as_data(opt)
    settings = {"options": options, "seed": opt.seed, "device": str(device), "classes": data.classes}
    record = (opt.out_dir, settings, len(batches), opt.n_epochs, max_steps, opt.log_interval, checkpoint)
    saving = (opt.out_dir, opt.checkpoint_interval, options, summary(data), device)
    with (
        StopRequest() as stop,
        RunLog(*record) if processes.first else SilentLog() as log,
        Checkpoints(*saving, log, processes.first, **parts) as checkpoints,
    ):
        if not checkpoint:
            log.graphs(generator, discriminator, graph_z.to(device), graph_label.to(device), graph_img.to(device))
        elif checkpoint["file"] != opt.out_dir / NEWEST:
            checkpoints.save(steps, rotate=False)  # the record was cut back to it, so it is the newest now
        scores.begin(log, steps)

        def train_batch(generator, discriminator, indices):
            real_imgs, real_labels = batches.gather(indices)
            z = draw_noise(len(indices), opt.latent_dim, device)
            gen_labels = draw_labels(len(indices), opt.n_classes, device)
            return train_step(generator, discriminator, optimizer_G, optimizer_D, real_imgs, real_labels, z, gen_labels)

        capture = opt.cuda_graph == "on" and batches.in_memory
        train_batch = accelerate(
            train_batch, *networks, opt.batch_size, max_steps - steps, opt.compile, opt.amp, capture
        )

        for epoch, indices in log.epochs(range(steps // len(batches), opt.n_epochs), batches):
            processes.start_batch(opt.seed, steps)
            metrics = train_batch(indices)

            batches_done = steps  # the tutorial counts from 0
            steps += 1
            averaged.update(steps)
            if batches_done % opt.sample_interval == 0:
                grid = sample_image(generator, opt.n_classes, opt.latent_dim, device)
                log.sample_grid("fake_image", grid, opt.n_classes, batches_done)
                log.sample_grid("fixed_z", draw_images(generator, *fixed_z), opt.n_classes, batches_done)
            log.batch(batches_done, metrics, len(indices))
            if steps % len(batches) == 0:
                log.end_epoch(batches_done, batches.gather(indices)[0], metrics, len(indices))
                scores.after_epoch(epoch)
            if processes.any(stop.requested) or steps == max_steps:
                break
            checkpoints.save_if_due(steps)

        stop.take_your_time()  # the batch in hand has ended: a slow disk is no reason to lose the checkpoint
        finish(checkpoints, log, generator, discriminator, averaged.network, steps, finished=steps == max_steps)
        if steps == max_steps and steps % len(batches):  # a quick look ends within an epoch
            log.end_epoch(batches_done, batches.gather(indices)[0], metrics, len(indices))

    if steps < max_steps:
        announce(f"Stopped by a signal after batch {batches_done}; --resume goes on from {opt.out_dir / NEWEST}")
        return stop.exit_status
    if on_terminal():
        announce(f"Done: acgan_gen.pth and acgan_dist.pth are in {opt.out_dir.resolve()}")
    return 0


def batches_done_and_wanted(opt: argparse.Namespace, batches, checkpoint: dict | None) -> tuple[int, int]:
    """How many batches the run has behind it, and after how many it ends. BadInput if there is nothing to do."""
    if batches.smallest() == 0:
        raise BadInput(
            f"argument --data_root: {len(batches.labels)} images are fewer than the {batches.world} processes"
        )
    if opt.img_size == 16 and batches.smallest() == 1:
        raise BadInput("argument --batch_size: at --img_size 16 the last batch must not be of one image")
    steps = checkpoint["steps"] if checkpoint else 0
    max_steps = min(opt.max_steps or math.inf, opt.n_epochs * len(batches))
    if steps >= max_steps:
        raised = "--n_epochs" if max_steps == opt.n_epochs * len(batches) else "--max_steps"
        raise BadInput(f"argument --resume: the run has come to its end, {steps} batches; raise {raised} to go on")
    return steps, max_steps


def finish(checkpoints, log, generator, discriminator, averaged, steps: int, finished: bool) -> None:
    """Write the checkpoint and the weights of the run's last batch; each is tried even if the other fails."""
    try:
        checkpoints.save(steps, finished)
    except OSError:
        log.save_weights(generator, discriminator, averaged)
        raise
    log.save_weights(generator, discriminator, averaged)


def parse_args(argv: list[str] | None = None, saved: dict | None = None) -> argparse.Namespace:
    """Read the command line; bad flags end the program with one line and exit status 2.

    Args:
        argv: the words after the script's name; None for the program's own.
        saved: the options of a checkpoint to resume. They stand in for flags that are not given; a given flag
            that would change the mathematics is an error.
    """
    side = number(
        int, "a multiple of 4 and at least 16, such as 28 or 32", lambda value: value >= 16 and value % 4 == 0
    )
    rate = number(float, "a number above 0, such as 0.0002", lambda value: value > 0)
    beta = number(float, "a number in [0, 1), such as 0.5", lambda value: 0 <= value < 1)

    parser = OneLineParser(
        prog="acgan.py",
        description="Train an auxiliary-classifier GAN as the tutorial does, on MNIST or other images.",
        allow_abbrev=False,
    )

    group = parser.add_argument_group("training")
    flag(group, "--n_epochs", WHOLE, 200, "passes over the data")
    flag(group, "--max_steps", WHOLE, None, "stop after N batches, for a quick look", shown="no limit")
    flag(group, "--batch_size", WHOLE, 64, "images a batch, in each process where torchrun starts several")
    flag(group, "--lr", rate, 0.0002, "Adam: learning rate of both networks", "X")
    flag(group, "--b1", beta, 0.5, "Adam: decay of the gradient's mean, in [0, 1)", "X")
    flag(group, "--b2", beta, 0.999, "Adam: decay of the squared gradient's mean, in [0, 1)", "X")
    flag(group, "--seed", SEED, None, "seed of PyTorch and NumPy", shown="one is drawn and printed")
    flag(
        group, "--ema", beta, 0.9999,
        "decay of the running average of G's weights, in [0, 1): kept beside G in acgan_gen_ema.pth, it has no part in "
        "the training", "X",
    )  # fmt: skip
    group = parser.add_argument_group("networks")
    flag(group, "--latent_dim", WHOLE, 100, "size of the noise z and of the label embedding")
    flag(group, "--n_classes", WHOLE, None, "classes: a check, as the data tells them", shown="the data's, 10 in MNIST")
    flag(group, "--img_size", side, 32, "image side in pixels, a multiple of 4 and at least 16")
    flag(
        group, "--channels", WHOLE, None, "image channels: a check, as the data tells them",
        shown="the data's, 1 in MNIST",
    )  # fmt: skip
    group.add_argument(
        "--sync_bn", choices=["off", "on"], default="off",
        help="with several GPUs: batch norm over all processes' batches, by SyncBatchNorm (default: %(default)s)",
    )  # fmt: skip
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", choices=NAMES, default="mnist",
        help="what to learn; folder reads DATA_ROOT/CLASS/*.png and *.jpg, grey if all of them are, else colour, "
        "resized and cropped to squares, transparency laid on white; a damaged file is named and ends the run "
        "(default: %(default)s)",
    )  # fmt: skip
    flag(
        group, "--data_root", Path, HERE / "data" / "unpacked",
        "folder of the unpacked images (MNIST: 120 MB, filled by the first run), or of the classes' folders",
        "DIR", "data/unpacked beside acgan.py",
    )  # fmt: skip
    flag(
        group, "--n_cpu", WHOLE, 8,
        f"workers, at most one a core, that read a folder of {MANY:,} images or more, and go on reading where it does "
        "not fit into memory; the other data sets stay in memory",
    )  # fmt: skip
    group = parser.add_argument_group("hardware").add_mutually_exclusive_group()
    device_flag(group)
    group.add_argument(
        "--cuda", dest="device", action="store_const", const="cuda", default="auto",
        help="the same as --device cuda (in the tutorial's script it turns the GPU off)",
    )  # fmt: skip
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--compile", choices=["auto", "on", "off"], default="auto",
        help="torch.compile the networks; auto does so on a CPU, in runs of one process long enough to win the time "
        "back, and keeps it if it proves faster (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--cuda_graph", choices=["on", "off"], default="on",
        help="record the whole batch once on an NVIDIA GPU, and replay it: without effect elsewhere, with several "
        "processes, and for images read as training goes (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--amp", choices=["off", "bf16"], default="off",
        help="bf16 computes the networks in bfloat16 where that is safe: other rounding (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--upsample", choices=["folded", "plain"], default="folded",
        help="G's upsampling: folded into the convolution after it, or as the tutorial writes it, the same "
        "function at 2.25 times the work (default: %(default)s)",
    )  # fmt: skip
    group = parser.add_argument_group("what a run writes")
    flag(
        group, "--out_dir", Path, Path(),
        "folder for images/, logs/, weights, checkpoints, metrics.jsonl and config.json", "DIR", "the current folder",
    )  # fmt: skip
    flag(
        group, "--checkpoint_interval", WHOLE, None, "batches between checkpoints",
        shown=f"one every {Checkpoints.SECONDS} seconds",
    )  # fmt: skip
    group.add_argument(
        "--resume", nargs="?", const="", metavar="PATH",
        help="go on from a checkpoint, given by its file or folder (PATH's default: --out_dir), with its flags; of "
        f"these only {', '.join(f'--{name}' for name in CONTINUED)} may have other values; --max_steps, --data_root, "
        "--out_dir and --device are not kept (default: start anew)",
    )  # fmt: skip
    flag(
        group, "--eval_interval", WHOLE, None,
        "epochs between scores of G's running average (--ema): label agreement and FID, in TensorBoard and "
        "metrics.jsonl; the best is kept in acgan_gen_best.pth, with its D. Needs requirements-eval.txt",
        shown="no scores",
    )  # fmt: skip
    flag(
        group, "--judge", Path, JUDGE, "classifier for --eval_interval, from judge.py", "FILE",
        "the one that comes along",
    )  # fmt: skip
    flag(group, "--sample_interval", WHOLE, 400, "batches between sample grids")
    flag(group, "--log_interval", WHOLE, 50, "batches between points of the per-batch curves and of metrics.jsonl")
    argv = sys.argv[1:] if argv is None else argv
    if saved is not None:
        given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(MATHEMATICS)))
        differing = [
            f"--{name} {saved[name]}, not {getattr(given, name)}"
            for name in MATHEMATICS
            if getattr(given, name) not in (None, saved[name])
        ]
        if differing:
            parser.error(f"argument --resume: the checkpoint has {'; '.join(differing)}: drop these flags to go on")
        argv = [f"--{name}={saved[name]}" for name in MATHEMATICS + CONTINUED if saved.get(name) is not None] + argv
    opt = parser.parse_args(argv)
    opt.judge = opt.judge.absolute()  # a resumed run may start in another folder
    if saved is not None and opt.sample_interval != saved.get("sample_interval"):
        announce("Another --sample_interval draws other noise: the run goes on, but not to the last bit.")

    if opt.img_size == 16 and opt.batch_size == 1:
        parser.error("argument --batch_size: at --img_size 16, D's batch norm needs at least 2 images a batch")
    return opt


def summary(data: LabelledImages) -> dict:
    """What a checkpoint says of its data."""
    return {
        "classes": data.classes,
        "images": len(data.labels),
        "crc32_of_labels": zlib.crc32(data.labels.numpy().tobytes()),
    }


def check_against_data(opt: argparse.Namespace, data: LabelledImages, checkpoint: dict | None) -> None:
    """Take channels and number of classes from the data. BadInput if those given, or resumed with, are others."""
    if checkpoint and not (checkpoint["data"] or {}).items() <= summary(data).items():
        raise BadInput("argument --resume: the checkpoint is of other classes or another number of images: "
                       "name its own --data_root")  # fmt: skip
    for name, found in [("n_classes", len(data.classes)), ("channels", data.images.shape[1])]:
        given = getattr(opt, name)
        if given not in (None, found):
            raise BadInput(f"argument --{name}: the data ({opt.dataset}) has {found}, not {given}")
        setattr(opt, name, found)


def options_as_data(opt: argparse.Namespace) -> dict:
    """The options as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(opt).items()}


def start(opt: argparse.Namespace, argv: list[str] | None) -> int:
    """Do what `opt`, from parse_args(argv), asks for: look at everything first, then train. Returns the exit status.

    Raises:
        BadInput, MemoryError, OSError: as command_line.exit_status tells them.
    """
    if opt.resume is None and begun_by_this_torchrun(opt.out_dir):
        opt.resume = ""  # a process was lost, and all were started anew
    checkpoint = None
    if opt.resume is not None:
        checkpoint = read_checkpoint(Path(opt.resume) if opt.resume else opt.out_dir)
        check_records(checkpoint["log"])
        opt = parse_args(argv, checkpoint["options"])
    device, why = choose_device(opt.device)
    tune_process(device)
    processes = Processes(device)
    opt.processes = processes.world
    if checkpoint and checkpoint["options"]["processes"] != processes.world:
        raise BadInput(f"argument --resume: the checkpoint is of {checkpoint['options']['processes']} processes, "
                       f"not of {processes.world}: start as many")  # fmt: skip
    if opt.compile == "on" and processes.world > 1:
        raise BadInput("argument --compile: on works in one process only; drop it")
    check_out_dir(opt.out_dir)
    if not checkpoint or not same_folder(checkpoint["file"].parent, opt.out_dir):
        earlier_log_dir(opt.out_dir)  # raises where the folder is somebody else's
        check_nothing_unfinished(opt.out_dir)
    if why:
        announce(why)
    try:
        if opt.seed is None:
            opt.seed = processes.from_first(draw_seed())
            announce(f"Seed: {opt.seed}; --seed {opt.seed} repeats this run.")
        data = processes.first_goes_first(
            lambda: load_dataset(opt.dataset, opt.data_root, opt.img_size, workers=workers_for(opt.n_cpu))
        )
        check_against_data(opt, data, checkpoint)
        status = train(opt, processes, data, checkpoint)
    except Diverged as error:
        tell_error("acgan.py", f"{error}; {describe_last(opt.out_dir)}")
        return 1
    except RuntimeError as error:
        if not processes.lost_one(error):
            raise
        tell_error("acgan.py", f"another process of this run was lost; {describe_last(opt.out_dir)}")
        return 1
    processes.close()
    return status


def main(argv: list[str] | None = None) -> int:
    """The command line: returns the exit status, as command_line.exit_status, or 1 if training diverged."""
    opt = parse_args(argv)
    return exit_status(
        "acgan.py", lambda: start(opt, argv), too_large="lower --batch_size, --img_size or --latent_dim",
        stopped="Stopped at once; only what the last checkpoint holds is kept.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
