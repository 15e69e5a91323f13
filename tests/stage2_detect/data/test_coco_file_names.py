"""Names of images in COCO files: the file that is meant, missing files, files listed twice; the same for training and the data check."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ssld.shared.errors import UserError
from ssld.stage2_detect.data.check.annotations import check_rows
from ssld.stage2_detect.data.check.images import check_images
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.data.image_names import fitting_files, missing_names
from tests.stage2_detect.six_images import content

COPY = "`ssld doctor --fix DIR` writes a copy with the names of the files"


@pytest.mark.parametrize(
    ("file", "name", "look"),
    [
        ("größe.png", "gro\u0308ße.png", " (its letters are composed differently, as in Unicode NFC and NFD)"),
        ("sub/a b.png", "sub\\a%20b.png", ""),
        ("a%20b.png", "a b.png", ""),
        ("Photo.JPG", "photo.jpg", ""),
        ("photo.JPEG", "photo.jpg", ""),
        ("7a-photo.png", "..\\media\\upload\\1\\7a-photo.png", ""),
        ("photo.png", "C:/data/images/photo.png", ""),
        ("deeper/photo.png", "photo.png", ""),
        ("photo.png", "../../label-studio/data/media/upload/3/676b1b69-photo.png", ""),
    ],
)
def test_the_hint_names_the_file_that_fits(
    read: Callable[..., CocoData], folder: Path, file: str, name: str, look: str
) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()
    whole = content()
    whole["images"][3]["file_name"] = name
    with pytest.raises(UserError) as error:
        read(whole)
    hint = f"; did you mean {file!r}{look}?"
    assert (
        str(error.value)
        == f"1 of the 6 images of {folder / 'data.json'} are missing; the first is {folder}/{name}{hint}; {COPY}"
    )
    check = check_rows("train", folder / "data.json", folder)
    check_images(check, quick=True)
    (fault,) = [one for one in check.findings if one.level == "fault"]
    assert fault.text.endswith(f"({name}): training stops{hint}")
    assert fault.fix == "writes the names of the files"
    assert check.repair.image_values == {3: {"file_name": file}}
    assert not check.repair.drop_images


def test_the_hint_is_on_the_first_that_something_fits(read: Callable[..., CocoData], folder: Path) -> None:
    (folder / "photo.JPG").touch()
    whole = content()
    whole["images"][1]["file_name"], whole["images"][3]["file_name"] = "gone.png", "photo.jpg"
    with pytest.raises(
        UserError, match=r"2 of the 6 images .*gone\.png; did you mean 'photo\.JPG' for 'photo\.jpg'\?; `ssld doctor"
    ):
        read(whole)
    check = check_rows("train", folder / "data.json", folder)
    check_images(check, quick=True)
    (fault,) = [one for one in check.findings if one.level == "fault"]
    assert fault.fix == "writes the names of the files, removes 1 image without one"
    assert check.repair.image_values == {3: {"file_name": "photo.JPG"}}
    assert check.repair.drop_images == {1: "not in the folder"}


@pytest.mark.parametrize(
    ("files", "names", "expected"),
    [
        # Exports of Windows, with absolute paths, of a web server, and of a folder above or below.
        (["a/1.jpg", "b/1.jpg"], ["a\\1.jpg", "b\\1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["a/1.jpg", "b/1.jpg"], ["C:\\Users\\me\\img\\a\\1.jpg", "C:\\Users\\me\\img\\b\\1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["a/1.jpg", "2.jpg"], ["/data/local-files/?d=img/a/1.jpg", "/data/local-files/?d=img/2.jpg"], ["a/1.jpg", "2.jpg"]),
        (["x 1.JPG", "2.jpg"], ["https://host/img/x%201.jpg", "2.jpg"], ["x 1.JPG", None]),
        (["a/1.jpg", "b/2.jpg"], ["1.png", "img/b/2.jpg"], ["a/1.jpg", "b/2.jpg"]),
        # Label Studio's digits before a name: of two uploads, of one photo twice, and a date, which is none of them.
        (["a/1.jpg", "2.jpg"], ["images/a/0a1b2c3d-1.jpg", "upload\\3\\4e5f6a7b-2.JPG"], ["a/1.jpg", "2.jpg"]),
        (["1.jpg"], ["0a1b2c3d-1.jpg", "4e5f6a7b-1.jpg"], None),
        (["1.jpg"], ["20240131-1.jpg"], None),
        # Digits alone, here a day before its year and a serial number, are Label Studio's beside others alone.
        (["1.jpg"], ["31012024-1.jpg"], None),
        (["1.jpg"], ["00000012-1.jpg"], None),
        (["1.jpg", "2.jpg"], ["00000012-1.jpg", "4e5f6a7b-2.jpg"], ["1.jpg", "2.jpg"]),
        # One name fits two files, two names fit one file, or a file that the data set lists already.
        (["a/1.jpg", "b/1.jpg", "2.jpg"], ["1.jpg", "./2.JPG"], None),
        (["1.jpg"], ["a/1.jpg", "b/1.jpg"], None),
        (["1.jpg"], ["a/1.jpg", "1.jpg"], None),
        # Cameras number their images alike: an image in a folder of another name may be another image.
        (["b/1.jpg", "2.jpg"], ["a/1.jpg", "img/2.jpg"], None),
    ],
)  # fmt: skip
def test_files_that_are_meant(
    tmp_path: Path, files: list[str], names: list[str], expected: list[str | None] | None
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    found = fitting_files(tmp_path, names, missing_names(tmp_path, names))
    assert found == {index: file for index, file in enumerate(expected or []) if file}


def test_no_hint_where_two_files_would_fit(read: Callable[..., CocoData], folder: Path) -> None:
    for name in ("PHOTO.png", "Photo.png"):
        (folder / name).touch()
    whole = content()
    whole["images"][3]["file_name"] = "photo.png"
    with pytest.raises(UserError, match=r"photo\.png$"):
        read(whole)


def test_a_folder_in_place_of_an_image_is_missing_for_both(read: Callable[..., CocoData], folder: Path) -> None:
    (folder / "4.png").unlink()
    (folder / "4.png").mkdir()
    with pytest.raises(UserError, match="1 of the 6 images"):
        read(content())
    check = check_rows("train", folder / "data.json", folder)
    check_images(check, quick=True)
    assert any("1 image of 6 not in" in one.text for one in check.findings)


def test_a_file_under_two_ids_is_reported(read: Callable[..., CocoData], folder: Path) -> None:
    whole = content()
    whole["images"][4]["file_name"] = ".//1.png"
    data = read(whole)
    assert len(data.images) == 6
    assert "1 image listed before under another id: each counts by itself" in data.describe()
    check = check_rows("train", folder / "data.json", folder)
    assert any("1 image listed more than once, under other ids (1.png)" in one.text for one in check.findings)
    assert check.statistics["together"] == [[1, 5]]
