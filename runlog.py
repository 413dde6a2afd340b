"""What a run shows and records: progress bars, sample grids, TensorBoard, metrics.jsonl, config.json, weights."""

import contextlib
import io
import json
import math
import os
import platform
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from models import pack_network, write_weights
from run_folder import LAST, bring_back_records, lock, new_log_dir, remove_leftovers, same_folder, set_aside_earlier_run
from utils import Diverged, announce, on_terminal, print_line, whole_file

# TensorBoard's name for each per-batch curve; the keys are those of metrics.jsonl.
CURVES = {
    "d_loss": "D_loss/total",
    "d_real_adv": "D_loss/real_adversarial",
    "d_real_aux": "D_loss/real_class",
    "d_fake_adv": "D_loss/fake_adversarial",
    "d_fake_aux": "D_loss/fake_class",
    "g_loss": "G_loss/total",
    "g_adv": "G_loss/adversarial",
    "g_aux": "G_loss/class",
    "d_acc": "accuracy/real_and_fake",
    "d_acc_real": "accuracy/real",
    "d_acc_fake": "accuracy/fake",
}


class BothNetworks(torch.nn.Module):
    """G and D side by side, for one graph."""

    def __init__(self, generator, discriminator):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def forward(self, z, labels, img):
        return self.generator(z, labels), *self.discriminator(img)


def read_metrics(metrics: dict[str, torch.Tensor], batch_size: int) -> dict[str, float]:
    """Turn a step's tensors into numbers: the point where the host waits for the device.

    Args:
        metrics: what train_step returned: 0-d losses, and counts of right class predictions.
        batch_size: images in that batch.

    Returns:
        The losses at full float32 precision, and accuracies in [0, 1]: d_acc, d_acc_real, d_acc_fake.
    """
    values = torch.stack([value.to(torch.float32) for value in metrics.values()]).tolist()  # sync point
    row = dict(zip(metrics, values, strict=True))
    real, fake = row.pop("real_correct"), row.pop("fake_correct")
    row["d_acc"] = (real + fake) / (2 * batch_size)
    row["d_acc_real"], row["d_acc_fake"] = real / batch_size, fake / batch_size
    return row


class RunLog:
    """The record of one run in `out_dir`, and the person's view of it.

    On a terminal it shows a bar an epoch; piped, it prints one line an epoch on stdout. An earlier run's files
    are first moved into that run's own folder below `logs/`, so that neither curves nor weights get mixed.
    A grid, row or curve that cannot be written is warned of, and does not end the run.

    Args:
        out_dir: the run's folder; made if missing.
        settings: what goes into config.json: options, seed, device, and the names of the classes.
        steps_per_epoch: batches an epoch.
        n_epochs: epochs asked for.
        max_steps: batches after which the run stops.
        log_interval: batches between rows of metrics.jsonl and points of the per-batch curves.
        checkpoint: of read_checkpoint, to go on with its run's record, cut back to where the checkpoint was taken.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
        BadInput: another run is writing there.
    """

    LOOK_INTERVAL = 0.3  # seconds between two looks at the figures for the bar

    def __init__(self, out_dir: Path, settings: dict, steps_per_epoch: int, n_epochs: int, max_steps: int,
                 log_interval: int, checkpoint: dict | None = None):  # fmt: skip
        self.out_dir = out_dir
        self.steps_per_epoch = steps_per_epoch
        self.n_epochs = n_epochs
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.bar = None
        self.warned = set()

        out_dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock(out_dir)
        remove_leftovers(out_dir)
        same = checkpoint is not None and same_folder(checkpoint["file"].parent, out_dir)
        if not same:
            set_aside_earlier_run(out_dir)
        self.images = out_dir / "images"
        self.images.mkdir(exist_ok=True)
        if checkpoint is None:
            self.next_step, self.earlier_seconds, self.pending = 0, 0.0, b""
            self.scored_step = None
            self.log_dir = new_log_dir(out_dir / "logs")
        else:
            state = checkpoint["log"]
            self.next_step, self.earlier_seconds = checkpoint["steps"], state["seconds"]
            self.pending, self.scored_step = state["pending"].encode(), state.get("scored_step")
            source = checkpoint["file"].parent
            self.log_dir = out_dir / state["log_dir"] if same else new_log_dir(out_dir / "logs")
            bring_back_records(source, out_dir, self.log_dir, state["sizes"])
            settings = settings | {"resumed_after": checkpoint["steps"]}
        self.config = settings | {"log_dir": self.log_dir.relative_to(out_dir).as_posix(), "versions": versions()}
        self.open_rows()

        threading.excepthook = quiet_disk_errors  # the event writer's thread; its errors also reach add_scalar
        self.open_board()
        if checkpoint is None:
            self.to_board("add_text", "classes", ", ".join(settings.get("classes", [])))  # the columns of the grids
        self.run_start = time.monotonic()

    def open_rows(self) -> None:
        with whole_file(self.out_dir / "config.json") as file:
            file.write((json.dumps(self.config, indent=2) + "\n").encode())
        # unbuffered, so that what a full disk refuses stays in self.pending, and is written once there is room
        self.rows = open(self.out_dir / "metrics.jsonl", "ab", 0)  # noqa: SIM115

    def open_board(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, as it costs the start-up of nothing else

        self.board = SummaryWriter(self.log_dir)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.bar is not None:
            self.bar.close()
        with self.tolerating("the last records"):
            self.write_rows()
            self.rows.close()
        with self.tolerating("the last curves"):
            if self.board is not None:
                self.board.close()
        if self.lock is not None:
            self.lock.close()
        nan_words = ("between 0 and 1", "device-side assert")  # BCELoss's, on the CPU and on CUDA
        if isinstance(error, RuntimeError) and any(words in str(error) for words in nan_words):
            raise Diverged(f"the loss is no longer finite at batch {self.next_step}") from error

    @contextlib.contextmanager
    def tolerating(self, what: str):
        """Inside the block, an OSError becomes a warning: one for each kind of record, until it works again."""
        try:
            yield
            self.warned.discard(what)
        except OSError as error:
            if what not in self.warned:
                announce(f"Warning: cannot write {what} ({error.strerror or error}); training goes on.")
                self.warned.add(what)

    def to_board(self, method: str, *args) -> None:
        """Call the TensorBoard writer; one whose file failed is given up until the next epoch opens another."""
        if self.board is None:
            return
        with self.tolerating("the curves in logs/"):
            try:
                getattr(self.board, method)(*args)
            except OSError:
                self.board = None
                raise

    def write_record(self, record: dict) -> None:
        self.pending += (json.dumps(record) + "\n").encode()
        with self.tolerating("metrics.jsonl"):
            self.write_rows()

    def write_rows(self) -> None:
        path = self.out_dir / "metrics.jsonl"
        if not path.exists():
            announce(f"Warning: {path} was lost; a new one begins, and training goes on.")
            self.rows.close()
            self.open_rows()
        while self.pending:
            self.pending = self.pending[self.rows.write(self.pending) :]

    def state_dict(self) -> dict:
        """What is on the disk so far: the sizes to cut the files back to, and the seconds that the run took."""
        self.to_board("flush")
        with self.tolerating("metrics.jsonl"):
            self.write_rows()
            os.fsync(self.rows.fileno())
        files = [self.out_dir / "metrics.jsonl", *self.log_dir.glob("events.*")]
        return {
            "log_dir": self.log_dir.relative_to(self.out_dir).as_posix(),
            "sizes": {
                path.relative_to(self.out_dir).as_posix(): path.stat().st_size for path in files if path.exists()
            },
            "pending": self.pending.decode(),
            "scored_step": self.scored_step,
            "seconds": self.seconds(),
        }

    def seconds(self) -> float:
        """How long the run has taken, interruptions left out."""
        return self.earlier_seconds + time.monotonic() - self.run_start

    def graphs(self, generator, discriminator, z, labels, img) -> None:
        """Write the graphs of both networks, each traced on one example, as one: TensorBoard keeps one a run."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the tracer warns of is no concern of this run
            self.to_board("add_graph", BothNetworks(generator, discriminator), (z, labels, img))

    def epoch(self, epoch: int, batches):
        """Yield from `batches`, with the bar of this epoch (counted from 0) around them on a terminal."""
        if self.board is None:
            with self.tolerating("the curves in logs/"):
                self.open_board()
        left = self.max_steps - epoch * self.steps_per_epoch
        self.bar = tqdm(
            total=min(self.steps_per_epoch, left),
            initial=self.next_step - epoch * self.steps_per_epoch,
            desc=f"Epoch {epoch + 1:3d}/{self.n_epochs:3d}",
            unit="batch",
            mininterval=self.LOOK_INTERVAL,
            dynamic_ncols=True,
            disable=not on_terminal(),
        )
        self.epoch_start = self.next_look = time.monotonic()
        self.epoch_first_step = self.next_step
        yield from batches
        self.bar.close()

    def epochs(self, numbers, batches):
        """Yield each epoch's number with the indices of each of its batches; `numbers` count from 0."""
        for epoch in numbers:
            for indices in self.epoch(epoch, batches):
                yield epoch, indices

    def batch(self, step: int, metrics: dict[str, torch.Tensor], batch_size: int) -> None:
        """Take note of one finished batch; reads the figures only when the bar or the log needs them.

        Raises:
            Diverged: a loss is not finite. Looked for in every batch on the CPU, else when the figures are read.
        """
        logged = step % self.log_interval == 0
        seen = not self.bar.disable and time.monotonic() >= self.next_look
        if logged or seen or metrics["d_loss"].device.type == "cpu":
            row = read_metrics(metrics, batch_size)
            if not (math.isfinite(row["d_loss"]) and math.isfinite(row["g_loss"])):
                raise Diverged(f"the loss is no longer finite at batch {step}")
            if logged:
                record = {"step": step, "epoch": step // self.steps_per_epoch} | {key: row[key] for key in CURVES}
                self.write_record(record)
                for key, tag in CURVES.items():
                    self.to_board("add_scalar", tag, row[key], step)
            if seen:
                self._show(step, row)
        self.bar.update(1)
        self.next_step = step + 1

    def end_epoch(self, step: int, real_imgs: torch.Tensor, metrics: dict[str, torch.Tensor], batch_size: int) -> None:
        """Write the tutorial's figures of the epoch's last batch: TensorBoard, and the line of a piped run."""
        epoch = step // self.steps_per_epoch
        row = read_metrics(metrics, batch_size)
        self.to_board("add_image", "real_image", make_grid(real_imgs), epoch + 1)
        self.to_board("add_scalar", "ACGAN_acc", row["d_acc"], epoch + 1)
        self.to_board("add_scalar", "dist_loss", row["d_loss"], epoch + 1)
        self.to_board("add_scalar", "gene_loss", row["g_loss"], epoch + 1)
        self.to_board("flush")
        if not self.bar.disable:
            self._show(step, row)
            self.bar.close()
            return
        took = time.monotonic() - self.epoch_start
        print_line(
            f"epoch {epoch + 1:3d}/{self.n_epochs}  batches {step + 1}  D loss {row['d_loss']:.4f}  "
            f"G loss {row['g_loss']:.4f}  ACGAN acc {row['d_acc']:.2%}  "
            f"{(step + 1 - self.epoch_first_step) / took:.2f} batches/s  "
            f"took {clock(took)}  run left {self._run_left(step)}"
        )

    def _show(self, step: int, row: dict[str, float]) -> None:
        self.next_look = time.monotonic() + self.LOOK_INTERVAL
        self.bar.set_postfix_str(
            f"D Loss={row['d_loss']:.4f}, G Loss={row['g_loss']:.4f}, ACGAN Acc={row['d_acc']:.2%}, "
            f"run left {self._run_left(step)}",
            refresh=False,
        )

    def _run_left(self, step: int) -> str:
        done = step + 1
        return clock(self.seconds() / done * (self.max_steps - done))

    def sample_grid(self, kind: str, imgs: torch.Tensor, nrow: int, step: int) -> None:
        """Write a grid of generated images to TensorBoard's `kind`, and as a PNG.

        Args:
            kind: "fake_image", written to images/{step}.png, or "fixed_z", to images/fixed_z/{step}.png.
            imgs: float (N, C, H, W), of any range.
            nrow: images a row.
            step: batch, counted from 0.
        """
        grid = make_grid(imgs.cpu(), nrow=nrow, normalize=True).nan_to_num()  # of a run about to be ended as diverged
        buffer = io.BytesIO()
        save_image(grid, buffer, format="png")
        folder = self.images / "fixed_z" if kind == "fixed_z" else self.images
        with self.tolerating("sample grids"), whole_file(folder / f"{step}.png") as file:
            file.write(buffer.getbuffer())
        self.to_board("add_image", kind, grid, step)

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Record G's scores after batch `step`."""
        self.scored_step = step
        self.write_record({"step": step, "epoch": step // self.steps_per_epoch} | scores)
        for name, value in scores.items():
            self.to_board("add_scalar", f"score/{name}", value, step)

    def save_best(self, packed: dict[str, dict]) -> bool:
        """Write the best networks so far, of models.pack_network, by the names of their files; False if it fails."""
        kept = False
        with self.tolerating("the best generator"):
            for name, network in packed.items():
                write_weights(self.out_dir / name, network)
            kept = True
        return kept

    def save_weights(self, generator, discriminator, averaged) -> None:
        """Write G, D and G's running average: tensors and sizes only; `models.load_network` reads them."""
        for name, network in zip(LAST, (generator, discriminator, averaged), strict=True):
            write_weights(self.out_dir / name, pack_network(network))


class SilentLog:
    """Stands in for RunLog in all processes but the first, which alone writes and talks."""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def epochs(self, numbers, batches):
        for epoch in numbers:
            for indices in batches:
                yield epoch, indices

    def nothing(self, *args) -> None:
        pass

    graphs = batch = end_epoch = sample_grid = save_weights = nothing


def quiet_disk_errors(args) -> None:
    """For threading.excepthook: no traceback for a full disk."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
    }


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
