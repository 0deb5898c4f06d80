"""What the documents beside the code say of it: names, commands, keys and tables are those of the code."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from stratocache.api.command_line import command_line
from stratocache.api.resources.accounts import ACCOUNTS, TOKENS
from stratocache.api.resources.attachments import ATTACHMENTS
from stratocache.api.resources.disks import DISKS
from stratocache.api.resources.events import EVENTS
from stratocache.api.resources.images import IMAGES
from stratocache.api.resources.launches import LAUNCHES
from stratocache.api.resources.operations import OPERATIONS
from stratocache.api.resources.shares import SHARES
from stratocache.api.resources.snapshots import SNAPSHOTS
from stratocache.cache.configuration import Configuration

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(p for room in ("api", "cache", "fs") for p in (ROOT / room).glob("*.md")))
}  # fmt: skip
LISTS = {
    "/v1/disks": DISKS, "/v1/disks/{uuid}/snapshots": SNAPSHOTS, "/v1/disks/{uuid}/shares": SHARES,
    "/v1/attachments": ATTACHMENTS, "/v1/images": IMAGES, "/v1/launches": LAUNCHES,
    "/v1/operations": OPERATIONS, "/v1/events": EVENTS, "/v1/accounts": ACCOUNTS,
    "/v1/accounts/{name}/tokens": TOKENS,
}  # fmt: skip
_BLOCK = re.compile(r"(?:^    .*\n|^\n)+", re.MULTILINE)
_COMMAND = re.compile(r"(?:^|`|\$\(|[;&|] )\s*(stratocache [a-z-][^`\n]*)", re.MULTILINE)
_END = re.compile(r"\s+#| && | \| | > | < | &|;|\)")


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key of the configuration, with those before it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, f"{prefix}{name}.")


def fault_of(words: list[str]) -> str | None:
    """Return what is no command or option of ours in a command line."""
    command: click.Command = command_line
    context = click.Context(command)
    pending = iter(words)
    for word in pending:
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            found = [item for item in command.params if name in (*item.opts, *item.secondary_opts)]
            if not found and name != "--help":
                return name
            if found and "=" not in word and not getattr(found[0], "is_flag", False):
                next(pending, None)
        elif isinstance(command, click.Group):
            child = command.get_command(context, word)
            if child is None:
                return word
            command, context = child, click.Context(child, context)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there_with_their_options(page: str) -> None:
    """Every command line can be typed as it stands."""
    for match in _COMMAND.finditer(PAGES[page].replace("\\\n", " ")):
        line = re.sub(r"[…\[\]]", "", _END.split(match[1])[0])
        assert fault_of(shlex.split(line)[1:]) is None, line


@pytest.mark.parametrize("page", PAGES)
def test_configurations_are_accepted(page: str) -> None:
    """Every example of the configuration is one, and every key that is named exists."""
    for match in _BLOCK.finditer(PAGES[page]):
        text = re.sub(r"^    ", "", match[0], flags=re.MULTILINE).strip("\n")
        if re.match(r"\[\[?[a-z]", text):
            Configuration.model_validate(tomllib.loads(text))
    known = set(keys_of(Configuration))
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    for match in re.finditer(rf"`((?:{sections})\.[a-z_]+)\b", PAGES[page]):
        assert match[1] in known, match[1]


@pytest.mark.parametrize("page", PAGES)
def test_modules_are_there(page: str) -> None:
    """Every module that a page says has the code, and every other page, exists."""
    for match in re.finditer(r"Code: (.*?)\n\n", PAGES[page], re.DOTALL):
        for name in re.findall(r"`([\w/]+)`", match[1]):
            assert list(ROOT.glob(f"*/{name}.py")) or (ROOT / f"{name}.py").exists(), name
    for name in re.findall(r"`((?:\w+/)*[\w]+\.(?:md|py))`", PAGES[page]):
        folders = (ROOT, ROOT / page.partition("/")[0], ROOT / "api/pages", ROOT / "tests/crash")
        assert "NOUN" in name or any((folder / name).exists() for folder in folders), name


def test_table_of_lists_is_that_of_the_lists() -> None:
    """The API's page says of each list what it is sorted by and which filters it has."""
    rows = dict(re.findall(r"^\| (`/v1/[^|]*) \| (.*) \|$", PAGES["api/API.md"], re.MULTILINE))
    said = {
        address: re.sub(r"\(.*?\)|; the first also", ",", cells)
        for addresses, cells in rows.items()
        for address in re.findall(r"`([^`]+)`", addresses)
    }
    for address, listing in LISTS.items():
        orders, _, filters = said[address].partition(" | ")
        assert tuple(re.findall(r"\w+", orders)) == listing.orders, address
        assert set(re.findall(r"\w+", filters)) == set(listing.filters), address
