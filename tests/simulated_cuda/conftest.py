"""The simulated GPU of the files check_*.py, each of which runs in a process of its own (test_simulated_cuda.py)."""

from collections.abc import Iterator

import pytest

from tests.simulated_cuda import driver
from tests.simulated_cuda.device import SimulatedCuda


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedCuda]:
    """One GPU for the whole process."""
    if reason := driver.missing():
        pytest.skip(reason)
    with SimulatedCuda(driver.build(tmp_path_factory.mktemp("driver"))) as simulated:
        yield simulated
