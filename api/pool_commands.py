"""`stratocache pool`: an XFS file as state directory, where the host's file system has no reflinks."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stratocache.api.examples import examples
from stratocache.api.session import Session, SizeType, json_option
from stratocache.api.sizes import format_size
from stratocache.api.watch import watch_option

if TYPE_CHECKING:
    from stratocache.fs.pool import Pool


@click.group()
def pool() -> None:
    """Make, grow and show the pool that holds the state directory (root only)."""


@pool.command(
    epilog=examples(
        "stratocache pool create --size 100G",
    )
)
@click.option("--size", "size_bytes", type=SizeType(), required=True, help="Such as 100G.")
@click.option(
    "--path", type=click.Path(path_type=Path), help="File to make [default: STATE_DIR.pool.xfs]."
)
@click.option(
    "--sparse", is_flag=True,
    help="Take space only as it is used. Should the file system around the pool fill up, the pool "
    "stops and so does every disk in it.",
)  # fmt: skip
@json_option
@click.pass_obj
def create(session: Session, size_bytes: int, path: Path | None, sparse: bool) -> None:
    """Make a pool in place of an empty state directory; the daemon mounts it from then on."""
    from stratocache.fs import pool_creation

    _require_root()
    configuration = session.configuration
    made = pool_creation.create(
        configuration.state_dir, configuration.run_dir, size_bytes,
        path=path, sparse=sparse, reserve_bytes=configuration.space.reserve_bytes,
    )  # fmt: skip
    _show(session, made)


@pool.command(
    epilog=examples(
        "stratocache pool grow --size 200G",
    )
)
@click.option("--size", "size_bytes", type=SizeType(), required=True, help="The new size.")
@json_option
@click.pass_obj
def grow(session: Session, size_bytes: int) -> None:
    """Make the pool larger, also while the daemon runs and disks are attached."""
    _require_root()
    found = _pool(session)
    found.grow(size_bytes, session.configuration.space.reserve_bytes)
    _show(session, found)


@pool.command(
    epilog=examples(
        "stratocache pool status",
    )
)
@watch_option
@json_option
@click.pass_obj
def status(session: Session) -> None:
    """Show the pool."""
    _show(session, _pool(session))


def _require_root() -> None:
    from stratocache.cache.errors import Refused

    if os.geteuid() != 0:
        raise Refused("root-only", "Run this as root: it mounts a file system.")


def _pool(session: Session) -> "Pool":
    from stratocache.cache.errors import NotFound
    from stratocache.fs.pool import Pool

    state_dir = session.configuration.state_dir.absolute()
    found = Pool.read(state_dir)
    if found is None:
        raise NotFound(
            "pool-unknown",
            f"{state_dir} has no pool; `stratocache pool create --size 100G` makes one.",
        )
    return found


def _show(session: Session, shown: "Pool") -> None:
    found = shown.status()
    document = asdict(found)
    if session.as_json:
        session.show(document, "")
        return
    sizes = ("size_bytes", "allocated_bytes", "free_bytes")
    for name in sizes:
        value = document.pop(name)
        document[name.removesuffix("_bytes")] = None if value is None else format_size(value)
    session.show_fields(document)
