"""The folder of one run, with all its records.

    config.yaml       the resolved settings
    environment.json  command line, versions, machine, digests of the inputs, facts about frozen networks
    metrics.jsonl     one line per logged step
    log.txt           all printed lines
    quarantine.txt    unreadable images, if any
    checkpoints/      see shared/training/checkpoint.py
    result.json       written last: its presence, and that of the files whose checksums it holds, mean the run is finished

Only the main rank writes; the lock is an flock that dies with its process: forked processes do not hold it. Does not import torch.
"""

import fcntl
import json
import os
import platform
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from ssld.shared.checksums import remove_with_sum
from ssld.shared.config.settings import CommandConfig, differences, dump, dump_yaml, identity
from ssld.shared.config.training import PASSES_FILE
from ssld.shared.errors import UserError
from ssld.shared.files import clear_leftovers, file_sha256, write_atomically
from ssld.shared.machine import installed_version
from ssld.shared.noise import keep_noise_in
from ssld.shared.run_identity import changes_since, input_digests, read_mapping
from ssld.shared.tally import Tally
from ssld.shared.terminal import say
from ssld.shared.wording import count, printable

Status = Literal["new", "unfinished", "finished"]
SPEED = ("seconds", "data_wait", "images_per_second", "memory_gb")
"""keys of metrics.jsonl that describe the machine, not the training"""
_BEFORE_A_RUN = frozenset({"environment.json", "error.json"})  # written before config.yaml
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "pycocotools", "safetensors", "numpy", "pillow")


class RunListener(Protocol):
    """A tracker of a run, on its main rank."""

    def metric(self, step: int, values: Mapping[str, Any]) -> None:
        """Receive one line of metrics.jsonl."""

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Receive the metrics of result.json, when all files of the run are written."""


class RunDir:
    """A run directory, held exclusively while this object lives.

    Args:
        config: the resolved settings; `config.output` is the folder.
        command: name of the entry script, for the records.
        main: whether this process writes (rank 0).
        scratch: files and folders in it from which a killed run is resumed; they are deleted when it is finished.

    Attributes:
        path: the folder.
        inputs: digests of the files that the command reads, by the key of the setting; on the main rank.
        status: "new", "unfinished" (the same run was started in this folder, or files of the finished run are gone or changed) or "finished".
        changed: lines on the settings that differ from those of the last start, on the main rank.
        write: function that prints a line.
        earlier_seconds: seconds of earlier starts, without the work that a kill has lost; of a training, from its checkpoint.
        listeners: trackers, which get the lines of metrics and the result on the main rank.

    Raises:
        UserError: the folder is in use, holds something else, holds another run, or one of its inputs has changed since.
    """

    _lock: IO[str] | None = None

    def __init__(self, config: CommandConfig, command: str, *, main: bool = True, scratch: Sequence[str] = ()) -> None:
        self.path = config.output
        self.main = main
        self.status: Status = "new"
        self.write: Callable[[str], None] = say
        self.listeners: list[RunListener] = []
        self._config, self._command, self._scratch = config, command, scratch
        self._changes: list[str] = []
        self._environment: dict[str, Any] = {}  # environment.json of this start
        self._begun = True  # whether the records are those of this start
        self.changed: list[str] = []
        self.earlier_seconds = 0.0
        self._started = time.monotonic()  # the clock may be set meanwhile
        self.inputs: dict[str, str] = {}
        self._read: dict[str, Any] = {}
        self._used: dict[str, Any] = {}
        if main:
            self._open()
            keep_noise_in(self.path / "log.txt")

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def seconds(self) -> float:
        """Seconds of this start so far and of earlier ones."""
        return round(self.earlier_seconds + time.monotonic() - self._started, 1)

    def finished_earlier(self, status: Status | None = None) -> bool:
        """Return whether an earlier start has finished this run, which the log then says.

        Args:
            status: that of the main rank, in a command with several processes.
        """
        finished = (status or self.status) == "finished"
        if finished:
            self.log(f"{self.path}: this run is finished; nothing to do")
        return finished

    def log(self, *lines: str) -> None:
        """Print lines and append them to log.txt; a line break inside one, as in the name of a file, is shown as `\\n`."""
        for text in lines if self.main else ():
            line = printable(text, keep="\t")
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self.write(line)

    def tell(self, place: str, source: object, tally: Tally) -> None:
        """Log the losses of reading `source`, the value of the setting `place`, if there are any, and keep the counts for result.json."""
        self._read[place] = tally.record()
        line = tally.describe()
        self.log_if(line and f"{source}: {line}")

    def use(self, config: CommandConfig) -> None:
        """Log where the settings are from, and the values that this run uses in place of those in config.yaml, where they follow from others.

        The latter, in place of null, whose value depends on the model or the length of the run, and of fractions of that length, are kept for
        result.json.
        """
        source = f"recipe {config.recipe}" if config.recipe else "no recipe file; flags only"
        self.log(f"{source}; all settings are in {self.path / 'config.yaml'}")
        self._used = {key: after for key, _, after in differences(dump(self._config), dump(config))}
        values = ", ".join(f"{key} {json.dumps(value)}" for key, value in self._used.items())
        self.log_if(values and f"settings that follow from others: {values}")

    def log_if(self, text: str | None) -> None:
        """Log a line, if there is one."""
        if text:
            self.log(text)

    def begin(self) -> None:
        """Record the settings of this start, and that a finished run goes on.

        A command with settings that may change calls it once nothing can refuse them any more, at the latest when it finishes: settings that never
        ran are no change, and leave a finished run finished.
        """
        if self._begun:
            return
        (self.path / "result.json").unlink(missing_ok=True)
        self._write_environment()
        write_atomically(self.path / "config.yaml", dump_yaml(self._config))
        self._begun = True
        for change in self.changed:
            self.log(f"changed since the last start: {change}")

    def compare_network(self, key: str, facts: Mapping[str, Any], note: str | None = None) -> None:
        """Record facts about a frozen network, such as the size at which it sees images, and compare them with those of earlier starts.

        They follow from its file, its settings and this version, so the digests of the inputs do not show all of their changes. A run of an earlier
        version, which has recorded none, continues, and the log says what is assumed.

        Args:
            key: name of the network in messages.
            facts: JSON values by name.
            note: a further line for the log of a run without these records.

        Raises:
            UserError: a fact that this run began with is another one now.
        """
        if not self.main:
            return
        known = self._environment.get("networks")
        if known is None:
            self.log(
                f"{key}: this run began with a version that did not record its {' and '.join(facts)}, assumed to be unchanged"
            )
            self.log_if(note)
        known = known if isinstance(known, dict) else {}
        before = known.get(key)
        before = before if isinstance(before, dict) else {}
        other = [
            f"{name} {json.dumps(before[name])}, now {json.dumps(value)}"
            for name, value in facts.items()
            if before.get(name, value) != value
        ]
        if other:
            raise UserError(
                f"{self.path}: began with another {key}: {'; '.join(other)}; give another --output or delete it"
            )
        self._environment["networks"] = known | {key: dict(facts)}
        if self._begun:
            self._write_environment()

    def metric(self, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl, and pass it to the listeners."""
        if self.main:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for listener in self.listeners:
                listener.metric(step, values)

    def cut_metrics(self, step: int) -> None:
        """Drop the lines that a killed run wrote after the checkpoint of `step`, and an incomplete last line."""
        file = self.path / "metrics.jsonl"
        if self.main and file.exists():
            lines = read_metrics(self.path)
            written = file.read_bytes().count(b"\n")  # an incomplete last line has no line end
            if written > len(lines):
                self.log(
                    f"{file}: {count(written - len(lines), 'line')} cannot be read and will be missing in curves and reports"
                )
            self._rewrite_metrics(line for line in lines if line["step"] <= step)

    def quarantine(self, keys: Iterable[str]) -> None:
        """Write the list of unreadable images."""
        if self.main:
            lines = "".join(f"{key}\n" for key in sorted(set(keys)))
            write_atomically(self.path / "quarantine.txt", lines.encode("utf-8", "surrogateescape"))

    def quarantined(self) -> list[str]:
        """Return the unreadable images of this run so far."""
        file = self.path / "quarantine.txt"
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if file.is_file() else []

    def finish(self, metrics: dict[str, Any], outputs: Iterable[Path] = ()) -> None:
        """Write result.json, which marks the run as finished, delete its scratch and release the folder; `outputs` are files inside it."""
        if not self.main:
            return
        self.begin()
        if (self.path / "metrics.jsonl").exists():
            self._rewrite_metrics(read_metrics(self.path))
        record = {
            "command": self._command,
            "metrics": metrics,
            "outputs": {str(file.relative_to(self.path)): file_sha256(file) for file in outputs},
            "config": identity(self._config),
            "used": self._used,
            "inputs": self.inputs,
            "read": self._read,
            "changes": self._changes,
            "seconds": self.seconds,
            "earlier_seconds": self.earlier_seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_atomically(self.path / "result.json", json.dumps(record, indent=2) + "\n")
        self._delete_scratch()
        for listener in self.listeners:
            listener.finish(metrics)
        self.close()  # the next process need not wait until this object is collected

    def reopen(self) -> None:
        """Mark a finished run as unfinished, because some of its files are missing."""
        (self.path / "result.json").unlink(missing_ok=True)
        self.status = "unfinished"

    def _make_again(self, gone: Sequence[str], changed: Sequence[str]) -> None:
        """Reopen a finished run whose files, by their paths inside it, are gone or have other content. These are kept under another name."""
        if gone or changed:
            self.reopen()
        for name in gone:
            self.log(f"{self.path / name}: missing although this run is finished; writing it again")
        for name in changed:
            kept = self.path / f"{name}.changed"
            (self.path / name).replace(kept)
            self.log(
                f"{self.path / name}: changed since this run finished; writing it again, the changed file is kept as {kept.name}"
            )

    def close(self) -> None:
        """Release the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def __del__(self) -> None:
        self.close()

    def _write_environment(self) -> None:
        write_atomically(self.path / "environment.json", json.dumps(self._environment, indent=2) + "\n")

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
        """Create the folder and its lock file. Raises OSError where that is impossible: a parent is a file, no permission."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; give another --output")
        foreign = self.path.is_dir() and not (self.path / "config.yaml").exists()
        if foreign and not holds_no_run(self.path):
            raise UserError(f"{self.path}: not empty and not a run directory; give another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        _LOCKS.add(self._lock)

    def _compare_and_record(self) -> None:
        clear_leftovers(self.path.rglob(".*.*"))
        self.inputs = input_digests(self._config)
        environment = _environment(self._command, self.inputs)
        changes: list[str] = []
        networks: Any = {}
        if holds_work(self.path):
            changes = self._refuse_other_run()
            before = self._environment_before()
            networks = before.get("networks")  # None: an earlier version wrote the record
            self._changes = list(dict.fromkeys([*_strings(before.get("changes")), *changes]))
            for key in ("versions", "processes", "threads"):
                if before and before.get(key) != environment[key]:
                    self.log(f"{key} differ from the last start: results may differ in the last bits")
            result = None if changes else read_result(self.path)
            self.status = "unfinished" if result is None else "finished"
            if result is not None:
                self._delete_scratch()
                self._make_again(*gone_or_changed(self.path, result))
                if self.status == "finished":
                    self._environment = before  # kept where the command finds damage itself and reopens the run
                    return
        (self.path / "error.json").unlink(missing_ok=True)
        self.changed = changes
        self._environment = environment | {"changes": self._changes, "networks": networks}
        self._begun = False
        if not changes:
            self.begin()

    def _delete_scratch(self) -> None:
        for name in self._scratch:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove_with_sum(path)

    def _refuse_other_run(self) -> list[str]:
        """Return lines about permitted changes; raise UserError for any other difference between the recorded and the requested run."""
        allowed, refused = changes_since(self.path, self._config, self.inputs)
        if refused:
            what = "; ".join(refused[:4])
            raise UserError(
                f"{self.path}: holds a run with another configuration ({what}); give another --output or delete it"
            )
        if getattr(self._config, "resume", "auto") == "never":
            raise UserError(never_resumed(self.path))
        return allowed

    def _environment_before(self) -> dict[str, Any]:
        """Return the environment of the last start; `recorded_identity` has raised for a damaged file before."""
        before: dict[str, Any] = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
        return before


_LOCKS: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def _close_locks() -> None:
    for lock in list(_LOCKS):
        lock.close()


# A worker of a data loader outlives a killed main process by seconds, and with it an flock that it has inherited.
os.register_at_fork(after_in_child=_close_locks)


def holds_no_run(folder: Path) -> bool:
    """Whether a folder contains no more than a start that ended before its first record."""
    return all(entry.name.startswith(".") or entry.name in _BEFORE_A_RUN for entry in folder.iterdir())


def never_resumed(folder: Path) -> str:
    """Return the message on a run directory that `--resume never` refuses."""
    return f"{folder}: holds this run already and --resume is never; give another --output or delete it"


def holds_work(folder: Path) -> bool:
    """Whether a folder has results of a run: one that ended at its start by a mistake may begin again with other settings."""
    records = {"config.yaml", "log.txt", "batches.jpg", PASSES_FILE} | _BEFORE_A_RUN
    if not (folder / "config.yaml").exists():
        return False
    return any(not entry.name.startswith(".") and entry.name not in records for entry in folder.iterdir())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl; incomplete and damaged lines are left out.

    An attempt that died after an evaluation has logged it, and the next attempt logs it again: the last line counts.
    """
    file = run / "metrics.jsonl"
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    return list({(line["step"], *line): line for line in lines}.values())


def read_result(run: Path) -> dict[str, Any] | None:
    """Read a run's result.json; None while the run is not finished. Raises UserError for a damaged file."""
    file = run / "result.json"
    try:
        result: dict[str, Any] = read_mapping(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable ({error}); delete it and run again") from None
    if not result:
        raise UserError(f"{file}: not readable (empty file); delete it and run again")
    for key in ("metrics", "outputs"):
        if not isinstance(result.get(key, {}), dict):
            raise UserError(f"{file}: not readable ({key}: expected a mapping); delete it and run again")
    for name in result.get("outputs", {}):  # a file that has changed is moved aside
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UserError(f"{file}: not readable ({name}: not a file of this run); delete it and run again")
    return {"metrics": {}, "outputs": {}, **result}


def gone_or_changed(run: Path, result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names of missing files of a finished run, and of files whose content differs from the checksum in result.json."""
    gone, changed = [], []
    for name, digest in result["outputs"].items():
        file = run / name
        if not file.is_file():
            gone.append(name)
        elif file_sha256(file) != digest:
            changed.append(name)
    return gone, changed


def _strings(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


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
