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
from .entries import (
    COUNT_BITS,
    HASH_BITS,
    MAX_CODE,
    TOKEN_BITS,
    entry_key,
    entry_tokens,
    group_begins,
)

LARGE = 255  # code of a count from which it does not fit in a byte
MIN_HASH = -(2 ** (HASH_BITS - 1))


def pack_table(entries: Tensor) -> dict[str, Tensor]:
    """Packs the entries of an `NgramTable`.

    Returns:
        Tensors of bytes: ``is_first`` (a bit per entry: whether it is the first one of its
        context), ``differences`` (C, as many bytes as the largest one needs), ``tokens`` (E;
        EOS as DOCUMENT_END, which is no byte of a document), ``counts`` (E, codes); and
        ``large_counts`` (int16) of the entries whose count is LARGE.
    """
    keys = entries.numpy()
    hashes, tokens, counts = keys >> (TOKEN_BITS + COUNT_BITS), entry_tokens(keys), keys & MAX_CODE
    begins = group_begins(hashes)
    is_first = np.zeros(len(keys), bool)
    is_first[begins] = True
    differences = np.diff(hashes[begins], prepend=MIN_HASH)
    n_bytes = (int(differences.max(initial=0)).bit_length() + 7) // 8
    as_bytes = differences.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :n_bytes]
    packed = {
        "is_first": np.packbits(is_first),
        "differences": np.ascontiguousarray(as_bytes),
        "tokens": np.where(tokens == EOS, DOCUMENT_END, tokens).astype(np.uint8),
        "counts": np.minimum(counts, LARGE).astype(np.uint8),
        "large_counts": counts[counts >= LARGE].astype(np.int16),
    }
    return {name: torch.from_numpy(array) for name, array in packed.items()}


def unpack_table(packed: dict[str, Tensor]) -> Tensor:
    """Returns the entries of an `NgramTable`, (E,) int64.

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
    if len(counts) != len(tokens) or (counts & ~MAX_CODE).any():
        raise ValueError("counts are missing, or too large")
    return torch.from_numpy(entry_key(hashes[context_index], tokens) | counts)
