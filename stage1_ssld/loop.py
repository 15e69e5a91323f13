"""The training loop of stage 1: one loop, two objectives.

`teacher`: SSLD, the student learns from the teacher's soft labels alone. `labels`: plain cross-entropy on the labelled sources, for fine-tuning a
teacher and for the supervised baseline. Initial weights come, in this order, from (1) the newest checkpoint of this run, (2) the network's reference.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor

from shared.backbones import (
    InputSettings,
    architecture,
    create_classifier,
    licence,
    parse_reference,
    place,
    save_backbone,
)
from shared.errors import Stopped, UserError
from shared.images import stable_seed
from shared.optim import cosine_factor, make_optimizer, parameter_groups, scale_lr, set_lr
from shared.processes import DTYPES, optimizer_step, start_processes, start_trackers, to_device
from shared.quarantine import Quarantine
from shared.ranks import from_main_rank, share_buffers, world_size
from shared.run_dir import RunDir
from shared.stop import StopRequest
from shared.teacher import FrozenTeacher
from shared.training_state import TrainingState
from stage1_ssld.config import Stage1Config
from stage1_ssld.data import (
    StepSampler,
    TrainViews,
    ValViews,
    make_loader,
    open_sources,
    val_batches,
)
from stage1_ssld.data_config import NetworkConfig, TeacherConfig
from stage1_ssld.labels import labelled_classes, match_classes
from stage1_ssld.losses import symmetric_kl
from stage1_ssld.metrics import describe, evaluate


def train(
    config: Stage1Config,
    *,
    command: str,
    network: NetworkConfig,
    teacher_config: TeacherConfig | None,
    objective: str,
    export: str,
) -> None:
    """Train `network` and write `<export>.safetensors` (last step) and, with `evaluate_every`, `<export>_best.safetensors` to the run directory.

    Raises:
        UserError: anything the user can mend.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
    """
    # ---- sources and references, checked before any process group exists
    sources = open_sources(config.data.train, "data.train")
    val_source = open_sources([config.data.val], "data.val")[0] if config.data.val else None
    reference = parse_reference(network.model, network.arch)

    # ---- processes and run directory
    accelerator = start_processes(config)
    device, dtype, ranks = accelerator.device, DTYPES[config.precision], world_size()
    run = RunDir(config, command, main=accelerator.is_main_process)
    if from_main_rank(run.status) == "finished":
        run.log(f"{run.path}: this run is finished; nothing to do")
        return
    start_trackers(accelerator, config)

    # ---- teacher and classes
    teacher = _load_teacher(teacher_config, config, device) if teacher_config else None
    if objective == "labels":
        left_out = sum(source.labels is None for source in sources)
        sources, classes, names = labelled_classes(sources)
        if left_out:
            run.log(f"objective labels: {left_out} unlabelled source(s) left out")
        if teacher:
            teacher.match_classes(names, classes, "the training images")
    else:
        assert teacher is not None
        classes, names = teacher.num_classes, teacher.class_names
    owner = "the teacher" if objective == "teacher" else "the training images"
    train_labels = [
        match_classes(source, names, classes, owner) if objective == "labels" else None for source in sources
    ]
    val_labels = match_classes(val_source, names, classes, owner) if val_source else None
    if val_source and val_labels is None and teacher is None:
        run.log(f"{val_source.path}: no labels and no teacher: nothing to evaluate")
        val_source = None

    # ---- student, optimizer, schedule
    torch.manual_seed(config.seed)
    student, inputs = create_classifier(reference, num_classes=classes, drop_path=network.drop_path)
    place(student, device, channels_last=config.channels_last)
    inputs = InputSettings(inputs.mean, inputs.std, (config.data.image_size,) * 2, "bilinear", inputs.fixed_size)
    ema = ModelEmaV3(student, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema else None
    groups = parameter_groups(
        student, weight_decay=config.optim.weight_decay, decay_norm_and_bias=config.optim.decay_norm_and_bias
    )
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)
    dataset = TrainViews(sources, train_labels, config.data, config.seed)
    steps = config.total_steps(len(dataset))
    warmup_steps = config.optim.total_warmup_steps(len(dataset), config.batch_size)
    base_lr = scale_lr(config.optim.lr, config.optim.reference_batch, config.batch_size, config.optim.name)

    # ---- resume
    quarantine = Quarantine(run, len(dataset))
    networks = {"model": student.net} | ({"ema": ema.module.net} if ema else {})
    state = TrainingState(
        run, accelerator, networks, optimizer, quarantine, steps, config.batch_size, config.keep_checkpoints
    )
    start, resumed = state.restore()

    # ---- data
    batches = StepSampler(
        len(dataset),
        batch_size=config.batch_size,
        steps=steps,
        start_step=start,
        seed=config.seed,
        rank=accelerator.process_index,
        ranks=ranks,
        accumulate=config.accumulate,
    )
    pin_memory = device.type == "cuda"
    loader = make_loader(dataset, batches, workers=config.workers, pin_memory=pin_memory)

    def evaluate_now() -> dict[str, float]:
        if val_source is None:
            return {}
        net = ema.module if ema else student
        net.eval()
        share_buffers(net)
        views = ValViews(val_source, val_labels, size=config.data.image_size, crop=config.data.val_crop)
        # The same batches on any number of ranks: their size must not follow from it.
        order = val_batches(len(views), min(config.batch_size, 128), accelerator.process_index, ranks)
        metrics = evaluate(
            net,
            teacher,
            make_loader(views, order, workers=config.workers, pin_memory=pin_memory),
            device=device,
            dtype=dtype,
            on_unreadable=quarantine.add,
        )
        quarantine.write()
        run.log(f"step {step}: {describe(metrics)}")
        run.metric(step, **{f"val_{name}": value for name, value in metrics.items()})
        return metrics

    def save_network(path: Path, metrics: dict[str, float]) -> None:
        if accelerator.is_main_process:
            facts: dict[str, Any] = {
                "class_names": names,
                "crop_pct": config.data.val_crop,
                "objective": objective,
                "step": step,
                "weights": "ema" if ema else "last",
                "metrics": metrics,
                "teacher": teacher.facts() if teacher and objective == "teacher" else None,
                "licence": _licences(licence(reference, student.net), teacher if objective == "teacher" else None),
                "start": network.model,
                "run": str(run.path),
            }
            net = ema.module.net if ema else student.net
            save_backbone(
                path,
                net,
                arch=architecture(reference, student.net),
                inputs=inputs,
                classes=classes,
                **facts,
            )

    # ---- what is about to happen
    if config.compile:
        student.net.compile()
    model = accelerator.prepare_model(student)
    values = sum(parameter.numel() for parameter in student.parameters())
    run.log(
        f"{command}: {network.model} ({values / 1e6:.2f} M parameters, {classes} classes) at {config.data.image_size} px, objective {objective}"
    )
    if teacher_config and teacher_config.model.startswith("random:"):
        run.log("warning: the teacher has random weights")
    if teacher_config:
        run.log(f"teacher {teacher_config.model}{'' if objective == 'teacher' else ' (for evaluation only)'}")
    run.log(
        f"{len(dataset)} images from {len(sources)} source(s), {steps} steps of {config.batch_size} images "
        f"({ranks} processes x {config.accumulate} accumulated), {steps * config.batch_size / len(dataset):.1f} passes"
    )
    run.log(
        f"lr {base_lr:g} = {config.optim.lr:g} scaled from batch {config.optim.reference_batch} to {config.batch_size}, warm-up {warmup_steps} steps"
    )
    run.log(f"{device}, {config.precision}, {torch.get_num_threads()} threads, {config.workers} workers")
    if resumed:
        run.log(resumed)

    # ---- the loop
    step = start
    with StopRequest() as stop:
        stream = iter(loader)
        for step in range(start + 1, steps + 1):
            set_lr(optimizer, base_lr * cosine_factor(step - 1, steps=steps, warmup_steps=warmup_steps))
            model.train()
            for micro in range(config.accumulate):
                asked = time.perf_counter()
                batch = next(stream)
                state.waited += time.perf_counter() - asked
                quarantine.add(batch.unreadable)
                if len(batch.keys) * ranks * config.accumulate < config.batch_size:
                    raise UserError(
                        f"{batch.unreadable[0]} and the images after it are all unreadable; mend or remove them"
                    )
                pixels, labels = to_device(batch.pixels_BCHW, device), to_device(batch.labels_B, device)
                torch.manual_seed(stable_seed(config.seed, step, micro, accelerator.process_index))  # drop-path
                # DDP reduces gradients once a step, in the last backward pass.
                with nullcontext() if micro == config.accumulate - 1 else accelerator.no_sync(model):
                    logits = model(pixels)
                    teacher_logits = teacher(pixels) if teacher and objective == "teacher" else None
                    loss = (
                        F.cross_entropy(logits.float(), labels, reduction="sum")
                        if teacher_logits is None
                        else symmetric_kl(logits, teacher_logits)
                    )
                    # DDP averages over ranks, so the sum over this rank's images counts `ranks` times.
                    accelerator.backward(loss * (ranks / config.batch_size))
                target = labels if teacher_logits is None else teacher_logits.argmax(-1)
                hits = (logits.detach().argmax(-1) == target).sum()
                name = "agreement" if objective == "teacher" else "accuracy"
                state.watch.add(
                    step - 1, {"loss": loss / config.batch_size, name: hits / config.batch_size}, batch.keys
                )
                if step == 1 and micro == 0 and teacher_logits is not None:
                    _check_first_loss(run, loss, teacher_logits)
            optimizer_step(accelerator, optimizer, config.optim.clip_grad_norm)
            if ema:
                ema.update(student, step=step)

            if step % config.log_every == 0 or step == steps:
                state.log(step, optimizer.param_groups[0]["lr"])
            if config.evaluate_every and step % config.evaluate_every == 0 and step < steps:
                metrics = evaluate_now()
                score = metrics.get("top1", metrics.get("agreement", float("-inf")))
                if score > state.best:
                    state.best = score
                    state.watch.check()
                    save_network(run.path / f"{export}_best.safetensors", metrics)
            stopping = stop.agreed() and step < steps
            if step % config.save_every == 0 or step == steps or stopping:
                state.save(step)
            if stopping:
                raise Stopped(f"checkpoint of step {step} written to {run.checkpoints}")

    # ---- finish
    metrics = evaluate_now()
    file = run.path / f"{export}.safetensors"
    save_network(file, metrics)
    accelerator.end_training()
    run.finish(metrics | {"steps": steps, "images_seen": steps * config.batch_size}, [file])
    run.log(f"wrote {file}")


def _load_teacher(teacher: TeacherConfig, config: Stage1Config, device: torch.device) -> FrozenTeacher:
    dtype = DTYPES[teacher.precision or config.precision]
    return FrozenTeacher(
        teacher.model,
        arch=teacher.arch,
        device=device,
        dtype=dtype,
        channels_last=config.channels_last,
        size=teacher.size,
    )


def _check_first_loss(run: RunDir, loss: Tensor, teacher_logits_BK: Tensor) -> None:
    """Warn when the first loss is not what an untrained student gives: the sign of a wrong loss or wrong teacher weights."""
    expected = symmetric_kl(torch.zeros_like(teacher_logits_BK), teacher_logits_BK).item()
    first, images = loss.item(), len(teacher_logits_BK)
    # A teacher that says little makes any untrained student look far from it: below a nat an image the ratio means nothing.
    if first < 0 or first > max(1.5 * expected, images):
        run.log(
            f"warning: the first loss is {first / images:.3g} an image, {expected / images:.3g} is what a student that knows nothing gives; "
            "check that the teacher's weights and classes are the right ones"
        )


def _licences(start: str | None, teacher: FrozenTeacher | None) -> str:
    """Licences of the weights that this network's weights come from: those it started from, and its teacher's."""
    names = [start, teacher.facts()["licence"] if teacher else None]
    return " AND ".join(dict.fromkeys(name for name in names if name)) or "none: random weights, no teacher"
