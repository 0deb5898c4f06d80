"""The manual pages, which are made from the commands."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import manual
import pytest

from stratocache.api.examples import HEADING

PAGES = list(manual.pages())
BY_WORDS = {page.words: page for page in PAGES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as `make man` makes them."""
    made = tmp_path_factory.mktemp("manual")
    subprocess.run([sys.executable, manual.__file__, str(made)], check=True, capture_output=True)
    return made / "man1"


def run(*command: str) -> str:
    """Run a program that must succeed and have nothing to complain of; return what it writes."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def examples_of(page: manual.Page) -> list[str]:
    """Return the examples of a command."""
    _before, _heading, rest = (page.command.epilog or "").partition(HEADING + "\n")
    return [line.strip() for line in rest.partition("\n\n")[0].splitlines()]


def test_formatters_accept_every_page(folder: Path) -> None:
    """mandoc and groff find nothing to warn of in any page."""
    paths = [str(path) for path in sorted(folder.iterdir())]

    assert len(paths) == len(PAGES)
    assert run("mandoc", "-Tlint", "-Wwarning", *paths) == ""
    assert run("groff", "-man", "-Tutf8", "-ww", "-z", *paths) == ""


def test_every_page_can_be_found(folder: Path) -> None:
    """apropos knows each page by its name and what it does."""
    known = run("lexgrog", *(str(path) for path in folder.iterdir()))

    for page in PAGES:
        assert f'"{page.name} - {page.summary}"' in known


def test_pages_are_complete(folder: Path) -> None:
    """`man` shows usage, each option, and all sections that a manual page has."""
    for words in (("stratocache",), ("stratocache", "disk", "create"), ("stratocache", "halt")):
        page = BY_WORDS[words]
        shown = run("man", "-l", str(folder / f"{page.name}.1"))
        for section in (
            "NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "FILES",
            "EXAMPLES",
        ):  # fmt: skip
            assert re.search(rf"^{section}$", shown, re.MULTILINE)
        for parameter in page.command.params:
            for name in parameter.opts if isinstance(parameter, click.Option) else ():
                assert name in shown


def test_a_group_lists_its_commands(folder: Path) -> None:
    """The page of a group names the pages of its commands."""
    text = (folder / "stratocache-disk.1").read_text()

    assert "stratocache\\-disk\\-create(1)" in text
    assert "stratocache\\-disk\\-snapshot\\-rm(1)" in text


def test_every_command_has_an_example() -> None:
    """Whoever reads the help of a command sees how it is typed."""
    leaves = [page for page in PAGES if not isinstance(page.command, click.Group)]

    assert [page.name for page in leaves if not examples_of(page)] == []


def _words(line: str) -> Iterator[list[str]]:
    for part in re.split(r"\s#\s|[|;]|\$\(|\)|>|<|&&", line):
        words = shlex.split(part.strip().strip('"'))
        if words and words[0] == "stratocache":
            yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_can_be_typed(page: manual.Page) -> None:
    """Every command and every option of an example exists."""
    for line in examples_of(page):
        for words in _words(line):
            options = _known_options(words)
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= options, line


def _known_options(words: list[str]) -> set[str]:
    """Return the options of the command that is typed, and of the groups that it is in."""
    path: tuple[str, ...] = ()
    options: set[str] = set()
    for word in words:
        if (*path, word) in BY_WORDS:
            path = (*path, word)
            page = BY_WORDS[path]
            for parameter in page.command.get_params(page.context):
                options |= {*parameter.opts, *parameter.secondary_opts}
    assert not isinstance(BY_WORDS[path].command, click.Group), words
    return options


def test_options_are_explained() -> None:
    """No option is left without a word on what it does, but those that say it by their name."""
    bare = [
        f"{page.name} {parameter.opts[0]}"
        for page in PAGES
        for parameter in page.command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]

    assert bare == []
