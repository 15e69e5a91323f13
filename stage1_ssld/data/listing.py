"""Listing of a source's path: its files and their kind, on this machine or behind an fsspec URL."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import escape, glob
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa

from ssld.shared.errors import UserError
from ssld.shared.files import (
    IMAGE_SUFFIXES,
    decode_text,
    escaped,
    is_hidden,
    kind_of,
    list_files,
    list_images,
    looks_like_image,
    require_images,
    says_nothing,
)
from ssld.shared.tally import Tally
from ssld.shared.wording import count

Kind = Literal["images", "parquet", "tar", "list"]
_SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".tar": "tar"}
LOOKED_AT = 20_000
"""Most files whose existence is checked when a list or a manifest is opened."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")
ALL_SPLITS = "*"
"""split setting of a caller that chooses among the splits itself"""
_SPLIT = re.compile(
    r"(train|training|trainval|val|valid|validation|dev|test|testing|eval|evaluation|holdout|unlabell?ed|extra)([-_]?(set|images))?(\d{4})?",
    re.IGNORECASE,
)
"""names of folders and files that are names of splits"""


@dataclass(frozen=True)
class Listing:
    """Files of one kind.

    Attributes:
        kind: images, parquet, tar or list.
        folder: path or URL of the folder that names are relative to: the given one, or the part before the first * of a pattern.
        files: sorted paths or URLs; for kind "images" relative to the folder.
        pattern: whether a pattern matched them; class folders are then not read as labels.
        tally: counts of images, for kind "images", and of what was left out.
    """

    kind: Kind
    folder: str
    files: list[str]
    pattern: bool = False
    tally: Tally = field(default_factory=Tally)

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
    """Read a text file by its byte-order mark or as UTF-8, with other bytes as `os.fsdecode` decodes them in file names. Raises UserError if it is
    not readable as text."""
    filesystem, inner = filesystem_of(file)
    try:
        content = Path(file).read_bytes() if filesystem is None else filesystem.cat_file(inner)
        try:
            text = decode_text(content)
        except UnicodeDecodeError:
            text = content.decode("utf-8", "surrogateescape")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file}: not readable as text ({error})") from None
    if "\0" in text:
        raise UserError(f"{file}: not readable as text (it contains zero bytes); write it as UTF-8")
    return text


def list_path(path: str, split: str | None = None) -> Listing:
    """List the files of a source's path, or of its split `split`.

    Raises UserError if nothing is there, the format is unknown or mixed, or there are several splits and `split` names none of them.
    """
    if "*" in path:
        folder = _in_front_of(path, "[*]")
        if "://" not in path and not Path(folder).is_dir():  # elsewhere brackets are part of its name
            folder = _in_front_of(path, "[*?[]")
        return _of_pattern(path, folder)
    if "://" in path:
        return _list_remote(path, split)
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder")
    if not place.is_dir():
        return _of_file(path)
    tally = Tally()
    images = list_images(path, tally=tally)
    names = [name for name in os.listdir(path) if not is_hidden(name) and (place / name).is_file()]
    if not images and not _archives(names):
        names = list_files(path, tuple(_SUFFIXES))
    return _choose(path, images, _archives(names), tally, split, path) or Listing(
        "images", path, require_images(path), tally=tally
    )


def of_split(file: str, split: str) -> bool:
    """Whether a file, by its path in a data set, belongs to exactly this split: a folder has this name, or the file name is [NAME-]SPLIT[-NUMBERS],
    as in `train-00000-of-00002.parquet` and `imagenet-train-07.tar`, but not `train_extra-0.parquet`."""
    *folders, base = file.split("/")
    stem = base.partition(".")[0] if split.find(".") < 0 else base.rpartition(".")[0]
    numbers = r"([-_]\d+)?(-of-\d+)?(-[0-9a-f]{6,})?"
    return split in folders or re.fullmatch(rf"([^/]*-)?{re.escape(split)}{numbers}", stem) is not None


def _choose(
    path: str, images: list[str], archives: dict[str, list[str]], tally: Tally, split: str | None, root: str
) -> Listing | None:
    """Choose the kind of files in a folder, and the split. Names of archives are relative to `root`."""
    suffixes = list(archives)
    inside = [name for name in images if "/" in name]
    if suffixes and (inside or len(suffixes) > 1):
        contents = [f"{count(len(archives[suffix]), f'{suffix} file')}" for suffix in suffixes]
        contents += [f"{count(len(inside), 'image')} in folders (first: {escaped(inside[0])})"] if inside else []
        raise UserError(
            f"{path}: holds {' and '.join(contents)}; set path to {path.rstrip('/')}/*{suffixes[0]} to use the {suffixes[0]} files, "
            "or move them elsewhere to use the others"
        )
    if suffixes:
        suffix, files = suffixes[0], archives[suffixes[0]]
        splits = sorted({name for file in files for name in _splits_of(file)})
        if _keeps_one(path, splits, split, suffix):
            files = [file for file in files if split is None or of_split(file, split)]
        beside = Tally()
        beside.skip("file", f"images beside {suffix} files", escaped(images[0]) if images else "", len(images))
        return Listing(_SUFFIXES[suffix], path, [f"{root.rstrip('/')}/{file}" for file in sorted(files)], tally=beside)
    parted = _folders_with_splits(images)
    where, parts = next(iter(parted.items()), ("", []))
    place = f"{path.rstrip('/')}/{where}".rstrip("/")
    if len(parted) > 1 and split != ALL_SPLITS:
        raise UserError(
            f"{path}: holds the splits {', '.join(parts)} in each of {len(parted)} folders (first: {escaped(where)}); set path to "
            f"{path.rstrip('/')}/**/{parts[0]}/**/* for one of them, or to {path.rstrip('/')}/**/* for all of them, without labels"
        )
    if _keeps_one(place, parts, split, ""):
        return list_path(f"{place}/{split}")
    return Listing("images", path, images, tally=tally) if images else None


def _folders_with_splits(images: Sequence[str]) -> dict[str, list[str]]:
    """Folders that hold several splits, with the names of these: the only such folder, with all subfolders named like splits, or folders most of
    whose subfolders are, for training and otherwise."""
    below: dict[str, set[str]] = {}
    folders = {name.rpartition("/")[0] for name in images}
    for folder in folders:
        parts = folder.split("/") if folder else []
        for depth, part in enumerate(parts):
            below.setdefault("/".join(parts[:depth]), set()).add(part)
    parted = {}
    for place in sorted(below):
        named = sorted(name for name in below[place] if _SPLIT.fullmatch(name))
        training = sum(name.lower().startswith("train") for name in named)
        alone = len(named) == len(below[place]) and place == os.path.commonpath(folders)
        if len(named) > 1 and (alone or (0 < training < len(named) and 2 * len(named) > len(below[place]))):
            parted[place] = named
    return parted


def _splits_of(file: str) -> list[str]:
    """Names of splits in the path of a file."""
    words = [*file.split("/")[:-1], *re.split(r"[-.]", file.rpartition("/")[2])]
    return [word for word in words if _SPLIT.fullmatch(word) and of_split(file, word)]


def _keeps_one(path: str, splits: Sequence[str], split: str | None, suffix: str) -> bool:
    """Whether to keep one of several splits. Raises UserError if `split` names none of them."""
    if len(splits) < 2 or split == ALL_SPLITS:
        return False
    if split in splits:
        return True
    holds = f"{path}: holds the splits {', '.join(splits)}"
    if split is not None:
        raise UserError(f"{holds}, but not {split}; set split to one of them")
    every = f"{path.rstrip('/')}/**/*{suffix}"
    raise UserError(f"{holds}: set split to the one to read, or path to {every} for all of them without labels")


def _archives(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of Parquet and tar files by suffix; suffixes without files are left out."""
    by_suffix = {suffix: [name for name in names if name.lower().endswith(suffix)] for suffix in _SUFFIXES}
    return {suffix: files for suffix, files in by_suffix.items() if files}


def _list_remote(path: str, split: str | None) -> Listing:
    filesystem, inner = filesystem_of(path)
    try:
        if not filesystem.exists(inner):
            raise UserError(f"{path}: no such file or folder")
        if filesystem.isfile(inner):
            return _of_file(path)
        files = sorted(_below(inner, file) for file in filesystem.find(inner))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({' '.join(str(error).split())[:160]})") from None
    tally = Tally()
    names = [name for name in files if not is_hidden(name)]
    images = _remote_images(filesystem, inner, names, tally)
    archives = _archives(names)
    if path.startswith("hf://") and archives:  # images beside archives illustrate the page of the data set
        images = []
    listing = _choose(path, images, archives, tally, split, path)
    if listing is None:
        raise UserError(f"{path}: holds no images, Parquet or tar files")
    return listing


def _remote_images(filesystem: Any, inner: str, names: Sequence[str], tally: Tally) -> list[str]:
    """Images among remote files: by their suffix, or by their first bytes where they have none."""
    unknown = [name for name in names if says_nothing(name)]
    heads: Sequence[Any] = []
    if unknown:
        places = [f"{inner.rstrip('/')}/{name}" for name in unknown]
        heads = filesystem.cat_ranges(places, [0] * len(places), [64] * len(places), on_error="return")
    known = {
        name for name, head in zip(unknown, heads, strict=True) if isinstance(head, bytes) and looks_like_image(head)
    }
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) or name in known]
    for name in set(names) - set(images):
        if not name.lower().endswith(tuple(_SUFFIXES)):
            tally.skip("file", kind_of(name), escaped(name))
    for name in images:
        tally.keep("image", group=name.partition("/")[0] if "/" in name else None)
    return images


def _of_file(path: str) -> Listing:
    folder = path.rpartition("/")[0] or "."
    lower = path.lower()
    if "://" not in path and not Path(path).is_file():
        raise UserError(f"{path}: is neither a file nor a folder")
    if lower.endswith(".txt"):
        return Listing("list", folder, [path])
    if lower.endswith(_COMPRESSED):
        raise UserError(
            f"{path}: compressed archives cannot be read in place; unpack it to a folder or to a plain .tar"
        )
    if lower.endswith(".tar"):
        return Listing("tar", folder, [path])
    if lower.endswith((".parquet", ".pq")) or _begins_as_parquet(path):
        return Listing("parquet", folder, [path])
    suffix = os.path.splitext(path)[1]
    raise UserError(
        f"{path}: unsupported source type {suffix}; use a folder, Parquet or tar files, or a list: a .txt file with one path per line, "
        "optionally followed by a class number"
    )


def _begins_as_parquet(path: str) -> bool:
    if "://" in path:
        return "." not in path.rpartition("/")[2]
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _in_front_of(pattern: str, wildcards: str) -> str:
    """Folder of a pattern's matches: its path up to the first wildcard."""
    folder = re.split(wildcards, pattern)[0].rpartition("/")[0]
    return folder or ("/" if pattern.startswith("/") else ".")


def _of_pattern(path: str, folder: str) -> Listing:
    filesystem, inner = filesystem_of(folder)
    try:
        if filesystem is None:
            matches = glob(escape(folder) + path[len(folder) :] if path.startswith(folder) else path, recursive=True)
            files = sorted(file for file in matches if os.path.isfile(file))
        else:
            files = sorted(filesystem.glob(filesystem_of(path)[1]))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({' '.join(str(error).split())[:160]})") from None
    names = [name for name in (_below(inner, file) for file in files) if not is_hidden(name)]
    archives = _archives(names)
    if archives:
        suffix, chosen = next(iter(archives.items()))
        if len(archives) > 1:
            raise UserError(f"{path}: matches Parquet and tar files; end it in *{suffix}")
        places = [_place(folder, name) if filesystem is None else f"{folder.rstrip('/')}/{name}" for name in chosen]
        return Listing(_SUFFIXES[suffix], folder, places, pattern=True)
    tally = Tally()
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) or _is_image(filesystem, folder, name)]
    for name in set(names) - set(images):
        tally.skip("file", kind_of(name), escaped(name))
    if not images:
        raise UserError(f"{path}: no Parquet files, tar files or images match")
    tally.keep("image", len(images))
    return Listing("images", folder, images, pattern=True, tally=tally)


def _is_image(filesystem: Any, folder: str, name: str) -> bool:
    """Whether a local file without a telling suffix is an image."""
    if filesystem is not None or not says_nothing(name):
        return False
    with open(_place(folder, name), "rb") as file:
        return looks_like_image(file.read(64))


def _place(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder.rstrip('/')}/{name}"


def _below(folder: str, file: str) -> str:
    """Path of a file relative to its folder."""
    return file.removeprefix(folder.rstrip("/")).lstrip("/") if folder != "." else file


PARQUET_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError)
"""exceptions of a damaged Parquet file: Arrow's own, names that are not text, impossible sizes"""


def unreadable_parquet(path: str, error: Exception) -> UserError:
    """Make the UserError for a file that Arrow cannot read."""
    return UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:160]})")
