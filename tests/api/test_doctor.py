"""Checks of the host."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from stratocache import __version__
from stratocache.api.command_line import command_line
from stratocache.api.doctor import Finding, examine
from stratocache.api.host_checks import judge_clock, judge_kernel, judge_lio
from stratocache.api.judgement import Verdict
from stratocache.cache.configuration import Configuration, IscsiSettings, SpaceSettings
from stratocache.fs.listener import listen
from stratocache.fs.pool import Pool
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.supervisor_status import State, SupervisorStatus, read_status, write_status


@pytest.fixture
def port() -> Iterator[int]:
    """A TCP port that another program listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def found(configuration: Configuration, name: str) -> Finding:
    """Return one check's finding."""
    return next(item for item in examine(configuration) if item.name == name)


def with_port(configuration: Configuration, port: int) -> Configuration:
    """Return a configuration with another portal."""
    return configuration.model_copy(update={"iscsi": IscsiSettings(port=port)})


def test_every_finding_that_is_not_ok_says_how_to_mend(configuration: Configuration) -> None:
    """All checks run on this host; each fault comes with what to do."""
    findings = examine(configuration)

    assert [item.name for item in findings] == [
        "user", "fuse", "kernel", "tgtd", "qemu-img", "signatures", "state directory",
        "run directory", "reflink", "space", "cache", "clock", "group", "portal", "peers",
        "network", "daemon",
    ]  # fmt: skip
    for item in findings:
        assert item.detail
        assert (item.verdict is Verdict.OK) == (item.mend == "")


def test_programs_are_found_with_their_version(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tgtd and qemu-img are found, also in the system's directories, and missing ones named."""
    for name in ("tgtd", "qemu-img"):
        finding = found(configuration, name)
        assert finding.verdict is Verdict.OK
        assert finding.detail[-1].isdigit()
    monkeypatch.setenv("PATH", "/nowhere")
    assert found(configuration, "tgtd").verdict is Verdict.OK
    missing = found(configuration, "qemu-img")
    assert missing.verdict is Verdict.FAIL
    assert "qemu-utils" in missing.mend


def test_wrong_tgtd_is_named(configuration: Configuration) -> None:
    """A target daemon that is configured but not there fails."""
    wrong = configuration.model_copy(update={"iscsi": IscsiSettings(tgtd="tgtd-of-mine")})

    finding = found(wrong, "tgtd")
    assert finding.verdict is Verdict.FAIL
    assert "tgtd-of-mine" in finding.detail


def test_kernel_target_is_judged_by_its_modules(configuration: Configuration) -> None:
    """With LIO it is not tgtd that counts, and what the kernel lacks is named with a way out."""
    lacking = judge_lio("6.1.0", ["iscsi_target_mod"])
    assert lacking.verdict is Verdict.FAIL
    assert "iscsi_target_mod" in lacking.detail
    assert 'iscsi.backend = "tgt"' in lacking.mend
    assert judge_lio("6.1.0", []).verdict is Verdict.OK
    chosen = IscsiSettings(backend="lio", tgtd="tgtd-of-mine")
    finding = found(configuration.model_copy(update={"iscsi": chosen}), "tgtd")
    assert "LIO" in finding.detail


@pytest.mark.parametrize(
    ("release", "verdict"),
    [
        ("6.18.44", Verdict.OK),
        ("6.9.0-rc1", Verdict.OK),
        ("7.0", Verdict.OK),
        ("6.8.12-amd64", Verdict.WARN),
        ("4.19.0", Verdict.WARN),
        ("4.18.0", Verdict.FAIL),
        ("strange", Verdict.FAIL),
    ],
)
def test_kernel_is_judged_by_what_it_enables(release: str, verdict: Verdict) -> None:
    """Linux 6.9 re-sends FUSE requests; older ones work with reconnects; ancient ones do not."""
    assert judge_kernel(release).verdict is verdict


def test_clock_is_judged() -> None:
    """A clock in the past fails, one that nobody sets is a warning."""
    assert judge_clock(0, synchronised=True).verdict is Verdict.FAIL
    assert judge_clock(1.8e9, synchronised=False).verdict is Verdict.WARN
    assert judge_clock(1.8e9, synchronised=True).verdict is Verdict.OK


def test_state_directory_is_judged(configuration: Configuration, tmp_path: Path) -> None:
    """Missing is fine when it can be made; a file or one that others write to is not."""

    def verdict(path: Path) -> Verdict:
        changed = configuration.model_copy(update={"state_dir": path})
        return found(changed, "state directory").verdict

    assert verdict(configuration.state_dir) is Verdict.OK
    assert verdict(tmp_path / "a" / "b") is Verdict.OK
    assert verdict(Path("/proc/stratocache")) is not Verdict.OK or os.access("/proc", os.W_OK)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert verdict(shared) is Verdict.FAIL
    file = tmp_path / "file"
    file.touch()
    assert verdict(file) is Verdict.FAIL


def test_long_run_directory_fails(configuration: Configuration, tmp_path: Path) -> None:
    """A run directory in which no Unix socket can be bound is found before serving."""
    changed = configuration.model_copy(update={"run_dir": tmp_path / ("x" * 120)})

    assert found(changed, "run directory").verdict is Verdict.FAIL


def test_space_is_compared_with_the_reserve(configuration: Configuration) -> None:
    """Less free space than is reserved fails."""
    greedy = configuration.model_copy(update={"space": SpaceSettings(reserve_bytes=2**62)})

    assert found(configuration, "space").verdict is not Verdict.FAIL
    assert found(greedy, "space").verdict is Verdict.FAIL


def test_pool_is_recommended_where_extents_are_not_shared(
    configuration: Configuration, tmp_path: Path
) -> None:
    """On ext4 a pool is the way to mend; once there is one, mounted or not, all is well."""
    wanted = found(configuration, "reflink")
    assert wanted.verdict is Verdict.WARN
    assert "stratocache pool create" in wanted.mend
    Pool(configuration.state_dir, tmp_path / "pool.xfs", "uuid", False).write(
        configuration.state_dir
    )
    there = found(configuration, "reflink")
    assert there.verdict is Verdict.OK
    assert str(tmp_path / "pool.xfs") in there.detail
    (configuration.state_dir / "pool.json").write_bytes(b"damaged")
    assert found(configuration, "reflink").verdict is Verdict.FAIL


def test_group_is_looked_up(configuration: Configuration) -> None:
    """A missing group of administrators is a warning that says how to add it."""
    finding = found(configuration, "group")

    assert finding.verdict is Verdict.WARN
    assert "groupadd" in finding.mend


def test_portal_in_use_fails_unless_it_is_ours(configuration: Configuration, port: int) -> None:
    """Another program on the portal fails; a running daemon's own portal does not."""
    changed = with_port(configuration, port)

    assert found(changed, "portal").verdict is Verdict.FAIL
    with listen(changed.api_socket, "no-such-group"):
        assert found(changed, "portal").verdict is Verdict.OK
    foreign = configuration.model_copy(update={"iscsi": IscsiSettings(address="192.0.2.1")})
    assert found(foreign, "portal").verdict is Verdict.FAIL


def test_command_exits_1_only_on_failures(configuration: Configuration, port: int) -> None:
    """`doctor --json` writes every check; the exit status follows the worst."""
    flags = ["--state-dir", str(configuration.state_dir), "--run-dir", str(configuration.run_dir)]
    environment = {"STRATOCACHE_ISCSI__PORT": str(port)}
    runner = CliRunner()

    broken = runner.invoke(command_line, [*flags, "doctor", "--json"], env=environment)
    assert broken.exit_code == 1
    checks = {item["name"]: item for item in json.loads(broken.stdout)["checks"]}
    assert checks["portal"]["verdict"] == "FAIL"
    with listen(configuration.api_socket, "no-such-group"):
        mended = runner.invoke(command_line, [*flags, "doctor"], env=environment)
    assert mended.exit_code == 0, mended.output
    assert mended.stdout.startswith("CHECK\tVERDICT\tFOUND\tTO MEND\n")


@pytest.mark.parametrize(
    ("state", "version", "verdict", "mend"),
    [
        (State.READY, __version__, Verdict.OK, ""),
        (State.READY, "0.0.9", Verdict.WARN, "stratocache upgrade"),
        (State.FROZEN, __version__, Verdict.FAIL, "stratocache upgrade"),
    ],
)
def test_running_daemon_is_judged(
    configuration: Configuration, state: State, version: str, verdict: Verdict, mend: str
) -> None:
    """A daemon of another version is worth a warning; one whose guests wait for ever is a failure."""
    assert found(configuration, "daemon").detail == "not running"
    status = SupervisorStatus(version, os.getpid(), state, "", {}, None)
    write_status(RunDirectory(configuration.run_dir).supervisor_status, status.to_json())

    finding = found(configuration, "daemon")
    assert finding.verdict is verdict
    assert mend in finding.mend
    assert version in finding.detail


def test_status_of_a_dead_daemon_is_none(configuration: Configuration) -> None:
    """What a killed supervisor said last, or nobody can read, counts for nothing."""
    path = RunDirectory(configuration.run_dir).supervisor_status
    write_status(path, SupervisorStatus("1", 2**22 + 1, State.READY, "", {}, None).to_json())
    assert read_status(path) is None
    path.write_text('{"version": []}')
    assert read_status(path) is None
