"""`stratocache cache`: where the space has gone, what holds it, eviction and the scrubber."""

import time
from typing import TYPE_CHECKING, Any

import click

from stratocache.api.check_commands import finding_view
from stratocache.api.completion import IMAGE
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, SizeType, json_option, plain
from stratocache.api.sizes import format_size
from stratocache.api.watch import is_watched, watch_option

if TYPE_CHECKING:
    from stratocache.api.client import Document

_POLL_S = 0.2
_LINES = (
    ("chunks of images", "chunk_bytes"),
    ("manifests", "manifest_bytes"),
    ("disks and snapshots", "disk_allocated_bytes"),
    ("stage", "stage_bytes"),
    ("quarantine", "quarantine_bytes"),
    ("free", "free_bytes"),
    ("of it reserved", "reserve_bytes"),
    ("of it available", "available_bytes"),
    ("promised to disks", "promised_bytes"),
    ("may be promised", "promise_limit_bytes"),
)


@click.group()
def cache() -> None:
    """Show what the cache and the disks take, what holds it; evict, scrub and check."""


@cache.command(
    epilog=examples(
        "stratocache cache status",
        "stratocache cache status --watch --interval 10",
    )
)
@watch_option
@json_option
@click.pass_obj
def status(session: Session) -> None:
    """Show the bytes by kind, what is promised, the scrubber, the peers, and what is lost."""
    account = session.client.get("/v1/cache")
    lines = [space_lines(account), saved_lines(account), scrub_line(account["scrub"])]
    lines += _peer_lines(account)
    lines += [
        f"LOST: {item['kind']} {plain(item['name'])} of {', '.join(item['images'])}, needed by "
        f"{item['disk_count']} disks: {plain(item['reason'])}"
        for item in account["losses"]
    ]
    session.show(account, "\n".join(lines))


def _peer_lines(account: "Document") -> list[str]:
    """Return a line for each peer, and one for what they were given."""
    lines = []
    for peer in account["peers"]:
        resting = f", left alone until {peer['rests_until']}" if peer["rests_until"] else ""
        fault = f": {plain(peer['fault'])}" if peer["fault"] else ""
        lines.append(
            f"peer {peer['host']} ({peer['location']}): asked {peer['asked']}, served "
            f"{peer['served']}, failed {peer['failed']}, {format_size(peer['received_bytes'])}"
            f"{resting}{fault}"
        )
    given = account["peer_service"]
    if any(given.values()):
        lines.append(
            f"to peers: {given['chunks']} chunks, {given['manifests']} manifests, "
            f"{format_size(given['sent_bytes'])}; absent {given['absent']}, busy {given['busy']}, "
            f"refused {given['refused']}"
        )
    return lines


@cache.command(
    epilog=examples(
        "stratocache cache plan",
        "stratocache cache plan --offline --fix     # before the network goes",
    )
)
@click.option("--offline", is_flag=True, help="Only what would fail without its origins.")
@click.option("--fix", is_flag=True, help="With --offline: fetch what is missing.")
@watch_option
@json_option
@click.pass_context
def plan(context: click.Context, offline: bool, fix: bool) -> None:
    """Show the space, and each image in the order of eviction, with what keeps the others."""
    session = context.ensure_object(Session)
    if fix and not offline:
        raise click.UsageError("--fix goes with --offline.", context)
    if fix and is_watched(context):
        raise click.UsageError("--fix mends once and --watch would repeat it: mend first.", context)
    if offline:
        context.exit(_plan_offline(session, fix=fix))
    document = session.client.get("/v1/cache/plan")
    if session.as_json:
        session.show(document, "")
        return
    click.echo(space_lines(document["space"]) + "\n")
    session.show_table(
        "images",
        document["images"],
        {
            "#": "order",
            "IMAGE": "image",
            "STATE": lambda item: "skeleton" if item["skeleton"] else item["state"],
            "SIZE": lambda item: _size(item["size_bytes"]),
            "LAST USED": "last_used_at",
            "FREES": lambda item: _size(item["freed_bytes"]),
            "BOOT SET": lambda item: _size(item["boot_bytes"]) if item["boot_bytes"] else None,
            "REFETCH": lambda item: _cost(item),
            "KEPT BY": "kept_because",
            "TITLE": lambda item: item["title"] or None,
        },
    )


def _plan_offline(session: Session, *, fix: bool) -> int:
    """Show, and mend, what would fail without its origins; return the exit status."""
    found = session.client.get("/v1/cache/plan", offline="true")["images"]
    if fix:
        for item in found:
            _verify_leniently(session, item["image"])
        found = session.client.get("/v1/cache/plan", offline="true")["images"]
    if not found and not session.as_json:
        click.echo("Everything that is pinned, attached or the base of a disk is whole here.")
        return 0
    session.show_table(
        "images",
        found,
        {
            "IMAGE": "image",
            "WHY": "reason",
            "CHUNKS": "missing_chunks",
            "MISSING": lambda item: _size(item["missing_bytes"]),
            "TITLE": lambda item: item["title"] or None,
        },
    )
    return 6 if found else 0


def _verify_leniently(session: Session, image_id: str) -> None:
    from stratocache.cache.errors import StratocacheError

    try:
        verify_image(session, image_id)
    except StratocacheError as error:  # the others are mended all the same
        session.show_error(error)


def verify_image(session: Session, image_id: str) -> "Document":
    """Verify an image, with the progress shown; raises what the operation failed with."""
    operation = session.client.begin(path_of("images", image_id, "verify"), {})
    return session.follow(operation, "verify")


@cache.command(
    epilog=examples(
        "stratocache cache evict --bytes 10G --dry-run",
        "stratocache cache evict --image MMZu9WvwKIro-rtBQfDk4PsKO7_",
    )
)
@click.option("--image", "image_id", type=IMAGE, metavar="ID", help="This image.")
@click.option("--bytes", "size_bytes", type=SizeType(), help="At least so much, such as 10G.")
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@json_option
@click.pass_obj
def evict(session: Session, image_id: str | None, size_bytes: int | None, dry_run: bool) -> None:
    """Evict cold images: one, or so many bytes, or what is over the limit and the floor."""
    body: dict[str, Any] = {"dry_run": dry_run}
    if image_id is not None:
        body["image"] = image_id
    if size_bytes is not None:
        body["bytes"] = size_bytes
    if not dry_run:
        done = session.follow(session.client.begin("/v1/cache/evict", body), "evict")
        session.show(done, f"{format_size(done['result']['freed_bytes'])} are free again.")
        return
    preview = session.client.post("/v1/cache/evict", body)
    lines = [
        f"{item['image']}: last used {item['last_used_at'] or 'never'}, frees "
        f"{_size(item['freed_bytes'])}{_left(item)}, fetching it again: {_cost(item)}"
        for item in preview["images"]
    ]
    lines.append(
        f"{len(lines)} images, {format_size(preview['freed_bytes'])}; nothing was evicted."
    )
    session.show(preview, "\n".join(lines))


@cache.command(
    epilog=examples(
        "stratocache cache scrub --wait",
        "stratocache cache scrub --pause",
    )
)
@click.option("--now", "action", flag_value="now", default=True, help="Begin a pass (default).")
@click.option("--pause", "action", flag_value="pause", help="Stop reading until --resume.")
@click.option("--resume", "action", flag_value="resume", help="Go on where it was.")
@click.option("--wait", is_flag=True, help="Wait for the end of the pass; 6 if something is lost.")
@json_option
@click.pass_context
def scrub(context: click.Context, action: str, wait: bool) -> None:
    """Read everything in the cache again, and repair what has rotted."""
    session = context.ensure_object(Session)
    before = session.client.get("/v1/cache")["scrub"]["finished_at"]
    state = session.client.post("/v1/cache/scrub", {"action": action})
    losses: list[Any] = []
    while wait:
        time.sleep(_POLL_S)
        shown = session.client.get("/v1/cache")
        state, losses = shown["scrub"], shown["losses"]
        if state["state"] == "paused":
            break
        if state["state"] == "idle" and state["finished_at"] != before:
            break
    session.show(state, scrub_line(state))
    if losses:
        context.exit(6)


@cache.command(
    epilog=examples(
        "stratocache cache check --deep",
        "stratocache cache check --repair     # while the daemon is stopped",
    )
)
@click.option(
    "--repair", is_flag=True, help="Remove what nothing needs; the daemon must be stopped."
)
@click.option("--deep", is_flag=True, help="Hash every chunk.")
@json_option
@click.pass_context
def check(context: click.Context, repair: bool, deep: bool) -> None:
    """Account for every byte of the cache: chunks, manifests, stage, quarantine.

    Exits 6 when something that is needed is damaged or missing. Leaks cost space only, and --repair
    frees it.
    """
    from stratocache.fs import cache_check

    session = context.ensure_object(Session)
    report = cache_check.check(session.configuration, repair=repair, deep=deep)
    found = {"fault": report.faults, "leak": report.leaks, "repaired": report.repaired}
    document: Document = {
        "bytes": report.bytes,
        "manifests": report.manifests,
        "chunks": report.chunks,
        **{name if name == "repaired" else f"{name}s": [finding_view(item) for item in items]
           for name, items in found.items()},
        "notes": report.notes,
    }  # fmt: skip
    lines = [
        f"{name}: {item.code}: {plain(item.message)}"
        for name, items in found.items() for item in items
    ]  # fmt: skip
    lines += [f"note: {plain(note)}" for note in report.notes]
    lines += [f"{kind + ':':<15}{_size(size)}" for kind, size in sorted(report.bytes.items())]
    lines.append(
        f"{report.manifests} manifests, {report.chunks} chunks checked: {len(report.faults)} "
        f"faults, {len(report.leaks)} leaks, {len(report.repaired)} repaired."
    )
    session.show(document, "\n".join(lines))
    if report.faults:
        context.exit(6)


def space_lines(account: "Document") -> str:
    """Return an account of space for people, one kind a line."""
    return "\n".join(f"{name + ':':<21}{_size(account[key])}" for name, key in _LINES)


def saved_lines(account: "Document") -> str:
    """Return what was fetched, and what did not have to be, for people."""
    from stratocache.api import plots

    figures = {
        "fetched": format_size(account["remote_bytes"]),
        "guests waited": plots.duration(account["remote_wait_s"]),
        "hits": plots.ratio_line(account),
        "saved by cache": format_size(account["cache_saved_bytes"]),
        "saved by dedup": f"{format_size(account['dedup_saved_bytes'])} not fetched, "
        f"{format_size(account['shared_bytes'])} of space shared",
        "evicted": format_size(account["evicted_bytes"]),
    }
    return "\n".join(f"{name + ':':<21}{text}" for name, text in figures.items())


def promise_line(account: "Document") -> str:
    """Return one sentence on what is promised and what is there, for `disk create`."""
    return (
        f"Disks are promised {format_size(account['promised_bytes'])} more than they have; "
        f"{format_size(account['available_bytes'])} are available."
    )


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def _left(item: "Document") -> str:
    """Say what stays of an image at its turn."""
    return f" (its boot set stays, {_size(item['boot_bytes'])})" if item["boot_bytes"] else ""


def _cost(item: "Document") -> str:
    if item["origin"] is None:
        return "impossible"
    return f"{_size(item['refetch_bytes'])} from {plain(item['origin'])}"


def scrub_line(state: "Document") -> str:
    """Return one line on what the scrubber does."""
    seen = f"{state['chunks']} chunks ({_size(state['chunk_bytes'])})"
    ended = state["finished_at"] or "never"
    return (
        f"{'scrubber:':<21}{state['state']}; {seen}, {state['damaged']} damaged, "
        f"{state['repaired']} repaired in this pass; last whole pass {ended}"
    )
