"""Every kind of detector on the simulated GPU: devices are not mixed, values are those of the CPU, and the host waits as often as the table says."""

import pytest
import torch
from torch import Tensor

from ssld.stage2_detect.models.batch import Detections
from ssld.stage2_detect.models.inference import for_inference
from tests.simulated_cuda import networks, table
from tests.simulated_cuda.device import SimulatedCuda


def test_the_table_has_every_kind() -> None:
    assert list(table.TRAINING) == networks.KINDS
    assert list(table.PREDICTION) == [kind for kind in networks.KINDS if kind not in networks.TAUGHT]


def losses_and_gradients(kind: str, device: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    model, given = networks.in_training(kind, device), networks.batch(2, device)
    losses: dict[str, Tensor] = model(*given)
    torch.stack(list(losses.values())).sum().backward()
    assert {loss.device.type for loss in losses.values()} == {device}
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("kind", networks.KINDS)
def test_losses_and_gradients_are_those_of_the_cpu(kind: str, gpu: SimulatedCuda) -> None:
    """The CPU takes faster forms of several operations (models/kernels); the GPU takes the plain ones."""
    losses, gradients = losses_and_gradients(kind, "cuda")
    expected_losses, expected_gradients = losses_and_gradients(kind, "cpu")
    assert losses == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in expected_losses.items()}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3 * largest + 1e-7, msg=name)


@pytest.mark.parametrize("kind", table.TRAINING)
def test_waits_of_a_training_step(kind: str, gpu: SimulatedCuda) -> None:
    for images in (1, 2):
        step = networks.training_step(kind, images, "cuda")
        step()  # anchors are made once, momentum begins
        with gpu.count() as counted:
            step()
        found = counted.waits.total(), counted.uploads.total()
        assert found == table.TRAINING[kind].of(images), f"{kind}, {images} images: {counted}"


@pytest.mark.parametrize("kind", table.PREDICTION)
def test_waits_of_a_prediction(kind: str, gpu: SimulatedCuda) -> None:
    for images in (1, 2):
        predict = networks.prediction(kind, images, "cuda")
        predict()
        with gpu.count() as counted:
            predict()
        found = counted.waits.total(), counted.uploads.total()
        assert found == table.PREDICTION[kind].of(images), f"{kind}, {images} images: {counted}"
        assert counted.pageable.total() == 0, str(counted)


@pytest.mark.parametrize("kind", table.PREDICTION)
def test_detections_are_those_of_the_cpu(kind: str, gpu: SimulatedCuda) -> None:
    found, expected = (
        networks.for_prediction(kind, device).predict(networks.photos(2), score_threshold=0.0)
        for device in ("cuda", "cpu")
    )
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other) > 3
        torch.testing.assert_close(torch.tensor(one.scores_N), torch.tensor(other.scores_N), rtol=1e-3, atol=1e-5)
        assert (one.masks is None) == (other.masks is None)


@pytest.mark.parametrize("kind", table.PREDICTION)
def test_detections_in_half_precision(kind: str, gpu: SimulatedCuda) -> None:
    """In bf16 under CUDA's autocast, as `evaluate` runs: float32 on the CPU, as many detections up to ties, the better half of the scores near."""
    results: list[list[Detections]] = []
    for device, half in (("cpu", False), ("cuda", True)):
        fast = for_inference(networks.detector(kind).to(device).eval())
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
            results.append(fast(networks.batch(2, device)[0]))
    for expected, detections in zip(*results, strict=True):
        fewest, most = sorted((len(expected.scores_N), len(detections.scores_N)))
        # Random weights score alike: in bf16 many are equal, and a tie at the cut or in NMS moves the detections after it.
        assert fewest >= max(3, 0.7 * most)
        difference = (expected.scores_N[:fewest] - detections.scores_N[:fewest]).abs()[: fewest // 2 + 1].max().item()
        # bf16, not float32; soft-NMS lowers scores by the boxes before them, so a tie changes those too.
        assert 1e-6 < difference < (2e-2 if kind == "soft_nms" else 1e-3)
        assert {detections.boxes_N4.dtype, detections.scores_N.dtype} == {torch.float32}
        assert detections.boxes_N4.device.type == "cpu"
        assert (expected.masks is None) == (detections.masks is None)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.bfloat16) for kind in networks.KINDS]
    + [(kind, torch.float16) for kind in ("mask_rcnn", "pss_det", "retinanet", "gfl", "pkd", "ld")],
    ids=str,
)
def test_a_step_in_mixed_precision(kind: str, dtype: torch.dtype, gpu: SimulatedCuda) -> None:
    """Under CUDA's autocast, with GradScaler for float16: losses in float32, near those of float32, and weights that move."""
    model, given = networks.in_training(kind, "cuda"), networks.batch(2, "cuda")
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = {name: loss.item() for name, loss in model(*given).items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0, enabled=dtype == torch.float16)
    with torch.autocast("cuda", dtype):
        losses = model(*given)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {name: loss.item() for name, loss in losses.items()} == {
        name: pytest.approx(value, rel=0.5, abs=0.05) for name, value in expected.items()
    }
    scaler.scale(torch.stack(list(losses.values())).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)
    moved = [bool((now != old).any()) for now, old in zip(parameters, before, strict=True)]
    assert sum(moved) > len(moved) / 2
