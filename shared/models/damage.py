"""Files of weights that are none: cut short, empty, a web page, a pointer, a packed file or another format under their name, a zip file of something
else.

Such files come from broken downloads and copies. Their content is looked at before they are read, since the readers' own errors tell of formats.
"""

import json
import re
import zipfile
import zlib
from pathlib import Path

from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import ARCHIVES
from ssld.shared.wording import some

_POINTER = b"version https://git-lfs.github.com/spec/"  # docs/spec.md of git-lfs@v3.5
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_UNICODE = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))  # byte order marks
_UNMARKED = ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
_MOST_HEADER = 100_000_000  # of safetensors, in bytes
_SUFFIXES = (".safetensors", ".pdparams", ".pth", ".pt", ".ckpt", ".pkl")
# Words in the errors of torch's readers, of pickle and of pickletools.
_CUT_SHORT = re.compile(
    "unexpected EOF|PytorchStreamReader failed|might be corrupted|Ran out of input|"
    r"not enough data|but only \d+ remain|pickle exhausted|no newline found"
)


def refuse_damaged(path: Path) -> None:
    """Raise UserError for an existing file whose first bytes, or the directory of a zip file, show that it holds no weights, or not all of them."""
    if not path.is_file():
        return  # reading it reports that it is missing
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return  # reading it reports why
    size = f"{path.stat().st_size:,} bytes"
    if not start:
        raise UserError(incomplete(path))
    if start.startswith(_POINTER):
        whole = next(
            (line[5:] for line in start.decode("ascii", "replace").splitlines() if line.startswith("size ")), "?"
        )
        raise UserError(
            f"{path}: is a Git LFS pointer ({size}), not the weights ({whole} bytes); run git lfs pull in its folder, or download the "
            "file itself"
        )
    if kind := _text_kind(start):
        raise UserError(f"{path}: is a {kind} ({size}), not weights; give the file of weights, or download it again")
    if kind := _other_format(start):
        raise UserError(
            f"{path}: is {kind} ({size}), not a state dict of torch; give the file of weights that it was made from"
        )
    kind = _packed_kind(start)
    if kind == "zip":  # as torch's own files are
        _refuse_zip(path)
    elif kind:
        inside = _text_kind(_unpacked(start)) if kind == "gzip" else None
        what = f"{kind} archive" + (f" of a {inside}" if inside else "")
        advice = "download it again" if inside else "unpack it, and give the file of weights inside"
        raise UserError(f"{path}: is a {what} ({size}), not weights; {advice}")
    if path.suffix == ".safetensors":
        _refuse_cut(path, start)


def damage_of(path: Path) -> str | None:
    """Return the message of `refuse_damaged` for a file that has the suffix of weights; None for a sound one, and for other files and folders."""
    if path.suffix not in _SUFFIXES:
        return None
    try:
        refuse_damaged(path)
    except UserError as error:
        return str(error)
    return None


def _text_kind(start: bytes) -> str | None:
    """Name the kind of text that a file begins with, in UTF-8 or UTF-16; None for anything else, such as weights."""
    mark, encoding = next((one for one in _UNICODE if start.startswith(one[0])), (b"", ""))
    encoding = encoding or next((name for first, name in _UNMARKED if start.startswith(first)), "")
    if encoding:
        start = start[len(mark) :].decode(encoding, "replace").encode(errors="replace")
    text = start.lstrip().lower()
    if text.startswith(_PAGES):
        return "web page"
    readable = all(
        byte >= 32 and byte != 127 if encoding else 32 <= byte < 127 for byte in start.translate(None, b"\r\n\t")
    )
    return "text file" if text.startswith(b"{") and readable else None


def _other_format(start: bytes) -> str | None:
    """Name a format of other programs; None for a file of safetensors, whose length may begin with the same bytes."""
    if start[8:9] == b"{":
        return None
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "an HDF5 file, as of Keras"
    # onnx.proto: ir_version is field 1, and one of producer_name, producer_version, graph and opset_import follows.
    version_and_next = len(start) > 2 and start[0] == 0x08 and 0 < start[1] < 32 and start[2] in b"\x12\x1a\x3a\x42"
    return "an ONNX file" if version_and_next else None


def _packed_kind(start: bytes) -> str | None:
    """Name the program that has packed a file; None for a file of safetensors, whose length may begin with the same bytes."""
    if start[8:9] == b"{":
        return None
    return next((name for first, name in ARCHIVES.items() if start.startswith(first)), None)


def _unpacked(start: bytes) -> bytes:
    """Return the first bytes inside the beginning of a gzip file; none if it is damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(start, 512)
    except zlib.error:
        return b""


def _refuse_cut(path: Path, start: bytes) -> None:
    """Raise UserError for a safetensors file that is shorter than its header says: 8 bytes of the header's length, the header in JSON, tensors."""
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length > _MOST_HEADER:
        return  # reading it reports what it is
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            rows = json.loads(file.read(8 + length)[8:])
        ends = [row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (*MALFORMED, OSError):
        whole = 8 + length  # at least; reading it reports what is wrong in the header
    if size < whole:
        raise UserError(incomplete(path))


def _refuse_zip(path: Path) -> None:
    """Raise UserError for a zip file without its directory, which is at its end, or one that torch has not written."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a directory of garbage may fail in any way
        raise UserError(incomplete(path)) from None
    if any(name.endswith("/constants.pkl") for name in names):
        keep = f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pth')"
        raise UserError(
            f'{path}: is a TorchScript program, not a state dict; keep its weights alone: python -c "import torch; {keep}"'
        )
    if not any(name.endswith(".pkl") for name in names):
        raise UserError(
            f"{path}: is a zip file of {some(names) or 'nothing'}, not of torch; unpack it, and give the file of weights inside"
        )


def incomplete(path: Path) -> str:
    """Return the message on a file that ends too early, or whose content has changed."""
    return f"{path}: the file is damaged or not complete ({path.stat().st_size:,} bytes); download it again"


def is_cut_short(error: Exception) -> bool:
    """Whether an error of torch's or Python's readers of pickles means a file that ends too early."""
    return isinstance(error, EOFError) or _CUT_SHORT.search(str(error)) is not None
