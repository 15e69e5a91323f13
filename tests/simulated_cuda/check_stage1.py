"""The commands of stage 1 on the simulated GPU: distillation live, from a store and by features, its teacher, its data, and its network's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ssld.shared.distributed.stop import StopRequest
from ssld.shared.models.model_file import read_tensors
from ssld.stage1_ssld import curate, distill, evaluate, export, prototypes, teach, write_soft_labels
from tests.simulated_cuda.device import SimulatedCuda
from tests.simulated_cuda.table import BATCHES, LOOPS

Settings = dict[str, Any]
Run = Callable[..., Path]
FEATURES = ["symmetric_kl", "pooled", "spatial"]


@pytest.fixture
def run(call: Any, arguments: Any, tmp_path: Path, gpu: SimulatedCuda) -> Run:
    """Runs an entry on the GPU; gives the run directory."""

    def start(entry: Any, settings: Settings, output: str = "run") -> Path:
        assert call(entry.main, arguments({"device": "auto"} | settings, output)) == 0
        return tmp_path / output

    return start


@pytest.fixture
def settings(distill_settings: Settings) -> Settings:
    """A small distillation on the GPU: 3 steps of 8 images, and an evaluation."""
    return distill_settings | {"device": "auto", "steps": 3, "log_every": 1, "save_every": 2}


@pytest.fixture
def store(run: Run, settings: Settings) -> Path:
    """Soft labels of two views of each image."""
    common = {key: settings[key] for key in ("data", "teacher", "threads", "workers")}
    return (
        run(write_soft_labels, common | {"views": 2, "top": 2, "batch_size": 16, "precision": "fp32"}, "stored")
        / "store"
    )


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_distillation_is_that_of_the_cpu(run: Run, settings: Settings) -> None:
    settings |= {"precision": "fp32"}  # auto is bf16 on a GPU
    on_gpu, on_cpu = run(distill, settings, "gpu"), run(distill, settings | {"device": "cpu"}, "cpu")
    assert "cuda" in (on_gpu / "log.txt").read_text()
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3)


def test_a_store_holds_what_the_cpu_writes(run: Run, settings: Settings, store: Path) -> None:
    common = {key: settings[key] for key in ("data", "teacher", "threads", "workers")} | {"device": "cpu"}
    expected = run(write_soft_labels, common | {"views": 2, "top": 2, "batch_size": 16}, "on_cpu") / "store"
    shards = [sorted(folder.glob("shard-*.bin")) for folder in (store, expected)]
    assert len(shards[0]) == len(shards[1]) > 0
    for one, other in zip(*shards, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("precision", ["fp16"])
def test_a_resumed_run_ends_as_one_without_a_break(
    run: Run, call: Any, arguments: Any, settings: Settings, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an average of the weights, feature terms, mixed images and, under fp16, the gradient scaler's state."""
    data = settings["data"] | {"image_size": 64, "mixup": 0.2, "cutmix": 0.2}
    settings |= {"data": data, "losses": FEATURES, "precision": precision, "ema": {"decay": 0.9}, "channels_last": True}
    whole = run(distill, settings, "whole")
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda _: True)
        assert call(distill.main, arguments(settings, "broken")) == 143
    one, other = (read_tensors(folder / "student.safetensors") for folder in (run(distill, settings, "broken"), whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_auto_batch_on_a_gpu(run: Run, settings: Settings) -> None:
    found = json.loads((run(distill, settings | {"auto_batch": True}) / "auto_batch.json").read_text())
    assert found == {"accumulate": 1, "processes": 1}


@pytest.mark.parametrize("kind", ["live", "store", "features", "teach"])
def test_waits_of_the_loop(
    kind: str, run: Run, settings: Settings, gpu: SimulatedCuda, request: pytest.FixtureRequest
) -> None:
    """Of one more step, as the difference between runs of two and three steps, logged at the end."""
    data = {key: value for key, value in settings["data"].items() if key != "val"}
    settings = settings | {"data": data, "log_every": 100, "save_every": 100, "channels_last": True}
    entry: Any = distill
    if kind == "store":
        settings = settings | {"store": str(request.getfixturevalue("store"))}
        del settings["teacher"]
    elif kind == "features":
        settings |= {"losses": FEATURES, "data": data | {"image_size": 64}}
    elif kind == "teach":
        entry, settings = teach, settings | {"model": settings["student"], "data": data | {"train": data["train"][:1]}}
        del settings["teacher"], settings["student"]
    counts = []
    for steps in (2, 3):
        with gpu.count() as counted:
            run(entry, settings | {"steps": steps}, f"{kind}_{steps}")
        counts.append(counted)
    more = counts[1] - counts[0]
    expected = LOOPS[f"distill.py, {kind}" if entry is distill else "teach.py"].of(settings["batch_size"])
    assert (more.waits.total(), more.uploads.total()) == expected, str(more)
    assert more.pageable.total() == 0, str(more)


@pytest.mark.parametrize(
    "entry", [write_soft_labels, evaluate, curate, prototypes], ids=lambda entry: Path(entry.__file__).name
)
def test_waits_of_a_batch(
    entry: Any, run: Run, tiny: Any, teacher_file: Path, encoder_file: Path, gpu: SimulatedCuda
) -> None:
    """Of one more batch, as the difference between 30 images in batches of 15 and of 10."""
    name, teacher = Path(entry.__file__).name, str(teacher_file)
    settings: Settings = {"threads": 1, "workers": 0}
    settings |= {
        "write_soft_labels.py": {
            "data": {"train": [str(tiny.train)], "image_size": 32},
            "teacher": teacher,
            "views": 1,
            "top": 2,
        },
        "evaluate.py": {"model": teacher, "teacher": teacher, "data": str(tiny.train), "image_size": 32},
        "curate.py": {"pool": [str(tiny.train)], "teacher": teacher, "keep": 3, "image_size": 32},
        "prototypes.py": {
            "pool": [str(tiny.train)],
            "encoder": {"model": str(encoder_file), "arch": "test_vit"},
            "image_size": 64,
            "prototypes": 3,
            "perplexity": 2.0,
        },
    }[name]
    counts = []
    for size in (15, 10):
        with gpu.count() as counted:
            run(entry, settings | {"batch_size": size}, f"of_{size}")
        counts.append(counted)
    more = counts[1] - counts[0]
    assert (more.waits.total(), more.uploads.total(), more.pageable.total()) == BATCHES[name], str(more)


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    """A ViT without classes, as a state dict."""
    torch.manual_seed(11)
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def test_curation_prototypes_evaluation_and_export(
    run: Run,
    call: Any,
    settings: Settings,
    tiny: Any,
    teacher_file: Path,
    encoder_file: Path,
    tmp_path: Path,
    gpu: SimulatedCuda,
) -> None:
    common: Settings = {"threads": 1, "workers": 0, "batch_size": 16}
    pool: Settings = common | {"pool": [str(tiny.unlabeled)], "image_size": 32, "examples": 2, "precision": "bf16"}
    curated = run(curate, pool | {"teacher": str(teacher_file), "keep": 3, "train": [str(tiny.train)]}, "curated")
    assert (curated / "selected.parquet").is_file()
    with_size = pool | {
        "image_size": 64,
        "encoder": {"model": str(encoder_file), "arch": "test_vit"},
        "prototypes": 3,
        "perplexity": 2.0,
    }
    assert any(run(prototypes, with_size, "prototypes").glob("*.safetensors"))
    measured = common | {
        "model": str(teacher_file),
        "teacher": str(teacher_file),
        "data": str(tiny.val),
        "bank": str(tiny.train),
        "image_size": 32,
    }
    metrics = json.loads((run(evaluate, measured, "evaluated") / "result.json").read_text())["metrics"]
    assert metrics["agreement"] == 1
    line = [
        "--model",
        str(teacher_file),
        "--formats",
        "torch",
        "--output",
        str(tmp_path / "exported"),
        "--threads",
        "1",
        "--workers",
        "0",
    ]
    with gpu.hidden():  # files are written and checked on the CPU
        assert call(export.main, line) == 0
