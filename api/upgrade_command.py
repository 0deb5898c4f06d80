"""`stratocache upgrade`: the running daemon goes on with the code that this command belongs to."""

import json
import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import click

from stratocache.api.examples import examples
from stratocache.api.session import Session, json_option, plain
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import (
    Conflict,
    ErrorRecord,
    Internal,
    Unreachable,
    from_record,
)
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.supervisor_status import SupervisorStatus, read_status
from stratocache.fs.upgrade import UpgradeRecord, UpgradeRequest

_POLL_INTERVAL_S = 0.05
_REPORT_BYTES_MAX = 16 * 1024


@click.command(
    epilog=examples(
        "stratocache upgrade",
        "stratocache upgrade --tgtd",
    )
)
@click.option(
    "--tgtd", is_flag=True, help="Start tgtd again too; initiators log in again by themselves."
)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(1, 86400), default=300, show_default=True,
    metavar="SECONDS", help="How long to wait for the end; the upgrade itself goes on.",
)  # fmt: skip
@json_option
@click.pass_obj
def upgrade(session: Session, tgtd: bool, timeout_s: float) -> None:
    """Let the running daemon go on with this version, while guests run.

    Nothing is touched unless this version can read the state. Run it again whenever in doubt.
    """
    session.ignores_default = True
    directory = RunDirectory(session.configuration.run_dir.absolute())
    status = running_status(session.configuration)
    request = UpgradeRequest.to_this_code(tgtd=tgtd)
    deadline = time.monotonic() + timeout_s
    _say(session, f"checking whether this code can take over from version {status.version}")
    require_agreement(request, directory.path / "configuration.json")
    request.write(directory.upgrade_request)
    try:
        os.kill(status.pid, signal.SIGHUP)
    except ProcessLookupError:
        raise _not_running() from None
    record = _follow(directory.supervisor_status, status.pid, request.id, deadline, session)
    if record.error is not None:
        raise from_record(record.error)
    session.show(asdict(record), f"version {record.from_version} -> {record.to_version}")


def _say(session: Session, line: str) -> None:
    if not session.as_json:
        click.echo(plain(line))


def _not_running() -> Unreachable:
    return Unreachable(
        "not-running", "The daemon does not run here; `stratocache serve` starts it."
    )


def running_status(configuration: Configuration) -> SupervisorStatus:
    """Return what the supervisor says about itself; raises `Unreachable` (`not-running`)."""
    status = read_status(RunDirectory(configuration.run_dir).supervisor_status)
    if status is None:
        raise _not_running()
    return status


def require_agreement(request: UpgradeRequest, config_json: Path) -> None:
    """Ask the new code, in a process of its own, whether it can take over.

    Raises `Conflict` (`upgrade-refused`) with its reason; nothing was changed then.
    """
    reports, report = os.pipe()
    with open(reports, "rb") as pipe:
        try:
            check = subprocess.run(
                request.check_command(config_json, report), env=request.environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                pass_fds=(report,), check=False, text=True, errors="replace",
            )  # fmt: skip
        finally:
            os.close(report)
        answer = pipe.read(_REPORT_BYTES_MAX)
    if check.returncode:
        raise _refused(answer, check.stderr)


def _refused(answer: bytes, complaint: str) -> Conflict:
    try:
        record: ErrorRecord = json.loads(answer)
        reason = f"{record['message']} [{record['code']}]"
    except (ValueError, KeyError, TypeError):
        reason = complaint.strip().rpartition("\n")[2] or "It does not start."
    return Conflict("upgrade-refused", f"This code cannot take over, nothing was changed: {reason}")


def _follow(
    path: Path, pid: int, request_id: str, deadline: float, session: Session
) -> UpgradeRecord:
    """Say each step of an upgrade as it is done; return when there is no other."""
    shown = 0
    while True:
        status = read_status(path)
        if status is None or status.pid != pid:
            raise Unreachable(
                "upgrade-interrupted",
                f"The supervisor (process {pid}) ended meanwhile; see `stratocache doctor`, then "
                "run this again.",
            )
        record = status.upgrade
        if record is not None and record.id == request_id:
            for step in record.steps[shown:]:
                _say(session, f"{step.name}: pause {step.pause_s:.2f} s")
            shown = len(record.steps)
            if record.finished:
                return record
        if time.monotonic() > deadline:
            raise Internal(
                "upgrade-unfinished",
                f"The upgrade has not ended in time (the daemon is {status.state}); guests are "
                "served or wait. See its log and `stratocache doctor`.",
            )
        time.sleep(_POLL_INTERVAL_S)
