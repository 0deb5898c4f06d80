"""Checks of the directories, their file system, and what the cache has lost."""

import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from stratocache.api.judgement import Judgement, broken, doubtful, fine
from stratocache.api.sizes import format_size
from stratocache.cache.configuration import Configuration
from stratocache.fs import reflink
from stratocache.fs.losses import losses
from stratocache.fs.pool import Pool
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.scrubbing import scrub_state
from stratocache.fs.state import Database


def judge_state_directory(configuration: Configuration) -> Judgement:
    """Judge the directory of what is kept."""
    path = configuration.state_dir
    if not path.exists():
        parent = _existing(path)
        if os.access(parent, os.W_OK | os.X_OK):
            return fine(f"{path} will be created")
        return broken(f"{path} is missing", f"Create it, or give write access to {parent}.")
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode) or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return broken(
            f"{path} is no directory that can be written",
            "Make it one, owned by the user that runs `stratocache serve`.",
        )
    if status.st_mode & 0o022:
        return broken(f"{path} can be written by others", f"chmod go-w {path}")
    return fine(f"{path}, mode {stat.S_IMODE(status.st_mode):04o}")


def judge_run_directory(configuration: Configuration) -> Judgement:
    """Judge the directory of sockets; raises `InvalidInput` for one whose name is too long."""
    RunDirectory(configuration.run_dir).require_short()
    parent = _existing(configuration.run_dir)
    if not os.access(parent, os.W_OK | os.X_OK):
        return broken(f"{parent} cannot be written", "Give write access, or run as root.")
    return fine(str(configuration.run_dir))


def judge_reflink(configuration: Configuration) -> Judgement:
    """Judge what a clone costs."""
    directory = _existing(configuration.state_dir)
    if not os.access(directory, os.W_OK):
        return doubtful(f"{directory} cannot be written, so not tried", "Be root.")
    if reflink.supported(directory, directory):
        return fine(f"{directory}: clones of whole images cost no space")
    pool = Pool.read(configuration.state_dir)
    if pool is not None:
        return fine(f"the pool {pool.path} is mounted when the daemon starts")
    return doubtful(
        f"{directory} does not share extents: clones are overlays",
        "`stratocache pool create --size 100G` makes an XFS file the state directory, while that "
        "is empty; XFS (reflink=1) or btrfs serve as well.",
    )


def judge_space(configuration: Configuration) -> Judgement:
    """Judge the free space."""
    directory = _existing(configuration.state_dir)
    free = shutil.disk_usage(directory).free
    reserve = configuration.space.reserve_bytes
    detail = f"{format_size(free)} free, {format_size(reserve)} of it reserved"
    if free <= reserve:
        mend = f"Free space on {directory}, or lower space.reserve_bytes."
        return broken(detail, mend)
    if free < 2 * reserve:
        return doubtful(detail, f"Free space on {directory} soon.")
    return fine(detail)


def judge_cache(configuration: Configuration) -> Judgement:
    """Judge what the cache has lost, and whether its scrubber is at work."""
    if not configuration.database.exists():
        return fine("empty")
    with closing(Database(configuration.database)) as db:
        try:
            lost = losses(db)
            scrubbed = scrub_state(db)
        except sqlite3.OperationalError:
            return fine("its schema is brought up to date by the next start")
    if lost:
        disks = sorted({uuid for loss in lost for uuid in loss.disks})
        return doubtful(
            f"{len(lost)} chunks or manifests are lost, {len(disks)} disks need them",
            "`stratocache cache status` names them; bring their origins back and run `stratocache "
            "image verify`, or restore the disks.",
        )
    if scrubbed.state == "paused":
        return doubtful("the scrubber is paused", "Run `stratocache cache scrub --resume`.")
    return fine(f"last read whole: {scrubbed.finished_at or 'never'}")


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(found for found in _upwards(path.absolute()) if found.exists())


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents
