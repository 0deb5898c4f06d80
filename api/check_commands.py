"""`stratocache disk check`: verifies disks, with the daemon running or not."""

from typing import TYPE_CHECKING

import click

from stratocache.api.completion import DISK
from stratocache.api.examples import examples
from stratocache.api.session import Session, json_option, plain

if TYPE_CHECKING:
    from stratocache.api.client import Document
    from stratocache.fs.disk_repair import Finding


@click.command(
    epilog=examples(
        "stratocache disk check",
        "stratocache disk check $UUID --deep",
        "stratocache disk check --repair     # while the daemon is stopped",
    )
)
@click.argument("uuid", type=DISK, required=False)
@click.option(
    "--repair", is_flag=True, help="Remove what a crash left; the daemon must be stopped."
)
@click.option("--deep", is_flag=True, help="Hash every chunk that the disks need.")
@json_option
@click.pass_context
def check(context: click.Context, uuid: str | None, repair: bool, deep: bool) -> None:
    """Verify one disk, or all: layers, bitmaps against data, bases, rows against files.

    Exits 6 when something is damaged or missing; that is told, never guessed at. Leaks are what a
    crash left: they cost space only, and --repair frees it.
    """
    from stratocache.fs import disk_check

    session = context.ensure_object(Session)
    report = disk_check.check(session.configuration, uuid=uuid, repair=repair, deep=deep)
    found = {"fault": report.faults, "leak": report.leaks, "repaired": report.repaired}
    document: Document = {
        "disks": report.disks,
        **{f"{name}s" if name != "repaired" else name: [finding_view(item) for item in items]
           for name, items in found.items()},
        "notes": report.notes,
    }  # fmt: skip
    lines = [
        f"{name}: {item.code}: {plain(item.message)}" for name, items in found.items() for item in items
    ]  # fmt: skip
    lines += [f"note: {plain(note)}" for note in report.notes]
    lines.append(
        f"{report.disks} disks checked: {len(report.faults)} faults, {len(report.leaks)} leaks, "
        f"{len(report.repaired)} repaired."
    )
    session.show(document, "\n".join(lines))
    if report.faults:
        context.exit(6)


def finding_view(finding: "Finding") -> "Document":
    """Return what a check found, for JSON."""
    return {"code": finding.code, "subject": finding.subject, "message": finding.message}
