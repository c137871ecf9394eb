"""Windows of a text that is longer than the context. Generation and evaluation share them."""

from __future__ import annotations


def window_stride(max_len: int) -> int:
    """Returns by how many tokens the window moves when it is full."""
    return max_len - max_len // 2


def window_start(n_tokens: int, max_len: int) -> int:
    """Returns where the Executor's window begins when the text has ``n_tokens``.

    Whenever ``max_len`` is full, the window drops its older half.
    """
    stride = window_stride(max_len)
    return max(0, -(-(n_tokens - max_len) // stride)) * stride
