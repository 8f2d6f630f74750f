"""What the tests share: where the third-party weights and photographs lie, and torch's state."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Give workers side by side a part of the cores each: with all of them they wait for one another everywhere.

    They, and what they start, read it from the environment as they load torch.
    """
    workers = len(getattr(config.option, "tx", None) or [])
    if workers:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture
def shared() -> Path:
    """The folder of real weights and photographs, which are no part of the project."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, the weights and photographs that are no part of the project")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
