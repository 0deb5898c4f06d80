"""`stratocache disk share` and its kin: who else may use a disk."""

import click

from stratocache.api.completion import ACCOUNT, DISK
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, json_option


@click.command(
    epilog=examples(
        "stratocache disk share $UUID jane", "stratocache disk share $UUID jane --write"
    )
)
@click.argument("uuid", type=DISK)
@click.argument("user", type=ACCOUNT)
@click.option("--write", is_flag=True, help="Attach it read-write, upload, take snapshots, too.")
@json_option
@click.pass_obj
def share(session: Session, uuid: str, user: str, write: bool) -> None:
    """Let a user see, clone, download and attach a disk read-only."""
    access = "write" if write else "read"
    document = session.client.put(path_of("disks", uuid, "shares", user), {"access": access})
    session.show(document, f"Disk {uuid} is shared with {user} ({access}).")


@click.command(epilog=examples("stratocache disk unshare $UUID jane"))
@click.argument("uuid", type=DISK)
@click.argument("user", type=ACCOUNT)
@json_option
@click.pass_obj
def unshare(session: Session, uuid: str, user: str) -> None:
    """Share a disk with a user no longer; what they have attached stays attached."""
    session.client.delete(path_of("disks", uuid, "shares", user))
    session.show({"unshared": uuid, "user": user}, f"Disk {uuid} is not shared with {user}.")


@click.command(epilog=examples("stratocache disk shares $UUID"))
@click.argument("uuid", type=DISK)
@json_option
@click.pass_obj
def shares(session: Session, uuid: str) -> None:
    """List the users that a disk is shared with."""
    session.show_list(
        path_of("disks", uuid, "shares"),
        {
            "USER": "user",
            "ACCESS": "access",
            "SINCE": "created_at",
        },
    )
