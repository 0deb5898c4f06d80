"""Running commands in this process, and their error lines."""

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
