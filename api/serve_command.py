"""`stratocache serve`: checks the configuration, writes it down, and becomes the supervisor."""

import os
import sys

import click

from stratocache.api.durable_file import write_durably
from stratocache.api.examples import examples
from stratocache.api.session import Session
from stratocache.cache.errors import InvalidInput


@click.command(
    epilog=examples(
        "stratocache serve",
        "stratocache serve --set iscsi.port=3261",
    )
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Override a configuration key, such as iscsi.port=3261; may be repeated.",
)  # fmt: skip
@click.pass_obj
def serve(session: Session, settings: tuple[str, ...]) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C."""
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise click.UsageError(f"--set takes KEY=VALUE, not {setting[:80]!r}.")
        session.flags[key] = value
    session.ignores_default = True
    configuration = session.configuration.model_copy(
        update={
            "state_dir": session.configuration.state_dir.absolute(),
            "run_dir": session.configuration.run_dir.absolute(),
        }
    )
    path = configuration.run_dir / "configuration.json"
    try:
        configuration.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        configuration.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_durably(path, configuration.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise InvalidInput(
            "directory-unusable", f"{error}; choose other directories, or run as root."
        ) from None
    command = [
        sys.executable, "-m", "stratocache.fs.supervisor",
        "--run-dir", str(configuration.run_dir),
        "--state-dir", str(configuration.state_dir),
        "--config-json", str(path),
    ]  # fmt: skip
    sys.stdout.flush()
    os.execv(sys.executable, command)  # the supervisor has no need of what was imported here
