"""What the log of a stage-1 training says of its network, teacher and length before the first step."""

from collections.abc import Iterator

from ssld.shared.models.teacher import FrozenTeacher
from ssld.shared.wording import count
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.distillation.student import Student
from ssld.stage1_ssld.distillation.targets import Targets


def preview(
    config: DistillConfig | TeachConfig,
    student: Student,
    targets: Targets,
    images: int | None,
    steps: int,
    ranks: int,
) -> Iterator[str]:
    """Log lines on the network, the teacher and the length of the run."""
    trained = [parameter.numel() for parameter in student.model.parameters() if parameter.requires_grad]
    frozen = "" if config.trainable == "all" else ", only the classifier is trained"
    classes = f"{student.classes} classes" if student.classes else "no classes: only features are learned"
    yield (
        f"{student.name} ({sum(trained) / 1e6:.2f} M trained parameters, {classes}) at {config.data.image_size} px, "
        f"objective {config.objective}{frozen}"
    )
    if config.optim.layer_decay < 1:
        factors = set(student.lr_factors(config.optim.layer_decay).values())
        yield f"layer decay {config.optim.layer_decay:g}: learning-rate factors from {min(factors):.3g} to 1 in {len(factors)} layers"
    if student.heads:
        yield student.heads.describe()
    if student.unreached:
        yield f"{student.unreached / 1e6:.2f} M parameters of {student.name} are not trained: no loss term depends on them"
    teacher = config.teacher if isinstance(config, DistillConfig) else None
    if targets.store:
        yield f"soft labels from {targets.store.path}: {targets.store.facts()['reference']}, {targets.store.views} views per image"
    if teacher:
        names = ", ".join([teacher.model, *(member.model for member in teacher.ensemble)])
        only = "" if targets.learns_from_teacher and not targets.store else " (for evaluation only)"
        yield f"teacher {names}, BatchNorm by {'the batch' if teacher.batchnorm == 'batch' else 'running statistics'}{only}"
        view = (config.data.image_size, config.data.image_size)
        if isinstance(targets.teacher, FrozenTeacher) and view != (targets.teacher.size or targets.teacher.own_size):
            if targets.teacher.size:
                made_at = "prototypes" in targets.teacher.reference.metadata
                cause = (
                    "teacher.size" if teacher.size else "the size of its prototypes" if made_at else "its fixed size"
                )
                yield f"teacher sees views of {view[0]} px, resized to {_pixels(targets.teacher.size)} ({cause})"
            else:
                own = _pixels(targets.teacher.own_size)
                yield f"teacher sees views of {view[0]} px; its own size is {own} (teacher.size: own)"
        if "random:" in names:
            yield "warning: the teacher has random weights"
    if has_trained_start(config, student, targets) and not (config.data.evaluates and targets.teacher):
        missing = "data.val" if targets.teacher else "teacher"
        yield f"{missing}: not given, so the trained weights are not compared with the initial ones"
    passes = (
        f"{images} images, {steps * config.batch_size / images:.1f} passes" if images else "a stream of unknown length"
    )
    yield (
        f"{count(len(config.data.train), 'source')}, {passes}: {steps} steps of {config.batch_size} images "
        f"({count(ranks, 'process')} x {config.accumulate} accumulated)"
    )


def _pixels(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))


def has_trained_start(config: DistillConfig | TeachConfig, student: Student, targets: Targets) -> bool:
    """Whether a student under a teacher starts from trained weights, all of which are trained further."""
    return config.trainable == "all" and targets.learns_from_teacher and student.began_trained
