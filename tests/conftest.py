"""What the tests share: where the third-party weights and photographs lie, and torch's state."""

import os
from pathlib import Path

import pytest
import torch

# Workers side by side that have all cores each wait for one another at every operator. Their children read this too.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

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
