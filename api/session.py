"""What every command knows: which daemon it asks, and how the answers are to be written."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stratocache.api import terminal

if TYPE_CHECKING:
    from stratocache.api.client import Client, Document
    from stratocache.api.remotes import Remote
    from stratocache.cache.configuration import Configuration
    from stratocache.cache.errors import StratocacheError

Command = TypeVar("Command", bound=Callable[..., Any])
Column = str | Callable[[Any], Any]
"""What a table shows of an item: the field of this name, or what this makes of the item."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # would steer a terminal or break a line


@dataclass
class Session:
    """One run of the command line; the global options fill it."""

    config_path: Path | None = None
    socket_path: Path | None = None
    remote_name: str | None = None
    url: str | None = None
    as_json: bool = False
    ignores_default: bool = False
    """Whether the default of the user's remotes does not count, as for a service."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Configuration keys given as flags."""

    def choose(
        self,
        config_path: Path | None = None,
        state_dir: Path | None = None,
        run_dir: Path | None = None,
        socket_path: Path | None = None,
        remote: str | None = None,
        url: str | None = None,
    ) -> None:
        """Take the global options."""
        self.config_path = config_path
        self.socket_path = socket_path
        self.flags = {"state_dir": state_dir, "run_dir": run_dir}
        self.remote_name, self.url = remote, url

    @cached_property
    def remote(self) -> "Remote | None":
        """The daemon of another host that is asked, None for this host's; raises `InvalidInput`,
        `NotFound`."""
        here = (self.socket_path, self.config_path, *self.flags.values())
        if self.remote_name is None and self.url is None and any(here):
            return None
        from stratocache.api import remotes

        found = remotes.chosen(self.remote_name, self.url, by_default=not self.ignores_default)
        if found is not None and found.name and remotes.too_open():
            path = remotes.file_path()
            self.warn("remotes-file-open", f"Others may read {path}; `chmod 600 {path}`.")
        return found

    @cached_property
    def configuration(self) -> "Configuration":
        """The configuration of this host with the flags applied; raises `InvalidInput`, also
        (`local-only`) when another host was asked for."""
        from stratocache.cache import configuration

        self.require_local()
        return configuration.load(self.config_path, flags=self.flags)

    def require_local(self) -> None:
        """Raise `InvalidInput` (`local-only`) when another host was asked for."""
        if self.remote is not None:
            from stratocache.cache.errors import InvalidInput

            raise InvalidInput(
                "local-only",
                f"This works on the host itself only, not through {self.remote.shown}: run it "
                "there, or here with --remote local.",
            )

    @cached_property
    def client(self) -> "Client":
        """The client of the daemon that is asked."""
        from stratocache.api.client import Client

        if self.remote is None:
            return Client(self.socket_path or self.configuration.api_socket)
        from stratocache.api.remote_endpoint import RemoteEndpoint

        return Client(RemoteEndpoint(self.remote))

    def follow(self, operation: "Document", title: str) -> "Document":
        """Wait for an operation with its progress shown; raises the error it failed with."""
        from stratocache.api import progress

        with progress.shown(title, quiet=self.as_json) as report:
            return self.client.follow(operation, report)

    def remove(self, path: str, title: str, **parameters: str) -> None:
        """DELETE something, with parameters of the query, and wait until it is gone."""
        operation = self.client.delete(path, wait=0, **parameters)
        if operation:
            self.follow(operation, title)

    def show(self, document: "Document", text: str) -> None:
        """Write a document: as JSON when asked for, else as `text`."""
        click.echo(json.dumps(document, indent=2) if self.as_json else text)

    def show_fields(self, document: "Document", *, hidden: Sequence[str] = ()) -> None:
        """Write a document: as JSON when asked for, else one field a line, without the hidden."""
        if self.as_json:
            self.show(document, "")
            return
        for name, value in document.items():
            if value is None or value == "" or name in hidden:
                continue
            if isinstance(value, dict | list):
                value = json.dumps(value)
            click.echo(f"{name}: {plain(value)}")

    def show_list(self, path: str, columns: Mapping[str, Column], **parameters: str | None) -> None:
        """Write every item of a list of the daemon; parameters of its query that are None do not
        count."""
        name = path.rpartition("/")[2]
        chosen = {key: value for key, value in parameters.items() if value is not None}
        self.show_table(name, self.client.items(path, name, **chosen), columns)

    def show_table(
        self, name: str, items: "Sequence[Document]", columns: Mapping[str, Column]
    ) -> None:
        """Write a list: as JSON, as a table on a terminal, else as lines with tabs."""
        if self.as_json:
            click.echo(json.dumps({name: list(items)}, indent=2))
            return
        rows = [[plain(_cell(item, column)) for column in columns.values()] for item in items]
        if terminal.is_terminal():
            _show_rich(list(columns), rows)
            return
        click.echo("\t".join(columns))
        for row in rows:
            click.echo("\t".join(row))

    def warn(self, code: str, message: str) -> None:
        """Write a warning to standard error, as one line or one JSON object."""
        if self.as_json:
            click.echo(json.dumps({"warning": message, "code": code}), err=True)
        else:
            click.echo(f"warning: {plain(message)} [{code}]", err=True)

    def show_error(self, error: "StratocacheError") -> None:
        """Write an error to standard error, as one line or one JSON object."""
        if self.as_json:
            record: dict[str, Any] = {"error": error.message, "code": error.code}
            if error.field is not None:
                record["field"] = error.field
            click.echo(json.dumps({**record, "exit_status": error.exit_status}), err=True)
        else:
            click.echo(f"error: {plain(error.message)} [{error.code}]", err=True)


def _cell(item: "Document", column: Column) -> Any:
    return item[column] if isinstance(column, str) else column(item)


def _show_rich(columns: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal.console().print(table)


def plain(value: Any) -> str:
    """Return a value as one line of text without control characters."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _CONTROL.sub("?", str(value))


def json_option(command: Command) -> Command:
    """Add `--json` to a command; it may stand before the command as well."""

    def note(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(Session).as_json = True

    return click.option(
        "--json", is_flag=True, expose_value=False, callback=note,
        help="Write JSON to standard output, and nothing else.",
    )(command)  # fmt: skip


class SizeType(click.ParamType[int]):
    """A size such as 10G or 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        from stratocache.api.sizes import parse_size
        from stratocache.cache.errors import InvalidInput

        try:
            return value if isinstance(value, int) else parse_size(str(value))
        except InvalidInput as error:
            self.fail(error.message, param, ctx)
