"""Pokes: many are one, none is lost, nobody listening is fine."""

import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from stratocache.fs.poke import PokeListener, poke


def test_poke_without_a_listener_is_not_an_error(tmp_path: Path) -> None:
    """Neither a missing socket nor one that a dead process left makes a poke fail."""
    path = tmp_path / "poke.sock"
    poke(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(path))

    poke(path)

    assert path.exists()


def test_pokes_before_the_wait_are_one(tmp_path: Path) -> None:
    """However many pokes came before, the next wait returns at once and the one after waits."""

    async def scenario() -> bool:
        with PokeListener(tmp_path / "poke.sock") as listener:
            for _ in range(500):
                poke(listener.path)
            await listener.wait()
            with trio.move_on_after(0.1) as scope:
                await listener.wait()
            return scope.cancelled_caught

    assert trio.run(scenario)


def test_a_waiting_listener_is_woken(tmp_path: Path) -> None:
    """A poke from elsewhere ends the wait."""

    async def scenario() -> None:
        with PokeListener(tmp_path / "poke.sock") as listener, trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.wait)
                await trio.testing.wait_all_tasks_blocked()
                await trio.to_thread.run_sync(poke, listener.path)

    trio.run(scenario)


def test_a_new_listener_replaces_a_dead_one(tmp_path: Path) -> None:
    """A socket that a killed listener left does not stop the next; closing removes the socket."""
    path = tmp_path / "poke.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(path))

    with PokeListener(path) as listener:
        poke(path)
        trio.run(listener.wait)

    assert not path.exists()


def test_a_socket_path_that_cannot_be_bound_leaves_nothing_open(tmp_path: Path) -> None:
    """A folder that is missing is an error at once, and no descriptor leaks."""
    with pytest.raises(FileNotFoundError):
        PokeListener(tmp_path / "missing" / "poke.sock")
