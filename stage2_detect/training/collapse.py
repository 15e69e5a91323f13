"""Watches a moving teacher: that it finds objects when the burn-in ends, and that it does not lose them later.

A teacher that finds less makes its detector find less, and so on, until there are no pseudo-boxes left (open-mmlab/mmdetection#10223). The numbers
are those of the log lines, so a resumed run begins with the lines of its metrics.jsonl, and nothing is saved.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ssld.shared.errors import UserError
from ssld.stage2_detect.distill_config import MovingTeacherConfig

_ENOUGH = 200  # unlabeled images without a pseudo-box after which the run stops


class CollapseWatch:
    """Compares each log line with the best ones before it.

    Args:
        config: settings, with the burn-in in steps.
        unlabeled: unlabeled images per step, over all processes.
        lines: lines of metrics.jsonl so far.

    Attributes:
        healthy: whether the last line was no collapse.
    """

    def __init__(
        self,
        config: MovingTeacherConfig,
        unlabeled: int,
        lines: Iterable[Mapping[str, Any]] = (),
        threshold: float = 0.0,
    ) -> None:
        self._config, self._unlabeled, self._threshold = config, unlabeled, threshold
        self._boxes = self._agreement = 0.0  # highest so far
        self.healthy = True
        for line in lines:
            self._compare(line)

    def see(self, step: int, means: Mapping[str, float], *, last: bool = False) -> str | None:
        """Take note of the averages of a log line; return a warning where a collapse begins, or at a last line without any pseudo-box.

        Args:
            means: averages since the line before; without `pseudo_boxes` in the burn-in.
            last: whether it is the last step.

        Raises:
            UserError: no pseudo-box in 200 images since the burn-in.
        """
        before = self.healthy
        highest = f"{self._boxes:.3g}", f"{self._agreement:.3g}"
        self._compare(means)
        images = (step - int(self._config.burn_in)) * self._unlabeled
        if "pseudo_boxes" in means and not self._boxes and (images >= _ENOUGH or last):
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
            f"warning: step {step}: the moving teacher collapses: {means['pseudo_boxes']:.3g} pseudo-boxes per image after up to {highest[0]}, "
            f"agreement {means['agreement']:.3g} after up to {highest[1]}; train again with a lower moving_teacher.weight (now "
            f"{self._config.weight:g}) or optim.lr, or a higher moving_teacher.ema_decay, burn_in or score_threshold"
        )

    def _compare(self, line: Mapping[str, Any]) -> None:
        if "pseudo_boxes" not in line:
            return
        boxes, agreement = float(line["pseudo_boxes"]), float(line["agreement"])
        least = self._config.collapse
        self.healthy = not (boxes < least * self._boxes or agreement < least * self._agreement)
        self._boxes, self._agreement = max(self._boxes, boxes), max(self._agreement, agreement)
