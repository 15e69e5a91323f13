"""Writing a store: what it leaves, how it goes on after an interruption, on two ranks, and every mistake it refuses."""

import json
import os
import re
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import ssld.stage1_ssld.distillation.soft_label_writer as store_writer
from ssld.shared.models.backbones import input_settings, save_backbone
from ssld.shared.run_dir import SPEED, read_metrics
from ssld.stage1_ssld.data.soft_labels import record_layout
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.distillation import teacher as teacher_module
from ssld.stage1_ssld.write_soft_labels import main


@pytest.fixture
def settings(tiny: Any, teacher_file: Path) -> dict[str, Any]:
    """30 + 14 images, 2 views, every class kept, in files of 16 images."""
    return {
        "data": {"train": [str(tiny.train), str(tiny.unlabeled)], "image_size": 32},
        "teacher": {"model": str(teacher_file)},
        **{"views": 2, "top": 3, "shard_images": 16, "batch_size": 10},
        **{"threads": 1, "workers": 0, "device": "cpu"},
    }


def contents(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir() if file.suffix != ".sha256"}


def untrained(path: Path, change: Callable[[Any], None]) -> str:
    """A teacher of three classes with other weights."""
    torch.manual_seed(3)
    net: Any = timm.create_model("test_resnet", num_classes=3)
    with torch.no_grad():
        change(net)
    names = ["disc", "ring", "stripes"]
    save_backbone(path, net, arch="test_resnet", inputs=input_settings(net, {}), classes=3, class_names=names)
    return str(path)


# ---- what it leaves


def test_a_store_and_what_it_says(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, arguments(settings)) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    # 4 bytes for the rest, 3 x 2 for the classes, 3 x 2 for their log-probabilities
    assert f"44 images x 2 views x 16 bytes = 1.4 kB in {run / 'store'}" in out
    assert out.index("44 images") < out.index(" % on 30 images of ") < out.index("3 of 3 files")
    sizes = {name: len(content) for name, content in contents(run / "store").items() if name != "store.json"}
    assert sizes == {"shard-00000.bin": 512, "shard-00001.bin": 512, "shard-00002.bin": 12 * 2 * 16}
    records = np.concatenate([np.fromfile(file, record_layout(3, 3, "fp16")) for file in (run / "store").glob("*.bin")])
    probs = np.exp(records["log_probs"].astype(np.float64))
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert metrics == {
        "images": 44,
        "unreadable": 0,
        "views": 2,
        "bytes": 44 * 2 * 16,
        "entropy": pytest.approx(-(probs * np.log(probs)).sum() / 88, rel=1e-6),
        "first_probability": pytest.approx(probs.max(-1).mean(), rel=1e-6),
        "kept_probability": pytest.approx(1, abs=2e-3),
    }
    assert f"{100 * metrics['first_probability']:.1f} % of the probability in the most likely class" in out
    assert f"entropy {metrics['entropy']:.3f} nats on average\n" in out
    assert call(main, arguments(settings)) == 0
    assert capsys.readouterr().out == f"{run}: this run is finished; nothing to do\n"


def test_soft_labels_do_not_depend_on_files_batches_and_processes(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path
) -> None:
    """Another shape of a batch may change the last bits."""
    other = settings | {"shard_images": 7, "batch_size": 3, "workers": 1, "store_precision": "fp32"}
    assert call(main, arguments(settings | {"store_precision": "fp32"}, "one")) == 0
    assert call(main, arguments(other, "two")) == 0
    layout = record_layout(3, 3, "fp32")
    one, two = (
        np.concatenate([np.fromfile(file, layout) for file in sorted((tmp_path / name / "store").glob("*.bin"))])
        for name in ("one", "two")
    )
    np.testing.assert_array_equal(one["classes"], two["classes"])
    np.testing.assert_allclose(one["log_probs"], two["log_probs"], rtol=1e-4, atol=1e-5)


def test_the_entropy_is_a_lower_bound_where_classes_are_left_out(
    arguments: Any, settings: dict[str, Any], call: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, arguments(settings | {"top": 2})) == 0
    said = capsys.readouterr().out
    assert re.search(r", entropy at least \d\.\d+ nats on average \(the other classes count as one\)\n", said)


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, scripts: Any
) -> None:
    assert call(main, arguments(settings, "one")) == 0
    process = scripts.run("stage1_ssld/write_soft_labels.py", *arguments(settings, "two"), ranks=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("3 of 3 files") == 1  # one rank speaks
    assert contents(tmp_path / "one" / "store") == contents(tmp_path / "two" / "store")
    one, two = (json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("one", "two"))
    assert one == two


def test_a_student_learns_from_it_as_from_the_live_teacher(
    arguments: Any, settings: dict[str, Any], distill_settings: dict[str, Any], call: Any, tmp_path: Path
) -> None:
    """Every class kept in float32, as many views as passes, the same seed: the same losses and metrics, live or stored."""
    assert call(main, arguments(settings | {"store_precision": "fp32"}, "labels")) == 0
    steps = distill_settings | {"steps": 11, "log_every": 1, "optim": {"lr": 0.05, "reference_batch": 8}}
    assert call(distill, arguments(steps, "live")) == 0
    assert call(distill, arguments(steps | {"store": str(tmp_path / "labels" / "store")}, "stored")) == 0
    live, stored = read_metrics(tmp_path / "live"), read_metrics(tmp_path / "stored")
    assert len(live) == len(stored) > 11
    for a, b in zip(live, stored, strict=True):
        a, b = ({key: line[key] for key in line if key not in SPEED} for line in (a, b))
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


# ---- interruptions


def test_it_goes_on_with_the_files_that_are_missing(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second file, with a torn one left over, and the first one cut short afterwards."""
    assert call(main, arguments(settings, "whole")) == 0
    write, store = store_writer._write_shard, tmp_path / "run" / "store"

    def dies(file: Path, records: np.ndarray) -> None:
        if file.name == "shard-00001.bin":
            (store / ".shard-00001.bin.123").write_bytes(b"half")
            raise SystemExit
        write(file, records)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "_write_shard", dies)
        with pytest.raises(SystemExit):
            call(main, arguments(settings))
    assert sorted(contents(store)) == [".shard-00001.bin.123", "shard-00000.bin"]
    checked_files: list[str] = []

    def noted(file: Path, records: np.ndarray) -> None:
        checked_files.append(file.name)
        write(file, records)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "_write_shard", noted)
        patch.setattr(store_writer, "try_teacher", lambda *_, **__: pytest.fail("it was tried before"))
        assert call(main, arguments(settings)) == 0
    assert checked_files == ["shard-00001.bin", "shard-00002.bin"]
    assert contents(store) == contents(tmp_path / "whole" / "store")

    (tmp_path / "run" / "result.json").unlink()
    (store / "shard-00000.bin").write_bytes(b"short")
    assert call(main, arguments(settings)) == 0
    assert contents(store) == contents(tmp_path / "whole" / "store")


@pytest.mark.parametrize("finished", [False, True])
def test_a_file_that_was_damaged_is_made_again(
    arguments: Any,
    settings: dict[str, Any],
    call: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    finished: bool,
) -> None:
    """One bit, in a file of the right size: it would be read as a soft label, and its checksum taken for the right one."""
    assert call(main, arguments(settings)) == 0
    store = tmp_path / "run" / "store"
    whole = contents(store)
    file = store / "shard-00001.bin"
    damaged = bytearray(file.read_bytes())
    damaged[8] ^= 1
    file.write_bytes(damaged)
    if not finished:
        (tmp_path / "run" / "result.json").unlink()
        (store / "store.json").unlink()
    assert call(main, arguments(settings)) == 0
    assert f"{file}: does not match its checksum; recomputing it" in capsys.readouterr().out
    assert contents(store) == whole
    assert call(main, arguments(settings)) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_it_stops_on_request_and_goes_on(
    arguments: Any,
    settings: dict[str, Any],
    call: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM in the second file: that one is given up at once."""
    encode, calls = store_writer.encode, []

    def asked_to_stop(*what: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 6:  # 4 forward passes a file
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*what)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "encode", asked_to_stop)
        assert call(main, arguments(settings)) == 143
    assert len(calls) == 6
    store = tmp_path / "run" / "store"
    assert f"stopped: the finished files are kept in {store}; the same command goes on" in capsys.readouterr().err
    assert list(contents(store)) == ["shard-00000.bin"]
    assert not (tmp_path / "run" / "result.json").exists()
    assert call(main, arguments(settings)) == 0
    assert call(main, arguments(settings, "whole")) == 0
    assert contents(store) == contents(tmp_path / "whole" / "store")


# ---- images that cannot be read


def test_one_loader_reads_all_shards(
    arguments: Any, settings: dict[str, Any], call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes start once, and none of its batches reaches over the end of a shard."""
    make, result = store_writer.make_loader, []

    def noted(dataset: Any, batches: Any, **options: Any) -> Any:
        result.append([len(batch) for batch in batches])
        return make(dataset, batches, **options)

    monkeypatch.setattr(store_writer, "make_loader", noted)
    assert call(main, arguments(settings | {"teacher": settings["teacher"] | {"check_images": 0}})) == 0
    assert result == [[10, 10, 10, 2] * 2 + [10, 10, 4]]  # 44 images in shards of 16, two views each
    assert "teacher: not checked, teacher.check_images is 0" in (tmp_path / "run" / "log.txt").read_text()


def test_unreadable_images_are_counted_listed_and_decoded_once(
    arguments: Any,
    settings: dict[str, Any],
    call: Any,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(tiny.train, folder)
    broken = folder / "disc" / "disc_004.png"
    broken.write_bytes(b"no image")
    read, rows = store_writer.ImageSource.open, []

    def noted(source: Any, row: int, *decoder: str) -> Any:
        rows.append(row)
        return read(source, row, *decoder)

    settings["data"]["train"] = [str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(store_writer.ImageSource, "open", noted)
        assert (
            call(main, arguments(settings | {"batch_size": 60, "teacher": settings["teacher"] | {"check_images": 0}}))
            == 0
        )
    replayed = 8  # when the header was written
    assert len(rows) == 30 + replayed
    run = tmp_path / "run"
    assert (run / "quarantine.txt").read_text() == f"{broken}\n"
    assert json.loads((run / "result.json").read_text())["metrics"]["unreadable"] == 1
    records = np.fromfile(run / "store" / "shard-00000.bin", record_layout(3, 3, "fp16")).reshape(16, 2)
    assert np.flatnonzero(np.isnan(records["rest"]).all(1)).tolist() == [4]
    assert np.isnan(records["rest"]).sum() == 2

    (run / "result.json").unlink()
    (run / "quarantine.txt").unlink()
    assert (
        call(main, arguments(settings | {"batch_size": 60, "teacher": settings["teacher"] | {"check_images": 0}})) == 0
    )
    assert (run / "quarantine.txt").read_text() == f"{broken}\n"  # from the files that were there


def test_too_many_unreadable_images(
    arguments: Any, settings: dict[str, Any], user_error: Any, tiny: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(tiny.train, folder)
    for number in range(2):
        (folder / "disc" / f"disc_00{number}.png").write_bytes(b"no image")
    settings["data"]["train"] = [str(folder)]
    assert user_error(main, arguments(settings)) == (
        f"2 of 30 images cannot be read, listed in {tmp_path / 'run' / 'quarantine.txt'}; "
        f"fix or remove them (first: {folder / 'disc' / 'disc_000.png'}: not an image, or of an unknown format)"
    )
    assert not (tmp_path / "run" / "store" / "store.json").exists()


# ---- mistakes


def test_a_disk_too_small(
    arguments: Any, settings: dict[str, Any], user_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written before needs no room again."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda _: usage(44 * 32 - 1))
    assert user_error(main, arguments(settings)) == (
        f"{tmp_path / 'run' / 'store'}: the store takes 1.4 kB, but 1.4 kB are free; set fewer views, a smaller top, or another --output"
    )
    assert not (tmp_path / "run" / "store").exists()
    store_writer._check_disk(tmp_path, 44 * 32 - 1)
    (tmp_path / "shard-00000.bin").write_bytes(b"x")
    store_writer._check_disk(tmp_path, 44 * 32)


def test_more_classes_than_there_are(arguments: Any, settings: dict[str, Any], user_error: Any) -> None:
    assert user_error(main, arguments(settings | {"top": 4})) == (
        "top: 4 is more than the 3 classes of the teacher; set top: 3 to store all"
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"teacher": {"model": "x.safetensors", "batchnorm": "batch"}},
            "teacher.batchnorm: batch depends on the other images of a batch and cannot be stored; set eval, or use a live teacher",
        ),
        (
            {"data": {"train": ["x"], "mixup": 0.2}},
            "data.mixup, data.cutmix: soft labels of mixed images cannot be stored; set them to 0, or use a live teacher",
        ),
        (
            {"data": {"train": ["x"], "streaming": True}},
            "data.streaming: a store needs sources with rows; set it to false",
        ),
    ],
)
def test_what_cannot_be_stored(
    arguments: Any, settings: dict[str, Any], user_error: Any, change: dict[str, Any], line: str
) -> None:
    assert user_error(main, arguments(settings | change)).endswith(f": {line}")


def test_a_teacher_that_knows_nothing_is_refused_and_may_be_changed(
    arguments: Any,
    settings: dict[str, Any],
    user_error: Any,
    call: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A constant prediction is right for a third of the images. The same folder accepts the right teacher afterwards."""
    monkeypatch.setattr(teacher_module, "ENOUGH", 30)
    settings["teacher"] = {"model": untrained(tmp_path / "bad.safetensors", lambda net: net.fc.bias[0].fill_(50))}
    line = user_error(main, arguments(settings))
    assert line.startswith(f"{tmp_path / 'bad.safetensors'}: accuracy 33.3 % on 30 images of ")
    assert "no better than guessing" in line
    settings["teacher"]["check_images"] = 0
    assert call(main, arguments(settings)) == 0


def test_a_teacher_whose_logits_are_not_finite(
    arguments: Any, settings: dict[str, Any], user_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all images, which is seen at once, or of some."""
    model = untrained(tmp_path / "bad.safetensors", lambda net: net.fc.weight.fill_(3e38))
    words = arguments(settings | {"teacher": {"model": model, "check_images": 0}})
    assert user_error(main, words).startswith(f"{model}: its outputs are NaN or infinite for every image")
    monkeypatch.setattr("ssld.shared.models.teacher.refuse_constant", lambda *_: None)
    assert user_error(main, words).startswith("teacher: its logits are not finite")
