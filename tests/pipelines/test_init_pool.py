"""`ssld init`: which of the unlabeled photos stage 1 gets."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ssld.pipelines import init, run
from ssld.pipelines.scaffold import pool
from tests.pipelines import test_init as base
from tests.pipelines.test_init import WITH_STAGE_1

photos = base.photos


def test_photos_with_a_line_break_in_their_name_are_in_no_list(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each line of a list is a file, and one line of the output counts and names what is left out."""
    table = json.loads(Path("all.json").read_text())
    for row in table["images"]:
        if row["file_name"] in ("3.png", "4.png", "5.png", "6.png"):
            Path("photos", row["file_name"]).rename(f"photos/train\n{row['file_name']}")
            row["file_name"] = f"train\n{row['file_name']}"
    Path("all.json").write_text(json.dumps(table))
    Path("more photos/2.png").rename("more photos/two\nlines.png")
    assert init.main([*WITH_STAGE_1, "--moving_teacher", "yes"]) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("lists of photos")]
    assert "1 unlabeled photo dropped: 1 whose path has a line break" in line
    assert f"(first: {photos}/more photos/two\\nlines.png)" in line
    for part, folder, count in (
        ("unlabeled", "more photos", 2),
        ("shown", ".", 2),
        ("moving", ".", 2),
        ("train", "photos", 0),
    ):
        names = Path(f"mine_{part}.txt").read_text().splitlines()
        assert all(Path(folder, name).is_file() for name in names), part
        assert len(names) == count or part == "train"
    left_out = sum("\n" in row["file_name"] for row in json.loads(Path("mine_train.json").read_text())["images"])
    assert left_out > 0
    assert len(Path("mine_train.txt").read_text().splitlines()) == 32 - left_out
    assert f"{left_out} training photo" in line


def test_unlabeled_photos_are_told_apart_from_evaluation_photos(
    photos: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of unlabeled photos also contains all annotated ones under other names, as is common."""
    monkeypatch.setattr(pool, "SMALLEST_POOL", 20)
    monkeypatch.setattr(pool, "LEAST_HELD_OUT", 4)
    draw = np.random.default_rng(1)
    for number in range(30):
        pixels = draw.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / "more photos" / f"new {number}.png")
    for file in sorted((photos / "photos").rglob("*.png")):
        (photos / "more photos" / f"copy of {file.name}").write_bytes(file.read_bytes())
    (photos / "more photos" / "IMG.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert init.main(WITH_STAGE_1) == 0
    evaluated = [row["file_name"] for row in json.loads(Path("mine_val.json").read_text())["images"]]
    lists = {part: Path(f"mine_{part}.txt").read_text().splitlines() for part in ("unlabeled", "held_out")}
    assert len(lists["held_out"]) == 4
    names = lists["unlabeled"] + lists["held_out"]
    assert len(set(names)) == len(names) == 3 + 30
    assert not [name for name in names if name.startswith("copy of ")]
    assert "copy of " not in Path("mine_shown.txt").read_text()
    assert len(evaluated) == 8
    out = capfd.readouterr().out
    assert (
        "more photos: 41 photos dropped: 1 that cannot be read (.heic) (first: IMG.HEIC), 32 copies of training photos (first: copy of "
        in out
    )
    assert "8 copies of evaluation photos (first: copy of " in out
    data = yaml.safe_load(Path("mine.yaml").read_text())["stages"]["ssld"]["set"]["data"]
    assert data["val"] == {"path": "mine_held_out.txt", "root": "more photos"}
    assert run.main(["mine.yaml", "--dry-run"]) == 0
    # A student without weights learns features, which held-out photos do not measure: it trains on all.
    assert init.main([*WITH_STAGE_1, "--backbone", "random:resnet18", "--output", "new.yaml"]) == 0
    assert Path("new_unlabeled.txt").read_text().splitlines() == sorted(names)
    assert "val" not in yaml.safe_load(Path("new.yaml").read_text())["stages"]["ssld"]["set"]["data"]
    assert not Path("new_held_out.txt").exists()


def test_a_folder_of_evaluation_photos_alone_is_refused(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["--images", "photos", "--annotations", "all.json", "--output"]
    assert init.main([*line, "first.yaml"]) == 0
    Path("only").mkdir()
    for row in json.loads(Path("first_val.json").read_text())["images"][:2]:
        (photos / "only" / row["file_name"]).write_bytes((photos / "photos" / row["file_name"]).read_bytes())
    assert init.main([*line, "mine.yaml", "--distill", "yes", "--unlabeled", "only"]) == 2
    error = capfd.readouterr().err
    assert "only: 2 photos dropped: 2 copies of evaluation photos (first: " in error
    assert "no photo is left to train on" in error
    assert not Path("mine.yaml").exists()
