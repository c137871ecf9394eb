"""Token, n-gram and position embeddings.

Shapes: B rows, T positions, R preceding positions, D = d_model, H heads of d dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HRMConfig
from ..ngrams.hashing import ngram_hashes
from ..tokenizer import VOCAB_SIZE, starts_character

HASH_MIX = 0x9E3779B97F4A7C1  # an odd number with irregular bits


class NgramEmbedding(nn.Module):
    """Hashed byte n-gram embeddings (Pagnoni et al. 2024, Byte Latent Transformer, section 3.2.1).

    The embedding of a position is the sum of one vector per order, found by the hash of the n-gram
    that ends there. In training whole vectors are dropped with ``ngram_dropout``: otherwise the
    model memorizes rare n-grams.
    """

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.max_order, self.n_rows = config.ngram_max, 2**config.ngram_bits
        self.dropout = config.ngram_dropout
        zeros = torch.zeros((self.max_order - 1) * self.n_rows, config.d_model)
        self.table = nn.EmbeddingBag.from_pretrained(zeros, freeze=False, mode="sum")

    def forward(self, ids: Tensor, preceding_ids: Tensor) -> Tensor:
        """ids: (B, T), after preceding_ids (B, R) -> (B, T, D)."""
        n_preceding = preceding_ids.shape[1]
        rows = self.rows(torch.cat((preceding_ids, ids), dim=1), n_preceding)
        index = torch.stack(rows, dim=-1).flatten(0, 1)
        weights = None
        if self.training and self.dropout:
            keep = torch.rand((*ids.shape, len(rows)), device=ids.device) >= self.dropout
            weights = keep.float().div_(1 - self.dropout).flatten(0, 1)
        if ids.device.type != "mps":
            summed = self.table(index, per_sample_weights=weights)
        else:  # MPS has no EmbeddingBag
            vectors = F.embedding(index, self.table.weight)
            summed = (vectors if weights is None else vectors * weights[..., None]).sum(1)
        return summed.view(*ids.shape, self.table.embedding_dim)

    def rows(self, ids: Any, n_preceding: int) -> list[Any]:
        """Returns the row of the table for each order from 2 on, (B, T) each; ids as in
        `ngram_hashes`."""
        rows = []
        for k, (hashes, _) in enumerate(ngram_hashes(ids, self.max_order, n_preceding)):
            if k:
                # The low bits of a rolling hash depend on the last tokens only: mix in the high.
                mixed = (hashes ^ (hashes >> 29)) * HASH_MIX >> 24
                rows.append(mixed % self.n_rows + (k - 1) * self.n_rows)
        return rows


class TokenEmbedding(nn.Embedding):
    """Token embeddings, plus the embeddings of the n-grams that end at each token."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__(VOCAB_SIZE, config.d_model)
        self.ngrams = NgramEmbedding(config) if config.ngram_max > 1 else None

    def forward(self, ids: Tensor, preceding_ids: Tensor | None = None) -> Tensor:
        """ids: (B, T), after preceding_ids (B, R), none by default -> (B, T, D)."""
        x = super().forward(ids)
        if self.ngrams is not None:
            x = x + self.ngrams(ids, ids[:, :0] if preceding_ids is None else preceding_ids)
        device = ids.device.type  # the residual stream is in the autocast dtype, too
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Rotary(nn.Module):
    """Rotary position embeddings (Su et al. 2021, section 3.2).

    ``forward`` reads the first ``capacity`` positions from a table; `freqs_cis` computes any.
    """

    frequency: Tensor
    table: Tensor

    def __init__(self, head_dim: int, capacity: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** -(torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("frequency", frequency, persistent=False)
        self.register_buffer("table", self.freqs_cis(torch.arange(capacity)), persistent=False)

    def forward(self, positions: slice | Tensor) -> Tensor:
        """Returns freqs_cis of a range of T positions, or of positions (B, T)."""
        return self.table[:, positions]

    def freqs_cis(self, positions: Tensor) -> Tensor:
        """positions: (T,) or (B, T) -> cosines and sines as `apply_rotary` takes them,
        (2, T, 1, d) or (2, B, T, 1, d)."""
        angles = positions[..., None, None] * self.frequency
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def apply_rotary(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotates each pair (x[i], x[i + d/2]) by the angle of its position. x: (B, T, H, d) -> same.

    Empty freqs_cis (learned positions) rotate nothing.
    """
    if freqs_cis.shape[-1] == 0:
        return x
    cos, sin = freqs_cis.to(x.dtype).unbind()
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class PositionEncoding(nn.Module):
    """Position information, rotary or learned.

    Rotary positions act in attention, through freqs_cis; learned ones are added to the embeddings,
    and their freqs_cis are empty.
    """

    def __init__(self, config: HRMConfig, n_special: int) -> None:
        """``n_special``: number of special tokens beside ``max_len`` bytes."""
        super().__init__()
        self.capacity = config.max_len + n_special
        self.is_rotary = config.positions == "rotary"
        # Without rotary positions a table of width 0: nothing is rotated.
        self.rotary = Rotary(config.head_dim if self.is_rotary else 0, self.capacity)
        self.learned = None if self.is_rotary else nn.Embedding(self.capacity, config.d_model)
        if self.learned is not None:
            nn.init.normal_(self.learned.weight, std=0.5)

    def forward(self, x: Tensor, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Adds position information to embeddings.

        Args:
            x: (B, T, D).
            positions: a range of T positions, or (B, T).

        Returns:
            x with learned positions added, (B, T, D), and freqs_cis for the blocks.

        Raises:
            ValueError: a range reaches beyond the model's context length.
        """
        if isinstance(positions, slice) and positions.stop > self.capacity:
            raise ValueError(f"{positions.stop} positions, but the model has {self.capacity}")
        if self.learned is not None:
            x = x + self.learned.weight[positions].to(x.dtype)
        return x, self.rotary(positions)


def character_positions(ids: Tensor) -> Tensor:
    """Returns the index of the character that each of ids (B, T) is part of, (B, T), from 0."""
    starts: Tensor = starts_character(ids)
    return starts.long().cumsum(1) - 1
