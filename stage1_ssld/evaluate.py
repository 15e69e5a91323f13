"""Evaluate a classifier: top-1 and top-5, agreement with a teacher and KL to it, and nearest-neighbor accuracy.

    python stage1_ssld/evaluate.py --model runs/ssld/student.safetensors --data.path images/val --output runs/ssld_val

`--model` takes a backbone file or any other reference. `--bank.path images/train` adds nearest-neighbor accuracy, also for classes that the model
does not have.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import run_command
from ssld.shared.errors import UserError
from ssld.stage1_ssld.config import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(EvaluateConfig, evaluate_backbone, argv, program="evaluate.py")


def evaluate_backbone(config: EvaluateConfig) -> None:
    """Evaluate the model of `config` and write result.json; the processes of a launcher share the images.

    Raises UserError if model, teacher and labels do not match, and if more than one and more than 1 % of the images cannot be read; these are listed
    in quarantine.txt.
    """
    from contextlib import nullcontext

    import torch

    from ssld.shared.distributed.processes import DTYPES, describe_processes, pins_memory, start_processes
    from ssld.shared.distributed.ranks import from_main_rank, rank, world_size
    from ssld.shared.models.backbones import check_networks, create_classifier
    from ssld.shared.models.references import parse_reference
    from ssld.shared.models.teacher import embed
    from ssld.shared.run_dir import RunDir
    from ssld.shared.training.quarantine import Quarantine
    from ssld.shared.training.trackers import start_trackers
    from ssld.stage1_ssld.data.batch import Batch
    from ssld.stage1_ssld.data.labels import doubt_on_order, match_classes, neighbor_labels
    from ssld.stage1_ssld.data.loaders import Labels, ValViews, make_loader, val_batches
    from ssld.stage1_ssld.data.sources import ImageSource, open_sources
    from ssld.stage1_ssld.distillation.teacher import make_teacher
    from ssld.stage1_ssld.evaluation.knn import knn_accuracy
    from ssld.stage1_ssld.evaluation.metrics import describe, evaluate

    check_networks(config.networks(), config.hub_data())
    reference = parse_reference(config.model, config.arch, allow_pickle=True)
    allowed: Any = {
        "allow_loss": config.allow_loss,
        "otherwise": "set allow_loss: true to continue with the remaining images",
    }
    source = open_sources([config.data], "data", **allowed)[0]
    bank = open_sources([config.bank], "bank", **allowed)[0] if config.bank else None
    if bank:
        bank.number = 1  # its images have other keys than those of `data`, which is source 0
    votes = neighbor_labels(source, bank, config.neighbors) if bank else None
    accelerator, config = start_processes(config)
    device, dtype = accelerator.device, DTYPES[config.precision]
    run = RunDir(config, "evaluate", main=accelerator.is_main_process)
    if run.finished_earlier(from_main_rank(run.status)):
        return
    start_trackers(accelerator, config, run)

    run.log(*describe_processes(accelerator, config, config.workers))
    run.tell("data", source.path, source.tally)
    if bank:
        run.tell("bank", bank.path, bank.tally)

    # ---- networks and labels
    student, inputs = create_classifier(reference, image_size=config.image_size)
    run.log(student.loaded)
    student.to(device).eval()
    names, classes = reference.metadata.get("class_names"), int(getattr(student.net, "num_classes", 0))
    if classes == 0 and bank is None:
        raise UserError(
            f"{config.model}: has no classes; give --bank.path for nearest-neighbor accuracy, or another model"
        )
    if names is None:
        run.log_if(doubt_on_order(source))
    teacher = None
    if config.teacher:
        teacher = make_teacher(config.teacher, precision=config.precision, device=device, channels_last=False)
        run.log(*teacher.loaded)
        teacher.match_classes(names, classes, config.model)
    try:
        labels = match_classes(source, names, classes, config.model)
    except UserError as error:
        if bank is None:
            raise
        run.log(f"top-1 is not measured: {error}")
        labels = None
    if labels is None and teacher is None and bank is None:
        raise UserError(f"{source.path}: no labels; give --teacher.model to measure agreement")

    def batches(images: ImageSource, labels: Labels) -> "torch.utils.data.DataLoader[Batch]":
        views = ValViews(
            images,
            labels,
            image_size=config.image_size or inputs.size[0],
            val_crop=config.val_crop or min(1.0, reference.metadata.get("crop_pct", 0.875)),
            interpolation=inputs.interpolation if inputs.interpolation == "bicubic" else "bilinear",
        )
        order = val_batches(range(len(views)), config.batch_size, rank(), world_size())
        return make_loader(views, order, workers=config.workers, pin_memory=pins_memory())

    def embedded(pixels_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return embed(student, pixels_BCHW)

    # ---- passes over the images
    images = len(source) + (len(bank) if bank else 0)
    quarantine = Quarantine(run, images)
    with teacher.running_statistics() if teacher else nullcontext():
        metrics = evaluate(
            student,
            teacher,
            batches(source, labels),
            device=device,
            dtype=dtype,
            on_unreadable=quarantine.add,
        )
    if bank and votes:
        metrics |= knn_accuracy(
            embedded,
            batches(source, votes.queries),
            batches(bank, votes.bank),
            neighbors=config.neighbors,
            classes=votes.classes,
            device=device,
            first=rank(),
            step=world_size(),
            on_unreadable=quarantine.add,
        )
    run.log(describe(metrics))
    quarantine.judge(images)
    run.finish(metrics)


if __name__ == "__main__":
    sys.exit(main())
