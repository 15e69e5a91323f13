"""Parts of a model card, the README.md of a model on the hub, that backbones and detectors share."""

from pathlib import Path
from typing import Any

import yaml

from ssld.shared.config.settings import NOT_IDENTITY
from ssld.shared.deploy.hub import public


def read_recipe(model: Path) -> dict[str, Any] | None:
    """Settings of the run that made a model file; None where it does not lie in a run directory of a training."""
    try:
        settings = yaml.safe_load((model.parent / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(settings, dict) or "optim" not in settings:
        return None
    return {key: value for key, value in settings.items() if key not in NOT_IDENTITY}


def front_matter(settings: dict[str, Any]) -> list[str]:
    """The lines that the hub reads."""
    return ["---", yaml.safe_dump(settings, sort_keys=False).rstrip(), "---", ""]


def folder_name(path: str) -> str:
    """The last two parts of a path: the last alone is often `train`."""
    return path if "://" in path or path.startswith("hub:") else "/".join(Path(path).parts[-2:]).lstrip("/")


def recipe_lines(recipe: dict[str, Any] | None) -> list[str]:
    """A run's settings as YAML."""
    if recipe is None:
        return ["Not recorded."]
    return ["```yaml", yaml.safe_dump(public(recipe), sort_keys=False).rstrip(), "```"]


def hub_licence(licence: str) -> str:
    """The hub knows single licences by name; `other` stands for several, or for none."""
    if licence == "unknown":
        return "unknown"
    return "other" if " " in licence or ":" in licence else licence.lower()


def numbers(values: Any) -> str:
    """Numbers, separated by commas."""
    return ", ".join(f"{value:g}" for value in values)


def table(rows: list[tuple[str, Any]]) -> list[str]:
    """Two columns without headings, and an empty line."""
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows), ""]
