"""Damage to sound files, each a function of a seed: bits, cuts, numbers, kinds of values, nesting, paths, odd characters."""

import json
import random
from collections.abc import Callable
from typing import Any

# Text that means something to a path, a terminal, a parser or a template somewhere.
ODD_TEXT = (
    *("../x", "../../../../etc/passwd", "/etc/passwd", "~/x", "a\0b", "C:\\x", "", ".", "..", "-", "x" * 5000),
    *("\x1b[2J", "a\nb", "a\r\nb", "\u202etxt", "\ufeff", "\ud800", "${HOME}", "{{ 7*7 }}", "%s%n", "<!--", "é" * 40),
    *("null", "true", "nan", "inf", "1e999", "0x10", "1_000", "hub:x/y", "http://0.0.0.0/x", "file:///etc/passwd"),
)
ODD_NUMBERS = (0, -1, 1, 0.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, True, False)
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))


def odd_value(draw: random.Random) -> Any:
    """A value of any kind, seldom the one that is expected."""
    kind = draw.randrange(7)
    if kind == 0:
        return draw.choice(ODD_NUMBERS + NO_NUMBERS)
    if kind == 1:
        return draw.choice(ODD_TEXT)
    if kind == 2:
        return None
    if kind == 3:
        return [odd_value(draw) for _ in range(draw.randrange(4))]
    if kind == 4:
        return {
            draw.choice(("id", "name", "x", draw.choice(ODD_TEXT))): odd_value(draw) for _ in range(draw.randrange(3))
        }
    if kind == 5:
        return draw.randrange(-3, 10)
    deep: Any = 1
    for _ in range(draw.choice((3, 40, 600))):
        deep = [deep] if draw.random() < 0.9 else {"a": deep}
    return deep


def mutated_value(value: Any, draw: random.Random) -> Any:
    """A value like JSON's with one change at one place: another value, a key or row gone, twice, renamed, or moved."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.12:
        if isinstance(value, int | float) and draw.random() < 0.4:
            return draw.choice((-value, value * 10**9, -1, 0.5, str(value), [value]))
        return odd_value(draw)
    if isinstance(value, list):
        rows, place = list(value), draw.randrange(len(value))
        kind = draw.randrange(8)
        if kind == 0:
            del rows[place]
        elif kind == 1:
            rows.append(rows[place])
        elif kind == 2:
            draw.shuffle(rows)
        else:
            rows[place] = mutated_value(rows[place], draw)
        return rows
    key = draw.choice(list(value))
    changed = dict(value)
    kind = draw.randrange(9)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        changed[draw.choice(ODD_TEXT)] = changed.pop(key)
    elif kind == 2:
        changed[key], other = changed[draw.choice(list(changed))], changed[key]
        changed[draw.choice(list(changed))] = other
    else:
        changed[key] = mutated_value(changed[key], draw)
    return changed


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some flipped, cut off, repeated, put in or zeroed."""
    mutated = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        place = draw.randrange(len(mutated) + 1)
        kind = draw.randrange(7)
        if kind == 0:
            del mutated[place:]
        elif kind == 1:
            mutated[place:place] = mutated[place : place + draw.randrange(64)]
        elif kind == 2:
            mutated[place:place] = draw.choice((b"\0" * 8, b"\xff" * 8, b"[" * 300, b"(" * 300, draw.randbytes(6)))
        elif kind == 3:
            del mutated[place : place + draw.randrange(1, 16)]
        elif kind == 4:
            mutated[place : place + 8] = draw.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)).to_bytes(8, "little")
        elif mutated:
            mutated[place % len(mutated)] ^= 1 << draw.randrange(8)
    return bytes(mutated)


def mutated_text(text: str, draw: random.Random) -> bytes:
    """Text with a word, a line or bytes changed."""
    kind = draw.randrange(6)
    if kind == 0:
        return mutated_bytes(text.encode(), draw)
    lines = text.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    if kind == 1:
        del lines[place]
    elif kind == 2:
        lines.insert(draw.randrange(len(lines) + 1), lines[place])
    else:
        words = lines[place].split(" ")
        words[draw.randrange(len(words))] = str(
            draw.choice(ODD_TEXT + ODD_NUMBERS[:-3] + NO_NUMBERS + ("[" * 200, "<a>" * 200))
        )
        lines[place] = " ".join(words) + ("\n" if draw.random() < 0.7 else "")
    return "".join(lines).encode("utf-8", "surrogatepass")


def as_json(content: Any) -> Callable[[random.Random], bytes]:
    """Mutations of a JSON file: mostly of its values, now and then of its bytes."""
    sound = json.dumps(content).encode()

    def mutate(draw: random.Random) -> bytes:
        if draw.random() < 0.2:
            return mutated_bytes(sound, draw)
        changed = content
        for _ in range(draw.choice((1, 1, 2, 3))):
            changed = mutated_value(changed, draw)
        return json.dumps(changed).encode()

    return mutate


def mutated_parquet(content: bytes, draw: random.Random) -> bytes:
    """A Parquet file cut off, or with damage to its pages.

    The footer stays as it is: some damage to it ends the process inside Arrow (24.0), where nothing of ours could catch it.
    """
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    pages = bytearray(content[:footer])
    for _ in range(draw.choice((1, 2, 8))):
        place = draw.randrange(4, footer)
        pages[place] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            pages[place : place + 8] = draw.choice((b"\0", b"\xff", b"\x80")) * 8
    return bytes(pages[:footer]) + content[footer:]
