"""Can this code take over from the one that runs? Asked before anything is touched.

    python -m stratocache.fs.upgrade_check --config-json FILE --handover-format N --report-fd FD

Run by the interpreter that would run from then on. It imports every process' program, reads the
configuration, migrates a copy of the state database in memory and reads the formats of all disks.
It writes nothing but one JSON object to FD: `{"version": …}` with status 0, or an error's record
with status 1.
"""

import argparse
import importlib
import json
import os
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

from stratocache import __version__
from stratocache.cache.errors import (
    Conflict,
    Internal,
    InvalidInput,
    NotVerified,
    StratocacheError,
)
from stratocache.fs import handover

_PROGRAMS = (
    "stratocache.fs.supervisor",
    "stratocache.fs.standby",
    "stratocache.fs.holder",
    "stratocache.fs.blockd",
    "stratocache.api.server",
    "stratocache.api.peer_server",
)


def check(config_json: Path, handover_format: int) -> None:
    """Raise `StratocacheError` for whatever this code cannot go on with."""
    if handover_format not in handover.FORMATS:
        raise Conflict(
            "handover-unknown",
            f"Version {__version__} cannot go on with what the running supervisor would hand "
            f"over (format {handover_format}); stop and start instead.",
        )
    for program in _PROGRAMS:
        try:
            importlib.import_module(program)
        except Exception as error:
            raise Internal(
                "code-incomplete",
                f"{program} of version {__version__} cannot be imported ({error}); install "
                "what is missing.",
            ) from error
    _check_state(config_json)


def _check_state(config_json: Path) -> None:
    # here: their libraries may be what is missing
    from pydantic import ValidationError

    from stratocache.cache.configuration import Configuration
    from stratocache.fs.pool import Pool

    try:
        configuration = Configuration.model_validate_json(config_json.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(
            "configuration-invalid",
            f"Version {__version__} does not accept the configuration key {key}: {first['msg']}.",
            field=key,
        ) from error
    Pool.read(configuration.state_dir)
    _check_database(configuration.database)
    _check_disks(configuration.state_dir / "disks")


def _check_database(path: Path) -> None:
    from stratocache.fs.state import apply_migrations

    if not path.exists():
        return
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as state:
            state.backup(copy)
        # the real one may make a key, and this changes nothing
        copy.create_function("seal", 2, lambda attachment_id, secret: secret)
        try:
            apply_migrations(copy, path)
        except sqlite3.Error as error:
            raise Internal(
                "migration-failed",
                f"Version {__version__} cannot migrate {path} ({error}); report this.",
            ) from error


def _check_disks(directory: Path) -> None:
    """Refuse formats of a later version; what is damaged the running code cannot read either."""
    from stratocache.fs.bitmap import HEADER_BYTES, read_header
    from stratocache.fs.layers import RAW, DiskFiles

    for disk in sorted(directory.iterdir()) if directory.is_dir() else ():
        files = DiskFiles(disk, disk)
        with suppress(NotVerified, OSError):
            layout = files.layout()
            for layer in (layout.top, layout.frozen) if layout is not None else ():
                if layer is not None and layer != RAW:
                    path = files.bitmap(layer)
                    with path.open("rb") as file:
                        read_header(file.read(HEADER_BYTES), path)


def main() -> NoReturn:
    """Check, report, exit."""
    parser = argparse.ArgumentParser(prog="stratocache.fs.upgrade_check", description=__doc__)
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--handover-format", type=int, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    given = parser.parse_args()
    try:
        check(given.config_json, given.handover_format)
    except (StratocacheError, OSError, sqlite3.Error) as error:
        if not isinstance(error, StratocacheError):
            error = Internal("state-unreadable", f"The state cannot be read: {error}.")
        os.write(given.report_fd, json.dumps(error.to_record()).encode())
        sys.exit(1)
    os.write(given.report_fd, json.dumps({"version": __version__}).encode())
    sys.exit(0)


if __name__ == "__main__":
    main()
