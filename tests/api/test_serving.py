"""API and command line on a whole appliance: what they say is what initiators find."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance

pytestmark = pytest.mark.root


@pytest.fixture
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """A running appliance with an empty catalogue."""
    root = tmp_path_factory.mktemp("a")
    market = root / "market"
    market.mkdir()
    with Appliance(root, endpoint=f"file://{market}") as started:
        yield started


def test_attached_disk_is_found_where_the_answer_says(appliance: Appliance) -> None:
    """libiscsi reads by iscsi_url; QEMU opens by qemu_args; after detach neither finds anything."""
    disk = appliance.json("disk", "create", "--size", "10M")
    held = appliance.json("disk", "attach", disk["uuid"], "--instance", "vm-1")

    info = _run("qemu-img", "info", held["iscsi_url"])
    assert info.returncode == 0, info.stderr
    assert "10 MiB (10485760 bytes)" in info.stdout
    opened = _qemu(held)
    assert opened.returncode == 0, opened.stderr
    assert '"SHUTDOWN"' in opened.stdout
    wrong = _run("qemu-img", "info", held["iscsi_url"].replace("%", "%x"))
    assert wrong.returncode != 0

    appliance.json("disk", "detach", disk["uuid"])
    assert _run("qemu-img", "info", held["iscsi_url"]).returncode != 0
    assert "SHUTDOWN" not in _qemu(held).stdout
    assert not Path(held["qemu_args"][1].rpartition("file=")[2]).exists()
    appliance.json("disk", "rm", disk["uuid"])
    assert appliance.json("disk", "ls") == {"disks": []}


def test_fetch_of_an_unknown_reference_fails_alike_everywhere(appliance: Appliance) -> None:
    """Command line and API give the same code for a reference that no catalogue knows."""
    identifier = "GOaxJFdoEXvqAm9ArJgnZ0_ky6F"

    failed = appliance.run("image", "fetch", identifier)
    assert failed.returncode == 3
    assert failed.stderr.endswith("[reference-unknown]\n")
    body = {"reference": identifier, "instance": "vm-1"}
    status, problem = appliance.request("POST", "/v1/launches", body)
    assert (status, problem["code"]) == (404, "reference-unknown")
    deadline = time.monotonic() + 20
    while appliance.request("GET", "/v1/launches/vm-1")[0] != 404:  # it ends, then is gone
        assert time.monotonic() < deadline
    assert appliance.request("GET", "/v1/images")[1]["images"] == []


def _qemu(held: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return _run(
        "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none",
        "-S", "-qmp", "stdio", *held["qemu_args"],
        stdin='{"execute":"qmp_capabilities"}{"execute":"quit"}',
    )  # fmt: skip


def _run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
