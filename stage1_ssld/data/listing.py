"""What lies at a source's path: which files, of which kind, on this machine or behind an fsspec URL."""

from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa

from ssld.shared.errors import UserError
from ssld.shared.files import require_images
from ssld.stage1_ssld.data.rows import is_image

Kind = Literal["images", "parquet", "tar", "list"]
_SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".tar": "tar"}
LOOKED_AT = 20_000
"""Most files looked for when a list or a manifest that names them is opened."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")


@dataclass(frozen=True)
class Listing:
    """Files of one kind.

    Attributes:
        folder: path or URL of the folder that names begin at: the one given, or what stands before the first * of a pattern.
        files: sorted; paths or URLs, of kind "images" relative to the folder.
        pattern: whether they were found by a pattern, which says nothing about their classes.
    """

    kind: Kind
    folder: str
    files: list[str]
    pattern: bool = False

    @property
    def local(self) -> bool:
        """Whether the files are on this machine."""
        return "://" not in self.folder


def filesystem_of(path: str) -> tuple[Any, str]:
    """(filesystem, path in it) of a URL; (None, path) on this machine. Raises UserError for a protocol that no installed package speaks."""
    if "://" not in path:
        return None, path
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened ({' '.join(str(error).split())[:160]})") from None
    return filesystem, inner


def read_text(file: str) -> str:
    """The content of a text file. Raises UserError when it cannot be read."""
    filesystem, inner = filesystem_of(file)
    try:
        content = Path(file).read_bytes() if filesystem is None else filesystem.cat_file(inner)
        return str(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as text ({error})") from None


def list_path(path: str) -> Listing:
    """What a source's path means. Raises UserError when nothing is there, or it is none of the formats."""
    if "*" in path:
        folder = path[: path.index("*")].rpartition("/")[0] or ("/" if path.startswith("/") else ".")
        return _of_pattern(path, folder)
    if "://" in path:
        return _list_remote(path)
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder")
    if not place.is_dir():
        return _of_file(path)
    for suffix, kind in _SUFFIXES.items():
        files = sorted(str(file) for file in place.glob(f"*{suffix}"))
        if files:
            return Listing(kind, path, files)
    return Listing("images", path, require_images(path))


def _list_remote(path: str) -> Listing:
    filesystem, inner = filesystem_of(path)
    try:
        if not filesystem.exists(inner):
            raise UserError(f"{path}: no such file or folder")
        if filesystem.isfile(inner):
            return _of_file(path)
        found = sorted(filesystem.find(inner))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({' '.join(str(error).split())[:160]})") from None
    for suffix, kind in _SUFFIXES.items():
        files = [file for file in found if file.endswith(suffix)]
        if files:
            return Listing(kind, path, [_url(path, inner, file) for file in files])
    images = [_below(inner, file) for file in found if is_image(file)]
    if not images:
        raise UserError(f"{path}: holds no images, Parquet or tar files")
    return Listing("images", path, images)


def _of_file(path: str) -> Listing:
    folder = path.rpartition("/")[0] or "."
    if path.endswith(".txt"):
        return Listing("list", folder, [path])
    if path.endswith(_COMPRESSED):
        raise UserError(
            f"{path}: compressed archives cannot be read in place; unpack it to a folder or to a plain .tar"
        )
    return Listing("tar" if path.endswith(".tar") else "parquet", folder, [path])


def _of_pattern(path: str, folder: str) -> Listing:
    filesystem, inner = filesystem_of(folder)
    try:
        files = sorted(glob(path, recursive=True) if filesystem is None else filesystem.glob(filesystem_of(path)[1]))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({' '.join(str(error).split())[:160]})") from None
    for suffix, kind in _SUFFIXES.items():
        chosen = [file for file in files if file.endswith(suffix)]
        if chosen:
            urls = chosen if filesystem is None else [_url(folder, inner, file) for file in chosen]
            return Listing(kind, folder, urls, pattern=True)
    images = [_below(inner, file) for file in files if is_image(file)]
    if not images:
        raise UserError(f"{path}: no Parquet files, tar files or images match")
    return Listing("images", folder, images, pattern=True)


def _below(folder: str, file: str) -> str:
    """The path of a file relative to its folder."""
    return file.removeprefix(folder.rstrip("/")).lstrip("/") if folder != "." else file


def _url(folder: str, inner: str, file: str) -> str:
    """The URL of a file that a filesystem lists, in the words of the folder's URL: it may name a chain of filesystems."""
    return f"{folder.rstrip('/')}/{_below(inner, file)}"


PARQUET_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError)
"""what a damaged Parquet file ends in: Arrow's own, names that are no text, sizes that no machine has"""


def unreadable_parquet(path: str, error: Exception) -> UserError:
    """What to tell when Arrow cannot read a file."""
    return UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:160]})")
