"""The simulated GPU itself, held against what CUDA does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.simulated_cuda.device import SimulatedCuda

REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "pointwise": lambda gpu, cpu: gpu + cpu,
    "matrix product": lambda gpu, cpu: gpu @ cpu.T,
    "cat": lambda gpu, cpu: torch.cat([gpu, cpu]),
    "where": lambda gpu, cpu: torch.where(cpu > 0, gpu, 0.0),
    "gather": lambda gpu, cpu: gpu.gather(1, cpu.long()),
    "index_select": lambda gpu, cpu: gpu.index_select(0, cpu[:, 0].long()),
    "CPU tensor indexed by the GPU": lambda gpu, cpu: cpu[gpu[:, 0].long()],
    "values of the CPU": lambda gpu, cpu: gpu.index_put((torch.zeros(2, dtype=torch.long),), cpu),
    "foreach": lambda gpu, cpu: torch._foreach_add([gpu], [cpu]),
}
WAITS: dict[str, tuple[int, Callable[[Tensor], object]]] = {
    "item": (1, lambda x: x.sum().item()),
    "bool": (1, lambda x: bool(x.sum() > 0)),
    "tolist": (1, lambda x: x.tolist()),
    "cpu": (1, lambda x: x.cpu()),
    "nonzero": (1, lambda x: x.nonzero()),
    "indexing by a mask": (1, lambda x: x[x > 2]),
    "mask set to a tensor": (1, lambda x: x.clone().index_put_((x > 2,), x[:1, 0])),
    "unique": (1, lambda x: x.unique()),
    "repeat_interleave": (1, lambda x: x.repeat_interleave(x[:, 0].long(), dim=0)),
    "repeat_interleave of known size": (0, lambda x: x.repeat_interleave(x[:, 0].long(), dim=0, output_size=4)),
    "mask set to a number": (0, lambda x: x.clone().masked_fill_(x > 2, 0.0)),
    "where": (0, lambda x: torch.where(x > 2, x, 0.0)),
    "topk": (0, lambda x: x.topk(2)),
    "copy without waiting": (0, lambda x: x.to("cpu", non_blocking=True)),
    "positions": (0, lambda x: x[x[:, 0].long() * 0]),
}


@pytest.fixture
def x(gpu: SimulatedCuda) -> Tensor:
    return torch.tensor([[1.0, 2, 3], [3, 4, 5]]).to("cuda")


@pytest.mark.parametrize("name", REFUSED)
def test_two_devices_are_refused(name: str, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        REFUSED[name](x, torch.ones(2, 3))


def test_what_cuda_lets_through(x: Tensor) -> None:
    for result in (x + torch.tensor(1.0), x[torch.tensor([1])], x.new_tensor([1.0]), torch.zeros(2, device="cuda")):
        assert str(result.device) == "cuda:0"
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        x.numpy()
    assert x.cpu().numpy().tolist() == [[1, 2, 3], [3, 4, 5]]
    assert not x.cpu().is_cuda


@pytest.mark.parametrize("name", WAITS)
def test_waits_of_the_host(name: str, x: Tensor, gpu: SimulatedCuda) -> None:
    expected, work = WAITS[name]
    with gpu.count() as counted:
        work(x)
    assert counted.waits.total() == expected, str(counted)


def test_uploads(x: Tensor, gpu: SimulatedCuda) -> None:
    host = torch.ones(3)
    for work, expected in {
        lambda: host.to("cuda"): (1, 0),
        lambda: torch.tensor([1.0], device="cuda"): (1, 0),
        lambda: x[torch.tensor([1, 0])]: (1, 0),
        lambda: x[0].copy_(host): (1, 0),
        lambda: host.to("cuda", non_blocking=True): (0, 1),
        lambda: host.pin_memory().to("cuda", non_blocking=True): (0, 0),
        lambda: torch.ones(3, device="cuda"): (0, 0),
    }.items():
        with gpu.count() as counted:
            work()
        assert (counted.uploads.total(), counted.pageable.total()) == expected, str(counted)


def test_autocast_is_cudas(x: Tensor) -> None:
    """softmax is computed in float32 there, in bf16 on a CPU."""
    layer = torch.nn.Linear(3, 4).to("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            logits = layer(x)
            probabilities = logits.softmax(-1)
        assert (logits.dtype, probabilities.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(probabilities, logits.float().softmax(-1))
        probabilities.square().sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32


def test_training_changes_weights_as_on_the_cpu(gpu: SimulatedCuda) -> None:
    weights = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(device)
        layer.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        pixels = torch.arange(2 * 3 * 5 * 6.0).view(2, 3, 5, 6).to(device)
        with gpu.count() as counted:
            for _ in range(2):
                layer(pixels).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert counted.waits.total() == 0, str(counted)
        assert {p.device.type for p in layer.state_dict().values()} == {device}
        weights.append(layer.get_parameter("0.weight").detach().cpu())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
