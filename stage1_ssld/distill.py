"""Train a student from a teacher's soft labels (SSLD, arXiv 2103.05959), on labeled and unlabeled images alike.

    accelerate launch stage1_ssld/distill.py --config stage1_ssld/configs/resnet50d.yaml

Writes `student.safetensors`. With `--objective labels` the same loop trains the supervised baseline on the labeled sources, by plain cross-entropy;
`teach.py` runs that loop and writes `teacher.safetensors`. Initial weights come from the newest checkpoint of this run, else from the network's
reference.

From Python, with a loss of one's own (docs/distillation.md, "Your own loss"):

    register_loss("reverse_kl", reverse_kl)
    sys.exit(main())
"""

import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.shared.config.command import call_command, run_command
from ssld.shared.errors import Stopped, UserError
from ssld.shared.run_dir import read_result
from ssld.shared.wording import count
from ssld.stage1_ssld.config import DistillConfig, TeachConfig
from ssld.stage1_ssld.data_config import register_loss

__all__ = ["distill", "main", "register_loss", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the flags of `argv` (default: the command line); returns the exit code."""
    return run_command(DistillConfig, distill, argv, program="distill.py")


def distill_student(config: DistillConfig | str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Train a student from a teacher in this process, as `ssld distill` does, and return the content of its `result.json`.

    A run that is finished already is not repeated; one that was interrupted continues from its last checkpoint.

        result = ssld.distill(
            "resnet50d",
            student={"model": "random:resnet18d"},
            teacher={"model": "timm:resnet50d"},
            data={"train": ["photos"], "val": None},
            batch_size=64,
            train_epochs=100,
            output="runs/mine",
        )
        student = ssld.load_backbone("runs/mine/student.safetensors")

    Args:
        config: a YAML file, the name of a recipe in `stage1_ssld/configs`, a `DistillConfig`, or None for `settings` alone.
        **settings: settings that override `config`, named as in the YAML file: nested dicts, or dotted keys as in `**{"optim.lr": 0.01}`.

    Returns:
        `metrics` (with evaluation images `agreement`, with labels `top1`, in 0..1), `outputs` (files and their sha256), `config`, `used`
        (settings that followed from others), `inputs`, `read`, `seconds`.

    Raises:
        UserError: a mistake the user can fix, in the words of the command; also memory or disk that ran out.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint written; the same call continues from it.
    """
    return read_result(call_command(DistillConfig, distill, config, settings).output) or {}


def distill(config: DistillConfig) -> None:
    """Train the student of `config`."""
    train(config, command="distill", result="student")


def train(config: DistillConfig | TeachConfig, *, command: str, result: str) -> None:
    """Train a network and write `<result>.safetensors` (last step) and, with `evaluate_every`, `<result>_best.safetensors` to the run directory.

    Args:
        config: the settings.
        command: name of the entry script, for the records.
        result: name of the files, without their suffix.

    Raises:
        UserError: anything the user can fix.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    import torch

    from ssld.shared.distributed.processes import (
        DTYPES,
        describe_processes,
        pins_memory,
        prepare_model,
        start_processes,
    )
    from ssld.shared.distributed.ranks import from_main_rank, on_main_rank, total_over_ranks, world_size
    from ssld.shared.distributed.stop import StopRequest
    from ssld.shared.images import stable_seed
    from ssld.shared.models.backbones import check_networks
    from ssld.shared.run_dir import RunDir
    from ssld.shared.training.auto_batch import find_passes
    from ssld.shared.training.batch_sheet import MOST, write_sheet
    from ssld.shared.training.evaluations import Evaluations
    from ssld.shared.training.optim import (
        cosine_factor,
        describe_lr,
        make_optimizer,
        parameter_groups,
        scale_lr,
        set_lr,
    )
    from ssld.shared.training.quarantine import Quarantine
    from ssld.shared.training.trackers import start_trackers
    from ssld.shared.training.training_state import TrainingState
    from ssld.stage1_ssld.data.batch import Batch
    from ssld.stage1_ssld.data.batch_images import view_images
    from ssld.stage1_ssld.data.held_out import hold_out
    from ssld.stage1_ssld.data.labels import doubt_on_order
    from ssld.stage1_ssld.data.loaders import TrainingData, described
    from ssld.stage1_ssld.data.sources import open_sources
    from ssld.stage1_ssld.data.streams import plan_streams
    from ssld.stage1_ssld.distillation.features import STATISTICS_IMAGES
    from ssld.stage1_ssld.distillation.fitting import with_chosen_settings
    from ssld.stage1_ssld.distillation.forward_pass import ForwardPass
    from ssld.stage1_ssld.distillation.memory_trial import whole_step
    from ssld.stage1_ssld.distillation.objective import Objective, statistics_warning
    from ssld.stage1_ssld.distillation.preview import preview
    from ssld.stage1_ssld.distillation.student import Student
    from ssld.stage1_ssld.distillation.targets import open_targets
    from ssld.stage1_ssld.distillation.teacher import compare_teacher, try_teacher
    from ssld.stage1_ssld.evaluation.curves import write_curves
    from ssld.stage1_ssld.evaluation.metrics import score_of
    from ssld.stage1_ssld.evaluation.validation import Validation

    # ---- references and sources, checked before any process group exists
    check_networks(config.networks(), config.hub_data())
    data = config.data
    network = config.student if isinstance(config, DistillConfig) else config.model
    sources = [] if data.streaming else open_sources(data.train, "data.train", allow_loss=data.allow_loss)
    plan = plan_streams(data, config.batch_size, config.seed) if data.streaming else None
    val_source = open_sources([data.val], "data.val", allow_loss=data.allow_loss)[0] if data.val else None
    notes: list[str] = []
    if data.held_out:
        sources, val_source = hold_out(sources, data.held_out, notes)

    # ---- processes and run directory
    accelerator, config = start_processes(config, fixed_size=True)
    device, dtype, rank, ranks = accelerator.device, DTYPES[config.precision], accelerator.process_index, world_size()
    pin_memory = pins_memory()
    config = with_chosen_settings(config, sum(map(len, sources)), notes, device=device, ranks=ranks)
    data = config.data
    run = RunDir(config, command, main=accelerator.is_main_process)
    if run.finished_earlier(from_main_rank(run.status)):
        return
    start_trackers(accelerator, config, run)
    run.log(*notes)

    # ---- targets: a teacher, a store or labels; and the resulting classes
    targets = open_targets(config, sources, val_source, device=device, log=run.log)
    teacher = targets.teacher
    if teacher and isinstance(config, DistillConfig) and config.teacher:
        compare_teacher(run, teacher, config.teacher, data.image_size)
    if val_source and targets.classes == 0:
        run.log(
            f"{val_source.path}: feature losses alone train no classifier, so no top-1 and no agreement are measured; "
            "use `ssld evaluate --bank` on the student file"
        )
    for place, path, tally in described(sources, plan, val_source):
        run.tell(place, path, tally)
    if targets.class_names is None:
        for source in (*sources, *([val_source] if val_source else [])):
            run.log_if(doubt_on_order(source))
    if val_source and targets.val_labels is None and teacher is None:
        run.log(f"{val_source.path}: no labels and no teacher: no evaluation")
        val_source = None

    # ---- student, optimizer, batches, schedule
    student = Student(
        network,
        config,
        classes=targets.classes,
        class_names=targets.class_names,
        device=device,
        features=targets.features,
        teacher=teacher,
    )
    objective = Objective([], 1.0)
    if isinstance(config, DistillConfig) and targets.learns_from_teacher:
        objective = Objective(config.losses, config.hard_label_weight)
    groups = parameter_groups(
        student.learner,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
        lr_factor=student.lr_factors(config.optim.layer_decay).__getitem__,
    )
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)
    if config.auto_batch:
        attempt = whole_step(config, student, targets, objective, optimizer, device=device, dtype=dtype)
        passes = find_passes(
            run, config.batch_size, ranks, attempt, networks=student.networks(), optimizer=optimizer, device=device
        )
        config = config.model_copy(update={"accumulate": passes})
    training = TrainingData(config, targets.sources, targets.train_labels, targets.store, plan)
    of_teacher = teacher is not None and teacher.batchnorm == "batch"
    batchnorm_of = "teacher" if of_teacher else "network" if student.uses_batch_statistics() else None
    _check_batch_size(config.batch_size, ranks * config.accumulate, training.images, batchnorm_of)
    steps = config.total_steps(training.images)
    config = config.in_steps(steps)
    assert config.log_every is not None
    warmup_steps = config.optim.total_warmup_steps(training.images, config.batch_size, steps)
    rate = config.optim.lr, config.optim.reference_batch, config.batch_size, config.optim.name
    base_lr = scale_lr(*rate)
    lr_factor = partial(cosine_factor, steps=steps, warmup_steps=warmup_steps)

    # ---- resume
    quarantine = Quarantine(run, training.images)
    state = TrainingState(
        run,
        accelerator,
        student.networks(),
        optimizer,
        quarantine,
        steps=steps,
        batch_size=config.batch_size,
        keep_checkpoints=config.keep_checkpoints,
        lr=config.optim.lr,
        precision=config.precision,
        best_file=run.path / f"{result}_best.safetensors",
    )
    start = state.restore(look=config.look)

    # ---- evaluation and network files, used in the loop and after it
    validation = Validation(config, val_source, student, targets, state, device=device, dtype=dtype)

    def save_network(path: Path, step: int, metrics: dict[str, float], **facts: str) -> None:
        teacher_facts = targets.facts()
        student.save(
            path,
            class_names=targets.class_names,
            crop_pct=data.val_crop,
            objective=config.objective,
            precision=config.precision,
            step=step,
            metrics=metrics,
            teacher=teacher_facts,
            licence=student.licence_under(teacher_facts),
            run=str(run.path),
            **facts,
        )

    evaluations = Evaluations(
        state,
        validation.measure,
        lambda metrics: score_of(metrics, config.best_by) if metrics else None,
        save_network,
        keeps_best=bool(config.evaluate_every),
    )

    # ---- the log of what will run, and checks before the first step
    run.log(student.model.loaded, *(teacher.loaded if teacher else []))
    run.log(*preview(config, student, targets, training.images, steps, ranks))
    run.log(f"{describe_lr(*rate)}, warm-up {warmup_steps} steps")
    if isinstance(config, DistillConfig) and targets.learns_from_teacher and teacher and start == 0:
        val = (val_source, targets.val_labels) if val_source else None
        run.log(try_teacher(teacher, targets.sources, config, device=device, val=val))
    if student.heads and teacher and start == 0 and not config.look:
        first_steps = min(steps, -(-STATISTICS_IMAGES // config.batch_size))
        with closing(training.batches(0, first_steps, rank=rank, ranks=ranks, pin_memory=pin_memory)) as stream:
            views, name = first_steps * config.batch_size, teacher.references[0].text
            run.log(f"features of {name}: measuring mean and standard deviation of the first {count(views, 'view')}")
            run.log(student.heads.measure(teacher, stream, run.log))
    if config.compile:
        (student.learner if student.heads else student.model.net).compile()
        if teacher:
            teacher.compile()
    model = prepare_model(accelerator, student.learner)
    run.use(config)
    run.log(config.describe_keeping(steps, evaluates=val_source is not None))
    run.log(*describe_processes(accelerator, config, config.workers))
    run.log(*state.describe_start(start, base_lr, lr_factor(start)))

    # ---- the loop
    def forward_pass(batch: Batch, step: int, micro: int = 0) -> ForwardPass:
        seed = stable_seed(config.seed, step, micro, rank)
        return ForwardPass(batch, data, student, targets, objective, device=device, seed=seed)

    def check_weights(step: int, forward: ForwardPass) -> None:
        student.train_mode()  # an evaluation may have changed it
        state.check_last_update(step, lambda: forward.losses(model))

    step = start
    drawn: list[Any] = []  # images of the first step, for batches.jpg
    with (
        StopRequest() as stop,
        state.deaths,
        state.progress.begin(start, steps) as progress,
        closing(training.batches(start, steps, rank=rank, ranks=ranks, pin_memory=pin_memory)) as stream,
    ):
        if state.owes_evaluation and config.evaluates_after(start, steps):
            evaluations.run(start)
        if 0 < start < steps and state.exhausted(config.patience):  # no step follows whose loss would show a bad update
            with state.fetching(start + 1, 0):
                forward = forward_pass(next(stream), start + 1)
            check_weights(start, forward)
        while step < steps and not state.exhausted(config.patience):
            step += 1
            logged = step % config.log_every == 0 or step == steps
            entropies = torch.zeros(2, device=device)
            lr = base_lr * lr_factor(step - 1)
            set_lr(optimizer, lr)
            student.train_mode()
            for micro in range(config.accumulate):
                with state.fetching(step, micro):
                    batch = next(stream)
                quarantine.add(batch.unreadable)
                if len(batch.keys) * ranks * config.accumulate < config.batch_size:
                    raise UserError(
                        f"{batch.unreadable[0]} and the images after it are all unreadable; fix or remove them"
                    )
                forward = forward_pass(batch, step, micro)
                if step == 1 and len(drawn) < MOST:
                    drawn += view_images(forward.pixels_BCHW, batch, targets.class_names)
                    if micro == config.accumulate - 1 or len(drawn) >= MOST:
                        sheet = on_main_rank(partial(write_sheet, run.path, drawn), "first images")
                        run.log(f"the first training images, after augmentation and mixing: {sheet}")
                        if config.look:
                            accelerator.end_training()
                            return
                # DDP reduces gradients once a step, in the last backward pass.
                with nullcontext() if micro == config.accumulate - 1 else accelerator.no_sync(model):
                    parts = forward.losses(model)
                    # DDP averages over ranks, so the sum over this rank's images is multiplied by `ranks`.
                    accelerator.backward(parts["loss"] * (ranks / config.batch_size))
                if logged:
                    entropies += forward.entropies()
                shares = {name: part / config.batch_size for name, part in (parts | forward.hits()).items()}
                state.watch.add(step - 1, shares, batch.keys)
                if step == 1 and micro == 0:
                    run.log_if(forward.doubt())
            norm = state.update(step, config.optim.clip_grad_norm, measure=logged)
            if student.ema:
                student.ema.update(student.model, step=step)
            progress.step()

            if logged:
                values = {"grad_norm": norm}
                if forward.soft:
                    entropy_2 = total_over_ranks(entropies) / config.batch_size
                    values |= {"teacher_entropy": entropy_2[0], "student_entropy": entropy_2[1]}
                means = state.log(step, lr, **values)
                if step <= config.log_every and forward.soft and student.starts_with_head:
                    run.log_if(statistics_warning(means, forward.soft.logits_BM.shape[1]))
            due = step % config.save_every == 0 or step == steps
            if val_source and config.evaluates_after(step, steps):
                evaluations.run(step, due=due)
            last = step == steps or state.exhausted(config.patience)
            if last:
                check_weights(step, forward)
            stopping = stop.agreed() and not last
            if due or last or stopping:
                state.save(step)
            if stopping:
                raise Stopped(f"checkpoint of step {step} written to {run.checkpoints}")

    # ---- finish
    if state.exhausted(config.patience):
        run.log(f"step {step}: stopped, {state.stale} evaluations in a row without a better one (patience)")
    if evaluations.step != step:
        evaluations.run(step)
    metrics, kept = validation.compare_with_start(step, evaluations.metrics)
    file = run.path / f"{result}.safetensors"
    accelerator.end_training()
    if accelerator.is_main_process:  # nothing follows for which the others would wait
        save_network(file, step, metrics, **({"kept": kept} if kept else {}))
        write_curves(run.path)
    state.finish(metrics, step, [file])
    run.log(f"wrote {file}")


def _check_batch_size(batch_size: int, parts: int, images: int | None, batchnorm_of: str | None) -> None:
    """Raise UserError for a batch of more images than there are, and for parts of one image where BatchNorm measures them.

    Args:
        parts: processes times passes that a batch is divided among.
        images: number of training images; None: unknown.
        batchnorm_of: the network whose BatchNorm uses statistics of the batch; None: no network does.
    """
    if images is not None and batch_size > images:
        raise UserError(
            f"batch_size: {batch_size} is more than the {count(images, 'training image')}; set it to at most this number"
        )
    if batch_size == parts and batchnorm_of:
        raise UserError(
            f"batch_size: {batch_size} is one image per process and pass, and BatchNorm of the {batchnorm_of} needs "
            "at least two; raise batch_size, or lower accumulate or the number of processes"
        )


if __name__ == "__main__":
    sys.exit(main())
