"""What `ssld inspect` says of JSON, YAML and JSON-lines files: told by what they hold, not by their names."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ssld.pipelines.checks.settings import command_of
from ssld.shared.config.training import TrainingConfig
from ssld.shared.config.yaml_files import read_recipe, read_yaml
from ssld.shared.errors import UserError
from ssld.shared.run_dir import read_metrics

KNOWN = (
    "known are model files (.safetensors), exported networks (.onnx, .pt2), manifests (.parquet), COCO data sets and records of runs (.json), "
    "settings and pipelines (.yaml), metrics (.jsonl), and folders of runs, pipelines, checkpoints and soft labels"
)
_COCO = ("images", "annotations", "categories")


def inspect_record(path: Path) -> tuple[str, dict[str, Any]]:
    """(what it is, facts) of a .json, .yaml or .jsonl file. Raises UserError where it is nothing of ours."""
    if path.suffix == ".json":
        return _json_file(path)
    if path.suffix == ".jsonl":
        return _metrics(path)
    return _yaml_file(path)


def inspect_pipeline_output(folder: Path) -> tuple[str, dict[str, Any]]:
    """The same of a folder in which a pipeline has its run directories."""
    record = _read_json(folder / "pipeline.json")
    stages = record.get("pipeline", {}).get("stages") if isinstance(record, dict) else None
    if not isinstance(stages, dict):
        raise UserError(f"{folder / 'pipeline.json'}: not the record of a pipeline; {KNOWN}")
    states = {name: _state(folder / name) for name in stages}
    done = sum(state == "finished" for state in states.values())
    facts = {"pipeline": record.get("name"), "smoke sizes": bool(record.get("smoke")), "stages": states}
    return f"output of a pipeline, {done} of {len(states)} stages finished", facts


def _state(run: Path) -> str:
    if (run / "result.json").is_file():
        return "finished"
    return "not finished" if run.is_dir() else "not begun"


def _json_file(path: Path) -> tuple[str, dict[str, Any]]:
    content = _read_json(path)
    if isinstance(content, list) and content and all(_has(row, "image_id", "category_id", "score") for row in content):
        return "detections as COCO's results", {
            "detections": f"{len(content):,}",
            "images": f"{len({str(row['image_id']) for row in content}):,}",
        }
    if not isinstance(content, dict):
        raise UserError(f"{path}: nothing of ours; {KNOWN}")
    if all(_is_rows(content.get(key)) for key in _COCO):
        return _coco(content)
    plain = {key: value for key, value in content.items() if key not in ("config", "pipeline")}
    if _has(content, "command", "metrics", "outputs"):
        return "result of a run", plain | {"outputs": sorted(content["outputs"])}
    if _has(content, "command", "versions"):
        return "record of a run's start", plain
    if _has(content, "name", "pipeline"):
        return inspect_pipeline_output(path.parent)
    if _has(content, "arch", "class_names"):
        return "what a model's folder for the hub says of it", plain
    raise UserError(f"{path}: nothing of ours; {KNOWN}")


def _coco(content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    names = {str(row.get("id")): str(row.get("name")) for row in content["categories"]}
    boxes = Counter(names.get(str(row.get("category_id")), "unknown") for row in content["annotations"])
    scored = sum("score" in row for row in content["annotations"])
    facts: dict[str, Any] = {
        "images": f"{len(content['images']):,}",
        "objects": f"{len(content['annotations']):,}",
        "with segmentation": f"{sum(bool(row.get('segmentation')) for row in content['annotations']):,}",
        "classes": {name: boxes[name] for name in dict.fromkeys([*names.values(), *boxes])},
    }
    return "COCO data set" + (" with scores: what a detector has found" if scored else ""), facts


def _yaml_file(path: Path) -> tuple[str, dict[str, Any]]:
    values = read_yaml(path)
    if isinstance(values.get("stages"), dict):
        stages = {
            name: str(one.get("command") or f"like {one.get('like')}") if isinstance(one, dict) else str(one)
            for name, one in values["stages"].items()
        }
        shown = {key: values[key] for key in ("output", "variables") if key in values}
        return f"pipeline of {len(stages)} stages", shown | {"stages": stages}
    values = read_recipe(path, TrainingConfig.alternatives)
    command = command_of(values)
    if command is None:
        raise UserError(f"{path}: neither a pipeline nor settings of a command; {KNOWN}")
    return f"settings of the command {command}", values


def _metrics(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    except (OSError, ValueError):
        lines = read_metrics(path.parent) if path.name == "metrics.jsonl" else []  # without a torn last line
    if not lines or not all(_has(line, "step") for line in lines):
        raise UserError(f"{path}: no metrics of a run; {KNOWN}")
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    steps = f"{lines[0]['step']} to {lines[-1]['step']}"
    return "metrics of a run", {"lines": f"{len(lines):,}", "steps": steps, "last values": last}


def _has(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
