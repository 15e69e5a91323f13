"""Images that cannot be read are skipped, counted, listed in quarantine.txt; too many of them end the run."""

import sys
from collections.abc import Iterable
from pathlib import Path

from ssld.shared.distributed.ranks import gather_lists
from ssld.shared.errors import UserError
from ssld.shared.images import UnreadableImage, decode_image
from ssld.shared.run_dir import RunDir
from ssld.shared.wording import count, printable

_JUDGED_AFTER, _TOO_MANY = 1000, 0.01
_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))  # bytes of names that are not UTF-8, which the file keeps


class Quarantine:
    """Unreadable images of a run over `images` distinct files; None for a stream of unknown length.

    A run fails when more than one and more than 1 % of the distinct files it has read are unreadable, judged after 1,000 files or a whole pass.
    """

    def __init__(self, run: RunDir, images: int | None) -> None:
        self._run, self._images = run, sys.maxsize if images is None else images
        self._known = set(run.quarantined())
        self._new: list[str] = []

    def add(self, locations: Iterable[str]) -> None:
        """Add the locations of images that this rank could not read."""
        self._new += [printable(one, keep=_BYTES) for one in locations]  # the list has one on each line

    def write(self) -> None:
        """Update the list, all ranks together; call it before a checkpoint, because a resumed run does not read these images again."""
        new = set(gather_lists(self._new)) - self._known
        self._new = []
        if new:
            self._known |= new
            self._run.quarantine(self._known)
            self._run.log(
                f"{count(len(self._known), 'unreadable image')}, see {self._run.path / 'quarantine.txt'}; last: {_with_reason(max(new))}"
            )

    def judge(self, images_seen: int) -> None:
        """Write the list and raise UserError if it is too long; all ranks together, after `images_seen` training images of the whole run."""
        self.write()
        read = min(images_seen, self._images)
        enough = read >= min(_JUDGED_AFTER, self._images)
        if enough and len(self._known) > 1 and len(self._known) > _TOO_MANY * read:
            raise UserError(
                f"{len(self._known)} of {read} images cannot be read, listed in {self._run.path / 'quarantine.txt'}; "
                f"fix or remove them (first: {_with_reason(min(self._known))})"
            )


def _with_reason(location: str) -> str:
    """Add why an image cannot be read; of one inside a packed file only its location is said."""
    try:
        if Path(location).is_file():
            decode_image(location)
    except UnreadableImage as error:
        return f"{location}: {error.reason}"
    except OSError:  # the location is longer than a path may be
        pass
    return location
