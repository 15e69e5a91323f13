"""Comparison of converted weights with the detector they are for."""

from collections.abc import Mapping

from torch import Tensor

from ssld.shared.errors import UserError


def check_fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, naming the first differences, if names or shapes differ from those of the detector."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is left over" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if wrong:
        more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: does not fit the detector (names as in this project): {'; '.join(wrong[:3])}{more}")
