"""Weights and data of the Hugging Face hub, and weights behind URLs: which of them are on this machine, and whether the others can be downloaded.

Files in the cache are used without a request. For others there is one request of a few seconds: the hub's own client retries for
minutes. `HF_HUB_OFFLINE` is honoured. Does not import torch, nor timm at import.
"""

import os
import threading
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ssld.shared.apart import call_apart
from ssld.shared.errors import UserError
from ssld.shared.wording import amount

Kind = Literal["random", "hub", "folder", "file", "path", "timm"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""file names of weights in a folder, in the order of the search"""
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl")
_SECONDS = 3.5  # timeout of a network request


def kind_of(text: str) -> Kind:
    """Return the kind of a model reference; `path` is a path that does not exist."""
    for prefix, kind in (("random:", "random"), ("hf-hub:", "hub"), ("timm:", "timm")):
        if text.startswith(prefix):
            return kind  # type: ignore[return-value]  # a literal above
    try:
        if Path(text).is_dir():
            return "folder"
        if Path(text).is_file():
            return "file"
    except (OSError, ValueError):  # a name too long, a null byte
        return "path"
    return "path" if "/" in text or text.endswith((".safetensors", *PICKLE_SUFFIXES)) else "timm"


@dataclass(frozen=True)
class Remote:
    """A file elsewhere: the first of `names` that a repository of the hub has, or what a URL gives, kept in `folder` under `names[0]`.

    `repo` is ORG/NAME, perhaps with @REVISION; a data set's has no names: any file of it counts.
    """

    repo: str | None = None
    names: tuple[str, ...] = ()
    url: str | None = None
    folder: str = ""
    dataset: bool = False

    @property
    def where(self) -> str:
        """Describe it in words."""
        if self.url:
            return self.url
        return f"data set {self.repo}" if self.dataset else f"{self.names[0]} of {self.repo}"

    def cached(self) -> Path | None:
        """Return the file, or the data set's folder, if it is on this machine."""
        if self.url:
            file = Path(self.folder) / self.names[0]
            return file if file.is_file() else None
        from huggingface_hub import constants, try_to_load_from_cache

        repo, revision = self._parts()
        if self.dataset:
            known = [
                folder
                for folder in (
                    Path(constants.HF_HUB_CACHE),
                    Path(os.environ.get("HF_DATASETS_CACHE") or f"{constants.HF_HOME}/datasets"),
                )
                for folder in (folder.iterdir() if folder.is_dir() else ())
            ]
            # datasets--ORG--NAME in one cache, ORG___NAME in the other, in other letters
            return next(
                (folder for folder in known if _letters(folder.name).removeprefix("datasets") == _letters(repo)), None
            )
        for name in self.names:
            cached = try_to_load_from_cache(repo, name, revision=revision)
            if isinstance(cached, str):
                return Path(cached)
        return None

    def ask(self) -> tuple[int | None, str | None]:
        """Return (bytes to download as far as they are known, reason why the download is impossible or None), within a few seconds."""
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE and not self.url:
            return None, "HF_HUB_OFFLINE is set"
        return _within_seconds(self._ask_url if self.url else self._ask_hub)

    def fetch(self, text: str) -> Path:
        """Return the file, downloaded if it is not on this machine. Raises UserError naming the reference `text` where that is impossible."""
        cached = self.cached()
        if cached:
            return cached
        size, fault = self.ask()
        if fault:
            raise UserError(f"{text}: {unavailable(self, size, fault)}")
        try:
            return self._download()
        except Exception as error:  # of the hub's client, of the network below it
            raise UserError(f"{text}: {unavailable(self, size, _one_line(error))}") from None

    def _download(self) -> Path:
        if self.url:
            from torch.hub import download_url_to_file

            file = Path(self.folder) / self.names[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(self.url, str(file), progress=False)
            return file
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        repo, revision = self._parts()
        for name in self.names[:-1]:
            try:
                return Path(hf_hub_download(repo, name, revision=revision))
            except EntryNotFoundError:
                continue
        return Path(hf_hub_download(repo, self.names[-1], revision=revision))

    def _parts(self) -> tuple[str, str | None]:
        assert self.repo is not None
        repo, _, revision = self.repo.partition("@")
        return repo, revision or None

    def _ask_url(self) -> tuple[int | None, str | None]:
        assert self.url is not None
        with urllib.request.urlopen(urllib.request.Request(self.url, method="HEAD"), timeout=_SECONDS) as response:
            return _number(response.headers), None

    def _ask_hub(self) -> tuple[int | None, str | None]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        repo, revision = self._parts()
        for name in self.names or ("",):
            url = (
                f"{constants.ENDPOINT}/api/datasets/{repo}"
                if self.dataset
                else hf_hub_url(repo, name, revision=revision)
            )
            response = get_session().head(url, headers=build_hf_headers(), timeout=_SECONDS)
            if response.status_code < 400:
                return (None if self.dataset else _number(response.headers)), None
            if response.status_code != 404:
                break
        if response.status_code in (401, 403):
            return None, f"the hub has no such repository, or it needs `hf auth login` (status {response.status_code})"
        if response.status_code == 404:
            return None, "the hub does not have it (status 404)"
        return None, f"the hub returned status {response.status_code}"


def unavailable(remote: Remote, size: int | None, fault: str) -> str:
    """Return the end of an error line, what is wrong and what to do, for a file that is not on this machine and cannot be downloaded."""
    how = f"hf download {remote.repo.partition('@')[0]}" if remote.repo else f"download {remote.url}"
    if remote.url:
        how += f" to {remote.folder}/{remote.names[0]}"
    if remote.dataset:
        how += " --repo-type dataset"
    instead = "a folder of its images" if remote.dataset else "a file or a folder"
    return (
        f"not on this machine, and its download ({remote.where}{f', {amount(size)}' if size else ''}) is not possible: {fault}; "
        f"`{how}` where there is a network, or give {instead} instead"
    )


def remotes_of(text: str) -> list[Remote]:
    """Return the remote files of a model reference, of a data set `hub:ORG/NAME` or of `url:ADDRESS`; none for local or invalid
    references.

    Imports timm for a timm name. Raises UserError for one that timm does not have, or has no weights for.
    """
    if text.startswith("hub:"):
        return [] if Path(text.removeprefix("hub:")).exists() else [Remote(text.removeprefix("hub:"), dataset=True)]
    if text.startswith("url:"):
        return [hub_cached(text.removeprefix("url:"))]
    kind = kind_of(text)
    if kind == "hub":
        repo = text.removeprefix("hf-hub:")
        return [Remote(repo, ("config.json",)), Remote(repo, WEIGHT_FILES)] if "/" in repo else []
    if kind == "timm":
        from ssld.shared.models.timm_names import known_arch

        return [timm_weights(known_arch(text.removeprefix("timm:"), text))]
    return []


def timm_weights(name: str) -> Remote:
    """Return the location of the weights of a timm model. Raises UserError where there are none."""
    from timm.models import get_pretrained_cfg

    cfg: Any = get_pretrained_cfg(name)
    if cfg.hf_hub_id:
        return Remote(cfg.hf_hub_id, (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHT_FILES)
    if not cfg.url:
        raise UserError(f"timm:{name}: timm has no weights for it; random:{name} starts from random ones")
    url, file = cfg.url if isinstance(cfg.url, tuple | list) else (cfg.url, None)
    return hub_cached(url, file)


def hub_cached(url: str, file: str | None = None) -> Remote:
    """Return the location of weights at an address, kept in torch hub's cache as `file`, by default the last part of the address."""
    from torch.hub import get_dir

    return Remote(url=url, names=(file or url.rsplit("/", 1)[-1],), folder=f"{get_dir()}/checkpoints")


class Download(NamedTuple):
    """A file that is not on this machine."""

    key: str
    """setting that names it"""
    text: str
    """its reference, and what is known about it"""
    possible: bool
    """whether it can be downloaded"""
    exists: bool = True
    """False: timm has no weights of this name, so that no network helps"""

    @property
    def line(self) -> str:
        """Return the line for the log, or the error."""
        return f"{self.key}: {self.text}"


def find_downloads(references: Mapping[str, str]) -> list[Download]:
    """Return the downloads that settings, by key, would need; the key of `url:ADDRESS` ends with its name. All requests run at once."""
    missing_files: list[tuple[str, str, Remote]] = []
    downloads: dict[int, Download] = {}
    for key, text in references.items():
        try:
            missing = next((remote for remote in reversed(remotes_of(text)) if remote.cached() is None), None)
        except UserError as error:
            downloads[-1 - len(downloads)] = Download(key, str(error), possible=False, exists=False)
            continue
        except Exception:  # not a valid name, which the command itself reports
            continue
        if missing and (text, missing) not in [(one, remote) for _, one, remote in missing_files]:
            missing_files.append((key, text, missing))

    def look(number: int, key: str, text: str, remote: Remote) -> None:
        size, fault = remote.ask()
        about = (
            unavailable(remote, size, fault)
            if fault
            else f"not on this machine; {remote.where}{f' ({amount(size)})' if size else ''} will be downloaded"
        )
        named = "" if text.startswith("url:") else f"{text}: "
        downloads[number] = Download(key, f"{named}{about}", possible=fault is None)

    threads = [threading.Thread(target=look, args=(number, *one)) for number, one in enumerate(missing_files)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [downloads[number] for number in sorted(downloads)]


def find_downloads_apart(references: Mapping[str, str]) -> list[Download]:
    """Call `find_downloads` in a process of its own, for programs without torch, which timm's names and torch hub's cache need; no process where
    nothing is remote."""
    remote = {
        key: text
        for key, text in references.items()
        if text.startswith(("hub:", "url:")) or kind_of(text) in ("hub", "timm")
    }
    if not any(text.startswith("url:") or kind_of(text) == "timm" for text in remote.values()):
        return find_downloads(remote) if remote else []
    return [Download(*one) for one in call_apart(find_downloads, remote) or []]


def require_downloads(references: Mapping[str, str]) -> list[str]:
    """Return lines about the files to download, for the log. Raises UserError, with one line per file, for files that cannot be downloaded."""
    downloads = find_downloads(references)
    impossible = [one.line for one in downloads if not one.possible]
    if impossible:
        raise UserError(*impossible)
    return [one.line for one in downloads]


def _within_seconds(ask: Callable[[], tuple[int | None, str | None]]) -> tuple[int | None, str | None]:
    """Return the result of `ask`, or a line that there was none in time: resolving a name has no time limit of its own."""
    results: list[tuple[int | None, str | None]] = []

    def run() -> None:
        try:
            results.append(ask())
        except Exception as error:  # of the hub's client, of the network below it
            results.append((None, f"no network ({_one_line(error)})"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_SECONDS + 0.5)
    return results[0] if results else (None, f"no network (no response within {_SECONDS:g} seconds)")


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _number(headers: Any) -> int | None:
    text = headers.get("X-Linked-Size") or headers.get("Content-Length")
    return int(text) if text and text.isdigit() else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
