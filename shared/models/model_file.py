"""The model file of both stages: safetensors, with all other facts about the model as JSON in its metadata.

`kind` is one of "backbone" (a timm classifier, readable by plain timm too) or "detector". The content hash covers names, shapes, types and
bytes of all tensors, so a file can be recognized whatever its name; a second hash covers the metadata.
"""

import hashlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import atomically
from ssld.shared.models.damage import incomplete, refuse_damaged
from ssld.shared.models.downloads import PICKLE_SUFFIXES
from ssld.shared.models.metadata import NEEDED, parse_metadata

_KEY = "ssld"
_OWN_HASH = "metadata_sha256"
FORMAT = 1
_MOST_HEADER = 100_000_000  # bytes of a header that safetensors reads
_CHANGED = "its metadata do not match their hash; the file was changed or damaged"


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Call safetensors' `save_file` with a copy of weights that layers share, which it refuses; raise the OSError of a full disk."""
    places: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, on_device in tensors.items():
        tensor = on_device.cpu()  # from a GPU a copy of its own
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in places else tensor
        places.add(place)
    try:
        save_file(apart, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def save_model_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Write a model file atomically and return its content hash, which is added to the metadata as `content_sha256`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = content_hash(tensors)
    record = json.loads(json.dumps({"format": FORMAT, **metadata, "content_sha256": digest}))
    record[_OWN_HASH] = _metadata_hash(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        save_tensors(tensors, temporary, {"format": "pt", _KEY: json.dumps(record)})
        temporary.chmod(0o666 & ~_umask())  # safetensors makes it readable for its owner alone
    return digest


def _umask() -> int:
    mask = os.umask(0o022)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def read_metadata(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read the metadata of a model file; {} for a safetensors file of another program.

    Raises UserError when the file is missing, is not safetensors (a pickle is named as such), or is not of `kind`, and for metadata that are
    damaged, changed, of a wrong type or out of range.
    """
    with _open(path) as file:
        fields = file.metadata() or {}
    if _KEY not in fields:
        if any("content_sha256" in text for text in fields.values()):
            raise UserError(f"{path}: {_CHANGED}")
        return {}
    metadata = parse_metadata(fields[_KEY], path)
    if metadata.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {metadata['format']}); update this package")
    expected = metadata.pop(_OWN_HASH, None)
    if expected is not None and expected != _metadata_hash(metadata):
        raise UserError(f"{path}: {_CHANGED}")
    if kind and metadata.get("kind", kind) != kind:
        raise UserError(f"{path}: is a {metadata['kind']} file, a {kind} file is needed")
    absent = [key for key in NEEDED.get(str(kind), ()) if metadata.get(key) is None] if "kind" in metadata else []
    if absent:
        raise UserError(f"{path}: its metadata cannot be used: {absent[0]} is missing")
    return metadata


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read name -> shape of every tensor of a safetensors file, without loading the tensors."""
    with _open(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a model file, on the CPU. Raises UserError when the content hash does not match, or for a type that torch does not have."""
    with _open(path) as file:
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its tensors cannot be read ({' '.join(str(error).split())[:120]})") from None
    expected = read_metadata(path).get("content_sha256")
    if expected and content_hash(tensors) != expected:
        raise UserError(f"{path}: its tensors do not match its content hash; the file was changed or damaged")
    return tensors


def _metadata_hash(metadata: dict[str, Any]) -> str:
    """Return the SHA-256 over metadata, independent of the order of keys."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def content_hash(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of tensors, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open(path: Path) -> Any:
    if path.is_dir():
        files = [file for pattern in ("*.safetensors", "*/*.safetensors") for file in sorted(path.glob(pattern))]
        raise UserError(f"{path}: is a folder; give a file{f' in it: {files[0].relative_to(path)}' if files else ''}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    refuse_damaged(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, UnicodeError) as error:
        if looks_pickled(path):
            raise UserError(
                f"{path}: is a pickle, which can run code when opened; a .safetensors file is needed"
            ) from None
        if begins_as_safetensors(path):
            raise UserError(f"{incomplete(path)} ({error})") from None
        raise UserError(
            f"{path}: not a safetensors file; give a file of weights, such as student.safetensors or detector.safetensors ({error})"
        ) from None


def begins_as_safetensors(path: Path) -> bool:
    """Whether a file has the first bytes of a safetensors file: the length of its header in 8 bytes, and the header, JSON."""
    with path.open("rb") as file:
        start = file.read(10)
    return len(start) < 9 or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MOST_HEADER)


def is_pickle(path: Path) -> bool:
    """Whether a file of weights is a pickle: by its suffix, or by its content where the suffix is unknown."""
    return path.suffix in PICKLE_SUFFIXES or (path.suffix != ".safetensors" and looks_pickled(path))


def looks_pickled(path: Path) -> bool:
    """Whether a file is a pickle or one of torch's zipped pickles."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
        with path.open("rb") as file:
            start = file.read(2)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return len(start) == 2 and start[:1] == pickle.PROTO and start[1] <= pickle.HIGHEST_PROTOCOL
