"""`ssld inspect`: what a file or folder of ours is, where it came from, how good it is, and under which licence its teacher stands.

Knows model files (.safetensors), exported networks (.onnx, .pt2), manifests of a curation (.parquet), stores of soft labels, run directories,
checkpoints, outputs of pipelines, and the files of `inspect_records.py`. Settings that a detector of its kind does not use are left out.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

from ssld.pipelines.inspecting_records import KNOWN, inspect_pipeline_output, inspect_record
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import UserError

# kind of detector -> the groups of its settings that it uses
_BLOCKS = {
    "faster_rcnn": ("rpn", "roi"),
    "mask_rcnn": ("rpn", "roi", "mask"),
    "cascade_rcnn": ("rpn", "roi", "cascade"),
    "cascade_mask_rcnn": ("rpn", "roi", "cascade", "mask"),
    "retinanet": ("dense", "retinanet"),
    "gfl": ("dense", "gfl"),
}
_ALL_BLOCKS = {name for names in _BLOCKS.values() for name in names}
_FIRST = (
    *("kind", "arch", "num_classes", "class_names", "input_size", "teacher", "licence", "backbone", "step", "weights"),
    *("metrics", "model", "resize"),
)
_MOST = 10


def inspect_text(path: Path) -> str:
    """What is at a path, as readable lines. Raises UserError where it is nothing of ours."""
    if path.is_dir():
        title, facts = _folder(path)
    elif not path.exists():
        raise UserError(f"{path}: no such file or folder")
    elif path.suffix == ".onnx":
        title, facts = "exported network (ONNX)", _onnx(path)
    elif path.suffix == ".pt2":
        title, facts = "exported network (torch.export)", _program(path)
    elif path.suffix == ".parquet":
        title, facts = _parquet(path)
    elif path.name == "store.json":
        return inspect_text(path.parent)
    elif path.suffix in (".json", ".jsonl", ".yaml", ".yml"):
        title, facts = inspect_record(path)
    else:
        title, facts = _model(path)
    return "\n".join([f"{path}: {title}", *_lines(_ordered(_without_unused(facts)))])


def _model(path: Path) -> tuple[str, dict[str, Any]]:
    from ssld.shared.models.model_file import read_metadata, read_shapes

    try:
        metadata, shapes = read_metadata(path), read_shapes(path)
    except UserError:
        if path.suffix == ".safetensors":
            raise
        raise UserError(f"{path}: nothing of ours; {KNOWN}") from None
    values = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        values += size
    facts = {"tensors": f"{len(shapes)} ({values / 1e6:.2f} M values)", **metadata}
    if not metadata:
        return "safetensors file of another program", facts | {"metadata": "none: not written by this project"}
    kind = metadata.get("kind", "backbone")
    what = (
        f"detector ({metadata['model']['kind']})"
        if isinstance(metadata.get("model"), dict) and "kind" in metadata["model"]
        else kind
    )
    return f"{what} file", facts


def _onnx(path: Path) -> dict[str, Any]:
    try:
        import onnx
    except ImportError:
        raise UserError(f"{path}: reading it needs onnx; pip install 'ssld[export]'") from None
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base that it exports
        raise UserError(f"{path}: not an ONNX file ({' '.join(str(error).split())[:80]})") from None
    facts: dict[str, Any] = {
        "opset": ", ".join(f"{one.domain or 'ai.onnx'} {one.version}" for one in model.opset_import),
        "inputs": ", ".join(one.name for one in model.graph.input),
        "outputs": ", ".join(one.name for one in model.graph.output),
    }
    return facts | {entry.key: _parsed(entry.value) for entry in model.metadata_props}


def _program(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("metadata.json")), None)
            facts = json.loads(archive.read(name)) if name else {"metadata": "none: not written by this project"}
    except (zipfile.BadZipFile, ValueError):
        raise UserError(f"{path}: not a torch.export program") from None
    return {key: _parsed(value) for key, value in facts.items()}


def _parquet(path: Path) -> tuple[str, dict[str, Any]]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:80]})") from None
    schema = file.schema_arrow
    facts = json.loads((schema.metadata or {}).get(b"ssld", b"{}"))
    rows = {"rows": f"{file.metadata.num_rows:,}", "columns": schema.names}
    if facts.get("kind") != "manifest":
        return "Parquet file of another program", rows
    facts["pool"] = [source["path"] for source in facts.get("pool", [])]
    return "manifest of a curation", rows | facts


def _folder(path: Path) -> tuple[str, dict[str, Any]]:
    if (path / "store.json").is_file():
        facts = _json(path / "store.json")
        shards = facts.get("shards", [])
        facts["sources"] = [
            f"{source.get('path')} ({source.get('rows', 0):,} rows)" for source in facts.get("sources", [])
        ]
        facts["shards"] = f"{len(shards)} ({sum(shard.get('images', 0) for shard in shards):,} images)"
        facts.pop("replayed", None)  # checksums of views, for the machine
        return "store of soft labels", facts | {"size": _size(path)}
    if (path / "state.json").is_file():
        facts = _json(path / "state.json")
        whole = (path / "COMPLETE").exists()
        parts = sorted(file.name for file in path.glob("*.safetensors"))
        plain = {key: value for key, value in facts.items() if not isinstance(value, dict)}
        return f"checkpoint ({'complete' if whole else 'NOT complete: it is not used'})", plain | {
            "parts": parts,
            "size": _size(path),
        }
    if (path / "config.yaml").is_file():
        return _run(path)
    if (path / "pipeline.json").is_file():
        return inspect_pipeline_output(path)
    raise UserError(f"{path}: nothing of ours; {KNOWN}")


def _run(path: Path) -> tuple[str, dict[str, Any]]:
    settings = read_yaml(path / "config.yaml")
    environment = _json(path / "environment.json") if (path / "environment.json").is_file() else {}
    checkpoints = sorted(folder.name for folder in path.glob("checkpoints/*") if (folder / "COMPLETE").exists())
    facts: dict[str, Any] = {}
    state = "not finished: the same command goes on"
    if (path / "result.json").is_file():
        result = _json(path / "result.json")
        state = "finished"
        facts = {
            "command": result.get("command"),
            "finished": result.get("finished"),
            "minutes": round(result.get("seconds", 0) / 60, 1),
        }
        facts |= {"metrics": result.get("metrics", {}), "outputs": sorted(result.get("outputs", {}))}
    facts["checkpoints"] = checkpoints
    wanted = ("started", "machine", "versions", "device", "devices")
    facts |= {key: environment[key] for key in wanted if key in environment}
    given = (
        "backbone",
        "student",
        "teacher",
        "model",
        "data",
        "init",
        "steps",
        "train_epochs",
        "batch_size",
        "precision",
        "seed",
    )
    model = settings.get("model") if isinstance(settings, dict) else None
    shown = {key: settings[key] for key in given if isinstance(settings, dict) and settings.get(key) is not None}
    if isinstance(model, dict) and "kind" in model:
        shown["model"] = model["kind"]
    return f"run directory, {state}", facts | {"settings": shown}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error})") from None


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 2**20:,.1f} MB"


def _parsed(value: Any) -> Any:
    """A metadata text, as JSON where it is some."""
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in "[{" else value
    except ValueError:
        return value


def _without_unused(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without the groups of settings that a detector of its kind has no use for."""
    model = facts.get("model")
    used = _BLOCKS.get(str(model.get("kind"))) if isinstance(model, dict) else None
    if used is None or not isinstance(model, dict):
        return facts
    return facts | {"model": {key: value for key, value in model.items() if key not in _ALL_BLOCKS or key in used}}


def _ordered(facts: dict[str, Any]) -> dict[str, Any]:
    first = [key for key in _FIRST if key in facts]
    return {key: facts[key] for key in [*first, *(key for key in facts if key not in first)]}


def _lines(facts: dict[str, Any], indent: str = "  ") -> list[str]:
    lines = []
    for key, value in facts.items():
        if (
            isinstance(value, dict)
            and len(value) > 2 * _MOST
            and not any(isinstance(one, dict) for one in value.values())
        ):
            some = [f"{name} {_said(one)}" for name, one in list(value.items())[:_MOST]]
            lines.append(f"{indent}{key:<{max(1, 20 - len(indent))}} {', '.join(some)} ... ({len(value)})")
        elif isinstance(value, dict) and value:
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{max(1, 20 - len(indent))}} {_said(value)}")
    return lines


def _said(value: Any) -> str:
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        plain = [_said(one) if not isinstance(one, dict) else json.dumps(one) for one in value]
        return f"{', '.join(plain[:_MOST])} ... ({len(plain)})" if len(plain) > _MOST else ", ".join(plain)
    return str(value)
