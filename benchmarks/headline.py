"""The headline run to its end, `acgan.py --seed 0 --n_epochs 200`, in stretches whose weights are kept.

    python benchmarks/headline.py RUN                               # begin, or go on after a stop or a kill
    python benchmarks/headline.py RUN --acgan CLONE/acgan.py        # with the code of another checkout
    python benchmarks/headline.py RUN --stretch 20 --steps 60 --compile on       # other flags are acgan.py's

A stretch ends at each multiple of --stretch batches; together they equal one uninterrupted run, bit for bit. After each
one, RUN/stretches/STEP/ gets the weight files of G, D and the EMA, and RUN/stretches.jsonl a row. Ctrl-C, or
`kill -INT` to this process, ends the run in mid-stretch, with a checkpoint. Only files in RUN are read.
"""

import argparse
import json
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

STOPS = ("Compile: off", "not bit-exactly")  # what acgan.py says on stderr when a stretch would not continue the run
NETWORKS = {"generator": ("acgan_gen.pth", "Generator", ("n_classes", "latent_dim", "img_size", "channels")),
            "discriminator": ("acgan_dist.pth", "Discriminator", ("n_classes", "img_size", "channels")),
            "ema": ("acgan_gen_ema.pth", "Generator", ("n_classes", "latent_dim", "img_size", "channels"))}  # fmt: skip


def read_checkpoint(run: Path) -> dict | None:
    """Return the newest checkpoint in `run`, or None if there is none. It is read as data."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        if (run / name).exists():
            return torch.load(run / name, map_location="cpu", weights_only=True)
    return None


def keep_weights(run: Path, checkpoint: dict) -> None:
    """Write the checkpoint's three networks as weight files to RUN/stretches/STEP/, unless they are there.

    They are taken from the checkpoint, as a kill may have come between it and the run's own weight files.
    """
    folder = run / "stretches" / str(checkpoint["step"])
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    options = checkpoint["options"] | checkpoint.get("plan", {})  # older versions keep all in the options
    for key, (file, network, sizes) in NETWORKS.items():
        config = {name: options[name] for name in sizes}
        packed = dict(network=network, config=config, classes=options["classes"], state_dict=checkpoint["parts"][key])
        torch.save(packed, part / file)
    part.rename(folder)


def train_stretch(command: list[str]) -> tuple[int, str | None]:
    """Run one stretch and return its exit status, and the line for which it was stopped, if any."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: process.send_signal(signal.SIGINT))
    reason = None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if reason is None and any(words in line for words in STOPS):
            reason = line.strip()
            process.send_signal(signal.SIGINT)
    return process.wait(), reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run, which is made or continued")
    parser.add_argument("--acgan", type=Path, default=Path(__file__).resolve().parent.parent / "acgan.py",
                        help="the script to run (default: this checkout's)")  # fmt: skip
    parser.add_argument("--stretch", type=int, default=4690, help="batches of a stretch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=187_600, help="batches of the whole run (default: %(default)s)")
    opt, flags = parser.parse_known_args()
    while True:
        checkpoint = read_checkpoint(opt.run)
        done = checkpoint["step"] if checkpoint else 0
        if done and done % opt.stretch == 0:
            keep_weights(opt.run, checkpoint)
        if done >= opt.steps:
            return 0
        end = min((done // opt.stretch + 1) * opt.stretch, opt.steps)
        # without --resume a finished stretch would be moved aside, as an earlier run
        begin = ["--seed", "0", "--n_epochs", "200", "--out_dir", str(opt.run)]
        where = ["--resume", str(opt.run)] if checkpoint else begin
        start = time.monotonic()
        status, reason = train_stretch([sys.executable, str(opt.acgan), *where, "--max_steps", str(end), *flags])
        checkpoint = read_checkpoint(opt.run)
        row = dict(first=done, done=checkpoint["step"] if checkpoint else 0, seconds=round(time.monotonic() - start),
                   instructions=torch.backends.cpu.get_cpu_capability(), machine=platform.machine(),
                   threads=checkpoint["random"]["threads"] if checkpoint else None, torch=torch.__version__,
                   status=status, stopped_for=reason)  # fmt: skip
        with open(opt.run / "stretches.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if status or reason:
            print(f"headline.py: ended at batch {row['done']:,}, status {status}{f': {reason}' if reason else ''}",
                  file=sys.stderr)  # fmt: skip
            return status or 1


if __name__ == "__main__":
    sys.exit(main())
