"""Recognition of image files, digests of folders, even spreads of numbers, and leftovers of killed processes."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from ssld.shared import files
from ssld.shared.errors import UserError
from ssld.shared.files import (
    ImageFolder,
    clear_leftovers,
    escaped,
    files_digest,
    list_folders,
    list_images,
    require_images,
    short_names,
    spread,
    unescaped,
)
from ssld.shared.tally import Tally


def test_numbers_are_evenly_spread() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == spread(3, 3) == [0, 1, 2]
    assert spread(0, 5) == []
    assert spread(3, 8, repeat=True) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert spread(10, 4, repeat=True) == spread(10, 4)


def test_leftovers_are_files_with_the_number_of_a_process(tmp_path: Path) -> None:
    for name in (".train.json.123", ".train.json.old", "train.json.123", "train.json"):
        (tmp_path / name).write_text("")
    (tmp_path / ".x.12").mkdir()
    clear_leftovers(list(tmp_path.iterdir()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".train.json.old",
        ".x.12",
        "train.json",
        "train.json.123",
    ]


# ---- digests


def test_files_digest(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"abc")
    (folder / "b.jpg").write_bytes(b"abc")
    digest = files_digest(folder)
    assert digest == files_digest(str(folder)) == files_digest(f"{folder}/")
    assert len(digest) == 64
    folder.rename(tmp_path / "two")
    folder = tmp_path / "two"
    assert files_digest(folder) == digest
    os.utime(folder / "b.jpg", ns=(0, 0))
    for litter in ("Thumbs.db", "desktop.ini", ".DS_Store", "@eaDir/b.jpg"):
        (folder / litter).parent.mkdir(exist_ok=True)
        (folder / litter).write_bytes(b"made by a program")
    assert files_digest(folder) == digest
    (folder / "b.jpg").write_bytes(b"abd")
    changed = files_digest(folder)
    (folder / "b.jpg").rename(folder / "c.jpg")
    assert len({files_digest(folder), changed, digest}) == 3
    assert files_digest(folder / "c.jpg") != files_digest(folder / "sub" / "a.jpg")
    with pytest.raises(UserError, match="does not exist"):
        files_digest(folder / "absent")


def test_of_an_image_folder_images_alone_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    everything, digest = files_digest(tmp_path), files_digest(ImageFolder(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "environment.json", "curves.png"):
        (tmp_path / "run" / name).write_bytes(b"x")
    assert files_digest(ImageFolder(tmp_path)) == digest
    assert files_digest(tmp_path) != everything
    for name, content in (("b.png", b""), ("c.parquet", b"x"), ("no suffix", b"\xff\xd8\xff\xe0")):
        (tmp_path / name).write_bytes(content)
        before, digest = digest, files_digest(ImageFolder(tmp_path))
        assert digest != before


def test_large_folders_and_files_are_digested_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_DIGESTED", 10)
    monkeypatch.setattr(files, "_SAMPLED", 2)
    monkeypatch.setattr(files, "_PART", 4)
    for name in "abcd":
        (tmp_path / f"{name}.bin").write_bytes(bytes(24))

    def digest_with(name: str, place: int) -> str:
        """The digest after one byte has changed, which is put back."""
        content = bytearray(24)
        content[place] = 1
        (tmp_path / f"{name}.bin").write_bytes(content)
        digest = files_digest(tmp_path)
        (tmp_path / f"{name}.bin").write_bytes(bytes(24))
        return digest

    same = files_digest(tmp_path)
    assert [digest_with("a", place) == same for place in (0, 3, 4, 10, 13, 19, 20, 23)] == [
        False, False, True, False, False, True, False, False,
    ]  # fmt: skip
    assert [digest_with(name, 0) == same for name in "abcd"] == [False, True, False, True]
    (tmp_path / "b.bin").write_bytes(bytes(23))
    assert files_digest(tmp_path) != same


# ---- what is an image


def write(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_content_decides_where_the_name_says_nothing(tmp_path: Path) -> None:
    formats = {
        "JPEG": "RGB",
        "PNG": "RGB",
        "GIF": "P",
        "TIFF": "RGB",
        "BMP": "RGB",
        "WEBP": "RGB",
        "PPM": "L",
        "JPEG2000": "L",
        "AVIF": "RGB",
    }
    for number, (name, mode) in enumerate(formats.items()):
        buffer = io.BytesIO()
        Image.new(mode, (16, 16)).save(buffer, name)
        write(tmp_path, f"a/{number}", f"a/{number}.jpg?w=300", f"a/{number}.IMG", content=buffer.getvalue())
    write(tmp_path, "a/readme", "a/BMW", content=b"BMW and other words that are no header of a bitmap, P6 or not")
    write(tmp_path, "a/notes.txt", "a/more.TXT", content=b"\xff\xd8\xff")
    write(tmp_path, "a/photo.NEF", content=b"II*\0" + bytes(60))
    tally = Tally()
    assert list_images(tmp_path, tally=tally) == sorted(
        f"a/{number}{end}" for number in range(len(formats)) for end in ("", ".jpg?w=300", ".IMG")
    )
    assert tally.kept("image", "a") == 27
    assert tally.dropped("image", "of camera raw, to be converted") == 1
    assert (tally.skipped("file", "without a suffix"), tally.skipped("file", "with suffix .txt")) == (2, 2)


def test_what_is_hidden_and_what_is_no_file(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.jpg", "cat/2.jpg", "cat/._1.jpg", "cat/.3.jpg", "cat/@eaDir/1.jpg", "cat/.thumbnails/1.jpg")
    write(tmp_path, ".net/1.jpg", ".net/2.jpg", ".git/1.jpg", "__MACOSX/cat/1.jpg")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat" / "zero.jpg").symlink_to("/dev/zero")
    tally = Tally()
    assert list_images(tmp_path, tally=tally) == ["cat/1.jpg", "cat/2.jpg"]
    assert tally.dropped("image", "in a hidden folder") == tally.dropped("image", "that are no files") == 2
    assert tally.dropped("image", "behind broken links") == 1
    assert tally.skipped("file", "hidden") == 1
    assert tally.bulk_loss() is not None
    tally = Tally()
    write(tmp_path, "cat/4.jpg", "cat/5.jpg", "cat/6.jpg")
    list_images(tmp_path, tally=tally)
    assert tally.bulk_loss() == "all images of class '.net' would be left out: 2 in a hidden folder (first: .net/1.jpg)"


def test_run_directories_are_no_data(tmp_path: Path) -> None:
    write(
        tmp_path,
        "cat/1.jpg",
        "runs/one/config.yaml",
        "runs/one/environment.json",
        "runs/one/curves.png",
        "runs/one/selected/1.jpg",
    )
    tally = Tally()
    assert list_images(tmp_path, tally=tally) == ["cat/1.jpg"]
    assert list_folders(tmp_path / "runs") == []
    assert tally.describe() == "1 folder skipped: 1 written by a run (first: runs/one)"
    assert list_images(tmp_path / "runs" / "one") == ["curves.png", "selected/1.jpg"]  # where it is given itself


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "b.csv")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "annex")
    with pytest.raises(
        UserError,
        match=r"no images in .*1 image dropped: 1 behind broken links \(first: c.jpg\); 2 files skipped: 2 with suffix .csv",
    ):
        require_images(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write(tmp_path, name)
    assert list_images(tmp_path) == [name]
    assert escaped(name) == "caf\\udce9.jpg"
    assert unescaped(escaped(name)) == name
    assert unescaped(escaped("chérry/\\u00e9.jpg")) == "chérry/\\u00e9.jpg"


def test_names_of_files_have_their_folders_where_they_are_needed() -> None:
    paths = ["/x/set/train/a.json", "/x/set/valid/a.json", "/x/set/b.json", "/x/set/valid/a.json"]
    assert short_names(paths) == dict(
        zip(paths, ["train/a.json", "valid/a.json", "b.json", "valid/a.json"], strict=True)
    )
    assert short_names(["a/1.jpg", "1.jpg"]) == {"a/1.jpg": "a/1.jpg", "1.jpg": "1.jpg"}
    assert short_names(["/x/1.jpg", "y/1.jpg"]) == {"/x/1.jpg": "/x/1.jpg", "y/1.jpg": "y/1.jpg"}
    assert short_names(["set/1.jpg"]) == {"set/1.jpg": "1.jpg"}
    assert short_names([]) == {}
