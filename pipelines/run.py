"""ENTRY: run the stages of a pipeline one after the other, each as the command a user would type.

    python pipelines/run.py pipelines/quickstart.yaml
    ssld run quickstart                                   # the same from any folder

All settings of all stages are checked before the first one starts. A stage whose run directory holds the finished run is skipped, an interrupted one
resumes, and one with another configuration stops the pipeline with a list of the differences. Does not import torch.
"""

import fcntl
import resource
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

if find_spec("ssld") is None:
    print("error: the package ssld is not installed; run pip install -e . in the project's folder", file=sys.stderr)
    sys.exit(2)

from ssld.pipelines.reports.table import Record, table_text, write_record
from ssld.pipelines.runner.cost import disk_bytes, disk_text, steps_text, total_text
from ssld.pipelines.runner.launch import Signals, command_line, run_stage
from ssld.pipelines.runner.plan import Planned, downloads, erase, make_plan, to_erase
from ssld.pipelines.runner.stages import LOGS, Stage, build_stages, find_pipeline, read_pipeline
from ssld.shared.config.command import STOPPED, USER_ERROR, exit_code
from ssld.shared.config.settings import Parser, did_you_mean
from ssld.shared.errors import UserError
from ssld.shared.files import clear_leftovers
from ssld.shared.run_dir import read_result
from ssld.shared.terminal import say
from ssld.shared.wording import count


def main(argv: Sequence[str] | None = None) -> int:
    """Run a pipeline; returns 0 done, 2 a user's mistake, 1 a failed stage, 143 stopped."""
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def _run(argv: list[str]) -> int:
    parser = _parser()
    file = find_pipeline(parser.parse_known_args(_without_variables(argv))[0].pipeline)
    pipeline = read_pipeline(file)
    for name in pipeline.variables:  # flags that only this file has
        parser.add_argument(
            f"--variables.{name}", dest=f"variables.{name}", metavar="VALUE", help=f"value of ${{{name}}}"
        )
    arguments = parser.parse_args(argv)
    if arguments.smoke and not pipeline.smoke:
        raise UserError(f"{file}: --smoke needs a section `smoke:` with the smallest sizes")
    output = arguments.output or Path(f"{pipeline.output}_smoke" if arguments.smoke else pipeline.output)
    given = {name: getattr(arguments, f"variables.{name}") for name in pipeline.variables}
    variables = {name: value for name, value in given.items() if value is not None}
    stages = build_stages(pipeline, file, output=output, variables=variables, smoke=arguments.smoke)
    redo = _redo(arguments, stages)
    plan = make_plan(stages, redo)
    if arguments.dry_run:
        _print_plan(plan, to_erase(stages, redo), output)
    for line in downloads(plan):
        say(line)
    if arguments.dry_run:
        return 0
    with _locked(output):
        for run in erase(stages, redo, output):
            say(f"deleted {run}")
        record = Record(file.stem, arguments.smoke, pipeline)
        write_record(output, record)
        if any(planned.state == "damaged" for planned in plan):
            code = _run_stages([planned for planned in plan if planned.state == "damaged"], None, output, file)
            if code:
                return code
            plan = make_plan(
                stages, set()
            )  # compare again: are the new files the ones that later stages were made from?
        return _run_stages(plan, record, output, file)


def _run_stages(plan: list[Planned], record: Record | None, output: Path, file: Path) -> int:
    """Run the stages of a plan of the pipeline `file` that are not done, then print the table; without a record, print no table."""
    started = time.monotonic()
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
                    place = f" (stages.{stage.name}.set in {file})" if named else ""
                    say(f"error: stage {stage.name}: {line}{place}", sys.stderr)
                return outcome.code
            say(f"{label}: {(time.monotonic() - begun) / 60:.1f} min")
    if record is None:
        return 0
    if record.pipeline.table:
        say(f"\n{table_text(record.pipeline.table, output, smoke=record.smoke)}\n")
    say(_closing_line(plan, time.monotonic() - started))
    return 0


def _closing_line(plan: list[Planned], seconds: float) -> str:
    """Return the line on time and memory; the stages' records include those finished in earlier runs."""
    recorded = sum((read_result(planned.stage.run) or {}).get("seconds", 0) for planned in plan)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    memory = f"; largest process {peak:.1f} GB" if peak else ""
    return f"{count(len(plan), 'stage')}: {recorded / 60:.1f} min computing, {seconds / 60:.1f} min in all{memory}"


def _print_plan(plan: list[Planned], doomed: list[Path], output: Path) -> None:
    stages = [planned.stage for planned in plan]
    disk = disk_bytes(stages)
    for run in doomed:
        say(f"would delete {run}")
    for number, planned in enumerate(plan, 1):
        stage = planned.stage
        state = {"done": "done, skipped", "begun": "resumes", "damaged": "finished, but files are missing", "new": ""}[
            planned.state
        ]
        costs = [state, steps_text(stage), disk_text(disk[stage.name]) if stage.name in disk else ""]
        say(f"[{number}/{len(plan)}] {stage.name}: {'; '.join(text for text in costs if text) or 'new'}")
        for note in planned.notes:
            say(f"    {note}")
        say(f"    {shlex.join(command_line(stage))}")
    say(f"{count(len(plan), 'stage')} in {output}: {total_text(disk)}; data sets not counted")


def _without_variables(argv: list[str]) -> list[str]:
    """Return the command line without --variables.NAME VALUE; these flags are known only after the file has been read."""
    words: list[str] = []
    skip = False
    for word in argv:
        if not skip and not word.startswith("--variables."):
            words.append(word)
        skip = not skip and word.startswith("--variables.") and "=" not in word
    return words


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
        raise UserError(f"{output}: is a file, not a folder; give another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{output}: in use by another pipeline; wait for it or give another --output") from None
        clear_leftovers(output.glob(".*.*"))
        yield


def _parser() -> Parser:
    parser = Parser(
        prog="ssld run",
        description="Run a pipeline of stages, resumable.",
        epilog="--variables.NAME VALUE sets a variable of the file.",
        allow_abbrev=False,
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="YAML file, or the name of a shipped pipeline: quickstart")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the run directories (default: output of the file)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print commands, steps and disk space, and run nothing")
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
