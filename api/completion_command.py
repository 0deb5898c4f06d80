"""`stratocache completion`: the script that lets a shell complete commands, options and ids."""

import click

from stratocache.api.examples import examples

_VARIABLE = "_STRATOCACHE_COMPLETE"
"""By which click is asked for completions."""


@click.command(
    epilog=examples(
        "stratocache completion bash > /etc/bash_completion.d/stratocache",
        'stratocache completion zsh > "${fpath[1]}/_stratocache"',
        "stratocache completion fish > ~/.config/fish/completions/stratocache.fish",
        'eval "$(stratocache completion bash)"     # in this shell only',
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Write the script with which SHELL completes commands, options, and ids.

    Ids are those that the daemon has: it is asked, and given a moment to answer.
    """
    from click.shell_completion import get_completion_class

    written_by = get_completion_class(shell)
    assert written_by is not None, "one of the shells that click knows"
    command = context.find_root().command
    click.echo(written_by(command, {}, "stratocache", _VARIABLE).source(), nl=False)
