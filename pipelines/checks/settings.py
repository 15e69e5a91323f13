"""What `ssld doctor` says about a pipeline or the settings of one command: do they hold together, is everything there, do they fit this machine?

A file of settings is told by its keys: `stages` make a pipeline, others belong to the command whose settings have them. Does not import torch.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssld.pipelines.checks.data import DataSet, Wanted, folder_lines, folders_of
from ssld.pipelines.checks.machine import Level, Line
from ssld.pipelines.config import CommandName
from ssld.pipelines.runner.cost import disk_bytes, total_text
from ssld.pipelines.runner.plan import make_plan
from ssld.pipelines.runner.stages import KINDS, build_stages, read_pipeline
from ssld.shared.config.settings import CommandConfig, parse_config, validate
from ssld.shared.config.training import TrainingConfig
from ssld.shared.config.yaml_files import read_recipe
from ssld.shared.errors import UserError
from ssld.shared.machine import cores
from ssld.shared.models.downloads import find_downloads_apart
from ssld.shared.wording import amount, count, some
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import TrainConfig

_NO_OUTPUT = "runs/unnamed"
"""stands in for an output that is left to the command line"""


def settings_lines(
    file: Path, probe: dict[str, Any], variables: dict[str, str], *, quick: bool = False
) -> tuple[list[Line], dict[DataSet, Wanted]]:
    """(what there is to say about a file, with a look at its pictures unless `quick`; the detection data it names that are there and what is wanted
    of them). Raises UserError where the file cannot be read.
    """
    try:
        named = _commands(file, variables)
    except UserError as error:
        if not file.is_file():
            raise
        return [Line("fault", "settings", line) for line in str(error).splitlines()], {}
    lines = list(named[1])
    sets: dict[DataSet, Wanted] = {}
    found: dict[tuple[Level, str], list[str]] = {}
    for name, config in named[0]:
        for line in _fits(config, probe):
            found.setdefault((line.level, line.text), []).append(name)
        data = _detection_data(config)
        if data and isinstance(config, TrainConfig):
            before = sets.get(data, Wanted(masks=False, allow_loss=True))
            sets[data] = Wanted(
                masks=before.masks or config.model.has_masks, allow_loss=before.allow_loss and config.data.allow_loss
            )
    for (level, text), names in found.items():
        who = f"{some(names)}: " if any(names) else ""
        lines.append(Line(level, "settings", who + text))
    lines += _download_lines(named[0])
    if named[0] and all(line.level == "ok" for line in lines):
        lines += [Line("ok", "settings", "hold together, and fit this machine")]
    if not quick:
        for folder in dict.fromkeys(folder for _, config in named[0] for folder in folders_of(config)):
            lines += folder_lines(folder)
    return lines, sets


def _commands(file: Path, variables: dict[str, str]) -> tuple[list[tuple[str, CommandConfig]], list[Line]]:
    """The (name, settings) of every command that a file is about, and lines on what is missing."""
    values = read_recipe(file, TrainingConfig.alternatives)
    if "stages" in values:
        pipeline = read_pipeline(file)
        stages = build_stages(pipeline, file, output=pipeline.output, variables=variables)
        lines: list[Line] = []
        try:
            make_plan(stages, set())
            lines += _disk_lines(disk_bytes(stages), len(stages), pipeline.output)
        except UserError as error:
            lines += [Line("fault", "settings", line) for line in str(error).splitlines()]
        return [(stage.name, stage.config) for stage in stages], lines
    name = command_of(values)
    if name is None:
        return [], [Line("fault", "settings", f"not settings of a known command; known are {', '.join(KINDS)}")]
    output = [] if "output" in values else ["--output", _NO_OUTPUT]
    config = parse_config(KINDS[name].config_type, ["--config", str(file), *output], program="doctor.py")
    missing = [
        Line("fault", "settings", f"{key}: {path}: no such file or folder")
        for key, path in config.inputs().items()
        if not path.exists()
    ]
    return [("", config)], [Line("ok", "settings", f"of the command {name}"), *missing]


def _download_lines(named: list[tuple[str, CommandConfig]]) -> Iterator[Line]:
    """What would be downloaded: models and data sets by name that are not on this machine."""
    wanted: dict[str, str] = {}
    for name, config in named:
        texts = {key: network.model for key, network in config.networks().items()} | config.hub_data()
        wanted |= {f"{name}: {key}" if name else key: text for key, text in texts.items()}
    for one in find_downloads_apart(wanted):
        yield Line("note" if one.possible else "fault", "settings", one.text)


def _disk_lines(disk: dict[str, int | None], stages: int, output: Path) -> Iterator[Line]:
    """What the stages will write, and whether the disk of `output` has room for as much of it as is known."""
    yield Line("ok", "settings", f"{count(stages, 'stage')}: {total_text(disk)}; data sets not counted")
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if sum(size or 0 for size in disk.values()) > free:
        text = f"output: {amount(free)} free on the disk of {place}, which is too little; give another output"
        yield Line("warning", "settings", text)


def command_of(values: dict[str, Any]) -> CommandName | None:
    """The command whose keys a file has: the one with the fewest keys unknown to it, and of these the one that has least to object.

    None where most keys of the file are unknown to every command; a misspelt key or two are for the command to explain.
    """
    if not values:
        return None
    unknown = {name: sum(key not in kind.config_type.model_fields for key in values) for name, kind in KINDS.items()}
    fewest = min(unknown.values())
    if 2 * fewest >= len(values):
        return None
    near = [name for name, number in unknown.items() if number == fewest]
    return min(near, key=lambda name: _objections(KINDS[name].config_type, values))


def _objections(kind: type[CommandConfig], values: dict[str, Any]) -> int:
    try:
        validate(kind, {"output": _NO_OUTPUT} | values, source="")
    except UserError as error:
        return len(str(error).splitlines())
    return 0


def _detection_data(config: CommandConfig) -> DataSet | None:
    """The detection data of a training run, as far as they are there."""
    if not isinstance(config, TrainConfig):
        return None
    data = config.data
    if not data.train_annotations.is_file() or not data.train_images.is_dir():
        return None  # a stage before this one writes them, or they are missing, which is said elsewhere
    if data.val_annotations and data.val_images and data.val_annotations.is_file() and data.val_images.is_dir():
        return data.train_annotations, data.train_images, data.val_annotations, data.val_images
    return data.train_annotations, data.train_images, None, None


def _fits(config: CommandConfig, probe: dict[str, Any]) -> Iterator[Line]:
    """Where settings do not fit the machine."""
    devices = probe.get("devices") or []
    precision, workers = getattr(config, "precision", "fp32"), getattr(config, "workers", 0)
    if not devices and precision not in ("auto", "fp32"):
        yield Line("warning", "", f"precision: {precision} without a GPU is slow, if it runs at all; --precision fp32")
    if devices and precision == "bf16" and min(device[3] for device in devices) < 8:
        yield Line("warning", "", "precision: bf16, which this GPU only emulates; --precision fp16")
    if workers > cores():
        yield Line("warning", "", f"workers: {workers} processes decode on {cores()} cores; --workers {cores()}")
    for tracker in getattr(config, "trackers", []):
        if importlib.util.find_spec(tracker) is None:
            yield Line("fault", "", f"trackers: {tracker} is not installed; pip install {tracker}, or leave it out")
    if isinstance(config, TrainingConfig) and not devices and config.steps is None and config.train_images is None:
        epochs = config.train_epochs or 0
        if isinstance(config, DistillConfig) and epochs > 100:
            yield Line(
                "warning",
                "",
                f"train_epochs: {epochs:g} passes are meant for GPUs; --steps or --train_epochs sets fewer",
            )
