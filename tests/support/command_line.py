"""Running commands, in this process or as one that goes on, and their error lines."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from click.testing import CliRunner, Result

from stratocache.api.command_line import command_line


def run_alone(*arguments: str) -> Result:
    """Run a command without a daemon."""
    return CliRunner().invoke(command_line, arguments)


def error(result: Result, exit_code: int, code: str) -> str:
    """Check a command's error line and return it."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    line = result.stderr
    assert line.startswith("error: ")
    assert line.endswith(f" [{code}]\n")
    assert line.count("\n") == 1
    return line


@contextmanager
def piping(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command that goes on, into pipes, until the end of the block."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line that a command writes, without its end."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")
