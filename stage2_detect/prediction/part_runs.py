"""Runs that work through their images in parts, as a prediction and a search for photos to annotate: what a killed run has left to do, the progress
of this rank, and the account of what was read."""

from collections.abc import Iterable, Sequence

from ssld.shared.checksums import made_again
from ssld.shared.distributed.ranks import rank, wait_for_all, world_size
from ssld.shared.run_dir import RunDir
from ssld.shared.tally import Tally
from ssld.shared.training.progress import Bar, Clock
from ssld.stage2_detect.prediction.files import Parts
from ssld.stage2_detect.prediction.steps import Work
from ssld.stage2_detect.prediction.video import VideoParts


def left_to_do(run: RunDir, work: Work, parts: Parts, videos: VideoParts | None = None) -> tuple[list[int], list[str]]:
    """Return (numbers of the parts, names of the videos) that this rank has to do; logs how many images and videos are left on all ranks."""
    files = [*parts.files(), *(videos.files() if videos else [])]
    run.log(*made_again(files) if run.main else [])
    part_numbers, video_names = parts.left(), videos.left() if videos else []
    wait_for_all()  # no rank may write a part before the others have seen which are missing
    left = sum(len(parts.records[number]) for number in part_numbers) + len(video_names)
    run.log(f"{work.describe()}; {left} left to do")
    mine = slice(rank(), None, world_size())
    return part_numbers[mine], video_names[mine]


class PartProgress:
    """Progress of this rank: a bar, and lines of the log, after each part and at least every 20 seconds. The number of frames of videos is
    unknown before.

    Attributes:
        clock: of images and frames.
    """

    def __init__(self, run: RunDir, parts: Parts, numbers: Sequence[int]) -> None:
        images = sum(len(parts.records[number]) for number in numbers)
        self.clock = Clock(images)
        self._run, self._parts, self._numbers = run, parts, numbers
        self._bar = Bar(run, images, "image")

    def add(self) -> None:
        """Count an image or a frame as done."""
        self.clock.add()
        self._bar.add()
        if self.clock.due():
            self._run.log(self._describe())

    def follow(self, done: Iterable[int]) -> None:
        """Work through an iterator over the numbers of finished parts, and log each of them."""
        for finished, number in enumerate(done, 1):
            left = len(self._numbers) - finished
            self._run.log(f"part {number + 1} of {len(self._parts.records)} done, {left} left: {self._describe()}")

    def _describe(self) -> str:
        clock = self.clock
        known = (
            f"{clock.done} of {clock.total} images" if clock.done <= clock.total else f"{clock.done} images and frames"
        )
        return f"{known}, {clock.describe()}"

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def read_tally(work: Work, unreadable: Sequence[str]) -> Tally:
    """Count the files that were read, those that cannot be, and those that were not listed."""
    tally = work.tally(unreadable)
    tally.merge(work.listed, kept=False)
    return tally


def tell_read(run: RunDir, images: str, work: Work, unreadable: Sequence[str]) -> None:
    """Note in the log and the result how many files of the setting `images` were read and dropped; list unreadable ones in quarantine.txt."""
    run.tell("images", images, read_tally(work, unreadable))
    if unreadable:
        run.quarantine(unreadable)
        run.log(f"unreadable files are listed in {run.path / 'quarantine.txt'}")
