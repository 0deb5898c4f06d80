"""Checks of the host that the daemon is to run on, each with a way to mend what is wrong."""

from collections.abc import Callable
from dataclasses import dataclass

from stratocache.api import host_checks, service_checks, storage_checks
from stratocache.api.judgement import Judgement, Verdict, broken
from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import StratocacheError

_CHECKS: dict[str, Callable[[Configuration], Judgement]] = {
    "user": host_checks.judge_user,
    "fuse": host_checks.judge_fuse,
    "kernel": host_checks.judge_this_kernel,
    "tgtd": host_checks.judge_target,
    "qemu-img": host_checks.judge_qemu_img,
    "signatures": host_checks.judge_signatures,
    "state directory": storage_checks.judge_state_directory,
    "run directory": storage_checks.judge_run_directory,
    "reflink": storage_checks.judge_reflink,
    "space": storage_checks.judge_space,
    "cache": storage_checks.judge_cache,
    "clock": host_checks.judge_this_clock,
    "group": host_checks.judge_group,
    "portal": service_checks.judge_portal,
    "peers": service_checks.judge_peers,
    "network": service_checks.judge_network,
    "daemon": service_checks.judge_daemon,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What the check of a name found, and how to mend it (empty when all is well)."""

    name: str
    verdict: Verdict
    detail: str
    mend: str


def examine(configuration: Configuration) -> list[Finding]:
    """Run every check; one that itself breaks is a FAIL with the reason."""
    findings = []
    for name, check in _CHECKS.items():
        try:
            found = check(configuration)
        except StratocacheError as error:
            found = broken(error.message, "Do as the sentence says.")
        except OSError as error:
            found = broken(str(error), "Mend what the system names.")
        findings.append(Finding(name, found.verdict, found.detail, found.mend))
    return findings
