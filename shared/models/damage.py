"""Files of weights that are none: cut short, empty, a web page or a pointer under their name, a zip file of something else.

Such files come from broken downloads and copies. Their content is looked at before they are read, since the readers' own errors tell of formats.
"""

import json
import re
import zipfile
from pathlib import Path

from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.wording import some

_POINTER = b"version https://git-lfs.github.com/spec/"  # docs/spec.md of git-lfs@v3.5
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_ZIP = b"PK\x03\x04"
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
    text = start.lstrip().lower()
    if text.startswith(_PAGES) or (
        text.startswith(b"{") and all(32 <= byte < 127 or byte in b"\r\n\t" for byte in start)
    ):
        kind = "web page" if text.startswith(b"<") else "text file"
        raise UserError(f"{path}: is a {kind} ({size}), not weights; give the file of weights, or download it again")
    if start.startswith(_ZIP):
        _refuse_zip(path)
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
