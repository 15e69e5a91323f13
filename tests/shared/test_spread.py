"""Even spreads of row numbers."""

from ssld.shared.files import spread


def test_numbers_are_evenly_spread() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == spread(3, 3) == [0, 1, 2]
    assert spread(0, 5) == []
    assert spread(3, 8, repeat=True) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert spread(10, 4, repeat=True) == spread(10, 4)
