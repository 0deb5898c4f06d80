"""`STATE_DIR/transfers`: bytes of disks on their way in or out.

download-RANDOM/       a qcow2 file while it is being made
upload-UUID/           what has been uploaded for a disk so far (`stratocache.fs.content_upload`)
import-UUID/           what has been downloaded for a disk so far (`stratocache.fs.content_import`)

Whoever works in a directory holds a lock on it (flock(2)), which ends with the process. On the
file system of the disks, so that a whole file becomes a disk's by renaming it.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from stratocache.cache.configuration import Configuration
from stratocache.fs.state import Database

log = logging.getLogger(__name__)

DOWNLOAD, UPLOAD, IMPORT = "download-", "upload-", "import-"

_UPLOAD_KEPT_S = 24 * 3600
"""An upload that is not continued for so long is given up."""
_CLAIMING_S = 60
"""A directory so young may not be locked yet by whoever made it."""
_DIRECTORY_MODE = 0o700


def transfers_directory(configuration: Configuration) -> Path:
    """Return the directory, made when it is not there."""
    directory = configuration.state_dir / "transfers"
    directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
    return directory


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Lock a directory for the time of the block; what is yielded is False when another has it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # it may have been removed, and made anew, between open and lock
        same = directory.exists() and os.path.samestat(directory.stat(), os.fstat(descriptor))
        yield same
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


@contextmanager
def claimed_directory(configuration: Configuration, prefix: str) -> Iterator[Path]:
    """Yield a new directory that is ours, and removed with all in it at the end of the block."""
    parent = transfers_directory(configuration)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with claimed(directory):
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def sweep(configuration: Configuration, db: Database) -> None:
    """Remove what nobody will continue: old uploads, uploads and imports of disks that are gone,
    conversions whose process is. Blocks."""
    uuids = {row["uuid"] for row in db.rows("SELECT uuid FROM disks")}
    wanted = db.rows("SELECT subject FROM operations WHERE state IN ('pending', 'running')")
    subjects = {row["subject"] for row in wanted}
    for directory in transfers_directory(configuration).iterdir():
        if _is_kept(directory, uuids, subjects):
            continue
        with claimed(directory) as ours:
            if ours:
                log.info("removing the leftovers of %s", directory.name)
                shutil.rmtree(directory, ignore_errors=True)


def _is_kept(directory: Path, uuids: Collection[str], subjects: Collection[str]) -> bool:
    try:
        name, age_s = directory.name, time.time() - directory.stat().st_mtime
    except FileNotFoundError:
        return True  # gone meanwhile: nothing to remove
    if name.startswith(UPLOAD):
        return name.removeprefix(UPLOAD) in uuids and age_s < _UPLOAD_KEPT_S
    if name.startswith(IMPORT):
        return name.removeprefix(IMPORT) in subjects
    return age_s < _CLAIMING_S
