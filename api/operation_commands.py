"""`stratocache operation`: work under way, and work that has ended."""

from typing import TYPE_CHECKING

import click

from stratocache.api.completion import OPERATION
from stratocache.api.examples import examples
from stratocache.api.resource_path import path_of
from stratocache.api.session import Session, json_option
from stratocache.api.watch import watch_option

if TYPE_CHECKING:
    from stratocache.api.client import Document


@click.group()
def operation() -> None:
    """List, show and cancel operations."""


@operation.command(
    epilog=examples(
        "stratocache operation ls --state running",
        "stratocache operation ls --watch",
    )
)
@click.option(
    "--state", type=click.Choice(["pending", "running", "done", "failed", "cancelled"]),
    help="Only operations in this state.",
)  # fmt: skip
@watch_option
@json_option
@click.pass_obj
def ls(session: Session, state: str | None) -> None:
    """List operations, oldest first."""
    session.show_list(
        "/v1/operations",
        {
            "ID": "id",
            "KIND": "kind",
            "STATE": "state",
            "PROGRESS": _progress,
            "SUBJECT": "subject",
            "ERROR": lambda item: (item["error"] or {}).get("code"),
        },
        state=state,
    )


def _progress(item: "Document") -> str | None:
    from stratocache.api.progress import progress_text

    if item["progress_bytes"] == 0 and item["total_bytes"] is None:
        return None
    return progress_text(item["progress_bytes"], item["total_bytes"])


@operation.command(
    epilog=examples(
        "stratocache operation show $ID",
    )
)
@click.argument("operation_id", metavar="ID", type=OPERATION)
@watch_option
@json_option
@click.pass_obj
def show(session: Session, operation_id: str) -> None:
    """Show one operation."""
    session.show_fields(session.client.get(path_of("operations", operation_id)))


@operation.command(
    epilog=examples(
        "stratocache operation cancel $ID",
    )
)
@click.argument("operation_id", metavar="ID", type=OPERATION)
@json_option
@click.pass_obj
def cancel(session: Session, operation_id: str) -> None:
    """Stop an operation and undo what it began."""
    ended = session.client.delete(path_of("operations", operation_id), wait=60)
    session.show(ended, f"Operation {operation_id} is {ended['state']}.")
