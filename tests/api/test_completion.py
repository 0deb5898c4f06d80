"""Completion in the shells themselves."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import manual
import pytest
from click.testing import CliRunner
from support.api_daemon import ROOT, Api, insert_disk, insert_image, serving, standing_in
from support.command_line import error, run_alone
from support.lineage import add_snapshot
from support.terminal import on_terminal

from stratocache.api.command_line import command_line
from stratocache.api.completion import Known
from stratocache.cache.configuration import Configuration
from stratocache.fs import attachment_intents

pytestmark = pytest.mark.root  # callers are root, or are made from root


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which `stratocache` can be typed, and a home without any settings."""
    program = tmp_path / "bin" / "stratocache"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m stratocache "$@"\n')
    program.chmod(0o755)
    return {
        "HOME": str(tmp_path), "LANG": "C.UTF-8", "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }  # fmt: skip


def offered(configuration: Configuration, words: str) -> list[str]:
    """Return the values that are offered for the last of the words."""
    line = f"stratocache --run-dir {configuration.run_dir} {words}"
    result = CliRunner().invoke(
        command_line,
        [],
        env={
            "_STRATOCACHE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        },
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return [item.removeprefix("plain,") for item in result.stdout.split()]


def offered_at_last(configuration: Configuration, words: str, wanted: list[str]) -> None:
    """Check what is offered; a daemon on a busy machine may miss its moment a few times."""
    deadline = time.monotonic() + 60
    while offered(configuration, words) != wanted:
        assert time.monotonic() < deadline, offered(configuration, words)


def with_nothing_named() -> Iterator[list[str]]:
    """Yield a command line for every place of a name or id, with nothing there."""
    for page in manual.pages():
        arguments = [item for item in page.command.params if isinstance(item, click.Argument)]
        for parameter in page.command.params:
            if not isinstance(parameter.type, Known):
                continue
            if isinstance(parameter, click.Argument):
                yield [*page.words[1:], *["x"] * arguments.index(parameter), ""]
            else:
                yield [*page.words[1:], f"{parameter.opts[-1]}="]


@pytest.mark.parametrize("words", list(with_nothing_named()), ids=" ".join)
def test_nothing_is_not_taken_for_everything(words: list[str]) -> None:
    """A variable of a shell that is not set names nothing: wrong usage, never all there is."""
    assert ": It is empty; see " in error(run_alone(*words), 2, "usage")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_accepted(shell: str, environment: dict[str, str]) -> None:
    """Each shell finds nothing wrong with its script."""
    script = run_alone("completion", shell)
    assert script.exit_code == 0

    checked = subprocess.run(
        [shell, "-n"], input=script.stdout, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stderr) == (0, "")


def test_other_shells_are_refused() -> None:
    """A shell that is not known is wrong usage."""
    error(run_alone("completion", "tcsh"), 2, "usage")


@pytest.mark.parametrize(
    ("command", "setup"),
    [
        (["bash", "--norc", "-i"], 'source <(stratocache completion bash); PS1="ready> "\n'),
        (
            ["zsh", "-f", "-i"],
            (
                "autoload -U compinit; compinit -D; source <(stratocache completion zsh); "
                "PS1='ready> '\n"
            ),
        ),
    ],
)
def test_tab_completes_commands(
    command: list[str], setup: str, environment: dict[str, str]
) -> None:
    """Tab completes a group, its command, and shows the choices when there are several."""
    with on_terminal(command, environment) as terminal:
        terminal.type(setup)
        terminal.wait_for(lambda: any(line == "ready>" for line in terminal.lines))
        terminal.type("stratocache operation can\t")
        terminal.wait_for_text("ready> stratocache operation cancel")
        terminal.type("\x15stratocache image pi\t\t")
        terminal.wait_for_text("stratocache image pin")
        terminal.type("\x15stratocache disk snapshot\t\t")
        terminal.wait_for_text("snapshot-rm")
        assert "snapshots" in terminal.text


def test_fish_completes_commands(environment: dict[str, str]) -> None:
    """fish is offered commands and what they are."""
    script = 'stratocache completion fish | source; complete -C "stratocache oper"'
    shown = subprocess.run(
        ["fish", "--no-config", "-c", script], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip

    assert shown.stdout == "operation\tWork under way.\n"


def test_ids_are_those_of_the_daemon(configuration: Configuration, api: Api) -> None:
    """Disks, snapshots, holders, images and operations are offered by what is typed of them."""
    insert_image(api.db)
    first, second = (insert_disk(api.db, tag="$(reboot)") for _ in range(2))
    snapshot = add_snapshot(api.db, first)
    with serving(configuration), standing_in(api.db):
        attachment_intents.attach(api.db, ROOT, second, instance="vm-1")
        offered_at_last(configuration, "disk show ", [first, second])
        offered_at_last(configuration, f"disk rm {second[:20]}", [second])
        offered_at_last(configuration, f"disk rollback {first} ", [snapshot])
        offered_at_last(configuration, f"disk detach {second} --instance v", ["vm-1"])
        offered_at_last(configuration, "image pin G", ["GOaxJFdoEXvqAm9ArJgnZ0_ky6F"])
        offered_at_last(configuration, "launch G", ["GOaxJFdoEXvqAm9ArJgnZ0_ky6F"])
        operations = [row["id"] for row in api.db.rows("SELECT id FROM operations ORDER BY 1")]
        offered_at_last(configuration, f"operation show {operations[0]}", [operations[0]])


def test_names_that_a_shell_would_expand_are_not_offered(
    configuration: Configuration, api: Api
) -> None:
    """What the shell would expand is never handed to it."""
    insert_image(api.db, identifier="$(reboot)")
    insert_image(api.db)
    with serving(configuration):
        offered_at_last(configuration, "image pin ", ["GOaxJFdoEXvqAm9ArJgnZ0_ky6F"])


def test_without_a_daemon_nothing_is_offered(configuration: Configuration) -> None:
    """No daemon, an error of its or a configuration that is wrong: nothing, and no complaint."""
    assert offered(configuration, "disk show ") == []
    assert offered(configuration, "--config /nonexistent disk show ") == []


def test_a_daemon_that_hangs_is_not_waited_for(
    configuration: Configuration, measure: Callable[[], float]
) -> None:
    """A daemon that accepts and never answers costs a moment."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(configuration.api_socket))
        listener.listen()
        assert offered(configuration, "disk show ") == []

    assert measure() < 20  # the client itself would wait for 30 s


@pytest.fixture
def measure() -> Callable[[], float]:
    """Tells the seconds since the test began."""
    began = time.monotonic()
    return lambda: time.monotonic() - began
