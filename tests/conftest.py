"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# One thread: the figures do not depend on the machine's cores, and threads that wait for one another cost more than
# they give on nets as small as these.
torch.set_num_threads(1)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 throughout a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; a run under CI without it fails rather than passes quietly."""
    if not DATA.is_dir():
        message = f"The data sets of these tests belong in {DATA}."
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return DATA
