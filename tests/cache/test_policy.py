"""Site policy in the original INI form."""

from pathlib import Path

import pytest

from stratocache.cache import policy
from stratocache.cache.errors import Refused

FIXTURE = Path(__file__).resolve().parents[2] / "../shared/fixtures/marketplace/policy.cfg"
LISTED = "MMZu9WvwKIro-rtBQfDk4PsKO7_"
SHA1 = "c319bbd5afc0a22ba3eaed0507c39383ec28eeff"


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.cfg"
    path.write_text(text)
    return path


def verdict(
    rules: policy.Policy, email: str = "j@example.org", sha1: str = SHA1, identifier: str = LISTED
) -> str:
    try:
        rules.check(email=email, sha1=sha1, identifier=identifier)
    except Refused as error:
        return error.code
    return "accepted"


def test_genuine_file() -> None:
    """The published example parses to its lists, which decide."""
    rules = policy.load(FIXTURE)

    assert verdict(rules, "jane.tester@example.org") == "accepted"
    assert verdict(rules, "Konstantin.Skaburskas@cern.ch") == "accepted"
    assert verdict(rules, "hackers@example.org") == "policy-endorser"
    assert verdict(rules, "stranger@example.org") == "policy-endorser"
    assert verdict(rules, "jane.tester@example.org", identifier="A" * 27) == "policy-image"
    banned = "639ac4915da045efa809bd02b2609d9d3f932e85"
    assert verdict(rules, "jane.tester@example.org", sha1=banned) == "policy-checksum"


def test_no_file_applies_no_list() -> None:
    """Without a configured file everything passes."""
    assert verdict(policy.load(None)) == "accepted"


def test_empty_lists_disable_their_filters(tmp_path: Path) -> None:
    """An empty white list does not refuse everybody."""
    rules = policy.load(write(tmp_path, "[endorsers]\nwhitelistendorsers=\n\n[images]\n"))
    assert verdict(rules) == "accepted"


def test_blacklist_wins(tmp_path: Path) -> None:
    """Who is on both lists is refused."""
    text = f"[images]\nwhitelistimages=\n {LISTED}\nblacklistimages = {LISTED}\n"
    assert verdict(policy.load(write(tmp_path, text))) == "policy-image"


def test_normal_forms(tmp_path: Path) -> None:
    """Addresses and checksums ignore case and leading zeros, identifiers do not."""
    text = (
        "[endorsers]\nblacklistendorsers=\n Bad@Example.ORG\n"
        f"[checksums]\nblacklistchecksums=\n 000{SHA1.upper()}\n"
        f"[images]\nblacklistimages=\n {LISTED.lower()}\n"
    )
    rules = policy.load(write(tmp_path, text))

    assert verdict(rules, "bad@example.org", "0" * 40) == "policy-endorser"
    assert verdict(rules) == "policy-checksum"
    assert verdict(rules, sha1="0" * 40) == "accepted"


def test_percent_and_comments(tmp_path: Path) -> None:
    """Values are taken literally and comment lines are skipped."""
    text = "# site\n[endorsers]\nblacklistendorsers =\n # nobody else\n a%b@example.org\n"
    assert verdict(policy.load(write(tmp_path, text)), "a%b@example.org") == "policy-endorser"


@pytest.mark.parametrize(
    "text",
    [
        "[endorsers]\nwhitelistendorser=\n a@b.c\n",
        "[endorsers]\nwhitelistimages=\n x\n",
        "[whitelist-endorsers]\nemail=a@b.c\n",
        "[DEFAULT]\nwhitelistimages=x\n",
        "whitelistimages=x\n",
        "[images]\n[images]\n",
        "\x00\xff",
        "[images]\nwhitelistimages=" + "x" * 1024 * 1024,
    ],
)
def test_unusable_file(tmp_path: Path, text: str) -> None:
    """A file that cannot be understood wholly accepts nothing."""
    with pytest.raises(Refused) as caught:
        policy.load(write(tmp_path, text))
    assert caught.value.code == "policy-unreadable"


def test_missing_file(tmp_path: Path) -> None:
    """A configured file that is not there accepts nothing."""
    with pytest.raises(Refused) as caught:
        policy.load(tmp_path / "none.cfg")
    assert caught.value.code == "policy-unreadable"
    assert "none.cfg" in caught.value.message
