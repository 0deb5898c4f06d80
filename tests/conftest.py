"""What every test session does first: say what is missing, and sweep what a killed one left.

`make test` draws the same examples every time; `make crash`, which sets CRASH_ROUNDS, new ones. How
long an example may take is nobody's promise, least of all beside another worker.
"""

import errno
import os
import re
import signal
import sqlite3
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from support.sharing import Sharing
from xdist.remote import Producer

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("default" if "CRASH_ROUNDS" in os.environ else "steady")

# Where pytest keeps a session's folders; `.lock` holds the session's process id.
_SESSION = re.compile(r"(/\S*?/pytest-of-[^/\s]+/pytest-[0-9]+)(?=/)")

# UUIDs, and the 27 characters of an image's identifier.
_DRAWN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<![\w-])[\w-]{27}(?![\w-])")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that needs what this machine lacks, in one line: missing is not passing."""
    if item.get_closest_marker("root") is not None:
        if os.geteuid() != 0:
            pytest.fail("needs root, for FUSE, mounts and loop devices", pytrace=False)
        for device in ("/dev/fuse", "/dev/loop-control"):
            if not os.access(device, os.R_OK | os.W_OK):
                pytest.fail(f"needs {device}; load its kernel module", pytrace=False)


def pytest_exception_interact(
    call: pytest.CallInfo[object], report: pytest.CollectReport | pytest.TestReport
) -> None:
    """Say which of its many "disk I/O error" SQLite means."""
    error = call.excinfo.value if call.excinfo is not None else None
    while error is not None:
        if isinstance(error, sqlite3.Error) and hasattr(error, "sqlite_errorname"):
            report.sections.append(("SQLite", error.sqlite_errorname))
        error = error.__cause__ or error.__context__


@pytest.fixture(autouse=True)
def closed_twice(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail a test that closes a descriptor twice: the second time it may be another file's."""
    failures: list[str] = []
    close = os.close

    def close_once(descriptor: int) -> None:
        try:
            close(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                failures.append("".join(traceback.format_stack(limit=8)))
            raise

    monkeypatch.setattr(os, "close", close_once)
    yield failures
    assert not failures, "\n".join(["closed twice:", *failures])


def pytest_make_parametrize_id(val: object) -> str | None:
    """Leave out of a test's name what may be drawn anew in each process: workers must agree on it."""
    if isinstance(val, str) and _DRAWN.search(val):
        return _DRAWN.sub("ID", val)
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Sharing:
    """Share files among workers in our own way, whatever `--dist` says."""
    return Sharing(config, log)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take down the processes, mounts and loop devices of sessions that are dead.

    Of several workers none does it, but once the process that starts them, before it does.
    """
    # what a shell starts in the background ignores Ctrl-C, and so would all commands under test
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() != 0 or hasattr(session.config, "workerinput"):
        return
    for pid, text in _processes():
        if _is_of_dead_session(text):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for path in reversed(mounts):
        if _is_of_dead_session(path + "/"):
            subprocess.run(["umount", "-f", "-l", path], check=False, capture_output=True)
    devices = subprocess.run(
        ["losetup", "-n", "-O", "NAME,BACK-FILE"], check=False, capture_output=True, text=True
    )
    for line in devices.stdout.splitlines():
        if _is_of_dead_session(line):
            subprocess.run(["losetup", "-d", line.split()[0]], check=False)


def _is_of_dead_session(text: str) -> bool:
    found = _SESSION.search(text)
    if found is None:
        return False
    try:
        pid = int(Path(found[1], ".lock").read_text())
    except (OSError, ValueError):
        return True
    return not Path(f"/proc/{pid}").exists()


def _processes() -> Iterator[tuple[int, str]]:
    """Yield the processes with their command lines, but not this one and its parent.

    Those of another root directory are left out: their paths are not ours.
    """
    own = {os.getpid(), os.getppid()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in own:
            with suppress(OSError):
                # by the directory itself: seen from inside a chroot, both are called "/"
                if not os.path.samefile(entry / "root", "/"):
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                yield int(entry.name), line.decode(errors="replace")
