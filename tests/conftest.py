"""What the tests share: where the third-party weights and photographs lie, and torch's state."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of real weights and photographs, which are no part of the project."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, the weights and photographs that are no part of the project")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
