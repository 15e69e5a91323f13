"""What the network in training learns from: a live teacher, a store of its answers, or labels; and the classes that follow from it.

B images, K classes, M what an answer is over: the K classes, or those of a store and one bucket for the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssld.shared.errors import UserError
from ssld.shared.models.teacher import Teacher
from ssld.shared.wording import count
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.data.batch import SoftLabels
from ssld.stage1_ssld.data.labels import labelled_classes, labels_in_classes, match_classes
from ssld.stage1_ssld.data.sources import ImageSource
from ssld.stage1_ssld.distillation.soft_label_store import SoftLabelStore, bucket_log_probs, soft_log_probs
from ssld.stage1_ssld.distillation.teachers import make_teacher

Labels = Sequence[int] | None


class Answers(NamedTuple):
    """What student and teacher say to the same views, comparable: student_BM, teacher_BM logits or log-probabilities; first_B, the teacher's first
    class."""

    student_BM: Tensor
    teacher_BM: Tensor
    first_B: Tensor


@dataclass(frozen=True)
class Guidance:
    """Where the targets of a run come from.

    Attributes:
        classes: number of classes of the network in training; class_names: their names, where anything says them.
        sources: the sources that take part; train_labels: their labels in the network's class numbers, None where they are not read.
        val_labels: the same for the validation images.
        teacher: a live one; with a store, or with labels as the objective, it only measures agreement.
        store: soft labels written before.
        learns_from_teacher: whether the soft labels are the objective.
    """

    classes: int
    class_names: list[str] | None
    sources: list[ImageSource]
    train_labels: list[Labels]
    val_labels: Labels
    teacher: Teacher | None
    store: SoftLabelStore | None
    learns_from_teacher: bool

    def answers(self, logits_BK: Tensor, pixels_BCHW: Tensor, soft: SoftLabels | None) -> Answers | None:
        """The soft labels of a batch, beside what the student says; None where labels are the objective."""
        if not self.learns_from_teacher:
            return None
        if soft is not None:
            return Answers(bucket_log_probs(logits_BK, soft), soft_log_probs(soft, self.classes), soft.classes_Bm[:, 0])
        assert self.teacher is not None
        teacher_BK = self.teacher(pixels_BCHW)
        return Answers(logits_BK, teacher_BK, teacher_BK.argmax(-1))

    def labelled_source(self, val_source: ImageSource | None) -> tuple[ImageSource, Sequence[int]] | None:
        """Images whose labels are in the classes of the network: the validation set, else the first of the training sources; None without any."""
        if val_source and self.val_labels is not None:
            return val_source, self.val_labels
        for source in self.sources:
            labels = labels_in_classes(source, self.class_names, self.classes)
            if labels is not None:
                return source, labels
        return None

    def facts(self) -> dict[str, Any] | None:
        """What a student's file says about its teacher."""
        if not self.learns_from_teacher:
            return None
        source = self.store or self.teacher
        assert source is not None
        return source.facts()


def open_guidance(
    config: DistillConfig | TeachConfig,
    sources: list[ImageSource],
    val_source: ImageSource | None,
    *,
    device: torch.device,
    log: Callable[[str], None],
) -> Guidance:
    """Load the teacher or the store and bring all labels to one order of classes.

    Raises:
        UserError: classes that do not fit together, a store of other images, views or another teacher, labels asked for where there are none.
    """
    teacher = store = None
    if isinstance(config, DistillConfig):
        store = SoftLabelStore(config.store) if config.store and config.objective == "teacher" else None
        if config.teacher:
            # Beside a store it must answer as the one that wrote it did.
            precision = store.teacher_precision if store else config.precision
            teacher = make_teacher(
                config.teacher, precision=precision, device=device, channels_last=config.channels_last
            )
    if config.objective == "labels":
        left_out = sum(source.labels is None for source in sources)
        sources, classes, names = labelled_classes(sources)
        owner = "the training images"
        if left_out:
            log(f"objective labels: {count(left_out, 'unlabelled source')} left out")
        if teacher:
            teacher.match_classes(names, classes, owner)
        wanted = True
    else:
        assert isinstance(config, DistillConfig)
        if store:
            store.match(sources, config.data)
            note = store.note()
            if note:
                log(note)
            if teacher:
                store.check_teacher(teacher)
        answers = store or teacher
        assert answers is not None
        classes, names, owner = answers.num_classes, answers.class_names, "the teacher"
        wanted = config.hard_label_weight > 0
        if wanted and all(source.labels is None for source in sources):
            raise UserError("hard_label_weight: no training source has labels; leave it at 0")
    return Guidance(
        classes=classes,
        class_names=names,
        sources=sources,
        train_labels=[match_classes(source, names, classes, owner) if wanted else None for source in sources],
        val_labels=match_classes(val_source, names, classes, owner) if val_source else None,
        teacher=teacher,
        store=store,
        learns_from_teacher=config.objective == "teacher",
    )
