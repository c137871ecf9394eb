"""The model: Planner and Executor.

Shapes: B rows, S prompt positions, T target positions, R preceding positions, D = d_model, P =
plan_dim, K codes, N orders of n-grams, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import HRMConfig
from ..data import PairColumns
from ..ngrams.mixture import WindowCounts
from ..tokenizer import PAD
from .embeddings import TokenEmbedding
from .executor import Executor
from .planner import EncoderOutput, Planner, PlanOutput


class LossTerms(NamedTuple):
    """Losses of each row, in nats, (B,).

    ``mixture``, ``network`` and ``counts``: negative log-likelihood summed over the targets, of the
    mixture, by the network alone and by the n-gram counts alone; in a model without counts the
    first two are equal and the third is 0. ``plan_bow``: negative log-likelihood of the prompt's
    tokens by the bag-of-words distribution that the plan predicts, averaged over tokens. With a
    codebook also its ``code_logits`` (B, K) and ``pooled`` (B, D), see
    `HRMModel.update_code_queue`.
    """

    mixture: Tensor
    network: Tensor
    counts: Tensor
    plan_bow: Tensor
    code_logits: Tensor | None
    pooled: Tensor | None


class HRMModel(nn.Module):
    """Planner and Executor. ``stage``: what the weights were last trained for, ``pretrain`` or
    ``finetune``. ``columns``: of the table that it was finetuned on."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.config = config
        self.stage = "pretrain"
        self.columns: PairColumns | None = None
        tok_emb = TokenEmbedding(config)
        self.planner = Planner(config, tok_emb)
        self.executor = Executor(config, tok_emb)

    def forward(
        self, prompt_ids: Tensor, y_in: Tensor, cross_attends: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the log-probabilities of the next tokens, and the code logits.

        Args:
            prompt_ids: (B, S), read by the Planner.
            y_in: (B, T), read by the Executor.
            cross_attends: (B,) bool, the rows whose Executor may attend to the prompt, if the model
                has cross-attention; by default none.

        Returns:
            (B, T, V), and (B, K) or ``None`` without a codebook.
        """
        plan, encoded = self.encode_prompt(prompt_ids, cross_attends)
        return self.executor(y_in, plan.plan, encoded), plan.code_logits

    def nll(
        self,
        prompt_ids: Tensor,
        y_in: Tensor,
        y_out: Tensor,
        cross_attends: Tensor | None = None,
        preceding_ids: Tensor | None = None,
        is_padded: bool | None = None,
        leave_one_out: bool = False,
        window_counts: WindowCounts | None = None,
    ) -> LossTerms:
        """Computes the losses of a batch.

        Args:
            y_out, preceding_ids, leave_one_out, window_counts: see `Executor.nll`.
            is_padded: see `Planner.encode`.

        Other arguments as in `forward`.
        """
        plan, encoded = self.encode_prompt(prompt_ids, cross_attends, is_padded)
        losses = self.executor.nll(
            y_in, y_out, plan.plan, encoded, preceding_ids, leave_one_out, window_counts
        )
        plan_bow = bag_of_words_nll(losses.plan_log_probs, prompt_ids)
        mixture, network, counts = (
            loss.sum(1) for loss in (losses.mixture, losses.network, losses.counts)
        )
        return LossTerms(mixture, network, counts, plan_bow, plan.code_logits, plan.pooled)

    def target_nll(
        self,
        prompt_ids: Tensor,
        y_in: Tensor,
        y_out: Tensor,
        cross_attends: Tensor | None = None,
        preceding_ids: Tensor | None = None,
        is_padded: bool | None = None,
    ) -> Tensor:
        """Computes the negative log-likelihood of each target, in nats, (B, T), 0 at PAD.

        Arguments as in `nll`.
        """
        plan, encoded = self.encode_prompt(prompt_ids, cross_attends, is_padded)
        return self.executor.nll(y_in, y_out, plan.plan, encoded, preceding_ids).mixture

    def encode_prompt(
        self,
        prompt_ids: Tensor,
        cross_attends: Tensor | None,
        is_padded: bool | None = None,
    ) -> tuple[PlanOutput, EncoderOutput | None]:
        """Runs the Planner. Returns the plan, and what the Executor may attend to, if anything.

        Where ``cross_attends`` is ``None`` the Planner's encoder gets no gradient: through the plan
        alone it would be faint, and Muon's steps, whose size does not depend on the gradient's,
        would carry the weights off at random.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cross_attends is not None):
            encoded = self.planner.encode(prompt_ids, is_padded)
        plan = self.planner.pool(encoded)
        if not self.config.cross_attention or cross_attends is None:
            return plan, None
        mask = (prompt_ids != PAD) & cross_attends[:, None]
        return plan, encoded._replace(mask=mask)

    @torch.no_grad()
    def update_code_queue(self, batches: Sequence[Tensor | None]) -> None:
        """Adds the pooled states (B, D) of the batches of an optimizer step to the codebook's
        queue, if there is a codebook."""
        if self.planner.codebook is not None and batches:
            self.planner.codebook.update_queue([pooled for pooled in batches if pooled is not None])

    @property
    def device(self) -> torch.device:
        return self.executor.lm_head.weight.device

    def n_parameters(self) -> int:
        """Returns the number of weights."""
        return sum(p.numel() for p in self.parameters())


def bag_of_words_nll(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood of a token of ids (B, S), PAD ignored, by one
    distribution per row, log_probs (B, V) -> (B,)."""
    is_token = ids != PAD
    return -(log_probs.gather(1, ids) * is_token).sum(1) / is_token.sum(1).clamp(min=1)
