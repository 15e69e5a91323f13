"""Fine-tune a detector from a backbone file on COCO annotations.

    python stage2_detect/train.py --backbone runs/ssld/student.safetensors --config stage2_detect/configs/faster_rcnn.yaml

Writes `detector.safetensors`. Initial weights come, in this order, from (1) the newest checkpoint of this run, (2) the backbone file, with
random heads.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shared.command import run_command
from stage2_detect.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(TrainConfig, train, argv, program="train.py")


def train(config: TrainConfig) -> None:
    """Train the detector that `config` describes.

    Raises:
        UserError: anything the user can mend.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    import time
    from typing import Any

    import torch

    from shared.backbones import architecture, create_body, input_settings, licence, parse_reference, place
    from shared.errors import Stopped
    from shared.images import stable_seed
    from shared.optim import make_optimizer, multistep_factor, parameter_groups, scale_lr, set_lr
    from shared.processes import DTYPES, optimizer_step, start_processes, start_trackers
    from shared.quarantine import Quarantine
    from shared.ranks import from_main_rank, share_buffers, total_over_ranks, world_size
    from shared.run_dir import RunDir
    from shared.stop import StopRequest
    from shared.training_state import TrainingState
    from stage2_detect.batches import TrainLoader
    from stage2_detect.coco import read_coco
    from stage2_detect.detector_file import save_detector
    from stage2_detect.models.build import build_detector
    from stage2_detect.models.freezing import lr_factor_of_parameter
    from stage2_detect.scoring import describe, score

    # ---- data and backbone, checked before any process group exists
    data = read_coco(
        config.data.train_annotations, config.data.train_images, training=True, keep_empty=config.data.keep_empty
    )
    val_data = None
    if config.data.val_annotations and config.data.val_images:
        val_data = read_coco(
            config.data.val_annotations, config.data.val_images, training=False, class_names=data.class_names
        )
    reference = parse_reference(config.backbone, config.arch)

    # ---- processes and run directory
    accelerator = start_processes(config)
    device, dtype, ranks = accelerator.device, DTYPES[config.precision], world_size()
    run = RunDir(config, "train", main=accelerator.is_main_process)
    if from_main_rank(run.status) == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    start_trackers(accelerator, config)

    # ---- detector, optimizer, schedule
    torch.manual_seed(config.seed)
    options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    body, loaded = create_body(reference, **options)
    inputs = input_settings(body, reference.metadata)
    arch = architecture(reference, body)
    detector = build_detector(
        config.model,
        classes=len(data.class_names),
        body=body,
        arch=arch,
        inputs=inputs,
        total=total_over_ranks,
        world_size=ranks,
    )
    place(detector, device, channels_last=config.channels_last)
    factors = lr_factor_of_parameter(body, config.optim.backbone_lr_factors)
    groups = parameter_groups(
        detector,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
        lr_factor=lambda name: factors.get(name.removeprefix("pyramid.body."), 1.0),
    )
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)
    base_lr = scale_lr(config.optim.lr, config.optim.reference_batch, config.batch_size, config.optim.name)
    steps_per_epoch = len(data.images) // config.batch_size
    steps = config.total_steps(steps_per_epoch * config.batch_size)
    milestones = config.optim.milestones(steps_per_epoch)

    # ---- resume
    quarantine = Quarantine(run, len(data.images))
    state = TrainingState(
        run, accelerator, {"model": detector}, optimizer, quarantine, steps, config.batch_size, config.keep_checkpoints
    )
    start, resumed = state.restore()

    # ---- data
    loader = TrainLoader(
        data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=steps,
        short_sides=config.resize.train_short_sides,
        max_long=config.resize.train_long_side,
        flip=config.resize.flip,
        interpolation=config.resize.interpolation,
        rank=accelerator.process_index,
        ranks=ranks,
        accumulate=config.accumulate,
        workers=config.workers,
    )

    def evaluate_now() -> dict[str, Any]:
        if val_data is None:
            return {}
        share_buffers(detector)
        metrics, _ = score(
            detector,
            val_data,
            short_side=config.resize.val_short_side,
            long_side=config.resize.val_long_side,
            interpolation=config.resize.interpolation,
            batch_size=config.val_batch_size,
            workers=config.workers,
            device=device,
            dtype=dtype,
        )
        run.log(f"step {step}: {describe(metrics)}")
        run.metric(step, **{f"val_{name}": value for name, value in metrics.items() if name != "per_class"})
        return metrics

    def save_model(path: Path, metrics: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            facts = {
                "step": step,
                "metrics": metrics,
                "backbone": {"reference": config.backbone, "content_sha256": reference.metadata.get("content_sha256")},
                "licence": licence(reference, body) or "none: random weights",
                "run": str(run.path),
            }
            save_detector(
                path, detector, config=config.model, resize=config.resize, arch=arch, inputs=inputs, data=data, **facts
            )

    # ---- what is about to happen
    if config.compile:
        detector.pyramid.compile()
    model = accelerator.prepare_model(detector)
    trainable = sum(parameter.numel() for group in groups for parameter in group["params"])
    total = sum(parameter.numel() for parameter in detector.parameters())
    run.log(data.describe())
    run.log(loaded)
    run.log(f"{config.model.kind} on {arch}: {trainable / 1e6:.2f} M of {total / 1e6:.2f} M parameters train")
    run.log(
        f"{steps} steps of {config.batch_size} images ({ranks} processes x {config.accumulate} accumulated), "
        f"{steps / steps_per_epoch:.1f} passes, lr {base_lr:g} = {config.optim.lr:g} scaled from batch {config.optim.reference_batch} "
        f"to {config.batch_size}, milestones {milestones}"
    )
    run.log(f"{device}, {config.precision}, {torch.get_num_threads()} threads, {config.workers} workers")
    if resumed:
        run.log(resumed)

    # ---- the loop
    step = start
    with StopRequest() as stop:
        stream = iter(loader)
        for step in range(start + 1, steps + 1):
            factor = multistep_factor(
                step - 1,
                milestones=milestones,
                gamma=config.optim.gamma,
                warmup_steps=config.optim.warmup_steps,
                warmup_start=config.optim.warmup_start,
            )
            set_lr(optimizer, base_lr * factor)
            model.train()
            for micro in range(config.accumulate):
                asked = time.perf_counter()
                batch = next(stream)
                state.waited += time.perf_counter() - asked
                quarantine.add(str(image.name) for image in batch.unreadable)
                images, targets = (
                    batch.images.to(device, non_blocking=True),
                    batch.targets.to(device, non_blocking=True),
                )
                torch.manual_seed(stable_seed(config.seed, step, micro, accelerator.process_index))  # drop-path
                # DDP reduces gradients once a step, in the last backward pass.
                with nullcontext() if micro == config.accumulate - 1 else accelerator.no_sync(model):
                    losses = model(images, targets)
                    loss = torch.stack(list(losses.values())).sum()
                    accelerator.backward(loss / config.accumulate)
                losses = {"loss": loss, **losses}
                share = 1.0 / (config.accumulate * ranks)
                state.watch.add(
                    step - 1,
                    {name: part.detach() * share for name, part in losses.items()},
                    [r.image_id for r in batch.records],
                )
            optimizer_step(accelerator, optimizer, config.optim.clip_grad_norm)

            if step % config.log_every == 0 or step == steps:
                state.log(step, base_lr * factor)
            if config.evaluate_every and step % config.evaluate_every == 0 and step < steps and val_data:
                metrics = evaluate_now()
                if (metrics["AP"] or 0.0) > state.best:
                    state.best = metrics["AP"] or 0.0
                    state.watch.check()
                    save_model(run.path / "detector_best.safetensors", metrics)
            stopping = stop.agreed() and step < steps
            if step % config.save_every == 0 or step == steps or stopping:
                state.save(step)
            if stopping:
                raise Stopped(f"checkpoint of step {step} written to {run.checkpoints}")

    # ---- finish
    metrics = evaluate_now()
    file = run.path / "detector.safetensors"
    save_model(file, metrics)
    accelerator.end_training()
    run.finish(metrics | {"steps": steps, "images_seen": steps * config.batch_size}, [file])
    run.log(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
