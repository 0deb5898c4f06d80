"""`stratocache doctor`: the host's checks as a table."""

from dataclasses import asdict

import click

from stratocache.api.examples import examples
from stratocache.api.session import Session, json_option


@click.command(
    epilog=examples(
        "stratocache doctor",
        "stratocache doctor --json",
    )
)
@json_option
@click.pass_context
def doctor(context: click.Context) -> None:
    """Check this host and say how to mend it; exits 1 when something fails."""
    from stratocache.api.doctor import examine
    from stratocache.api.judgement import Verdict

    session = context.ensure_object(Session)
    findings = examine(session.configuration)
    session.show_table(
        "checks",
        [asdict(finding) for finding in findings],
        {
            "CHECK": "name",
            "VERDICT": lambda item: item["verdict"].value,
            "FOUND": "detail",
            "TO MEND": lambda item: item["mend"] or None,
        },
    )
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        context.exit(1)
