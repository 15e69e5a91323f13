"""Checkpoints: only complete ones count, the newest N stay, and what is read is bit for bit what was written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ssld.shared.errors import UserError
from ssld.shared.training.checkpoint import (
    drop_from,
    keep_newest,
    load_checkpoint,
    load_module,
    load_optimizer,
    optimizer_part,
    save_checkpoint,
)
from ssld.shared.training.checkpoint_folders import complete_checkpoints, newest_checkpoint
from ssld.shared.training.optim import OptimizerName, make_optimizer, parameter_groups, set_lr


def test_files_and_newest_n(tmp_path: Path) -> None:
    for step in (5, 10, 100, 15):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.full((2,), float(step))}}, {"best": 0.5})
    keep_newest(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000015", "step_00000100"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000100"
    files = {path.name for path in (tmp_path / "step_00000100").iterdir()}
    assert files == {"model.safetensors", "state.json", "SHA256SUMS", "COMPLETE"}  # nothing pickled
    parts, state = load_checkpoint(tmp_path / "step_00000100")
    assert parts["model"]["w"].tolist() == [100, 100]
    assert state == {"step": 100, "best": 0.5}
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000015", "step_00000100"}


def test_incomplete_ones_are_ignored_and_swept_away(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "not yet") is None
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.zeros(1)}}, {})
    (tmp_path / "step_00000009").mkdir()  # killed between renaming and mark
    (tmp_path / "step_00000009" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".writing_00000007").mkdir()  # killed while writing
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000005"
    save_checkpoint(tmp_path, 9, {"model": {"w": torch.ones(1)}}, {})
    keep_newest(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000005", "step_00000009"}
    assert load_checkpoint(tmp_path / "step_00000009")[0]["model"]["w"].item() == 1


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
def test_optimizer_round_trip_is_bit_exact(tmp_path: Path, name: str) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3))
        groups = parameter_groups(net, weight_decay=0.05, decay_norm_and_bias=False)
        return net, make_optimizer(name, groups, momentum=0.9)  # type: ignore[arg-type]

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        set_lr(optimizer, 0.01 / number)
        net(torch.randn(5, 7, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    net, optimizer = fresh()
    for number in range(1, 4):
        step(net, optimizer, number)
    tensors, values = optimizer_part(optimizer)
    path = save_checkpoint(tmp_path, 3, {"model": net.state_dict(), "optimizer": tensors}, {"optimizer": values})
    state = json.loads((path / "state.json").read_text())
    again, restored = fresh()
    parts, _ = load_checkpoint(path)
    load_module(again, parts["model"], path)
    load_optimizer(restored, parts["optimizer"], state["optimizer"])
    for number in range(4, 8):
        step(net, optimizer, number)
        step(again, restored, number)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    # and the state matters: without it the weights differ
    bare, empty = fresh()
    load_module(bare, parts["model"], path)
    for number in range(4, 8):
        step(bare, empty, number)
    assert not all(torch.equal(a, b) for a, b in zip(net.parameters(), bare.parameters(), strict=True))


def test_unreadable_and_unfitting(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": nn.Linear(2, 3).state_dict()}, {})
    with pytest.raises(UserError, match=r"does not fit this model: .*") as caught:
        load_module(nn.Linear(2, 4), load_checkpoint(path)[0]["model"], path)
    assert "\n" not in str(caught.value)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda file: file.write_bytes(b"")])
def test_damage(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": nn.Linear(2, 3).state_dict()}, {"best": 0.5})
    damage(path / name)
    with pytest.raises(UserError, match=r"checkpoint is damaged: .*; delete this folder to resume") as caught:
        load_checkpoint(path)
    assert name in str(caught.value) or name == "SHA256SUMS"


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_what_is_no_damage_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": nn.Linear(2, 3).state_dict()}, {})

    def fail(file: Path) -> None:
        raise error("can't allocate memory")

    monkeypatch.setattr("ssld.shared.training.checkpoint.load_file", fail)
    with pytest.raises(error):
        load_checkpoint(path)


def test_those_from_a_step_on_are_dropped(tmp_path: Path) -> None:
    for step in (5, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(1)}}, {})
    assert newest_checkpoint(tmp_path) == tmp_path / "step_100000000"
    drop_from(tmp_path, 99_999_999)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_state_gets_the_memory_format_of_its_parameters(tmp_path: Path, name: OptimizerName) -> None:
    """Files hold contiguous tensors; after a resume every buffer has the strides that the optimizer itself would have given it."""

    def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 5))
        net = net.to(memory_format=torch.channels_last)
        groups = parameter_groups(net, weight_decay=0.0, decay_norm_and_bias=False)
        optimizer = make_optimizer(name, groups, momentum=0.9)
        set_lr(optimizer, 0.1)
        net(torch.rand(2, 3, 12, 12)).sum().backward()
        optimizer.step()
        return net, optimizer

    _, optimizer = stepped()
    tensors, values = optimizer_part(optimizer)
    folder = save_checkpoint(tmp_path, 1, {"optimizer": tensors}, {"optimizer": values})
    net, resumed = stepped()
    parts, state = load_checkpoint(folder)
    load_optimizer(resumed, parts["optimizer"], state["optimizer"])
    names = [key for key in next(iter(resumed.state.values())) if key != "step"]
    for parameter in net.parameters():
        for key in names:
            assert resumed.state[parameter][key].stride() == parameter.stride()
    before = [value for entries in optimizer.state.values() for key, value in entries.items() if key != "step"]
    after = [value for entries in resumed.state.values() for key, value in entries.items() if key != "step"]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
