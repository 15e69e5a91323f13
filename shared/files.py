"""Image and video files, and folders of them: names, lists, digests that tell of a change; writing whole or not at all. Torch-free, for config code.

The digest of a folder covers names, sizes and modification times, not contents: a million files are digested in seconds, and a changed picture is
noticed unless somebody resets its time stamp on purpose. Folders are walked with `os.scandir`; the only cache is the caller's.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ssld.shared.errors import UserError

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".jxl", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".qoi", ".tga",
)
"""names that say "image"; whether one can be decoded is for its content, and for the Pillow at hand, to say: who reads them counts what cannot be"""
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".m2v", ".wmv", ".asf", ".flv", ".f4v", ".ts", ".mts", ".m2ts",
    ".vob", ".3gp", ".3g2", ".ogv", ".mxf",
)
# fmt: on
"""beside them .gif, where it moves"""


def is_pattern(path: str) -> bool:
    """Whether a path has wildcards."""
    return re.search(r"[*?[]", path) is not None


def list_images(folder: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Sorted posix paths, relative to `folder`, of all images in it and below; suffixes in any case, hidden names
    skipped, links followed."""
    return sorted(name for name, _ in _walk(folder) if name.lower().endswith(suffixes))


def require_images(folder: str | Path) -> list[str]:
    """`list_images`, or a `UserError` when the path is missing, is not a folder, or holds no image."""
    path = Path(folder)
    if not path.exists():
        raise UserError(f"image folder {path} does not exist")
    if not path.is_dir():
        raise UserError(f"{path} is a file, expected a folder of images")
    names = list_images(path)
    if not names:
        raise UserError(f"no images in {path} (looked, in all sub-folders, for {' '.join(IMAGE_SUFFIXES)})")
    return names


def files_digest(path: str | Path) -> str:
    """Hex SHA-256 over (relative path, bytes, mtime in ns) of every file in a folder that is not hidden, or of one
    file.

    Moving the folder as a whole keeps the digest. Raises `UserError` for a missing path.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"{root} does not exist")
    entries = sorted(_walk(root)) if root.is_dir() else [(root.name, root.stat())]
    digest = hashlib.sha256()
    for name, stat in entries:
        digest.update(os.fsencode(name) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def spread(count: int, most: int, *, repeat: bool = False) -> list[int]:
    """Up to `most` numbers, evenly spread over 0 to `count` - 1; with `repeat` exactly `most`, some of them twice where there are fewer."""
    places = most if repeat else min(count, most)
    return [place * count // places for place in range(places)]


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which takes its place when the block ends: a reader sees the old content or the new, never a part.

    A block that fails leaves nothing behind; a killed process may leave `.NAME.NUMBER`, with its own number, which `clear_leftovers` removes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the content first, then the name
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(files: Iterable[Path]) -> None:
    """Delete those of `files` that a killed process was writing `atomically`."""
    for file in files:
        if file.name.startswith(".") and file.suffix[1:].isdigit() and file.is_file():
            file.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all; text as UTF-8."""
    with atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _walk(folder: str | Path) -> Iterator[tuple[str, os.stat_result]]:
    """(posix path relative to `folder`, stat) of every file; broken links and hidden names are skipped, a link to a
    parent ends there."""
    root = Path(folder).stat()
    pending = [(os.fspath(folder), "", frozenset({(root.st_dev, root.st_ino)}))]
    while pending:
        place, prefix, parents = pending.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    stat = entry.stat()
                    is_folder = entry.is_dir()
                except OSError:  # a broken link, or a file that went away while we walked
                    continue
                if not is_folder:
                    yield prefix + entry.name, stat
                elif (stat.st_dev, stat.st_ino) not in parents:
                    pending.append((entry.path, f"{prefix}{entry.name}/", parents | {(stat.st_dev, stat.st_ino)}))
