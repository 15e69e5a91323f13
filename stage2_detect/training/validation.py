"""The detector in training on the evaluation images: its AP, its training losses if requested, and whether it has reached its teacher.

Legend: B images of a batch, G objects (padded to the largest number in the batch).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssld.shared.distributed.ranks import ONE_RANK, for_sums, gather_lists, rank, share_buffers, world_size
from ssld.shared.images import stable_seed
from ssld.shared.training.training_state import TrainingState
from ssld.stage2_detect.data.coco import MIN_SIDE, CocoData, CocoImage, Id
from ssld.stage2_detect.data.loaders import eval_loader, masks_of
from ssld.stage2_detect.data.padding import pad_targets
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.data.training_data import TrainingData
from ssld.stage2_detect.data.views import view_boxes
from ssld.stage2_detect.distillation.teacher import TeacherCheck
from ssld.stage2_detect.evaluation.scoring import describe, score
from ssld.stage2_detect.models.batch import Detections, ImageBatch, Targets
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.training.trained_detector import TrainedDetector


class Validation:
    """Measures the evaluated weights of a detector (the moving average where there is one); all ranks together.

    Args:
        data: the images of the run; without evaluation images nothing is measured.
        teacher_check: compares the detector with its teacher; None without a teacher, or where it is not checked.
        batch_size: images per process and forward pass.
        dtype: precision of the forward pass, by autocast.

    Attributes:
        detections: those of the last evaluation by image id, on the main rank.
    """

    def __init__(
        self,
        trained: TrainedDetector,
        data: TrainingData,
        sizing: Sizing,
        teacher_check: TeacherCheck | None,
        state: TrainingState,
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._trained, self._data, self._sizing, self._teacher_check = trained, data, sizing, teacher_check
        self._state = state
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
            "dtype": dtype,
        }
        self.detections: dict[Id, Detections] = {}

    def measure(self, step: int) -> dict[str, Any]:
        """Evaluate after `step` steps, and log it; return the metrics of `score` and the losses, empty without evaluation images.

        Raises UserError if a metric is not finite; see `TrainingState.check_metrics`.
        """
        data, run, net = self._data, self._state.run, self._trained.evaluated
        if data.val is None:
            return {}
        run.log(f"step {step}: evaluating {len(data.val.images)} images")
        share_buffers(net)
        metrics, self.detections = score(net, data.val, self._sizing, log=run.log, **self._options)
        losses = validation_losses(net, data.val_objects, self._sizing, **self._options) if data.val_objects else {}
        self._state.check_metrics(step, metrics | losses)
        values = [describe(metrics), *(f"{name} {value:.4f}" for name, value in losses.items())]
        run.log(f"step {step}: {', '.join(values)}")
        if self._teacher_check:
            run.log_if(self._teacher_check.beside(self.detections))
        metrics |= losses
        numbers = {f"val_{name}": value for name, value in metrics.items() if not name.startswith("per_class")}
        run.metric(step, **numbers)
        return metrics


@torch.no_grad()
def validation_losses(
    model: Detector,
    data: CocoData,
    sizing: Sizing,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Return the mean over the images of every loss and of their sum, `loss`, equal on every rank.

    The model runs in evaluation mode, and stays in it: running statistics, no dropout, proposals as in evaluation. The sampling of anchors and
    RoIs is equal at every call. `data` must be read with `training=True`, so that crowd regions are not objects.
    """
    loader = eval_loader(data, sizing, batch_size=batch_size, rank=rank(), ranks=world_size(), workers=workers)
    model.eval()
    sums: dict[str, Tensor] = {}
    for images, records in loader:
        assert isinstance(images, ImageBatch), "one view per image"
        on_device, targets = images.to(device, non_blocking=True), targets_of(records, sizing).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            # Normalized by this rank's counts, since ranks may have different numbers of batches.
            losses, _ = model.losses(model.features(on_device), on_device.sizes_B2, targets, ONE_RANK)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + for_sums(loss) * len(records)
    parts = gather_lists([{name: value.item() for name, value in sums.items()}])
    names = list(dict.fromkeys(name for part in parts for name in part))
    means = {name: sum(part.get(name, 0.0) for part in parts) / len(data.images) for name in names}
    return {"loss": sum(means.values()), **means}


def targets_of(records: list[CocoImage], sizing: Sizing) -> Targets:
    """Return the objects of evaluation images in the views of `eval_loader`; sampling seeds depend on the image only."""
    objects, masks = [], []
    for record in records:
        view = sizing.view(record.height, record.width)
        boxes_N4 = view_boxes(record.boxes_N4, view)
        sound_N = ((boxes_N4[:, 2:] - boxes_N4[:, :2]) > MIN_SIDE).all(1)
        objects.append((boxes_N4[sound_N], record.labels_N[sound_N]))
        masks.append(masks_of(record, view, np.flatnonzero(sound_N)))
    targets = pad_targets(objects, [stable_seed("validation", record.image_id) for record in records])
    with_masks = any(record.segmentations is not None for record in records)
    return replace(targets, masks=tuple(masks) if with_masks else None)
