"""Plots of `image show`, `disk show` and `cache status`: right marks, plain text, no colours in pipes."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.api_daemon import IMAGE_BYTES, IMAGE_ID, Api, insert_disk, insert_image, serving

from stratocache.api import plots
from stratocache.api.command_line import command_line
from stratocache.cache.configuration import Configuration

HISTORY = "[[1700000000,1048576,0.5],[1700000030,2097152,2.0]]"


@given(st.lists(st.floats(0, 1e15), max_size=70))
def test_sparklines_have_a_sign_for_each_value(values: list[float]) -> None:
    """As many signs as values; zeros are lowest, and nothing else is; the greatest is highest."""
    line = plots.sparkline(values)

    assert len(line) == len(values)
    top = max(values, default=0)
    for value, sign in zip(values, line, strict=True):
        assert (sign == "▁") == (value <= 0 or top <= 0)
        assert (sign == "█") or value < top or top == 0


@given(st.lists(st.floats(0, 1), max_size=70))
def test_bars_are_full_only_where_all_is_here(shares: list[float]) -> None:
    """A part that lacks anything never looks complete, one that has anything never looks empty."""
    for bar, full, empty in (
        (plots.bar_map(shares), "█", "·"), (plots.bar_map(shares, blocks=False), "#", "."),
    ):  # fmt: skip
        assert [sign == full for sign in bar] == [share >= 1 for share in shares]
        assert [sign == empty for sign in bar] == [share <= 0 for share in shares]


def test_periods_without_traffic_are_in_the_line() -> None:
    """Time runs evenly: ten seconds a sign, sixty signs at most, the latest ones."""

    def sample(at: str, wait_s: float) -> dict[str, object]:
        return {"at": at, "remote_wait_s": wait_s}

    near = [sample("2026-01-01T00:00:00.000000Z", 1), sample("2026-01-01T00:00:40.000000Z", 2)]
    far = [sample("2026-01-01T00:00:00.000000Z", 1), sample("2026-01-01T09:00:00.000000Z", 2)]

    assert plots.periods(near, "remote_wait_s") == [1, 0, 0, 0, 2]
    assert plots.periods(far, "remote_wait_s") == [0] * 59 + [2]
    assert plots.periods([], "remote_wait_s") == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.25, "0.25 s"), (12.4, "12 s"), (200, "3 min 20 s"), (120, "2 min"),
     (3600, "1 h"), (18600, "5 h 10 min")],
)  # fmt: skip
def test_times_are_for_people(seconds: float, text: str) -> None:
    """Two units at most."""
    assert plots.duration(seconds) == text


def _prepare(configuration: Configuration) -> str:
    """Insert a provisional image and a disk that cost something; return the disk's UUID."""
    api = Api(configuration)
    insert_image(api.db)
    uuid = insert_disk(api.db)
    run = api.db.connection.execute
    run("UPDATE images SET state = 'provisional', verified_at = NULL")
    run(
        "INSERT INTO image_traffic (image_id, remote_bytes, remote_wait_s, local_bytes, "
        "rate_bytes_s, hits, misses, history, updated_at) VALUES (?, 3145728, 2.5, ?, 1048576, 3, 1, "
        "?, '')",
        (IMAGE_ID, IMAGE_BYTES // 4, HISTORY),
    )
    run(
        "INSERT INTO disk_traffic (disk_number, remote_bytes, remote_wait_s, boot_remote_wait_s, "
        "history, updated_at) VALUES (1, 3145728, 2.5, 1.25, ?, '')",
        (HISTORY,),
    )
    run("INSERT INTO tallies VALUES ('cache_saved_bytes', '', 5242880), ('remote_wait_s', '', 90)")
    api.db.close()
    return uuid


def _on_terminal(configuration: Configuration, *arguments: str) -> str:
    """Run a command with a terminal of 100 columns as its output; return what it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "stratocache", "--socket", str(configuration.api_socket), *arguments],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment,
    )  # fmt: skip
    os.close(theirs)
    written = bytearray()
    with suppress(OSError):  # EIO at the end of a terminal
        while piece := os.read(ours, 4096):
            written += piece
    os.close(ours)
    assert process.wait(60) == 0, written
    return written.decode()


def test_shows_have_plots(configuration: Configuration) -> None:
    """In a pipe: one plain line each; on a terminal in colour; as JSON the numbers themselves."""
    uuid = _prepare(configuration)

    def run(*arguments: str) -> str:
        socket = ["--socket", str(configuration.api_socket)]
        result = CliRunner().invoke(command_line, [*socket, *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    with serving(configuration):
        image, disk, status = (
            run("image", "show", IMAGE_ID), run("disk", "show", uuid), run("cache", "status")
        )  # fmt: skip
        document = json.loads(run("image", "show", IMAGE_ID, "--json"))
        terminal = _on_terminal(configuration, "image", "show", IMAGE_ID)

    here = f"here:          {'·' * 60}  25 % of 4 MiB, complete in 3 s\n"
    waited = "guests waited: ▃▁▁█  2.5 s in all, last 40 s with traffic\n"
    assert here in image and waited in image and "moved:         ▅▁▁█  3 MiB in all\n" in image
    assert "hit_ratio: 0.75\n" in image and "traffic_history" not in image
    assert waited in disk and "boot_remote_wait_s: 1.25\n" in disk
    assert "saved by cache:      5 MiB\n" in status and "guests waited:       90 s\n" in status
    assert "\x1b" not in image + disk + status
    assert document["complete_in_s"] == 3.0 and len(document["local_map"]) == 60
    assert [sample["remote_wait_s"] for sample in document["traffic_history"]] == [0.5, 2.0]
    assert "\x1b[33m▃▁▁█" in terminal and "\x1b[32m·" in terminal
