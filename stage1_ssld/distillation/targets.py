"""Training targets: a live teacher, a store of soft labels, or human labels; and the resulting classes of the network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.teacher import Teacher, TeacherFeatures
from ssld.shared.wording import count
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.data.labels import are_prototypes, labeled_classes, match_classes
from ssld.stage1_ssld.data.loaders import Labels
from ssld.stage1_ssld.data.soft_labels import SoftLabels
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.data_config import LossConfig
from ssld.stage1_ssld.distillation.soft_label_store import SoftLabelStore
from ssld.stage1_ssld.distillation.teacher import make_teacher


@dataclass(frozen=True)
class Targets:
    """Sources of the training targets of a run.

    Attributes:
        classes: number of classes of the trained network, 0 where nothing trains a classifier.
        class_names: names of the classes; None where unknown.
        sources: training sources in use.
        train_labels: per source, its labels as class numbers of the network; None where labels are not read.
        val_labels: the same for the validation images.
        teacher: live teacher; with a store, or with labels as the objective, it only measures agreement.
        store: stored soft labels.
        learns_from_teacher: whether the objective is the teacher, not labels.
        features: loss terms that compare features.
        soft: whether any loss term compares logits.
    """

    classes: int
    class_names: list[str] | None
    sources: list[ImageSource]
    train_labels: list[Labels]
    val_labels: Labels
    teacher: Teacher | None
    store: SoftLabelStore | None
    learns_from_teacher: bool
    features: tuple[LossConfig, ...]
    soft: bool

    def for_batch(
        self, pixels_BCHW: Tensor, stored: SoftLabels | None
    ) -> tuple[SoftLabels | None, TeacherFeatures | None]:
        """Return the soft labels of a batch, from the store or the live teacher, and the teacher's features; None for what no loss term needs.

        Args:
            pixels_BCHW: the views that the student sees, 0..255.
            stored: soft labels that the loader read from the store.
        """
        if not self.learns_from_teacher:
            return None, None
        if stored is not None:
            return stored, None
        assert self.teacher is not None
        if not self.features:
            return SoftLabels(self.teacher(pixels_BCHW)), None
        maps = any(term.loss.compares == "spatial" for term in self.features)
        features = self.teacher.features(pixels_BCHW, maps=maps)
        return SoftLabels(features.logits_BK) if self.soft and features.logits_BK is not None else None, features

    def facts(self) -> dict[str, Any] | None:
        """Teacher metadata for the student's file; None where labels are the objective."""
        if not self.learns_from_teacher:
            return None
        source = self.store or self.teacher
        assert source is not None
        return source.facts()


def open_targets(
    config: DistillConfig | TeachConfig,
    sources: list[ImageSource],
    val_source: ImageSource | None,
    *,
    device: torch.device,
    log: Callable[[str], None],
) -> Targets:
    """Load the teacher or the store and map all labels to one class order.

    Raises:
        UserError: classes that do not match, a store of other images, other views or another teacher, missing labels.
    """
    teacher = store = None
    features: tuple[LossConfig, ...] = ()
    soft = False
    if isinstance(config, DistillConfig):
        if config.objective == "teacher":
            features = tuple(term for term in config.losses if term.of_features)
            soft = len(features) < len(config.losses)
        store = SoftLabelStore(config.store) if config.store and config.objective == "teacher" else None
        if config.teacher:
            # The store was written at this precision, and check_teacher compares logits with it.
            precision = store.teacher_precision if store else config.precision
            teacher = make_teacher(
                config.teacher,
                precision=precision,
                device=device,
                channels_last=config.channels_last,
                classes=soft or config.objective == "labels",
            )
    if config.objective == "labels":
        left_out = sum(source.labels is None for source in sources)
        sources, classes, names = labeled_classes(sources, allow_loss=config.data.allow_loss)
        owner = "the training images"
        if left_out:
            log(f"objective labels: {count(left_out, 'unlabeled source')} left out")
        if teacher:
            teacher.match_classes(names, classes, owner)
        needs_labels = True
    else:
        assert isinstance(config, DistillConfig)
        if store:
            store.match(sources, config.data)
            for note in store.notes():
                log(note)
            if teacher:
                store.check_teacher(teacher)
        taught_by = store or teacher
        assert taught_by is not None
        needs_labels = config.hard_label_weight > 0
        if needs_labels:
            _check_labels_beside(taught_by, sources)
        classes, names, owner = taught_by.num_classes, taught_by.class_names, "the teacher"
        if not config.learns_classes:
            classes, names = 0, None
    return Targets(
        classes=classes,
        class_names=names,
        sources=sources,
        train_labels=[match_classes(source, names, classes, owner) if needs_labels else None for source in sources],
        val_labels=match_classes(val_source, names, classes, owner) if val_source and classes else None,
        teacher=teacher,
        store=store,
        learns_from_teacher=config.objective == "teacher",
        features=features,
        soft=soft,
    )


def _check_labels_beside(taught_by: SoftLabelStore | Teacher, sources: Sequence[ImageSource]) -> None:
    """Raise UserError where human labels cannot be learned beside a teacher's soft labels (`hard_label_weight`)."""
    if taught_by.num_classes < 2:
        raise UserError(
            f"hard_label_weight: {taught_by.facts()['reference']} has no classes that labels could belong to; leave it at 0"
        )
    if all(source.labels is None for source in sources):
        raise UserError("hard_label_weight: no training source has labels; leave it at 0")
    if are_prototypes(taught_by.class_names):
        raise UserError(
            "hard_label_weight: the teacher's classes are prototypes, which no human label names; leave it at 0"
        )
