"""A run's folder: for one run at a time; cleared of an earlier run's files, or cut back for one that goes on."""

import errno
import json
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

from checkpoint import NEWEST, PREVIOUS
from utils import BadInput, announce, check_writable

LAST = ("acgan_gen.pth", "acgan_dist.pth", "acgan_gen_ema.pth")
BEST = ("acgan_gen_best.pth", "acgan_dist_best.pth")


def check_out_dir(out_dir: Path) -> None:
    """Raise BadInput unless a run can have its files in `out_dir`. Leaves no trace."""
    try:
        str(out_dir).encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"argument --out_dir: {str(out_dir)!r} is no text; name another folder") from error
    check_writable("--out_dir", out_dir)
    for name, wanted in [("images", Path.is_dir), ("logs", Path.is_dir), ("metrics.jsonl", Path.is_file)]:
        if (out_dir / name).exists() and not wanted(out_dir / name):
            what = "a folder" if wanted is Path.is_dir else "a file"
            raise BadInput(f"argument --out_dir: {str(out_dir / name)!r} is in the way, as it is not {what}")


def earlier_log_dir(out_dir: Path) -> Path | None:
    """The log folder of the run whose config.json lies in `out_dir`, or None; BadInput for one of others."""
    config = out_dir / "config.json"
    if not config.exists():
        return None
    try:
        log_dir = json.loads(config.read_text())["log_dir"]
        if not re.fullmatch(r"logs/[\w-]+", log_dir):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(
            f"argument --out_dir: {str(config)!r} is not from a run of this script; name another folder"
        ) from error
    return out_dir / log_dir


def check_records(log: dict) -> None:
    """Raise BadInput if a checkpoint's record names files that are none of a run's."""
    for name in [log["log_dir"] + "/events.", *log["sizes"]]:
        if not re.fullmatch(r"metrics\.jsonl|logs/[\w-]+/events\.[\w.-]*", str(name)):
            raise BadInput(f"argument --resume: the checkpoint names {name!r}, which is no record of a run")


def same_folder(a: Path, b: Path) -> bool:
    """True if both name one existing folder."""
    return a.exists() and b.exists() and a.samefile(b)


def lock(out_dir: Path):
    """Keep other runs out of `out_dir` until the returned file is closed; None where the system has no such lock.

    Raises:
        BadInput: another run is writing there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(out_dir / ".lock", "w")  # noqa: SIM115 (closed by the caller)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None  # a file system without locks
        raise BadInput(
            f"argument --out_dir: another run is writing to {str(out_dir)!r}; name another folder"
        ) from error
    return file


def remove_leftovers(out_dir: Path) -> None:
    """Delete the half-written files of a run that was killed; utils.whole_file names them."""
    for folder in ("", "images", "images/fixed_z"):
        for part in (out_dir / folder).glob(".*.part"):
            part.unlink(missing_ok=True)


def set_aside_earlier_run(out_dir: Path) -> None:
    """Move an earlier run's files from `out_dir` to the folder of that run below logs/, and say so."""
    # config.json last: it names the folder
    names = ["metrics.jsonl", *LAST, *BEST, NEWEST, PREVIOUS, "config.json"]
    files = [out_dir / name for name in names if (out_dir / name).exists()]
    if not files:
        return
    kept = earlier_log_dir(out_dir) or new_log_dir(out_dir / "logs")
    for folder in ("images", "images/fixed_z"):
        (kept / folder).mkdir(parents=True, exist_ok=True)
        for grid in (out_dir / folder).glob("[0-9]*.png"):
            os.replace(grid, kept / folder / grid.name)
    for file in files:
        os.replace(file, kept / file.name)
    announce(f"The earlier run's files were moved to {kept}")


def bring_back_records(source: Path, out_dir: Path, log_dir: Path, sizes: dict[str, int]) -> None:
    """Cut the records of an interrupted run back to `sizes`; copy them first if `out_dir` is not their folder.

    Args:
        source: the folder of the checkpoint.
        out_dir: the folder in which the run goes on.
        log_dir: the run's TensorBoard folder in `out_dir`.
        sizes: bytes to keep of metrics.jsonl and of each event file, by its path in the folder that they were in.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    for name in BEST:
        if (source / name).exists() and not same_folder(source, out_dir):
            shutil.copyfile(source / name, out_dir / name)
    kept = set()
    for name, size in sizes.items():
        name = Path(name)
        to = (out_dir if name.name == "metrics.jsonl" else log_dir) / name.name
        kept.add(to)
        # the records of a run that was set aside lie beside its checkpoint
        found = next((path for path in (source / name, source / name.name) if path.exists()), None)
        if found is None or found.stat().st_size < size:
            announce(f"Warning: {source / name} is missing or was cut: the run's record will have a gap.")
        if found is None:
            continue
        if not same_folder(source, out_dir):
            shutil.copyfile(found, to)
        if to.exists() and to.stat().st_size > size:
            os.truncate(to, size)
    for events in log_dir.glob("events.*"):
        if events not in kept:
            events.unlink()


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
