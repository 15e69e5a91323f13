"""Stage 1 killed at many moments: real processes, real signals, and a result equal bit for bit to that of a run left in peace."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssld.shared.models.model_file import content_hash, read_metadata, read_tensors
from ssld.shared.run_dir import read_metrics

pytestmark = pytest.mark.slow

# Forks a process for each moment in turn, all on one run directory: it kills itself there. The last one is left in peace.
KILL_CHAIN = """
import os, signal, sys
from pathlib import Path
import ssld.shared.training.checkpoint, ssld.shared.models.model_file, ssld.shared.run_dir, ssld.shared.training.training_state
from ssld.shared.training.loss_watch import LossWatch
from ssld.shared.run_dir import RunDir
import ssld.stage1_ssld.evaluation.validation
from ssld.stage1_ssld.distill import main

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def on_call(owner, name, number, before=lambda *args: None, when=lambda *args: True):
    original, calls = getattr(owner, name), []
    def wrapped(*args, **options):
        if when(*args):
            calls.append(1)
            if len(calls) == number:
                before(*args)
                kill()
        return original(*args, **options)
    setattr(owner, name, wrapped)

def half_a_file(tensors, path, *rest):
    Path(path).write_bytes(b"half")

def half_a_line(run, step, *rest):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": %d, "lo' % step)

moments = {
    "in the first steps": lambda: on_call(LossWatch, "add", 3),
    "in the first checkpoint's second file": lambda: on_call(ssld.shared.training.checkpoint, "save_tensors", 2, half_a_file),
    "before its renaming": lambda: on_call(Path, "rename", 1),
    "before its mark": lambda: on_call(Path, "touch", 1),
    "before old ones are looked for": lambda: on_call(ssld.shared.training.checkpoint, "complete_checkpoints", 2),
    "between checkpoints": lambda: on_call(LossWatch, "add", 3),
    "in a line of metrics": lambda: on_call(RunDir, "metric", 1, half_a_line),
    "while the old checkpoint is removed": lambda: on_call(
        ssld.shared.training.checkpoint.shutil, "rmtree", 1, when=lambda path, *rest: Path(path).name == "step_00000005"
    ),
    "in an evaluation": lambda: on_call(ssld.stage1_ssld.evaluation.validation, "evaluate", 1),
    "in the best model's file": lambda: on_call(
        ssld.shared.models.model_file, "save_tensors", 1, half_a_file, when=lambda tensors, path, *rest: "student_best" in path.name
    ),
    "before the checkpoint has the evaluation": lambda: on_call(ssld.shared.training.training_state, "add_evaluation", 1),
    "in the last model's file": lambda: on_call(
        ssld.shared.models.model_file, "save_tensors", 1, half_a_file, when=lambda tensors, path, *rest: "student.safe" in path.name
    ),
    "before result.json": lambda: on_call(RunDir, "finish", 1),
    "after result.json": lambda: on_call(RunDir, "log", 1, when=lambda run, *lines: "".join(lines).startswith("wrote")),
}
for moment, prepare in moments.items():
    child = os.fork()
    if child == 0:
        prepare()
        os._exit(main(sys.argv[1:]))
    status = os.waitpid(child, 0)[1]
    done = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    print("KILLED" if done else f"NOT KILLED {status}", moment, flush=True)
os._exit(main(sys.argv[1:]))
"""


@pytest.fixture
def same_run(metrics_of: Callable[[Path], list[dict[str, Any]]]) -> Callable[[Path, Path], None]:
    """Asserts that two run directories hold the same run, whatever happened on the way."""

    def compare(run: Path, other: Path) -> None:
        models = sorted(path.name for path in run.glob("*.safetensors"))
        assert models == sorted(path.name for path in other.glob("*.safetensors"))
        for name in models:
            assert content_hash(read_tensors(run / name)) == content_hash(read_tensors(other / name))
            a, b = read_metadata(run / name), read_metadata(other / name)
            assert a | {"run": None} == b | {"run": None}
        assert metrics_of(run) == metrics_of(other)
        results = [json.loads((path / "result.json").read_text())["metrics"] for path in (run, other)]
        assert results[0] == results[1]
        steps = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, other)]
        assert steps[0] == steps[1]
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]  # no temporary files left behind

    return compare


def test_killed_at_every_delicate_moment(
    arguments: Any,
    distill_settings: Any,
    call: Any,
    tmp_path: Path,
    scripts: Any,
    same_run: Callable[[Path, Path], None],
) -> None:
    from ssld.stage1_ssld.distill import main

    settings = distill_settings | {
        "steps": 17, "save_every": 5, "keep_checkpoints": 1, "evaluate_every": 6, "log_every": 3,
        "ema": {"decay": 0.9}, "student": {"model": "random:test_convnext", "drop_path": 0.2},
        "optim": {"name": "adamw", "lr": 0.001, "reference_batch": 8, "warmup_steps": 3},
    }  # fmt: skip
    assert call(main, arguments(settings, "whole")) == 0
    script = tmp_path / "kill_chain.py"
    script.write_text(KILL_CHAIN)
    process = scripts.run(str(script), *arguments(settings, "killed"))
    assert process.returncode == 0, process.stdout + process.stderr
    assert "NOT KILLED" not in process.stdout, process.stdout + process.stderr
    assert process.stdout.count("KILLED") == 14
    assert "resumed from step_00000005" in process.stdout
    assert process.stdout.count("resumed from step_00000006") >= 2  # written before the evaluation
    assert "this run is finished; nothing to do" in process.stdout
    same_run(tmp_path / "killed", tmp_path / "whole")


def wait_for(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_real_processes_killed_and_stopped_from_outside(
    arguments: Any, distill_settings: Any, tmp_path: Path, scripts: Any, same_run: Callable[[Path, Path], None]
) -> None:
    settings = distill_settings | {"steps": 90, "save_every": 4, "log_every": 5, "workers": 1}
    script = ("stage1_ssld/distill.py", *arguments(settings))
    whole = scripts.run("stage1_ssld/distill.py", *arguments(settings, "whole"))
    assert whole.returncode == 0, whole.stderr
    assert "wrote" in whole.stdout
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"

    def newest() -> int:
        return max((int(path.parent.name[5:]) for path in checkpoints.glob("step_*/COMPLETE")), default=0)

    process = scripts.start(*script)
    wait_for(process, lambda: newest() >= 8)
    process.kill()
    process.communicate()
    reached = newest()
    assert 8 <= reached < 60

    process = scripts.start(*script)
    wait_for(process, lambda: newest() >= reached + 8 and any(checkpoints.glob(".writing_*")))
    process.kill()
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert f"resumed from step_{reached:08d}" in out
    reached = newest()

    process = scripts.start(*script)
    wait_for(process, lambda: newest() >= reached + 4)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    message = re.fullmatch(
        r"stopped: checkpoint of step (\d+) written to .*; the same command goes on from there\n", err
    )
    assert message, err
    assert newest() == int(message[1])
    assert not (run / "result.json").exists()
    assert not (run / "student.safetensors").exists()
    assert max(line["step"] for line in read_metrics(run)) <= newest()

    last = scripts.run(*script)
    assert last.returncode == 0, last.stderr
    assert f"resumed from step_{int(message[1]):08d}" in last.stdout
    same_run(run, tmp_path / "whole")
