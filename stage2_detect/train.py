"""Fine-tune a detector from a backbone file on COCO annotations, optionally with a teacher detector.

    python stage2_detect/train.py --backbone runs/ssld/student.safetensors --config stage2_detect/configs/faster_rcnn.yaml

Writes `detector.safetensors` (last step) and, with `evaluate_every`, `detector_best.safetensors`; where a moving teacher collapses,
`detector_last_good.safetensors` of the last checkpoint before; with evaluation images `analysis.json` and `pictures/` of the last evaluation, as
`evaluate.py` does. Initial weights come, in this order, from (1) the newest checkpoint of this run, (2) `init`, a detector file or published weights
(`coco:NAME`), the latter perhaps with another backbone, (3) the backbone, with random heads.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import call_command, run_command
from ssld.shared.run_dir import read_result
from ssld.stage2_detect.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(TrainConfig, train, argv, program="train.py")


def train_detector(config: TrainConfig | str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Train a detector in this process, as `ssld train` does, and return the content of its `result.json`.

    A run that is finished already is not repeated; one that was interrupted continues from its last checkpoint.

        result = ssld.train(
            "faster_rcnn",
            backbone="runs/mine/student.safetensors",
            data={
                "train_annotations": "train.json",
                "train_images": "photos",
                "val_annotations": "val.json",
                "val_images": "photos",
            },
            batch_size=4,
            output="runs/detector",
        )
        detector = ssld.load_detector("runs/detector/detector.safetensors")

    Args:
        config: a YAML file, the name of a recipe in `stage2_detect/configs`, a `TrainConfig`, or None for `settings` alone.
        **settings: settings that override `config`, named as in the YAML file: nested dicts, or dotted keys as in `**{"optim.lr": 0.01}`.

    Returns:
        `metrics` (with evaluation images `AP` and others, in 0..1), `outputs` (files and their sha256), `config`, `inputs`, `read`, `seconds`.

    Raises:
        UserError: a mistake the user can fix, in the words of the command; also memory or disk that ran out.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint written; the same call continues from it.
    """
    return read_result(call_command(TrainConfig, train, config, settings).output) or {}


def train(config: TrainConfig) -> None:
    """Train the detector that `config` describes.

    Raises:
        UserError: anything the user can fix.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    import torch

    from ssld.shared.checksums import remove_with_sum
    from ssld.shared.distributed.processes import (
        DTYPES,
        describe_processes,
        prepare_model,
        start_processes,
    )
    from ssld.shared.distributed.ranks import from_main_rank, on_main_rank, world_size
    from ssld.shared.distributed.stop import StopRequest
    from ssld.shared.errors import Stopped
    from ssld.shared.images import stable_seed
    from ssld.shared.models.backbones import check_networks
    from ssld.shared.run_dir import RunDir, read_metrics
    from ssld.shared.training.auto_batch import find_passes
    from ssld.shared.training.batch_sheet import write_sheet
    from ssld.shared.training.evaluations import Evaluations
    from ssld.shared.training.optim import describe_lr, make_optimizer, scale_lr, set_lr
    from ssld.shared.training.quarantine import Quarantine
    from ssld.shared.training.trackers import start_trackers
    from ssld.shared.training.training_state import TrainingState
    from ssld.shared.wording import count
    from ssld.stage2_detect.data.batch_order import labeled_images
    from ssld.stage2_detect.data.loaders import TrainBatch
    from ssld.stage2_detect.data.sizing import Sizing
    from ssld.stage2_detect.data.training_data import read_training_data, teacher_check_images, training_loader
    from ssld.stage2_detect.deploy.writing import try_export
    from ssld.stage2_detect.distillation.teacher import TeacherCheck
    from ssld.stage2_detect.evaluation.files import write_evaluation
    from ssld.stage2_detect.evaluation.scoring import compare_expected
    from ssld.stage2_detect.training.batch_images import first_images
    from ssld.stage2_detect.training.collapse import CollapseWatch
    from ssld.stage2_detect.training.init_weights import open_init
    from ssld.stage2_detect.training.memory_trial import whole_step
    from ssld.stage2_detect.training.schedule import Schedule
    from ssld.stage2_detect.training.trained_detector import TrainedDetector
    from ssld.stage2_detect.training.validation import Validation

    # ---- backbone and data, checked before any process group exists
    check_networks(config.networks())
    if config.init:
        open_init(config.init)
    data = read_training_data(config)

    # ---- processes and run directory
    # A large-scale jitter pads every batch to one size; otherwise cuDNN would measure its kernels anew for each.
    accelerator, config = start_processes(config, fixed_size=config.augment.large_scale_jitter is not None)
    device, dtype, ranks = accelerator.device, DTYPES[config.precision], world_size()
    run = RunDir(config, "train", main=accelerator.is_main_process)
    if run.finished_earlier(from_main_rank(run.status)):
        return
    start_trackers(accelerator, config, run)

    # ---- detector, teacher, optimizer, schedule
    steps_per_epoch = data.steps_per_epoch(config)
    steps = config.total_steps(steps_per_epoch * config.batch_size)
    config = config.in_steps(steps)
    trained = TrainedDetector(config, data.train, device=device)
    optimizer = make_optimizer(config.optim.name, trained.parameter_groups(), momentum=config.optim.momentum)
    if config.auto_batch:
        attempt = whole_step(config, trained, data, optimizer, device=device, dtype=dtype)
        networks = trained.networks()
        passes = find_passes(
            run, config.batch_size, ranks, attempt, networks=networks, optimizer=optimizer, device=device
        )
        config = config.model_copy(update={"accumulate": passes})
    rate = config.optim.lr, config.optim.reference_batch, config.batch_size, config.optim.name
    base_lr = scale_lr(*rate)
    assert config.log_every is not None
    schedule = Schedule.of(config.optim, steps_per_epoch, steps)
    moving = config.moving_teacher
    burn_in = int(moving.burn_in) if moving else 0
    labeled = labeled_images(config.batch_size, config.labeled_share)

    # ---- resume
    quarantine = Quarantine(run, data.images)
    state = TrainingState(
        run,
        accelerator,
        trained.networks(),
        optimizer,
        quarantine,
        steps=steps,
        batch_size=config.batch_size,
        keep_checkpoints=config.keep_checkpoints,
        lr=config.optim.lr,
        precision=config.precision,
        best_file=run.path / "detector_best.safetensors",
        burn_in=burn_in,
        burn_in_batch=labeled,
    )
    start = state.restore(look=config.look)
    last_good = run.path / "detector_last_good.safetensors"
    if not config.look:
        state.drop_later(last_good, start)
    if config.export_check and start == 0:
        on_main_rank(lambda: try_export(trained.detector, config.model, config.resize, run.log), "export_check")
    collapse = None
    if moving:
        unlabeled = config.batch_size - labeled
        lines = from_main_rank(read_metrics(run.path) if run.main else [])
        weight = moving.unlabeled_weight(dense=config.model.is_dense)
        collapse = CollapseWatch(moving, unlabeled, lines, moving.threshold(config.model), weight)
    loader = training_loader(config, data, start=start, stop=steps, rank=accelerator.process_index, ranks=ranks)
    sizing = Sizing.of(config.resize)
    evaluation: dict[str, Any] = {
        "batch_size": config.val_batch_size,
        "workers": config.workers,
        "device": device,
        "dtype": dtype,
    }

    distill, teacher_check = config.distill, None
    if distill and trained.teacher and distill.check_images:
        check_data = teacher_check_images(config, data)
        teacher_check = TeacherCheck(trained.teacher, check_data, sizing, distill, **evaluation)
    validation = Validation(trained, data, sizing, teacher_check, state, **evaluation)

    def save_model(path: Path, step: int, metrics: dict[str, Any]) -> None:
        trained.save(path, step=step, metrics=metrics, run=str(run.path), precision=config.precision)

    # Evaluation images without objects give no AP.
    evaluations = Evaluations(
        state, validation.measure, lambda metrics: metrics.get("AP"), save_model, keeps_best=bool(config.evaluate_every)
    )

    # ---- summary of the run
    if teacher_check and start == 0:
        run.log(teacher_check.before_training())
    if config.compile:
        trained.detector.pyramid.compile()
        if trained.teacher:
            trained.teacher.model.pyramid.compile()
    model = prepare_model(accelerator, trained.model)
    run.log(*data.describe(config), *trained.preview())
    for told in data.tallies():
        run.tell(*told)
    run.log(
        f"{steps} steps of {config.batch_size} images ({count(ranks, 'process')} x {config.accumulate} accumulated), "
        f"{steps / steps_per_epoch:.1f} passes, {describe_lr(*rate)}, {schedule.describe()}"
    )
    run.log_if(schedule.doubt())
    run.use(config)
    if config.distill:
        run.log_if(config.distill.doubt(config.model, steps))
    run.log(config.describe_keeping(steps, evaluates=data.val is not None))
    run.log(*describe_processes(accelerator, config, config.workers))
    run.log(*state.describe_start(start, base_lr, schedule.factor(start)))
    if start == 0:
        sheet = on_main_rank(
            lambda: write_sheet(run.path, first_images(config, data, steps=steps, ranks=ranks)), "first images"
        )
        run.log(f"the first training images, with their boxes after augmentation: {sheet}")
    if config.look:
        accelerator.end_training()
        return

    # ---- the loop
    def inputs_of(batch: TrainBatch) -> list[Any]:
        """Return what the model takes of a batch, on the device."""
        weak = [batch.weak.to(device, non_blocking=True)] if batch.weak else []  # views for a moving teacher
        return [batch.images.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True), *weak]

    def check_weights(step: int, inputs: list[Any]) -> None:
        state.check_last_update(step, lambda: model.train()(*inputs))

    step = start
    with StopRequest() as stop, state.deaths, state.progress.begin(start, steps) as progress:
        if state.owes_evaluation and config.evaluates_after(start, steps):
            evaluations.run(start)
        stream = iter(loader)
        if 0 < start < steps and state.exhausted(config.patience):  # no step follows whose loss would show a bad update
            with state.fetching(start + 1, 0):
                inputs = inputs_of(next(stream))
            check_weights(start, inputs)
        while step < steps and not state.exhausted(config.patience):
            step += 1
            lr = base_lr * schedule.factor(step - 1)
            set_lr(optimizer, lr)
            model.train()
            for micro in range(config.accumulate):
                with state.fetching(step, micro):
                    batch = next(stream)
                quarantine.add(str(image.name) for image in batch.unreadable)
                inputs = inputs_of(batch)
                # Drop-path is then the same after a resumption.
                torch.manual_seed(stable_seed(config.seed, step, micro, accelerator.process_index))
                # DDP reduces gradients once per step, in the last backward pass.
                with nullcontext() if micro == config.accumulate - 1 else accelerator.no_sync(model):
                    losses = model(*inputs)
                    loss = torch.stack(list(losses.values())).sum()
                    accelerator.backward(loss / config.accumulate)
                losses = {"loss": loss, **losses}
                share = 1.0 / (config.accumulate * ranks)
                state.watch.add(
                    step - 1,
                    {name: part.detach() * share for name, part in (losses | trained.measured).items()},
                    [r.image_id for r in batch.records],
                )
            logged = step % config.log_every == 0 or step == steps
            norm = state.update(step, config.optim.clip_grad_norm, measure=logged)
            if trained.ema:
                trained.ema.update(trained.detector, step=step)
            progress.step()

            if logged:
                means = state.log(step, lr, grad_norm=norm)
                if collapse:
                    run.log_if(collapse.see(step, means, last=step == steps))
            due = step % config.save_every == 0 or step == steps or (moving is not None and step == burn_in)
            if data.val and config.evaluates_after(step, steps):
                evaluations.run(step, due=due)
            last = step == steps or state.exhausted(config.patience)
            if last:
                check_weights(step, inputs)
            stopping = stop.agreed() and not last
            if due or last or stopping:
                state.save(step)
                if collapse and collapse.healthy and burn_in <= step < steps:
                    known = evaluations.metrics if evaluations.step == step else {}
                    on_main_rank(partial(save_model, last_good, step, known), "last good weights")
            if stopping:
                raise Stopped(f"checkpoint of step {step} written to {run.checkpoints}")

    # ---- finish
    if state.exhausted(config.patience):
        run.log(f"step {step}: stopped after {state.stale} evaluations in a row without a better AP (patience)")
    if evaluations.step != step:
        evaluations.run(step)
    metrics = evaluations.metrics
    if config.expected:
        measured = len(data.val.images) if data.val else 0
        metrics["expected_met"], line = compare_expected(config.expected, metrics, measured, config.precision)
        run.log(line)
    file = run.path / "detector.safetensors"
    accelerator.end_training()
    if run.main:  # nothing follows for which the others would wait
        save_model(file, step, metrics)
    files = [file]
    if collapse and collapse.healthy and run.main:
        remove_with_sum(last_good)
    if collapse and not collapse.healthy and last_good.exists():
        run.log(f"warning: the moving teacher has collapsed; {last_good} is the last good file")
        files.append(last_good)
    if data.val and accelerator.is_main_process:
        files += write_evaluation(run, data.val, validation.detections, metrics, score_threshold=0.5)[1]
    state.finish(metrics | {"orientation": data.orientations()}, step, files)
    run.log(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main())
