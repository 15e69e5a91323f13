"""Split of the unlabeled photos: no copies of evaluation photos, and some held out."""

from pathlib import Path

import pytest
from PIL import Image

from ssld.pipelines.scaffold.pool import divide_pool, some_photos, unlisted, unreadable_photos
from ssld.shared.errors import UserError
from ssld.shared.files import UNLISTED, list_images


def folder_of(place: Path, count: int) -> Path:
    (place / "deep").mkdir(parents=True)
    for number in range(count):
        (place / "deep" / f"{number:03d}.jpg").write_bytes(f"photo {number:03d}".encode())
    return place


def test_copies_of_evaluation_photos_are_left_out_whatever_they_are_called(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pool", 12)
    other = tmp_path / "val"
    other.mkdir()
    (other / "renamed.jpg").write_bytes((folder / "deep" / "007.jpg").read_bytes())
    (other / "same_size.jpg").write_bytes(b"photo 999")
    evaluation = [other / "renamed.jpg", other / "same_size.jpg", folder / "deep" / "003.jpg"]
    pool = divide_pool(folder, [folder / "deep" / "005.jpg"], evaluation, seed=0)
    assert pool.train == [f"deep/{number:03d}.jpg" for number in range(12) if number not in (3, 5, 7)]
    assert pool.held_out == []
    assert pool.tally.describe() == (
        "3 photos dropped: 2 copies of evaluation photos (first: deep/003.jpg), 1 copies of training photos (first: deep/005.jpg)"
    )


@pytest.mark.parametrize(("photos", "held_out"), [(249, 0), (250, 50), (1200, 60)])
def test_a_seeded_part_of_a_large_pool_is_held_out(photos: int, held_out: int, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pool", photos)
    one, again, other = (divide_pool(folder, [], [], seed) for seed in (0, 0, 1))
    assert len(one.held_out) == held_out
    assert sorted(one.train + one.held_out) == sorted(f"deep/{number:03d}.jpg" for number in range(photos))
    assert one.held_out == again.held_out
    assert (one.held_out != other.held_out) == bool(held_out)


def test_at_most_five_hundred(tmp_path: Path) -> None:
    assert len(divide_pool(folder_of(tmp_path / "pool", 10_400), [], [], seed=0).held_out) == 500


def test_photos_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pool", 0)
    for number in range(3):
        Image.new("L", (2, 2), number).save(folder / "deep" / f"{number}.png")
    (folder / "empty.jpg").touch()
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    bad = unreadable_photos(folder / name for name in list_images(folder))
    assert bad == {folder / "empty.jpg", folder / "IMG_1.HEIC"}
    assert some_photos(folder, [], seed=0) == [folder / "deep" / f"{number}.png" for number in range(3)]
    pool = divide_pool(folder, [], [], seed=0, unreadable=bad)
    assert pool.train == ["deep/0.png", "deep/1.png", "deep/2.png"]
    assert pool.tally.describe() == (
        "2 photos dropped: 1 that cannot be read (.heic) (first: IMG_1.HEIC), 1 that cannot be read (.jpg) (first: empty.jpg)"
    )
    with pytest.raises(
        UserError, match=r"3 that cannot be read \(\.png\) .*; of 5 in all: convert them to JPEG or PNG first"
    ):
        divide_pool(folder, [], [], seed=0, unreadable=[folder / name for name in pool.train])


def test_many_photos_are_looked_at_in_one_process(tmp_path: Path) -> None:
    """More names than the arguments of a process may hold."""
    names = [tmp_path / f"{'long' * 40}{number}.jpg" for number in range(1500)]
    Image.new("L", (2, 2)).save(names[700].with_suffix(".png"))
    assert unreadable_photos([*names, names[700].with_suffix(".png")]) == set(names)


def test_none_of_the_drawn_photos_can_be_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pool", 30)
    with pytest.raises(UserError, match=r"pool: none of 24 photos drawn can be read, first .*\.jpg; convert them to"):
        some_photos(folder, [], seed=0)


def test_copies_of_annotated_photos_are_not_shown_as_photos_without_annotations(tmp_path: Path) -> None:
    folder, own = folder_of(tmp_path / "pool", 0), tmp_path / "a.png"
    for number in range(30):
        Image.new("L", (2, 2), number).save(folder / "deep" / f"{number:02d}.png")
    shown = some_photos(folder, [], seed=0)
    own.write_bytes(shown[0].read_bytes())
    without = some_photos(folder, [own], seed=0)
    assert len(shown) == len(without) == 24
    assert shown[0] not in without
    assert set(shown[1:]) < set(without)
    with pytest.raises(UserError, match=r"pool: all 30 photos are copies of annotated ones; leave out --unlabeled"):
        some_photos(folder, sorted((folder / "deep").iterdir()), seed=0)


def test_photos_that_no_list_can_hold_are_left_out_and_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pool", 8)
    assert unlisted(folder, ["a.jpg"]) == ""
    for number, name in enumerate(("two\nlines.jpg", "\x1b.jpg", "page\x0c.jpg", " a.jpg", "#1.jpg", '"q".jpg')):
        (folder / name).write_bytes(f"odd {number}".encode())
    kept = [f"deep/{number:03d}.jpg" for number in range(8)]
    assert divide_pool(folder, [], [], seed=0).train == kept
    for name in kept:
        Image.new("L", (2, 2)).save(folder / name, "PNG")
    assert some_photos(folder, [], seed=0) == [folder / name for name in kept]
    assert unlisted(folder, ["a.jpg", "b\rc.jpg"]) == (
        f"lists of photos, one file per line: 6 unlabeled photos dropped: 6 {UNLISTED} (first: {folder}/\x1b.jpg); "
        f"1 training photo dropped: 1 {UNLISTED} (first: b\rc.jpg)"
    )
    with pytest.raises(UserError, match=r"all training photos would be left out: 1 whose path has .*; rename them"):
        unlisted(folder, ["b\rc.jpg"])
