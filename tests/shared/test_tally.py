import pytest

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally


def test_one_line_by_cause_with_the_first_name() -> None:
    tally = Tally()
    tally.keep("box", 10)
    tally.keep("image")
    for name in ("annotation 7", "annotation 9"):
        tally.drop("box", "outside the image", name)
    tally.drop("box", "of no size", "annotation 8")
    tally.drop("box", "never met", "nothing", 0)
    tally.change("box", "clipped to the image", "annotation 1", 1)
    assert tally.describe() == (
        "3 boxes dropped: 2 outside the image (first: annotation 7), 1 of no size (first: annotation 8); "
        "1 box changed: 1 clipped to the image (first: annotation 1)"
    )
    again = Tally.of_record(tally.record())
    assert (again.describe(), again.record()) == (tally.describe(), tally.record())
    assert again.describe_kept() == "10 boxes, 1 image"
    assert tally.record() == {
        "box": {
            "kept": 10,
            "dropped": {
                "outside the image": {"count": 2, "first": "annotation 7"},
                "of no size": {"count": 1, "first": "annotation 8"},
            },
            "changed": {"clipped to the image": {"count": 1, "first": "annotation 1"}},
        },
        "image": {"kept": 1, "dropped": {}, "changed": {}},
    }
    assert (tally.kept("box"), tally.dropped("box"), tally.dropped("box", "of no size")) == (10, 3, 1)
    assert tally.changed("box") == 1
    assert Tally().describe() == ""


@pytest.mark.parametrize(
    ("kept", "lost", "bulk"), [(0, 0, False), (0, 1, True), (1, 1, False), (49, 51, True), (50, 50, False)]
)
def test_bulk_is_more_than_half(kept: int, lost: int, bulk: bool) -> None:
    tally = Tally()
    tally.keep("box", kept)
    tally.drop("box", "outside the image", "annotation 3", lost)
    assert (tally.bulk_loss() is not None) == bulk


def test_a_class_that_is_lost_stops_a_run_that_keeps_most_boxes() -> None:
    tally = Tally()
    tally.keep("box", 90, group="dog")
    tally.keep("box", 2, group="cat")
    tally.drop("box", "marked iscrowd", "annotation 4", 3, group="cat")
    expected = "3 of the 5 boxes of class 'cat' would be left out: 3 marked iscrowd (first: annotation 4)"
    assert tally.bulk_loss() == expected
    with pytest.raises(UserError) as error:
        tally.check("train.json", allow_loss=False)
    assert str(error.value) == (
        f"train.json: {expected}; correct the source, or set data.allow_loss: true to train on the rest"
    )
    with pytest.raises(UserError, match="correct the source, or set allow_loss: true to convert the rest"):
        tally.check("train.json", allow_loss=False, otherwise="set allow_loss: true to convert the rest")
    tally.check("train.json", allow_loss=True)


def test_merging_adds_up() -> None:
    parts = [Tally(), Tally()]
    for index, tally in enumerate(parts):
        tally.keep("box", 2, group="cat")
        tally.drop("box", "outside the image", f"annotation {index}", 2 + index, group="cat")
        tally.change("box", "clipped to the image", f"annotation {index}")
    whole = Tally()
    for tally in parts:
        whole.merge(tally)
    assert (whole.kept("box"), whole.kept("box", "cat"), whole.dropped("box"), whole.changed("box")) == (4, 4, 5, 2)
    assert whole.bulk_loss() == "5 of the 9 boxes would be left out: 5 outside the image (first: annotation 0)"
    whole.merge(parts[0], kept=False)
    assert (whole.kept("box"), whole.kept("box", "cat"), whole.dropped("box"), whole.changed("box")) == (4, 4, 7, 3)


def test_what_lies_beside_the_data_is_named_and_is_no_loss() -> None:
    tally, other = Tally(), Tally()
    tally.keep("image", 1, group="cat")
    other.skip("file", "with suffix .txt", "notes.txt", 5)
    other.skip("file", "with suffix .txt", "more.txt", 0)
    tally.merge(other)
    assert tally.skipped("file") == tally.skipped("file", "with suffix .txt") == 5
    assert tally.describe() == "5 files skipped: 5 with suffix .txt (first: notes.txt)"
    assert tally.bulk_loss() is None
    skipped = {"with suffix .txt": {"count": 5, "first": "notes.txt"}}
    assert tally.record()["file"] == {"kept": 0, "dropped": {}, "changed": {}, "skipped": skipped}
    assert "skipped" not in tally.record()["image"]
