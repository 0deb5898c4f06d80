"""Who is at the other end of a socket."""

import os
import socket
import struct

import pytest
from support.api_daemon import caller_socket

from stratocache.api.identity import caller_of
from stratocache.api.problem import HttpProblem
from stratocache.fs.listener import group_id
from stratocache.fs.records import Caller

pytestmark = pytest.mark.root  # callers are root, or are made from root


def test_root_is_administrator() -> None:
    """User 0 may do everything, whether the group exists or not."""
    with caller_socket(0) as connection:
        caller = caller_of({"gunicorn.socket": connection}, "no-such-group")

    assert caller == Caller("root", "admin")


def test_ordinary_user_is_known_by_name() -> None:
    """Another user has the name that the system gives and may not do everything."""
    with caller_socket(65534) as connection:
        caller = caller_of({"gunicorn.socket": connection}, "no-such-group")

    assert caller == Caller("nobody", "user")


def test_member_of_the_group_is_administrator() -> None:
    """Whoever belongs to the configured group, by the group database, is an administrator."""
    with caller_socket(65534) as connection:
        caller = caller_of({"gunicorn.socket": connection}, "nogroup")

    assert caller == Caller("nobody", "admin")


def test_user_without_a_name_is_known_by_number() -> None:
    """A user that the system does not know is named by their number."""
    with caller_socket(54321) as connection:
        caller = caller_of({"gunicorn.socket": connection}, "no-such-group")

    assert caller == Caller("54321", "user")


def test_other_connections_carry_no_identity() -> None:
    """Neither a TCP connection nor none at all tells who is there."""
    with socket.socket(socket.AF_INET) as connection:
        for environ in ({}, {"gunicorn.socket": connection}):
            with pytest.raises(HttpProblem) as caught:
                caller_of(environ, "no-such-group")

            assert caught.value.status_code == 401


def test_peer_credentials_are_those_of_the_connecting_process() -> None:
    """The structure read is the kernel's own: pid, user and group of the peer."""
    with caller_socket(0) as connection:
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)

    assert struct.unpack("iII", packed) == (os.getpid(), 0, os.getgid())


def test_group_numbers() -> None:
    """A group has a number, or there is no such group."""
    assert group_id("root") == 0
    assert group_id("no-such-group") is None
