"""How workers share the files of tests."""

from pathlib import Path

from support.sharing import KERNEL_GUEST, Kind, choose, kind_of_file, unit_of_file

TESTS = Path(__file__).resolve().parents[1]


def test_a_file_is_what_its_markers_say() -> None:
    """Machines, long files and short ones are told apart; files that share a guest stay together."""
    kinds = {
        name: kind_of_file(TESTS / name)
        for name in ("vm/test_guest.py", "fs/test_pool.py", "cache/test_errors.py")
    }

    assert list(kinds.values()) == [Kind.MACHINE, Kind.LONG, Kind.SHORT]
    guests = {unit_of_file(TESTS / f"vm/test_{name}.py") for name in ("lio", "open_iscsi")}
    assert guests == {KERNEL_GUEST}
    assert unit_of_file(TESTS / "vm/test_guest.py") == str(TESTS / "vm/test_guest.py")


def test_one_machine_at_a_time_and_long_files_first() -> None:
    """While another worker emulates a machine, anything else goes before; in the end nothing waits."""
    kinds = {"a": Kind.SHORT, "b": Kind.LONG, "c": Kind.MACHINE, "d": Kind.MACHINE, "e": Kind.LONG}

    assert choose("abcde", kinds, []) == "c"
    assert choose("abcde", kinds, [Kind.LONG]) == "c"
    assert choose("abde", kinds, [Kind.MACHINE]) == "b"
    assert choose("ad", kinds, [Kind.SHORT, Kind.MACHINE]) == "a"
    assert choose("d", kinds, [Kind.MACHINE]) == "d"
