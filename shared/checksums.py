"""Checksums of files that a run leaves for a later start or another command, and that are compared before the files are used.

`NAME.sha256` beside a file, or `SHA256SUMS` in a folder, in the form of `sha256sum`, so that `sha256sum -c` reads them too. A checksum is written
before its file takes its name: a kill in between leaves a file that does not match, which counts as not there. Torch-free.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ssld.shared.files import atomically, file_sha256, write_atomically

_OF_FOLDER = "SHA256SUMS"


def sum_file(path: Path) -> Path:
    """Return the path of a file's checksum."""
    return path.with_name(f"{path.name}.sha256")


@contextmanager
def atomically_with_sum(path: Path) -> Iterator[Path]:
    """Write as `files.atomically`, with the checksum beside the file."""
    with atomically(path) as temporary:
        yield temporary
        write_atomically(sum_file(path), f"{file_sha256(temporary)}  {path.name}\n")


def write_with_sum(path: Path, content: str | bytes) -> None:
    """Write a small file and its checksum; text as UTF-8."""
    with atomically_with_sum(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def is_sound(path: Path) -> bool:
    """Whether a file and its checksum exist and agree."""
    try:
        return _sums(sum_file(path)).get(path.name) == file_sha256(path)
    except (FileNotFoundError, IsADirectoryError):
        return False


def made_again(paths: Iterable[Path]) -> list[str]:
    """Return a line for each file that exists and does not agree with its checksum."""
    return [
        f"{path}: does not match its checksum; recomputing it" for path in paths if path.exists() and not is_sound(path)
    ]


def remove_with_sum(path: Path) -> None:
    """Delete a file, if it exists, and its checksum."""
    path.unlink(missing_ok=True)
    sum_file(path).unlink(missing_ok=True)


def write_folder_sums(folder: Path) -> None:
    """Write the checksums of all files of a folder into that folder."""
    lines = [f"{file_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / _OF_FOLDER).write_text("".join(lines), encoding="utf-8")


def damage_in_folder(folder: Path) -> str | None:
    """Describe the first damage to the files of `write_folder_sums`, as the end of a sentence about the folder; None where all are sound."""
    try:
        sums = _sums(folder / _OF_FOLDER)
    except FileNotFoundError:
        return f"{_OF_FOLDER} is missing"
    if not sums:
        return f"{_OF_FOLDER} is damaged"
    for name, digest in sums.items():
        try:
            if file_sha256(folder / name) != digest:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def _sums(file: Path) -> dict[str, str]:
    """Parse lines to name -> SHA-256; lines of another form are left out, so that their files count as damaged."""
    words = (line.split("  ", 1) for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
    return {line[1]: line[0] for line in words if len(line) == 2 and "/" not in line[1]}
