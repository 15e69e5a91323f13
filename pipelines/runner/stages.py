"""Table of commands, and the conversion of a pipeline's YAML to the command lines of its stages.

A command line is checked by the parser and settings class of the command itself, so that both accept the same values. Values may hold ${NAME}: a
variable, an earlier stage (its run directory), `output` (the folder of all run directories) or `pipeline` (the YAML file). Conditions, loops and
parallel stages are left out on purpose. Does not import torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ssld.pipelines.config import (
    REFERENCE,
    ROOT,
    CommandName,
    PipelineConfig,
    ReportConfig,
    StageConfig,
    located,
)
from ssld.pipelines.folder import exists_for_user, inside_folder_of, left_behind, missing_text, rebased_value, shown
from ssld.pipelines.toy_data import ToyDataConfig
from ssld.shared.config.flag_values import flags, read_value
from ssld.shared.config.settings import CommandConfig, parse_config
from ssld.shared.config.training import TrainingConfig
from ssld.shared.config.validation import validate
from ssld.shared.config.words import takes_path
from ssld.shared.config.yaml_files import flatten, read_settings, read_yaml
from ssld.shared.errors import UserError
from ssld.shared.wording import did_you_mean
from ssld.stage1_ssld.config import (
    ConvertPaddleConfig,
    CurateConfig,
    DistillConfig,
    ExportConfig,
    PrototypesConfig,
    SoftLabelsConfig,
    TeachConfig,
)
from ssld.stage1_ssld.config import EvaluateConfig as EvaluateBackboneConfig
from ssld.stage2_detect.config import ConvertDataConfig, ConvertForeignConfig, TrainConfig
from ssld.stage2_detect.config import ConvertPaddleConfig as ConvertPaddleDetectorConfig
from ssld.stage2_detect.config import EvaluateConfig as EvaluateDetectorConfig
from ssld.stage2_detect.export_config import ExportDetectorConfig
from ssld.stage2_detect.predict_config import AuditConfig, PredictConfig

LOGS = "logs"
BURN_IN = "moving_teacher.burn_in"
_SPLITS = tuple(
    f"{name}{suffix}"
    for name in ("train", "val", "valid", "validation", "test", "trainval")
    for suffix in ("", ".json")
)


@dataclass(frozen=True)
class Kind:
    """Properties of a command that the runner needs."""

    script: str
    config_type: type[CommandConfig]
    writes: tuple[str, ...] = ()
    """files and folders in its run directory that later stages may read"""
    remake: bool = False
    """whether the command is cheap and no stage reads its files: made again whenever an input has changed"""
    one_process: bool = False
    """whether the command cannot use several processes"""


KINDS: dict[CommandName, Kind] = {
    "toy_data": Kind("pipelines/toy_data.py", ToyDataConfig, ("stage1", "stage2"), one_process=True),
    "convert_backbone": Kind(
        "stage1_ssld/convert_paddle.py", ConvertPaddleConfig, ("backbone.safetensors",), one_process=True
    ),
    "convert_data": Kind("stage2_detect/convert_data.py", ConvertDataConfig, _SPLITS, one_process=True),
    "teach": Kind("stage1_ssld/teach.py", TeachConfig, ("teacher.safetensors", "teacher_best.safetensors")),
    "prototypes": Kind("stage1_ssld/prototypes.py", PrototypesConfig, ("teacher.safetensors",)),
    "curate": Kind("stage1_ssld/curate.py", CurateConfig, ("selected.parquet", "selected")),
    "soft_labels": Kind("stage1_ssld/write_soft_labels.py", SoftLabelsConfig, ("store",)),
    "distill": Kind("stage1_ssld/distill.py", DistillConfig, ("student.safetensors", "student_best.safetensors")),
    "evaluate_backbone": Kind("stage1_ssld/evaluate.py", EvaluateBackboneConfig),
    "export_backbone": Kind(
        "stage1_ssld/export.py", ExportConfig, ("backbone.onnx", "backbone.pt2", "hub"), one_process=True
    ),
    "convert_detector": Kind(
        "stage2_detect/convert_detector.py", ConvertForeignConfig, ("detector.safetensors",), one_process=True
    ),
    "convert_paddle_detector": Kind(
        "stage2_detect/convert_paddle.py", ConvertPaddleDetectorConfig, ("detector.safetensors",), one_process=True
    ),
    "train": Kind("stage2_detect/train.py", TrainConfig, ("detector.safetensors",)),
    "evaluate_detector": Kind("stage2_detect/evaluate.py", EvaluateDetectorConfig, ("detections.json",)),
    "export_detector": Kind(
        "stage2_detect/export.py", ExportDetectorConfig, ("detector.onnx", "detector.pt2", "hub"), one_process=True
    ),
    "predict": Kind(
        "stage2_detect/predict.py",
        PredictConfig,
        ("predictions.json", "pseudo_labels.json", "pictures", "predictions.csv", "labels", "crops"),
    ),
    "audit": Kind("stage2_detect/audit.py", AuditConfig, ("annotate_next.txt", "annotate_next.json")),
    "report": Kind("pipelines/report.py", ReportConfig, ("report.html",), remake=True, one_process=True),
}


_TYPED = {
    "convert_backbone": "convert-paddle",
    "evaluate_backbone": "evaluate",
    "evaluate_detector": "evaluate",
    "export_backbone": "export",
    "export_detector": "export",
}


def typed_name(command: str) -> str:
    """Return the sub-command of `ssld` for a command of a pipeline: `soft-labels` for `soft_labels`."""
    return _TYPED.get(command, command.replace("_", "-"))


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline, with checked settings.

    Attributes:
        arguments: words after the script on its command line.
        needs: names of the earlier stages that it reads from.
    """

    name: str
    kind: Kind
    config: CommandConfig
    arguments: tuple[str, ...]
    processes: int
    needs: frozenset[str]

    @property
    def run(self) -> Path:
        """Run directory of the stage."""
        return self.config.output

    def names_setting(self, message: str) -> bool:
        """Return whether a message begins with a key of the stage's settings, as in `batch_size: ...` or `student.model ...`."""
        key = re.match(r"(\w+)(?::|\.\w+(?:\.\w+)*[: ])", message)
        return key is not None and key[1] in type(self.config).model_fields

    def writes(self, path: Path) -> bool:
        """Return whether the finished stage contains `path`."""
        return any(path.is_relative_to(self.run / name) for name in self.kind.writes)


def read_pipeline(file: Path, given: dict[str, dict[str, str]] | None = None, *, smoke: bool = False) -> PipelineConfig:
    """Read a pipeline from a YAML file, which may be in another folder than the current one.

    Args:
        given: {stage: {dotted key: value}} that replace settings of the file, for stages `like` it too.
        smoke: whether the `smoke` settings of the file will be applied; they must not contradict `given`.

    Raises:
        UserError: one line per wrong key, or an unknown stage in `given`.
    """
    values, source = _with_variables_as_text(read_settings(file), file), str(shown(file))
    stages = values.get("stages")
    known = stages if isinstance(stages, dict) else {}
    sets = [stage.get("set") for stage in known.values() if isinstance(stage, dict)]
    in_file = {key for one in sets if isinstance(one, dict) for key, _ in flatten(one)}
    with inside_folder_of(file):
        for name, settings in (given or {}).items():
            if not isinstance(known.get(name), dict):
                raise UserError(f"--stages.{name}: no such stage{did_you_mean(name, list(known))}")
            typed = _with_paths(_command(name, known), settings)
            known[name] = {**known[name], "set": _with_given(known[name].get("set", {}), typed, in_file)}
        pipeline = validate(PipelineConfig, values, source=source)
    for name, settings in (given or {}).items() if smoke else ():
        command = pipeline.stages[name].command
        for key in dict(flatten(pipeline.smoke.get(command, {}))).keys() & settings.keys():
            raise UserError(f"--stages.{name}.{key}: the section smoke of the file sets it too; leave out this flag")
    return pipeline


def _with_variables_as_text(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a pipeline with its variables as they are written, except null: 1.10 and `no` may be parts of names, and are not 1.1 and false there."""
    variables = values.get("variables")
    if not isinstance(variables, dict):
        return values  # the field's own check reports the mistake
    written = read_yaml(file, as_text=True)["variables"]
    texts = {name: None if value is None else written.get(name, value) for name, value in variables.items()}
    return values | {"variables": texts}


def _command(name: str, stages: dict[str, Any]) -> Any:
    """Return the command of a stage, its own or that of the stage it is like; None for a file with mistakes, which its check reports."""
    for _ in stages:
        stage = stages.get(name)
        if not isinstance(stage, dict):
            return None
        if "command" in stage:
            return stage["command"]
        name = str(stage.get("like"))
    return None


def _with_paths(command: Any, given: dict[str, str]) -> dict[str, Any]:
    """Return the values of flags of the command line, with their paths as they are written in the current folder."""
    if command not in get_args(CommandName):
        return given
    return {key: _typed(KINDS[command].config_type, key, text) for key, text in given.items()}


def _typed(config_type: type[CommandConfig], key: str, text: str) -> Any:
    """Return the value of a flag that the user has typed, with its paths as they are written in the current folder."""
    value = read_value(config_type, key, text, exists_for_user)
    return rebased_value(value) if takes_path(config_type, key.split(".")) else value


def _with_given(own: Any, given: dict[str, Any], in_file: set[str]) -> Any:
    """Return the settings of a stage with those of the command line in place of its own and of their alternatives `in_file`."""
    if not isinstance(own, dict):
        return own  # the field's own check reports the mistake
    replaced = [key for keys in TrainingConfig.alternatives if given.keys() & set(keys) for key in keys]
    return dict(flatten(own)) | {key: None for key in replaced if key in in_file} | given


def build_stages(
    pipeline: PipelineConfig,
    file: Path,
    *,
    output: Path,
    variables: dict[str, str] | None = None,
    smoke: bool = False,
) -> list[Stage]:
    """Build every stage, with its command line parsed and checked; inside the pipeline's folder, where relative paths begin.

    Args:
        pipeline: content of `file`.
        output: folder of the run directories.
        variables: values that replace those in the file, with paths as the user has typed them.
        smoke: whether to apply the file's `smoke` settings.

    Raises:
        UserError: one line per mistake, over all stages.
    """
    names = _variables(pipeline, file, variables or {}) | {"output": str(output), "pipeline": str(file)}
    paths = {name: rebased_value(text) for name, text in (variables or {}).items()}
    stages: list[Stage] = []
    errors: list[str] = []
    for name, settings in pipeline.stages.items():
        try:
            _check_name(name, names)
            extra = pipeline.smoke.get(settings.command, {}) if smoke else {}
            stages.append(
                _build_stage(name, settings, extra, _Names(names, paths, frozenset(pipeline.variables)), output, stages)
            )
        except UserError as error:
            errors += [f"stage {name}: {line}" for line in str(error).splitlines()]
        names = {**names, name: str(output / name)}
    if errors:
        raise UserError(*errors)
    return stages


def followers(stages: list[Stage], first: set[str]) -> set[str]:
    """Return the stages in `first` and all that depend on them, directly or indirectly."""
    names = set(first)
    for stage in stages:  # in order: a stage reads only from earlier ones
        if stage.needs & names:
            names.add(stage.name)
    return names


def own_file(path: str) -> str:
    """Return a file of this project (path relative to its root) as a user would type it in the current folder; another file of the same name there
    does not count."""
    relative, own = Path(path), ROOT / path
    return path if relative.exists() and relative.samefile(own) else str(own)


def find_pipeline(text: str) -> Path:
    """Return the file of a pipeline given by path (as in `located`) or by the name of a shipped one, as `quickstart`.

    Raises UserError for a bare name that is neither a file nor a shipped pipeline.
    """
    if "/" in text or Path(text).suffix or Path(text).is_file():
        return Path(located(text))
    shipped = {file.stem: file.relative_to(ROOT) for file in sorted((ROOT / "pipelines").rglob("*.yaml"))}
    if text not in shipped:
        raise UserError(
            f"{text}: no such file, and no shipped pipeline of this name{did_you_mean(text, list(shipped))}"
        )
    return Path(own_file(str(shipped[text])))


def has_moving_teacher(config: CommandConfig) -> bool:
    """Return whether a stage trains under a moving teacher: in a few steps its burn-in, `BURN_IN`, has to be one step, else it would not begin."""
    return isinstance(config, TrainConfig) and config.moving_teacher is not None


class _Names(NamedTuple):
    """Values of ${NAME}: variables, earlier stages, `output` and `pipeline`.

    Attributes:
        texts: all of them.
        paths: those of the command line once more, for the beginning of a path: relative to the pipeline's folder instead of the current one.
        variables: names of the variables.
    """

    texts: dict[str, str]
    paths: dict[str, str]
    variables: frozenset[str]


def _build_stage(
    name: str,
    settings: StageConfig,
    extra: dict[str, Any],
    names: _Names,
    output: Path,
    earlier: list[Stage],
) -> Stage:
    """Build a stage with its settings and `extra` on top."""
    kind = KINDS[settings.command]
    if settings.processes > 1 and kind.one_process:
        raise UserError(f"{settings.command} runs as one process; remove processes: {settings.processes}")
    used: set[str] = set()
    values = {}
    for key, value in (*flatten(settings.set), *flatten(extra)):
        values[key] = _filled_in(value, kind.config_type, key, names, used)
    if settings.command == "convert_detector" and str(values.get("weights")).endswith(".pdparams"):
        raise UserError(
            f"weights: {values['weights']}: PaddlePaddle's detectors are converted by the command convert_paddle_detector, "
            "which was convert_detector up to version 0.2; rename it"
        )
    for key in ("output", "config"):
        if key in values:
            raise UserError(f"set.{key}: not allowed; the runner sets --{key}")
    arguments = [*flags(kind.config_type, values), "--output", str(output / name)]
    if settings.config:
        file = Path(located(_substitute(settings.config, names.texts, used, names.paths)))
        if file.suffix and left_behind(file):  # without one it may be the name of a recipe
            raise UserError(f"config: {missing_text(file)}")
        arguments = ["--config", str(file), *arguments]
    config = parse_config(kind.config_type, arguments, program=kind.script)
    if extra and BURN_IN not in dict(flatten(extra)) and has_moving_teacher(config):
        arguments += flags(kind.config_type, {BURN_IN: 1})
        config = parse_config(kind.config_type, arguments, program=kind.script)
    needs = {stage.name for stage in earlier if stage.name in used or "output" in used}
    for path in config.inputs().values():
        needs |= {stage.name for stage in earlier if path.is_relative_to(stage.run)}
    return Stage(name, kind, config, tuple(arguments), settings.processes, frozenset(needs))


def _check_name(name: str, names: dict[str, str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == LOGS:
        raise UserError(f"not a valid name for a stage; use letters, digits, _ and -, and not {LOGS!r}")
    if name in names:
        raise UserError("a variable has the same name; rename one of them")


def _variables(pipeline: PipelineConfig, file: Path, given: dict[str, str]) -> dict[str, str]:
    values = pipeline.variables | given
    for name, value in values.items():
        if name in ("output", "pipeline"):
            raise UserError(f"{shown(file)}: variables.{name}: this name is reserved by the runner")
        if value is None:
            raise UserError(f"{shown(file)}: variable {name} has no value; give it as --variables.{name} VALUE")
    return {name: str(value) for name, value in values.items()}


def _filled_in(value: Any, config_type: type[CommandConfig], key: str, names: _Names, used: set[str]) -> Any:
    """Return a setting with its ${NAME} replaced. A variable alone, `images: ${photos}`, is the text of a flag: it may name several paths."""
    alone = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if alone is None or alone[1] not in names.variables:
        paths = names.paths if takes_path(config_type, key.split(".")) else {}
        return _substitute(value, names.texts, used, paths)
    used.add(alone[1])
    text, typed = names.texts[alone[1]], alone[1] in names.paths
    return _typed(config_type, key, text) if typed else read_value(config_type, key, text)


def _substitute(value: Any, names: dict[str, str], used: set[str], paths: dict[str, str]) -> Any:
    """Replace every ${NAME} in `value`, at the beginning of a path by that of `paths` if it has one; the names are added to `used`."""
    if isinstance(value, dict):
        return {key: _substitute(inner, names, used, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(inner, names, used, paths) for inner in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        if name not in names:
            raise UserError(
                f"${{{name}}}: no variable and no earlier stage of this name{did_you_mean(name, list(names))}"
            )
        used.add(name)
        begins_path = match.start() == 0 and value[match.end() : match.end() + 1] in ("", "/")
        return paths.get(name, names[name]) if begins_path else names[name]

    return REFERENCE.sub(replacement, value)
