"""Device and precision of a run: devices as CUDA would report them, by mocks, and what a process on the CPU leaves alone."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ssld.shared.distributed import processes, ranks
from ssld.shared.distributed.processes import best_precision, prepare_model, start_processes
from ssld.shared.errors import UserError
from ssld.shared.run_dir import RunDir
from ssld.shared.run_identity import changes_since
from ssld.stage1_ssld.config import EvaluateConfig

Settings = Callable[..., EvaluateConfig]


@pytest.fixture
def settings(tmp_path: Path, teacher_file: Path) -> Settings:
    def make(**values: Any) -> EvaluateConfig:
        return EvaluateConfig.model_validate(
            {"output": tmp_path / "run", "model": str(teacher_file), "data": {"path": str(tmp_path)}, **values}
        )

    return make


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps one state per Python process, and torch its settings for matrix products and cuDNN."""
    from accelerate.state import AcceleratorState

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], list[Any]]:
    """Lets torch report so many CUDA devices, with or without bf16; gives the list of calls of `set_device`."""

    def pretend(number: int, bf16: bool) -> list[Any]:
        chosen: list[Any] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1] if chosen else 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
        return chosen

    return pretend


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_single_gpu_has_an_index(
    settings: Settings, gpus: Callable[[int, bool], list[Any]], device: str, index: int
) -> None:
    """`torch.cuda.set_per_process_memory_fraction` refuses `cuda`, which accelerate alone gives."""
    gpus(2, True)
    accelerator, config = start_processes(settings(device=device))
    assert accelerator.device == torch.device("cuda", index)
    assert config.precision == "bf16"


@pytest.mark.parametrize(("number", "bf16", "expected"), [(1, True, "bf16"), (1, False, "fp32"), (0, True, "fp32")])
def test_auto_precision(
    settings: Settings, gpus: Callable[[int, bool], list[Any]], number: int, bf16: bool, expected: str
) -> None:
    """Older GPUs emulate bf16, slowly, and report it as supported unless emulation is excluded."""
    gpus(number, bf16)
    accelerator, config = start_processes(settings())
    assert config.precision == expected
    assert accelerator.mixed_precision == ("bf16" if expected == "bf16" else "no")
    assert config.device == "auto"


def test_a_given_precision_stays(settings: Settings, gpus: Callable[[int, bool], list[Any]]) -> None:
    gpus(1, True)
    assert start_processes(settings(precision="fp32"))[1].precision == "fp32"


def test_a_run_that_goes_on_keeps_its_precision(settings: Settings, tmp_path: Path) -> None:
    """Begun in bf16 on a GPU, continued on a CPU by `auto`: bf16; by `fp32`: another run."""
    begun = settings(precision="bf16", data={"path": str(tmp_path)})
    run = RunDir(begun, "evaluate")
    run.metric(1, loss=0.5)
    run.close()
    again = settings()
    assert changes_since(run.path, again, run.inputs) == ([], [])
    _, resolved = start_processes(again)
    assert resolved.precision == "bf16"
    assert yaml.safe_load((run.path / "config.yaml").read_text())["precision"] == "bf16"
    with pytest.raises(UserError, match='another configuration \\(precision: "bf16" -> "fp32"\\)'):
        RunDir(settings(precision="fp32"), "evaluate")


@pytest.mark.parametrize("command", ["distill", "write_soft_labels", "evaluate", "train"])
def test_runs_of_a_version_without_these_settings_go_on(
    command: str,
    distill_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their records lack `precision` and `optim.layer_decay`: unfinished and finished ones are the same run, in fp32 also on a GPU with bf16."""
    config = _config_of(command, distill_settings, tmp_path)
    run = RunDir(config.model_copy(update={"precision": "fp32"}), command)
    run.metric(1, loss=0.5)
    run.close()
    record = yaml.safe_load((run.path / "config.yaml").read_text())
    del record["precision"], record["process_timeout"]
    decay = record.get("optim", {}).pop("layer_decay", None)
    assert (decay is None) == (command in ("write_soft_labels", "evaluate", "train"))
    (run.path / "config.yaml").write_text(yaml.safe_dump(record))
    assert changes_since(run.path, config, run.inputs) == ([], [])
    monkeypatch.setattr(processes, "best_precision", lambda _: "bf16")
    _, resolved = start_processes(config)
    assert resolved.precision == "fp32"
    again = RunDir(resolved, command)
    assert again.status == "unfinished"
    again.finish({})
    (run.path / "config.yaml").write_text(yaml.safe_dump(record))
    assert RunDir(resolved, command).status == "finished"
    assert "changed since" not in capsys.readouterr().out
    other = changes_since(run.path, config.model_copy(update={"precision": "bf16"}), run.inputs)
    assert [*other[0], *other[1]] == ['precision: "fp32" -> "bf16"']
    if decay is not None:
        optim = config.optim.model_copy(update={"layer_decay": 0.75})
        other = changes_since(run.path, config.model_copy(update={"optim": optim}), run.inputs)
        assert other == ([], ["optim.layer_decay: 1.0 -> 0.75"])


def _config_of(command: str, distill_settings: dict[str, Any], tmp_path: Path) -> Any:
    from ssld.stage1_ssld.config import DistillConfig, SoftLabelsConfig
    from ssld.stage2_detect.config import TrainConfig

    given: dict[str, Any] = {"output": tmp_path / "run", "device": "cpu"}
    if command == "distill":
        return DistillConfig.model_validate(distill_settings | given)
    teacher, data = distill_settings["teacher"], distill_settings["data"]
    if command == "write_soft_labels":
        given |= {"teacher": teacher, "data": {"train": data["train"]}, "views": 1}
        return SoftLabelsConfig.model_validate(given)
    if command == "evaluate":
        return EvaluateConfig.model_validate(given | {"model": teacher["model"], "data": {"path": data["val"]}})
    (tmp_path / "boxes.json").write_text("{}")
    files = {"train_annotations": str(tmp_path / "boxes.json"), "train_images": data["val"]}
    given |= {
        "backbone": "random:test_resnet",
        "data": files,
        "steps": 1,
        "batch_size": 1,
        "optim": {"lr": 0.1, "reference_batch": 1},
    }
    return TrainConfig.model_validate(given)


def test_a_training_may_change_its_precision(distill_settings: dict[str, Any], tmp_path: Path) -> None:
    from ssld.stage1_ssld.config import DistillConfig

    make = lambda precision: DistillConfig.model_validate(  # noqa: E731
        distill_settings | {"output": tmp_path / "run", "precision": precision}
    )
    run = RunDir(make("bf16"), "distill")
    run.metric(1, loss=0.5)
    run.close()
    permitted, refused = changes_since(run.path, make("fp32"), run.inputs)
    assert (permitted, refused) == (['precision: "bf16" -> "fp32"'], [])


@pytest.mark.parametrize(
    ("device", "number", "message"),
    [
        ("cuda", 0, "device: cuda: torch finds no CUDA GPU on this machine; set device: auto or cpu"),
        ("cuda:2", 2, "device: cuda:2: this machine has 2 CUDA GPUs, counted from 0"),
        ("mps", 0, "device: mps: torch finds no Apple GPU on this machine; set device: auto or cpu"),
    ],
)
def test_devices_that_are_not_there(
    settings: Settings, gpus: Callable[[int, bool], list[Any]], device: str, number: int, message: str
) -> None:
    gpus(number, True)
    with pytest.raises(UserError) as caught:
        start_processes(settings(device=device))
    assert str(caught.value) == message


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_devices_for_one_process(
    settings: Settings, gpus: Callable[[int, bool], list[Any]], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    gpus(2, True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^device: {device}: is for one process"):
        start_processes(settings(device=device))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:0 "])
def test_words_that_are_no_device(settings: Settings, device: str) -> None:
    with pytest.raises(ValueError, match="is not a device; give auto, cpu, cuda, cuda:NUMBER or mps"):
        settings(device=device)


@pytest.mark.parametrize("minutes", [0.5, 10_081])
def test_bounds_of_the_timeout(settings: Settings, minutes: float) -> None:
    with pytest.raises(ValueError, match="process_timeout"):
        settings(process_timeout=minutes)


def test_the_timeout_reaches_the_process_group(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    state = processes.PartialState

    def remembered(**options: Any) -> Any:
        given.update(options)
        return state(**options)

    monkeypatch.setattr(processes, "PartialState", remembered)
    start_processes(settings(process_timeout=90, device="cpu"))
    assert given["timeout"].total_seconds() == 90 * 60
    assert ranks._timeout == given["timeout"]


def test_kernels_of_a_gpu(settings: Settings, gpus: Callable[[int, bool], list[Any]]) -> None:
    gpus(1, True)
    start_processes(settings(), fixed_size=True)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.benchmark


def test_the_cpu_opens_no_context(
    settings: Settings, gpus: Callable[[int, bool], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a GPU, `device: cpu` neither touches it nor changes how the CPU computes."""

    def opened(*_: Any) -> None:
        raise AssertionError("a CUDA context")

    gpus(1, True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", opened)
    monkeypatch.setattr(torch.cuda, "current_device", opened)
    before = torch.get_float32_matmul_precision()
    accelerator, config = start_processes(settings(device="cpu"))
    assert (accelerator.device.type, config.precision) == ("cpu", "fp32")
    assert torch.get_float32_matmul_precision() == before
    assert not processes.pins_memory()


def test_best_precision_of_an_apple_gpu() -> None:
    assert best_precision(torch.device("mps")) == "fp32"
    assert ranks.sum_dtype(torch.device("mps")) == torch.float32
    assert ranks.sum_dtype(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize(("kernel", "silenced"), [(1, True), (3, False)])
def test_the_warning_on_strides_is_silenced_where_it_is_spurious(
    monkeypatch: pytest.MonkeyPatch, kernel: int, silenced: bool
) -> None:
    """A 1x1 kernel is contiguous in both memory formats; a 3x3 kernel in one, and its warning would be true."""

    class Accelerator:
        def prepare_model(self, model: nn.Module) -> nn.Module:
            return model

    model = nn.Conv2d(4, 8, kernel).to(memory_format=torch.channels_last)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare_model(Accelerator(), model)
        warnings.warn("Grad strides do not match bucket view strides. This may indicate", UserWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert len(caught) == (1 if silenced else 2)
