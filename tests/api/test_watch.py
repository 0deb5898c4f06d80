"""`--watch` on a real terminal and in a pipe."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.api_daemon import ROOT, Api, end_badly, insert_disk
from support.command_line import line_of, piping
from support.terminal import Terminal, on_terminal

from stratocache.cache.configuration import Configuration
from stratocache.fs import image_intents

pytestmark = pytest.mark.root  # callers are root, or are made from root


@pytest.fixture
def configuration(daemon: Api) -> Configuration:
    """That of the daemon that all tests here share."""
    return daemon.configuration


@pytest.fixture
def api(daemon: Api) -> Iterator[Api]:
    """The daemon without any disk or operation."""
    yield daemon
    for table in ("disks", "operations"):
        daemon.db.connection.execute(f"DELETE FROM {table}")


ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"


def command(configuration: Configuration, *arguments: str) -> list[str]:
    """Return a command line that watches often."""
    program = [sys.executable, "-m", "stratocache", "--run-dir", str(configuration.run_dir)]
    return [*program, *arguments, "--watch", "--interval", "0.1"]


@contextmanager
def watching(configuration: Configuration, *arguments: str, **variables: str) -> Iterator[Terminal]:
    """Watch on a terminal."""
    with on_terminal(command(configuration, *arguments), {**os.environ, **variables}) as terminal:
        yield terminal


def test_screen_is_drawn_anew(configuration: Configuration, api: Api) -> None:
    """What changes is seen in its place; nothing of what was there before stays."""
    uuid = insert_disk(api.db, tag="a tag that is long")
    with watching(configuration, "disk", "ls") as terminal:
        terminal.wait_for_text("a tag that is long")
        assert terminal.lines[0].startswith("stratocache disk ls: ")
        assert "every 0.1 s" in terminal.lines[0]
        api.db.connection.execute("UPDATE disks SET tag = 'new'")
        terminal.wait_for(lambda: " new " in terminal.text)
        assert "long" not in terminal.text
        assert terminal.text.count(uuid) == 1
        api.db.connection.execute("DELETE FROM disks")
        terminal.wait_for(lambda: uuid not in terminal.text)


def test_ctrl_c_gives_the_terminal_back(configuration: Configuration, api: Api) -> None:
    """Ctrl-C ends it at once with status 0: the cursor is there, and what was seen last."""
    uuid = insert_disk(api.db)
    with watching(configuration, "disk", "ls") as terminal:
        terminal.wait_for_text(uuid)
        assert ENTERED in terminal.raw
        assert LEFT not in terminal.raw
        terminal.type("\x03")
        assert terminal.wait_for_end() == 0
        after = terminal.raw.rpartition(LEFT)[2]

    assert uuid.encode() in after
    assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")
    assert terminal.raw.rindex(b"\x1b[?7h") > terminal.raw.rindex(b"\x1b[?7l")
    assert b"Traceback" not in terminal.raw


def test_sigterm_gives_the_terminal_back(configuration: Configuration, api: Api) -> None:
    """A watch that is ended from elsewhere leaves the terminal as it was."""
    insert_disk(api.db)
    with watching(configuration, "disk", "ls") as terminal:
        terminal.wait_for_text("UUID")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait_for_end() == 128 + signal.SIGTERM

    assert terminal.raw.rindex(LEFT) > terminal.raw.rindex(ENTERED)


def test_new_size_is_drawn_at_once(configuration: Configuration, api: Api) -> None:
    """When the window shrinks, what fits is drawn long before the next look; nothing wraps."""
    for _ in range(8):
        insert_disk(api.db, tag="xyz")
    arguments = command(configuration, "disk", "ls")
    arguments[-1] = "3600"
    with on_terminal(arguments, os.environ) as terminal:
        terminal.wait_for(lambda: terminal.text.count("xyz") == 8)
        assert "more lines" not in terminal.text
        terminal.resize(8, 90)
        terminal.wait_for_text("more lines")
        assert terminal.lines[0].startswith("stratocache disk ls: ")
        assert len(terminal.lines) == 8


def test_table_without_colours(configuration: Configuration, api: Api) -> None:
    """NO_COLOR and a dumb terminal get a table without a single attribute."""
    insert_disk(api.db)
    with watching(configuration, "disk", "ls", NO_COLOR="1") as terminal:
        terminal.wait_for_text("UUID")
        plain = terminal.raw
    with watching(configuration, "disk", "ls") as terminal:
        terminal.wait_for_text("UUID")
        coloured = terminal.raw

    assert b"\x1b[1m" in coloured  # the heading is bold
    assert b"\x1b[1m" not in plain
    assert b"\x1b[0m" not in plain


def test_pipe_gets_changes_as_lines(configuration: Configuration, api: Api) -> None:
    """Without a terminal: everything once, then the rows that are new, changed and gone."""
    uuid = insert_disk(api.db, tag="a")
    with piping(command(configuration, "disk", "ls")) as process:
        assert line_of(process).startswith("UUID\t")
        assert line_of(process).split("\t")[0] == uuid
        api.db.connection.execute("UPDATE disks SET tag = 'b'")
        assert line_of(process).split("\t")[5] == "b"
        second = insert_disk(api.db)
        shown = line_of(process)
        assert shown.split("\t")[0] == second
        api.db.connection.execute("DELETE FROM disks WHERE uuid = ?", (uuid,))
        while (shown := line_of(process)) and shown.startswith(second):
            pass  # seen before it was available
        assert shown == f"gone: {uuid}"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)

    assert (process.returncode, rest, errors) == (0, "", "")


def test_json_is_a_document_a_change(configuration: Configuration, api: Api) -> None:
    """With --json each change is one whole document on one line."""
    uuid = insert_disk(api.db, tag="a")
    with piping(command(configuration, "disk", "show", uuid, "--json")) as process:
        assert json.loads(line_of(process))["tag"] == "a"
        api.db.connection.execute("UPDATE disks SET tag = 'b', generation = generation + 1")
        assert json.loads(line_of(process))["tag"] == "b"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")


def test_end_of_what_is_watched_is_an_error(configuration: Configuration, api: Api) -> None:
    """When the disk is gone the watch ends with the error that says so."""
    uuid = insert_disk(api.db, tag="a")
    with watching(configuration, "disk", "show", uuid) as terminal:
        terminal.wait_for_text(f"uuid: {uuid}")
        api.db.connection.execute("DELETE FROM disks")
        assert terminal.wait_for_end() == 3

    assert b"[disk-unknown]" in terminal.raw.rpartition(LEFT)[2]


def test_daemon_is_waited_for(configuration: Configuration, api: Api, tmp_path: Path) -> None:
    """A daemon that goes away is said to be away, with what was seen last, and is waited for; one
    that was never there is an error."""
    uuid = insert_disk(api.db, tag="before")
    away = configuration.run_dir / "away.sock"
    with watching(configuration, "disk", "ls") as terminal:
        terminal.wait_for_text("before")
        configuration.api_socket.rename(away)
        try:
            terminal.wait_for_text("[daemon-unreachable]")
            assert uuid in terminal.text
            with watching(configuration, "disk", "ls") as another:
                assert another.wait_for_end() == 10
                assert ENTERED not in another.raw
            api.db.connection.execute("UPDATE disks SET tag = 'back'")
        finally:
            away.rename(configuration.api_socket)
        terminal.wait_for_text("back")
        assert "[daemon-unreachable]" not in terminal.text


def test_operations_are_watched_to_their_end(configuration: Configuration, api: Api) -> None:
    """`operation ls --watch` shows how far work is."""
    operation = image_intents.request_fetch(api.db, ROOT, "held")
    progress = "UPDATE operations SET state = 'running', progress_bytes = ?, total_bytes = 2097152"
    with piping(command(configuration, "operation", "ls")) as process:
        assert line_of(process).startswith("ID\t")
        assert line_of(process).split("\t")[2] == "pending"
        api.db.connection.execute(progress, (1048576,))
        assert "\trunning\t1 MiB of 2 MiB (50 %)\t" in line_of(process)
        record = {"category": "OriginFailed", "code": "origin-down", "message": "It is down."}
        end_badly(api.db, operation.id, "failed", record)
        assert line_of(process).endswith("\torigin-down")


def test_intervals_have_limits(tmp_path: Path) -> None:
    """An interval that would only burn the processor is wrong usage."""
    program = [sys.executable, "-m", "stratocache", "--socket", str(tmp_path / "none")]
    done = subprocess.run(
        [*program, "disk", "ls", "--watch", "--interval", "0"], capture_output=True, check=False
    )

    assert done.returncode == 2
