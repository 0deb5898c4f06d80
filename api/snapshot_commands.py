"""`stratocache disk snapshot` and its kin: what a disk was, is to become, or is kept as."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratocache.api.completion import DISK, SNAPSHOT
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, SizeType, json_option
from stratocache.api.sizes import format_size
from stratocache.api.watch import watch_option

if TYPE_CHECKING:
    from stratocache.api.client import Document


@click.command(
    epilog=examples(
        "stratocache disk snapshot $UUID --tag before",
    )
)
@click.argument("uuid", type=DISK)
@click.option("--tag", default="", help="Free text, at most 40 characters.")
@json_option
@click.pass_obj
def snapshot(session: Session, uuid: str, tag: str) -> None:
    """Keep what a disk is now and write the snapshot's id; the disk may be in use."""
    document = session.client.post(path_of("disks", uuid, "snapshots"), {"tag": tag}, wait=0)
    if "disk_uuid" not in document:
        done = session.follow(document, "snapshot")
        document = session.client.get(path_of("disks", uuid, "snapshots", done["subject"]))
    session.show(document, document["id"])


@click.command(
    epilog=examples(
        "stratocache disk snapshots $UUID",
    )
)
@click.argument("uuid", type=DISK)
@click.option("--tag", help="Only snapshots with this tag.")
@watch_option
@json_option
@click.pass_obj
def snapshots(session: Session, uuid: str, tag: str | None) -> None:
    """List the snapshots of a disk, oldest first."""
    session.show_list(
        path_of("disks", uuid, "snapshots"),
        {
            "ID": "id",
            "STATE": "state",
            "SIZE": lambda item: format_size(item["size_bytes"]),
            "TAKEN": "frozen_at",
            "TAG": "tag",
        },
        tag=tag,
    )


@click.command(
    name="snapshot-rm",
    epilog=examples(
        "stratocache disk snapshot-rm $UUID $SNAPSHOT",
    ),
)
@click.argument("uuid", type=DISK)
@click.argument("snapshot_id", metavar="SNAPSHOT", type=SNAPSHOT)
@json_option
@click.pass_obj
def snapshot_rm(session: Session, uuid: str, snapshot_id: str) -> None:
    """Delete a snapshot; other snapshots, clones of it and the disk stay as they are."""
    session.remove(path_of("disks", uuid, "snapshots", snapshot_id), "delete")
    session.show({"deleted": snapshot_id}, f"Snapshot {snapshot_id} is deleted.")


@click.command(
    epilog=examples(
        "stratocache disk rollback $UUID $SNAPSHOT",
    )
)
@click.argument("uuid", type=DISK)
@click.argument("snapshot_id", metavar="SNAPSHOT", type=SNAPSHOT)
@json_option
@click.pass_obj
def rollback(session: Session, uuid: str, snapshot_id: str) -> None:
    """Let a detached disk be again what it was at SNAPSHOT; what was written since is lost."""
    operation = session.client.post(
        path_of("disks", uuid, "snapshots", snapshot_id, "rollback"), {}, wait=0
    )
    if operation:
        session.follow(operation, "rollback")
    session.show(
        {"rolled_back": uuid, "snapshot": snapshot_id},
        f"Disk {uuid} is what it was at snapshot {snapshot_id}.",
    )


@click.command(
    epilog=examples(
        "stratocache disk resize $UUID 40G",
    )
)
@click.argument("uuid", type=DISK)
@click.argument("size_bytes", metavar="SIZE", type=SizeType())
@json_option
@click.pass_obj
def resize(session: Session, uuid: str, size_bytes: int) -> None:
    """Grow a disk to SIZE, such as 20G, also while a guest has it.

    The guest sees the new size when its initiator has looked: with QEMU's own, as in the arguments
    that `launch` prints, say `virsh blockresize DOMAIN vda SIZE` or `block_resize` in the monitor;
    with the kernel's, `iscsiadm -m session --rescan`.
    """
    document = session.client.patch(path_of("disks", uuid), {"size_bytes": size_bytes}, wait=0)
    if "uuid" not in document:
        session.follow(document, "resize")
        document = session.client.get(path_of("disks", uuid))
    session.show(document, f"Disk {uuid} has {document['size_bytes']} bytes.")


@click.command(
    epilog=examples(
        "stratocache disk hydrate $UUID",
    )
)
@click.argument("uuid", type=DISK)
@json_option
@click.pass_obj
def hydrate(session: Session, uuid: str) -> None:
    """Let a clone be complete, so that it needs no image any more; it may be in use."""
    operation = session.client.post(path_of("disks", uuid, "hydrate"), {}, wait=0)
    session.follow(operation, "hydrate")
    session.show(session.client.get(path_of("disks", uuid)), f"Disk {uuid} is complete.")


@click.command(
    epilog=examples(
        "stratocache disk restore $UUID",
    )
)
@click.argument("uuid", type=DISK)
@json_option
@click.pass_obj
def restore(session: Session, uuid: str) -> None:
    """Take a disk out of quarantine and keep it for good."""
    document = session.client.post(path_of("disks", uuid, "restore"), {})
    session.show(document, f"Disk {uuid} is restored.")


@click.command(
    epilog=examples(
        "stratocache disk save $UUID --output new.xml --title 'Our system'",
    )
)
@click.argument("uuid", type=DISK)
@click.option(
    "--snapshot",
    type=SNAPSHOT,
    metavar="ID",
    help="Save this snapshot instead of the disk as it is now.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the unsigned metadata to FILE, for `marketplace sign`.")  # fmt: skip
@click.option("--title", help="Of the image, in a line.")
@click.option("--comment", help="Description of the image.")
@click.option("--os", "os", help="Such as debian.")
@click.option("--os-version", help="Such as 12.")
@click.option("--os-arch", help="Such as x86_64.")
@click.option("--version", help="Of the image.")
@click.option("--author", help="Who made the image.")
@click.option("--publisher", help="Who vouches for it: an organisation.")
@click.option(
    "--kind",
    type=click.Choice(["machine", "disk"]),
    default="machine",
    show_default=True,
    help="Whether it boots.",
)
@click.option("--valid-days", type=click.IntRange(1, 3660), help="Until the metadata expires.")
@json_option
@click.pass_obj
def save(session: Session, /, uuid: str, output: Path | None, **wanted: Any) -> None:
    """Save a disk as an image of this host's cache and write the image's id.

    Only what has changed since the disk was cloned takes space. The image can be launched on this
    host by its id; to publish it, give its metadata locations, sign it, and upload both.
    """
    if output is not None:
        _require_writable(output)
    body = {name: value for name, value in wanted.items() if value is not None}
    done = session.follow(session.client.post(path_of("disks", uuid, "save"), body, wait=0), "save")
    result = _result(done)
    if output is not None:
        from stratocache.cache import publication

        publication.write(output, result["metadata"].encode())
        print(f"The metadata is in {output}; sign it with `marketplace sign`.", file=sys.stderr)
    session.show(result, result["image"])


def _require_writable(output: Path) -> None:
    """Raise before the work begins, not after it, when the folder cannot be written."""
    from stratocache.cache.errors import InvalidInput

    if not os.access(output.absolute().parent, os.W_OK):
        raise InvalidInput(
            "output-unwritable", f"{output.parent} cannot be written.", field="output"
        )


def _result(operation: "Document") -> "Document":
    result: Document = operation["result"]
    return result
