"""Even spreads of numbers, and what a killed process leaves behind."""

from pathlib import Path

from ssld.shared.files import clear_leftovers, spread


def test_numbers_are_evenly_spread() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == spread(3, 3) == [0, 1, 2]
    assert spread(0, 5) == []
    assert spread(3, 8, repeat=True) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert spread(10, 4, repeat=True) == spread(10, 4)


def test_leftovers_are_files_with_the_number_of_a_process(tmp_path: Path) -> None:
    for name in (".train.json.123", ".train.json.old", "train.json.123", "train.json"):
        (tmp_path / name).write_text("")
    (tmp_path / ".x.12").mkdir()
    clear_leftovers(list(tmp_path.iterdir()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".train.json.old",
        ".x.12",
        "train.json",
        "train.json.123",
    ]
