"""The judge: a small classifier of real images. It recognises generated ones and supplies the metrics' features."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data.batches import normalize
from run.weights import load_network
from utils import on_terminal

BUNDLED = Path(__file__).resolve().parent.parent / "weights" / "judge.pth"
CHUNK = 500  # images judged at a time


class Judge(nn.Module):
    """A convolutional classifier; its features are the 128 means that its last layer reads."""

    def __init__(self, n_classes: int = 10, img_size: int = 32, channels: int = 1):
        super().__init__()
        self.config = dict(n_classes=n_classes, img_size=img_size, channels=channels)

        def block(in_filters, out_filters, kernel_size, stride):
            conv = nn.Conv2d(in_filters, out_filters, kernel_size, stride, kernel_size // 2, bias=False)
            return [conv, nn.BatchNorm2d(out_filters), nn.ReLU(inplace=True)]

        self.features = nn.Sequential(  # (B, channels, s, s), s = img_size
            *block(channels, 32, 5, 2),  # (B, 32, s/2, s/2)
            *block(32, 64, 3, 1),
            *block(64, 64, 3, 2),  #       (B, 64, s/4, s/4)
            *block(64, 96, 3, 1),
            nn.Dropout2d(0.1),
            *block(96, 128, 3, 2),  #      (B, 128, s/8, s/8)
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, n_classes)

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        """Map images, float32 (B, channels, s, s) in [-1, 1], to class logits, float32 (B, n_classes)."""
        return self.head(self.features(img))


def load_judge(path: Path | None, device="cpu", classes: list[str] | None = None) -> Judge:
    """Return the judge of a weight file, or the bundled one, in eval mode. Raises BadInput.

    If it knows the same `classes` in another order, it is put into theirs.
    """
    judge = load_network(path or BUNDLED, device, {"Judge": Judge}).eval()
    if classes is not None and sorted(classes) == sorted(judge.classes):
        put_in_order(judge, classes)
    return judge


@torch.no_grad()
def put_in_order(judge: Judge, classes: list[str]) -> None:
    """Let the judge number its classes as `classes`, the same names, do."""
    order = [judge.classes.index(name) for name in classes]
    for rows in judge.head.parameters():  # the weight and the bias, a row a class
        rows.copy_(rows[order])
    judge.classes = list(classes)


@torch.no_grad()
def judge_images(judge: Judge, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features, float32 (N, 128), and recognised classes, int64 (N,), of images, uint8 (N, C, H, W)."""
    judge.eval()
    device = next(judge.parameters()).device
    features = [judge.features(normalize(chunk.to(device))) for chunk in images.split(CHUNK)]
    return torch.cat(features).cpu(), torch.cat([judge.head(chunk).argmax(1) for chunk in features]).cpu()


def train_classifier(images, labels, n_classes: int, epochs: int, seed: int, device, jitter: bool) -> Judge:
    """Train a Judge on uint8 (N, C, H, W) and return it in eval mode: AdamW, one cycle of the rate, batches of 128.

    `seed` fixes all draws, and the caller's random streams stay as they are. `jitter` turns, scales and shifts each
    image a little, differently in each pass.
    """
    device, batch_size = torch.device(device), min(128, len(labels))
    images, labels = images.to(device), labels.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        judge = Judge(n_classes, images.shape[-1], images.shape[1]).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)
        steps = epochs * (len(labels) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.006, total_steps=steps)
        bar = tqdm(total=steps, desc="Training a classifier", unit="batch", leave=False, disable=not on_terminal())
        for _ in range(epochs):
            for indices in torch.randperm(len(labels)).to(device).split(batch_size)[: len(labels) // batch_size]:
                batch = normalize(images[indices])
                if jitter:
                    batch = jittered(batch)
                logits = judge(batch.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels[indices], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
        bar.close()
    return judge.eval()


def jittered(imgs: torch.Tensor) -> torch.Tensor:
    """Turn each image by up to 10 degrees, scale and shear it by up to 10 %, shift it by up to 6 % of its side."""

    def uniform(bound):
        return (torch.rand(len(imgs)) * 2 - 1) * bound

    angle, scale, shear = uniform(math.radians(10)), 1 + uniform(0.1), uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, uniform(0.12)], 1), torch.stack([sin, cos, uniform(0.12)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(imgs.device), imgs.shape, align_corners=False)
    return F.grid_sample(imgs + 1, grid, align_corners=False) - 1  # outside is 0, black is -1
