"""The student on the images of `data.val`: its scores, and whether training improved on its initial weights."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ssld.shared.distributed.processes import pins_memory
from ssld.shared.distributed.ranks import on_main_rank, rank, share_buffers, world_size
from ssld.shared.files import spread
from ssld.shared.training.training_state import TrainingState
from ssld.stage1_ssld.config import EVALUATION_BATCH, DistillConfig, TeachConfig
from ssld.stage1_ssld.data.loaders import ValViews, make_loader, val_batches
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.distillation.preview import has_trained_start
from ssld.stage1_ssld.distillation.student import Student
from ssld.stage1_ssld.distillation.targets import Targets
from ssld.stage1_ssld.evaluation.better_weights import (
    LEAST_IMAGES,
    MOST_IMAGES,
    Choice,
    choose_weights,
    weights,
    worse_than_start,
)
from ssld.stage1_ssld.evaluation.metrics import describe, evaluate


class Validation:
    """Measures the evaluated weights of a student (the moving average where there is one); all ranks together.

    Args:
        source: the images of `data.val`; None: nothing is measured.
        state: state of the run, whose log and metrics get the results.
        dtype: precision of the student's forward pass, by autocast.
    """

    def __init__(
        self,
        config: DistillConfig | TeachConfig,
        source: ImageSource | None,
        student: Student,
        targets: Targets,
        state: TrainingState,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._config, self._source, self._student, self._targets = config, source, student, targets
        self._state, self._device, self._dtype = state, device, dtype
        # The size of a batch must not depend on the number of ranks: the results are then the same on any number.
        self._batch_size = min(config.batch_size, EVALUATION_BATCH)

    def measure(self, step: int) -> dict[str, float]:
        """Evaluate after `step` steps, and log it: see `evaluate`; empty without images or classes.

        Raises UserError if a metric is not finite; see `TrainingState.check_metrics`.
        """
        metrics, run = self._evaluate(), self._state.run
        if metrics:
            self._state.check_metrics(step, metrics)
            run.log(f"step {step}: {describe(metrics)}")
            run.metric(step, **{f"val_{name}": value for name, value in metrics.items()})
        return metrics

    def compare_with_start(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], str | None]:
        """Compare the trained weights with the initial ones and log it; `keep_weights: better` loads the better ones.

        Args:
            step: the last step.
            metrics: those of the trained weights.

        Returns:
            The metrics of the weights that are kept, with those of the comparison, and which these are (`last`, `mean` or `start`); None, without
            images or teacher, and for a student that did not start from trained weights.
        """
        choice, run = self._choose_weights(), self._state.run
        if choice:
            if choice.which != "last":
                metrics = self.measure(step)
            metrics = metrics | {f"neighbors_{which}": share for which, share in choice.shares.items()}
        start = self._measure_start()
        if "agreement" in start:
            run.log(f"the initial weights: {describe(start)}")
            run.log_if(worse_than_start(metrics, start, batch_statistics=self._student.uses_batch_statistics()))
            metrics = metrics | {f"start_{name}": start[name] for name in ("agreement", "kl")}
        return metrics, choice.which if choice else None

    def _evaluate(self) -> dict[str, float]:
        """Return the metrics of the student as it is; empty without images or classes."""
        if self._source is None or self._targets.classes == 0:
            return {}
        net, teacher = self._student.evaluated.eval(), self._targets.teacher
        share_buffers(net)
        views = self._views(self._targets.val_labels)
        order = val_batches(range(len(views)), self._batch_size, rank(), world_size())
        with teacher.running_statistics() if teacher else nullcontext():
            metrics = evaluate(
                net,
                teacher,
                self._loader(views, order),
                device=self._device,
                dtype=self._dtype,
                on_unreadable=self._state.quarantine.add,
            )
        self._state.quarantine.write()
        return metrics

    def _choose_weights(self) -> Choice | None:
        """Compare the neighbors of images under the trained and the initial weights, and load the weights to keep; None where it is not done."""
        teacher = self._targets.teacher
        if self._source is None or teacher is None or not self._has_trained_start():
            return None
        net = self._student.evaluated.eval()
        share_buffers(net)
        start = self._student.start()
        views = self._views(None)
        order = val_batches(spread(len(views), MOST_IMAGES), self._batch_size, 0, 1)
        keeps_better = isinstance(self._config, DistillConfig) and self._config.keep_weights == "better"
        batches = partial(self._loader, views, order)
        choice = on_main_rank(lambda: choose_weights(net, start, teacher, batches, better=keeps_better), "neighbors")
        few = f"data.val: too few images to compare the student with its start (at least {LEAST_IMAGES})"
        self._state.run.log(choice.describe() if choice else few)
        if choice and choice.which != "last":
            net.net.load_state_dict(weights(choice.which, net.net.state_dict(), start))
        return choice

    def _measure_start(self) -> dict[str, float]:
        """`images`, `agreement` and `kl` of the initial weights; empty unless they are trained ones with a classifier for these classes."""
        if self._targets.teacher is None or self._student.model.new_head or not self._has_trained_start():
            return {}
        net = self._student.evaluated.net
        now = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        net.load_state_dict(self._student.start())
        try:
            return {name: value for name, value in self._evaluate().items() if name in ("images", "agreement", "kl")}
        finally:
            net.load_state_dict(now)

    def _has_trained_start(self) -> bool:
        return has_trained_start(self._config, self._student, self._targets)

    def _views(self, labels: Any) -> ValViews:
        assert self._source is not None
        data = self._config.data
        return ValViews(
            self._source,
            labels,
            image_size=data.image_size,
            val_crop=data.val_crop,
            interpolation=data.interpolation,
        )

    def _loader(self, views: ValViews, order: list[list[int]]) -> Any:
        return make_loader(views, order, workers=self._config.workers, pin_memory=pins_memory())
