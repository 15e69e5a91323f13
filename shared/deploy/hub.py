"""Publishing on the Hugging Face hub: names, uploads, and text without this machine's folders."""

from pathlib import Path, PurePath
from typing import Any

from ssld.shared.errors import UserError


def public(value: Any) -> Any:
    """A JSON value whose absolute paths, also those in a list separated by commas, are cut to their last part."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, PurePath) or (isinstance(value, str) and "/" in value):
        return ", ".join(_last_part(part) for part in str(value).split(", "))
    return value


def check_name(repository: str) -> None:
    """Raises UserError for what cannot be the name of a repository of the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to_hub: {repository}: {' '.join(str(error).split())}; give ORG/NAME") from None
    if repository.count("/") != 1:
        raise UserError(f"push_to_hub: {repository}: is no ORG/NAME")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the folder, to a new repository if need be; returns where it is.

    Raises UserError for whatever goes wrong: not logged in, no right to write, no network.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload by ssld")
    except Exception as error:  # of the hub's client, of the network below it
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"push_to_hub: {repository}: not uploaded ({why}); {folder} is complete: log in with `hf auth login`, "
            "check the name and the network, and run the same command again"
        ) from None
    return str(done.commit_url)


def _last_part(text: str) -> str:
    return PurePath(text).name if text.startswith(("/", "~")) else text
