"""Operations whose subject is what they want already, or is not there any more.

Rows and their operations change together, so there should be none; a database that was restored or
edited may have some, and whoever waits for them would wait for ever.
"""

from stratocache.cache.errors import Cancelled
from stratocache.fs import records
from stratocache.fs.operation_ends import fail, finish
from stratocache.fs.state import Database

_OPEN = "SELECT * FROM operations WHERE state IN ('pending', 'running')"
_DONE = f"""
    {_OPEN} AND (
        kind = 'detach' AND subject NOT IN (SELECT id FROM attachments)
        OR kind = 'halt' AND subject NOT IN (SELECT instance FROM launches)
        OR kind IN ('attach', 'migrate')
            AND subject IN (SELECT id FROM attachments WHERE state = 'ready')
        OR kind = 'launch' AND id IN (SELECT operation_id FROM launches WHERE state = 'active'))
"""  # nosec B608 # no value in it
_GONE = f"""
    {_OPEN} AND (
        kind IN ('attach', 'migrate') AND subject NOT IN (SELECT id FROM attachments)
        OR kind = 'launch' AND id NOT IN (SELECT operation_id FROM launches))
"""  # nosec B608 # no value in it


def end_orphans(db: Database) -> None:
    """End such operations, in one transaction. Blocks."""
    if db.row(_DONE) is None and db.row(_GONE) is None:
        return
    with db.transaction() as connection:
        for row in db.rows(_DONE):
            operation = records.operation_from(row)
            finish(connection, operation.kind, operation.subject, {}, operation.id)
        for row in db.rows(_GONE):
            operation = records.operation_from(row)
            gone = Cancelled("subject-gone", f"{operation.subject} is not there any more.")
            fail(connection, operation.kind, operation.subject, gone, operation.id)
