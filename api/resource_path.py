"""Paths of what the API has, as its clients write them."""

from urllib.parse import quote


def path_of(*parts: str) -> str:
    """Return `/v1/PART/PART…`; each part is quoted, as people may type any character."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)
