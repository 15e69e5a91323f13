"""Folder of a backbone for the Hugging Face hub, in timm's layout.

    model.safetensors   the weights, with the backbone file's metadata
    config.json         architecture, classes and preprocessing, as timm writes it
    README.md           the model card

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, after an upload also `hf-hub:ORG/NAME`. No path of this machine is written, since
the folder is meant to be published. The card is made from the backbone file's metadata and, if the file is in its run directory, from the settings of
the run. Nothing is estimated: a missing value is reported as not recorded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

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
from ssld.shared.models.backbones import InputSettings
from ssld.shared.models.model_file import read_tensors, save_model_file
from ssld.shared.wording import some

_ACCURACY = ("top1", "top5", "knn_top1", "agreement", "teacher_top1")
# entries of timm's pretrained configuration that describe other weights of this architecture
_OTHER_WEIGHTS = (
    "tag",
    "description",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
    "label_names",
    "label_descriptions",
)


def write_folder(
    folder: Path,
    model: Path,
    net: nn.Module,
    inputs: InputSettings,
    metadata: dict[str, Any],
    *,
    push_to_hub: str | None,
    checks: dict[str, dict[str, float]],
) -> None:
    """Write the folder for a backbone file.

    Args:
        folder: folder to write.
        model: the backbone file.
        net: its timm network.
        inputs: its preprocessing.
        metadata: its metadata; with `trained_size` if it was measured at another size than `input_size`.
        push_to_hub: ORG/NAME on the hub; None for a local folder.
        checks: results of `onnx_file.compare` by format.
    """
    names = metadata.get("class_names")
    save_for_hf(
        net,
        str(folder),
        safe_serialization=True,
        model_config={
            "pretrained_cfg": dict.fromkeys(_OTHER_WEIGHTS) | {"license": metadata.get("licence")},
            **({"label_names": names} if names else {}),
            **({"model_args": metadata["model_args"]} if metadata.get("model_args") else {}),
        },
        data_config={
            "input_size": (3, *inputs.size),
            "mean": inputs.mean,
            "std": inputs.std,
            "interpolation": inputs.interpolation,
            "crop_pct": metadata.get("crop_pct", 0.875),
            "crop_mode": "center",
        },
    )
    kept = {key: value for key, value in metadata.items() if key not in ("run", "format")}
    save_model_file(folder / "model.safetensors", read_tensors(model), public(kept))  # timm's file has no metadata
    parameters = sum(parameter.numel() for parameter in net.parameters())
    text = backbone_card(
        metadata,
        read_recipe(model),
        push_to_hub=push_to_hub,
        parameters=parameters,
        checks=checks,
        facts=run_facts(model),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def backbone_card(
    metadata: dict[str, Any],
    recipe: dict[str, Any] | None,
    *,
    push_to_hub: str | None,
    parameters: int,
    checks: dict[str, dict[str, float]] | None = None,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Make the README.md of a backbone.

    Args:
        metadata, push_to_hub, checks: as of `write_folder`.
        recipe: settings of its training run; None where unknown.
        parameters: number of its parameters.
        facts: of `run_facts`.
    """
    licence = str(metadata.get("licence") or "unknown")
    front = front_matter(
        library_name="timm",
        pipeline_tag="image-classification",
        license=hub_licence(licence),
        tags=["timm", "image-classification", "knowledge-distillation", "ssld"],
    )
    name = f"hf-hub:{push_to_hub}" if push_to_hub else "local-dir:hub"
    facts_of_model = [
        ("architecture (timm)", metadata["arch"]),
        ("parameters", f"{parameters / 1e6:.2f} M"),
        ("classes", _classes(metadata)),
        ("image size", _size(metadata["input_size"])),
        ("central crop in evaluation", metadata.get("crop_pct", "not recorded")),
        ("interpolation", metadata.get("interpolation")),
        ("mean, standard deviation", f"{numbers(metadata['mean'])}; {numbers(metadata['std'])}"),
        ("SHA-256 of its tensors", f"`{metadata.get('content_sha256', 'not recorded')}`"),
    ]
    sections = {
        "Use": ["```python", "import timm", "", f'model = timm.create_model("{name}", pretrained=True).eval()', "```"],
        "Model": table(facts_of_model),
        "Measured": table(_measured(metadata, checks, facts)),
        "Data": _data(recipe),
        "Recipe": recipe_lines(recipe),
        "Licences": licence_lines(licence, _origins(metadata, licence)),
    }
    return card(front, (push_to_hub or metadata["arch"]).rpartition("/")[2], _summary(metadata), sections)


def _summary(metadata: dict[str, Any]) -> str:
    source, teacher = metadata.get("source"), metadata.get("teacher")
    arch = metadata["arch"]
    if source:
        return f"{arch}, converted from {source['file']} of {source['project']} (SHA-256 `{source['sha256']}`)."
    if teacher and metadata.get("objective") == "teacher":
        return (
            f"{arch}, distilled from {public(teacher['reference'])} without human labels in the loss: "
            "simple semi-supervised label distillation (SSLD, arXiv 2103.05959)."
        )
    if metadata.get("objective") == "labels":
        return f"{arch}, trained on labeled images."
    return f"{arch}. How it was trained is not recorded."


def _classes(metadata: dict[str, Any]) -> str:
    names = metadata.get("class_names")
    count = str(metadata["num_classes"])
    if not names:
        return f"{count}, without names"
    return f"{count}: {some(names, 5)}"


def _measured(
    metadata: dict[str, Any], checks: dict[str, dict[str, float]] | None, facts: Sequence[tuple[str, str]]
) -> list[tuple[str, Any]]:
    metrics = metadata.get("metrics") or {}
    rows: list[tuple[str, Any]] = [(key, f"{100 * metrics[key]:.2f} %") for key in _ACCURACY if key in metrics]
    if "kl" in metrics:
        rows.append(("KL to the teacher, nats", f"{metrics['kl']:.4f}"))
    if rows and "images" in metrics:
        rows.append(("validation images", metrics["images"]))
    if rows and metadata.get("trained_size"):
        rows.append(("at image size", _size(metadata["trained_size"])))
    rows += [*facts, ONE_RUN] if rows else []
    for name, check in (checks or {}).items():
        what = {"onnx": "ONNX", "torch": "torch.export"}[name]
        rows.append(
            (f"largest difference of {what} and torch", f"{check['relative_difference']:.1e} of the largest logit")
        )
    return rows


def _data(recipe: dict[str, Any] | None) -> list[str]:
    if recipe is None:
        return ["Not recorded."]
    lines = []
    for source in recipe["data"]["train"]:
        weight = f", weight {source['weight']:g}" if source.get("weight") else ""
        lines.append(f"- training: {folder_name(source['path'])}{weight}")
    validation = recipe["data"].get("val")
    return [*lines, f"- validation: {folder_name(validation['path']) if validation else 'none'}"]


def _origins(metadata: dict[str, Any], licence: str) -> list[str]:
    origins = []
    if metadata.get("source"):
        origins.append(f"{metadata['source']['project']}: {licence}")
    if metadata.get("start"):
        random = str(metadata["start"]).startswith("random:")
        origins.append(
            f"the weights that training started from: {public(metadata['start'])}{' (none)' if random else ''}"
        )
    teacher = metadata.get("teacher")
    if teacher:
        origins.append(f"the teacher, {public(teacher['reference'])}: {teacher.get('licence', 'unknown')}")
    return origins


def _size(sides: Any) -> str:
    return " x ".join(str(side) for side in sides)
