"""ENTRY: run the stages of a pipeline one after the other, each as the command a user would type.

    python pipelines/run.py pipelines/quickstart.yaml
    ssld run quickstart                                   # the same from any folder

All settings of all stages are checked before the first one starts. A stage whose run directory holds the finished run is skipped, an interrupted one
resumes, and one with another configuration stops the pipeline with a list of the differences. Does not import torch.
"""

import fcntl
import os
import resource
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.config import PipelineConfig, ReportConfig
from ssld.pipelines.folder import inside_folder_of, left_behind, rebased, shown
from ssld.pipelines.reports.table import RECORD, Record, read_record, table_text, write_record
from ssld.pipelines.runner.cost import disk_text, steps_text, total_text
from ssld.pipelines.runner.estimate import expected_costs, read_rates, time_text, write_rates
from ssld.pipelines.runner.launch import Signals, command_line, run_stage
from ssld.pipelines.runner.plan import Planned, downloads, erase, make_plan, to_erase
from ssld.pipelines.runner.stages import LOGS, Stage, build_stages, find_pipeline, read_pipeline
from ssld.pipelines.runner.trial import measure
from ssld.shared.config.command import exit_code
from ssld.shared.config.settings import Parser
from ssld.shared.config.training import TrainingConfig
from ssld.shared.errors import STOPPED, USER_ERROR, Stopped, UserError
from ssld.shared.files import clear_leftovers
from ssld.shared.run_dir import read_result
from ssld.shared.terminal import say, say_lines
from ssld.shared.wording import count, did_you_mean, duration


def main(argv: Sequence[str] | None = None) -> int:
    """Run a pipeline; returns 0 done, 2 a user's mistake, 1 a failed stage, 143 stopped."""
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def _run(argv: list[str]) -> int:
    command = parser()
    words, own = _own_flags(argv)
    known = command.parse_known_args(words)[0]
    file = find_pipeline(known.pipeline)
    pipeline = read_pipeline(file, _stage_settings(own), smoke=known.smoke)
    variables = _variables(own, list(pipeline.variables))
    for name in pipeline.variables:  # for the help
        command.add_argument(f"--variables.{name}", metavar="VALUE", help=f"value of ${{{name}}}")
    arguments = command.parse_args(words)
    if arguments.smoke and not pipeline.smoke:
        raise UserError(f"{file}: --smoke needs a section `smoke:` with the smallest sizes")
    with inside_folder_of(file) as there:
        return _run_inside(pipeline, there, arguments, variables)


def _run_inside(pipeline: PipelineConfig, file: Path, arguments: Namespace, variables: dict[str, str]) -> int:
    """Run the pipeline in `file`, inside its folder."""
    output = Path(f"{pipeline.output}_smoke" if arguments.smoke else pipeline.output)
    if arguments.output:
        output = rebased(arguments.output)
    elif (old := left_behind(output / RECORD)) and (record := read_record(old.parent)) and not record.folder:
        raise UserError(
            f"{shown(file)}: output: {output} has runs in the current folder, made before paths in a pipeline became relative to its folder, "
            f"{shown(Path())}: move the pipeline's file here to go on with them, or delete them"
        )
    stages = build_stages(pipeline, file, output=output, variables=variables, smoke=arguments.smoke)
    redo = _redo(arguments, stages)
    _refuse_unwritable(output)
    plan = make_plan(stages, redo)
    if (folder := shown(Path())) != Path():
        say(f"the stages run in {folder}: their paths are relative to it")
    if arguments.estimate:
        if not arguments.dry_run:
            raise UserError("--estimate: give --dry-run too; a run itself logs the time it needs")
        downloads(plan)  # raises before the trial for what is not available
        options: dict[str, Any] = {"variables": variables, "smoke": arguments.smoke}
        try:
            _estimate(plan, lambda folder: build_stages(pipeline, file, output=folder, **options), output)
        except Stopped as error:
            raise Stopped(f"{error}; the rates measured before are kept") from None
    if arguments.dry_run:
        _print_plan(plan, to_erase(stages, redo), output, estimated=arguments.estimate)
    for line in downloads(plan):
        say(line)
    if arguments.dry_run:
        return 0
    with _locked(output):
        for run in erase(stages, redo, output):
            say(f"deleted {shown(run)}")
        write_record(output, Record(file.stem, arguments.smoke, pipeline))
        times: dict[str, float] = {}
        if damaged := [planned for planned in plan if planned.state == "damaged"]:
            if code := _run_stages(damaged, output, file, times):
                return code
            # Compare again: are the new files the ones that later stages were made from?
            plan = make_plan(stages, set())
        if code := _run_stages(plan, output, file, times):
            return code
        if pipeline.table:
            say_lines(f"\n{table_text(pipeline.table, output, smoke=arguments.smoke)}\n")
        if shown(output) != output:
            reports = [one.stage.run / "report.html" for one in plan if isinstance(one.stage.config, ReportConfig)]
            say(f"results: {', '.join(str(shown(path)) for path in (output, *reports))}")
        for line in _closing_lines(plan, times):
            say(line)
        return 0


def _run_stages(plan: list[Planned], output: Path, file: Path, times: dict[str, float]) -> int:
    """Run the stages of a plan of the pipeline `file` that are not done; returns 0, or the exit code of the one that failed or was stopped.

    The seconds of the stages that ran are added to `times`, by name.
    """
    with Signals() as signals:
        for number, planned in enumerate(plan, 1):
            stage, label = planned.stage, f"[{number}/{len(plan)}] {planned.stage.name}"
            if planned.state == "done":
                say(f"{label}: finished earlier")
                continue
            for note in planned.notes:
                say(f"{label}: {note}")
            if signals.received:
                return STOPPED
            say(f"{label}: {shlex.join(command_line(stage))}")
            begun = time.monotonic()
            outcome = run_stage(stage, output / LOGS / f"{stage.name}.txt", signals)
            if outcome.code == STOPPED or (signals.received and number < len(plan)):
                say(f"stage {stage.name}: stopped; the same command resumes it", sys.stderr)
                return STOPPED
            if outcome.code:
                for line in outcome.lines:
                    named = outcome.code == USER_ERROR and stage.names_setting(line)
                    place = f" (stages.{stage.name}.set in {shown(file)})" if named else ""
                    say(f"error: stage {stage.name}: {line}{place}", sys.stderr)
                return outcome.code
            times[stage.name] = time.monotonic() - begun
            say(f"{label}: finished in {_minutes(times[stage.name]):.1f} min")
    return 0


def _closing_lines(plan: list[Planned], times: dict[str, float]) -> Iterator[str]:
    """Yield the lines on time: of this start, whose stages took `times` seconds; of earlier ones, as their stages have recorded it; the sum."""
    this = sum(map(_minutes, times.values()))
    if times:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        yield f"time of this start: {this:.1f} min for {count(len(times), 'stage')}; largest process {peak:.1f} GB"
    earlier = 0.0
    for planned in plan:
        result = read_result(planned.stage.run) or {}
        earlier += result.get("earlier_seconds" if planned.stage.name in times else "seconds", 0)
    if earlier:
        yield f"time of earlier starts: {_minutes(earlier):.1f} min, as the stages have recorded it"
    if earlier and times:
        yield f"time in all: {this + _minutes(earlier):.1f} min"


def _minutes(seconds: float) -> float:
    """Round to tenths of a minute, as printed, so that printed sums add up."""
    return round(seconds / 60, 1)


def _estimate(plan: list[Planned], build: Callable[[Path], list[Stage]], output: Path) -> None:
    """Measure the rates of the stages of a plan, and keep them in the pipeline's folder."""
    with _locked(output):
        rates = read_rates(output)
        try:
            measure(plan, build, output, rates)
        finally:
            write_rates(output, rates, [planned.stage for planned in plan])


def _refuse_unwritable(output: Path) -> None:
    """Raise UserError if the folder of the run directories, or the one in which it would be made, cannot be written."""
    folder = next((one for one in (output, *output.parents) if one.exists()), Path())
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{shown(folder)}: cannot be written; give another --output")


def _print_plan(plan: list[Planned], doomed: list[Path], output: Path, *, estimated: bool) -> None:
    costs = expected_costs(plan, output)
    for run in doomed:
        say(f"would delete {shown(run)}")
    for number, planned in enumerate(plan, 1):
        stage = planned.stage
        time_needed = costs.times.get(stage.name)
        about = "" if time_needed is None else f"about {duration(time_needed)}{_of_what(planned)}"
        length = steps_text(stage) + (" in all" if planned.steps_done else "")
        parts = [_state_text(planned), length, about]
        if estimated and stage.name in costs.times and time_needed is None:
            parts.append("time not estimated")
        parts.append(disk_text(costs.disk[stage.name]) if stage.name in costs.disk else "")
        say(f"[{number}/{len(plan)}] {stage.name}: {'; '.join(text for text in parts if text) or 'new'}")
        for note in planned.notes:
            say(f"    {note}")
        say(f"    {shlex.join(command_line(stage))}")
    notes = []
    if costs.remembered:
        notes.append(f"{count(len(costs.remembered), 'stage')} by the last known rate of this machine")
    if (None in costs.times.values() or costs.remembered) and not estimated:
        notes.append("--estimate measures it")
    if any(planned.steps_done and costs.times.get(planned.stage.name) is not None for planned in plan):
        notes.append("trainings that resume count what is left")
    needed = "; ".join([time_text(costs.times), *notes])
    say(f"{count(len(plan), 'stage')} in {shown(output)}: {needed}; {total_text(costs.disk)}; data sets not counted")


def _state_text(planned: Planned) -> str:
    if planned.state == "begun" and isinstance(planned.stage.config, TrainingConfig):
        return f"resumes after step {planned.steps_done}" if planned.steps_done else "begins again: no checkpoint yet"
    return {"done": "done, skipped", "begun": "resumes", "damaged": "finished, but files are missing", "new": ""}[
        planned.state
    ]


def _of_what(planned: Planned) -> str:
    """Return what the time of a stage is for, if it is not for the stage as it stands in the line."""
    if planned.steps_done:
        return " for what is left"
    return (
        " as a whole, a part of which may be done"
        if planned.state == "begun" and not isinstance(planned.stage.config, TrainingConfig)
        else ""
    )


def _own_flags(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into the words for the parser and {key: value} of the flags that depend on the file: variables.NAME, stages.NAME.KEY."""
    words: list[str] = []
    own: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not flag.startswith(("--variables.", "--stages.")):
            words.append(word)
            continue
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise UserError(f"{flag}: give a value")
        own[flag.removeprefix("--")] = value
    return words, own


def _variables(own: dict[str, str], known: list[str]) -> dict[str, str]:
    """Return {name: value} of the flags variables.NAME. Raises UserError for one that the file does not have."""
    parts = [(flag.partition("."), value) for flag, value in own.items()]
    values = {name: value for (section, _, name), value in parts if section == "variables"}
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known) if known else "; the file has none"
            raise UserError(f"--variables.{name}: unknown variable{hint}")
    return values


def _stage_settings(own: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return {stage: {dotted key: value}} of the flags stages.NAME.KEY. Raises UserError for one without a key."""
    settings: dict[str, dict[str, str]] = {}
    for flag, value in own.items():
        section, name, *keys = [*flag.split(".", 2), ""][:3]
        if section == "stages":
            if not keys[0]:
                raise UserError(f"--{flag}: expected --stages.NAME.KEY VALUE")
            settings.setdefault(name, {})[keys[0].replace("-", "_")] = value
    return settings


def _redo(arguments: Namespace, stages: list[Stage]) -> set[str]:
    names = [stage.name for stage in stages]
    for name in arguments.redo:
        if name not in names:
            raise UserError(f"--redo {name}: no such stage{did_you_mean(name, names)}")
    return set(arguments.redo)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the pipeline's folder; the lock dies with the process."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{shown(output)}: is a file, not a folder; give another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{shown(output)}: {error.strerror or error}; give another --output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{shown(output)}: in use by another pipeline; wait for it or give another --output"
            ) from None
        clear_leftovers(output.glob(".*.*"))
        yield


def parser() -> Parser:
    """Return the parser of this command, without the flags that depend on the pipeline's file."""
    parser = Parser(
        prog="ssld run",
        description="Run a pipeline of stages, resumable.",
        epilog="--variables.NAME VALUE sets a variable of the file, --stages.NAME.KEY VALUE a setting of a stage.",
        allow_abbrev=False,
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="YAML file, or the name of a shipped pipeline: quickstart")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the run directories (default: output of the file)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print commands, steps, known times and disk space, and run nothing"
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="with --dry-run: measure the times by a trial of three steps of each training, and keep them",
    )
    parser.add_argument(
        "--redo",
        action="append",
        default=[],
        metavar="STAGE",
        help="stage to delete, with all stages that depend on it, before the run",
    )
    parser.add_argument("--smoke", action="store_true", help="run everything at the smallest sizes, as a test")
    return parser


if __name__ == "__main__":
    sys.exit(main())
