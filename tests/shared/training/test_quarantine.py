"""Unreadable images are listed; more than one and more than 1 % of what was read ends the run."""

from pathlib import Path

import pytest

from ssld.shared.config.settings import CommandConfig
from ssld.shared.errors import UserError
from ssld.shared.run_dir import RunDir
from ssld.shared.training.quarantine import Quarantine


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(CommandConfig(output=tmp_path / "run"), "test")


def test_listed_once_and_sorted(run: RunDir) -> None:
    quarantine = Quarantine(run, images=10_000)
    quarantine.add(["b.jpg", "a.jpg"])
    quarantine.judge(100)
    quarantine.add(["b.jpg", "c.jpg"])
    quarantine.judge(200)
    assert (run.path / "quarantine.txt").read_text() == "a.jpg\nb.jpg\nc.jpg\n"
    assert "3 unreadable images, see" in (run.path / "log.txt").read_text()


def test_the_reason_of_one_is_said(run: RunDir, tmp_path: Path) -> None:
    """Of a file by itself; of an image in a packed file, and of one that can be read by now, only the location."""
    quarantine = Quarantine(run, images=2)
    quarantine.add([str(tmp_path / "b.jpg"), f"{tmp_path}/a.tar/b.jpg"])
    (tmp_path / "b.jpg").write_bytes(b"")
    quarantine.write()
    assert f"last: {tmp_path}/b.jpg: the file is empty\n" in (run.path / "log.txt").read_text()
    with pytest.raises(UserError, match=rf"\(first: {tmp_path}/a.tar/b.jpg\)$"):
        quarantine.judge(2)


def test_none_writes_nothing(run: RunDir) -> None:
    Quarantine(run, images=10).judge(10)
    assert not (run.path / "quarantine.txt").exists()


@pytest.mark.parametrize(
    ("bad", "images", "read_so_far", "fails"),
    [
        (1, 10, 10, False),  # a single one never ends a run
        (2, 10, 10, True),
        (2, 10, 9, False),  # not before a whole pass
        (2, 10, 1000, True),
        (20, 2000, 2000, False),  # 1 % is allowed
        (21, 2000, 2000, True),
        (21, 2000, 90_000, True),  # distinct files: later passes do not thin them out
        (10, 100_000, 1000, False),
        (11, 100_000, 1000, True),
        (900, 100_000, 999, False),  # not before 1,000 files
    ],
)
def test_threshold(run: RunDir, bad: int, images: int, read_so_far: int, fails: bool) -> None:
    quarantine = Quarantine(run, images=images)
    quarantine.add([f"{number:04d}.jpg" for number in range(bad)])
    if not fails:
        quarantine.judge(read_so_far)
        return
    with pytest.raises(UserError, match=f"{bad} of {min(read_so_far, images)} images cannot be read") as caught:
        quarantine.judge(read_so_far)
    assert "(first: 0000.jpg)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len((run.path / "quarantine.txt").read_text().splitlines()) == bad


def test_a_resumed_run_remembers(run: RunDir) -> None:
    first = Quarantine(run, images=100)
    first.add(["a.jpg"])
    first.judge(8)
    second = Quarantine(run, images=100)
    second.add(["b.jpg"])
    with pytest.raises(UserError, match="2 of 100"):
        second.judge(100)


def test_a_name_with_a_line_break_is_one_image(run: RunDir) -> None:
    """In the list as well, from which a resumed run counts."""
    name = "a\nb\u2028.jpg"
    first = Quarantine(run, images=100)
    first.add([name, "c\udcff.jpg"])
    first.write()
    assert (run.path / "quarantine.txt").read_bytes() == b"a\\nb\\u2028.jpg\nc\xff.jpg\n"
    second = Quarantine(run, images=300)
    second.add([name])
    second.judge(300)  # 2 of 300 are allowed
    assert len(run.quarantined()) == 2
