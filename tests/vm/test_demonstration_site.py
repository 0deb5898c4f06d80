"""The demonstration's site takes everything down that was set up in it, whatever happens."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from stratodemo.programs import run_program
from stratodemo.site import CommandFailed, Site
from support.guests import data_image

pytestmark = [pytest.mark.vm, pytest.mark.root]


def test_site_that_fails_leaves_only_its_logs() -> None:
    """A mount, a loop device and a process of a failed demonstration are gone; its logs are not."""
    with pytest.raises(ZeroDivisionError), Site() as site:
        process = _leave_behind(site.folder)
        kinds = [entry.split(" /")[0].rstrip("0123456789") for entry in site.leftovers()]
        assert sorted(kinds) == ["loop device", "mount", "process "]
        raise ZeroDivisionError
    try:
        assert site.leftovers() == []
        assert process.wait(10) != 0
        assert list(site.folder.iterdir()) == [site.logs]
    finally:
        shutil.rmtree(site.folder)


def test_failed_command_shows_status_and_words() -> None:
    """A command of the appliance that fails is raised with its exit status, and is in the log."""
    with Site() as site:
        with pytest.raises(CommandFailed, match="disk ls") as failure:
            site.command("disk", "ls")
        assert failure.value.status != 0
        assert "stratocache disk ls" in site.log_tails()
    assert not site.folder.exists()


def _leave_behind(folder: Path) -> subprocess.Popen[bytes]:
    image, mount = folder / "image.raw", folder / "mounted"
    shutil.copy(data_image(), image)
    mount.mkdir()
    device = run_program(["losetup", "--find", "--show", "--read-only", "-o", "1MiB", image])
    run_program(["mount", "-o", "ro,noload", device.strip(), mount])
    environment = {**os.environ, "STRATOCACHE_CONFIG": str(folder / "none.toml")}
    process = subprocess.Popen(["sleep", "600"], env=environment)
    # exec(2) has succeeded a moment before the kernel shows the new environment
    while not Path(f"/proc/{process.pid}/environ").read_bytes():
        pass
    return process
