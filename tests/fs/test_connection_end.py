"""The end of the FUSE connection when its holders are killed: never before the end of tgtd."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.appliance import free_port
from support.supervised import Supervised, wait_for_end

from stratocache.fs.holder import Holder
from stratocache.fs.privileges import Privileges
from stratocache.fs.processes import Child

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "6"))
SEED = int(os.environ.get("CRASH_SEED", str(random.SystemRandom().randrange(2**32))))
THREADS = 8
START_TIMEOUT_S = 30

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(60 + 20 * ROUNDS)]

# Runs in the place of tgtd and tells at once of every error that tgtd would report to its guests.
PROBE = r"""
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int report;

static void *work(void *argument)
{
    static _Thread_local char block[65536], line[64];
    long offset = (long)argument * sizeof block, done = 0;
    int file;

    while ((file = open(getenv("PROBE_FILE"), O_RDWR)) < 0)
        usleep(1000);
    for (;;) {
        if ((done % 2 ? pread : (ssize_t (*)(int, void *, size_t, off_t))pwrite)(
                file, block, sizeof block, offset) != sizeof block) {
            write(report, line, snprintf(line, sizeof line, "error %d\n", errno));
            pause();
        }
        if (++done == 4)
            write(report, "works\n", 6);
    }
}

int main(void)
{
    pthread_t thread;

    report = open(getenv("PROBE_REPORT"), O_WRONLY | O_APPEND);
    for (long number = 0; number < THREADS; number++)
        pthread_create(&thread, NULL, work, (void *)number);
    pause();
}
"""


def test_tgtd_never_sees_the_end_of_the_connection(tmp_path: Path) -> None:
    """Whoever holds the connection is killed, in any order: tgtd's reads and writes wait, and it
    dies with the supervisor before it could report an error; the next start goes on."""
    print(f"CRASH_SEED={SEED} CRASH_ROUNDS={ROUNDS}")
    chance = random.Random(SEED)
    report = tmp_path / "report"
    folder = tmp_path / "programs"
    folder.mkdir()
    subprocess.run(
        ["gcc", "-O2", "-pthread", f"-DTHREADS={THREADS}", "-x", "c", "-o", folder / "tgtd", "-"],
        input=PROBE, check=True, text=True, capture_output=True,
    )  # fmt: skip
    supervised = Supervised(tmp_path)
    supervised.environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PROBE_FILE": str(supervised.disk),
        "PROBE_REPORT": str(report),
    }
    try:
        for number in range(ROUNDS):
            report.write_text("")
            supervised.begin()
            _wait_until_all_work(supervised, report)
            assert supervised.process is not None
            holders = [supervised.child("blockd"), supervised.process.pid]
            probe = supervised.child("tgtd")
            if number % 3 == 2:
                holders.remove(chance.choice(holders[:1]))
            for pid in chance.sample(holders, len(holders)):
                os.kill(pid, signal.SIGKILL)
            supervised.wait()
            supervised.begin()
            wait_for_end(probe)
            assert "error" not in report.read_text(), f"round {number}"
            assert "Traceback" not in supervised.log.read_text(), supervised.tail()
            assert supervised.process is not None
            supervised.process.kill()
            supervised.wait()
    finally:
        supervised.__exit__(None, None, None)


def _wait_until_all_work(supervised: Supervised, report: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while report.read_text().count("works") < THREADS:
        assert time.monotonic() < deadline, supervised.tail()
        time.sleep(0.01)


def test_confined_holder_kills_what_it_was_given(tmp_path: Path) -> None:
    """With the rights that it has in an appliance, the holder kills tgtd when its supervisor ends."""
    rights = Privileges(tmp_path, tmp_path, free_port(), ())
    child = Child("holder", tmp_path / "log")
    holder = Holder(child, rights.of_holder())
    with subprocess.Popen(["sleep", "600"]) as tgtd, open(os.devnull) as connection:
        pidfd = os.pidfd_open(tgtd.pid)
        try:
            holder.start()
            holder.hold(connection.fileno(), pidfd)
            holder.forget()
            assert child.wait(START_TIMEOUT_S)
            assert child.collect() == 0, (tmp_path / "log").read_text()
            assert tgtd.wait(START_TIMEOUT_S) == -signal.SIGKILL
        finally:
            os.close(pidfd)
            tgtd.kill()
