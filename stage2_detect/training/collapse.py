"""Watches a moving teacher: that it finds objects when the burn-in ends, and that it does not lose them later.

A teacher that finds less makes its detector find less, and so on, until there are no pseudo-boxes left (open-mmlab/mmdetection#10223). The numbers
are those of the log lines, so a resumed run begins with the lines of its metrics.jsonl, and nothing is saved.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ssld.shared.errors import UserError
from ssld.stage2_detect.distill_config import MovingTeacherConfig

_ENOUGH, _ENOUGH_STEPS = 200, 10
"""unlabeled images without a pseudo-box after which the run stops, and fewest steps for that: a trial or a smoke test has fewer"""
_COUNTED = 10
"""pseudo-boxes expected in the images of a period below which it cannot show a collapse: with few of them numbers rise and fall by chance, as do
those of an untrained teacher, which begins without a burn-in; of 10 expected boxes (Poisson) fewer than 2 are found in one period of 2,000"""


class CollapseWatch:
    """Compares each period with the best ones before it: the log lines, as many together as can show a collapse.

    Args:
        config: settings, with the burn-in in steps.
        unlabeled: unlabeled images per step, over all processes.
        lines: lines of metrics.jsonl so far.
        threshold, weight: `score_threshold` and `weight` of this detector, for the messages.

    Attributes:
        healthy: whether the last period was no collapse.
    """

    def __init__(
        self,
        config: MovingTeacherConfig,
        unlabeled: int,
        lines: Iterable[Mapping[str, Any]] = (),
        threshold: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        self._config, self._unlabeled, self._threshold, self._weight = config, unlabeled, threshold, weight
        self._burn_in = self._step = int(config.burn_in)  # `_step`: that of the last line
        self._found = False  # any pseudo-box
        self._boxes = self._agreement = 0.0  # highest of a period, per image
        self._last = 0.0, 0.0  # those of the last period
        self._images, self._boxes_since, self._agreement_since = 0, 0.0, 0.0  # sums since the last period
        self.healthy = True
        for line in lines:
            self._compare(int(line["step"]), line)

    def see(self, step: int, means: Mapping[str, float], *, last: bool = False) -> str | None:
        """Take note of the averages of a log line; return a warning where a collapse begins, or at a last line without any pseudo-box.

        Args:
            means: averages since the line before; without `pseudo_boxes` in the burn-in.
            last: whether it is the last step.

        Raises:
            UserError: no pseudo-box in 200 images and 10 steps since the burn-in.
        """
        before = self.healthy
        highest = f"{self._boxes:.3g}", f"{self._agreement:.3g}"
        self._compare(step, means)
        images = (step - self._burn_in) * self._unlabeled
        enough = images >= _ENOUGH and step - self._burn_in >= _ENOUGH_STEPS
        if "pseudo_boxes" in means and not self._found and (enough or last):
            what = f"the teacher has found no object with a score of {self._threshold:g} or more in the first {images} unlabeled images"
            longer = "train again with a longer moving_teacher.burn_in, or from a detector (init)"
            if last:
                return f"warning: {what}; {longer}"
            raise UserError(
                f"moving_teacher: {what}; the same command with a lower --moving_teacher.score_threshold continues from the last checkpoint; "
                f"or {longer}"
            )
        if self.healthy or not before:
            return None
        return (
            f"warning: step {step}: the moving teacher collapses: {self._last[0]:.3g} pseudo-boxes per image after up to {highest[0]}, "
            f"agreement {self._last[1]:.3g} after up to {highest[1]}; train again with a lower moving_teacher.weight (now "
            f"{self._weight:g}) or optim.lr, or a higher moving_teacher.ema_decay, burn_in or score_threshold"
        )

    def _compare(self, step: int, line: Mapping[str, Any]) -> None:
        if "pseudo_boxes" not in line:
            return
        images, self._step = (step - self._step) * self._unlabeled, step
        self._images += images
        self._boxes_since += images * float(line["pseudo_boxes"])
        self._agreement_since += images * float(line["agreement"])
        self._found = self._found or float(line["pseudo_boxes"]) > 0
        expected = self._images * self._boxes if self._boxes else self._boxes_since
        if expected < _COUNTED:
            return
        boxes, agreement = self._last = self._boxes_since / self._images, self._agreement_since / self._images
        least = self._config.collapse
        self.healthy = not (boxes < least * self._boxes or agreement < least * self._agreement)
        self._boxes, self._agreement = max(self._boxes, boxes), max(self._agreement, agreement)
        self._images, self._boxes_since, self._agreement_since = 0, 0.0, 0.0
