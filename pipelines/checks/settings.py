"""Settings checks of `ssld doctor`, for a pipeline or one command: are they valid, do their inputs exist, do they fit this machine?

The kind of a settings file is inferred from its keys: `stages` means a pipeline, otherwise the command that has these keys. Does not import torch.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssld.pipelines.checks.data import DataNeeds, DataSet, folder_lines, sources_of, words_of
from ssld.pipelines.checks.machine import Level, Line
from ssld.pipelines.config import CommandName
from ssld.pipelines.folder import shown
from ssld.pipelines.runner.cost import total_text
from ssld.pipelines.runner.estimate import Costs, expected_costs, time_text
from ssld.pipelines.runner.plan import damage_of_newest, make_plan, unnamed_networks
from ssld.pipelines.runner.stages import KINDS, Stage, build_stages, read_pipeline
from ssld.shared.config.settings import CommandConfig, parse_config
from ssld.shared.config.training import TrainingConfig
from ssld.shared.config.validation import validate
from ssld.shared.config.yaml_files import read_recipe
from ssld.shared.errors import UserError
from ssld.shared.machine import cores
from ssld.shared.models.damage import damage_of
from ssld.shared.models.downloads import find_downloads_apart
from ssld.shared.run_dir import read_result
from ssld.shared.wording import amount, count, duration, some
from ssld.stage1_ssld.config import DistillConfig
from ssld.stage2_detect.config import TrainConfig

_NO_OUTPUT = "runs/unnamed"
"""placeholder for an output that the file leaves to the command line"""


def is_pipeline(file: Path) -> bool:
    """Return whether a settings file is that of a pipeline; False for one that cannot be read, which its check reports."""
    try:
        return "stages" in read_recipe(file)
    except UserError:
        return False


def settings_lines(
    file: Path, probe: dict[str, Any], variables: dict[str, str], *, quick: bool = False
) -> tuple[list[Line], dict[DataSet, DataNeeds]]:
    """Check a settings file, and open its images unless `quick`.

    Returns (findings, {existing detection data set: what training needs of it}), with paths as the user can open them. Raises UserError if the
    file does not exist.
    """
    try:
        commands, lines = _commands(file, variables)
    except UserError as error:
        if not file.is_file():
            raise
        return [Line("fault", "settings", line) for line in str(error).splitlines()], {}
    data_sets: dict[DataSet, DataNeeds] = {}
    misfits: dict[tuple[Level, str], list[str]] = {}
    for name, config in commands:
        for line in _fits(config, probe):
            misfits.setdefault((line.level, line.text), []).append(name)
        data = _shown(_detection_data(config))
        if data and isinstance(config, TrainConfig):
            before = data_sets.get(data, DataNeeds(masks=False, allow_loss=True))
            data_sets[data] = DataNeeds(
                masks=before.masks or config.model.has_masks, allow_loss=before.allow_loss and config.data.allow_loss
            )
    for (level, text), names in misfits.items():
        who = f"{some(names)}: " if any(names) else ""
        lines.append(Line(level, "settings", who + text))
    lines += _download_lines(commands)
    if commands and all(line.level == "ok" for line in lines):
        lines += [Line("ok", "settings", "valid, and fit this machine")]
    if not quick:
        read = [sources_of(config) for _, config in commands]
        for folder in dict.fromkeys(folder for folders, _ in read for folder in folders):
            lines += folder_lines(folder)
        if others := list(dict.fromkeys(other for _, several in read for other in several)):
            lines.append(Line("note", "images", f"not opened here, where only folders of images are: {some(others)}"))
    return lines, data_sets


def _shown(data: DataSet | None) -> DataSet | None:
    """Return the words that name a data set with paths as the user can open them."""
    return data and tuple(word if word.startswith(("--", "hub:")) else str(shown(Path(word))) for word in data)


def stages_of(file: Path, variables: dict[str, str]) -> list[Stage]:
    """Return the stages of a pipeline, or the settings of one command as a stage of its name; none where the keys fit no command.

    Raises UserError for mistakes in the file.
    """
    values = read_recipe(file, TrainingConfig.alternatives)
    if "stages" in values:
        pipeline = read_pipeline(file)
        return build_stages(pipeline, file, output=pipeline.output, variables=variables)
    name = command_of(values)
    if name is None:
        return []
    words = ["--config", str(file), *([] if "output" in values else ["--output", _NO_OUTPUT])]
    config = parse_config(KINDS[name].config_type, words, program="doctor.py")
    return [Stage(name, KINDS[name], config, tuple(words), 1, frozenset())]


def _commands(file: Path, variables: dict[str, str]) -> tuple[list[tuple[str, CommandConfig]], list[Line]]:
    """Return ([(name, settings) of every command in a file], findings on missing inputs, damaged checkpoints and disk space).

    The name is that of the stage, empty in the file of one command.
    """
    stages = stages_of(file, variables)
    if not stages:
        return [], [Line("fault", "settings", f"these keys fit no command; commands: {', '.join(KINDS)}")]
    config, output = stages[0].config, stages[0].run.parent
    if is_pipeline(file):
        lines: list[Line] = []
        try:
            costs = expected_costs(make_plan(stages, set()), output)
            lines += [_time_line(costs, file), *_disk_lines(costs.disk, len(stages), output)]
        except UserError as error:
            lines += [Line("fault", "settings", line) for line in str(error).splitlines()]
        return [(stage.name, stage.config) for stage in stages], lines
    faults = [
        Line("fault", "settings", f"{key}: {damage_of(path) or f'{path}: no such file or folder'}")
        for key, path in config.inputs().items()
        if not path.exists() or damage_of(path)
    ]
    if read_result(config.output) is None and (damage := damage_of_newest(config)):
        faults.append(Line("fault", "settings", damage))
    return [("", config)], [Line("ok", "settings", f"settings of the command {stages[0].name}"), *faults]


def _download_lines(commands: list[tuple[str, CommandConfig]]) -> Iterator[Line]:
    """Yield the downloads that a run needs: models and data sets given by name that are not on this machine."""
    references: dict[str, str] = {}
    for name, config in commands:
        references |= {f"{name}: {key}" if name else key: text for key, text in config.remote_references().items()}
        for text in unnamed_networks(config):
            yield Line("fault", "settings", f"{name}: {text}" if name else text)
    for download in find_downloads_apart(references):
        yield Line("note" if download.possible else "fault", "settings", download.line)


def _time_line(costs: Costs, file: Path) -> Line:
    """Return the time of the stages that are left, each one's where it is known."""
    each = [f"{name} {duration(time)}" for name, time in costs.times.items() if time is not None]
    parts = [time_text(costs.times) + (f" ({', '.join(each)})" if len(each) > 1 else "")]
    if costs.remembered:
        parts.append(f"{count(len(costs.remembered), 'stage')} by the last known rate of this machine")
    if None in costs.times.values() or costs.remembered:
        parts.append(f"ssld run {shown(file)} --dry-run --estimate measures it")
    return Line("ok", "time", "; ".join(parts))


def _disk_lines(disk: dict[str, int | None], stages: int, output: Path) -> Iterator[Line]:
    """Yield the disk space that the stages need, and a warning if the disk of `output` has less than the known part."""
    yield Line("ok", "settings", f"{count(stages, 'stage')}: {total_text(disk)}; data sets not counted")
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if sum(size or 0 for size in disk.values()) > free:
        text = f"output: {amount(free)} free on the disk of {place}, which is not enough; give another output"
        yield Line("warning", "settings", text)


def command_of(values: dict[str, Any]) -> CommandName | None:
    """Infer the command of a settings file: the one with the fewest unknown keys, ties broken by the fewest validation errors.

    None if every command misses at least half of the keys; a few misspelled keys are left to the command's own error message.
    """
    if not values:
        return None
    unknown = {name: sum(key not in kind.config_type.model_fields for key in values) for name, kind in KINDS.items()}
    fewest = min(unknown.values())
    if 2 * fewest >= len(values):
        return None
    candidates = [name for name, number in unknown.items() if number == fewest]
    return min(candidates, key=lambda name: _count_errors(KINDS[name].config_type, values))


def _count_errors(kind: type[CommandConfig], values: dict[str, Any]) -> int:
    try:
        validate(kind, {"output": _NO_OUTPUT} | values, source="")
    except UserError as error:
        return len(str(error).splitlines())
    return 0


def _detection_data(config: CommandConfig) -> DataSet | None:
    """Return the words that name the files of a detector training that exist; None if the training part does not."""
    if not isinstance(config, TrainConfig):
        return None
    data = config.data
    if data.source:
        known = data.source.startswith("hub:") or Path(data.source).exists()
        return words_of({"data": [data.source]}) if known else None
    pairs = {part: data.pairs(part) for part in ("train", "val")}
    there = {part: all(file.is_file() and folder.is_dir() for file, folder in pairs[part]) for part in pairs}
    if not there["train"]:
        return None  # an earlier stage writes them, or they are missing, which is reported elsewhere
    files = {"annotations": pairs["train"], "val_annotations": pairs["val"] if there["val"] else []}
    columns = {name: list(zip(*files[name], strict=True)) or [(), ()] for name in files}
    return words_of(
        {
            "annotations": columns["annotations"][0],
            "images": columns["annotations"][1],
            "val_annotations": columns["val_annotations"][0],
            "val_images": columns["val_annotations"][1],
        }
    )


def _fits(config: CommandConfig, probe: dict[str, Any]) -> Iterator[Line]:
    """Yield the settings that do not fit the machine."""
    devices = probe.get("devices") or []
    precision, workers = getattr(config, "precision", "fp32"), getattr(config, "workers", 0)
    if not devices and precision not in ("auto", "fp32"):
        yield Line("warning", "", f"precision: {precision} is slow or unsupported without a GPU; use --precision fp32")
    if devices and precision == "bf16" and min(device[3] for device in devices) < 8:
        yield Line("warning", "", "precision: bf16 is only emulated on this GPU; use --precision fp16")
    if workers > cores():
        yield Line("warning", "", f"workers: {workers} decoding processes on {cores()} cores; use --workers {cores()}")
    for tracker in getattr(config, "trackers", []):
        if importlib.util.find_spec(tracker) is None:
            yield Line("fault", "", f"trackers: {tracker} is not installed; pip install {tracker}, or remove it")
    if isinstance(config, TrainConfig) and config.freezes_random_norms:
        yield Line(
            "warning",
            "",
            f"backbone: {config.backbone} has random weights; its BatchNorm layers, if it has any, normalize nothing when frozen: "
            "use --model.freeze_norm false",
        )
    if isinstance(config, TrainingConfig) and not devices and config.steps is None and config.train_images is None:
        epochs = config.train_epochs or 0
        if isinstance(config, DistillConfig) and epochs > 100:
            yield Line(
                "warning",
                "",
                f"train_epochs: {epochs:g} passes are meant for GPUs; set fewer with --steps or --train_epochs",
            )
