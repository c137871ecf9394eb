"""The Planner reads a prompt and writes a plan.

Shapes: B rows, S prompt positions, D = d_model, P = plan_dim, K codes, Q rows of the queue.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..config import HRMConfig
from ..tokenizer import PAD
from .codebook import Codebook
from .embeddings import PositionEncoding, TokenEmbedding, character_positions
from .layers import EncoderBlock, RMSNorm, linear

# Rows of the queue by which the codes are balanced.
MIN_BALANCED_ROWS, ROWS_PER_CODE = 256, 8


class EncoderOutput(NamedTuple):
    """The Planner's ``states`` (B, S, D); ``mask`` (B, S), true where a position may be attended
    to, ``None`` where all may; ``char_positions`` (B, S), the character each position is part of,
    for the rotary positions of cross-attention."""

    states: Tensor
    mask: Tensor | None
    char_positions: Tensor


class PlanOutput(NamedTuple):
    """The ``plan`` (B, P). With a codebook also its ``code_logits`` (B, K), and the ``pooled``
    states (B, D) to update the codebook's queue with."""

    plan: Tensor
    code_logits: Tensor | None
    pooled: Tensor | None


class Planner(nn.Module):
    """A bidirectional encoder with mean pooling, a projection and an optional codebook."""

    def __init__(self, config: HRMConfig, tok_emb: TokenEmbedding | None = None) -> None:
        super().__init__()
        self.tok_emb = tok_emb or TokenEmbedding(config)
        self.positions = PositionEncoding(config, 2)  # BOS and EOS
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layers_enc))
        self.norm = RMSNorm(config.d_model)
        self.to_plan = linear(config.d_model, config.plan_dim)
        self.codebook = Codebook(config) if config.gumbel else None

    def forward(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """prompt_ids: (B, S), PAD on the right -> the plan (B, P) and, with a codebook, its logits
        (B, K)."""
        output = self.pool(self.encode(prompt_ids))
        return output.plan, output.code_logits

    def encode(self, prompt_ids: Tensor, is_padded: bool | None = None) -> EncoderOutput:
        """prompt_ids: (B, S), PAD on the right -> the states of the prompt.

        Args:
            is_padded: whether there is any PAD; by default this is looked up, and on a GPU the host
                waits for the answer.
        """
        mask = None
        if is_padded is not False:
            is_token = prompt_ids != PAD
            mask = is_token if is_padded or not is_token.all() else None
        x, freqs_cis = self.positions(self.tok_emb(prompt_ids), slice(0, prompt_ids.shape[1]))
        for block in self.blocks:
            x = block(x, freqs_cis, mask)
        return EncoderOutput(self.norm(x), mask, character_positions(prompt_ids))

    def pool(self, encoded: EncoderOutput) -> PlanOutput:
        """Mean-pools the states of a prompt, without PAD, and projects them to the plan."""
        states, mask, _ = encoded
        if mask is None:
            pooled = states.mean(1)
        else:
            weight = mask.to(states.dtype)[..., None]
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.codebook is None:
            return PlanOutput(self.to_plan(pooled), None, None)
        plan, code_logits = self.codebook(self.to_plan(self.codebook.standardize(pooled)))
        return PlanOutput(plan, code_logits, pooled.detach().float())

    def queue_logits(self) -> Tensor | None:
        """Returns the code logits of the last pooled states in the queue, several for each code,
        (Q, K); ``None`` without a codebook.

        The scale gets no gradient from them: it would grow without end, to make each choice surer.
        """
        if self.codebook is None:
            return None
        n_rows = max(MIN_BALANCED_ROWS, ROWS_PER_CODE * self.codebook.n_codes)
        rows = self.codebook.pooled_queue[-n_rows:]
        plan = self.to_plan(self.codebook.standardize(rows))
        return self.codebook.log_scale.exp().detach() * self.codebook.cosines(plan)
