"""Run directories: new, unfinished, finished, refused; what they record; the lock."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from ssld.shared.config.settings import CommandConfig, Config
from ssld.shared.errors import UserError
from ssld.shared.files import file_sha256, write_atomically
from ssld.shared.run_dir import RunDir, read_metrics, read_result
from ssld.shared.run_identity import changes_since


class Group(Config):
    """A group of settings."""

    weight: float | None = None
    decay: float = 0.9


class Settings(CommandConfig):
    """Settings of a test."""

    may_change: ClassVar[frozenset[str]] = frozenset({"steps"})
    may_change_before_the_end: ClassVar[frozenset[str]] = frozenset({"lr", "group.weight"})

    steps: int = 5
    rate: float = 0.1
    lr: float = 1.0
    data: Path
    resume: str = "auto"
    group: Group | None = None

    def inputs(self) -> dict[str, Path]:
        return {"data": self.data}


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"x")
    return Settings(output=tmp_path / "run", data=tmp_path / "data")


def begun(config: Settings) -> None:
    run = RunDir(config, "test")
    run.begin()
    run.metric(1, loss=1.0)
    run.close()


def changed(config: Settings, **values: object) -> Settings:
    return config.model_copy(update=values)


def test_life_of_a_run(config: Settings) -> None:
    run = RunDir(config, "test")
    assert run.status == "new"
    run.metric(1, loss=2.0)
    run.close()
    run = RunDir(config, "test")
    assert run.status == "unfinished"
    (run.path / "model").write_text("m")
    run.finish({"top1": 0.5}, [run.path / "model"])
    run.close()
    run = RunDir(config, "test")
    assert run.status == "finished"
    result = read_result(run.path)
    assert result is not None
    assert result["metrics"] == {"top1": 0.5}
    assert result["outputs"] == {"model": file_sha256(run.path / "model")}
    assert result["config"] == {"steps": 5, "rate": 0.1, "lr": 1.0, "data": str(config.data), "group": None}
    assert set(result["inputs"]) == {"data"}
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["inputs"] == result["inputs"]
    assert environment["versions"]["torch"]


def test_values_that_follow_from_others_are_told_and_kept(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(config, group=Group())
    run = RunDir(config, "test")
    run.use(config)
    source = f"no recipe file; flags only; all settings are in {run.path / 'config.yaml'}\n"
    assert capsys.readouterr().out == source
    run.use(changed(config, steps=7, group=Group(weight=0.25)))
    run.finish({})
    assert capsys.readouterr().out == f"{source}settings that follow from others: steps 7, group.weight 0.25\n"
    result = read_result(run.path)
    assert result is not None
    assert result["used"] == {"steps": 7, "group.weight": 0.25}
    assert result["config"]["steps"] == 5  # the run is that of the given settings
    assert RunDir(config, "test").status == "finished"


def test_facts_about_a_network_are_those_of_the_first_start(
    config: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(steps: int = 5, **facts: object) -> RunDir:
        run = RunDir(changed(config, steps=steps), "test")
        run.compare_network("teacher", facts, "a note")
        return run

    def record() -> dict[str, object]:
        found: dict[str, object] = json.loads((config.output / "environment.json").read_text())
        return found

    start(size=1).close()
    start(size=2).close()  # nothing was done at size 1
    run = start(size=2)
    run.metric(1, loss=1.0)
    run.close()
    with pytest.raises(
        UserError, match="run: began with another teacher: size 2, now 3; give another --output or delete it"
    ):
        start(size=3)
    start(size=2, mean=0.5).close()  # a fact that the record lacks is added
    with pytest.raises(UserError, match=r"size 2, now 1; mean 0\.5, now 0\.4"):
        start(size=1, mean=0.4)
    run = start(steps=6, size=2, mean=0.5)  # a permitted change, which has not begun
    before = record()
    run.close()
    assert before == record()
    assert before["networks"] == {"teacher": {"size": 2, "mean": 0.5}}
    assert "did not record" not in capsys.readouterr().out
    (config.output / "environment.json").write_text(json.dumps({k: v for k, v in before.items() if k != "networks"}))
    start(size=3).close()
    out = capsys.readouterr().out
    assert (
        "teacher: this run began with a version that did not record its size, assumed to be unchanged\na note\n" in out
    )
    start(size=3).close()
    assert "a note" not in capsys.readouterr().out


def test_permitted_change_reopens(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    begun(config)
    run = RunDir(config, "test")
    run.finish({})
    run.close()
    run = RunDir(changed(config, steps=9), "test")
    assert run.status == "unfinished"
    run.begin()
    assert read_result(run.path) is None
    assert "changed since the last start: steps: 5 -> 9" in capsys.readouterr().out
    assert "steps: 9" in (run.path / "config.yaml").read_text()


def test_what_may_change_until_the_end_is_recorded(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    begun(config)
    begun(changed(config, lr=0.5))
    run = RunDir(changed(config, lr=0.1), "test")
    run.finish({})
    run.close()
    assert "changed since the last start: lr: 0.5 -> 0.1" in capsys.readouterr().out
    result = read_result(run.path)
    assert result is not None
    assert result["changes"] == ["lr: 1.0 -> 0.5", "lr: 0.5 -> 0.1"]
    assert result["config"]["lr"] == 0.1
    with pytest.raises(UserError, match=r"another configuration .lr: 0.1 -> 0.2"):  # nothing would be trained with it
        RunDir(changed(config, lr=0.2), "test")


def test_a_start_that_is_refused_leaves_no_record(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    begun(config)
    run = RunDir(changed(config, steps=2, lr=0.5), "test")
    run.close()  # the rest of the command has refused these settings
    begun(changed(config, steps=9))
    assert "changed since the last start: steps: 5 -> 9\n" in capsys.readouterr().out
    RunDir(changed(config, steps=9), "test").finish({})
    assert json.loads((config.output / "result.json").read_text())["changes"] == ["steps: 5 -> 9"]
    RunDir(changed(config, steps=2), "test").close()
    assert RunDir(changed(config, steps=9), "test").status == "finished"


def test_a_default_that_was_another_one_is_named(config: Settings) -> None:
    """As of an earlier version, or left out of a command line that had it; a setting that is given needs no advice."""
    begun(changed(config, rate=0.3, group=Group(weight=1.0, decay=0.5)))
    plain = Settings(output=config.output, data=config.data, lr=0.5, group=Group(decay=0.5))
    permitted, refused = changes_since(config.output, plain, {})
    assert permitted == [
        "lr: 1.0 -> 0.5",
        "group.weight: 1.0 -> null (the default; set it to 1.0 to go on as before)",
    ]
    assert refused == ["rate: 0.3 -> 0.1 (the default; set it to 0.3 to go on as before)"]
    _, refused = changes_since(config.output, changed(plain, rate=0.1, group=None), {})
    assert refused == ["rate: 0.3 -> 0.1", 'group: {"weight": 1.0, "decay": 0.5} -> null']
    record = config.output / "config.yaml"
    record.write_text(record.read_text() + "former: 3\n")  # no advice to set what is no setting any more
    assert "former: 3 -> null" in changes_since(config.output, plain, {})[1]


def test_files_of_a_finished_run_that_are_gone_or_changed(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(config, "test", scratch=("parts", "kept.npy"))
    outputs = [run.path / name for name in ("model", "table", "deep/picture")]
    (run.path / "deep").mkdir()
    for file in outputs:
        file.write_text("made")
    run.finish({}, outputs)
    run.close()
    outputs[0].unlink()
    outputs[1].write_text("made by hand")
    capsys.readouterr()
    run = RunDir(config, "test")
    run.close()
    assert run.status == "unfinished"
    assert capsys.readouterr().out.splitlines() == [
        f"{run.path}/model: missing although this run is finished; writing it again",
        f"{run.path}/table: changed since this run finished; writing it again, the changed file is kept as table.changed",
    ]
    assert (run.path / "table.changed").read_text() == "made by hand"
    assert not (run.path / "result.json").exists()
    assert not outputs[1].exists()
    assert outputs[2].exists()


def test_scratch_goes_with_the_finish_and_after_a_kill(config: Settings) -> None:
    names = ("parts", "kept.npy")
    run = RunDir(config, "test", scratch=names)
    for kill in (False, True):
        (run.path / "parts").mkdir()
        (run.path / "parts" / "0.json").write_text("{}")
        (run.path / "kept.npy").write_text("")
        if not kill:
            run.finish({})
            run.close()
        else:  # it came between result.json and the deletion
            run = RunDir(config, "test", scratch=names)
            assert run.status == "finished"
        assert not (run.path / "parts").exists()
        assert not (run.path / "kept.npy").exists()


@pytest.mark.parametrize("left", [(".lock",), (".lock", ".config.yaml.77", "environment.json"), ("error.json",)])
def test_a_kill_in_the_first_moments_leaves_a_folder_that_can_be_used(config: Settings, left: tuple[str, ...]) -> None:
    config.output.mkdir()
    for name in left:
        (config.output / name).write_text("{}" if name.endswith("json") else "")
    run = RunDir(config, "test")
    assert run.status == "new"
    assert not list(run.path.glob(".config.yaml.*"))


def test_refusals(config: Settings, tmp_path: Path) -> None:
    begun(config)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(
        UserError, match=r"another configuration .rate: 0.1 -> 0.2.; give another --output or delete it"
    ):
        RunDir(changed(config, rate=0.2), "test")
    with pytest.raises(UserError, match="holds this run already and --resume is never"):
        RunDir(changed(config, resume="never"), "test")
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    (tmp_path / "data" / "b.jpg").write_bytes(b"y")
    with pytest.raises(UserError, match="data has other content"):
        RunDir(config, "test")
    with pytest.raises(UserError, match=r"data: .*gone: no such file or folder"):
        RunDir(changed(config, data=tmp_path / "gone", output=tmp_path / "new"), "test")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"data: .*pipe: is neither a file nor a folder"):
        RunDir(changed(config, data=tmp_path / "pipe", output=tmp_path / "new"), "test")
    assert not (tmp_path / "new" / "config.yaml").exists()


def test_an_output_that_cannot_be_made(config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "afile").write_text("")
    with pytest.raises(UserError, match=r"afile/run: cannot be made a run directory .*; give another --output"):
        RunDir(changed(config, output=tmp_path / "afile" / "run"), "test")

    def denied(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for step in ("mkdir", "open"):  # a parent, or the folder itself, of somebody else
        with monkeypatch.context() as patch:
            patch.setattr(Path, step, denied)
            with pytest.raises(UserError, match=r"run: cannot be made a run directory \(Permission denied\)"):
                RunDir(config, "test")


def test_a_start_that_failed_does_not_hold_the_folder(config: Settings) -> None:
    run = RunDir(config, "test")
    run.log("teacher and data do not fit")
    run.close()
    run = RunDir(changed(config, rate=0.2, resume="never"), "test")
    assert run.status == "new"
    assert "rate: 0.2" in (run.path / "config.yaml").read_text()


@pytest.mark.process
def test_lock_is_released_by_closing_and_by_death(config: Settings) -> None:
    run = RunDir(config, "test")
    with pytest.raises(UserError, match="in use by another process"):
        RunDir(config, "test")
    run.close()
    RunDir(config, "test").close()
    code = f"import fcntl; f = open({str(config.output / '.lock')!r}, 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="in use by another process"):
            RunDir(config, "test")
        holder.kill()
    RunDir(config, "test").close()


@pytest.mark.process
def test_a_forked_process_does_not_hold_the_lock(config: Settings) -> None:
    """A worker of a data loader lives on for seconds after its main process was killed."""
    run = RunDir(config, "test")
    (reading, writing), (hears, told) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b"x")
        os.read(reading, 1)
        os._exit(0)
    os.read(hears, 1)
    assert run._lock is not None
    run._lock.close()  # as the kernel does for a killed process; close() of the object would do the same
    try:
        RunDir(config, "test").close()
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)


def test_metrics_are_cut_and_torn_lines_left_out(config: Settings) -> None:
    run = RunDir(config, "test")
    for step in (1, 2, 3):
        run.metric(step, loss=step / 2)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(run.path)] == [1, 2, 3]
    run.cut_metrics(2)
    run.metric(3, loss=9)
    assert read_metrics(run.path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9}]


def test_an_evaluation_logged_twice_counts_once(config: Settings) -> None:
    run = RunDir(config, "test")
    for value in (0.1, 0.2):
        run.metric(5, loss=1.0, seconds=value)
        run.metric(5, val_top1=value)
    run.finish({})
    assert read_metrics(run.path) == [{"step": 5, "loss": 1.0, "seconds": 0.2}, {"step": 5, "val_top1": 0.2}]


def test_other_ranks_write_nothing(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(config, "test", main=False)
    run.log("hello")
    run.metric(1, loss=1)
    run.cut_metrics(0)
    run.quarantine(["a"])
    run.finish({})
    assert not config.output.exists()
    assert capsys.readouterr().out == ""


def test_broken_records(config: Settings) -> None:
    begun(config)
    (config.output / "config.yaml").write_text("rate: [")
    with pytest.raises(
        UserError, match=r"config.yaml or environment.json is not readable .*delete the folder"
    ) as caught:
        RunDir(config, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b""),
        ("config.yaml", b"- rate\n"),
        ("config.yaml", b"\xff\xfe"),
        ("environment.json", b"[]"),
        ("environment.json", b'{"inputs": 3}'),
        ("environment.json", b"[" * 100_000),
        ("result.json", b"{"),
        ("result.json", b"[1]"),
        ("result.json", b'{"metrics": 1}'),
        ("result.json", b"{}"),
        ("result.json", b'{"outputs": [1]}'),
    ],
)
def test_damaged_records_are_one_line(config: Settings, name: str, content: bytes) -> None:
    begun(config)
    (config.output / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.* not readable .*; delete") as caught:
        RunDir(config, "test")
    assert "\n" not in str(caught.value)


def test_damaged_lists_and_metrics(config: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(config, "test")
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{\n7\n{"step": "2"}\n{"step": 3}\n{"step": 4, "lo')
    assert read_metrics(run.path) == [{"step": 1}, {"step": 3}]
    capsys.readouterr()
    run.cut_metrics(9)
    assert "metrics.jsonl: 3 lines cannot be read and will be missing in curves" in capsys.readouterr().out
    run.quarantine(["b\udcff.jpg", "a.jpg"])  # a file name that is no UTF-8
    assert run.quarantined() == ["a.jpg", "b\udcff.jpg"]
    run.log("cannot read b\udcff.jpg")
    assert "cannot read b\\udcff.jpg" in capsys.readouterr().out
    assert "cannot read b\\udcff.jpg" in (run.path / "log.txt").read_text()


def test_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    write_atomically(tmp_path / "f", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(tmp_path / "f", b"new")
    assert caught.value.filename == str(tmp_path / "f")
    assert (tmp_path / "f").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_what_a_killed_process_was_writing_is_cleared_away(config: Settings) -> None:
    run = RunDir(config, "test")
    (run.path / "store").mkdir()
    for name in (".model.safetensors.123", "store/.shard-00001.bin.4567", ".kept", "store/a.bin"):
        (run.path / name).write_bytes(b"half")
    run.close()
    RunDir(config, "test").close()
    left = {file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()}
    assert {".kept", "store/a.bin"} <= left
    assert not {".model.safetensors.123", "store/.shard-00001.bin.4567"} & left


@pytest.mark.parametrize("name", ["../kept.txt", "/kept.txt", "a/../../kept.txt"])
def test_no_file_outside_the_folder_is_moved_aside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"metrics": {}, "outputs": {name: "0" * 64}}))
    with pytest.raises(UserError, match="not a file of this run"):
        read_result(folder)
