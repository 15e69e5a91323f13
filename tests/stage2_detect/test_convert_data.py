"""convert_data.py as a run: when it starts again, its errors, and the names of its files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from converted_data import counted, line, read, save, voc_xml, write

from ssld.stage2_detect.config import ConvertDataConfig
from ssld.stage2_detect.convert_data import main


def build(root: Path, form: str) -> Path:
    """A data set of one image and one object; returns its file of labels."""
    if form == "voc":
        save(root / "JPEGImages/a.png")
        file, text = root / "Annotations/a.xml", voc_xml(("wide", 0, (1, 1, 9, 9)))
    else:
        save(root / "images/train/a.png")
        file, text = root / "labels/train/a.txt", "0 0.5 0.5 0.5 0.5\n"
        write(root / "classes.txt", "wide\n")
        if form != "folder":
            place = "list.txt" if form == "list" else "images/train"
            write(root / "data.yaml", f"train: {place}\nnames: [wide]\n")
            write(root / "list.txt", "images/train/a.png\n")
    write(file, text)
    return file


@pytest.mark.parametrize("form", ["yaml", "folder", "list", "described", "voc"])
@pytest.mark.parametrize("output", ["out", "set/out"])
def test_changed_labels(tmp_path: Path, user_error: Callable[..., str], form: str, output: str) -> None:
    """A finished run reports changed inputs, also if its folder is inside the source; without changes it stays finished."""
    labels = build(tmp_path / "set", form)
    source = tmp_path / "set" / ("data.yaml" if form in ("yaml", "list") else ".")
    run = tmp_path / output
    assert main(line(source, run)) == 0
    before = (run / "train.json").stat().st_mtime_ns
    assert main(line(source, run)) == 0
    assert (run / "train.json").stat().st_mtime_ns == before
    write(labels, labels.read_text() + ("\n" if form == "voc" else "0 0.5 0.5 0.25 0.25\n"))
    message = user_error(main, line(source, run))
    assert f"{run}: holds a run with another configuration (source" in message
    if form in ("yaml", "list"):
        assert "source: labels/train has other content" in message
    assert main(line(source, tmp_path / "new")) == 0
    assert len(read(tmp_path / "new").images[0].labels_N) == (1 if form == "voc" else 2)


def test_labels_elsewhere_are_inputs_too(tmp_path: Path, user_error: Callable[..., str]) -> None:
    """The description file is in the given folder, the images and labels are elsewhere."""
    labels = build(tmp_path / "data", "yaml")
    write(tmp_path / "set" / "data.yaml", "path: ../data\ntrain: images/train\nnames: [wide]\n")
    config = ConvertDataConfig(source=str(tmp_path / "set"), output=tmp_path / "out")
    assert config.inputs() == {
        "source": tmp_path / "set",
        "source: images/train": tmp_path / "data/images/train",
        "source: labels/train": tmp_path / "data/labels/train",
    }
    assert main(line(tmp_path / "set", tmp_path / "out")) == 0
    write(labels, "0 0.5 0.5 0.25 0.25\n0 0.5 0.5 0.25 0.25\n")
    assert "source: labels/train has other content" in user_error(main, line(tmp_path / "set", tmp_path / "out"))


@pytest.mark.parametrize("name", ["result", "Environment", "error", "config.yaml"])
def test_splits_named_like_files_of_a_run(tmp_path: Path, user_error: Callable[..., str], name: str) -> None:
    save(tmp_path / "set" / "images" / name / "a.png")
    write(tmp_path / "set" / "labels" / name / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    write(tmp_path / "set" / "classes.txt", "wide\n")
    message = user_error(main, line(tmp_path / "set", tmp_path / "out"))
    assert f"a split is called {name!r}, like a file of a run; rename it" in message


def test_bulk_loss(tmp_path: Path, user_error: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    labels = build(tmp_path / "set", "yaml")
    write(labels, "0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0 0.5\n0 0.5 0.5 0.5 0\n")
    message = user_error(main, line(tmp_path / "set", tmp_path / "out"))
    assert message == (
        f"{tmp_path}/set: split train: 2 of the 3 boxes would be left out: 2 without width or height (first: {labels}, line 2); "
        "correct the source, or set allow_loss: true to convert the rest"
    )
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        ".lock",
        "config.yaml",
        "environment.json",
    }
    assert main(line(tmp_path / "set", tmp_path / "out", "--allow_loss", "true")) == 0
    assert f"train: 2 boxes dropped: 2 without width or height (first: {labels}, line 2)" in capsys.readouterr().out
    assert counted(tmp_path / "out")["box"]["kept"] == 1
    write(labels, "0 0.5 0.5 0.5 0\n")
    message = user_error(main, line(tmp_path / "set", tmp_path / "none", "--allow_loss", "true"))
    assert "split train: no object is left: 1 box dropped: 1 without width or height" in message


def test_the_error_for_an_unknown_format_lists_the_content(tmp_path: Path, user_error: Callable[..., str]) -> None:
    write(tmp_path / "set" / "labels.dat", "a,b")
    write(tmp_path / "set" / ".hidden", "")
    assert user_error(main, line(tmp_path / "set", tmp_path / "o1")).endswith("; it holds labels.dat")
    write(tmp_path / "set" / "labels.csv", "a,b")
    assert user_error(main, line(tmp_path / "set", tmp_path / "o1")) == (
        f"source: {tmp_path / 'set'}: labels.csv is a table, whose columns have no fixed meaning; write COCO JSON or YOLO from it"
    )
    write(tmp_path / "one.dat", "a,b")
    assert user_error(main, line(tmp_path / "one.dat", tmp_path / "o2")).endswith("it is a single file")
