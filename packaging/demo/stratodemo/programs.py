"""Running other programs, with an error that shows what they said."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


class ProgramError(Exception):
    """A program is missing or failed; the message holds its command line and the end of its words."""


def run_program(
    command: Sequence[str | Path], *, text: str | None = None, directory: Path | None = None
) -> str:
    """Run `command` with `text` as its input and return what it printed.

    The folders of system programs are searched too, which a plain user's PATH lacks on Debian.
    Raises `ProgramError`.
    """
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    line = " ".join(map(str, command))
    try:
        result = subprocess.run(
            command, check=False, capture_output=True,
            input=text, text=True, env=environment, cwd=directory,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ProgramError(f"{line}: {error.strerror}; packaging/install-dependencies.") from None
    if result.returncode != 0:
        words = (result.stderr.strip() or result.stdout.strip())[-800:]
        raise ProgramError(f"{line}: status {result.returncode}: {words}")
    return result.stdout
