"""libiscsi's conformance suite (`iscsi-test-cu`), group by group, and what it says about a target."""

import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

Outcome = Literal["passed", "skipped", "failed", "hung"]

# The better ones first.
_RANK: tuple[Outcome, ...] = ("passed", "skipped", "failed", "hung")
_REPETITIONS = 5
_TEST = re.compile(r"^ +Test: (?P<name>\w+) \.\.\.", re.MULTILINE)


def groups() -> list[str]:
    """Return the names of all groups."""
    done = subprocess.run(["iscsi-test-cu", "-l"], check=True, capture_output=True, text=True)
    found = re.findall(r"^ALL\.(\w+)$", done.stdout, re.MULTILINE)
    assert len(found) > 40, done.stdout
    return found


def run_group(group: str, url: str, limit_s: float) -> dict[str, Outcome]:
    """Run one group, which writes to the disk; return the outcome of each of its tests.

    A test that has not ended after the limit hangs, and so do those behind it.
    """
    try:
        text = subprocess.run(
            ["iscsi-test-cu", "-d", "-v", "-t", f"ALL.{group}", url],
            check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s,
            stdin=subprocess.DEVNULL,
        ).stdout  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        text = expired.stdout or b""
    found = list(_TEST.finditer(shown := text.decode(errors="replace")))
    ends = [match.start() for match in found[1:]] + [len(shown)]
    return {
        match["name"]: _outcome(shown[match.end() : end])
        for match, end in zip(found, ends, strict=True)
    }


def _outcome(text: str) -> Outcome:
    """Judge by what a test printed; one that skipped a part counts as skipped."""
    if "FAILED" in text:
        return "failed"
    if not re.search(r"passed$", text, re.MULTILINE):
        return "hung"
    return "skipped" if "[SKIPPED]" in text else "passed"


def compare(
    chosen: Sequence[str], urls: Mapping[str, str], yardsticks: Mapping[str, str], limit_s: float
) -> list[str]:
    """Run groups against subjects, print the table, and return what is worse than its yardstick.

    `yardsticks` names for a subject the one that it is measured by. A group in which a subject looks
    worse is played again: some tests race with what the target does after its answer, so the worst of
    as many runs stands against the yardstick's worst.
    """
    width = max(map(len, chosen))
    print(f"{'passed/failed/skipped':{width}}" + "".join(f"{subject:>14}" for subject in urls))
    wrong = []
    for group in chosen:
        outcomes = {subject: run_group(group, url, limit_s) for subject, url in urls.items()}
        assert all(outcomes.values()), f"no test of {group} ran"
        print(f"{group:{width}}" + "".join(f"{summary(of):>14}" for of in outcomes.values()))
        for subject, yardstick in yardsticks.items():
            if found := worse(outcomes[subject], outcomes[yardstick]):
                print(f"{group}: {subject}: {'; '.join(found)}: again")
                ours, theirs = (_worst(group, urls[name], limit_s) for name in (subject, yardstick))
                wrong += [f"{subject}: {group}.{text}" for text in worse(ours, theirs)]
    return wrong


def _worst(group: str, url: str, limit_s: float) -> dict[str, Outcome]:
    """Return the worst outcome of each test of a group in several runs."""
    runs = [run_group(group, url, limit_s) for _repetition in range(_REPETITIONS)]
    found = {
        name: [run.get(name, "hung") for run in runs]
        for name in {name for run in runs for name in run}
    }
    for name, outcomes in sorted(found.items()):
        if len(set(outcomes)) > 1:
            print(f"{group}.{name}: {', '.join(outcomes)}")
    return {name: max(outcomes, key=_RANK.index) for name, outcomes in found.items()}


def worse(ours: Mapping[str, Outcome], yardstick: Mapping[str, Outcome]) -> list[str]:
    """Return the tests of which our outcome is worse than the yardstick's."""
    return [
        f"{name}: {ours.get(name, 'hung')} instead of {outcome}"
        for name, outcome in yardstick.items()
        if _RANK.index(ours.get(name, "hung")) > _RANK.index(outcome)
    ]


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Return `passed/failed/skipped` as numbers; those that hang count as failed."""
    counts = Counter(outcomes.values())
    return f"{counts['passed']}/{counts['failed'] + counts['hung']}/{counts['skipped']}"
