"""CHAP secrets in use: opened for targets, kept in files for QEMU, replaced when they are lost.

    RUN_DIR/secrets/ATTACHMENT    the secret alone, mode 0600, on tmpfs, as long as the row exists

When the key of the state database is lost these files still have the secrets, so that guests that
run notice nothing. After a reboot they are gone too: then a secret is replaced, and whoever is to
log in must be told the new one.
"""

import logging
import os
from collections.abc import Collection
from pathlib import Path

from stratocache.cache.errors import StratocacheError
from stratocache.fs.attachment_intents import new_secret
from stratocache.fs.records import Attachment
from stratocache.fs.state import Database, record_event

log = logging.getLogger(__name__)


class AttachmentSecrets:
    """The secrets of one host. Methods block."""

    def __init__(self, db: Database, run_dir: Path) -> None:
        self._db = db
        self._folder = run_dir / "secrets"

    def sweep(self, keep: Collection[str]) -> None:
        """Remove the files of attachments that do not exist; believe in no key of before."""
        self._db.secrets.refresh()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for name in set(os.listdir(self._folder)) - set(keep):
            self.forget(name)

    def forget(self, attachment_id: str) -> None:
        """Remove an attachment's file."""
        (self._folder / attachment_id).unlink(missing_ok=True)

    def hand_out(self, item: Attachment, *, again: bool) -> tuple[str, bool]:
        """Return an attachment's secret, and whether it is a new one; its file is written.

        A file that exists is believed to be right unless looked at `again`.
        """
        path = self._folder / item.id
        secret, replaced = self._open(item, path)
        if replaced or (again and _read(path) != secret) or not path.exists():
            partial = path.with_name(f".{path.name}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with os.fdopen(os.open(partial, flags, 0o600), "w") as file:
                file.write(secret)
            partial.rename(path)
        return secret, replaced

    def _open(self, item: Attachment, path: Path) -> tuple[str, bool]:
        try:
            return self._db.secrets.open(item.id, item.sealed_secret), False
        except StratocacheError as error:
            log.error("%s", error)
        kept = _read(path)
        secret = kept or new_secret()
        with self._db.transaction() as connection:
            connection.execute(
                "UPDATE attachments SET sealed_secret = seal(id, ?) WHERE id = ?", (secret, item.id)
            )
            if not kept:
                record_event(
                    connection, "attachment.secret-replaced", item.id,
                    f"The secret of {item.instance} could not be read any more and is another now; "
                    "ask for the attachment again before the next login.",
                )  # fmt: skip
        return secret, not kept


def _read(path: Path) -> str | None:
    try:
        return path.read_text() if path.stat().st_mode & 0o077 == 0 else None
    except (OSError, UnicodeDecodeError):
        return None
