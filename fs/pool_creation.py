"""Making a pool: an XFS file takes the place of a state directory that holds nothing yet.

The file is made beside its name and renamed when it is whole. The record in the state directory is
the commit: before it a failed attempt leaves the state directory as it was; after it the rest is
repeated by mounting.
"""

import os
import shutil
import stat
import tempfile
import uuid as uuid_module
from pathlib import Path

from stratocache.cache.errors import Conflict, InvalidInput
from stratocache.fs import pool
from stratocache.fs.pool import POOL_BYTES_MIN, RECORD_NAME, Pool
from stratocache.fs.run_directory import RunDirectory

_SUFFIX = ".pool.xfs"
_KEPT_OUTSIDE = frozenset({RECORD_NAME, "lost+found"})
_FETCHED_AGAIN = ("chunks", "disks", "manifests", "quarantine", "stage")
"""Without images and disks these hold nothing but leftovers, and are made again when missing."""


def default_path(state_dir: Path) -> Path:
    """Return where the pool's file goes unless told otherwise: beside the state directory."""
    return state_dir.with_name(state_dir.name + _SUFFIX)


def create(
    state_dir: Path,
    run_dir: Path,
    size_bytes: int,
    *,
    path: Path | None = None,
    sparse: bool = False,
    reserve_bytes: int,
) -> Pool:
    """Make and mount the pool of a state directory; asked again for the same it mounts it.

    Space for all of it is taken at once, `reserve_bytes` beside it left alone, unless it is to be
    `sparse`. Raises `InvalidInput` (`pool-too-small`, `pool-path-inside`), `Conflict`
    (`already-running`, `pool-exists`, `pool-file-exists`, `state-not-empty`, `pool-run-dir`),
    `NoSpace`, and what `Pool`'s methods raise.
    """
    state_dir, run_dir = state_dir.absolute(), run_dir.absolute()
    path = (path or default_path(state_dir)).absolute()
    size_bytes -= size_bytes % 4096
    if size_bytes < POOL_BYTES_MIN:
        raise InvalidInput(
            "pool-too-small", f"A pool has {POOL_BYTES_MIN} bytes at least.", field="size"
        )
    for inside in (path, run_dir):
        if inside.resolve().is_relative_to(state_dir.resolve()):
            raise InvalidInput(
                "pool-path-inside",
                f"{inside} is in {state_dir}, which the pool will hide; choose another place.",
                field="path" if inside == path else "run_dir",
            )
    directory = RunDirectory(run_dir)
    directory.prepare(state_dir)
    with directory.lock():
        there = Pool.read(state_dir)
        if there is not None:
            _require_same(there, path, size_bytes)
            there.mount()
            return there
        _require_empty(state_dir)
        if path.exists():
            raise Conflict(
                "pool-file-exists",
                f"{path} exists and is not the pool of {state_dir}; remove it, or choose another "
                "--path.",
            )
        pool.require_room(path.parent, size_bytes, reserve_bytes, sparse=sparse)
        return _make(Pool(state_dir, path, str(uuid_module.uuid4()), sparse), size_bytes, run_dir)


def _require_same(there: Pool, path: Path, size_bytes: int) -> None:
    if there.path != path or there.status().size_bytes != size_bytes:
        raise Conflict(
            "pool-exists",
            f"{there.state_dir} has the pool {there.path} of {there.status().size_bytes} bytes; "
            "`stratocache pool grow` makes it larger.",
        )


def _require_empty(state_dir: Path) -> None:
    """Raise `Conflict` (`state-not-empty`) where images or disks would be hidden."""
    for name, what in (("manifests", "images or snapshots"), ("disks", "disks")):
        directory = state_dir / name
        if directory.is_dir() and any(directory.iterdir()):
            raise Conflict(
                "state-not-empty",
                f"{state_dir} holds {what}; a pool takes the place of an empty state directory: "
                "delete them first, or choose another state_dir.",
            )


def _make(made: Pool, size_bytes: int, run_dir: Path) -> Pool:
    incoming = made.path.with_name(f".{made.path.name}.new")
    incoming.unlink(missing_ok=True)
    try:
        incoming.touch(0o600)
        pool.extend(incoming, size_bytes, sparse=made.sparse)
        # -K: a discard would give back the space just taken
        pool.run_program(
            "mkfs.xfs", "-q", "-K", "-m", f"reflink=1,uuid={made.uuid}", str(incoming)
        )  # fmt: skip
        _fill(made, incoming, run_dir)
        incoming.rename(made.path)
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    try:
        pool.sync_directory(made.path.parent)
        made.write(made.state_dir)
    except BaseException:
        made.path.unlink(missing_ok=True)
        raise
    _remove_hidden(made.state_dir)
    made.mount()
    return made


def _fill(made: Pool, incoming: Path, run_dir: Path) -> None:
    """Put the record and what the state directory has besides images and disks into the pool."""
    with tempfile.TemporaryDirectory(prefix="pool-", dir=run_dir) as name:
        inside = Path(name)
        pool.mount_file(incoming, inside, discard=False)
        try:
            ignored = shutil.ignore_patterns(*_KEPT_OUTSIDE, *_FETCHED_AGAIN)
            shutil.copytree(made.state_dir, inside, symlinks=True, ignore=ignored,
                            dirs_exist_ok=True)  # fmt: skip
            made.write(inside)
            status = made.state_dir.stat()
            os.chown(inside, status.st_uid, status.st_gid)
            inside.chmod(stat.S_IMODE(status.st_mode))
        finally:
            pool.run_program("umount", name)  # writes back everything


def _remove_hidden(state_dir: Path) -> None:
    for entry in state_dir.iterdir():
        if entry.name in _KEPT_OUTSIDE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
