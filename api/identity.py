"""Who is at the other end of the Unix socket: the kernel's answer, never the client's.

`SO_PEERCRED` (unix(7)) gives the user and group that connected. Root and members of the
administrators' group may do everything; others are themselves.
"""

import os
import pwd
import socket
import struct
from typing import Any

from stratocache.api.problem import HttpProblem
from stratocache.fs.listener import group_id
from stratocache.fs.records import Caller

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


def caller_of(environ: dict[str, Any], administrators: str) -> Caller:
    """Return who sent the request; `administrators` names a Unix group, which need not exist.

    Raises `HttpProblem` 401 (`not-authenticated`) when the request did not come over a Unix socket.
    """
    connection = environ.get("gunicorn.socket")
    if connection is None or connection.family != socket.AF_UNIX:
        raise HttpProblem(
            401, "not-authenticated", "Use the Unix socket; this connection carries no identity."
        )
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _process, user, group = _CREDENTIALS.unpack(packed)
    try:
        account = pwd.getpwuid(user)
        name, groups = account.pw_name, os.getgrouplist(account.pw_name, account.pw_gid)
    except KeyError:
        name, groups = str(user), []
    administrator = user == 0 or group_id(administrators) in (group, *groups)
    return Caller(name, "admin" if administrator else "user")
