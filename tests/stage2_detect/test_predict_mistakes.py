"""predict.py: where images are looked for, and users' mistakes."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_files import content

from ssld.shared.errors import UserError
from ssld.shared.models.model_file import read_metadata, read_tensors, save_model_file
from ssld.shared.tally import Tally
from ssld.stage2_detect import predict
from ssld.stage2_detect.data.image_files import find_images

Call = Callable[..., int]
Error = Callable[..., str]
Files = Callable[[Path], set[str]]


# ---- where to look


def test_pipes_are_no_pictures(photos: Path, tmp_path: Path) -> None:
    """Reading one would never end."""
    shutil.copytree(photos, tmp_path / "copy")
    os.mkfifo(tmp_path / "copy" / "pipe.png")
    assert "pipe.png" not in find_images(str(tmp_path / "copy")).names
    assert "pipe.png" not in find_images(str(tmp_path / "copy" / "*.png")).names
    with pytest.raises(UserError, match="no such image, video, folder or list"):
        find_images(str(tmp_path / "copy" / "pipe.png"))


def test_a_picture_a_pattern_and_a_list(photos: Path, tmp_path: Path, files_below: Files) -> None:
    assert find_images(str(photos)).names == sorted(files_below(photos))
    assert find_images(str(photos / "5.png")) == (str(photos), ["5.png"])
    assert find_images(str(photos / "**" / "*.png")) == (str(photos), sorted(files_below(photos)))
    assert find_images(str(photos / "1*.png")).names == ["1.png", "10.png", "11.png"]
    (tmp_path / "list.txt").write_text("# mine\nphotos/5.png\n\nphotos/deep/3.png\nphotos/5.png\n")
    assert find_images(str(tmp_path / "list.txt")) == (str(photos), ["5.png", "deep/3.png"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photos/5.png\nphotos/99.png\n", "list.txt, line 2: photos/99.png: no such file"),
        ("# nothing\n", "list.txt: contains no path"),
        (
            '{"images": [{"id": 1}]}',
            'list.txt: begins with \'{"images": [{"id": 1\'..., which is not a path; give an image, a video',
        ),
        ('[{"id": 1}]', 'list.txt: begins with [{"id": 1}], which is not a path'),
        ("<html>", "list.txt: begins with <html>, which is not a path"),
        ("x" * 500, f"list.txt, line 1: '{'x' * 120}'...: no such file"),
        ("a\x1b[2J.jpg", "list.txt, line 1: 'a\\x1b[2J.jpg'...: no such file"),
        ("a\0b", "list.txt: neither an image or video"),
    ],
)
def test_bad_lists(photos: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        find_images(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("form", ["photos/{}.png", "photos\\{}.png", '"photos/{}.png"', "./photos/{}.png"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_of_other_systems(photos: Path, tmp_path: Path, form: str, encoding: str) -> None:
    (tmp_path / "list.csv").write_bytes(f"{form.format(5)}\r\n# mine\r\n{form.format(6)}\r\n".encode(encoding))
    assert find_images(str(tmp_path / "list.csv")) == (str(photos), ["5.png", "6.png"])


def test_names_that_look_like_patterns(photos: Path, tmp_path: Path) -> None:
    """Of a folder that is there, brackets are letters of its name."""
    odd = tmp_path / "img [1] *"
    (odd / "deep [2]").mkdir(parents=True)
    for name in ("a [x].png", "b.PNG", "._c.png", "deep [2]/d.jfif", "e.MTS", "notes.txt"):
        shutil.copy(photos / "5.png", odd / name)
    every = ["a [x].png", "b.PNG", "deep [2]/d.jfif", "e.MTS"]
    assert find_images(str(odd)) == (str(odd), every)
    assert find_images(str(odd / "a [x].png")).names == ["a [x].png"]
    assert find_images(str(odd / "*.*")).names == ["a [x].png", "b.PNG", "e.MTS"]
    assert find_images(str(odd / "**" / "*.[jp]*")).names == ["a [x].png", "deep [2]/d.jfif"]
    assert find_images(str(odd / "deep [2]" / "*.jfif")).names == ["d.jfif"]
    tally = Tally()
    find_images(str(odd), tally)
    assert tally.skipped("file", "with suffix .txt") == 1


def test_an_image_by_its_content(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "5.png", tmp_path / "5")
    assert find_images(str(tmp_path / "5")).names == ["5"]


# ---- users' mistakes


def test_pictures_that_cannot_be_read_are_named_and_left_out(
    call: Call, predict_line: Any, photos: Path, tmp_path: Path
) -> None:
    assert call(predict.main, predict_line(output="whole")) == 0
    (photos / "0.png").write_bytes(b"no image at all")
    damaged = (photos / "4.png").read_bytes()
    (photos / "4.png").write_bytes(damaged[: len(damaged) // 2])  # its header is sound
    (photos / "raw.dng").write_bytes(b"of a camera")
    # Batches of one image, so that one holds nothing readable.
    assert call(predict.main, predict_line("--batch_size", "1")) == 0
    run = tmp_path / "predicted"
    assert (run / "quarantine.txt").read_text() == "0.png\n4.png\n"
    raw = "1 of camera raw, to be converted (first: raw.dng)"
    counted = f"3 images dropped: 2 that cannot be read (.png) (first: 0.png), {raw}"
    log = (run / "log.txt").read_text()
    assert counted in log
    boxes = content(run / "result.json")["metrics"]
    assert re.search(rf" in {boxes['images_with_boxes']} of 10 images: ", log)
    assert f"unreadable files are listed in {run / 'quarantine.txt'}" in log
    predictions = content(run / "predictions.json")
    names = {image["id"]: image["file_name"] for image in predictions["images"]}
    assert set(names.values()) == {f"{n}.png" for n in (1, 2, 5, 6, 7, 8, 9, 10, 11)} | {"deep/3.png"}
    result = content(run / "result.json")
    assert result["metrics"]["unreadable"] == 2
    assert result["read"]["images"]["image"]["kept"] == 10
    assert {cause: one["count"] for cause, one in result["read"]["images"]["image"]["dropped"].items()} == {
        "that cannot be read (.png)": 2,
        "of camera raw, to be converted": 1,
    }
    whole = content(tmp_path / "whole" / "predictions.json")["annotations"]
    kept = [(r["image_id"], r["category_id"]) for r in whole if names.get(r["image_id"])]
    assert [(r["image_id"], r["category_id"]) for r in predictions["annotations"]] == kept  # ids are the listing's


def test_none_can_be_read(user_error: Error, predict_line: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"no image")
    message = user_error(predict.main, predict_line(images=tmp_path / "bad"))
    assert message == f"nothing can be read in 2 files of {tmp_path / 'bad'}; the first is a.jpg"


def test_no_box_above_the_threshold(
    user_error: Error, call: Call, predict_line: Any, photos: Path, tmp_path: Path
) -> None:
    message = user_error(predict.main, predict_line("--pseudo_labels", "true", "--score_threshold", "1.0"))
    assert message.startswith(f"{photos}: no box with a score of 1 or more in 12 images; the best has 0.")
    assert message.endswith("give a lower --score_threshold, or a detector that fits these images")
    assert not (tmp_path / "predicted" / "pseudo_labels.json").exists()
    # The folder can be used again.
    assert call(predict.main, predict_line("--pseudo_labels", "true", "--score_threshold", "0.1")) == 0


def test_mistakes(
    user_error: Error, predict_line: Any, photos: Path, tmp_path: Path, teacher_file: Path, mask_file: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.bin").write_bytes(b"\xff\xfe\x00")
    earlier = tmp_path / "earlier.safetensors"
    metadata = read_metadata(mask_file, kind="detector")
    save_model_file(earlier, read_tensors(mask_file), metadata | {"model": metadata["model"] | {"rpn": {"samples": 9}}})
    resized = tmp_path / "resized.safetensors"
    save_model_file(resized, read_tensors(mask_file), metadata | {"resize": {"val_short_side": 800}})
    everything = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    everything["images"] = [
        {"id": i, "file_name": n, "width": 1, "height": 1} for i, n in enumerate(os.listdir(photos))
    ]
    everything["images"] += [{"id": 99, "file_name": "deep/3.png", "width": 1, "height": 1}]
    (tmp_path / "all.json").write_text(json.dumps(everything))
    (tmp_path / "none.json").write_text(json.dumps({**everything, "images": []}))
    for flags, message in (
        (predict_line(images=tmp_path / "empty"), f"no images in {tmp_path / 'empty'}"),
        (predict_line(images=tmp_path / "absent"), f"{tmp_path / 'absent'}: no such image, video, folder or list"),
        (predict_line(images=tmp_path / "*.jpg"), f"no images match {tmp_path / '*.jpg'}"),
        (predict_line(images=tmp_path / "notes.bin"), "neither an image"),
        (predict_line("--classes", "tal"), "does not know 'tal'; did you mean 'tall'?"),
        (predict_line("--model", str(teacher_file)), "backbone"),
        (predict_line("--model", "nowhere.safetensors"), "model: nowhere.safetensors: no such file"),
        (
            predict_line("--model", str(earlier)),
            f"{earlier}: was written by an earlier version of this project (model.rpn.samples is not a setting of this version)",
        ),
        (predict_line("--model", str(resized)), "resize.val_short_side is not a setting of this version"),
        (predict_line("--exclude", str(tmp_path / "all.json")), "names all images of"),
        (predict_line("--exclude", str(tmp_path / "none.json")), "has a file name of"),
        (predict_line(output="photos/predicted"), "is inside `images`"),
        (predict_line("--score_threshold", "1.5"), "score_threshold"),
    ):
        drawn = user_error(predict.main, flags)
        assert message in drawn, (message, drawn)


def test_pictures_that_would_share_files_are_refused(user_error: Error, predict_line: Any, photos: Path) -> None:
    shutil.copy(photos / "5.png", photos / "5.bmp")
    message = user_error(predict.main, predict_line("--write", "crops"))
    assert "which 5.bmp and 5.png share" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--write", "yolo,yolo_scores"], "choose one"),
        (["--write", "jsn"], "write"),
        (["--write", "json,pictures"], "did you mean 'images'?"),
        (["--write", "csv", "--pseudo_labels", "true"], "leave one of the two out"),
        (["--write", "[]"], "is empty"),
        (["--tile", "8"], "tile"),
        (["--overlap", "1"], "overlap"),
        (["--images", ""], "images: names no image, folder or list"),
        (["--source", "photos"], "--source: unknown flag; did you mean '--images'?"),
        (["--imgsz=640"], "--imgsz: unknown flag; did you mean '--short_side'?"),
    ],
)
def test_settings_that_do_not_fit(user_error: Error, predict_line: Any, flags: list[str], message: str) -> None:
    assert message in user_error(predict.main, predict_line(*flags))
