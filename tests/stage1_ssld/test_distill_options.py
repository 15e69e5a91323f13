"""Effects of distillation settings: losses by name, labels beside them, stores, mixing, frozen bodies, weights, streams, early stopping."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from ssld.shared.models.backbones import input_settings, save_backbone
from ssld.shared.models.model_file import read_metadata, read_tensors
from ssld.shared.training.training_state import TrainingState
from ssld.stage1_ssld.distill import main as distill
from ssld.stage1_ssld.evaluation import validation
from ssld.stage1_ssld.teach import main as teach
from ssld.stage1_ssld.write_soft_labels import main as write_soft_labels

Settings = dict[str, Any]
Arguments = Callable[..., list[str]]
Call = Callable[..., int]


def with_data(settings: Settings, **data: Any) -> Settings:
    return settings | {"data": settings["data"] | data}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "student.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    return all(torch.allclose(tensor, other[name], rtol=tolerance, atol=tolerance) for name, tensor in one.items())


# ---- losses


def test_terms_by_name_and_weight_are_logged_and_add_up(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    losses = ["symmetric_kl", {"name": "kl", "weight": 0.5, "temperature": 4}]
    settings = distill_settings | {"losses": losses, "hard_label_weight": 0.25, "log_every": 1}
    assert call(distill, arguments(settings)) == 0
    for line in metrics_of(tmp_path / "run"):
        if "loss" in line:
            total = line["symmetric_kl"] + 0.5 * line["kl"] + 0.25 * line["cross_entropy"]
            assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_a_single_term_is_the_loss(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, metrics_of: Any
) -> None:
    """KL and cross-entropy with soft labels differ by a constant: the same weights come out."""
    for name in ("kl", "soft_cross_entropy"):
        assert call(distill, arguments(distill_settings | {"losses": [name]}, name)) == 0
        assert not set(metrics_of(tmp_path / name)[0]) & {"kl", "soft_cross_entropy"}
    assert close(weights(tmp_path / "kl"), weights(tmp_path / "soft_cross_entropy"), 1e-5)


def test_a_hard_label_term_needs_labels(
    arguments: Arguments, distill_settings: Settings, tiny: Any, user_error: Any
) -> None:
    settings = with_data(distill_settings, train=[str(tiny.unlabeled)]) | {"hard_label_weight": 0.1}
    assert user_error(distill, arguments(settings)) == "hard_label_weight: no training source has labels; leave it at 0"


def test_mixing_reaches_student_and_teacher_alike(
    arguments: Arguments, distill_settings: Settings, call: Call, teacher_file: Path
) -> None:
    from ssld.shared.models.backbones import Classifier

    recorded: list[torch.Tensor] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: recorded.append(inputs[0]) if isinstance(module, Classifier) else None
    )
    teacher = {"model": str(teacher_file), "check_images": 0}
    settings = with_data(distill_settings, mixup=1.0, val=None) | {"steps": 2, "teacher": teacher}
    try:
        assert call(distill, arguments(settings)) == 0
    finally:
        handle.remove()
    assert len(recorded[0]) == 2  # drawn images, on which the teacher shows that it sees something
    recorded = recorded[1:]
    assert len(recorded) == 5  # the student's last pass looks at the last update
    for student, taught in (recorded[:2], recorded[2:4]):
        assert torch.equal(student, taught)
        assert (student % 1 != 0).any()  # between the grey values of two images


# ---- a store


@pytest.fixture
def stored(arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path) -> Path:
    """A store of all three classes in fp32, with two views per image."""
    settings = {key: distill_settings[key] for key in ("threads", "workers", "device", "teacher")}
    data = {key: value for key, value in distill_settings["data"].items() if key != "val"}
    settings |= {"data": data, "views": 2, "top": 3, "store_precision": "fp32"}
    assert call(write_soft_labels, arguments(settings, "soft")) == 0
    return tmp_path / "soft" / "store"


def test_a_store_of_all_classes_is_the_live_teacher(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, stored: Path
) -> None:
    """In the first two passes the store's views are the live ones; from the third on it folds back to view 0."""
    assert call(distill, arguments(distill_settings, "live")) == 0
    settings = {key: value for key, value in distill_settings.items() if key != "teacher"} | {"store": str(stored)}
    assert call(distill, arguments(settings, "stored")) == 0
    assert close(weights(tmp_path / "live"), weights(tmp_path / "stored"), 1e-4)
    live, kept = (read_metadata(tmp_path / name / "student.safetensors") for name in ("live", "stored"))
    assert live["teacher"] == kept["teacher"]
    assert live["class_names"] == kept["class_names"]
    result = json.loads((tmp_path / "stored" / "result.json").read_text())
    assert "top1" in result["metrics"]
    assert "agreement" not in result["metrics"]  # there is no live teacher


def test_a_teacher_beside_a_store_measures_agreement(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, stored: Path
) -> None:
    assert call(distill, arguments(distill_settings | {"store": str(stored)})) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert {"top1", "agreement", "kl"} <= set(metrics)
    assert "(for evaluation only)" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"mixup": 0.5}}, "its soft labels belong to unmixed views; set data.mixup and data.cutmix to 0"),
        ({"data": {"streaming": True}}, "streams have no rows to look up; set data.streaming: false"),
        ({"teacher": {"batchnorm": "batch"}}, "was written with running statistics; set teacher.batchnorm: eval"),
        ({"losses": ["dist"]}, "dist needs every logit; use one of symmetric_kl"),
        ({"losses": [{"name": "kl", "temperature": 2}]}, "kl at a temperature needs every logit"),
    ],
)
def test_what_a_store_cannot_do(
    arguments: Arguments, distill_settings: Settings, user_error: Any, change: Settings, message: str
) -> None:
    settings = distill_settings | {"store": "somewhere"}
    for key, value in change.items():
        settings = settings | {key: settings[key] | value if isinstance(value, dict) else value}
    assert message in user_error(distill, arguments(settings))


# ---- phases


def test_the_fix_phase_moves_the_classifier_alone(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path
) -> None:
    """Phase 1, then a phase of the classifier at a higher resolution with the evaluation view; BatchNorm keeps its statistics."""
    first = distill_settings | {"student": {"model": "random:test_resnet"}}
    assert call(distill, arguments(first, "first")) == 0
    start = tmp_path / "first" / "student.safetensors"
    settings = with_data(distill_settings, image_size=48, train_view="center") | {
        "student": {"model": str(start)},
        "trainable": "classifier",
    }
    assert call(distill, arguments(settings, "fix")) == 0
    before, after = load_file(start), weights(tmp_path / "fix")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"fc.weight", "fc.bias"}
    metadata = read_metadata(tmp_path / "fix" / "student.safetensors")
    assert metadata["input_size"] == [48, 48]
    assert metadata["start"] == str(start)


def test_patience_ends_a_run_early_and_for_good(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, capsys: Any
) -> None:
    """A rate of nearly nothing: no evaluation is better than the first."""
    optim = distill_settings["optim"] | {"lr": 1e-12}
    settings = distill_settings | {"steps": 40, "evaluate_every": 2, "patience": 2, "optim": optim}
    assert call(distill, arguments(settings)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["steps"] == 6  # better than nothing at 2, then twice not better
    assert "without a better one (patience)" in (tmp_path / "run" / "log.txt").read_text()
    (tmp_path / "run" / "result.json").unlink()  # as if killed before the end: the resumed run does not train on
    assert call(distill, arguments(settings)) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["steps"] == 6


def test_patience_ends_a_run_by_a_repeated_evaluation_after_the_same_check(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third evaluation dies; the next start repeats it, and then checks the loss after the last update, as the first would have."""
    optim = distill_settings["optim"] | {"lr": 1e-12}
    settings = distill_settings | {"steps": 40, "evaluate_every": 2, "patience": 2, "optim": optim}
    measure, calls = validation.evaluate, [0]

    def dying(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError
        return measure(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", dying)
        assert call(distill, arguments(settings)) == 2
    checked = {}
    monkeypatch.setattr(
        TrainingState, "check_last_update", lambda _, step, losses: checked.update({step: losses()["loss"].item()})
    )
    assert call(distill, arguments(settings)) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["steps"] == 6
    assert list(checked) == [6]
    assert checked[6] > 0


def test_the_last_update_is_checked_before_the_last_evaluation(
    arguments: Arguments, distill_settings: Settings, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start only repeats an evaluation that dies, so the check cannot wait for it."""
    done: list[str] = []

    def dying(*_: Any, **__: Any) -> Any:
        done.append("evaluation")
        raise MemoryError

    def check(*_: Any) -> None:
        done.append("check")

    monkeypatch.setattr(validation, "evaluate", dying)
    monkeypatch.setattr(TrainingState, "check_last_update", check)
    assert call(distill, arguments(distill_settings | {"steps": 2, "evaluate_every": 2})) == 2
    assert done == ["check", "evaluation"]


def test_best_by_something_that_is_not_measured(
    arguments: Arguments, distill_settings: Settings, tiny: Any, user_error: Any
) -> None:
    settings = with_data(distill_settings, val=str(tiny.unlabeled)) | {"evaluate_every": 2, "best_by": "top1"}
    assert user_error(distill, arguments(settings)).startswith("best_by: top1 is not measured (measured: images, ")


def test_patience_without_evaluations(arguments: Arguments, distill_settings: Settings, user_error: Any) -> None:
    message = user_error(distill, arguments(distill_settings | {"patience": 2}))
    assert "patience counts evaluations: give evaluate_every and data.val too" in message


# ---- teachers


def test_a_teacher_with_batch_statistics_is_another_teacher_and_stays_itself(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path
) -> None:
    for mode in ("eval", "batch"):
        settings = distill_settings | {"teacher": distill_settings["teacher"] | {"batchnorm": mode}}
        assert call(distill, arguments(settings, mode)) == 0
    assert not equal(weights(tmp_path / "eval"), weights(tmp_path / "batch"))
    results = [json.loads((tmp_path / mode / "result.json").read_text())["metrics"] for mode in ("eval", "batch")]
    assert results[0]["teacher_top1"] == results[1]["teacher_top1"]  # evaluated with running statistics in both


def test_an_ensemble_of_one_teacher_twice_is_that_teacher(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path
) -> None:
    teacher = distill_settings["teacher"]
    assert call(distill, arguments(distill_settings, "one")) == 0
    assert (
        call(distill, arguments(distill_settings | {"teacher": teacher | {"ensemble": [teacher["model"]]}}, "two")) == 0
    )
    assert close(weights(tmp_path / "one"), weights(tmp_path / "two"), 1e-4)


# ---- weights and streams


def test_streams_and_weights_train_and_resume_to_the_same_bits(
    arguments: Arguments, distill_settings: Settings, call: Call, tmp_path: Path, tiny: Any, monkeypatch: Any
) -> None:
    from ssld.shared.errors import Stopped
    from ssld.shared.training.training_state import TrainingState

    sources = [{"path": str(tiny.parquet), "weight": 3}, {"path": str(tiny.unlabeled), "weight": 1}]
    for streaming in (False, True):
        settings = with_data(distill_settings, train=sources, streaming=streaming)
        assert call(distill, arguments(settings, f"whole{streaming}")) == 0
        saved = TrainingState.save

        def stop_after(self: Any, step: int, saved: Any = saved) -> None:
            saved(self, step)
            if step == 4:
                raise Stopped("for the test")

        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "save", stop_after)
            assert call(distill, arguments(settings, f"parts{streaming}")) == 143
        assert call(distill, arguments(settings, f"parts{streaming}")) == 0
        assert equal(weights(tmp_path / f"whole{streaming}"), weights(tmp_path / f"parts{streaming}"))


def test_labels_of_streams(arguments: Arguments, distill_settings: Settings, user_error: Any) -> None:
    settings = with_data(distill_settings, streaming=True)
    message = user_error(distill, arguments(settings | {"objective": "labels"}))
    assert "labels are not read from streams" in message
    taught = {key: value for key, value in settings.items() if key not in ("student", "teacher")}
    message = user_error(teach, arguments(taught | {"model": "random:test_resnet"}))
    assert "labels are not read from streams" in message


# ---- speed


@pytest.mark.parametrize("source", ["teacher", "store", "mixed", "features"])
def test_no_step_waits_for_the_device(
    arguments: Arguments,
    distill_settings: Settings,
    call: Call,
    stored: Path,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reads of tensors on the host are as many in 4 steps as in 12 if nothing is logged, saved or evaluated between."""
    counts = []
    for steps in (4, 12):
        reads = 0

        def counting(method: Any) -> Any:
            def counted(self: torch.Tensor, *args: Any, **options: Any) -> Any:
                nonlocal reads
                reads += 1
                return method(self, *args, **options)

            return counted

        settings = with_data(distill_settings, val=None, mixup=0.5 if source == "mixed" else 0.0)
        settings |= {"workers": 1}  # views are drawn in another process
        settings |= {
            "steps": steps,
            "log_every": 100,
            "save_every": 100,
            "store": str(stored) if source == "store" else None,
        }
        if source == "features":
            settings |= {"losses": ["symmetric_kl", "pooled", "spatial"]}
        with monkeypatch.context() as patch:
            for name in ("item", "cpu", "tolist", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
            assert call(distill, arguments(settings, f"{source}{steps}")) == 0
        counts.append(reads)
    assert counts[0] == counts[1] > 0


def test_compile_means_student_and_teacher(
    arguments: Arguments, distill_settings: Settings, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Traced, but run by torch itself: a C++ compiler need not be here."""
    traced: list[Any] = []
    compile_ = torch.compile

    def eager(graph: Any, _: Any) -> Any:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=eager))
    assert call(distill, arguments(distill_settings | {"compile": True, "steps": 2}, "compiled")) == 0
    assert len(traced) >= 2
    assert call(distill, arguments(distill_settings | {"steps": 2}, "plain")) == 0
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for name in ("plain", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("student", "warned"), [({"batchnorm": "batch"}, True), ({}, False), ({"model": "random:test_resnet"}, False)]
)
def test_batch_statistics_are_suspected_where_loaded_weights_start_without_agreement(
    student: dict[str, str],
    warned: bool,
    tiny: Any,
    arguments: Arguments,
    distill_settings: Settings,
    call: Call,
    tmp_path: Path,
) -> None:
    """Teacher and student have 64 classes and unrelated weights, so that they agree on one image in 64, by chance."""
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net: Any = timm.create_model("test_resnet", num_classes=64)
        files.append(tmp_path / f"{seed}.safetensors")
        save_backbone(files[-1], net, arch="test_resnet", inputs=input_settings(net, {}), classes=64)
    settings = distill_settings | {
        "data": {"train": [str(tiny.unlabeled)], "image_size": 32},
        "teacher": {"model": str(files[0])},
        "student": {"model": str(files[1])} | student,
    }
    assert call(distill, arguments(settings)) == 0
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("student.batchnorm: eval keeps the running statistics") == warned
