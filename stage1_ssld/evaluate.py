"""Evaluate a backbone file: top-1 and top-5 of it and of a teacher, their agreement and KL.

python stage1_ssld/evaluate.py --model runs/ssld/student.safetensors --data.path images/val --output runs/ssld_val
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shared.command import run_command
from shared.errors import UserError
from stage1_ssld.config import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(EvaluateConfig, evaluate_backbone, argv, program="evaluate.py")


def evaluate_backbone(config: EvaluateConfig) -> None:
    """Evaluate the file that `config` names and write result.json.

    Raises UserError for what does not fit together, and when more than one and more than 1 % of the images cannot be read; those are listed in
    quarantine.txt.
    """
    import torch

    from shared.backbones import create_classifier, parse_reference
    from shared.processes import DTYPES, uses_gpu
    from shared.quarantine import Quarantine
    from shared.run_dir import RunDir
    from shared.teacher import FrozenTeacher
    from stage1_ssld.data import ValViews, make_loader, val_batches
    from stage1_ssld.labels import match_classes
    from stage1_ssld.metrics import describe, evaluate
    from stage1_ssld.sources import ImageSource

    reference = parse_reference(str(config.model))
    source = ImageSource(config.data, 0)
    on_gpu = uses_gpu(config.device)
    device = torch.device("cuda" if on_gpu else "cpu")
    run = RunDir(config, "evaluate")
    if run.status == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    student, inputs = create_classifier(reference)
    student.to(device).eval()
    teacher = (
        FrozenTeacher(
            config.teacher.model,
            arch=config.teacher.arch,
            device=device,
            dtype=DTYPES[config.teacher.precision or "fp32"],
            size=config.teacher.size,
        )
        if config.teacher
        else None
    )
    classes = int(getattr(student.net, "num_classes", 0))
    if teacher and teacher.num_classes != classes:
        raise UserError(
            f"{config.model} has {classes} classes, its teacher {config.teacher and config.teacher.model} has {teacher.num_classes}"
        )
    labels = match_classes(source, reference.metadata.get("class_names"), classes, str(config.model))
    if labels is None and teacher is None:
        raise UserError(f"{source.path}: no labels; give --teacher.model to measure agreement")
    views = ValViews(
        source,
        labels,
        size=config.image_size or inputs.size[0],
        crop=config.val_crop or reference.metadata.get("crop_pct", 0.875),
    )
    loader = make_loader(
        views, val_batches(range(len(views)), config.batch_size, 0, 1), workers=config.workers, pin_memory=on_gpu
    )
    quarantine = Quarantine(run, len(views))
    metrics = evaluate(student, teacher, loader, device=device, dtype=torch.float32, on_unreadable=quarantine.add)
    run.log(describe(metrics))
    quarantine.judge(len(views))
    run.finish(metrics)


if __name__ == "__main__":
    sys.exit(main())
