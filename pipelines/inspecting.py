"""`ssld inspect`: kind, origin, scores and licence of a file or folder of this project; counts of annotations and detections; an image's size.

Reads binary files (models as .safetensors or pickles of tensors, exports as .onnx and .pt2, manifests of a curation as .parquet), COCO annotations
and detections in JSON, images, and the folders of pipelines, runs, checkpoints and soft-label stores. Settings that a kind of detector does not use
are left out. Only model files import torch.
"""

import json
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from ssld.pipelines.reports.table import Record, read_record
from ssld.shared.checksums import is_sound
from ssld.shared.config.yaml_files import read_yaml
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import IMAGE_SUFFIXES
from ssld.shared.models.downloads import PICKLE_SUFFIXES
from ssld.shared.run_dir import read_result
from ssld.shared.training.checkpoint_folders import EVALUATION
from ssld.shared.wording import amount, printable
from ssld.stage2_detect.model_config import DetectorConfig, Kind

KNOWN = (
    "inspect reads model files (.safetensors, .pth), exported networks (.onnx, .pt2), manifests (.parquet), COCO annotations "
    "and detections (.json), images, and folders of pipelines, runs, checkpoints and soft labels"
)
_FIRST = (
    "kind", "arch", "num_classes", "class_names", "prototypes", "encoder", "input_size", "views", "top", "kept_probability", "teacher", "licence",
    "backbone", "step", "weights", "metrics", "model", "resize",
)  # fmt: skip
"""facts that come first, in this order"""
_OF_A_RUN = (
    "backbone", "student", "teacher", "store", "losses", "encoder", "pool", "model", "data", "init", "distill", "moving_teacher", "prototypes",
    "views", "top", "keep", "steps", "train_epochs", "batch_size", "precision", "seed",
)  # fmt: skip
"""settings of a run that are shown"""
_MOST, _LARGEST = 10, 64_000_000
"""items of a list that are shown; bytes of an exported program's metadata that are read"""


def inspect_text(path: Path) -> str:
    """Describe the file or folder at a path in readable lines. Raises UserError for files of other programs."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    kinds = {".safetensors": _model, ".onnx": _onnx, ".pt2": _program, ".parquet": _parquet, ".json": _coco}
    other = _image if path.suffix.lower() in IMAGE_SUFFIXES else None
    kinds |= dict.fromkeys(PICKLE_SUFFIXES, _pickle)
    read = _folder if path.is_dir() else kinds.get(path.suffix, other)
    if read is None:
        raise UserError(f"{path}: not a file or folder of this project; {KNOWN}")
    try:
        title, facts = read(path)
        facts = _without_unread(facts)
        ordered = {key: facts[key] for key in (*_FIRST, *facts) if key in facts}
        return "\n".join([printable(f"{path}: {title}"), *_lines(ordered)])
    except MALFORMED as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise UserError(f"{path}: damaged, or written by another program ({cause})") from None


def _model(path: Path) -> tuple[str, dict[str, Any]]:
    from ssld.shared.models.model_file import read_metadata, read_shapes  # imports torch

    metadata, shapes = read_metadata(path), read_shapes(path)
    facts = {"tensors": _size_of_all(shapes), **metadata}
    if not metadata:
        facts |= {"metadata": "none: not written by this project"}
        return "safetensors file of another program", facts | _of_others(shapes)
    model = metadata.get("model")
    if isinstance(model, dict) and "kind" in model:
        return f"detector ({model['kind']}) file", facts
    if isinstance(made := metadata.get("prototypes"), dict):
        side = " x ".join(map(str, metadata.get("input_size") or ["?"]))
        return f"backbone file, a teacher of {made.get('prototypes')} prototypes at {side} px", facts
    return f"{metadata.get('kind', 'backbone')} file", facts


def _pickle(path: Path) -> tuple[str, dict[str, Any]]:
    from ssld.shared.models.state_dicts import read_state_dict  # imports torch

    tensors, place = read_state_dict(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    facts = {"tensors": _size_of_all(shapes)} | ({"found under": place} if place else {})
    return "pickle with the tensors of a network", facts | _of_others(shapes)


def _size_of_all(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the number of tensors and of their values, in words."""
    return f"{len(shapes)} ({sum(map(math.prod, shapes.values())) / 1e6:.2f} M values)"


def _of_others(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Describe tensors that do not say what they are of, and the ways to use them."""
    named = [f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items()]
    detector = any("rpn." in name or "bbox" in name for name in shapes)
    use = (
        "if it is a detector of torchvision, detectron2 or mmdetection: ssld convert-detector --weights FILE"
        if detector
        else "a teacher or evaluated network by its timm name (teacher.arch, arch); as a student or backbone if it is a .safetensors file"
    )
    return {"tensors by name": ", ".join(named if len(named) < 5 else [*named[:2], "...", *named[-2:]]), "use": use}


def _onnx(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        import onnx
    except ImportError:
        raise UserError(f"{path}: reading it needs onnx; pip install -e '.[export]' in the clone") from None
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf exports no common base class of its errors
        raise UserError(f"{path}: not an ONNX file ({' '.join(str(error).split())[:80]})") from None
    facts: dict[str, Any] = {
        "opset": ", ".join(f"{one.domain or 'ai.onnx'} {one.version}" for one in model.opset_import),
        "inputs": ", ".join(one.name for one in model.graph.input),
        "outputs": ", ".join(one.name for one in model.graph.output),
    }
    return "exported network (ONNX)", facts | {entry.key: _parsed(entry.value) for entry in model.metadata_props}


def _program(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("metadata.json")), None)
            if name and archive.getinfo(name).file_size > _LARGEST:
                raise UserError(f"{path}: {name} holds more than {amount(_LARGEST)}; not a file of this project")
            facts = json.loads(archive.read(name)) if name else {"metadata": "none: not written by this project"}
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ):  # damaged, encrypted, or with an unsupported compression
        raise UserError(f"{path}: not a torch.export program") from None
    return "exported network (torch.export)", {key: _parsed(value) for key, value in facts.items()}


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


def _coco(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({' '.join(str(error).split())[:80]})") from None
    if isinstance(content, list) and content and all("image_id" in one and "score" in one for one in content):
        scores = [float(one["score"]) for one in content]
        return "COCO detections", {
            "detections": f"{len(content):,}",
            "images with detections": f"{len({one['image_id'] for one in content}):,}",
            "scores": f"{min(scores):.3g} to {max(scores):.3g}",
            "detections by category id": dict(_frequent(one["category_id"] for one in content)),
        }
    if not isinstance(content, dict) or "images" not in content:
        raise UserError(f"{path}: neither COCO annotations nor COCO detections; {KNOWN}")
    objects = content.get("annotations", [])
    names = {one["id"]: str(one["name"]) for one in content.get("categories", [])}
    images = {one["id"] for one in content["images"]}
    sizes = sorted({(one["width"], one["height"]) for one in content["images"] if "width" in one and "height" in one})
    by_class = {
        names.get(key, f"unlisted category {key}"): n for key, n in _frequent(o["category_id"] for o in objects)
    }
    return "COCO annotations" if objects else "COCO annotations without objects", {
        "images": f"{len(images):,}, {len(images - {one['image_id'] for one in objects}):,} of them without objects",
        "sizes": f"{len(sizes):,}, from {sizes[0][0]} x {sizes[0][1]} to {sizes[-1][0]} x {sizes[-1][1]}"
        if sizes
        else "-",
        "objects": f"{len(objects):,}",
        "with masks": f"{sum(bool(one.get('segmentation')) for one in objects):,}",
        "crowds": f"{sum(bool(one.get('iscrowd')) for one in objects):,}",
        "classes": f"{len(names):,}, {len(names.keys() - {one['category_id'] for one in objects}):,} of them without objects",
        "objects per class": by_class,
    }


def _frequent(keys: Iterable[Any]) -> list[tuple[Any, int]]:
    """Return (key, number of times), most frequent first."""
    return Counter(keys).most_common()


def _image(path: Path) -> tuple[str, dict[str, Any]]:
    from PIL import ExifTags, Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
            image.load()  # an image that is cut off is opened, but not decoded
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({' '.join(str(error).split())[:80]})") from None
    facts = {
        "format": image.format,
        "size": f"{image.width} x {image.height} px, as stored",
        "mode": image.mode,
        "EXIF orientation": f"{turned}{'' if turned == 1 else ', turned or mirrored when shown'}",
        "file": amount(path.stat().st_size),
    }
    return "image", facts


def _folder(path: Path) -> tuple[str, dict[str, Any]]:
    if (path / "store.json").is_file():
        facts = _json(path / "store.json")
        shards = facts.get("shards", [])
        facts["sources"] = [f"{one.get('path')} ({one.get('rows', 0):,} rows)" for one in facts.get("sources", [])]
        facts["shards"] = f"{len(shards)} ({sum(shard.get('images', 0) for shard in shards):,} images)"
        facts.pop("replayed", None)  # checksums of views, not readable
        kept = facts.get("kept_probability", _kept_by_run(path.absolute().parent))
        if isinstance(kept, float):
            facts["kept_probability"] = f"{100 * kept:.1f} % of the probability is in the stored classes"
        if "top" in facts:
            facts["top"] = f"{facts['top']} of {facts.get('num_classes')} classes stored per view"
        settings = facts.get("teacher_settings")
        if isinstance(settings, dict) and settings.get("size", 0) is None:
            facts["teacher_settings"] = settings | {"size": "that of the views"}
        return "store of soft labels", facts | {"size": _size(path)}
    if (path / "state.json").is_file():
        state = "complete" if (path / "COMPLETE").exists() else "NOT complete: it is ignored"
        values = _json(path / "state.json") | (_json(path / EVALUATION) if is_sound(path / EVALUATION) else {})
        plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
        if isinstance(skipped := plain.pop("skipped", None), list):
            plain["skipped steps"] = skipped[0]
        parts = sorted(file.name for file in path.glob("*.safetensors"))
        return f"checkpoint ({state})", plain | {"parts": parts, "size": _size(path)}
    if (path / "config.yaml").is_file():
        return _run(path)
    if record := read_record(path):
        return _pipeline(path, record)
    if (path / "config.json").is_file():
        return _hub_folder(path)
    if runs := sorted(file.parent.name for file in path.glob("*/config.yaml")):
        return "folder of run directories", {"runs": [f"{name} ({_state(path / name)})" for name in runs]}
    raise UserError(f"{path}: not a file or folder of this project; {KNOWN}")


def _kept_by_run(run: Path) -> Any:
    """Return the share of probability in a store by the result of the run that wrote it, None without one: earlier versions wrote it there alone."""
    with suppress(UserError):  # a damaged result says nothing about the store
        return (read_result(run) or {"metrics": {}})["metrics"].get("kept_probability")
    return None


def _hub_folder(path: Path) -> tuple[str, dict[str, Any]]:
    from ssld.shared.models.metadata import folder_facts, read_config

    config = path / "config.json"
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", *PICKLE_SUFFIXES))
    return "folder in the Hugging Face layout", folder_facts(read_config(config), config) | {"weights": files}


def _pipeline(path: Path, record: Record) -> tuple[str, dict[str, Any]]:
    stages = {name: f"{stage.command}, {_state(path / name)}" for name, stage in record.pipeline.stages.items()}
    return f"folder of a pipeline{' at its smallest sizes' if record.smoke else ''}", {
        "name": record.name,
        "stages": stages,
    }


def _state(run: Path) -> str:
    """Return the state of the run in a folder."""
    if not (run / "config.yaml").is_file():
        return "not run"
    return "finished" if (run / "result.json").is_file() else "not finished"


def _run(path: Path) -> tuple[str, dict[str, Any]]:
    settings = read_yaml(path / "config.yaml")
    environment = _json(path / "environment.json") if (path / "environment.json").is_file() else {}
    facts: dict[str, Any] = {}
    if result := read_result(path):
        facts = {key: result.get(key) for key in ("command", "finished")}
        facts |= {"minutes": round(result.get("seconds", 0) / 60, 1), "metrics": result.get("metrics", {})}
        facts["outputs"] = sorted(result.get("outputs", {}))
    facts["checkpoints"] = sorted(
        folder.name for folder in path.glob("checkpoints/*") if (folder / "COMPLETE").exists()
    )
    facts |= {key: environment[key] for key in ("started", "machine", "versions") if key in environment}
    facts |= {f"{name} in use": network for name, network in (environment.get("networks") or {}).items()}
    main = {key: settings[key] for key in _OF_A_RUN if settings.get(key) is not None}
    if isinstance(main.get("model"), dict) and "kind" in main["model"]:
        main["model"] = main["model"]["kind"]
    record = read_record(path.absolute().parent)
    if record and record.folder not in (None, Path.cwd()):
        facts["paths begin in"] = str(record.folder)
    state = "finished" if result else "not finished: the same command resumes it"
    return f"run directory, {state}", facts | {"settings": main}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({error})") from None


def _size(folder: Path) -> str:
    return amount(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def _parsed(value: Any) -> Any:
    """Parse a metadata text if it is JSON."""
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in "[{" else value
    except ValueError:
        return value


def _without_unread(facts: dict[str, Any]) -> dict[str, Any]:
    """Remove the groups of settings that this kind of detector does not use."""
    model = facts.get("model")
    if not isinstance(model, dict) or model.get("kind") not in get_args(Kind):
        return facts
    unread = DetectorConfig(kind=model["kind"]).unread_groups
    return facts | {"model": {key: value for key, value in model.items() if key not in unread}}


def _lines(facts: dict[str, Any], indent: str = "  ") -> list[str]:
    lines = []
    for key, value in facts.items():
        group = isinstance(value, dict) and bool(value)
        long = group and len(value) > 2 * _MOST and not any(isinstance(one, dict) for one in value.values())
        if group and not long:
            lines += [f"{indent}{printable(str(key))}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{printable(str(key)):<{max(1, 20 - len(indent))}} {_text(value)}")
    return lines


def _text(value: Any) -> str:
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        value = [f"{printable(str(key))} {_text(item)}" for key, item in value.items()]
    if isinstance(value, list):
        plain = [_text(item) if not isinstance(item, dict) else json.dumps(item) for item in value]
        return f"{', '.join(plain[:_MOST])} ... ({len(plain)})" if len(plain) > _MOST else ", ".join(plain)
    return printable(str(value))
