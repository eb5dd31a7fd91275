"""The C library's heap under large tensors that come and go."""

from __future__ import annotations

import torch

__all__ = ["keep_pages"]


def keep_pages() -> None:
    """Let memory that tensors free be used again, instead of going back to the kernel and being paged in anew.

    glibc maps a large block on its own and unmaps it when it is freed: a quarter of an importance sampler's time went
    into page faults. Once a block of some size was freed, it keeps blocks up to that size, and twice as much free
    memory (mallopt(3), M_MMAP_THRESHOLD, which so adapts to at most 32 MB). Under other C libraries this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)  # freed at once, never written to: it costs no memory
