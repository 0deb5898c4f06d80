"""`stratocache event` against the real API process."""

import json
import signal
import subprocess
import sys

import pytest
from support.api_daemon import Api, serving
from support.command_line import line_of, piping

from stratocache.cache.configuration import Configuration
from stratocache.fs.state import now

pytestmark = pytest.mark.root  # callers are root, or are made from root


def happen(api: Api, kind: str, subject: str = "x", message: str = "It happened.") -> None:
    """Record an event."""
    api.db.connection.execute(
        "INSERT INTO events (at, kind, subject, message) VALUES (?, ?, ?, ?)",
        (now(), kind, subject, message),
    )


def command(configuration: Configuration, *arguments: str) -> list[str]:
    """Return a command line."""
    program = [sys.executable, "-m", "stratocache", "--run-dir", str(configuration.run_dir)]
    return [*program, "event", *arguments]


def shown(configuration: Configuration, *arguments: str) -> str:
    """Run a command that must succeed; return what it writes."""
    return subprocess.run(
        command(configuration, *arguments), capture_output=True, text=True, check=True
    ).stdout


def test_events_are_listed(configuration: Configuration, api: Api) -> None:
    """The last ones, or all, or those of a kind or a subject, oldest first."""
    for number in range(25):
        happen(api, "disk.made" if number % 2 else "image.made", f"s{number}", "a\x1b[2J")
    with serving(configuration):
        lines = shown(configuration, "ls").splitlines()
        chosen = json.loads(shown(configuration, "ls", "--kind", "disk.", "--json"))["events"]
        everything = json.loads(shown(configuration, "ls", "--all", "--json"))["events"]
        one = json.loads(shown(configuration, "ls", "--subject", "s3", "--json"))["events"]

    assert lines[0] == "NUMBER\tAT\tKIND\tSUBJECT\tMESSAGE"
    assert [line.split("\t")[3] for line in lines[1:]] == [f"s{n}" for n in range(5, 25)]
    assert lines[1].endswith("\ta?[2J")
    assert {item["kind"] for item in chosen} == {"disk.made"}
    assert len(everything) == 25
    assert [item["subject"] for item in one] == ["s3"]


def test_events_are_followed_over_restarts(configuration: Configuration, api: Api) -> None:
    """What happens while the daemon is away is written when it is back, once and in order."""
    happen(api, "disk.made", "before")
    with (
        serving(configuration) as daemon,
        piping(command(configuration, "ls", "--follow", "--json", "--kind", "disk.")) as process,
    ):
        assert json.loads(line_of(process))["subject"] == "before"
        happen(api, "disk.made", "first")
        assert json.loads(line_of(process))["subject"] == "first"
        daemon.kill()
        daemon.wait()
        configuration.api_socket.unlink()
        happen(api, "image.made", "another kind")
        happen(api, "disk.made", "meanwhile")
        with serving(configuration):
            assert json.loads(line_of(process))["subject"] == "meanwhile"
            happen(api, "disk.made", "afterwards")
            assert json.loads(line_of(process))["subject"] == "afterwards"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_following_begins_where_it_is_told_to(configuration: Configuration, api: Api) -> None:
    """`follow --after` writes what came behind that event, for people on one line each."""
    for name in ("one", "two"):
        happen(api, "disk.made", name, f"Disk {name} is made.\n")
    first = api.db.rows("SELECT min(number) FROM events")[0][0]
    with (
        serving(configuration),
        piping(command(configuration, "follow", "--after", str(first))) as some,
    ):
        assert line_of(some).endswith("  disk.made  two  Disk two is made.?")


def test_following_needs_a_daemon(configuration: Configuration) -> None:
    """Without a daemon there is an error, not a wait."""
    with piping(command(configuration, "follow")) as process:
        errors = process.communicate(timeout=60)[1]

    assert process.returncode == 10
    assert errors.endswith("[daemon-unreachable]\n")
