"""`stratocache serve`: what it writes down before the supervisor takes over."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from support.command_line import error, run_alone

from stratocache.api.durable_file import write_durably
from stratocache.cache.configuration import Configuration


def test_serve_writes_the_configuration_down(tmp_path: Path) -> None:
    """`serve` keeps what it was told in RUN_DIR, for its owner only, and runs the supervisor."""
    path = tmp_path / "stratocache.toml"
    path.write_text("[fetch]\nattempts = 7\n")
    run_dir = tmp_path / "run"
    program = (
        "import os, sys\n"
        "os.execv = lambda path, command: (print(path, *command[1:]), sys.exit(0))\n"
        "from stratocache.api.command_line import main; main()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, "--config", str(path), "--state-dir",
         str(tmp_path / "state"), "--run-dir", str(run_dir), "serve", "--set", "iscsi.port=4000"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    written = run_dir / "configuration.json"
    configuration = Configuration.model_validate_json(written.read_bytes())

    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert configuration.fetch.attempts == 7
    assert configuration.iscsi.port == 4000
    assert configuration.run_dir == run_dir
    assert os.listdir(run_dir) == ["configuration.json"]
    assert "-m stratocache.fs.supervisor" in shown.stdout
    assert f"--config-json {written}" in shown.stdout


def test_serve_refuses_unknown_keys(tmp_path: Path) -> None:
    """A key that does not exist is refused by name before anything is written."""
    result = run_alone("--run-dir", str(tmp_path / "run"), "serve", "--set", "iscsi.colour=red")

    assert "iscsi.colour" in error(result, 2, "configuration-invalid")
    assert not (tmp_path / "run").exists()


def test_serve_refuses_unusable_directories(tmp_path: Path) -> None:
    """A directory that cannot be made is an error with a sentence, not a traceback."""
    file = tmp_path / "file"
    file.touch()
    result = run_alone("--state-dir", f"{file}/state", "--run-dir", f"{tmp_path}/run", "serve")

    assert str(file) in error(result, 2, "directory-unusable")


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    """A durable write leaves the new content, and nothing beside it."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_durably(path, b"new")

    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
