"""CHAP secrets in the state database: only sealed, under a key beside it that the host keeps.

    STATE_DIR/secrets.key    32 bytes, mode 0600, made at the first start

A sealed secret is base-64 of a fresh nonce and AES-256-GCM's text and tag (NIST SP 800-38D), with
the attachment's id as associated data, so that none can be moved to another row. The key is not in
the database: a copy of `state.db` alone opens nothing.
"""

import base64
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stratocache.cache.errors import Internal

if TYPE_CHECKING:  # blocks are served before it is needed
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_KEY_BYTES = 32
_NONCE_BYTES = 12


class SecretBox:
    """Seals and opens secrets with the key in a file. Methods may run in any thread."""

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._cipher: AESGCM | None = None

    def make_key(self) -> bool:
        """Make the key, durably, where there is none of use; return whether it is a new one.

        What was sealed with another cannot be opened any more. Call it under a lock.
        """
        try:
            if len(self._key_file.read_bytes()) == _KEY_BYTES:
                return False
        except FileNotFoundError:
            pass
        partial = self._key_file.with_name(f"{self._key_file.name}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(os.urandom(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._key_file)
        directory = os.open(self._key_file.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._cipher = None
        return True

    def refresh(self) -> None:
        """Read the key anew at the next use, as another process may have made one since.

        A key that cannot be looked at now is believed to be the same.
        """
        with suppress(OSError):
            self._key_file.stat()
            self._cipher = None

    def seal(self, attachment_id: str, secret: str) -> str:
        """Return a secret as the database stores it; raises `OSError` without a key."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._load().encrypt(nonce, secret.encode(), attachment_id.encode())
        return base64.b64encode(nonce + sealed).decode()

    def open(self, attachment_id: str, sealed: str) -> str:
        """Return what was sealed for an attachment; raises `Internal` (`secret-unreadable`)."""
        from cryptography.exceptions import InvalidTag

        try:
            content = base64.b64decode(sealed, validate=True)
            nonce, text = content[:_NONCE_BYTES], content[_NONCE_BYTES:]
            return self._decrypt(nonce, text, attachment_id.encode()).decode()
        except (InvalidTag, ValueError, OSError) as error:
            raise Internal(
                "secret-unreadable",
                f"The secret of attachment {attachment_id} cannot be read with the key in "
                f"{self._key_file}; it gets a new one by itself, ask again in a moment.",
            ) from error

    def _decrypt(self, nonce: bytes, text: bytes, about: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        known = self._cipher is not None
        try:
            return self._load().decrypt(nonce, text, about)
        except InvalidTag:
            if not known:
                raise
            self._cipher = None  # another process may have made a new key since
            return self._load().decrypt(nonce, text, about)

    def _load(self) -> "AESGCM":
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if self._cipher is None:
            self._cipher = AESGCM(self._key_file.read_bytes())
        return self._cipher
