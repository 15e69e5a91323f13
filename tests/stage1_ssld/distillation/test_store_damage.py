"""A store that is unfinished, damaged or none: every rank reports the same error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ssld.stage1_ssld.distillation.soft_label_store as store_module
from ssld.shared.errors import UserError
from ssld.stage1_ssld.distillation.soft_label_store import SoftLabelStore


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*/nothing: holds no store\.json: not a store$"):
        SoftLabelStore(tmp_path / "nothing")


def test_an_unfinished_store(store_copy: Path) -> None:
    (store_copy / "store.json").unlink()
    with pytest.raises(UserError, match=r"/store: is unfinished: run ssld soft-labels again$"):
        SoftLabelStore(store_copy)


def test_a_header_that_is_not_json(store_copy: Path) -> None:
    (store_copy / "store.json").write_text("{")
    with pytest.raises(UserError, match=r"store\.json: not readable \(.*\); write the store again$"):
        SoftLabelStore(store_copy)


@pytest.mark.parametrize("content", ["[]", '{"format": 7}', "3"])
def test_a_header_of_another_format(store_copy: Path, content: str) -> None:
    (store_copy / "store.json").write_text(content)
    with pytest.raises(UserError, match=r"/store: a store of format (7|None), this version reads 2; write it again$"):
        SoftLabelStore(store_copy)


def test_a_header_that_was_edited(store_copy: Path) -> None:
    text = (store_copy / "store.json").read_text()
    (store_copy / "store.json").write_text(text.replace('"seed": 5', '"seed": 6'))
    with pytest.raises(UserError, match=r"store\.json: does not match its checksum; restore the original file"):
        SoftLabelStore(store_copy)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (Path.unlink, "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has another size than it was written with"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "does not match its checksum"),
    ],
)
def test_a_damaged_shard(store_copy: Path, damage: Callable[[Path], Any], what: str) -> None:
    file = store_copy / "shard-00001.bin"
    damage(file)
    with pytest.raises(UserError) as error:
        SoftLabelStore(store_copy)
    assert str(error.value) == (
        f"store {store_copy}: {file}: {what}; run ssld soft-labels again with the settings of {store_copy.parent} to write that file again"
    )


def test_ranks_share_the_reading_and_tell_the_same(store_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store_copy / "shard-00001.bin").unlink()
    monkeypatch.setattr(store_module, "world_size", lambda: 2)
    SoftLabelStore(store_copy)  # rank 0 reads the other two
    monkeypatch.setattr(store_module, "gather_lists", lambda result: [*result, "what rank 1 found"])
    with pytest.raises(UserError, match=r"/store: what rank 1 found; run ssld soft-labels again"):
        SoftLabelStore(store_copy)
