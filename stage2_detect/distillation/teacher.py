"""The frozen teacher detector: a plain object, not a module, so that it is never part of an optimizer, average, DDP wrapper or checkpoint.

Shapes: B images, C channels, H height, W width, R RoIs of an image, N = B * R, K classes (K + 1 logits, background last).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssld.shared.distributed.ranks import on_main_rank
from ssld.shared.errors import UserError
from ssld.shared.files import spread
from ssld.shared.models.backbones import place
from ssld.shared.models.constant_outputs import refuse_constant, two_images
from ssld.shared.wording import count
from ssld.stage2_detect.data.coco import CocoData, Id
from ssld.stage2_detect.data.sizing import Sizing
from ssld.stage2_detect.detector_file import load_named
from ssld.stage2_detect.distill_config import DistillConfig
from ssld.stage2_detect.evaluation.coco_ap import coco_ap
from ssld.stage2_detect.evaluation.scoring import score
from ssld.stage2_detect.model_config import DetectorConfig
from ssld.stage2_detect.models.batch import Detections, ImageBatch
from ssld.stage2_detect.models.build import Detector
from ssld.stage2_detect.models.class_rows import permute_classes
from ssld.stage2_detect.models.dense import DenseDetector, Outputs
from ssld.stage2_detect.models.inference import for_inference
from ssld.stage2_detect.models.rcnn import RCNN
from ssld.stage2_detect.models.rpn import Proposals

_SIDE = 128  # pixels; of images that show whether it sees anything


class FrozenDetector:
    """Feature maps and class logits of a detector, without gradients and always in evaluation mode.

    It normalizes images with its own mean and std.

    Args:
        model: the detector; it is frozen for good.
        facts: description for the metadata of a student's file.

    Attributes:
        channels, strides: of its maps.
    """

    def __init__(self, model: Detector, facts: dict[str, Any] | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.facts = facts or {}
        self.channels, self.strides = model.pyramid.channels, model.pyramid.strides

    @torch.no_grad()
    def features(self, images: ImageBatch) -> list[Tensor]:
        """Compute the maps of the pyramid, P2..P6 or, of a one-stage detector, P3..P7."""
        return self.model.features(images)

    @torch.no_grad()
    def classify(self, features: Sequence[Tensor], rois_BR4: Tensor, valid_BR: Tensor) -> Tensor:
        """Compute float32 logits [N, K + 1] of the first box head for RoIs in network coordinates, from the teacher's maps."""
        assert isinstance(self.model, RCNN)
        logits_NK: Tensor = self.model.roi_heads.classify(features, rois_BR4, valid_BR)
        return logits_NK

    @torch.no_grad()
    def detect(self, features: Sequence[Tensor], images: ImageBatch) -> list[Detections]:
        """Detect objects with an R-CNN, in network coordinates, on the CPU, from the teacher's maps of the images."""
        assert isinstance(self.model, RCNN)
        return self.model.detect_network(features, images)

    @torch.no_grad()
    def refine(self, features: Sequence[Tensor], rois_BR4: Tensor, valid_BR: Tensor, sizes_B2: Tensor) -> Tensor:
        """Compute the boxes [B, R, K or 1, 4] that the box heads make of RoIs in network coordinates, from the teacher's maps."""
        assert isinstance(self.model, RCNN)
        boxes_BRD4, _ = self.model.roi_heads.score(features, Proposals(rois_BR4, valid_BR), sizes_B2)
        return boxes_BRD4

    @torch.no_grad()
    def outputs(self, features: Sequence[Tensor]) -> Outputs:
        """Compute class logits and box values of a one-stage teacher's head, from its maps."""
        assert isinstance(self.model, DenseDetector)
        outputs: Outputs = self.model.dense(features)
        return outputs


def open_teacher(
    path: Path, class_names: Sequence[str], strides: Sequence[int], *, device: torch.device, channels_last: bool
) -> FrozenDetector:
    """Open the teacher in a detector file, for a student with these classes, in their order, and strides.

    Raises:
        UserError: the file is no detector file, has other classes, or maps of other strides, or finds the same in every image.
    """
    loaded = load_named(path, "distill.teacher")
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
            f"it is a {architecture.kind} detector; a one-stage detector cannot be the teacher of an R-CNN, or the reverse"
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
    # Folded as for an evaluation: the same outputs up to rounding, in less time.
    teacher = FrozenDetector(place(for_inference(loaded.model), device, channels_last=channels_last), facts)
    _refuse_constant(teacher, path, device)
    return teacher


def _refuse_constant(teacher: FrozenDetector, path: Path, device: torch.device) -> None:
    """Raise UserError where the class logits of two images are the same, whose AP need not have been measured."""
    images = ImageBatch(two_images(_SIDE, _SIDE), torch.full((2, 2), _SIDE), torch.ones(2)).to(device)
    maps = teacher.features(images)
    if isinstance(teacher.model, DenseDetector):
        logits = teacher.outputs(maps)[0]
    else:
        whole_214 = torch.tensor([0.0, 0.0, _SIDE, _SIDE], device=device).expand(2, 1, 4)
        logits = teacher.classify(maps, whole_214, torch.ones(2, 1, dtype=torch.bool, device=device))
    refuse_constant(logits, f"distill.teacher: {path}")


class TeacherCheck:
    """Measures the teacher's AP on some images of the student's evaluation set: before training, and again to compare the student.

    Args:
        data: evaluation images; `config.check_images` of them are used.
        sizing, evaluation: sizes and options of `score`, as for the student.
    """

    def __init__(
        self, teacher: FrozenDetector, data: CocoData, sizing: Sizing, config: DistillConfig, **evaluation: Any
    ) -> None:
        chosen = spread(len(data.images), config.check_images)
        self._part = replace(data, images=[data.images[index] for index in chosen])
        self._teacher, self._sizing, self._evaluation = teacher, sizing, evaluation
        self._least = config.check_ap
        self._warned = False

    @functools.cached_property
    def _ap(self) -> float | None:
        """AP of the teacher in 0..1; None if the images have no objects; collective over all ranks."""
        metrics, _ = score(self._teacher.model, self._part, self._sizing, **self._evaluation)
        ap: float | None = metrics["AP"]
        return ap

    @property
    def _images(self) -> str:
        return f"{count(len(self._part.images), 'image')} of {self._part.file}"

    def before_training(self) -> str:
        """Return a line for the log.

        Raises:
            UserError: the teacher's AP is below `check_ap`; on every rank.
        """
        name = self._teacher.facts.get("file")
        if self._ap is None:
            return f"teacher {name}: not checked: no objects in {self._images}"
        ap = f"AP {100 * self._ap:.2f} on {self._images}"
        if self._ap < self._least:
            raise UserError(
                f"distill.teacher: {name}: {ap}, below {100 * self._least:g} (distill.check_ap {self._least:g}): "
                "it was trained on other images or at another size (resize), or barely trained; lower check_ap to accept it"
            )
        return f"teacher {name}: {ap}"

    def beside(self, student: Mapping[Id, Detections]) -> str | None:
        """Return a warning, once, if the student has reached the teacher; collective over all ranks.

        Args:
            student: detections of an evaluation of the same images by image id, on the main rank.
        """
        if self._warned:
            return None
        ids = {image.image_id for image in self._part.images}
        chosen = {key: detections for key, detections in student.items() if key in ids}
        teacher_ap, student_ap = self._ap, on_main_rank(lambda: coco_ap(self._part, chosen)["AP"], "COCO scores")
        if teacher_ap is None or student_ap is None or student_ap < teacher_ap:
            return None
        self._warned = True
        return (
            f"warning: the teacher is no better than its student: AP {100 * teacher_ap:.2f} against {100 * student_ap:.2f} on {self._images}; "
            "a student gains from a teacher that is clearly better, a wider detector that was trained longer"
        )
