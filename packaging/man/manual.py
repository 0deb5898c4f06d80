"""Write the manual pages, made from the commands themselves.

    python packaging/man/manual.py build/man     # build/man/man1/stratocache.1, stratocache-disk.1, …

One page a command, as git has them: `man stratocache-disk-create`. SOURCE_DATE_EPOCH dates them.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from stratocache import __version__
from stratocache.api.command_line import command_line
from stratocache.api.examples import HEADING

PROGRAM = "stratocache"

EXIT_STATUSES = {
    0: "Done.",
    1: "Failed otherwise; the code in brackets says why.",
    2: "Wrong usage or input.",
    3: "Nothing of that name.",
    4: "Conflict: in use, exists already, or not in the state for it.",
    5: "Refused by policy, trust or rights.",
    6: "Not verified: bytes, a signature or a certificate are not what was promised.",
    7: "No space, or a limit is reached.",
    10: "The daemon is not reachable.",
}
FILES = {
    "/etc/stratocache/stratocache.toml": "Configuration of this host, unless --config or "
    "STRATOCACHE_CONFIG names another file.",
    "/run/stratocache/api.sock": "Socket of the daemon; root and the group stratocache are "
    "administrators.",
    "/var/lib/stratocache": "State: images, disks, and the database that knows them.",
    "~/.config/stratocache/remotes.toml": "Daemons of other hosts, with tokens; mode 0600. "
    "XDG_CONFIG_HOME moves it.",
}
ENVIRONMENT = {
    "STRATOCACHE_CONFIG": "The configuration file.",
    "STRATOCACHE_SECTION__KEY": "Any key of the configuration, such as STRATOCACHE_ISCSI__PORT.",
    "STRATOCACHE_REMOTE": "The remote to ask, as --remote.",
    "STRATOCACHE_URL": "The daemon to ask, as --url.",
    "STRATOCACHE_TOKEN": "The token for it, instead of the one that is kept.",
    "STRATUSLAB_P12_PASSWORD": "Password of the key that signs metadata.",
    "NO_COLOR": "When not empty: no colours. There are none in a pipe, either.",
    "COLUMNS": "Width of tables, when the terminal does not tell.",
}


@dataclass(frozen=True)
class Page:
    """A command, and what it is called."""

    words: tuple[str, ...]
    command: click.Command
    context: click.Context

    @property
    def name(self) -> str:
        """The name of the page."""
        return "-".join(self.words)

    @property
    def summary(self) -> str:
        """What the command does, in a line."""
        text = _paragraphs(self.command)[0]
        first = re.split(r"(?<=[a-z)`])[.;:] |\.$", text)[0]
        return first[0].lower() + first[1:]


def pages() -> Iterator[Page]:
    """Yield a page for every command, groups before what they have."""
    root = click.Context(command_line, info_name=PROGRAM)
    yield from _below((PROGRAM,), command_line, root)


def _below(
    words: tuple[str, ...], command: click.Command, context: click.Context
) -> Iterator[Page]:
    yield Page(words, command, context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, "listed"
            if not child.hidden:
                yield from _below((*words, name), child, click.Context(child, context, name))


def write(folder: Path) -> list[Path]:
    """Write all pages into a folder; return them."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    day = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    everything = list(pages())
    written = []
    for page in everything:
        path = folder / f"{page.name}.1"
        path.write_text(text_of(page, everything, f"{day:%Y-%m-%d}"), encoding="utf-8")
        written.append(path)
    return written


def text_of(page: Page, everything: list[Page], day: str) -> str:
    """Return a page in the language of man(7)."""
    title = page.name.upper().replace("-", "\\-")
    lines = [
        f'.TH {title} 1 {day} "Stratocache {__version__}" "Stratocache"',
        ".SH NAME", f"{_text(page.name)} \\- {_text(page.summary)}",
        ".SH SYNOPSIS", f".B {_text(' '.join(page.words))}", _synopsis(page),
        ".SH DESCRIPTION", *_join(_paragraphs(page.command)),
    ]  # fmt: skip
    lines += _commands(page, everything)
    lines += _options(page)
    lines += _section("EXIT STATUS", {str(key): text for key, text in EXIT_STATUSES.items()})
    lines += _section("ENVIRONMENT", ENVIRONMENT)
    lines += _section("FILES", FILES)
    lines += _examples(page.command)
    lines += _see_also(page, everything)
    return "\n".join(lines) + "\n"


def _synopsis(page: Page) -> str:
    pieces = [_text(piece) for piece in page.command.collect_usage_pieces(page.context)]
    return " ".join(f"\\fI{piece}\\fR" for piece in pieces)


def _paragraphs(command: click.Command) -> list[str]:
    text = (command.help or "").replace("\b", "")
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _join(paragraphs: list[str]) -> Iterator[str]:
    for number, paragraph in enumerate(paragraphs):
        if number:
            yield ".PP"
        yield _text(paragraph)


def _commands(page: Page, everything: list[Page]) -> list[str]:
    length = len(page.words) + 1
    below = [
        item for item in everything if item.words[:-1] == page.words and len(item.words) == length
    ]
    return _section("COMMANDS", {f"{item.name}(1)": f"{item.summary}." for item in below})


def _options(page: Page) -> list[str]:
    records = {}
    for parameter in page.command.get_params(page.context):
        record = parameter.get_help_record(page.context)
        if record is not None:
            records[record[0]] = record[1]
    return _section("OPTIONS", records)


def _section(name: str, records: dict[str, str]) -> list[str]:
    lines = [f".SH {name}"] if records else []
    for term, text in records.items():
        lines += [".TP", f"\\fB{_text(term)}\\fR", _text(text)]
    return lines


def _examples(command: click.Command) -> list[str]:
    _before, heading, rest = (command.epilog or "").partition(HEADING + "\n")
    lines = rest.partition("\n\n")[0].splitlines()
    if not heading:
        return []
    return [".SH EXAMPLES", ".nf", *(f"$ {_text(line.strip())}" for line in lines), ".fi"]


def _see_also(page: Page, everything: list[Page]) -> list[str]:
    parent = page.words[:-1]
    others = [item for item in everything if parent and item.words[:-1] == parent and item != page]
    nearest = [next(item for item in everything if item.words == parent)] if parent else []
    names = [f"\\fB{_text(item.name)}\\fR(1)" for item in [*nearest, *others]]
    return [".SH SEE ALSO", ",\n".join(names)] if names else []


def _text(text: str) -> str:
    """Return a line of text that no macro or escape of roff is seen in."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = "".join(sign if sign.isascii() else f"\\[u{ord(sign):04X}]" for sign in text)
    text = text.replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text


def main() -> None:
    """Write the pages into the folder that is named."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    folder = Path(sys.argv[1])
    print(f"{len(write(folder / 'man1'))} pages; read them with `man -M {folder} {PROGRAM}`.")


if __name__ == "__main__":
    main()
