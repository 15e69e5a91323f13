"""Whether a new pipeline begins with stage 1: only where it may help by what was measured, or where the user asks for it."""

from typing import Literal

from ssld.shared.wording import count

Distill = Literal["auto", "yes", "no"]
MANY = 5000
"""photos from which stage 1 is proposed for a pretrained student, with a second detector for comparison; a guess:
the largest measured pool of own photos has 989; 10,000 and 42,500 foreign ones, in a short stage 1, gained nothing"""


def proposes_stage_1(asked: Distill, backbone: str, photos: int, *, detector: bool) -> tuple[bool, str]:
    """Return whether the pipeline gets stage 1, and why, as a line for the user.

    Args:
        backbone: reference of the student; `random:NAME` has no weights of its own.
        photos: number of unlabeled photos for stage 1, which also takes the annotated ones.
        detector: whether a detector follows.
    """
    if not detector:
        return True, "stage 1 alone: without annotations there is no detector"
    if asked == "yes":
        return True, "stage 1: asked for by --distill yes; a second detector without it shows what it gains"
    if asked == "no":
        return False, "no stage 1: left out by --distill no"
    if backbone.startswith("random:"):
        return True, (
            f"stage 1 on {count(photos, 'unlabeled photo')} and the annotated ones: the student has no pretrained weights. Measured, as a "
            "mean over ten seeds: a detector of blood cells had 2 to 3 AP more than from random weights after 51 passes over its own 205 photos, or "
            "one over 42,500 others, under a teacher's features; 4 to 6 after eight under its soft labels; all that after 80 steps of the detector. "
            "After 400 steps no gain was shown. Compare the AP of the two detectors"
        )
    if photos >= MANY:
        return True, (
            f"stage 1 on {count(photos, 'unlabeled photo')}: its gain for a pretrained student is not measured at this size; "
            "compare the AP of the two detectors"
        )
    return False, (
        f"stage 1 is left out: the student has pretrained weights, and {count(photos, 'photo')} are few. Measured so far: no reliable gain, "
        "where 10, 41, 124 or 205 photos have boxes "
        "(docs/distillation.md, Pretrained students). --distill yes adds it, and a second detector without it for comparison"
    )
