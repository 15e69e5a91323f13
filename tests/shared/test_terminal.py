"""What is printed when nobody reads it any more."""

import subprocess
import sys

import pytest

from ssld.shared.terminal import say

pytestmark = pytest.mark.process

CODE = """
import signal, sys, time
from ssld.shared.terminal import say
say("first")
sys.stdin.readline()  # the reader is gone now
for number in range(3):
    say("line " + "x" * 100_000)
print("and what is held back at the end")
print("done", file=sys.stderr)
"""


def test_a_reader_that_has_gone_ends_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stderr.read() == "done\n"
    assert process.wait() == 0
    for pipe in (process.stdin, process.stderr):
        pipe.close()


def test_other_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            pass

    with pytest.raises(OSError, match="No space"):
        say("text", Full())  # type: ignore[arg-type]
