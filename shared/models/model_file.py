"""The one model file of both stages: safetensors, with everything else about the model as JSON in its metadata.

`kind` says what it is: "backbone" (a timm classifier, readable by plain timm too) or "detector". The content hash covers names, shapes, types and
bytes of all tensors, so a file can be recognised whatever its name.
"""

import hashlib
import json
import os
import pickletools
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

_KEY = "ssld"
FORMAT = 1


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file`, with a full disk as the OSError it is."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def save_model_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Write a model file atomically and return its content hash, which is added to the metadata as `content_sha256`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = content_hash(tensors)
    record = {"format": FORMAT, **metadata, "content_sha256": digest}
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
    """The metadata of a model file; {} for a safetensors file that another program wrote.

    Raises UserError when the file is missing, is not safetensors (a pickle is named as such), or is not of `kind`.
    """
    with _open(path) as file:
        metadata = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    if kind and metadata.get("kind", kind) != kind:
        raise UserError(f"{path}: is a {metadata['kind']} file, a {kind} file is needed here")
    if metadata.get("format", FORMAT) > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {metadata['format']}); update this package")
    return dict(metadata)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file, without loading any."""
    with _open(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a model file, on the CPU. Raises UserError when the content hash does not match."""
    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = read_metadata(path).get("content_sha256")
    if expected and content_hash(tensors) != expected:
        raise UserError(f"{path}: its tensors do not match its content hash; the file was changed or damaged")
    return tensors


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open(path: Path) -> Any:
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        raise UserError(f"{path}: is a folder; give a file{f' in it: {files[0]}' if files else ''}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if looks_pickled(path):
            raise UserError(
                f"{path}: is a pickle, which can run code when opened; a .safetensors file is needed"
            ) from None
        raise UserError(f"{path}: not a safetensors file ({error})") from None


def looks_pickled(path: Path) -> bool:
    """Whether a file is a pickle or one of torch's zipped pickles."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    try:
        with path.open("rb") as file:
            return next(pickletools.genops(file))[0].name == "PROTO"
    except (ValueError, StopIteration, OSError):
        return False
