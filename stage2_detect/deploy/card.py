"""Folder of a detector for the Hugging Face hub.

    detector.safetensors   the detector file
    detector.onnx, .pt2    what was exported
    config.json            architecture, classes, sizes
    README.md              the model card

Paths of local folders are left out of all files: the folder is meant to be published. Nothing on the card is estimated; the card names what is not
recorded.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssld.shared.deploy.hub import (
    ONE_RUN,
    card,
    folder_name,
    front_matter,
    hub_licence,
    licence_lines,
    numbers,
    public,
    read_recipe,
    recipe_lines,
    run_facts,
    table,
)
from ssld.shared.models.model_file import read_tensors, save_model_file
from ssld.shared.wording import some
from ssld.stage2_detect.detector_file import LoadedDetector
from ssld.stage2_detect.export_config import FILES
from ssld.stage2_detect.model_config import KIND_NAMES

_AVERAGES = {
    False: "moving average of the weights over the training steps, not those of the last step",
    True: "the moving teacher: the moving average of the weights over the training steps, not those of the last step",
}
"""origin of averaged weights, by whether a moving teacher was trained"""
_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def write_folder(
    folder: Path,
    model: Path,
    loaded: LoadedDetector,
    exported: Sequence[Path],
    *,
    push_to_hub: str | None,
    checks: dict[str, Any],
) -> None:
    """Write the folder for a detector file.

    Args:
        exported: files to copy into it.
        push_to_hub: ORG/NAME on the hub; None for a folder that is not uploaded.
        checks: results of `check.check_outputs`, by format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = public(
        {key: value for key, value in loaded.metadata.items() if key not in ("run", "format", "trained_images")}
    )
    save_model_file(folder / "detector.safetensors", read_tensors(model), metadata)
    for file in exported:
        shutil.copyfile(file, folder / file.name)
    keys = ("kind", "arch", "class_names", "category_ids", "mean", "std", "resize", "model", "licence")
    config = {key: metadata[key] for key in keys if key in metadata}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    text = detector_card(
        metadata,
        read_recipe(model),
        push_to_hub=push_to_hub,
        parameters=parameters,
        checks=checks,
        facts=run_facts(model),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def detector_card(
    metadata: dict[str, Any],
    recipe: dict[str, Any] | None,
    *,
    push_to_hub: str | None,
    parameters: int,
    checks: dict[str, Any],
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Write the text of README.md; arguments as of `write_folder`, `recipe` holds the settings of the training, `facts` those of `run_facts`."""
    licence = str(metadata.get("licence") or "unknown")
    name = KIND_NAMES[metadata["model"]["kind"]]
    front = front_matter(
        library_name="ssld",
        pipeline_tag="object-detection",
        license=hub_licence(licence),
        tags=["object-detection", metadata["model"]["kind"], "ssld"],
    )
    title = push_to_hub.rpartition("/")[2] if push_to_hub else f"{name} {metadata['arch']}"
    summary = f"{name} on {metadata['arch']}, which detects {_classes(metadata['class_names'])}."
    sections = {
        "Use": _use(push_to_hub, [FILES[key] for key in FILES if key in checks]),
        "Model": table(_facts(metadata, name, parameters)),
        "Measured": table(_measured(metadata, checks, facts)),
        "Data": _data(recipe),
        "Recipe": recipe_lines(recipe),
        "Licences": licence_lines(licence, _origins(metadata, licence, recipe)),
    }
    return card(front, title, summary, sections)


def _use(push_to_hub: str | None, exported: list[str]) -> list[str]:
    path = '"detector.safetensors"'
    lines = ["```python", "from ssld.stage2_detect.detector_file import load_detector", ""]
    if push_to_hub:
        lines.insert(1, "from huggingface_hub import hf_hub_download")
        path = f'hf_hub_download("{push_to_hub}", "detector.safetensors")'
    lines += [f"detector = load_detector({path})", 'detections = detector.predict(["photo.jpg"])', "```"]
    if exported:
        lines += [
            "",
            f"Without this project: {' and '.join(f'`{name}`' for name in exported)}, whose metadata describe inputs and outputs.",
        ]
    return lines


def _facts(metadata: dict[str, Any], name: str, parameters: int) -> list[tuple[str, Any]]:
    resize = metadata["resize"]
    deformable = metadata["model"].get("dcn_strides")
    return [
        ("detector", name),
        ("backbone (timm)", metadata["arch"]),
        *([("deformable convolutions", f"strides {', '.join(map(str, deformable))}")] if deformable else []),
        ("parameters", f"{parameters / 1e6:.2f} M"),
        ("classes", _classes(metadata["class_names"])),
        *([("weights", _AVERAGES[bool(metadata.get("moving_teacher"))])] if metadata.get("weights") == "ema" else []),
        ("size in evaluation", f"short side {resize['short_side']}, long side at most {resize['long_side']}"),
        ("interpolation", resize["interpolation"]),
        ("mean, standard deviation", f"{numbers(metadata['mean'])}; {numbers(metadata['std'])}"),
        ("SHA-256 of its tensors", f"`{metadata.get('content_sha256', 'not recorded')}`"),
    ]


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)} classes: {some(names, 5)}"


def _measured(
    metadata: dict[str, Any], checks: dict[str, Any], facts: Sequence[tuple[str, str]]
) -> list[tuple[str, Any]]:
    metrics = metadata.get("metrics") or {}
    # COCO's value without objects of a size is -1.
    rows: list[tuple[str, Any]] = [
        (f"{prefix}{key}, %", f"{100 * metrics[prefix + key]:.1f}")
        for prefix in ("", "mask_")
        for key in _AP
        if isinstance(metrics.get(prefix + key), float) and metrics[prefix + key] >= 0
    ]
    rows += [*facts, ONE_RUN] if rows else []
    rows += [
        (
            f"{FILES[key]} against torch",
            f"boxes within {check['box_difference']:.1e} px, scores within {check['score_difference']:.1e}, "
            f"{100 * check['missing']:.2f} % of {check['detections']} detections without counterpart",
        )
        for key, check in checks.items()
        if key in FILES
    ]
    return rows


def _data(recipe: dict[str, Any] | None) -> list[str]:
    if recipe is None:
        return ["Not recorded."]
    data = recipe["data"]
    source = data.get("source")
    lines = [f"- training: {_named(source or data['train_annotations'])}"]
    if recipe.get("unlabeled"):
        lines.append(f"- and images without annotations: {_named(recipe['unlabeled'])}")
    if moving := recipe.get("moving_teacher"):
        lines.append(f"- and images without annotations, under a moving teacher: {_named(moving['unlabeled'])}")
    if recipe.get("pseudo"):
        lines.append(f"- and pseudo-labels of another detector: {folder_name(str(recipe['pseudo']))}")
    validation = f"its evaluation part, if any ({_named(source)})" if source else _named(data.get("val_annotations"))
    return [*lines, f"- evaluation: {validation or 'none'}"]


def _named(paths: Any) -> str:
    """Name a file or a list of files, without the folders above."""
    listed = paths if isinstance(paths, list) else [paths] * (paths is not None)
    return ", ".join(folder_name(str(path)) for path in listed)


def _origins(metadata: dict[str, Any], licence: str, recipe: dict[str, Any] | None) -> list[str]:
    origins = []
    backbone = metadata.get("backbone")
    if backbone:
        origins.append(f"the backbone, {public(backbone['reference'])}")
    if metadata.get("source"):
        origins.append(f"{metadata['source']['project']}: {licence}")
    teacher = metadata.get("teacher") or ((recipe or {}).get("distill") or {}).get("teacher")
    if teacher:
        facts = teacher if isinstance(teacher, dict) else {"reference": teacher}
        origins.append(
            f"the teacher, {public(str(facts.get('reference')))}: {facts.get('licence') or 'licence not recorded'}"
        )
    return origins
