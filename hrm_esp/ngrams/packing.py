"""The n-gram table as a checkpoint stores it: about half as many bytes as in memory.

Entries of one context lie side by side, and contexts are sorted by their hashes. So of a context
the difference to the hash before is stored, and of an entry its token and its count.

Shapes: E entries, C contexts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.stream import DOCUMENT_END
from ..tokenizer import EOS
from .table import TOKEN_BITS, entry_key

LARGE = 255  # count from which it does not fit in a byte
MIN_HASH = -(2 ** (63 - TOKEN_BITS))


def pack_table(entries: Tensor, cumulative: Tensor) -> dict[str, Tensor]:
    """Packs the buffers of an `NgramTable`.

    Returns:
        Tensors of bytes: ``is_first`` (a bit per entry: whether it is the first one of its
        context), ``differences`` (C, as many bytes as the largest one needs), ``tokens`` (E;
        EOS as DOCUMENT_END, which is no byte of a document), ``counts`` (E,); and ``large_counts``
        (int32) of the entries whose count is LARGE.
    """
    keys = entries.numpy()[:-1]  # without the sentinel
    hashes, tokens = keys >> TOKEN_BITS, keys & (2**TOKEN_BITS - 1)
    counts = np.diff(cumulative.numpy())[:-1]
    is_first = np.diff(hashes, prepend=MIN_HASH - 1) != 0
    differences = np.diff(hashes[is_first], prepend=MIN_HASH)
    n_bytes = (int(differences.max(initial=0)).bit_length() + 7) // 8
    as_bytes = differences.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :n_bytes]
    packed = {
        "is_first": np.packbits(is_first),
        "differences": np.ascontiguousarray(as_bytes),
        "tokens": np.where(tokens == EOS, DOCUMENT_END, tokens).astype(np.uint8),
        "counts": np.minimum(counts, LARGE).astype(np.uint8),
        "large_counts": counts[counts >= LARGE].astype(np.int32),
    }
    return {name: torch.from_numpy(array) for name, array in packed.items()}


def unpack_table(packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns ``entries`` (E + 1,) int64 and ``cumulative`` (E + 2,) int32 of an `NgramTable`.

    Raises:
        KeyError, ValueError: the tensors do not fit together.
    """
    arrays = {name: tensor.numpy() for name, tensor in packed.items()}
    tokens, counts = arrays["tokens"].astype(np.int64), arrays["counts"].astype(np.int64)
    tokens[tokens == DOCUMENT_END] = EOS
    counts[counts == LARGE] = arrays["large_counts"]
    n_contexts, n_bytes = arrays["differences"].shape
    differences = np.zeros((n_contexts, 8), np.uint8)
    differences[:, :n_bytes] = arrays["differences"]
    hashes = MIN_HASH + differences.view("<i8")[:, 0].cumsum()
    context_index = np.unpackbits(arrays["is_first"], count=len(tokens)).cumsum(dtype=np.int64) - 1
    if len(tokens) and not 0 == context_index[0] <= context_index[-1] == n_contexts - 1:
        raise ValueError("contexts are missing")
    entries = np.empty(len(tokens) + 1, np.int64)
    entries[:-1] = entry_key(hashes[context_index], tokens)
    entries[-1] = np.iinfo(np.int64).max  # the sentinel
    cumulative = np.zeros(len(tokens) + 2, np.int32)
    counts.cumsum(out=cumulative[1:-1], dtype=np.int32)
    cumulative[-1] = cumulative[-2]
    return torch.from_numpy(entries), torch.from_numpy(cumulative)
