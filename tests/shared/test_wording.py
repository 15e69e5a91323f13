import pytest

from ssld.shared.wording import amount, count, duration, printable, some


def test_numbers_and_their_nouns() -> None:
    assert [count(n, "picture") for n in (0, 1, 2, 1234)] == ["0 pictures", "1 picture", "2 pictures", "1,234 pictures"]
    assert [count(2, noun) for noun in ("box", "class", "image")] == ["2 boxes", "2 classes", "2 images"]
    assert count(2, "box outside its image", "boxes outside their image") == "2 boxes outside their image"


def test_lists_and_bytes() -> None:
    assert some([4, "a", 9]) == "4, a, 9"
    assert some("abcd") == "a, b, c, ..."
    assert [amount(size) for size in (0, 2_340, 1_000_000, 5_210_000_000)] == ["0.0 kB", "2.3 kB", "1.0 MB", "5.2 GB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0123, "0.012 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (5940, "99 min"),
        (12000, "3 h 20 min"),
        (86400 * 2.5, "2.5 days"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cell é 細胞 – x", "cell é 細胞 – x"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b1m\x7f\x00", "\\x9b1m\\x7f\\x00"),
        ("\u202egpj.exe\u2066\u200b", "\\u202egpj.exe\\u2066\\u200b"),
        ("\udcff\u2028", "\\udcff\\u2028"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    expected.encode()
    assert printable(text, keep=text) == text
