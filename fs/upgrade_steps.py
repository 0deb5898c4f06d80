"""The steps of an upgrade in place: ask the new code, then put it in the place of the old.

`checking` comes before the supervisor's re-execution, `rolling` after it. Both are generators,
which the supervisor's loop resumes whenever it comes by: nothing here waits. Standard library only.
`SUPERVISOR.md`, "Upgrade".
"""

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stratocache.cache.errors import ErrorRecord, Internal
from stratocache.fs.crew import STOP_TIMEOUT_S, Crew
from stratocache.fs.processes import Child, Launch
from stratocache.fs.upgrade import Progress, RolledStep, UpgradeRecord, UpgradeRequest

log = logging.getLogger(__name__)

_REPORT = "report"
_REPORT_BYTES_MAX = 16 * 1024
_CHECK_TIMEOUT_S = 120.0
_READY_TIMEOUT_S = 120.0
_SPARE_CRASHES_MAX = 3
_API_WAITS_S = 5.0  # for blockd, at most


def checking(request: UpgradeRequest, record: UpgradeRecord, config_json: Path) -> Iterator[None]:
    """Ask the code that is to run; nothing is touched.

    Ends with its version in `record` when it agrees, else with an error there.
    """
    check = Child("upgrade check")
    try:
        _start_check(check, request, config_json)
    except OSError as error:
        fail(record, Internal("code-missing", f"{request.python} cannot be run: {error}."))
        return
    deadline = time.monotonic() + _CHECK_TIMEOUT_S
    while not check.wait(0):
        if time.monotonic() > deadline:
            check.send(signal.SIGKILL)
        yield
    os.set_blocking(check.links[_REPORT], False)
    answer = os.read(check.links[_REPORT], _REPORT_BYTES_MAX)  # b"" when it said nothing
    status = check.collect(logging.INFO)
    try:
        said = json.loads(answer)
        if status == 0:
            record.to_version = str(said["version"])
        else:
            record.progress = Progress.FAILED
            record.error = ErrorRecord(
                category=said["category"], code=said["code"], message=said["message"]
            )
    except (ValueError, TypeError, KeyError):
        sentence = f"The new code does not start (status {status}); the log says why."
        fail(record, Internal("code-broken", sentence))


def _start_check(check: Child, request: UpgradeRequest, config_json: Path) -> None:
    ours, report = os.pipe2(os.O_CLOEXEC)
    command = request.check_command(config_json, report)
    launch = Launch(command, request.environment, (report,))
    try:
        check.start(launch, {_REPORT: ours})
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(report)


def fail(record: UpgradeRecord, error: Internal) -> None:
    """Note that it ends here."""
    log.error("the upgrade failed: %s", error.message)
    record.progress, record.error = Progress.FAILED, error.to_record()


def rolling(
    crew: Crew, tgtd: bool, record: UpgradeRecord, fault: Callable[[], str]
) -> Iterator[None]:
    """Let the new code take over, process by process; `fault` says why `blockd` is given up.

    The new `blockd` has done its imports before the old one ends. The API, and what serves the network,
    end before it, since the new one may change the schema of the state, and start after it; their
    clients wait.
    """
    crew.spare.due_at = 0.0
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not crew.spare.ready and not fault():
        if crew.spare.crashes >= _SPARE_CRASHES_MAX or time.monotonic() > deadline:
            sentence = "The new blockd does not start, the old one goes on; install code that does."
            fail(record, Internal("blockd-broken", sentence))
            return
        yield
    for child in crew.asking:
        child.held = True
    for server in crew.networked:
        yield from _end(server.child, signal.SIGTERM)
    api_since = time.monotonic()
    yield from _end(crew.api, signal.SIGTERM)
    yield from _replace_blockd(crew, record, fault)
    for child in crew.asking:
        child.held, child.due_at = False, 0.0
    yield from _until_ready(crew.api, api_since, record)
    if tgtd and record.error is None:
        since = time.monotonic()
        yield from _end(crew.tgtd, signal.SIGKILL)
        yield from _until_ready(crew.tgtd, since, record)
    if record.error is None:
        record.progress = Progress.DONE
        log.info("upgraded from %s to %s", record.from_version, record.to_version)


def _replace_blockd(crew: Crew, record: UpgradeRecord, fault: Callable[[], str]) -> Iterator[None]:
    since = time.monotonic()
    # its writes are safe without it (CRASH.md), and what it flushed at leisure guests would wait for
    yield from _end(crew.blockd, signal.SIGKILL)
    for _ in _until_ready(crew.blockd, since, record):
        if fault():
            fail(record, Internal("blockd-frozen", fault()))
            return
        if time.monotonic() > since + _API_WAITS_S:
            crew.api.held = False  # somebody must say what is going on
        yield


def _end(child: Child, number: signal.Signals) -> Iterator[None]:
    """End the present process of a child; the loop collects it and starts the next."""
    pid, deadline = child.pid, time.monotonic() + STOP_TIMEOUT_S
    child.send(number)
    while child.running and child.pid == pid:
        if time.monotonic() > deadline:
            child.send(signal.SIGKILL)
        yield


def _until_ready(child: Child, since: float, record: UpgradeRecord) -> Iterator[None]:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not child.ready:
        if time.monotonic() > deadline:
            sentence = (
                f"The new {child.name} is not ready after {_READY_TIMEOUT_S:g} s; see the log."
            )
            fail(record, Internal(f"{child.name}-not-ready", sentence))
            return
        yield
    assert child.ready_at is not None
    record.steps.append(RolledStep(child.name, round(child.ready_at - since, 3)))
