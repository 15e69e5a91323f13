"""Publishing on the Hugging Face hub: names, uploads, text without local paths, and the common parts of model cards.

Deliberately absent from the cards: the hub's `model-index`, which needs the id of a data set on the hub for each number; data sets of this project
are folders.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from ssld.shared.config.settings import NOT_IDENTITY
from ssld.shared.errors import MALFORMED, UserError
from ssld.shared.files import file_sha256
from ssld.shared.run_dir import read_result
from ssld.shared.tally import Tally

ONE_RUN = ("interval", "none: one training, evaluated once; another seed or other images change the numbers")
"""row of a card's table of numbers"""


def public(value: Any) -> Any:
    """Cut absolute paths in a JSON value to their last part, also in lists separated by commas."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, PurePath) or (isinstance(value, str) and "/" in value):
        return ", ".join(_last_part(part) for part in str(value).split(", "))
    return value


def check_name(push_to_hub: str) -> None:
    """Raise UserError for text that cannot be the name of a repository of the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(push_to_hub)
    except HFValidationError as error:
        raise UserError(f"push_to_hub: {push_to_hub}: {' '.join(str(error).split())}; give ORG/NAME") from None
    if push_to_hub.count("/") != 1:
        raise UserError(f"push_to_hub: {push_to_hub}: is not of the form ORG/NAME")


def push(folder: Path, push_to_hub: str, *, private: bool) -> str:
    """Upload the folder, to a new repository if necessary; returns its URL.

    Raises UserError for every failure, such as no login, no write access, no network.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(push_to_hub, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=push_to_hub, folder_path=str(folder), commit_message="Upload by ssld")
    except Exception as error:  # of the hub's client or of the network
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"push_to_hub: {push_to_hub}: not uploaded ({why}); {folder} is complete: log in with `hf auth login`, "
            "check the name and the network, and run the same command again"
        ) from None
    return str(done.commit_url)


def read_recipe(model: Path) -> dict[str, Any] | None:
    """Read the settings of the run that made a model file; None for a file outside of a training's run directory."""
    try:
        settings = yaml.safe_load((model.parent / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(settings, dict) or "optim" not in settings:
        return None
    return {key: value for key, value in settings.items() if key not in NOT_IDENTITY}


def run_facts(model: Path) -> list[tuple[str, str]]:
    """Return what the numbers of a model file come from, as rows of `table`: images read by setting, date, versions.

    Empty for a file that is not, or no longer, the result of the run in its folder.
    """
    try:
        result = read_result(model.parent) or {}
        if result["outputs"][model.name] != file_sha256(model):
            return []
        record = json.loads((model.parent / "environment.json").read_text(encoding="utf-8"))
        kept = {place: Tally.of_record(one).describe_kept() for place, one in result["read"].items()}
        versions = [f"Python {record['python']}", *(f"{name} {one}" for name, one in record["versions"].items() if one)]
        return [
            *((f"read, {place}", text) for place, text in kept.items() if text),
            ("training finished", str(result["finished"])[:10]),
            ("versions", ", ".join(versions)),
        ]
    except (OSError, *MALFORMED, UserError):
        return []


def front_matter(**facts: Any) -> list[str]:
    """Format the metadata lines of a card; `facts` as of `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    return ["---", ModelCardData(**facts).to_yaml(), "---", ""]


def card(front: Sequence[str], title: str, summary: str, sections: Mapping[str, Sequence[str]]) -> str:
    """Join the text of a card: lines of `front_matter`, a title, a sentence on the model, and lines by heading."""
    lines = [*front, f"# {title}", "", summary]
    for heading, content in sections.items():
        lines += ["", f"## {heading}", "", *content]
    return "\n".join(lines) + "\n"


def licence_lines(licence: str, origins: Sequence[str]) -> list[str]:
    """Format the licence of weights, and what they come from, one origin a line."""
    return [
        f"These weights: {licence}. They come from",
        *(f"- {one}" for one in origins or ["weights that the file does not record"]),
        "",
        "The licences of the training images are not recorded; check them before publishing these weights.",
    ]


def folder_name(path: str) -> str:
    """Return the last two parts of a path, since the last alone is often `train`."""
    return path if "://" in path or path.startswith("hub:") else "/".join(Path(path).parts[-2:]).lstrip("/")


def recipe_lines(recipe: dict[str, Any] | None) -> list[str]:
    """Format a run's settings as YAML."""
    if recipe is None:
        return ["Not recorded."]
    return ["```yaml", yaml.safe_dump(public(recipe), sort_keys=False).rstrip(), "```"]


def hub_licence(licence: str) -> str:
    """Convert a licence to the hub's name for it; `other` for several licences."""
    if licence == "unknown":
        return "unknown"
    return "other" if " " in licence or ":" in licence else licence.lower()


def numbers(values: Any) -> str:
    """Format numbers, separated by commas."""
    return ", ".join(f"{value:g}" for value in values)


def table(rows: Sequence[tuple[str, Any]]) -> list[str]:
    """Format a table of two columns without headings; a sentence in its place where there are no rows."""
    if not rows:
        return ["Nothing is recorded."]
    return ["| | |", "| --- | --- |", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)]


def _cell(value: Any) -> str:
    """Escape text for a Markdown table, which a bar or a line break would break."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _last_part(text: str) -> str:
    return PurePath(text).name if text.startswith(("/", "~")) else text
