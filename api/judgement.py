"""What a check of the host says: a verdict, what was found, and how to mend it."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended; only FAIL keeps the daemon from working."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one check found, and how to mend it (empty when all is well)."""

    verdict: Verdict
    detail: str
    mend: str = ""


def fine(detail: str) -> Judgement:
    """Judge that all is well."""
    return Judgement(Verdict.OK, detail)


def doubtful(detail: str, mend: str) -> Judgement:
    """Judge that something could be better."""
    return Judgement(Verdict.WARN, detail, mend)


def broken(detail: str, mend: str) -> Judgement:
    """Judge that the daemon cannot work."""
    return Judgement(Verdict.FAIL, detail, mend)
