"""Token and position embeddings.

Shapes: B rows, T positions, D = d_model, H heads of d dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import HRMConfig
from ..tokenizer import VOCAB_SIZE, starts_character


class TokenEmbedding(nn.Embedding):
    """Token embeddings in the autocast dtype: the residual stream has it, too."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__(VOCAB_SIZE, config.d_model)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        x, device = super().forward(ids), ids.device.type
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

    def forward(self, positions: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Returns freqs_cis of a range of T positions, or of positions (B, T)."""
        return self.table[:, positions].to(dtype)

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
            x with learned positions added, (B, T, D), and freqs_cis for the blocks, of its dtype.

        Raises:
            ValueError: a range reaches beyond the model's context length.
        """
        if isinstance(positions, slice) and positions.stop > self.capacity:
            raise ValueError(f"{positions.stop} positions, but the model has {self.capacity}")
        if self.learned is not None:
            x = x + self.learned.weight[positions].to(x.dtype)
        return x, self.rotary(positions, x.dtype)


def character_positions(ids: Tensor) -> Tensor:
    """Returns the index of the character that each of ids (B, T) is part of, (B, T), from 0."""
    starts: Tensor = starts_character(ids)
    return starts.long().cumsum(1) - 1
