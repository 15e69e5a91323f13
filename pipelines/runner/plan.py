"""What a start of a pipeline will do: which stages are done, which go on, which are refused, and what --redo deletes."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssld.pipelines.runner.stages import Stage, followers
from ssld.shared.errors import UserError
from ssld.shared.models.downloads import find_downloads_apart
from ssld.shared.run_dir import changes_since, gone_or_changed, holds_no_run, input_digest, read_result

State = Literal["done", "new", "begun", "damaged"]
_DOOMED = ".deleted_"
"""how the name of a run directory begins while it is deleted"""


@dataclass(frozen=True)
class Planned:
    """A stage and what will happen to it: done is skipped, new starts from nothing, begun goes on where it was.

    Of a damaged one files are gone or changed since it was finished: they are made again, and what follows stays if they are the same.
    """

    stage: Stage
    state: State
    notes: tuple[str, ...] = ()


def make_plan(stages: list[Stage], redo: set[str]) -> list[Planned]:
    """Compare every stage with its run directory; the stages in `redo` and their followers count as deleted.

    Raises UserError, one line for each stage that cannot run: an input that is missing and that no earlier stage will write, a run directory
    that holds another configuration, or a stage that is done but reads from one that is not.
    """
    by_name = {stage.name: stage for stage in stages}
    erased = followers(stages, redo)
    pending: set[str] = set()
    damaged: set[str] = set()
    plan: list[Planned] = []
    errors: list[str] = []
    outdated: dict[str, list[str]] = {}
    told: set[Path] = set()
    for stage in stages:
        digests, missing = _inputs(stage, by_name, pending, damaged)
        errors += [f"stage {stage.name}: {line}" for path, line in missing.items() if path not in told]
        told |= set(missing)
        planned, refused = _compare(stage, digests, erased)
        waits_for = sorted(stage.needs & pending)
        if refused:
            what = "; ".join(refused[:4])
            errors.append(
                f"stage {stage.name}: {stage.run} holds a run with another configuration ({what}); "
                f"--redo {stage.name} computes it and what follows again"
            )
        elif planned.state != "new" and waits_for and not stage.kind.remake:
            outdated[stage.name] = waits_for
        if stage.kind.remake and waits_for:
            planned = Planned(stage, "new")
        if planned.state == "damaged":
            damaged.add(stage.name)
        elif planned.state != "done":
            pending.add(stage.name)
        plan.append(planned)
    for name in outdated:
        if not any(name in followers(stages, {other}) - {other} for other in outdated):
            source = ", ".join(outdated[name])
            errors.append(
                f"stage {name}: was made from a {source} that is gone or will change; --redo {name} makes it new"
            )
    if errors:
        raise UserError("\n".join(errors))
    return plan


def downloads(plan: list[Planned]) -> list[str]:
    """A line on each model and data set that the stages still to run would download, asked for within seconds.

    Raises UserError, one line each, for those that cannot be had.
    """
    texts: dict[str, str] = {}
    for planned in plan:
        if planned.state != "done":
            config = planned.stage.config
            wanted = {key: network.model for key, network in config.networks().items()} | config.hub_data()
            texts |= {f"stage {planned.stage.name}: {key}": text for key, text in wanted.items()}
    found = find_downloads_apart(texts)
    impossible = [one.text for one in found if not one.possible]
    if impossible:
        raise UserError("\n".join(impossible))
    return [one.text for one in found]


def erase(stages: list[Stage], redo: set[str], output: Path) -> list[Path]:
    """Delete the run directories of `redo` and what follows; returns them. Nothing but a run directory inside `output` is ever deleted.

    Each takes another name first, those that follow from others before these: a kill leaves a stage whole or not at all.
    """
    clear_erased(output)
    doomed = to_erase(stages, redo)
    with ExitStack() as locks:
        for run in doomed:
            if run.is_symlink() or not run.resolve().is_relative_to(output.resolve()):
                raise UserError(f"{run}: not a folder inside {output}; delete it yourself")
            if not (run / "config.yaml").is_file():
                raise UserError(f"{run}: not a run directory; delete it yourself")
            locks.enter_context(_locked(run))
        for run in reversed(doomed):
            run.rename(output / f"{_DOOMED}{run.name}")
    clear_erased(output)
    return doomed


def clear_erased(output: Path) -> None:
    """Delete what `erase` has renamed, now or in a process that was killed."""
    for folder in output.glob(f"{_DOOMED}*"):
        if not folder.is_symlink():
            shutil.rmtree(folder)


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run}: in use by another process; it cannot be computed again now") from None
        yield


def to_erase(stages: list[Stage], redo: set[str]) -> list[Path]:
    """The run directories that `erase` would delete."""
    names = followers(stages, redo)
    return [stage.run for stage in stages if stage.name in names and not _is_blank(stage.run)]


def _is_blank(run: Path) -> bool:
    """Whether a folder is absent or holds no more than a start that never came to anything leaves."""
    if not run.is_dir():
        return not run.exists()
    return holds_no_run(run)


def _inputs(
    stage: Stage, by_name: dict[str, Stage], pending: set[str], damaged: set[str]
) -> tuple[dict[str, str], dict[Path, str]]:
    """(digests of the inputs that are there, a line on each path that is not and will not be)."""
    digests: dict[str, str] = {}
    missing: dict[Path, str] = {}
    for key, path in stage.config.inputs().items():
        writer = next((by_name[name] for name in stage.needs if path.is_relative_to(by_name[name].run)), None)
        if writer and writer.name in pending:
            if not stage.kind.remake and not writer.writes(path):
                what = ", ".join(writer.kind.writes) or "nothing to read"
                missing[path] = f"{key}: {path}: stage {writer.name} does not write this; it writes {what}"
        elif writer and writer.name in damaged:
            continue  # compared once it has been made again
        elif path.exists():
            digests[key] = input_digest(path, stage.run)
        else:
            hint = f"; --redo {writer.name} makes it again" if writer else ""
            missing[path] = f"{key}: {path}: no such file or folder{hint}"
    return digests, missing


def _compare(stage: Stage, digests: dict[str, str], erased: set[str]) -> tuple[Planned, list[str]]:
    """(what to do with the stage, lines on why it is refused)."""
    if stage.name in erased or not (stage.run / "config.yaml").exists():
        return Planned(stage, "new"), []
    permitted, refused = changes_since(stage.run, stage.config, digests)
    result = read_result(stage.run)
    changed = [] if result is None else [name for names in gone_or_changed(stage.run, result) for name in names]
    if stage.kind.remake:
        same = result is not None and result.get("inputs") == digests and not changed
        return Planned(stage, "done" if same and not refused else "new"), []
    if result is None or permitted:
        return Planned(stage, "begun", tuple(f"changed since the last start: {line}" for line in permitted)), refused
    gone = tuple(f"{stage.run / name} is gone or has changed; it is made again" for name in changed)
    return Planned(stage, "damaged" if gone else "done", gone), refused
