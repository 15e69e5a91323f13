"""audit.py: the list, the doubts and the page of photos to annotate next; near-duplicates apart; labels to look at first; users' mistakes."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageOps
from run_files import content

from ssld.shared.files import UNLISTED
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import SourceConfig
from ssld.stage2_detect import audit, evaluate, predict
from ssld.stage2_detect.data.image_files import find_images
from ssld.stage2_detect.prediction import annotate_next
from ssld.stage2_detect.prediction.annotate_next import LIST, PAGE, VALUES, choose, hashes_of_file
from ssld.stage2_detect.prediction.files import Parts

Call = Callable[..., int]
Error = Callable[..., str]
Files = Callable[[Path], set[str]]
RECORDS = {".lock", "config.yaml", "environment.json", "log.txt", "result.json"}
LISTED = {LIST, VALUES, PAGE}


@pytest.fixture
def audit_line(detector_file: Path, photos: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of an audit; `images` and `output` may be others."""

    def flags(*more: str, images: Path | str = photos, output: str = "audited") -> list[str]:
        arguments = ["--model", str(detector_file), "--images", str(images), "--output", str(tmp_path / output)]
        return [*arguments, "--threads", "1", "--workers", "0", "--device", "cpu", *more]

    return flags


def listed(run: Path, folder: Path) -> list[str]:
    """Names in the list, relative to the folder."""
    return [Path(line).relative_to(folder).as_posix() for line in (run / LIST).read_text().splitlines()]


# ---- near-duplicates


def hashes(*values: int) -> Callable[[int], tuple[int, int]]:
    """Hashes with as many bits as those of images; mirror images differ from everything."""
    return lambda position: (values[position], 0x0F0F0F0F0F0F0F0F ^ values[position])


STRUCTURED = 0x00FF00FF00FF00FF


def test_near_duplicates_of_a_listed_photo_are_left_out() -> None:
    other, another = 0x5555555555555555, 0x3333333333333333
    values = (STRUCTURED, other, STRUCTURED ^ 0b111, STRUCTURED ^ 0b1111, another)
    chosen = choose(5, 10, hashes(*values))
    assert chosen.listed == [0, 1, 3, 4]  # four bits apart is no duplicate
    assert chosen.copy_of == {2: 0}
    assert choose(5, 2, hashes(*values)).listed == [0, 1]
    assert choose(0, 2, hashes()).listed == []


def test_a_mirror_image_is_a_near_duplicate_and_no_more_photos_are_read_than_needed() -> None:
    read = []

    def of(position: int) -> tuple[int, int]:
        read.append(position)
        return [(STRUCTURED, 1), (0x5555555555555555, STRUCTURED), (0x3333333333333333, 1), (7, 7)][position]

    assert choose(4, 2, of) == ([0, 2], {1: 0})
    assert read == [0, 1, 2]


def test_hashes_of_a_file_and_of_its_mirror_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 200))
    image.save(tmp_path / "one.png")
    ImageOps.mirror(image).save(tmp_path / "mirror.png")
    one, mirror = (hashes_of_file(str(tmp_path / name)) for name in ("one.png", "mirror.png"))
    assert one == mirror[::-1]
    assert one[0] != one[1]


# ---- what is written


def test_the_most_doubtful_photos_are_listed_without_copies(
    call: Call, audit_line: Any, predict_line: Any, photos: Path, tmp_path: Path, files_below: Files
) -> None:
    """The margin is that of the boxes that predict.py writes; the list is one that predict.py takes."""
    with Image.open(photos / "5.png") as image:
        ImageOps.mirror(image).save(photos / "mirrored.png")
    shutil.copy(photos / "6.png", photos / "z_copy.png")
    assert call(audit.main, audit_line()) == 0
    run = tmp_path / "audited"
    assert files_below(run) == RECORDS | LISTED
    values = content(run / VALUES)
    rows = values["photos"]
    assert {row["file_name"] for row in rows} == files_below(photos)
    order = [(-row["doubt"], row["file_name"]) for row in rows]
    assert order == sorted(order)
    assert rows[0]["doubt"] > rows[-1]["doubt"]
    for row in rows:
        assert row["doubt"] == pytest.approx(row["margin"] + row["disagreement"], abs=2e-6)
    copies = {row["file_name"]: row["near_duplicate_of"] for row in rows if row["near_duplicate_of"]}
    for pair in ({"6.png", "z_copy.png"}, {"5.png", "mirrored.png"}):
        assert pair in [{one, other} for one, other in copies.items()]
    assert listed(run, photos) == [row["file_name"] for row in rows if row["place"]]
    assert [row["place"] for row in rows if row["place"]] == list(range(1, values["listed"] + 1))
    assert values["listed"] == len(rows) - len(copies)
    metrics = content(run / "result.json")["metrics"]
    assert metrics["photos"] == 14
    assert (metrics["listed"], metrics["near_duplicates"]) == (values["listed"], len(copies))
    assert metrics["highest_doubt"] == pytest.approx(rows[0]["doubt"], abs=1e-6)
    log = (run / "log.txt").read_text()
    assert (
        f"{values['listed']} photos to annotate next, of 14, {len(copies)} near-duplicates left out: doubt from" in log
    )

    assert len(ImageSource(SourceConfig(path=str(run / LIST)), 0)) == values["listed"]  # a source of stage 1
    assert call(predict.main, predict_line("--score_threshold", "0.2", "--write", "json", images=run / LIST)) == 0
    predicted = content(tmp_path / "predicted" / "predictions.json")
    names = {image["id"]: image["file_name"] for image in predicted["images"]}
    assert sorted(names.values()) == sorted(listed(run, photos))
    for name in names.values():
        scores = [row["score"] for row in predicted["annotations"] if names[row["image_id"]] == name]
        (row,) = (row for row in rows if row["file_name"] == name)
        expected = sum((2 * min(score, 1 - score)) ** 2 for score in scores)
        # Other batches: sums of the network differ in the last bits.
        assert row["margin"] == pytest.approx(expected, abs=1e-3)
        assert row["boxes"] == len(scores)


def test_the_page_shows_the_listed_photos_with_their_boxes(
    call: Call, audit_line: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "0.png").rename(photos / "<b>&.png")
    monkeypatch.setattr(annotate_next, "MOST_PICTURES", 9)
    assert call(audit.main, audit_line("--count", "10")) == 0
    run = tmp_path / "audited"
    page = (run / PAGE).read_text()
    names = listed(run, photos)
    rows = {row["file_name"]: row for row in content(run / VALUES)["photos"]}
    assert len(names) == 10
    assert "<title>10 photos to annotate next, of 12</title>" in page
    assert "The first 9 of them are shown." in page
    assert "<b>&.png" not in page
    captions = re.findall(
        r"<figcaption>(\d+)\. (.*?)<br>doubt (\S+) = margin (\S+) \+ disagreement (\S+); (\d+) box", page
    )
    shown = [name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for name in names[:9]]
    assert [caption[1] for caption in captions] == shown
    for number, caption in enumerate(captions):
        row = rows[names[number]]
        assert int(caption[0]) == number + 1
        assert [float(caption[k]) for k in (2, 3, 4)] == pytest.approx(
            [row[key] for key in ("doubt", "margin", "disagreement")], abs=0.0051
        )
        assert int(caption[5]) == row["boxes"]
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" width="(\d+)"', page)
    assert len(pictures) == 9
    with Image.open(io.BytesIO(base64.b64decode(pictures[0][0]))) as picture:
        assert picture.width == int(pictures[0][1]) >= 480
        plain = Image.open(photos / names[0]).convert("RGB").resize(picture.size, Image.Resampling.NEAREST)
        apart = np.abs(np.asarray(picture.convert("RGB")).astype(int) - np.asarray(plain)).max(2)
    assert (apart > 100).sum() > 100  # lines of boxes


def test_boxes_for_labeling_tools_are_in_the_order_of_the_list(
    call: Call, audit_line: Any, photos: Path, tmp_path: Path, files_below: Files
) -> None:
    more = ["--write", "label_studio,cvat", "--count", "4", "--score_threshold", "0.3"]
    assert call(audit.main, audit_line(*more)) == 0
    run = tmp_path / "audited"
    assert files_below(run) == RECORDS | LISTED | {"label_studio.json", "label_studio.xml", "cvat.xml"}
    names = listed(run, photos)
    boxes = {row["file_name"]: row["boxes"] for row in content(run / VALUES)["photos"]}
    tasks = json.loads((run / "label_studio.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [f"/data/local-files/?d={name}" for name in names]
    assert [len(task["predictions"][0]["result"]) for task in tasks] == [boxes[name] for name in names]
    images = ElementTree.parse(run / "cvat.xml").getroot().findall("image")
    assert [image.get("name") for image in images] == names


def test_labeled_photos_and_videos_are_left_out(call: Call, audit_line: Any, photos: Path, tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "7.png", "width": 64, "height": 64}]
    labeled = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "labeled.json").write_text(json.dumps(labeled))
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(photos / "clip.gif", save_all=True, append_images=frames[1:])
    (photos / "broken.png").write_bytes(b"no image at all")
    assert call(audit.main, audit_line("--exclude", str(tmp_path / "labeled.json"), "--batch_size", "1")) == 0
    run = tmp_path / "audited"
    names = {row["file_name"] for row in content(run / VALUES)["photos"]}
    assert names == {f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 8, 9, 10, 11)} | {"deep/3.png"}
    log = (run / "log.txt").read_text()
    assert "1 more excluded" in log
    assert "1 image dropped: 1 that cannot be read (.png) (first: broken.png)" in log
    assert "1 video skipped: 1 that are no photos (first: clip.gif)" in log
    assert (run / "quarantine.txt").read_text() == "broken.png\n"


def test_a_name_that_a_list_cannot_hold_is_left_out(call: Call, audit_line: Any, photos: Path, tmp_path: Path) -> None:
    (photos / "0.png").rename(photos / "two\nlines.png")
    (photos / "1.png").rename(photos / "\x1b[31mred.png")
    (photos / "2.png").rename(photos / "turned \u202e.png")
    assert call(audit.main, audit_line()) == 0
    run = tmp_path / "audited"
    assert len(find_images(str(run / LIST)).names) == 10
    cause = f"2 images dropped: 2 {UNLISTED} (first: \\x1b[31mred.png)"
    assert cause in (run / "log.txt").read_text()
    captions: list[str] = []
    parser = HTMLParser()
    parser.handle_data = captions.append  # type: ignore[assignment, method-assign]
    parser.feed((run / PAGE).read_text())
    text = "".join(captions)
    assert ". turned \\u202e.png" in text
    assert all(one.isprintable() or one == "\n" for one in text)


# ---- interruptions


def test_a_killed_run_goes_on_and_leaves_no_list_before(
    call: Call, audit_line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssld.stage2_detect.prediction.files._PART", 4)
    assert call(audit.main, audit_line(output="whole")) == 0
    write = Parts.write
    written: list[int] = []

    def killed(self: Parts, number: int, *args: Any, **more: Any) -> None:
        if len(written) == 2:
            raise SystemExit
        written.append(number)
        write(self, number, *args, **more)

    monkeypatch.setattr(Parts, "write", killed)
    with pytest.raises(SystemExit):
        call(audit.main, audit_line())
    run = tmp_path / "audited"
    assert not [name for name in LISTED if (run / name).exists()]
    written.clear()
    assert call(audit.main, audit_line()) == 0
    assert written == [2]
    for name in LISTED:
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (run / "parts").exists()
    # once more: nothing is computed
    assert call(audit.main, audit_line()) == 0
    assert written == [2]


# ---- labels


def test_labels_of_a_training_set(
    call: Call, audit_line: Any, tiny_coco: Any, tmp_path: Path, files_below: Files
) -> None:
    """The findings are those of evaluate.py on the same files, with a word on labels that the detector has learned from."""
    data = ["--annotations", str(tiny_coco.train_annotations)]
    assert call(audit.main, audit_line(*data, images=tiny_coco.train_images)) == 0
    run = tmp_path / "audited"
    assert {"label_audit.json"} <= files_below(run) - RECORDS <= {"label_audit.json", "label_audit.jpg"}
    assert call(evaluate.main, audit_line(*data, images=tiny_coco.train_images, output="evaluated")) == 0
    found = content(run / "label_audit.json")
    assert found == content(tmp_path / "evaluated" / "label_audit.json")
    metrics = content(run / "result.json")["metrics"]
    assert metrics == {key: found[key] for key in ("images", "labels", "detections", "counts")}
    assert metrics["images"] == 12
    log = (run / "log.txt").read_text()
    assert "label audit: " in log
    assert "a detector that was trained on these labels has partly learned their mistakes" in log


def test_a_removed_training_label_is_found(call: Call, audit_line: Any, tiny_coco: Any, tmp_path: Path) -> None:
    wrong = json.loads(tiny_coco.train_annotations.read_text())
    row = wrong["annotations"].pop(13)
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    data = ["--annotations", str(tmp_path / "wrong.json"), "--score_threshold", "0.3"]
    assert call(audit.main, audit_line(*data, images=tiny_coco.train_images)) == 0
    findings = content(tmp_path / "audited" / "label_audit.json")["findings"]
    assert (row["image_id"], "no_label") in {(one["image_id"], one["reason"]) for one in findings}


# ---- users' mistakes


def test_none_can_be_read(user_error: Error, audit_line: Any, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"no image")
    message = user_error(audit.main, audit_line(images=tmp_path / "bad"))
    assert message == f"nothing can be read in 2 files of {tmp_path / 'bad'}; the first is a.jpg"
    assert not [name for name in LISTED if (tmp_path / "audited" / name).exists()]


def test_videos_alone_are_no_photos(user_error: Error, audit_line: Any, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    message = user_error(audit.main, audit_line(images=tmp_path / "clips"))
    assert message == f"{tmp_path / 'clips'}: has no photos: 1 video skipped: 1 that are no photos (first: a.mp4)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--detector", "x"], "--detector: unknown flag; did you mean '--model'?"),
        (["--tta.flip", "true"], "tta: the two views that are compared are the image and its mirror image"),
        (
            ["--annotations", "ANNOTATIONS", "--write", "cvat"],
            "write: is for unlabeled photos, and annotations are given",
        ),
        (["--annotations", "ANNOTATIONS", "--exclude", "ANNOTATIONS"], "exclude: is for unlabeled photos"),
        (["--annotations", "absent.json"], "cannot read absent.json: No such file or directory"),
        (["--annotations", "ANNOTATIONS"], "5 of the 5 images of"),  # they are not in this folder
        (["--count", "0"], "count"),
        (["--score_threshold", "1"], "score_threshold"),
        (["--images", "absent"], "absent: no such image, video, folder or list"),
        (["--images", ""], "images: names no image, folder or list"),
    ],
)
def test_settings_that_do_not_fit(
    user_error: Error, audit_line: Any, tiny_coco: Any, photos: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "no_images").mkdir()
    places = {"ANNOTATIONS": str(tiny_coco.val_annotations)}
    folder = tmp_path / "no_images" if flags[:2] == ["--annotations", "ANNOTATIONS"] else photos
    line = audit_line(*(places.get(flag, flag) for flag in flags), images=folder)
    assert message in user_error(audit.main, line)
    assert not (tmp_path / "audited").exists()


def test_the_output_is_not_among_the_photos(user_error: Error, audit_line: Any) -> None:
    assert "is inside `images`" in user_error(audit.main, audit_line(output="photos/audited"))
