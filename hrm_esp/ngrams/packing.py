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
from .entries import COUNT_BITS, HASH_BITS, MAX_CODE, TOKEN_BITS, chunks, entry_key, entry_tokens

LARGE = 255  # code of a count from which it does not fit in a byte
MIN_HASH = -(2 ** (HASH_BITS - 1))
FORM = dict.fromkeys(("is_first", "tokens", "counts"), (torch.uint8, 1))
FORM |= {"differences": (torch.uint8, 2), "large_counts": (torch.int16, 1)}


def pack_table(entries: Tensor) -> dict[str, Tensor]:
    """Packs the entries of an `NgramTable`.

    Returns:
        Tensors of bytes: ``is_first`` (a bit per entry: whether it is the first one of its
        context), ``differences`` (C, as many bytes as the largest one needs), ``tokens`` (E;
        EOS as DOCUMENT_END, which is no byte of a document), ``counts`` (E, codes); and
        ``large_counts`` (int16) of the entries whose count is LARGE.
    """
    keys = entries.numpy()
    is_first = np.empty(len(keys), np.bool_)
    tokens, counts = np.empty((2, len(keys)), np.uint8)
    hashes, large_counts = [np.empty(0, np.int64)], [np.empty(0, np.int16)]
    last_hash = MIN_HASH - 1
    for chunk in chunks(len(keys)):
        hash_ = keys[chunk] >> (TOKEN_BITS + COUNT_BITS)
        is_first[chunk] = np.diff(hash_, prepend=last_hash) != 0
        hashes.append(hash_[is_first[chunk]])
        last_hash = int(hash_[-1])
        token, count = entry_tokens(keys[chunk]), keys[chunk] & MAX_CODE
        tokens[chunk] = np.where(token == EOS, DOCUMENT_END, token)
        counts[chunk] = np.minimum(count, LARGE)
        large_counts.append(count[count >= LARGE].astype(np.int16))
    differences = np.diff(np.concatenate(hashes), prepend=MIN_HASH)
    n_bytes = (int(differences.max(initial=0)).bit_length() + 7) // 8
    as_bytes = differences.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)[:, :n_bytes]
    packed = {
        "is_first": np.packbits(is_first),
        "differences": np.ascontiguousarray(as_bytes),
        "tokens": tokens,
        "counts": counts,
        "large_counts": np.concatenate(large_counts),
    }
    return {name: torch.from_numpy(array) for name, array in packed.items()}


def unpack_table(packed: dict[str, Tensor]) -> Tensor:
    """Returns the entries of an `NgramTable`, (E,) int64.

    Raises:
        IndexError, KeyError, ValueError: the tensors do not fit together.
    """
    if {name: (t.dtype, t.ndim) for name, t in packed.items()} != FORM:
        raise ValueError("not the tensors of a table")
    arrays = {name: tensor.contiguous().numpy() for name, tensor in packed.items()}
    tokens, counts, large_counts = arrays["tokens"], arrays["counts"], arrays["large_counts"]
    n_contexts, n_bytes = arrays["differences"].shape
    differences = np.zeros((n_contexts, 8), np.uint8)
    differences[:, :n_bytes] = arrays["differences"]
    hashes = MIN_HASH + differences.view("<i8")[:, 0].cumsum()
    entries = np.empty(len(tokens), np.int64)
    n_first = n_large = 0
    for chunk in chunks(len(tokens)):
        bits = np.unpackbits(arrays["is_first"][chunk.start // 8 :], count=chunk.stop - chunk.start)
        context_index = n_first - 1 + bits.cumsum(dtype=np.int64)
        if context_index[0] < 0:
            raise ValueError("a context is missing")
        token, count = tokens[chunk].astype(np.int64), counts[chunk].astype(np.int64)
        token[token == DOCUMENT_END] = EOS
        is_large = count == LARGE
        end = n_large + int(is_large.sum())
        count[is_large] = large_counts[n_large:end]
        if (count & ~MAX_CODE).any():
            raise ValueError("a count is too large")
        entries[chunk] = entry_key(hashes[context_index], token) | count
        n_first, n_large = int(context_index[-1]) + 1, end
    if (n_first, n_large) != (n_contexts, len(large_counts)) or len(counts) != len(tokens):
        raise ValueError("contexts or counts are missing")
    return torch.from_numpy(entries)
