"""The `stratocache` command: its groups, its global options, and errors as exit statuses.

Exit statuses: 0 done, 1 failed otherwise, 2 usage, 3 not found, 4 conflict, 5 refused by policy,
6 not verified, 7 no space, 10 daemon not reachable. Each command's module is imported when it is
used, so that a short command starts quickly.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import click

from stratocache import __version__
from stratocache.api.completion import REMOTE
from stratocache.api.examples import examples
from stratocache.api.session import Session, json_option
from stratocache.cache.errors import Cancelled, Internal, InvalidInput, StratocacheError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_COMMANDS = {
    "serve": ("stratocache.api.serve_command", "Run the daemon."),
    "upgrade": ("stratocache.api.upgrade_command", "Let the daemon go on with this code."),
    "doctor": ("stratocache.api.doctor_command", "Check this host and say how to mend it."),
    "overview": ("stratocache.api.overview_command", "How things are, on one page."),
    "launch": ("stratocache.api.launch_commands", "Prepare a reference's disks for a VM."),
    "halt": ("stratocache.api.launch_commands", "End a launch: detach everything."),
    "lease": ("stratocache.api.launch_commands", "Let an instance have its disks for longer."),
    "instance": ("stratocache.api.instance_commands", "What was launched."),
    "attachment": ("stratocache.api.instance_commands", "Who uses which disk."),
    "image": ("stratocache.api.image_commands", "Cached images."),
    "disk": ("stratocache.api.disk_commands", "Persistent disks."),
    "cache": ("stratocache.api.cache_commands", "Space, and what holds it."),
    "pool": ("stratocache.api.pool_commands", "An XFS file as state directory."),
    "peers": ("stratocache.api.peer_commands", "Hosts that give each other images."),
    "operation": ("stratocache.api.operation_commands", "Work under way."),
    "marketplace": ("stratocache.api.marketplace_commands", "Publish and check metadata."),
    "account": ("stratocache.api.account_commands", "Who may come, and what they did."),
    "event": ("stratocache.api.event_commands", "What happened, and what happens."),
    "remote": ("stratocache.api.remote_commands", "Daemons of other hosts."),
    "completion": ("stratocache.api.completion_command", "Let a shell complete commands and ids."),
}
_ALIASES = {"status": "overview"}
"""Names that people type first; not listed."""
_EXIT_STATUSES = (
    "Exit status: 0 done, 1 failed otherwise, 2 usage, 3 not found, 4 conflict, 5 refused by "
    "policy, 6 not verified, 7 no space, 10 daemon not reachable."
)


class CommandLine(click.Group):
    """Loads commands when they are used, and turns every error into a line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the documentation."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module and return the command."""
        cmd_name = _ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name][0])
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_module, text) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem[str]]":
        """Offer the commands without importing them, and the options."""
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=text)
            for name, (_module, text) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Never:
        """Run, then exit with the status that the error, if any, stands for."""
        arguments = list(sys.argv[1:] if args is None else args)
        session = Session()
        try:
            outcome = super().main(
                arguments, prog_name or "stratocache", complete_var, standalone_mode=False,
                obj=session, **extra,
            )  # fmt: skip
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except (
            StratocacheError,
            click.ClickException,
            click.Abort,
            KeyboardInterrupt,
            OSError,
        ) as error:
            session.as_json = session.as_json or "--json" in arguments
            shown = _as_our_error(error)
            session.show_error(shown)
            sys.exit(shown.exit_status)
        sys.exit(outcome if isinstance(outcome, int) else 0)


def _as_our_error(error: BaseException) -> StratocacheError:
    if isinstance(error, StratocacheError):
        return error
    if isinstance(error, click.UsageError):
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx is not None else ""
        return InvalidInput("usage", error.format_message().rstrip(".") + hint + ".")
    if isinstance(error, click.ClickException):
        return Internal("failed", error.format_message())
    if isinstance(error, OSError):
        return Internal("system-error", f"{error}.")
    return Cancelled("interrupted", "Interrupted.")


@click.group(
    "stratocache",
    cls=CommandLine,
    epilog=examples(
        "stratocache launch REFERENCE --instance vm1 --size 20G --print qemu",
        "stratocache disk ls --watch",
        "stratocache --remote node3 image ls --json",
    )
    + "\n\n"
    + _EXIT_STATUSES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="stratocache")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="Configuration file (TOML)."
)
@click.option("--state-dir", type=click.Path(path_type=Path), help="Directory of the state.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Directory of the sockets.")
@click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), help="Socket of the daemon's API."
)
@click.option(
    "--remote", type=REMOTE, metavar="NAME",
    help="Ask this host of `remote ls`; local is this host.",
)  # fmt: skip
@click.option("--url", help="Ask the daemon there, such as https://node3.example.org:8443.")
@json_option
@click.pass_obj
def command_line(session: Session, /, **options: Any) -> None:
    """Host-local cache of VM images, and persistent disks over iSCSI."""
    others = [name for name in ("remote", "url", "socket_path") if options[name] is not None]
    if len(others) > 1:
        raise click.UsageError("Give one of --remote, --url and --socket.")
    session.choose(**options)


def main() -> Never:
    """Run the command line."""
    command_line.main()
    raise AssertionError("command_line.main exits")


if __name__ == "__main__":
    main()
