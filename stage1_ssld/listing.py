"""What lies at a source's path: which files, of which kind, on this machine or behind an fsspec URL."""

from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import fsspec

from shared.errors import UserError
from stage1_ssld.formats import is_image

Kind = Literal["images", "parquet", "tar", "list"]


@dataclass(frozen=True)
class Listing:
    """Files of one kind.

    Attributes:
        folder: that `files` of kind "images" are relative to; "" for a pattern, whose files are whole paths. For other kinds the folder they lie in.
        files: sorted. Of a local folder of images they are not listed here.
        filesystem: of fsspec; None on this machine.
    """

    kind: Kind
    folder: str
    files: list[str]
    filesystem: Any = None

    @property
    def local(self) -> bool:
        """Whether the files are on this machine."""
        return self.filesystem is None

    def text(self) -> str:
        """The content of a list file."""
        if self.filesystem is None:
            return Path(self.files[0]).read_text(encoding="utf-8")
        text: str = self.filesystem.cat_file(self.files[0]).decode("utf-8")
        return text


def filesystem_of(path: str) -> tuple[Any, str]:
    """(filesystem, path in it) of a URL. Raises UserError for a protocol that no installed package speaks."""
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened ({' '.join(str(error).split())[:160]})") from None
    return filesystem, inner


def list_path(path: str) -> Listing:
    """What a source's path means. Raises UserError when nothing is there, or it is none of the formats."""
    return _list_remote(path) if "://" in path else _list_local(path)


def _list_local(path: str) -> Listing:
    if "*" in path:
        return _of_pattern(path, sorted(glob(path, recursive=True)), None)
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder")
    if place.is_dir():
        for kind, suffix in (("parquet", "*.parquet"), ("tar", "*.tar")):
            files = sorted(str(file) for file in place.glob(suffix))
            if files:
                return Listing(kind, path, files)  # type: ignore[arg-type]
        return Listing("images", path, [])
    return _of_file(path, path, None)


def _list_remote(path: str) -> Listing:
    filesystem, inner = filesystem_of(path)
    try:
        if "*" in inner:
            return _of_pattern(path, sorted(filesystem.glob(inner)), filesystem)
        if not filesystem.exists(inner):
            raise UserError(f"{path}: no such file or folder")
        if filesystem.isfile(inner):
            return _of_file(path, inner, filesystem)
        found = sorted(filesystem.find(inner))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({' '.join(str(error).split())[:160]})") from None
    for kind, suffix in (("parquet", ".parquet"), ("tar", ".tar")):
        files = [file for file in found if file.endswith(suffix)]
        if files:
            return Listing(kind, inner, files, filesystem)  # type: ignore[arg-type]
    prefix = f"{inner.rstrip('/')}/"
    names = [file.removeprefix(prefix) for file in found if is_image(file)]
    if not names:
        raise UserError(f"{path}: holds no images, Parquet or tar files")
    return Listing("images", inner, names, filesystem)


def _of_file(path: str, file: str, filesystem: Any) -> Listing:
    folder = file.rpartition("/")[0] or "."
    if file.endswith(".txt"):
        return Listing("list", folder, [file], filesystem)
    if file.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")):
        raise UserError(
            f"{path}: compressed archives cannot be read in place; unpack it to a folder or to a plain .tar"
        )
    if file.endswith(".tar"):
        return Listing("tar", folder, [file], filesystem)
    return Listing("parquet", folder, [file], filesystem)


def _of_pattern(path: str, files: list[str], filesystem: Any) -> Listing:
    for kind, suffix in (("parquet", ".parquet"), ("tar", ".tar")):
        chosen = [file for file in files if file.endswith(suffix)]
        if chosen:
            return Listing(kind, chosen[0].rpartition("/")[0] or ".", chosen, filesystem)  # type: ignore[arg-type]
    images = [file for file in files if is_image(file)]
    if not images:
        raise UserError(f"{path}: no Parquet files, tar files or images match")
    return Listing("images", "", images, filesystem)


def unreadable_parquet(path: str, error: Exception) -> UserError:
    """What to tell when Arrow cannot read a file."""
    return UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:160]})")
