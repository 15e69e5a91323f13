"""Plan of a pipeline run: which stages are done, resume, or are refused, and which run directories --redo deletes."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from ssld.pipelines.folder import missing_text, shown
from ssld.pipelines.runner.cost import training_images, training_steps
from ssld.pipelines.runner.stages import Stage, followers
from ssld.shared.config.settings import CommandConfig
from ssld.shared.config.training import TrainingConfig
from ssld.shared.errors import UserError
from ssld.shared.models.damage import damage_of
from ssld.shared.models.downloads import find_downloads_apart
from ssld.shared.run_dir import gone_or_changed, holds_no_run, holds_work, never_resumed, read_result
from ssld.shared.run_identity import changes_since, input_digest
from ssld.shared.training.checkpoint_folders import beyond_the_end, damaged_checkpoint, newest_checkpoint, step_of

State = Literal["done", "new", "begun", "damaged"]
_DOOMED = ".deleted_"
"""prefix of a run directory's name while it is deleted"""


@dataclass(frozen=True)
class Planned:
    """A stage and its state: `done` is skipped, `new` starts from scratch, `begun` resumes.

    `damaged`: files of the finished stage are missing or changed. They are made again; later stages stay valid if the new files are identical.
    """

    stage: Stage
    state: State
    notes: tuple[str, ...] = ()
    steps_done: int = 0
    """optimizer steps in the newest checkpoint of a training that resumes"""


def make_plan(stages: list[Stage], redo: set[str]) -> list[Planned]:
    """Compare every stage with its run directory; the stages in `redo` and those that depend on them count as deleted.

    Raises UserError with one line per stage that cannot run: a missing input that no earlier stage will write, a run directory with another
    configuration or with a damaged checkpoint, or a finished stage that reads from an unfinished one.
    """
    by_name = {stage.name: stage for stage in stages}
    erased = followers(stages, redo)
    pending: set[str] = set()
    damaged: set[str] = set()
    plan: list[Planned] = []
    errors: list[str] = []
    outdated: dict[str, list[str]] = {}
    reported: set[Path] = set()
    for stage in stages:
        digests, missing = _inputs(stage, by_name, pending, damaged)
        errors += [f"stage {stage.name}: {line}" for path, line in missing.items() if path not in reported]
        reported |= set(missing)
        planned, refused = _compare(stage, digests, erased)
        waits_for = sorted(stage.needs & pending)
        if refused:
            differences = "; ".join(refused[:4])
            errors.append(
                f"stage {stage.name}: {shown(stage.run)} holds a run with another configuration ({differences}); "
                f"--redo {stage.name} computes it and the stages that depend on it again"
            )
        elif planned.state != "new" and waits_for and not stage.kind.remake:
            outdated[stage.name] = waits_for
        if too_far := _beyond_the_end(planned):
            errors.append(f"stage {stage.name}: {too_far}; give as many at least, or --redo {stage.name}")
        if planned.steps_done and (damage := damage_of_newest(stage.config)):
            errors.append(f"stage {stage.name}: {damage}")
        if planned.state == "begun" and getattr(stage.config, "resume", "auto") == "never":
            errors.append(f"stage {stage.name}: {never_resumed(shown(stage.run))}")
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
            changes = [note for one in plan if one.stage.name in outdated[name] for note in one.notes]
            why = f" ({source}: {'; '.join(changes)})" if changes else ""
            afresh = f", and --redo {source} begins {source} afresh instead of continuing it" if changes else ""
            errors.append(
                f"stage {name}: was made from {source}, which is missing or will change{why}; --redo {name} computes it again{afresh}"
            )
    if errors:
        raise UserError(*errors)
    return plan


def downloads(plan: list[Planned]) -> list[str]:
    """Return a line for each model and data set that the remaining stages would download.

    Raises UserError, one line each, for those that are not available, and for weights without an architecture.
    """
    texts: dict[str, str] = {}
    impossible: list[str] = []
    for planned in plan:
        if planned.state != "done":
            config = planned.stage.config
            texts |= {f"stage {planned.stage.name}: {key}": text for key, text in config.remote_references().items()}
            impossible += [f"stage {planned.stage.name}: {line}" for line in unnamed_networks(config)]
    needed = find_downloads_apart(texts)
    impossible += [download.line for download in needed if not download.possible]
    if impossible:
        raise UserError(*impossible)
    return [download.line for download in needed]


def unnamed_networks(config: CommandConfig) -> Iterator[str]:
    """Yield an error line for each safetensors file whose architecture neither its metadata nor the settings name; the command finds other faults."""
    for key, network in config.networks().items():
        file = Path(network.model)
        if network.arch is None and file.is_file() and not names_architecture(file):
            group = key.rpartition(".")[0]
            arch_key = f"{group}.arch" if group else "arch"
            yield f"{key}: {network.model}: does not name its architecture; set {arch_key} to its timm name"


def names_architecture(file: Path) -> bool:
    """Return False for a readable safetensors file whose metadata do not name the architecture."""
    if file.suffix != ".safetensors":
        return True
    try:
        with safe_open(file, framework="numpy") as tensors:
            return "ssld" in (tensors.metadata() or {})
    except (OSError, SafetensorError):
        return True


def erase(stages: list[Stage], redo: set[str], output: Path) -> list[Path]:
    """Delete the run directories of `redo` and of the stages that depend on them; return them. Only run directories inside `output` are deleted.

    Each is renamed first, dependent stages before their inputs, so that a kill never leaves half a stage.
    """
    clear_erased(output)
    doomed = to_erase(stages, redo)
    with ExitStack() as locks:
        for run in doomed:
            if run.is_symlink() or not run.resolve().is_relative_to(output.resolve()):
                raise UserError(f"{shown(run)}: not a folder inside {shown(output)}; delete it yourself")
            if not (run / "config.yaml").is_file():
                raise UserError(f"{shown(run)}: not a run directory; delete it yourself")
            locks.enter_context(_locked(run))
        for run in reversed(doomed):
            run.rename(output / f"{_DOOMED}{run.name}")
    clear_erased(output)
    return doomed


def clear_erased(output: Path) -> None:
    """Delete the folders that `erase` has renamed, in this process or in a killed one."""
    for folder in output.glob(f"{_DOOMED}*"):
        if not folder.is_symlink():
            shutil.rmtree(folder)


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{shown(run)}: in use by another process; wait for it before you compute the stage again"
            ) from None
        yield


def to_erase(stages: list[Stage], redo: set[str]) -> list[Path]:
    """Return the run directories that `erase` would delete."""
    names = followers(stages, redo)
    return [stage.run for stage in stages if stage.name in names and not _is_blank(stage.run)]


def _is_blank(run: Path) -> bool:
    """Return whether a folder is absent or holds only the files of an aborted start."""
    if not run.is_dir():
        return not run.exists()
    return holds_no_run(run)


def _inputs(
    stage: Stage, by_name: dict[str, Stage], pending: set[str], damaged: set[str]
) -> tuple[dict[str, str], dict[Path, str]]:
    """Return (digests of the existing inputs, a line for each path that does not exist and that no earlier stage will write, or that is no file of
    weights though it is named like one)."""
    digests: dict[str, str] = {}
    missing: dict[Path, str] = {}
    for key, path in stage.config.inputs().items():
        writer = next((by_name[name] for name in stage.needs if path.is_relative_to(by_name[name].run)), None)
        if writer and writer.name in pending:
            if not stage.kind.remake and not writer.writes(path):
                written = ", ".join(writer.kind.writes) or "no files for other stages"
                missing[path] = f"{key}: {path}: stage {writer.name} does not write this; it writes {written}"
        elif writer and writer.name in damaged:
            continue  # compared after it has been made again
        elif path.exists() and (damage := damage_of(path)):
            missing[path] = f"{key}: {damage}"
        elif path.exists():
            digests[key] = input_digest(path, stage.run)
        else:
            hint = f"; --redo {writer.name} makes it again" if writer else ""
            missing[path] = f"{key}: {missing_text(path)}{hint}"
    return digests, missing


def _compare(stage: Stage, digests: dict[str, str], erased: set[str]) -> tuple[Planned, list[str]]:
    """Return (the stage with its state, reasons why it is refused)."""
    if stage.name in erased or not holds_work(stage.run):
        return Planned(stage, "new"), []
    permitted, refused = changes_since(stage.run, stage.config, digests)
    result = read_result(stage.run)
    changed = [] if result is None else [name for names in gone_or_changed(stage.run, result) for name in names]
    if stage.kind.remake:
        same = result is not None and result.get("inputs") == digests and not changed
        return Planned(stage, "done" if same and not refused else "new"), []
    if result is None or permitted:
        notes = tuple(f"changed since the last start: {line}" for line in permitted)
        newest = newest_checkpoint(stage.run / "checkpoints") if isinstance(stage.config, TrainingConfig) else None
        return Planned(stage, "begun", notes, step_of(newest) if newest else 0), refused
    notes = tuple(f"{shown(stage.run / name)} is missing or has changed; recomputing it" for name in changed)
    return Planned(stage, "damaged" if notes else "done", notes), refused


def damage_of_newest(config: CommandConfig) -> str | None:
    """Return the message on the checkpoint from which a training would continue, if it is damaged; None without a run that continues."""
    if not isinstance(config, TrainingConfig):
        return None
    newest = newest_checkpoint(config.output / "checkpoints")
    return damaged_checkpoint(shown(newest)) if newest else None


def _beyond_the_end(planned: Planned) -> str | None:
    """Return the message on a training that has done more steps than it is to do now; None for others, and where its images are not known yet."""
    config = planned.stage.config
    if not isinstance(config, TrainingConfig) or not planned.steps_done:
        return None
    steps = training_steps(config, None if config.train_epochs is None else training_images(config))
    if steps is None or planned.steps_done <= steps:
        return None
    return beyond_the_end(shown(planned.stage.run), planned.steps_done, steps)
