"""The listening sockets of the API and for peers, which the supervisor holds: a restart of who serves
them refuses nobody.

Clients that connect meanwhile wait in the socket's queue. Standard library only.
"""

import grp
import os
import socket
from pathlib import Path

_MODE = 0o660
_BACKLOG = 512


def listen(path: Path, group: str) -> socket.socket:
    """Return a listening Unix socket at `path`, mode 0660, of `group` when there is one.

    What a dead server left there is replaced. Raises `OSError`.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o777 & ~_MODE)  # no moment at which others may connect
    try:
        listener.bind(str(path))
        members = group_id(group)
        if members is not None:
            os.chown(path, -1, members)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener


def listens_at(descriptor: int, path: Path) -> bool:
    """Whether an inherited descriptor is a Unix socket that listens at a path which is there."""
    with socket.socket(fileno=os.dup(descriptor)) as found:
        return (
            found.family == socket.AF_UNIX
            and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            and found.getsockname() == os.fspath(path)
            and path.is_socket()
        )


def listen_tcp(address: str, port: int) -> socket.socket:
    """Return a listening TCP socket; `::` is all addresses, of both kinds. Raises `OSError`."""
    listener = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def listens_on(descriptor: int, address: str, port: int) -> bool:
    """Whether an inherited descriptor is a TCP socket that listens on an address and port."""
    with socket.socket(fileno=os.dup(descriptor)) as found:
        return (
            found.family == _family(address)
            and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            and found.getsockname()[:2] == (address, port)
        )


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def group_id(name: str) -> int | None:
    """Return the number of a Unix group, or None when there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
