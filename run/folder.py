"""A run's folder: one run at a time writes to it, and a new run first moves an earlier run's files aside."""

import contextlib
import errno
import json
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

from run.checkpoint import NEWEST, PREVIOUS, has_checkpoint, read_checkpoint
from run.weights import BEST, WEIGHTS
from utils import PART_FILE, BadInput, announce, atomic_write, check_writable, rank

GRIDS = ("images", "images/fixed_z")
OUR_PART = re.compile(re.escape(PART_FILE).replace(r"\{pid\}", "[0-9]+"))
LOG_DIR = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?")
OUR_GRID = re.compile(r"(0|[1-9][0-9]*)\.png")


def check_out_dir(out_dir: Path) -> None:
    """Raise BadInput unless a run can have its files in `out_dir`. Leave no trace."""
    if out_dir.is_symlink() and not out_dir.exists():
        raise BadInput(f"argument --out_dir: {str(out_dir)!r} is a link to nothing: mend it, or name another folder")
    check_writable("--out_dir", out_dir)
    for name in ("images", "logs", "metrics.jsonl", "config.json", ".lock", NEWEST, PREVIOUS, *WEIGHTS, *BEST):
        what, is_wanted = ("folder", Path.is_dir) if name in ("images", "logs") else ("file", Path.is_file)
        if os.path.lexists(out_dir / name) and not is_wanted(out_dir / name):
            raise BadInput(f"argument --out_dir: {str(out_dir / name)!r} is not a {what}: name another folder")
    earlier_log_dir(out_dir)  # raises if config.json is not ours
    if not rank() and (out_dir / ".lock").exists() and (file := lock(out_dir)):
        file.close()


def earlier_log_dir(out_dir: Path) -> Path | None:
    """Return the log folder named in the config.json of `out_dir`, or None.

    Raises BadInput if it is not from a run, and OSError if it cannot be read.
    """
    config = out_dir / "config.json"
    if not config.exists():
        return None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        log_dir = settings["log_dir"]
        if not re.fullmatch(r"logs/[\w-]+", log_dir) or not settings.keys() >= {"options", "seed", "versions"}:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"argument --out_dir: {str(config)!r} is not from a run: name another folder") from error
    return out_dir / log_dir


def lock(out_dir: Path):
    """Keep other runs out of `out_dir` until the returned file is closed. Raises BadInput; None without such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(out_dir / ".lock", "ab")  # noqa: SIM115 (closed by the caller)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None  # a file system without locks
        raise BadInput(
            f"argument --out_dir: another run writes to {str(out_dir)!r}: stop it, or name another folder"
        ) from error
    return file


def remove_part_files(out_dir: Path) -> None:
    """Delete the half-written files of a killed run; only names that utils.atomic_write gives."""
    for folder in ("", *GRIDS):
        for path in (out_dir / folder).glob(".*"):
            if OUR_PART.fullmatch(path.name):
                path.unlink(missing_ok=True)


def set_aside_earlier_run(out_dir: Path) -> None:
    """Move an earlier run's files, and all that has their names, to that run's folder below logs/, and say so."""
    pngs = [f"{folder}/{path.name}" for folder in GRIDS for path in (out_dir / folder).glob("*.png")]
    grids = [name for name in pngs if OUR_GRID.fullmatch(Path(name).name)]
    # config.json last: it names the folder
    names = [*grids, "metrics.jsonl", "images/film.gif", *WEIGHTS, *BEST, PREVIOUS, NEWEST, "config.json"]
    found = [name for name in names if (out_dir / name).is_file()]
    if not found:
        return
    kept = earlier_log_dir(out_dir)
    if kept is None or any((kept / name).exists() for name in found):  # never overwrite
        kept = new_log_dir(out_dir)
    for name in found:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        move(out_dir / name, kept / name)
    announce(f"The earlier run's files were moved to {kept}")
    drop_older_checkpoints(out_dir, kept)


def move(source: Path, target: Path) -> None:
    """Rename a file; to another disk, which logs/ may be on, copy it whole and then delete it. Raises OSError.

    Of a link the target stays where it is.
    """
    if source.is_symlink():
        os.symlink(os.path.realpath(source), target)  # a relative one would lead elsewhere from there
        source.unlink()
        return
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with open(source, "rb") as file:
            atomic_write(target, lambda copy: shutil.copyfileobj(file, copy))
        source.unlink()


def drop_older_checkpoints(out_dir: Path, latest: Path) -> None:
    """Delete the checkpoints of all earlier runs but the newest that has one: it alone may be extended.

    `latest` is the folder of the newest run; the age of others is that of their files, as local time may go back.

    What cannot be read stays, and so does a folder that was a run's own --out_dir since.
    """

    def is_moved_run(folder: Path) -> bool:
        return bool(LOG_DIR.fullmatch(folder.name)) and not (folder / "logs").exists() and has_checkpoint(folder)

    def age(folder: Path) -> tuple[bool, float]:
        return folder == latest, max(path.stat().st_mtime for path in folder.glob("checkpoint*.pt"))

    dropped = False
    with contextlib.suppress(OSError):
        for folder in sorted(filter(is_moved_run, (out_dir / "logs").iterdir()), key=age)[:-1]:
            with contextlib.suppress(BadInput):
                if read_checkpoint(folder, quiet=True)["finished"]:
                    for name in (NEWEST, PREVIOUS):
                        (folder / name).unlink(missing_ok=True)
                    dropped = True
    if dropped:
        announce("Checkpoints of runs before that one were deleted; their weights, rows and grids stay.")


def rows_before(path: Path, step: int) -> bytes:
    """Return the rows of metrics.jsonl from before batch `step`; broken rows are left out."""

    def is_earlier(row):
        try:
            return json.loads(row)["step"] < step
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    rows = path.read_bytes().splitlines() if path.exists() else []
    return b"".join(row + b"\n" for row in rows if is_earlier(row))


def new_log_dir(out_dir: Path) -> Path:
    """Make and return a folder in logs/ whose name is the time, to the second."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ["", *(f"_{n}" for n in range(2, 100))]:
        with contextlib.suppress(FileExistsError):
            (out_dir / "logs" / (stamp + suffix)).mkdir(parents=True)
            return out_dir / "logs" / (stamp + suffix)
    raise FileExistsError(f"{out_dir / 'logs' / stamp} and 98 more exist")
