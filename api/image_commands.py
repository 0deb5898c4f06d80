"""`stratocache image`: the cached images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratocache.api.completion import IMAGE
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, json_option, plain
from stratocache.api.sizes import format_size
from stratocache.api.watch import watch_option

if TYPE_CHECKING:
    from stratocache.api.client import Document


@click.group()
def image() -> None:
    """Fetch, list, pin, verify, mount and delete cached images."""


@image.command(
    epilog=examples(
        "stratocache image fetch MMZu9WvwKIro-rtBQfDk4PsKO7_ --pin",
    )
)
@click.argument("reference")
@click.option("--pin", is_flag=True, help="Never evict it.")
@json_option
@click.pass_obj
def fetch(session: Session, reference: str, pin: bool) -> None:
    """Bring an image into the cache and write its id; Ctrl-C cancels the fetch."""
    operation = session.client.begin("/v1/images", {"reference": reference, "pin": pin})
    done = session.follow(operation, "fetch")
    document = session.client.get(path_of("images", done["result"]["image"]))
    session.show(document, document["id"])


@image.command(
    epilog=examples(
        "stratocache image ls",
        "stratocache image ls --state fetching --watch",
    )
)
@click.option("--state", help="Only images in this state.")
@watch_option
@json_option
@click.pass_obj
def ls(session: Session, state: str | None) -> None:
    """List the images."""
    session.show_list(
        "/v1/images",
        {
            "ID": "id",
            "STATE": "state",
            "SIZE": _size,
            "PINNED": "pinned",
            "TITLE": lambda item: item["entry"]["title"],
        },
        state=state,
    )


def _size(item: "Document") -> Any:
    return None if item["size_bytes"] is None else format_size(item["size_bytes"])


@image.command(
    epilog=examples(
        "stratocache image show $ID",
        "stratocache image show $ID --watch     # until it is complete",
    )
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@watch_option
@json_option
@click.pass_obj
def show(session: Session, image_id: str) -> None:
    """Show one image: its entry, which part is here, what guests waited, what was made of it."""
    from stratocache.api import plots
    from stratocache.api.lineage_tree import show_lineage

    document = session.client.get(path_of("images", image_id), map=str(plots.CELLS))
    hidden = ("traffic_history", "local_map", "disks", "omitted_count")
    session.show_fields(document, hidden=hidden)
    if session.as_json:
        return
    plots.echo_here(document)
    plots.echo_history(document)
    if document["disks"]:
        show_lineage(document)


@image.command(
    epilog=examples(
        "stratocache image rm $ID",
    )
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@json_option
@click.pass_obj
def rm(session: Session, image_id: str) -> None:
    """Delete an image that nothing uses."""
    session.remove(path_of("images", image_id), "delete")
    session.show({"deleted": image_id}, f"Image {image_id} is deleted.")


@image.command(
    epilog=examples(
        "stratocache image pin $ID",
    )
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@json_option
@click.pass_obj
def pin(session: Session, image_id: str) -> None:
    """Never evict an image."""
    session.show(
        session.client.put(path_of("images", image_id, "pin")), f"Image {image_id} is pinned."
    )


@image.command(
    epilog=examples(
        "stratocache image unpin $ID",
    )
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@json_option
@click.pass_obj
def unpin(session: Session, image_id: str) -> None:
    """Let an image be evicted again."""
    document = session.client.delete(path_of("images", image_id, "pin"))
    session.show(document, f"Image {image_id} is not pinned.")


@image.group()
def bootset() -> None:
    """What a boot reads of an image: it is fetched first. Learned, or taken from elsewhere."""


@bootset.command(
    "export",
    epilog=examples(
        "stratocache image bootset export $ID base.img.bootset",
    ),
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
@click.pass_obj
def export_bootset(session: Session, image_id: str, file: Path) -> None:
    """Write the boot set of an image to FILE, to lie beside its index as NAME.bootset."""
    from stratocache.cache import publication

    document = session.client.get(path_of("images", image_id, "bootset"))
    publication.write(file, json.dumps(document).encode())
    session.show(
        {"image": image_id, "file": str(file), "chunks": len(document["indexes"])},
        f"{file}: {len(document['indexes'])} chunks",
    )


@bootset.command(
    "import",
    epilog=examples(
        "stratocache image bootset import $ID base.img.bootset",
    ),
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
@click.pass_obj
def import_bootset(session: Session, image_id: str, file: Path) -> None:
    """Use the boot set in FILE for an image."""
    from stratocache.cache import bootset as boot_sets
    from stratocache.cache.errors import InvalidInput

    try:
        document = json.loads(boot_sets.read(file))
    except ValueError:
        raise InvalidInput("bootset-invalid", f"{file} is not a boot set.") from None
    session.client.put(path_of("images", image_id, "bootset"), document)
    session.show({"image": image_id, "file": str(file)}, f"Image {image_id} has a boot set.")


@image.command(
    epilog=examples(
        "stratocache image verify $ID",
    )
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@json_option
@click.pass_obj
def verify(session: Session, image_id: str) -> None:
    """Hash all of an image, and fetch again what is damaged or missing; 6 if it cannot be had."""
    from stratocache.api.cache_commands import verify_image

    done = verify_image(session, image_id)
    result = done["result"]
    session.show(
        done,
        f"Image {image_id} is whole: {result['chunks']} chunks, {result['repaired']} repaired.",
    )


@image.command(
    epilog=examples(
        "stratocache image mount $ID /mnt",
        "stratocache image mount $ID /mnt --partition 2",
    )
)
@click.argument("image_id", metavar="ID", type=IMAGE)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--partition", type=click.IntRange(1, 128), help="Number; found by itself if absent.")
@json_option
@click.pass_obj
def mount(session: Session, image_id: str, directory: Path, partition: int | None) -> None:
    """Mount a file system of an image read-only on DIRECTORY."""
    from stratocache.cache.errors import Conflict
    from stratocache.fs.partition import mount_image
    from stratocache.fs.records import READABLE

    session.require_local()
    document = session.client.get(path_of("images", image_id))
    if document["state"] not in READABLE:
        raise Conflict("image-busy", f"Image {image_id} is {document['state']}; try again later.")
    block_file = session.configuration.blocks / "images" / document["id"]
    mounted = mount_image(block_file, directory, partition)
    session.show(
        {
            "image": mounted.image_id,
            "directory": str(directory),
            "partition": mounted.partition.number,
            "file_system": mounted.partition.file_system,
        },
        f"Image {image_id} is mounted read-only on {directory}.",
    )


@image.command(
    epilog=examples(
        "stratocache image umount /mnt",
    )
)
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def umount(session: Session, directory: Path) -> None:
    """Undo `image mount`; no loop device stays behind."""
    from stratocache.fs.partition import unmount_image

    session.require_local()
    unmount_image(directory)
    session.show({"directory": str(directory)}, f"{directory} is unmounted.")


@image.command(epilog=examples("stratocache image resolve MMZu9WvwKIro-rtBQfDk4PsKO7_"))
@click.argument("reference")
@json_option
@click.pass_context
def resolve(context: click.Context, reference: str) -> None:
    """Show what REFERENCE stands for, and why it is trusted; 5 if it is refused. Fetches nothing."""
    session = context.ensure_object(Session)
    operation = session.client.begin("/v1/references", {"reference": reference})
    found = session.follow(operation, "resolve")["result"]
    session.show(found, "\n".join(_explanation(reference, found)))
    if not found["accepted"]:
        context.exit(5)


def _explanation(reference: str, found: "Document") -> Iterator[str]:
    """Yield lines on what was found, and what speaks against the rest of it."""
    verdict = "accepted" if found["accepted"] else f"refused [{found['code']}]"
    yield f"{plain(reference)}: {verdict}: {plain(found['message'])}"
    entry = found["entry"]
    if entry is not None:
        yield f"image: {entry['identifier']}, {format_size(entry['size_bytes'])}"
        yield f"title: {plain(entry['title'])}"
        yield f"here: {found['cached'] or 'no'}"
    for item in found["candidates"]:
        verdict = "may be used" if item["code"] is None else f"[{item['code']}] {item['message']}"
        yield f"candidate: {plain(item['endorser'])} of {plain(item['endorsed_at'])}: {plain(verdict)}"
