"""A curation that is interrupted, shared by two processes, or given invalid settings."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from ssld.stage1_ssld.curate import main as curate
from ssld.stage1_ssld.curation import selection_files, shard_pass, steps
from ssld.stage1_ssld.curation.shard_pass import Job, Piece, Reading, over_shards
from ssld.stage1_ssld.data.shards import RowShard


@pytest.fixture
def settings(tiny: Any, teacher_file: Path) -> dict[str, Any]:
    return small_curation(tiny, teacher_file)


def small_curation(tiny: Any, teacher_file: Path) -> dict[str, Any]:
    """Three sources make three shards; the second holds the first again, so that there are duplicates."""
    return {
        "threads": 1,
        "workers": 0,
        "device": "cpu",
        "batch_size": 4,
        "pool": [str(tiny.unlabeled), str(tiny.parquet), str(tiny.train)],
        "val": [str(tiny.val)],
        "teacher": str(teacher_file),
        "keep": 9,
        "cosine": 0.7,
        "image_size": 32,
        "examples": 2,
    }


def contents(run: Path) -> dict[str, Any]:
    """Outcome of a run, without times."""
    result = json.loads((run / "result.json").read_text())
    files = {name: digest for name, digest in result["outputs"].items() if name != "examples.png"}
    return {"metrics": result["metrics"], "files": files, "rows": pq.read_table(run / "selected.parquet").to_pylist()}


@pytest.fixture(scope="module")
def whole(tiny: Any, teacher_file: Path, call: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Contents of a run in one go that copies the chosen images."""
    folder = tmp_path_factory.mktemp("whole")
    settings = small_curation(tiny, teacher_file) | {"materialise": True, "output": str(folder / "run")}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert call(curate, ["--config", str(folder / "run.yaml")]) == 0
    return contents(folder / "run")


@pytest.mark.slow
def test_two_processes_choose_as_one_does(
    drawn_figures: None,
    arguments: Any,
    settings: dict[str, Any],
    call: Any,
    tmp_path: Path,
    scripts: Any,
    files_below: Any,
) -> None:
    """With loader workers and copies of the images too: the same files, bit for bit."""
    settings |= {"materialise": True}
    assert call(curate, arguments(settings, "one")) == 0
    process = scripts.run("stage1_ssld/curate.py", *arguments(settings | {"workers": 1}, "two"), ranks=2)
    assert process.returncode == 0, process.stderr
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert one["metrics"]["like_better"] > 0
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")
    parts = sorted(path.name for path in (tmp_path / "one" / "selected").iterdir())
    assert len(parts) > 1
    for name in parts:
        a, b = (pq.read_table(tmp_path / run / "selected" / name) for run in ("one", "two"))
        assert a.equals(b)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (selection_files, "find_candidates"),
        (selection_files, "find_close_pairs"),
        (steps, "save_unit_embeddings"),
        (steps, "cosines"),
        (selection_files, "decide"),
        (selection_files, "write_manifest"),
        (steps, "materialise"),
        (steps, "draw"),
    ],
)
def test_goes_on_where_it_was_killed(
    module: Any,
    name: str,
    arguments: Any,
    settings: dict[str, Any],
    whole: dict[str, Any],
    call: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each part fails once; what was done before is not done again, and the result is that of a run in one go."""
    settings |= {"materialise": True}

    def fails(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(SystemExit):
            call(curate, arguments(settings))
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("0*.parquet")}
    assert len(before) == 4
    assert not (run / "result.json").exists()
    assert call(curate, arguments(settings)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("0*.parquet")}
    assert contents(run) == whole


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_and_missing_files_are_made_again(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"materialise": True}
    run = tmp_path / "run"
    assert call(curate, arguments(settings)) == 0
    whole = contents(run)
    copies = {path.name: path.read_bytes() for path in (run / "selected").iterdir()}
    (run / "result.json").unlink()
    for name in ("scores/000001.parquet", "candidates.parquet", "near_duplicates.parquet", "outcome.json"):
        flip(run / name)
    flip(run / "selected" / min(copies))
    capsys.readouterr()
    assert call(curate, arguments(settings)) == 0
    output = capsys.readouterr().out
    for name in ("scores/000001.parquet", "candidates.parquet", "near_duplicates.parquet"):
        assert f"{run}/{name}: does not match its checksum; recomputing it" in output
    assert f"{run}/selected/{min(copies)}: does not match its checksums; recomputing it" in output
    assert contents(run) == whole
    assert {path.name: path.read_bytes() for path in (run / "selected").iterdir()} == copies

    (run / "classes.csv").unlink()
    assert call(curate, arguments(settings)) == 0
    assert f"{run}/classes.csv: missing although this run is finished; writing it again" in capsys.readouterr().out
    assert contents(run) == whole


def test_a_stop_while_selecting_is_not_forgotten(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    find = selection_files.find_candidates

    def signals(*given: Any, **also: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return find(*given, **also)

    with monkeypatch.context() as patch:
        patch.setattr(selection_files, "find_candidates", signals)
        assert call(curate, arguments(settings)) == 143
    assert "stopped: the selection is not finished; the same command goes on from there" in capsys.readouterr().err
    assert call(curate, arguments(settings)) == 0


def test_sigterm_leaves_whole_shards(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 143 in the middle of the second shard; the same command does the rest."""
    assert call(curate, arguments(settings, "whole")) == 0
    hashed = shard_pass.perceptual_hash
    recorded = 0

    def signals(image: torch.Tensor) -> tuple[int, int]:
        nonlocal recorded
        recorded += 1
        if recorded == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return hashed(image)

    with monkeypatch.context() as patch:
        patch.setattr(shard_pass, "perceptual_hash", signals)
        assert call(curate, arguments(settings)) == 143
    assert "1 of 3 shards of this process are done; the same command goes on from there" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "scores").glob("*.parquet")] == ["000000.parquet"]
    assert call(curate, arguments(settings)) == 0
    assert "scores: 2 of 3 shards to do" in (tmp_path / "run" / "log.txt").read_text()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert call(curate, arguments(settings)) == 0
    assert "this run is finished; nothing to do" in capsys.readouterr().out


def test_mistakes_cost_one_line(arguments: Any, settings: dict[str, Any], user_error: Any, call: Any) -> None:
    """And leave nothing behind: the corrected command writes to the same folder."""
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"keep": 75}, "keep: 75 images per class are more than the 74 of the whole pool; give a smaller keep"),
        ({"pool": ["no/such"]}, "pool.0: no/such: no such file or folder"),
        ({"pool": []}, "pool: needs at least 1"),
        ({"keep": 0}, "keep: has to be at least 1"),
        ({"cosine": 1.5}, "cosine: has to be at most 1"),
        ({"streaming": True}, "materialise: streaming: its images cannot be read one by one later; set materialise: true"),
        ({"pool": ["memory://nowhere/x"], "materialise": True}, "pool.0: memory://nowhere/x: no such file or folder"),
        ({"teacher": "gone.safetensors"}, "teacher.model: gone.safetensors: no such file"),
    ]  # fmt: skip
    for change, message in mistakes:
        assert message in user_error(curate, arguments(settings | change))
    assert call(curate, arguments(settings)) == 0


def test_a_source_given_twice_and_a_label_file(
    arguments: Any, settings: dict[str, Any], user_error: Any, tiny: Any
) -> None:
    twice = settings | {"pool": [*settings["pool"], str(tiny.train)]}
    assert user_error(curate, arguments(twice)) == f"pool: {tiny.train} is given twice; give every source once"
    labeled = settings | {"val": [{"path": str(tiny.parquet), "labels": str(tiny.parquet)}]}
    assert user_error(curate, arguments(labeled, "labels")).startswith(
        f"val.0: {tiny.parquet}: a label file is not supported for streams and pools"
    )


def test_keep_larger_than_a_pool_of_unknown_size(
    arguments: Any, settings: dict[str, Any], user_error: Any, tiny: Any, tmp_path: Path
) -> None:
    """The number of images in streamed tar files is known only after reading them."""
    import tarfile

    with tarfile.open(tmp_path / "pool.tar", "w") as archive:
        archive.add(tiny.train, "train")
    change = {"pool": [str(tmp_path / "pool.tar")], "streaming": True, "materialise": True, "keep": 31}
    assert "keep: 31 images per class are more than the 30 of the whole pool" in user_error(
        curate, arguments(settings | change)
    )


def test_a_pool_that_changed_since_the_run_began(
    arguments: Any, settings: dict[str, Any], user_error: Any, call: Any, tiny: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Patterns have no digest: the shards that were found are compared."""
    shutil.copytree(tiny.train, tmp_path / "pool")
    settings |= {"pool": [str(tmp_path / "pool" / "*" / "*.png")]}

    def fails(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(selection_files, "find_candidates", fails)
        with pytest.raises(SystemExit):
            call(curate, arguments(settings))
    next((tmp_path / "pool").rglob("*.png")).unlink()
    message = user_error(curate, arguments(settings))
    assert (
        message == f"{tmp_path / 'run'}: the files of the pool have changed since this run began; give another --output"
    )


def test_unreadable_images_are_listed_or_too_many(
    arguments: Any, settings: dict[str, Any], user_error: Any, call: Any, tiny: Any, tmp_path: Path
) -> None:
    """One is left out and reported; more than one in a hundred end the run; so does one that cannot be read a second time."""
    pool = tmp_path / "pool"
    shutil.copytree(tiny.train, pool)
    (pool / "disc" / "broken.png").write_bytes(b"no image")
    change = {"pool": [str(pool)]}
    assert call(curate, arguments(settings | change, "one")) == 0
    assert (tmp_path / "one" / "quarantine.txt").read_text() == f"{pool / 'disc' / 'broken.png'}\n"
    assert json.loads((tmp_path / "one" / "result.json").read_text())["metrics"]["unreadable"] == 1
    (pool / "ring" / "broken.png").write_bytes(b"")
    message = user_error(curate, arguments(settings | change, "two"))
    assert message.startswith("2 of 47 images cannot be read, listed in ")


def test_an_image_that_went_away_since_it_was_scored(
    arguments: Any,
    settings: dict[str, Any],
    user_error: Any,
    tmp_path: Path,
    tiny: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(tiny.train, pool)
    find = selection_files.find_close_pairs

    def breaks(*given: Any, **also: Any) -> Any:
        for file in pool.rglob("*.png"):
            file.write_bytes(b"gone")
        return find(*given, **also)

    monkeypatch.setattr(selection_files, "find_close_pairs", breaks)
    message = user_error(curate, arguments(settings | {"pool": [str(pool)], "hash_distance": 16}))
    assert message.endswith(
        "cannot be read any more, but could when this run began; put it back, or give another --output"
    )
    assert message.startswith(str(pool))


def test_a_thousand_unreadable_images_end_a_pass_early(tmp_path: Path) -> None:
    """Before the other million are read."""

    class Broken:
        def __len__(self) -> int:
            return 10**6

        def name(self, row: int) -> str:
            return str(row)

        def location(self, row: int) -> str:
            return f"row {row}"

        def encoded(self, row: int) -> bytes | None:
            return None if row % 50 else b"no image"

    reported: list[tuple[int, int]] = []
    job = Job(0, RowShard(Broken(), "broken", 0, 10**6))
    with pytest.raises(Exception, match="1024 of 1024 images cannot be read; fix or remove them \\(first: row 0\\)"):
        over_shards(
            [job],
            Reading(False),
            lambda _: None,
            lambda *_: None,
            batch_size=128,
            workers=0,
            report=lambda *numbers: reported.append(numbers),
        )
    assert reported == [(0, 128 * pieces) for pieces in range(1, 9)]


def test_a_teacher_that_answers_nan(
    arguments: Any, settings: dict[str, Any], user_error: Any, tmp_path: Path, teacher_file: Path
) -> None:
    from ssld.shared.models.model_file import read_metadata, read_tensors, save_model_file

    tensors = read_tensors(teacher_file)
    (weight,) = (name for name in tensors if name.endswith("fc.weight"))
    tensors[weight][0] = 3e38  # of one class: where every logit is infinite, the teacher is refused when it is loaded
    metadata = read_metadata(teacher_file, kind="backbone")
    save_model_file(tmp_path / "nan.safetensors", tensors, metadata)
    message = user_error(curate, arguments(settings | {"teacher": str(tmp_path / "nan.safetensors")}))
    assert message.startswith(f"teacher.model: {tmp_path / 'nan.safetensors'}: gives NaN for ")
    assert message.endswith("images; try precision: fp32")


def test_pieces_are_pinned_in_a_process_that_uses_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a `DataLoader` does it there: names and flags stay, the views are pinned; a piece without readable images has none."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: list[torch.Tensor] = []
    options: dict[str, Any] = {}

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    def loader(*_: Any, **given: Any) -> list[Any]:
        options.update(given)
        return []

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    views_BCHW = torch.zeros(2, 3, 4, 4)
    number, last, piece = pin_memory((3, True, Piece(keys=["a", "b"], pixels_BCHW=views_BCHW)))
    assert (number, last, piece.keys) == (3, True, ["a", "b"])
    pin_memory((4, True, Piece(keys=["c"])))
    assert [id(tensor) for tensor in pinned] == [id(views_BCHW)]
    monkeypatch.setattr(shard_pass, "DataLoader", loader)
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        settings: dict[str, Any] = {"batch_size": 2, "workers": 0, "report": lambda *_: None}
        over_shards([Job(0, None)], Reading(False), lambda _: None, lambda *_: None, **settings)  # type: ignore[arg-type]
        assert options["pin_memory"] is used
