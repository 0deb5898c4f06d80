"""`stratocache instance` and `attachment`: what was launched, and who uses which disk."""

import click

from stratocache.api.completion import DISK, IMAGE, INSTANCE
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, json_option
from stratocache.api.watch import watch_option


@click.group()
def instance() -> None:
    """What was launched here; see also launch, lease and halt."""


@instance.command(epilog=examples("stratocache instance ls", "stratocache instance ls --watch"))
@click.option(
    "--state", type=click.Choice(["preparing", "active", "ending"]), help="Only in this state."
)
@watch_option
@json_option
@click.pass_obj
def ls(session: Session, state: str | None) -> None:
    """List the instances that you may see."""
    session.show_list(
        "/v1/launches",
        {
            "INSTANCE": "instance",
            "STATE": "state",
            "REFERENCE": "reference",
            "DISKS": lambda item: len(item["attachments"]),
            "LEASED UNTIL": "lease_expires_at",
            "SINCE": "created_at",
        },
        state=state,
    )


@instance.command(epilog=examples("stratocache instance show vm1 --json | jq -r .libvirt_xml"))
@click.argument("name", metavar="INSTANCE", type=INSTANCE)
@watch_option
@json_option
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Show what an instance has; the JSON also has how to reach it."""
    document = session.client.get(path_of("launches", name))
    session.show_fields(document, hidden=("boot", "attachments", "libvirt_xml", "qemu_args"))


@click.group()
def attachment() -> None:
    """Who uses which disk; see also disk attach and detach."""


@attachment.command(
    "ls",
    epilog=examples(
        "stratocache attachment ls --instance vm1", "stratocache attachment ls --image $ID --watch"
    ),
)
@click.option("--instance", type=INSTANCE, help="Only of this instance.")
@click.option("--disk", type=DISK, metavar="UUID", help="Only of this disk.")
@click.option("--image", type=IMAGE, metavar="ID", help="Only of this image.")
@watch_option
@json_option
@click.pass_obj
def list_attachments(session: Session, /, **filters: str | None) -> None:
    """List the attachments that you may see."""
    session.show_list(
        "/v1/attachments",
        {
            "INSTANCE": "instance",
            "ROLE": "role",
            "ACCESS": "access",
            "STATE": lambda item: "problem" if item["problem"] else item["state"],
            "DISK OR IMAGE": lambda item: item["disk_uuid"] or item["image_id"],
            "OWNER": "owner",
            "PORTAL": "portal",
        },
        **filters,
    )
