"""Labels and classes of users' sources: columns and label files of Parquet, lists of every spelling, names of folders. None is lost or exchanged
without a word."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssld.shared.errors import UserError
from ssld.stage1_ssld.data.batch import NO_LABEL
from ssld.stage1_ssld.data.labels import doubt_on_order, labeled_classes, labels_in_classes
from ssld.stage1_ssld.data.sources import ImageSource
from tests.stage1_ssld.data.small_sources import labeled_parquet, png, refusal, source, unlabeled_because, write

# ---- Parquet


def test_each_file_has_its_own_order_of_classes(tmp_path: Path) -> None:
    labeled_parquet(tmp_path / "0.parquet", ["apple", "banana"], [0, 1])
    labeled_parquet(tmp_path / "1.parquet", ["banana", "apple"], [0, -1, 1], pa.int32())
    images = source(tmp_path)
    assert (images.class_names, images.labels) == (["apple", "banana"], [0, 1, 1, NO_LABEL, 0])
    assert "1 file changed: 1 whose classes are matched by name" in images.tally.describe()
    labeled_parquet(tmp_path / "2.parquet", ["cherry", "apple"], [0, 1])
    assert source(tmp_path).labels == [0, 1, 1, NO_LABEL, 0, 2, 0]
    labeled_parquet(tmp_path / "3.parquet", ["cherry", "apple"], [2])
    assert "3.parquet: label 2 is outside its 2 classes" in unlabeled_because(source(tmp_path))
    labeled_parquet(tmp_path / "3.parquet", None, [0])
    assert "has class numbers without names, others have names" in unlabeled_because(source(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("{", "its Hugging Face metadata, which hold the class names, are not JSON; correct them, or set labels: none"),
        ("[" * 100_000, "are not JSON"),
        ("names: apple", "its class names are not a list of strings (apple); correct"),
        (
            'names: {"0": "apple", "1": "banana"}',
            "its class names are not a list of strings ({'0': 'apple', '1': 'banana'})",
        ),
        ("names: [0, 1]", "its class names are not a list of strings ([0, 1])"),
        ('names: ["apple", "pear", "apple"]', "two of its classes are named 'apple'"),
        ("[]", None),
        ('{"info": null}', None),
        ('{"info": {"features": []}}', None),
        ("names: []", None),
    ],
)
def test_class_names_that_cannot_be_used(metadata: str, expected: str | None, tmp_path: Path) -> None:
    if metadata.startswith("names: "):
        names = metadata.removeprefix("names: ").replace("apple", "apple" if '"' in metadata else '"apple"')
        metadata = f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'
    labeled_parquet(tmp_path / "x.parquet", None, [0, 1])
    table = pq.read_table(tmp_path / "x.parquet").replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    images = source(tmp_path / "x.parquet")
    assert images.class_names is None
    if expected:
        assert expected in unlabeled_because(images)
        assert source(tmp_path / "x.parquet", labels="none").unlabeled_because is None
    else:
        assert images.labels == [0, 1]


def test_columns_of_other_widths_are_read_together(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.int64(), pa.int32(), pa.uint8())):
        labeled_parquet(tmp_path / f"{number}.parquet", None, [number, number], kind)
    table = pq.read_table(tmp_path / "1.parquet")
    pq.write_table(table.set_column(0, "image", table["image"].cast(pa.large_binary())), tmp_path / "1.parquet")
    images = source(tmp_path)
    assert images.labels == [0, 0, 1, 1, 2, 2]
    assert all(images.read(row).shape == (3, 4, 4) for row in range(6))


def test_a_label_file_that_contradicts_itself_or_misses_most(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()] * 4, "id": [1, 2, 3, 4]}), tmp_path / "x.parquet")

    def labels(ids: list[int], classes: list[int]) -> str:
        pq.write_table(pa.table({"id": ids, "label": classes}), tmp_path / "truth.parquet")
        return str(tmp_path / "truth.parquet")

    twice = labels([1, 2, 3, 4, 2], [0, 1, 0, 1, 0])
    assert "truth.parquet: id 2 has the labels 1 and 0; keep one" in refusal(tmp_path / "x.parquet", labels=twice)
    words = labels(["1", "2"], [0, 1])  # type: ignore[list-item]
    assert "x.parquet: holds no images (4 images dropped: 4 whose id is not in truth.parquet (first: 1))" in refusal(
        tmp_path / "x.parquet", labels=words
    )
    pairs = labels([[1], [2]], [0, 1])  # type: ignore[list-item]
    assert "truth.parquet: column 'id' holds list<" in refusal(tmp_path / "x.parquet", labels=pairs)
    few = refusal(tmp_path / "x.parquet", labels=labels([1], [0]))
    assert "3 of the 4 images would be left out: 3 whose id is not in truth.parquet (first: 2)" in few
    chosen = source(tmp_path / "x.parquet", labels=labels([1, 2, 3, 4], [0, -1, -1, -1]))
    assert chosen.tally.describe() == "3 images skipped: 3 without a class in truth.parquet (first: 2)"


# ---- lists


@pytest.mark.parametrize(
    "content",
    [
        "a b/1.png 0\nc.png 1\n",
        "a b/1.png 0\r\nc.png 1\r\n",
        "# mine\n\n a b/1.png\t0\nc.png\t1",
        "a b/1.png,0\nc.png, 1\n",
        "a b\\1.png 0\nc.png 1.0\n",
        "\"a b/1.png\" 0\n'c.png' 1\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_every_spelling(tmp_path: Path, content: str, encoding: str) -> None:
    write(tmp_path, "a b/1.png", "c.png")
    (tmp_path / "list.txt").write_bytes(content.encode(encoding))
    images = source(tmp_path / "list.txt")
    assert [images.rows.name(row) for row in range(2)] == ["a b/1.png", "c.png"]
    assert images.labels == [0, 1]
    assert images.read(0).shape == (3, 4, 4)


def test_names_that_look_like_something_else(tmp_path: Path) -> None:
    names = ["my photo 7", "line\u2028sep.png", "1 2.png", os.fsdecode(b"caf\xe9.png")]
    write(tmp_path, *names)
    (tmp_path / "list.txt").write_bytes(b"\n".join(map(os.fsencode, names)))
    images = source(tmp_path / "list.txt")
    assert images.labels is None
    assert [images.read(row).shape for row in range(4)] == [(3, 4, 4)] * 4
    assert images.rows.name(3) == "caf\\udce9.png"
    (tmp_path / "list.txt").write_text("my photo 7 1\n1 2.png 0\n", encoding="utf-8")
    assert source(tmp_path / "list.txt").labels == [1, 0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a.png 0\nb.png\n", "image 2 has no class number, others have; give one to all or none"),
        ("a.png 0\nb.png \N{SUPERSCRIPT TWO}\n", "line 2: '\N{SUPERSCRIPT TWO}' is not a class number"),
        ("a.png 0,1\nb.png 1,0\n", "line 1: '0,1' is not a class number; give every image one, or none"),
        ("a.png 0 1\nb.png 1 0\n", "line 1: '0 1' is not a class number"),
        ("a.png cat\nb.png dog\n", "line 1: 'cat' is not a class number"),
        ("a.png 0.5\nb.png 1\n", "line 1: '0.5' is not a class number"),
        ("a.png 0\nb.png 0\na.png 1\n", "line 3: a.png has another class number on an earlier line; keep one"),
    ],
)
def test_labels_of_a_list_end_a_run_only_where_they_are_read(tmp_path: Path, content: str, expected: str) -> None:
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text(content, encoding="utf-8")
    images = source(tmp_path / "list.txt")
    assert [images.rows.name(row) for row in range(2)] == ["a.png", "b.png"]
    assert expected in unlabeled_because(images)
    assert source(tmp_path / "list.txt", labels="none").unlabeled_because is None


def test_numbers_without_an_image_are_named(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png", "d.png")

    def listed(*labels: int) -> ImageSource:
        lines = "".join(f"{name}.png {label}\n" for name, label in zip("abcd", labels, strict=True))
        (tmp_path / "list.txt").write_text(lines)
        return source(tmp_path / "list.txt")

    from_one = listed(1, 2, 3, 4)
    assert labeled_classes([from_one])[1] == 5
    assert from_one.tally.describe() == "1 class dropped: 1 without an image (first: class 0 of 0 to 4)"
    with pytest.raises(UserError, match=r"9,996 of the 10,000 classes would be left out: 9,996 without an image"):
        labeled_classes([listed(0, 1, 2, 9999)])
    assert labeled_classes([listed(0, 1, 2, 9999)], allow_loss=True)[1] == 10_000
    with pytest.raises(UserError, match=r"list\.txt: all images are of one class, 0: at least two classes are needed"):
        labeled_classes([listed(0, 0, 0, 0)])
    with pytest.raises(UserError, match=r"999,999,996 of the 1,000,000,000 classes would be left out"):
        labeled_classes([listed(0, 1, 2, 999_999_999)])


def test_repeated_lines_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "list.txt").write_text("a.png\na.png\n")
    assert source(tmp_path / "list.txt").tally.describe() == "1 image changed: 1 listed more than once (first: a.png)"


# ---- classes


def test_folders_that_cut_a_pool_are_no_classes_of_a_teacher_without_names(tmp_path: Path) -> None:
    pieces = source(write(tmp_path / "a", *(f"{n:02x}/1.png" for n in (0, 10, 11))))
    assert labels_in_classes(pieces, None, 3) is None
    assert labels_in_classes(pieces, ["00", "0a", "0b"], 3) == [0, 1, 2]
    classes = source(write(tmp_path / "b", "cat/1.png", "dog/1.png", "n01440764/1.png"))
    assert labels_in_classes(classes, None, 3) == [0, 1, 2]


def test_numbers_sorted_as_text_leave_a_doubt(tmp_path: Path) -> None:
    images = source(write(tmp_path / "a", *(f"{n}/1.png" for n in (1, 2, 10, 11))))
    line = doubt_on_order(images)
    assert line is not None
    assert "class 1 is folder '10'; in numeric order it would be '2'" in line
    assert doubt_on_order(source(write(tmp_path / "b", *(f"{n:02}/1.png" for n in (1, 2, 10, 11))))) is None
    assert doubt_on_order(source(write(tmp_path / "c", "1/1.png", "cat/1.png"))) is None


def test_named_classes_without_an_image_are_no_loss(tmp_path: Path) -> None:
    labeled_parquet(tmp_path / "x.parquet", list("abcdef"), [0, 1])
    images = source(tmp_path / "x.parquet")
    assert labeled_classes([images])[1] == 6
    assert images.tally.describe() == "4 classes skipped: 4 without an image (first: c)"
