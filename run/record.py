"""What a run shows and records: bars, sample grids, TensorBoard, metrics.jsonl, config.json, weights and a film."""

import contextlib
import dataclasses
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from operator import attrgetter
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torchvision
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from data.drawing import GRID_CLASSES
from run import folder
from run.checkpoint import as_data, read_checkpoint
from run.film import write_film
from run.plan import Plan
from run.weights import BEST, WEIGHTS, save_network
from utils import BadInput, Diverged, announce, atomic_write, first_line, on_terminal, print_line, sync

LOOK_INTERVAL = 0.3  # seconds between two readings of the figures for the bar
PIPED_INTERVAL = 30.0  # seconds between two lines within an epoch, without a bar
ROOT = Path(__file__).resolve().parent.parent


def check_tensorboard() -> None:
    """Raise BadInput unless TensorBoard's writer can be imported."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # a broken installation, or a stray folder that is taken for a part of it
        mend = "pip install --force-reinstall tensorboard, or remove what is in its way, as a folder named tensorflow"
        raise BadInput(f"TensorBoard cannot be imported ({first_line(error)}): {mend}") from error


class Record:
    """The record of a run in its folder, and the user's view of it.

    On a terminal it shows a bar for each epoch; piped, it prints a line for each epoch to stdout, and within a long one
    lines to stderr. A new run first moves an earlier run's files aside. A grid, row or curve that cannot be written is
    a warning, and the run continues.

    If `step` batches are done, the run is resumed, and its record is cut back to there. Raises OSError if the folder
    cannot be written, and BadInput if another run writes there.
    """

    def __init__(self, opt, plan: Plan, device, steps_per_epoch: int, step: int):
        self.opt, self.plan, self.out_dir, self.steps_per_epoch = opt, plan, opt.out_dir, steps_per_epoch
        self.n_epochs = -(-plan.total_steps // steps_per_epoch)
        self.bar, self.last_left, self.warned, self.grids_shown = None, 0.0, set(), False
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.lock = folder.lock(self.out_dir)
        if step and read_checkpoint(self.out_dir, quiet=True)["step"] != step:
            raise BadInput(f"argument --resume: another run went on in {str(self.out_dir)!r} meanwhile: start again")
        folder.remove_part_files(self.out_dir)
        if not step:
            folder.set_aside_earlier_run(self.out_dir)
        (self.out_dir / "images").mkdir(exist_ok=True)
        earlier = folder.earlier_log_dir(self.out_dir) if step else None
        self.log_dir = earlier or folder.new_log_dir(self.out_dir)
        config = dict(options=as_data(opt), **dataclasses.asdict(plan), device=str(device), resumed_after=step,
                      log_dir=self.log_dir.relative_to(self.out_dir).as_posix(), versions=versions())  # fmt: skip
        atomic_write(self.out_dir / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        rows = folder.rows_before(self.out_dir / "metrics.jsonl", step)
        atomic_write(self.out_dir / "metrics.jsonl", lambda file: file.write(rows))
        self.unwritten = b""  # rows that a full disk refused
        self.open_board(step)
        if not step:
            self.to_board("add_text", "classes", ", ".join(plan.classes))  # the columns of the grids
            decided = config["options"] | dataclasses.asdict(plan)
            self.to_board("add_text", "options", "\n".join(f"- {name}: {value}" for name, value in decided.items()))
        self.start, self.first_step = time.monotonic(), step

    def open_board(self, step: int) -> None:
        """Open TensorBoard's files; points from batch `step` on that an interrupted run left are dropped."""
        from torch.utils.tensorboard import SummaryWriter  # here, as its import takes seconds

        # the tutorial's curves count epochs: those of epochs that are done stay
        purge_step = max(step, step // self.steps_per_epoch + 1) if step else None
        self.board = SummaryWriter(self.log_dir, purge_step=purge_step)

    def close(self) -> None:
        """End the bar, write what is left, and let other runs into the folder."""
        if self.bar is not None:
            self.bar.close()
        with self.tolerating("the last records"):
            self.write_rows()
        with self.tolerating("the last curves"):
            self.close_board()
        if self.lock is not None:
            self.lock.close()

    @contextlib.contextmanager
    def tolerating(self, what: str):
        """Turn an OSError in the block into a warning, once for each kind of record until it works again."""
        try:
            yield
            self.warned.discard(what)
        except OSError as error:
            if what not in self.warned:
                announce(f"Warning: cannot write {what} ({error.strerror or error}); training continues.")
                self.warned.add(what)

    def to_board(self, method: str, *args) -> None:
        """Call the TensorBoard writer; after a failed write it is closed until the next epoch."""
        if self.board is None:
            return
        with self.tolerating("the curves in logs/"):
            try:
                attrgetter(method)(self.board)(*args)
            except OSError:
                with contextlib.suppress(OSError):
                    self.close_board()
                raise

    def close_board(self) -> None:
        """End TensorBoard's writer, and wait for its thread, which shows its errors too. Raises OSError."""
        board, self.board = self.board, None
        if board is not None:
            try:
                board.flush()
            finally:
                board.file_writer.close()

    def write_row(self, step: int, row: dict) -> None:
        """Append a row to metrics.jsonl, after the rows that a full disk refused before."""
        self.unwritten += (json.dumps({"step": step, "epoch": step // self.steps_per_epoch} | row) + "\n").encode()
        with self.tolerating("metrics.jsonl"):
            self.write_rows()

    def write_rows(self) -> None:
        # unbuffered, so that what a full disk refuses stays in self.unwritten
        with open(self.out_dir / "metrics.jsonl", "ab", 0) as file:
            while self.unwritten:
                self.unwritten = self.unwritten[file.write(self.unwritten) :]

    def flush(self) -> None:
        """Move all that was recorded so far to the disk."""
        self.to_board("flush")
        with self.tolerating("metrics.jsonl"), open(self.out_dir / "metrics.jsonl", "ab") as file:
            sync(file.fileno())

    def graph(self, generator, discriminator, z, labels, img) -> None:
        """Write the graphs of both networks as one, as TensorBoard keeps one a run."""
        try:
            alone = threading.current_thread() is threading.main_thread()  # else others print meanwhile
            hidden = contextlib.redirect_stdout(io.StringIO()) if alone else contextlib.nullcontext()
            with warnings.catch_warnings(), hidden:  # PyTorch prints its errors
                warnings.simplefilter("ignore")  # the tracer's, which do not concern this run
                self.to_board("add_graph", BothNetworks(generator, discriminator), (z, labels, img))
        except Exception as error:  # torch.jit.trace ends with the Pythons that it supports
            announce(f"Warning: TensorBoard gets no graph of the networks ({first_line(error)}); training continues.")

    def progress(self, epoch: int, step: int, batches):
        """Yield from `batches`, from batch `step` on, with a bar of this epoch, counted from 0, on a terminal."""
        if self.board is None:
            with self.tolerating("the curves in logs/"):
                self.open_board(step)
        first = epoch * self.steps_per_epoch
        rate = ", {rate_fmt}" if shutil.get_terminal_size().columns >= 100 else ""
        self.bar = tqdm(
            total=min(self.steps_per_epoch, self.plan.total_steps - first), initial=step - first, unit="batch",
            desc=f"Epoch {epoch + 1}/{self.n_epochs}", mininterval=LOOK_INTERVAL, dynamic_ncols=True,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}" + rate,
            disable=not on_terminal(),
        )  # fmt: skip
        self.epoch_start, self.epoch_first_step = time.monotonic(), step
        self.next_look = self.epoch_start + (PIPED_INTERVAL if self.bar.disable else 0)
        yield from batches
        self.bar.close()

    def batch(self, step: int, metrics: dict[str, torch.Tensor]) -> None:
        """Record batch `step`; the figures are read only if the bar or the log needs them, or on the CPU.

        Raises Diverged if a loss that is read is not finite.
        """
        self.bar.update(1)
        logged = step % self.opt.log_interval == 0
        seen = time.monotonic() >= self.next_look
        if not (logged or seen or metrics["d_loss"].device.type == "cpu"):
            return
        row = read_metrics(metrics)
        if not (math.isfinite(row["d_loss"]) and math.isfinite(row["g_loss"])):
            raise Diverged(f"the loss is no longer finite at step {step}")
        if logged:
            self.write_row(step, row)
            for key, value in row.items():
                self.to_board("add_scalar", f"batch/{key}", value, step)
        if seen:
            self.show(step, row)

    def end_epoch(self, step: int, real_imgs: torch.Tensor, metrics: dict[str, torch.Tensor]) -> None:
        """Write the tutorial's figures of a whole epoch's last batch to TensorBoard, and a piped run's line."""
        epoch, row = step // self.steps_per_epoch, read_metrics(metrics)
        if (step + 1) % self.steps_per_epoch == 0:
            self.to_board("add_image", "real_image", make_grid(real_imgs), epoch + 1)
            for tag, key in [("ACGAN_acc", "d_acc"), ("dist_loss", "d_loss"), ("gene_loss", "g_loss")]:
                self.to_board("add_scalar", tag, row[key], epoch + 1)
            self.to_board("flush")
        took = max(time.monotonic() - self.epoch_start, 1e-3)  # the clock of Windows has steps
        if not self.bar.disable:
            # short epochs share one line a second
            self.bar.leave = time.monotonic() - self.last_left >= 1 or step + 1 == self.plan.total_steps
            self.last_left = time.monotonic() if self.bar.leave else self.last_left
            self.show(step, row)
            self.bar.close()
            return
        print_line(
            f"epoch {epoch + 1:3d}/{self.n_epochs}  batches {step + 1}  D loss {row['d_loss']:.4f}  "
            f"G loss {row['g_loss']:.4f}  ACGAN acc {row['d_acc']:.2%}  "
            f"{(step + 1 - self.epoch_first_step) / took:.2f} batches/s  took {clock(took)}  left {self.left(step)}"
        )

    def show(self, step: int, row: dict[str, float]) -> None:
        """Put the figures of batch `step` into the bar, or into a line, the run's time left first."""
        losses = f"D Loss {row['d_loss']:.3f}, G Loss {row['g_loss']:.3f}, Acc {row['d_acc']:.1%}"
        figures = f"left {self.left(step)}, {losses}"
        self.next_look = time.monotonic() + (PIPED_INTERVAL if self.bar.disable else LOOK_INTERVAL)
        if self.bar.disable:
            epoch, batch = divmod(step, self.steps_per_epoch)
            place = f"batch {batch + 1:,} of {self.steps_per_epoch:,}"
            announce(f"Epoch {epoch + 1}/{self.n_epochs}, {place}, {figures}")
        else:
            self.bar.set_postfix_str(figures, refresh=False)

    def left(self, step: int) -> str:
        """Return the time that the rest of the run takes at the speed so far."""
        seconds_per_batch = (time.monotonic() - self.start) / (step + 1 - self.first_step)
        return clock(seconds_per_batch * (self.plan.total_steps - step - 1))

    def grid(self, tag: str, imgs: torch.Tensor, step: int) -> None:
        """Write a grid of images, float (N, C, H, W) of any range, one column a class, to TensorBoard and as a PNG.

        The file is images/{step}.png for the tag "fake_image", and images/fixed_z/{step}.png for "fixed_z".
        """
        # a run that is about to end as diverged may draw NaN
        grid = make_grid(imgs.cpu(), nrow=min(self.plan.n_classes, GRID_CLASSES), normalize=True).nan_to_num()
        path, png = self.out_dir / "images" / ("fixed_z" if tag == "fixed_z" else "") / f"{step}.png", io.BytesIO()
        save_image(grid, png, format="png")
        with self.tolerating("sample grids"):
            atomic_write(path, lambda file: file.write(png.getvalue()), flush=False)
            if not self.grids_shown and not has_screen():
                grids = self.out_dir / "images"
                serve = typed(sys.executable, "-m", "http.server", "--directory", grids)
                announce(f"Sample grids: {grids}. No screen here: copy them (scp), or serve them on port 8000: {serve}")
            self.grids_shown = True
        self.to_board("file_writer.add_summary", image_summary(tag, png.getvalue(), *grid.shape), step)

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Record the scores of the EMA after batch `step`."""
        self.write_row(step, scores)
        for name, value in scores.items():
            self.to_board("add_scalar", f"score/{name}", value, step)

    def best(self, ema, discriminator, **more) -> None:
        """Keep the best networks so far, with `more` plain data about them."""
        with self.tolerating("the best generator"):
            # G last: its scores are the ones compared, so after a fault between the two both are written again
            save_network(self.out_dir / BEST[1], discriminator, self.plan.classes, white=self.plan.white, **more)
            save_network(self.out_dir / BEST[0], ema, self.plan.classes, white=self.plan.white, **more)

    def finish(self, done: int, generator, discriminator, ema) -> None:
        """Write the weights of G, D and the EMA after `done` batches, and the film of the run. Raises OSError."""
        for name, network in zip(WEIGHTS, (generator, discriminator, ema), strict=True):
            save_network(self.out_dir / name, network, self.plan.classes, step=done, white=self.plan.white)
        with self.tolerating("images/film.gif"):
            write_film(self.out_dir / "images", done - 1)

    def say_end(self, done: int) -> None:
        """Announce what the run leaves after `done` batches, and what to type next."""
        finished = done == self.plan.total_steps
        files = [*WEIGHTS, f"images/fixed_z/{done - 1}.png", "images/film.gif"]
        *others, last = [name for name in files if (self.out_dir / name).exists()]
        there = f"{', '.join(others)} and {last} are in {os.path.realpath(self.out_dir)}"
        announce(f"{'Done' if finished else 'So far'}: {there}")
        if finished:
            announce("To draw with them: " + typed(sys.executable, ROOT / "generate.py", "--weights", self.out_dir))
        else:
            announce(f"Stopped after batch {done:,} of {self.plan.total_steps:,}; to continue: "
                     f"{command_to_continue(self.opt, self.plan)}")  # fmt: skip


def has_screen() -> bool:
    """Return True if pictures can probably be seen where the run is: not over ssh, nor on Linux without windows.

    A notebook's file browser shows them.
    """
    if "ipykernel" in sys.modules:
        return True
    windows = not sys.platform.startswith("linux") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return windows and "SSH_CONNECTION" not in os.environ


def command_to_continue(opt, plan: Plan) -> str:
    """Return what to type to continue a run as it was begun, with those options that no checkpoint restores."""
    words = [sys.executable]
    if plan.world_size > 1:
        words += ["-m", "torch.distributed.run", f"--nproc_per_node={plan.world_size}"]
    words += [ROOT / "acgan.py", "--resume", opt.out_dir]
    for name, default in (("data_root", None), ("max_steps", None), ("device", "auto")):
        if getattr(opt, name) != default:
            words += [f"--{name}", getattr(opt, name)]
    return typed(*words)


def typed(*words) -> str:
    """Return words as one types them in a shell, with paths below the current folder as from there."""
    try:
        here = Path.cwd()
    except OSError:  # deleted by now
        here = None
    short = [Path(word).relative_to(here) if here and Path(str(word)).is_relative_to(here) else word for word in words]
    words = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in short]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else " ".join(map(quote, words))


class BothNetworks(torch.nn.Module):
    """G and D side by side, for one graph."""

    def __init__(self, generator, discriminator):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def forward(self, z, labels, img):
        return self.generator(z, labels), *self.discriminator(img)


def read_metrics(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Turn a step's 0-d tensors into numbers at float32 precision: here the host waits for the device."""
    values = torch.stack([value.to(torch.float32) for value in metrics.values()]).tolist()  # sync point
    return dict(zip(metrics, values, strict=True))


def image_summary(tag: str, png: bytes, channels: int, height: int, width: int):
    """Return what TensorBoard's writer takes for an image: add_image would encode it once more."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


@contextlib.contextmanager
def disk_errors_hidden():
    """Inside the block a full disk shows no traceback of the event writer's thread: add_scalar raises it too."""

    def hide(args):
        if not isinstance(args.exc_value, OSError):
            before(args)

    before, threading.excepthook = threading.excepthook, hide
    try:
        yield
    finally:
        threading.excepthook = before


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    modules = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
    return {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"} | modules


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
