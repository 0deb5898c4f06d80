"""Servers of one FUSE connection that die young: python -m support.fuse_deaths CONFIG_JSON FD COUNT

Each is forked with everything imported, takes up what its predecessor left unanswered, and is
killed a moment after it has begun to: its memory is untouched but for that.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import trio

from stratocache.cache.configuration import Configuration
from stratocache.fs.fuse_mount import FuseMount
from stratocache.fs.run_directory import RunDirectory
from support import fuse_child

_LIFE_MAX_S = 0.004


def _born(configuration: Configuration, descriptor: int) -> int:
    """Fork a server; return its process id once it serves."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            trio.run(fuse_child.serve, configuration, descriptor, writer, False)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read(1) == b"R"
    return pid


def main(config_json: Path, descriptor: int, count: int) -> None:
    """Let so many live and die, and a last one serve until the end of standard input."""
    configuration = Configuration.model_validate_json(config_json.read_bytes())
    directory = RunDirectory(configuration.run_dir)
    mount = FuseMount(directory.blocks, directory.init_request, descriptor)
    chance = random.Random(count)
    for number in range(count + 1):
        pid = _born(configuration, descriptor)
        if number == count:
            print("the last one lives", flush=True)
            sys.stdin.read()
        else:
            time.sleep(chance.uniform(0, _LIFE_MAX_S))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        mount.resend()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
