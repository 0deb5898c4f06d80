"""`stratocache overview`: one page of the terminal, lines in a pipe, the document as JSON."""

import json
import os
import re
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.api_daemon import Api, serving
from support.page_world import HOSTILE, World, furnish
from support.terminal import COLUMNS, Terminal, on_terminal

from stratocache.api import plots
from stratocache.api.command_line import command_line
from stratocache.api.space_parts import space_parts
from stratocache.cache.configuration import Configuration

pytestmark = pytest.mark.root

KINDS = ("images", "disks", "stage", "quarantine", "other", "reserve", "free")


@pytest.fixture
def world(api: Api) -> Iterator[World]:
    """A served appliance with something of everything."""
    made = furnish(api.db, api.configuration.state_dir)
    with serving(api.configuration):
        yield made


def on_screen(configuration: Configuration, *arguments: str) -> Terminal:
    """Return a terminal on which a command has ended."""
    program = [sys.executable, "-m", "stratocache", "--run-dir", str(configuration.run_dir)]
    with on_terminal([*program, *arguments], dict(os.environ)) as terminal:
        assert terminal.wait_for_end() == 0
    return terminal


def test_page_has_what_somebody_wants_to_know(configuration: Configuration, world: World) -> None:
    """What is wrong comes first, then the space as a bar with a legend, what there is, what is under
    way and what happened; what people wrote steers no terminal."""
    terminal = on_screen(configuration, "overview")
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.raw.decode())
    names = re.findall(r"^([a-z][a-z ]+?) {2,}", text, re.MULTILINE)

    assert names == [
        "problems", "space", "of it", "promised", "images", "disks", "snapshots", "attachments",
        "launches", "reads", "saved", "under way", "events",
    ]  # fmt: skip
    assert "tgtd does not answer." in text
    assert "█" in text
    assert "Images and snapshots" in text
    assert world.running in re.sub(r"\s", "", text)
    assert HOSTILE[:20] in text
    assert all(len(line) <= COLUMNS for line in terminal.lines)


def test_pipe_gets_lines_and_scripts_the_document(
    configuration: Configuration, world: World
) -> None:
    """In a pipe each line has its name before a colon and no colour; --json is the API's document;
    `status` is the same command."""
    lines, told, whole = (
        CliRunner().invoke(command_line, ["--run-dir", str(configuration.run_dir), *arguments])
        for arguments in (["overview"], ["status"], ["overview", "--json"])
    )

    assert lines.exit_code == told.exit_code == whole.exit_code == 0
    document = json.loads(whole.stdout)
    assert "\x1b" not in lines.stdout
    found = dict(line.split(":", 1) for line in lines.stdout.splitlines())
    assert found["problems"].strip() == str(len(document["problems"]))
    disks = document["counts"]["disks"]
    assert found["disks"].split()[0] == str(sum(disks.values()))
    assert f"{disks['available']} available" in found["disks"]
    for problem in document["problems"]:
        assert f"  {problem['kind']} {problem['subject']}" in found
    assert any(world.running in name for name in found)
    assert [line for line in told.stdout.splitlines() if line.startswith("images")] == [
        line for line in lines.stdout.splitlines() if line.startswith("images")
    ]


def test_watched_page_is_drawn_anew(api: Api, configuration: Configuration, world: World) -> None:
    """With --watch what comes is seen in its place."""
    program = [sys.executable, "-m", "stratocache", "--run-dir", str(configuration.run_dir)]
    arguments = ["overview", "--watch", "--interval", "0.1"]
    with on_terminal([*program, *arguments], {**os.environ, "NO_COLOR": "1"}) as terminal:
        terminal.wait_for_text("tgtd does not answer.")
        api.db.connection.execute("UPDATE attachments SET problem = 'It is cut off.'")
        terminal.wait_for_text("It is cut off.")
        assert "tgtd does not answer." not in terminal.text


@given(st.lists(st.integers(0, 2**60), min_size=len(KINDS), max_size=len(KINDS)))
def test_whatever_takes_space_is_seen(sizes: list[int]) -> None:
    """The bar is as long as it may be, and of all that there is at least one sign is in it."""
    spans = plots.stacked_line(list(zip(KINDS, sizes, strict=True)))

    assert [kind for _signs, kind in spans] == [
        kind for kind, size in zip(KINDS, sizes, strict=True) if size
    ]
    assert all(signs for signs, _kind in spans)
    assert sum(len(signs) for signs, _kind in spans) == (plots.CELLS if any(sizes) else 0)
    assert len({plots.sign_of(kind) for kind in KINDS}) == len(KINDS)


@given(st.fixed_dictionaries({
    name: st.integers(0, 2**50)
    for name in ("chunk_bytes", "manifest_bytes", "disk_allocated_bytes", "stage_bytes",
                 "quarantine_bytes", "free_bytes", "reserve_bytes", "used_bytes")
}))  # fmt: skip
def test_parts_are_the_whole(space: dict[str, int]) -> None:
    """The parts are the file system, as long as ours are no more than what is used of it."""
    ours = ("chunk_bytes", "manifest_bytes", "disk_allocated_bytes", "stage_bytes")
    used = space.pop("used_bytes") + sum(space[name] for name in (*ours, "quarantine_bytes"))
    space["total_bytes"] = used + space["free_bytes"]

    parts = space_parts(space)

    assert sum(size for _name, size, _kind in parts) == space["total_bytes"]
    assert all(size >= 0 for _name, size, _kind in parts)
