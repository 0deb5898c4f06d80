"""`stratocache disk share` and its kin: who else may use a disk."""

from urllib.parse import quote

import click

from stratocache.api.completion import ACCOUNT, DISK
from stratocache.api.examples import examples
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
    document = session.client.put(_path(uuid, user), {"access": access})
    session.show(document, f"Disk {uuid} is shared with {user} ({access}).")


@click.command(epilog=examples("stratocache disk unshare $UUID jane"))
@click.argument("uuid", type=DISK)
@click.argument("user", type=ACCOUNT)
@json_option
@click.pass_obj
def unshare(session: Session, uuid: str, user: str) -> None:
    """Share a disk with a user no longer; what they have attached stays attached."""
    session.client.delete(_path(uuid, user))
    session.show({"unshared": uuid, "user": user}, f"Disk {uuid} is not shared with {user}.")


@click.command(epilog=examples("stratocache disk shares $UUID"))
@click.argument("uuid", type=DISK)
@json_option
@click.pass_obj
def shares(session: Session, uuid: str) -> None:
    """List the users that a disk is shared with."""
    session.show_table(
        "shares",
        session.client.items(f"/v1/disks/{quote(uuid, safe='')}/shares", "shares"),
        {
            "USER": lambda item: item["user"],
            "ACCESS": lambda item: item["access"],
            "SINCE": lambda item: item["created_at"],
        },
    )


def _path(uuid: str, user: str) -> str:
    return f"/v1/disks/{quote(uuid, safe='')}/shares/{quote(user, safe='')}"
