"""Files of weights that are none: what a broken download leaves behind is named as such, whatever would read the file."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ssld.shared.errors import UserError
from ssld.shared.models.array_pickles import read_pickle
from ssld.shared.models.damage import damage_of
from ssld.shared.models.model_file import read_metadata
from ssld.shared.models.references import parse_reference
from ssld.shared.models.state_dicts import read_state_dict

TENSORS = {"a.weight": torch.ones(50, 50), "b.weight": torch.ones(30, 30)}
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 102502400\n"
)


def by_torch(*, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        written.writestr("model/weights.pth", by_torch(zipped=True))
    return file.getvalue()


def message(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    readers: dict[str, Callable[[Path], Any]] = {
        ".pkl": lambda path: read_pickle(path, ".pkl"),
        ".safetensors": read_metadata,
        ".pth": read_state_dict,
    }
    with pytest.raises(UserError) as caught:
        readers[file.suffix](file)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{file}: ")
    return text.removeprefix(f"{file}: ")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.pkl"])
def test_what_stands_in_the_place_of_weights(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    assert message(file, b"") == "the file is damaged or not complete (0 bytes); download it again"
    pointer = message(file, POINTER)
    assert pointer.startswith(
        f"is a Git LFS pointer ({len(POINTER)} bytes), not the weights (102502400 bytes); run git lfs pull"
    )
    assert message(file, b"\n<!DOCTYPE html><html>").startswith("is a web page (22 bytes), not weights")
    assert message(file, b'{"error": "not found"}').startswith("is a text file (22 bytes), not weights")
    assert message(file, archive()).startswith("is a zip file of model/weights.pth, not of torch; unpack it")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_other_formats_are_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    onnx = b"\x08\x08\x12\x07pytorch\x1a\x052.0.0" + bytes(200)
    assert message(file, onnx).startswith("is an ONNX file (218 bytes), not a state dict of torch; give the file of")
    assert message(file, b"\x89HDF\r\n\x1a\n" + bytes(200)).startswith(
        "is an HDF5 file, as of Keras (208 bytes), not a state"
    )
    for bytes_left in (1, 2):  # of a copy that ended at once: too few to name a format
        file.write_bytes(onnx[:bytes_left])
        assert "ONNX" not in str(damage_of(file))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as written:  # as torch.jit.save writes it
        for part in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            written.writestr(f"m/{part}", b"")
    text = message(file, content.getvalue())
    assert text.startswith("is a TorchScript program, not a state dict; keep its weights alone: python -c")
    save_file({"a": torch.zeros(2)}, file)
    length = 0x1208
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length).encode()
    file.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert damage_of(file) is None


PAGE = "\ufeff<!DOCTYPE html>\n<title>Sorry \u2013 n\u00e3o existe</title>"


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.pkl"])
def test_pages_in_any_encoding_and_packed_files_are_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        for page in (PAGE, PAGE[1:]):  # with a byte order mark, and without
            content = page.encode(encoding)
            assert message(file, content).startswith(f"is a web page ({len(content)} bytes), not weights; give"), (
                encoding
            )
    assert message(file, '\ufeff{"error": "Zugriff verweigert: ung\u00fcltig"}'.encode()).startswith("is a text file")
    weights = by_torch(zipped=True)
    for packed, kind in (
        (gzip.compress(weights), "gzip"),
        (bz2.compress(weights), "bzip2"),
        (lzma.compress(weights), "xz"),
    ):
        assert message(file, packed) == (
            f"is a {kind} archive ({len(packed):,} bytes), not weights; unpack it, and give the file of weights inside"
        )
    packed = gzip.compress(PAGE.encode())
    assert (
        message(file, packed)
        == f"is a gzip archive of a web page ({len(packed)} bytes), not weights; download it again"
    )


def test_a_length_that_looks_like_a_packed_file(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header, which may be any number."""
    file = tmp_path / "m.safetensors"
    for first in (b"\x1f\x8b\x08", b"\xff\xfe\x00"):
        length = int.from_bytes(first, "little")
        row = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        file.write_bytes(length.to_bytes(8, "little") + row.ljust(length).encode() + bytes(4))
        assert damage_of(file) is None
        assert load_file(file)["a"].tolist() == [0.0]


def test_damage_is_seen_without_reading_the_tensors(tmp_path: Path) -> None:
    whole = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.zeros(0)}, whole, metadata={"format": "pt"})
    assert damage_of(whole) is None
    content = whole.read_bytes()
    for end in (len(content) - 1, 40, 9):  # in the tensors, in the header, behind its length
        whole.write_bytes(content[:end])
        assert damage_of(whole) == f"{whole}: the file is damaged or not complete ({end} bytes); download it again"
    other = tmp_path / "notes.json"
    other.write_text("{}")
    assert damage_of(other) is None
    assert damage_of(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.pth", by_torch(zipped=True)),
        ("m.pth", by_torch(zipped=False)),
        ("m.safetensors", by_torch(zipped=True)),
        ("m.safetensors", save(TENSORS)),
        ("m.pkl", pickle.dumps({"model": {"a": np.zeros((40, 40))}})),
    ],
)
def test_a_file_that_ends_too_early(name: str, content: bytes, tmp_path: Path) -> None:
    for part in (content[: len(content) // 2], content[:-1], content[:40]):
        text = message(tmp_path / name, part)
        assert text.startswith(f"the file is damaged or not complete ({len(part):,} bytes); download it again"), text


def test_whole_files_are_read(tmp_path: Path) -> None:
    for number, zipped in enumerate((True, False)):
        file = tmp_path / f"{number}.pth"
        file.write_bytes(by_torch(zipped=zipped))
        assert read_state_dict(file)[0].keys() == TENSORS.keys()


def test_a_pointer_is_named_before_its_suffix_is_judged(tmp_path: Path) -> None:
    """Where no .pth file is taken at all, as by a student, an advice to convert this one would be wrong."""
    file = tmp_path / "m.pth"
    file.write_bytes(POINTER)
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        parse_reference(str(file), arch="resnet18", allow_pickle=False)
