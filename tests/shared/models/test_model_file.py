"""The model file: its metadata, and refused files."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssld.shared.errors import UserError
from ssld.shared.models.model_file import (
    content_hash,
    looks_pickled,
    read_metadata,
    read_shapes,
    read_tensors,
    save_model_file,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "c": torch.ones(2, dtype=torch.bfloat16)}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.safetensors"
    digest = save_model_file(path, TENSORS, {"kind": "backbone", "arch": "x", "mean": (0.5, 0.5, 0.5)})
    assert digest == content_hash(TENSORS)
    assert read_metadata(path, kind="backbone") == {
        "format": 1, "kind": "backbone", "arch": "x", "mean": [0.5, 0.5, 0.5], "content_sha256": digest
    }  # fmt: skip
    assert read_shapes(path) == {"a": (2, 3), "b": (), "c": (2,)}
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read_tensors(path).items())
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_weights_that_layers_share(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 3)
    tensors = torch.nn.Sequential(layer, torch.nn.ReLU(), layer).state_dict()
    assert len({tensor.data_ptr() for tensor in tensors.values()}) < len(tensors), "the case that is tested"
    path = tmp_path / "model.safetensors"
    assert save_model_file(path, tensors, {"kind": "backbone", "arch": "x"}) == content_hash(tensors)
    assert read_tensors(path).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(path).items())


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_it_follows_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_model_file(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, {"kind": "backbone"})
        assert os.umask(mask) == mask, "the mask is as it was"
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_hash_sees_names_shapes_types_and_values() -> None:
    base = content_hash({"a": torch.zeros(2, 3)})
    assert base == content_hash({"a": torch.zeros(3, 2).T})  # memory layout is not content
    for other in ({"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3, dtype=torch.float64)}):
        assert content_hash(other) != base
    assert content_hash({"a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])}) != base
    assert content_hash({"a": torch.zeros(1), "b": torch.ones(1)}) == content_hash(
        {"b": torch.ones(1), "a": torch.zeros(1)}
    )


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run: is a folder; give a file$"):
        read_metadata(tmp_path / "run")
    (tmp_path / "run" / "a").mkdir()
    (tmp_path / "run" / "a" / "detector.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"run: is a folder; give a file in it: a.detector\.safetensors$"):
        read_metadata(tmp_path / "run")
    (tmp_path / "run" / "student.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"run: is a folder; give a file in it: student\.safetensors$"):
        read_metadata(tmp_path / "run")
    with pytest.raises(UserError, match="no such file"):
        read_metadata(path)
    save_model_file(path, TENSORS, {"kind": "detector"})
    with pytest.raises(UserError, match="is a detector file, a backbone file is needed"):
        read_metadata(path, kind="backbone")
    save_file(TENSORS, path, metadata={"ssld": json.dumps({"kind": "backbone", "format": 2})})
    with pytest.raises(UserError, match=r"written by a newer version .format 2.; update"):
        read_metadata(path)
    save_file(TENSORS, path)
    assert read_metadata(path, kind="backbone") == {}  # by another program
    path.write_bytes(b"\x8d" + b"\x7f" * 30)  # as a pickle it would claim a text of exabytes
    with pytest.raises(
        UserError, match=r"not a safetensors file; give a file of weights, such as student\.safetensors"
    ):
        read_metadata(path)
    path.write_bytes(b"\x01\x00")
    with pytest.raises(UserError, match=r"damaged or not complete .2 bytes.; download it again"):
        read_metadata(path)


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model_file(path, TENSORS, {})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert load_file(path)  # safetensors alone does not notice
    with pytest.raises(UserError, match="do not match its content hash; the file was changed or damaged"):
        read_tensors(path)
    path.write_bytes(content[:-3])
    with pytest.raises(UserError, match="damaged or not complete"):
        read_tensors(path)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_named_as_one_and_not_opened(tmp_path: Path, protocol: int) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    plain, zipped = tmp_path / "plain.safetensors", tmp_path / "zipped.safetensors"
    plain.write_bytes(pickle.dumps(Trap(), protocol=protocol))
    torch.save({"w": torch.zeros(1)}, zipped)
    for path in (plain, zipped):
        assert looks_pickled(path)
        with pytest.raises(UserError, match="is a pickle, which can run code when opened"):
            read_metadata(path)
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "text").write_text("hello")
    assert not looks_pickled(tmp_path / "text")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssld.shared.models import model_file

    path = tmp_path / "model.safetensors"
    save_model_file(path, TENSORS, {"kind": "old"})

    def full(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_file, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_model_file(path, TENSORS, {"kind": "new"})
    assert read_metadata(path)["kind"] == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


SOUND = {
    "format": 1, "kind": "backbone", "arch": "test_resnet", "num_classes": 2, "class_names": ["a", "b"], "mean": [0.5] * 3, "std": [0.5] * 3,
    "input_size": [64, 64], "interpolation": "bilinear", "crop_pct": 0.9, "model_args": {"act_layer": "silu"}, "licence": "mit",
}  # fmt: skip
DETECTOR = {"kind": "detector", "category_ids": [1, 2], "model": {}, "resize": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": [0, 0.5, 0.5]}, "std.0: "),
        ({"std": [float("nan")] * 3}, "std.0: "),
        ({"std": [1e-300] * 3}, "std.0: "),
        ({"std": [-0.5] * 3}, "std.0: "),
        ({"std": [float("inf")] * 3}, "std.0: "),
        ({"std": ["0.5"] * 3}, "std.0: "),
        ({"std": [True] * 3}, "std.0: "),
        ({"mean": 0.5}, "mean: "),
        ({"mean": [0.5] * 4}, "mean: "),
        ({"mean": [10**400, 0, 0]}, "mean.0: "),
        ({"kind": 5}, "kind: "),
        ({"kind": ["backbone"]}, "kind: "),
        ({"format": "1"}, "format: "),
        ({"format": 0}, "format: "),
        ({"arch": ["x"]}, "arch: "),
        ({"arch": None}, "arch is missing"),
        ({"input_size": [64]}, "input_size: "),
        ({"input_size": [0, 64]}, "input_size.0: "),
        ({"input_size": [64.5, 64]}, "input_size.0: "),
        ({"input_size": [10**9, 10**9]}, "input_size.0: "),
        ({"crop_pct": 0}, "crop_pct: "),
        ({"crop_pct": "all"}, "crop_pct: "),
        ({"class_names": "ab"}, "class_names: "),
        ({"class_names": [1, 2]}, "class_names.0: "),
        ({"class_names": ["a"]}, "class_names: 1 names, but num_classes is 2"),
        ({"class_names": {"0": "a"}}, "class_names: "),
        ({"num_classes": -1}, "num_classes: "),
        ({"model_args": {"checkpoint_path": "x"}}, "'checkpoint_path' is not a model argument"),
        ({"model_args": []}, "model_args: "),
        ({"interpolation": 3}, "interpolation: "),
        ({"licence": {}}, "licence: "),
        ({"metrics": [1]}, "metrics: "),
        (DETECTOR | {"category_ids": [1]}, "category_ids: 1 ids, but 2 class_names"),
        (DETECTOR | {"category_ids": [1.5, 2]}, "category_ids.0"),
        (DETECTOR | {"model": []}, "model: "),
        (DETECTOR | {"resize": None}, "resize is missing"),
        (DETECTOR | {"class_names": None, "category_ids": []}, "class_names is missing"),
    ],
)
def test_metadata_of_a_wrong_kind(change: dict[str, object], message: str, tmp_path: Path) -> None:
    facts = SOUND | change
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"ssld": json.dumps(facts)})
    with pytest.raises(UserError) as caught:
        read_metadata(tmp_path / "m.safetensors", kind="detector" if facts["kind"] == "detector" else "backbone")
    assert str(caught.value).startswith(f"{tmp_path / 'm.safetensors'}: its metadata cannot be used: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "null", '"x"', "5", "[" * 100_000, '{"a":' * 100_000])
def test_metadata_that_are_none(text: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"ssld": text})
    with pytest.raises(UserError, match=r"m.safetensors: its metadata are not (a )?JSON"):
        read_metadata(tmp_path / "m.safetensors")


def test_changed_metadata_are_noticed(tmp_path: Path) -> None:
    """Whatever they say: a mean, a class, even under which name they are found."""
    path = tmp_path / "m.safetensors"
    save_model_file(path, TENSORS, SOUND)
    assert read_metadata(path) == SOUND | {"content_sha256": content_hash(TENSORS)}
    content = path.read_bytes()
    for old, new in ((b"0.9", b"0.8"), (b'\\"a\\"', b'\\"c\\"'), (b'"ssld"', b'"sslc"'), (b"silu", b"gelu")):
        assert old in content
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(UserError, match="its metadata do not match their hash; the file was changed or damaged"):
            read_metadata(path)
