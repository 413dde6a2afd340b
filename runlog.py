"""What a run shows and records: progress bars, sample grids, TensorBoard, metrics.jsonl, config.json, weights."""

import io
import json
import os
import platform
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from models import pack_network
from utils import BadInput, announce, check_writable, on_terminal, whole_file

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


class Diverged(Exception):
    """A loss is no longer a finite number; its line names the step."""


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

    Args:
        out_dir: the run's folder; made if missing.
        settings: what goes into config.json: options, seed, device.
        steps_per_epoch: batches an epoch.
        n_epochs: epochs asked for.
        max_steps: batches after which the run stops.
        log_interval: batches between rows of metrics.jsonl and points of the per-batch curves.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """

    LOOK_INTERVAL = 0.3  # seconds between two looks at the figures for the bar

    def __init__(self, out_dir: Path, settings: dict, steps_per_epoch: int, n_epochs: int, max_steps: int,
                 log_interval: int):  # fmt: skip
        self.out_dir = out_dir
        self.steps_per_epoch = steps_per_epoch
        self.n_epochs = n_epochs
        self.max_steps = max_steps
        self.log_interval = log_interval
        self.bar = None
        self.next_step = 0

        set_aside_earlier_run(out_dir)
        self.images = out_dir / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        log_dir = new_log_dir(out_dir / "logs")
        config = settings | {"log_dir": log_dir.relative_to(out_dir).as_posix(), "versions": versions()}
        with whole_file(out_dir / "config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        self.rows = open(out_dir / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)

        from torch.utils.tensorboard import SummaryWriter  # here, as it costs the start-up of nothing else

        self.board = SummaryWriter(log_dir)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.bar is not None:
            self.bar.close()
        self.rows.close()
        self.board.close()
        nan_words = ("between 0 and 1", "device-side assert")  # BCELoss's, on the CPU and on CUDA
        if isinstance(error, RuntimeError) and any(words in str(error) for words in nan_words):
            raise Diverged(f"the loss is no longer finite at batch {self.next_step}") from error

    def graphs(self, generator, discriminator, z, labels, img) -> None:
        """Write the graphs of both networks, each traced on one example, as one: TensorBoard keeps one a run."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the tracer warns of is no concern of this run
            self.board.add_graph(BothNetworks(generator, discriminator), (z, labels, img))

    def epoch(self, epoch: int, batches):
        """Yield from `batches`, with the bar of this epoch (counted from 0) around them on a terminal."""
        left = self.max_steps - epoch * self.steps_per_epoch
        self.bar = tqdm(
            total=min(self.steps_per_epoch, left),
            desc=f"Epoch {epoch + 1:3d}/{self.n_epochs:3d}",
            unit="batch",
            mininterval=self.LOOK_INTERVAL,
            dynamic_ncols=True,
            disable=not on_terminal(),
        )
        self.epoch_start = self.next_look = time.monotonic()
        if epoch == 0:
            self.run_start = self.epoch_start
        yield from batches
        self.bar.close()

    def batch(self, step: int, metrics: dict[str, torch.Tensor], batch_size: int) -> None:
        """Take note of one finished batch; reads the figures only when the bar or the log needs them."""
        logged = step % self.log_interval == 0
        seen = not self.bar.disable and time.monotonic() >= self.next_look
        if logged or seen:
            row = read_metrics(metrics, batch_size)
            if not np.isfinite([row["d_loss"], row["g_loss"]]).all():
                raise Diverged(f"the loss is no longer finite at batch {step}")
            if logged:
                record = {"step": step, "epoch": step // self.steps_per_epoch} | {key: row[key] for key in CURVES}
                self.rows.write(json.dumps(record) + "\n")
                self.rows.flush()
                for key, tag in CURVES.items():
                    self.board.add_scalar(tag, row[key], step)
            if seen:
                self._show(step, row)
        self.bar.update(1)
        self.next_step = step + 1

    def end_epoch(self, step: int, real_imgs: torch.Tensor, metrics: dict[str, torch.Tensor], batch_size: int) -> None:
        """Write the tutorial's figures of the epoch's last batch: TensorBoard, and the line of a piped run."""
        epoch = step // self.steps_per_epoch
        row = read_metrics(metrics, batch_size)
        self.board.add_image("real_image", make_grid(real_imgs), epoch + 1)
        self.board.add_scalar("ACGAN_acc", row["d_acc"], epoch + 1)
        self.board.add_scalar("dist_loss", row["d_loss"], epoch + 1)
        self.board.add_scalar("gene_loss", row["g_loss"], epoch + 1)
        self.board.flush()
        if not self.bar.disable:
            self._show(step, row)
            self.bar.close()
            return
        took = time.monotonic() - self.epoch_start
        batches = step - epoch * self.steps_per_epoch + 1
        print(
            f"epoch {epoch + 1:3d}/{self.n_epochs}  batches {step + 1}  D loss {row['d_loss']:.4f}  "
            f"G loss {row['g_loss']:.4f}  ACGAN acc {row['d_acc']:.2%}  {batches / took:.2f} batches/s  "
            f"took {clock(took)}  run left {self._run_left(step)}",
            flush=True,
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
        total = min(self.max_steps, self.n_epochs * self.steps_per_epoch)
        return clock((time.monotonic() - self.run_start) / done * (total - done))

    def sample_grid(self, imgs: torch.Tensor, nrow: int, step: int) -> None:
        """Write a grid of generated images to images/{step}.png and to TensorBoard's fake_image."""
        grid = make_grid(imgs.cpu(), nrow=nrow, normalize=True)
        with whole_file(self.images / f"{step}.png") as file:
            save_image(grid, file, format="png")
        self.board.add_image("fake_image", grid, step)

    def save_weights(self, generator, discriminator) -> None:
        """Write acgan_gen.pth and acgan_dist.pth: tensors and sizes only; `models.load_network` reads them."""
        for name, network in [("acgan_gen.pth", generator), ("acgan_dist.pth", discriminator)]:
            buffer = io.BytesIO()  # so that a full disk shows as OSError, not as an error of the zip writer
            torch.save(pack_network(network), buffer)
            with whole_file(self.out_dir / name) as file:
                file.write(buffer.getbuffer())


def check_out_dir(out_dir: Path) -> None:
    """Raise BadInput unless a run can write into `out_dir`. Leaves no trace."""
    check_writable("--out_dir", out_dir)
    earlier_log_dir(out_dir)


def earlier_log_dir(out_dir: Path) -> Path | None:
    """The log folder of the run whose files lie in `out_dir`, or None; BadInput for a config.json of others."""
    config = out_dir / "config.json"
    if not config.exists():
        return None
    try:
        logs, name = Path(json.loads(config.read_text())["log_dir"]).parts
        if logs != "logs" or name == "..":
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"argument --out_dir: {str(config)!r} is not from a run of this script; name another folder"
        ) from error
    return out_dir / logs / name


def set_aside_earlier_run(out_dir: Path) -> None:
    """Move an earlier run's files from `out_dir` to the folder of that run below logs/, and say so."""
    kept = earlier_log_dir(out_dir)
    if kept is None:
        return
    (kept / "images").mkdir(parents=True, exist_ok=True)
    for grid in (out_dir / "images").glob("[0-9]*.png"):
        os.replace(grid, kept / "images" / grid.name)
    for name in ["metrics.jsonl", "acgan_gen.pth", "acgan_dist.pth", "config.json"]:  # config.json last: it marks a run
        if (out_dir / name).exists():
            os.replace(out_dir / name, kept / name)
    announce(f"The earlier run's files were moved to {kept}")


def new_log_dir(logs: Path) -> Path:
    """Make and return a folder named by the time, to the second, below `logs`."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"_{n}" for n in range(2, 100))]:
        try:
            (logs / (stamp + suffix)).mkdir(parents=True)
            return logs / (stamp + suffix)
        except FileExistsError:
            continue
    raise FileExistsError(f"{logs / stamp} and 98 more exist")


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
