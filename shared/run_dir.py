"""The folder of one run, and everything it says about itself.

    config.yaml       the resolved settings
    environment.json  command line, versions, machine, digests of the inputs
    metrics.jsonl     one line a logged step
    log.txt           what the run printed
    quarantine.txt    unreadable images, if any
    checkpoints/      see shared/training/checkpoint.py
    result.json       written last: its presence means the run is finished

Only the main rank writes; the lock is an flock that dies with its process. Does not import torch.
"""

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from ssld.shared.config.settings import MAY_CHANGE, NOT_IDENTITY, CommandConfig, differences, dump_yaml, identity
from ssld.shared.config.training import PASSES_FILE
from ssld.shared.errors import UserError
from ssld.shared.files import clear_leftovers, file_sha256, files_digest, write_atomically
from ssld.shared.machine import installed_version
from ssld.shared.noise import keep_noise_in
from ssld.shared.tally import Tally
from ssld.shared.terminal import say
from ssld.shared.wording import printable

Status = Literal["new", "unfinished", "finished"]
SPEED = ("seconds", "data_wait", "images_per_second", "memory_gb")
"""what a line of metrics.jsonl says of the machine, not of the training"""
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "pycocotools", "safetensors", "numpy", "pillow")


class RunDir:
    """A run directory, held exclusively while this object lives.

    Args:
        config: the resolved settings; `config.output` is the folder.
        command: name of the entry script, for the records.
        main: whether this process writes (rank 0).

    Attributes:
        status: "new", "unfinished" (the same run was begun here) or "finished" (result.json is there).
        write: prints a line.

    Raises:
        UserError: the folder is in use, holds something else, holds another run, or one of its inputs has changed since.
    """

    _lock: IO[str] | None = None

    def __init__(self, config: CommandConfig, command: str, *, main: bool = True) -> None:
        self.path = config.output
        self.main = main
        self.status: Status = "new"
        self.write: Callable[[str], None] = say
        self._config, self._command = config, command
        self._started = time.time()
        self.inputs: dict[str, str] = {}
        self._read: dict[str, Any] = {}
        if main:
            self._open()
            keep_noise_in(self.path / "log.txt")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def log(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.main:
            text = printable(text, keep="\n\t")
            self.write(text)
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def tell(self, place: str, source: object, tally: Tally) -> None:
        """Log what reading `source`, the setting `place`, has left out, if anything, and keep the counts for result.json."""
        self._read[place] = tally.record()
        line = tally.describe()
        self.log_if(line and f"{source}: {line}")

    def log_if(self, text: str | None) -> None:
        """Log a line, if there is one."""
        if text:
            self.log(text)

    def metric(self, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.main:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop what a killed run wrote after the checkpoint of `step`, and a torn last line."""
        if self.main and (self.path / "metrics.jsonl").exists():
            self._rewrite_metrics(line for line in read_metrics(self.path) if line["step"] <= step)

    def quarantine(self, keys: Iterable[str]) -> None:
        """Write the list of unreadable images."""
        if self.main:
            write_atomically(self.path / "quarantine.txt", "".join(f"{key}\n" for key in sorted(set(keys))))

    def quarantined(self) -> list[str]:
        """The unreadable images that this run has met so far."""
        file = self.path / "quarantine.txt"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def finish(self, metrics: dict[str, Any], outputs: Iterable[Path] = ()) -> None:
        """Write result.json, the record that this run is done, and release the folder; `outputs` are files inside it."""
        if not self.main:
            return
        # An attempt that died between its last evaluation and this point has logged that evaluation already.
        if (self.path / "metrics.jsonl").exists():
            self._rewrite_metrics({(line["step"], *line): line for line in read_metrics(self.path)}.values())
        record = {
            "command": self._command,
            "metrics": metrics,
            "outputs": {str(file.relative_to(self.path)): file_sha256(file) for file in outputs},
            "config": identity(self._config),
            "inputs": self.inputs,
            "read": self._read,
            "seconds": round(time.time() - self._started, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_atomically(self.path / "result.json", json.dumps(record, indent=2) + "\n")
        self.close()  # whoever looks next need not wait for this object to be collected

    def close(self) -> None:
        """Release the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def __del__(self) -> None:
        self.close()

    def _rewrite_metrics(self, lines: Iterable[dict[str, Any]]) -> None:
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def _open(self) -> None:
        try:
            self._create()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be made a run directory ({error.strerror or error}); give another --output"
            ) from None
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise UserError(f"{self.path}: in use by another process; wait for it or give another --output") from None
        try:
            self._compare_and_record()
        except BaseException:
            self.close()
            raise

    def _create(self) -> None:
        """Make the folder and its lock file. Raises OSError where that is impossible: a parent is a file, no permission."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; give another --output")
        foreign = self.path.is_dir() and not (self.path / "config.yaml").exists()
        if foreign and any(
            not entry.name.startswith(".") and entry.name != "error.json" for entry in self.path.iterdir()
        ):
            raise UserError(f"{self.path}: not empty and not a run directory; give another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")

    def _compare_and_record(self) -> None:
        clear_leftovers(self.path.rglob(".*.*"))
        self.inputs = input_digests(self._config)
        environment = _environment(self._command, self.inputs)
        changes: list[str] = []
        if (self.path / "config.yaml").exists() and self._holds_work():
            changes = self._refuse_other_run()
            self._note_environment(environment)
            finished = (self.path / "result.json").exists() and not changes
            self.status = "finished" if finished else "unfinished"
            if finished:
                return
        (self.path / "error.json").unlink(missing_ok=True)
        (self.path / "result.json").unlink(missing_ok=True)
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_atomically(self.path / "config.yaml", dump_yaml(self._config))
        for change in changes:
            self.log(change)

    def _holds_work(self) -> bool:
        """Whether a run got further than its start here: one refused for a mistake may begin again with other settings."""
        records = {"config.yaml", "environment.json", "log.txt", "error.json", PASSES_FILE}
        return any(not entry.name.startswith(".") and entry.name not in records for entry in self.path.iterdir())

    def _refuse_other_run(self) -> list[str]:
        """Lines on permitted changes; UserError for any other difference between the run begun here and the one asked for."""
        allowed, refused = changes_since(self.path, self._config, self.inputs)
        if refused:
            what = "; ".join(refused[:4])
            raise UserError(
                f"{self.path}: holds a run with another configuration ({what}); give another --output or delete it"
            )
        if getattr(self._config, "resume", "auto") == "never":
            raise UserError(
                f"{self.path}: holds this run already and --resume is never; give another --output or delete it"
            )
        return [f"changed since the last start: {line}" for line in allowed]

    def _note_environment(self, environment: dict[str, Any]) -> None:
        try:
            before = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        for key in ("versions", "processes", "threads"):
            if before.get(key) != environment[key]:
                self.log(f"{key} differ from the last start: results may differ in the last bits")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line torn by a kill is left out."""
    file = run / "metrics.jsonl"
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def read_result(run: Path) -> dict[str, Any] | None:
    """A run's result.json, or None while it is not finished."""
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'result.json'}: not readable ({error}); delete it and run again") from None
    return result


def recorded_identity(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, input digests) of the run begun in a folder."""
    file = run / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{run}: its config.yaml or environment.json is not readable ({' '.join(str(error).split())}); delete the folder"
        ) from None
    return {key: value for key, value in settings.items() if key not in NOT_IDENTITY}, environment.get("inputs", {})


def changes_since(run: Path, config: CommandConfig, inputs: dict[str, str]) -> tuple[list[str], list[str]]:
    """(permitted, refused) lines on what differs between the run begun in a folder and the one asked for now."""
    old_config, old_inputs = recorded_identity(run)
    permitted: list[str] = []
    refused: list[str] = []
    for key, before, after in differences(old_config, identity(config)):
        if _same_place(before, after):
            continue
        line = f"{key}: {json.dumps(before)} -> {json.dumps(after)}"
        (permitted if key in MAY_CHANGE else refused).append(line)
    refused += [
        f"{key} has other content" for key, before, after in differences(old_inputs, inputs) if before and after
    ]
    return permitted, refused


def _same_place(before: Any, after: Any) -> bool:
    """Whether two values are spellings of the path of one file or folder: `data/`, `data`, an absolute and a relative one. Lists item by item."""
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same_place, before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_same_place(before[key], after[key]) for key in before)
    if before == after:
        return True
    texts = isinstance(before, str) and isinstance(after, str)
    return texts and os.path.exists(after) and os.path.realpath(before) == os.path.realpath(after)


def input_digests(config: CommandConfig) -> dict[str, str]:
    """Digest of every input of a configuration. Raises UserError for a path that is not there."""
    digests = {}
    for key, path in config.inputs().items():
        if not path.exists():
            raise UserError(f"{key}: {path}: no such file or folder")
        digests[key] = input_digest(path, config.output)
    return digests


def input_digest(path: Path, output: Path | None = None) -> str:
    """Digest of one input: of a model file's bytes, of what `files_digest` says of anything else; what a run writes into its own input does not
    count."""
    return file_sha256(path) if path.suffix == ".safetensors" else files_digest(path, without=output)


def _environment(command: str, inputs: dict[str, str]) -> dict[str, Any]:
    return {
        "command": command,
        "arguments": sys.argv[1:],
        "versions": {name: installed_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": _threads(),
        "inputs": inputs,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None
