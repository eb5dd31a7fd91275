"""Settings that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# One thread: the figures do not depend on the machine's cores, and threads that wait for one another cost more than
# they give on nets as small as these.
torch.set_num_threads(1)


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 throughout a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
