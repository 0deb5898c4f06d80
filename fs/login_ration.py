"""How often passwords may be wrong: per name and per address, whichever worker is asked."""

import ipaddress
import time

from stratocache.fs.state import Database

WINDOW_S = 300.0
WRONG_PER_NAME = 20
WRONG_PER_ADDRESS = 40
_KEY_CHARACTERS_MAX = 80


def reserve_attempt(db: Database, name: str, address: str) -> float:
    """Count an attempt as wrong before it is judged, so that many at once get no further.

    Returns 0, or the seconds after which another may be made; then nothing was counted.
    """
    now_s = time.time()
    limits = {_name_key(name): WRONG_PER_NAME, _address_key(address): WRONG_PER_ADDRESS}
    wait_s = _wait_s(db, limits, now_s)  # a flood of attempts is not to write each time
    if wait_s > 0:
        return wait_s
    with db.transaction() as connection:
        wait_s = _wait_s(db, limits, now_s)
        if wait_s == 0:
            connection.execute("DELETE FROM login_failures WHERE at <= ?", (now_s - WINDOW_S,))
            connection.executemany(
                "INSERT INTO login_failures (key, at) VALUES (?, ?)",
                [(key, now_s) for key in limits],
            )
    return wait_s


def forgive(db: Database, name: str, address: str) -> None:
    """Take back what was counted of a name, and one attempt of the address: it was right."""
    with db.transaction() as connection:
        connection.execute("DELETE FROM login_failures WHERE key = ?", (_name_key(name),))
        connection.execute(
            "DELETE FROM login_failures WHERE rowid = "
            "(SELECT max(rowid) FROM login_failures WHERE key = ?)",
            (_address_key(address),),
        )


def _wait_s(db: Database, limits: dict[str, int], now_s: float) -> float:
    """Return after how many seconds every key has an attempt left."""
    wait_s = 0.0
    for key, most in limits.items():
        row = db.row(
            "SELECT at FROM login_failures WHERE key = ? AND at > ? ORDER BY at DESC "
            "LIMIT 1 OFFSET ?",
            key,
            now_s - WINDOW_S,
            most - 1,
        )
        if row is not None:
            wait_s = max(wait_s, row["at"] + WINDOW_S - now_s)
    return wait_s


def _name_key(name: str) -> str:
    return f"name:{name}"[:_KEY_CHARACTERS_MAX]


def _address_key(address: str) -> str:
    """Return what attempts from an address are counted under: of IPv6, the network of a household."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return f"address:{address}"[:_KEY_CHARACTERS_MAX]
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
    if isinstance(found, ipaddress.IPv6Address):
        return f"address:{ipaddress.ip_network((found, 64), strict=False)}"
    return f"address:{found}"
