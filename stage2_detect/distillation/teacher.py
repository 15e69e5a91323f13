"""The frozen teacher detector: a plain object, not a module, so that no optimizer, average, DDP wrapper or checkpoint can ever hold it.

Shapes: B images, C channels, H height, W width, R regions of an image, N = B * R, K classes (K + 1 logits, background last).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.files import spread
from ssld.shared.models.backbones import place
from ssld.stage2_detect.data.coco import CocoData
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.detector_file import load_detector
from ssld.stage2_detect.evaluation.scoring import score
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import ImageBatch
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.models.class_rows import permute_classes
from ssld.stage2_detect.models.dense import DenseDetector, Outputs
from ssld.stage2_detect.models.inference import for_inference
from ssld.stage2_detect.models.rcnn import RCNN


class FrozenDetector:
    """Feature maps and class logits of a detector, without gradients and always in evaluation mode.

    It normalises images with its own mean and std.

    Args:
        model: the detector; it is frozen for good.
        facts: what a student's file says about it.

    Attributes:
        channels, strides: of its maps.
    """

    def __init__(self, model: Detector, facts: dict[str, Any] | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.facts = facts or {}
        self.channels, self.strides = model.pyramid.channels, model.pyramid.strides

    @torch.no_grad()
    def features(self, images: ImageBatch) -> list[Tensor]:
        """The maps of its pyramid, P2..P6 or, of a one-stage detector, P3..P7."""
        return self.model.features(images)

    @torch.no_grad()
    def classify(self, features: Sequence[Tensor], rois_BR4: Tensor, valid_BR: Tensor) -> Tensor:
        """float32 logits [N, K + 1] of its first box head for regions in network coordinates, from its own maps."""
        assert isinstance(self.model, RCNN)
        logits_NK: Tensor = self.model.roi_heads.classify(features, rois_BR4, valid_BR)
        return logits_NK

    @torch.no_grad()
    def outputs(self, features: Sequence[Tensor]) -> Outputs:
        """Raw class logits and box values of a one-stage teacher's head, from its own maps."""
        assert isinstance(self.model, DenseDetector)
        outputs: Outputs = self.model.dense(features)
        return outputs


def open_teacher(
    path: Path, class_names: Sequence[str], strides: Sequence[int], *, device: torch.device, channels_last: bool
) -> FrozenDetector:
    """The teacher in a detector file, for a student of the given classes, in their order, and strides.

    Raises:
        UserError: the file is no detector file, has other classes, or maps of other strides.
    """
    try:
        loaded = load_detector(path)
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None
    strange = sorted(set(class_names) ^ set(loaded.class_names))
    if strange:
        owner = "the training annotations" if strange[0] in class_names else "the teacher"
        raise UserError(
            f"distill.teacher: {path}: its {len(loaded.class_names)} classes are not the {len(class_names)} of the training annotations: "
            f"only {owner} has {strange[0]!r}; fine-tune it on these classes first (--init)"
        )
    architecture = DetectorConfig(**loaded.metadata["model"])
    if tuple(loaded.model.pyramid.strides) != tuple(strides):
        raise UserError(
            f"distill.teacher: {path}: its maps have strides {list(loaded.model.pyramid.strides)}, the student's {list(strides)}: "
            f"it is a {architecture.kind} detector; one-stage detectors and R-CNNs do not teach each other"
        )
    permute_classes(
        loaded.model,
        old=loaded.class_names,
        new=class_names,
        class_agnostic=architecture.roi.class_agnostic or architecture.is_cascade,
    )
    facts = {
        "file": str(path),
        "arch": loaded.metadata["arch"],
        "kind": architecture.kind,
        "licence": loaded.metadata.get("licence", "unknown"),
        "content_sha256": loaded.metadata.get("content_sha256"),
    }
    # Folded as for an evaluation: the same answers but for rounding, in less time.
    return FrozenDetector(place(for_inference(loaded.model), device, channels_last=channels_last), facts)


def check_teacher(
    teacher: FrozenDetector,
    data: CocoData,
    sizing: Sizing,
    *,
    images: int,
    least: float,
    **evaluation: Any,
) -> str:
    """A line on how well the teacher detects in `images` of an evaluation set; sizes and options of `score` are as for the student.

    Raises UserError when its AP (0..1) is below `least`; on every rank alike.
    """
    chosen = spread(len(data.images), images)
    part = replace(data, images=[data.images[index] for index in chosen])
    metrics, _ = score(teacher.model, part, sizing, **evaluation)
    ap = metrics["AP"] or 0.0
    where = f"on {len(chosen)} images of {data.file}"
    if ap < least:
        raise UserError(
            f"distill.teacher: {teacher.facts.get('file')}: AP {100 * ap:.2f} {where}, below {100 * least:g} (distill.check_ap {least:g}): "
            "it was trained on other images or at another size (resize), or hardly at all; a lower check_ap lets it pass"
        )
    return f"teacher {teacher.facts.get('file')}: AP {100 * ap:.2f} {where}"
