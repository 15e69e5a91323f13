"""Image and video files, and folders of them: names, lists, digests that show a change; atomic writing. Does not import torch.

A file is an image if its suffix is one of an image format, or if it has no known suffix and its content is an image. Only regular files are read:
a pipe would never end. Files that a run of this project has written are not data of another run.

The digest of a folder covers names, sizes and contents, of large ones the contents of a sample: a million files are digested in seconds. Time stamps
do not matter: a copy is the same data. Folders are walked with `os.scandir`; the only cache is the caller's.
"""

import codecs
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath

from ssld.shared.errors import UserError
from ssld.shared.tally import Tally

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".jxl", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".qoi", ".tga",
)
"""suffixes of image formats; whether a file can be decoded depends on its content and on the installed Pillow, and readers count failures"""
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mpe", ".m2v", ".wmv", ".asf", ".flv", ".f4v", ".ts", ".mts", ".m2ts",
    ".vob", ".3gp", ".3g2", ".ogv", ".mxf",
)
# fmt: on
"""suffixes of video formats; .gif is added where it is animated"""
ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"\x1f\x8b\x08": "gzip",  # RFC 1952; the third byte is its only method
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "RAR",
}
"""program that packs files, by their first bytes"""


def user_cache() -> Path:
    """Return this project's folder in the user's cache: below XDG_CACHE_HOME, which is ignored if relative as its specification says, else below
    ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "ssld"


def is_pattern(path: str) -> bool:
    """Whether a path contains wildcards."""
    return re.search(r"[*?[]", path) is not None


class ImageFolder(PosixPath):
    """A path of which only images and files of images count: its digest does not cover other files."""


def ends_of(path: str) -> list[str]:
    """Return the relative paths that a path with either slash ends in, the longest first: `a/b/c`, `b/c` and `c` of `/a/b/c`."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return a short name of each path: its file name, or its path below their common folder where several paths have this file name."""
    different = dict.fromkeys(paths)
    times = Counter(map(os.path.basename, different))
    folders = [os.path.dirname(path) for path in different if times[os.path.basename(path)] > 1]
    mixed = len({os.path.isabs(path) for path in folders}) > 1
    common = os.path.commonpath(folders) if folders and not mixed else ""
    names = ((path, os.path.basename(path)) for path in different)
    return {
        path: name if times[name] == 1 else os.path.relpath(path, common) if common else path for path, name in names
    }


def is_hidden(path: str) -> bool:
    """Whether a posix path has a part that is hidden, or that file managers and operating systems create for themselves."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _LITTER for part in path.split("/")
    )


def looks_like_image(head: bytes) -> bool:
    """Whether the first 64 bytes of a file are those of an image format, also of one that the installed Pillow cannot decode."""
    return (
        head.startswith(_BEGINNINGS)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)
        or (head[:2] == b"BM" and head[14:18] in _BMP_HEADERS)
        or re.match(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s", head) is not None
    )


def says_nothing(name: str) -> bool:
    """Whether the content has to decide if a file is an image: its suffix is neither one of images nor one of other known kinds."""
    return not name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *_OTHERS, *_RAW))


def kind_of(name: str) -> str:
    """Describe the kind of a file that is left out, as the end of "3 files skipped: 3 ...": `with suffix .txt`, `without a suffix`."""
    suffix = os.path.splitext(name)[1].lower()
    return f"with suffix {suffix}" if re.fullmatch(r"\.\w{1,12}", suffix) else "without a suffix"


def list_images(
    folder: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, tally: Tally | None = None
) -> list[str]:
    """Return sorted posix paths, relative to `folder`, of all images in it and below.

    Suffixes in any case; a file without a known suffix is an image if its content is one. Links are followed. Hidden names, run directories, pipes
    and files that are not images are left out.

    Args:
        tally: counts images and files left out, by the first folder below `folder`.
    """
    tally = Tally() if tally is None else tally
    names = []
    for name, entry in _walk(folder, tally):
        lower = name.lower()
        if lower.endswith(suffixes):
            names.append(name)
        elif lower.endswith(_RAW):
            tally.drop("image", "of camera raw, to be converted", escaped(name), group=_first_folder(name))
        elif says_nothing(name) and looks_like_image(_head(entry.path)):
            names.append(name)
        else:
            tally.skip("file", kind_of(name), escaped(name))
    for group, number in Counter(map(_first_folder, names)).items():
        tally.keep("image", number, group=group)
    return sorted(names)


def require_images(folder: str | Path) -> list[str]:
    """Return `list_images`; raise `UserError` when the path is missing, is not a folder, or holds no image."""
    path, tally = Path(folder), Tally()
    if not path.exists():
        raise UserError(f"image folder {path} does not exist")
    if not path.is_dir():
        raise UserError(f"{path} is a file, expected a folder of images")
    names = list_images(path, tally=tally)
    if not names:
        reason = tally.describe() or f"looked, in all sub-folders, for {' '.join(IMAGE_SUFFIXES)}"
        raise UserError(f"no images in {path} ({reason})")
    return names


def list_folders(folder: str | Path) -> list[str]:
    """Return the sorted names of the folders directly below a folder; without hidden ones, run directories and those of programs."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not is_hidden(entry.name) and entry.is_dir() and not _is_run(os.listdir(entry.path))
        )


def list_files(folder: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return sorted posix paths, relative to `folder`, of all files in it and below with one of these suffixes, in any case; "" is every suffix.
    Links and files left out are those of `list_images`."""
    return sorted(name for name, _ in _walk(folder, Tally()) if name.lower().endswith(suffixes))


def files_digest(path: str | Path, *, without: Path | None = None) -> str:
    """Return the hex SHA-256 over (relative path, bytes) of every file in a folder that is not hidden, or of one file, and over contents: all of
    them up to `_DIGESTED` bytes, beyond that parts of files that are evenly spread.

    Of an `ImageFolder` only images, Parquet and tar files count. Moving or copying the folder as a whole keeps the digest, and so do other time
    stamps; `without` is a folder that does not count, such as the output of a run that reads the rest. Raises `UserError` for a missing path.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"{root} does not exist")
    left_out = None
    if without is not None and without.resolve().is_relative_to(root.resolve()):
        left_out = without.resolve().relative_to(root.resolve()).as_posix() + "/"
    files = [(root.name, root.stat().st_size, str(root))]
    if root.is_dir():
        files = sorted(
            (name, entry.stat().st_size, entry.path)
            for name, entry in _walk(root, Tally())
            if not (left_out and name.startswith(left_out))
            and (not isinstance(path, ImageFolder) or _is_data(name, entry))
        )
    digest = hashlib.sha256()
    for name, size, _ in files:
        digest.update(os.fsencode(name) + f"\0{size}\n".encode())
    whole = sum(size for _, size, _ in files) <= _DIGESTED
    for place in range(len(files)) if whole else spread(len(files), _SAMPLED):
        _, size, file = files[place]
        for part in _parts(file, size, whole=whole):
            digest.update(part)
    return digest.hexdigest()


def decode_text(content: bytes, encoding: str = "utf-8") -> str:
    """Decode bytes by their byte-order mark, else in `encoding`. Raises UnicodeError, and LookupError for an encoding that is unknown."""
    for mark, marked in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if content.startswith(mark):
            return content.decode(marked)
    return content.decode(encoding)


def read_text(file: Path) -> str:
    """Read a text file in UTF-8 or by its byte-order mark. Raises UserError where it cannot be read or is neither."""
    try:
        return decode_text(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not a UTF-8 text file (byte {error.start})") from None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copies(files: Iterable[Path], originals: Iterable[Path]) -> set[Path]:
    """Return those of `files` that have the content of one of `originals`, if these exist; only files of equal size are read."""
    by_size: dict[int, list[Path]] = {}
    for file in originals:
        with suppress(FileNotFoundError):
            by_size.setdefault(file.stat().st_size, []).append(file)
    digests: dict[int, set[str]] = {}
    found = set()
    for file in files:
        size = file.stat().st_size
        if size in by_size:
            if size not in digests:
                digests[size] = {file_sha256(one) for one in by_size[size]}
            if file_sha256(file) in digests[size]:
                found.add(file)
    return found


def spread(count: int, most: int, *, repeat: bool = False) -> list[int]:
    """Return up to `most` numbers, evenly spread over 0 to `count` - 1; with `repeat` exactly `most`, some of them twice where there are fewer."""
    places = most if repeat else min(count, most)
    return [place * count // places for place in range(places)]


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which replaces `path` when the block ends: a reader sees the old content or the new, never a part.

    A block that fails leaves nothing behind; a killed process may leave `.NAME.NUMBER`, with its own number, which `clear_leftovers` removes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the content first, then the name
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk names none
        raise
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


def escaped(name: str) -> str:
    """Convert a file name to text that can be printed and written: bytes that are not UTF-8 as `\\udcXX`. `unescaped` reverses it."""
    return name.encode("utf-8", "backslashreplace").decode()


def unescaped(text: str) -> str:
    """Return the file name from which `escaped` was made."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), text)


UNLISTED = "whose path has a line break or another control character, is not UTF-8, begins with #, a quote or a space, or ends with a space"
"""cause, in a `Tally`, of files for which `fits_a_list` is False"""
_BREAKING = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, halves of characters, and what else ends a line


def fits_a_list(path: str | Path) -> bool:
    """Return whether a path can be a line of a text file, which is read as paths, quoted ones and comments, and shown by terminals."""
    text = str(path)
    whole = text == text.strip() and not text.startswith(("#", '"', "'"))
    return whole and not any(unicodedata.category(one) in _BREAKING for one in text)


_DIGESTED = 1 << 28
"""largest size in bytes of a folder or file whose bytes are all digested"""
_SAMPLED, _PART = 1000, 1 << 16
_LITTER = frozenset(
    {
        "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information",
        "lost+found", "__pycache__",
    }
)  # fmt: skip
"""folders that operating systems, file servers and Python create"""
_TOOLS = (
    ".git", ".svn", ".hg", ".dvc", ".cache", ".huggingface", ".ipynb_checkpoints", ".trash", ".thumb", ".snapshot", ".venv", ".idea", ".vscode",
    ".appledouble", ".fseventsd", ".spotlight", ".temp", ".tmp", ".picasaoriginals", ".@__thumb", ".pytest_cache", ".mypy_cache", ".ruff_cache",
)  # fmt: skip
"""prefixes of hidden folders that are never meant as a class"""
_OTHERS = (
    ".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".lst", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".md", ".rst", ".html", ".htm", ".css",
    ".js", ".pdf", ".log", ".py", ".ipynb", ".sh", ".m", ".db", ".sqlite", ".pkl", ".npy", ".npz", ".mat", ".h5", ".hdf5", ".pt", ".pth", ".ckpt",
    ".onnx", ".safetensors", ".bin", ".parquet", ".arrow", ".feather", ".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".zip", ".7z", ".rar",
    ".tfrecord", ".rec", ".idx", ".lmdb", ".mdb", ".cls", ".flo", ".wav", ".mp3", ".flac", ".ogg", ".svg", ".eps", ".lock", ".cache", ".url", ".lnk",
)  # fmt: skip
"""suffixes of other files that often lie beside images; their content is not read"""
_RAW = (".cr2", ".cr3", ".nef", ".nrw", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw", ".rwl", ".3fr", ".iiq")
"""suffixes of camera raw files: TIFF decoders read the thumbnail in them"""
_BEGINNINGS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  \r\n\x87\n",
    b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL \r\n\x87\n", b"qoif",
)  # fmt: skip
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))


def _walk(folder: str | Path, tally: Tally) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Yield (posix path relative to `folder`, entry) of every regular file; hidden names and run directories are skipped, links to a parent end.

    Files that a user may miss are counted: images in hidden folders, broken links, and pipes and sockets with the suffix of an image.
    """
    root = Path(folder).stat()
    pending = [(os.fspath(folder), "", frozenset({(root.st_dev, root.st_ino)}))]
    while pending:
        place, prefix, parents = pending.pop()
        with os.scandir(place) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)  # the order is the same on every machine
        below = []
        if prefix and _is_run([entry.name for entry in listed]):
            tally.skip("folder", "written by a run", escaped(prefix.rstrip("/")))
            continue
        for entry in listed:
            name = prefix + entry.name
            if is_hidden(entry.name):
                _note_hidden(entry, name, tally)
                continue
            try:
                if entry.is_file():
                    yield name, entry
                    continue
                if not entry.is_dir():
                    if name.lower().endswith(IMAGE_SUFFIXES):
                        cause = (
                            "behind broken links"
                            if entry.is_symlink() and not os.path.exists(entry.path)
                            else "that are no files"
                        )
                        tally.drop("image", cause, escaped(name), group=_first_folder(name))
                    continue
                stat = entry.stat()
            except OSError:  # deleted during the walk
                continue
            if (stat.st_dev, stat.st_ino) not in parents:
                below.append((entry.path, f"{name}/", parents | {(stat.st_dev, stat.st_ino)}))
        pending += reversed(below)


def _note_hidden(entry: "os.DirEntry[str]", name: str, tally: Tally) -> None:
    """Count the images of a hidden folder, which may be meant as a class; a hidden image is only skipped."""
    lower = entry.name.lower()
    if not lower.startswith(".") or lower.startswith(("._", *_TOOLS)):
        return
    if entry.is_dir(follow_symlinks=False):
        inside = [
            f"{name}/{image}" for image, _ in _walk(entry.path, Tally()) if image.lower().endswith(IMAGE_SUFFIXES)
        ]
        if inside and "/" not in name:
            tally.drop("image", "in a hidden folder", escaped(min(inside)), len(inside), group=escaped(name))
        elif inside:
            tally.skip("file", "in a hidden folder", escaped(min(inside)), len(inside))
    elif lower.endswith(IMAGE_SUFFIXES):
        tally.skip("file", "hidden", escaped(name))


def _is_run(names: Iterable[str]) -> bool:
    """Whether these file names are those of a run directory of this project."""
    return {"config.yaml", "environment.json"} <= set(names)


def _is_data(name: str, entry: "os.DirEntry[str]") -> bool:
    """Whether a file contains images."""
    known = name.lower().endswith((*IMAGE_SUFFIXES, *_RAW, ".parquet", ".tar"))
    return known or (says_nothing(name) and looks_like_image(_head(entry.path)))


def _first_folder(name: str) -> str | None:
    return escaped(name.partition("/")[0]) if "/" in name else None


def _head(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(64)
    except OSError:
        return b""


def _parts(path: str, size: int, *, whole: bool) -> Iterator[bytes]:
    """Yield a file's bytes, or its beginning, middle and end; nothing of an unreadable file, which its reader will report."""
    try:
        with open(path, "rb", buffering=0) as file:
            if whole or size <= 3 * _PART:
                while block := file.read(1 << 20):
                    yield block
            else:
                for start in (0, (size - _PART) // 2, size - _PART):
                    file.seek(start)
                    yield file.read(_PART)
    except OSError:
        yield b"unreadable"
