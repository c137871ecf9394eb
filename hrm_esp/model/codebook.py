"""A codebook of plans, chosen by Gumbel-Softmax.

Shapes: B rows, Q rows of the queue, D = d_model, P = plan_dim, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HRMConfig

QUEUE_LEN = 1024  # pooled states by which new ones are standardized
EPS = 1e-4  # added to their variance
INITIAL_SCALE = 10.0  # of the cosines


class Codebook(nn.Module):
    """Expresses a plan as a mixture of K codes (Gumbel-Softmax: Jang et al. 2017, section 2).

    Logits are cosines times a learned scale. In training they are sampled, softly or with
    straight-through gradients; in evaluation there is no noise, so a prompt always has the same
    plan.

    The Planner's pooled state is standardized before the projection, by the mean and the variance
    of a queue of the last pooled states in training: what all texts have in common is many times
    larger than what tells them apart, and would make all cosines nearly equal. As with batch norm,
    evaluation does not change these statistics.
    """

    pooled_queue: Tensor  # (QUEUE_LEN, D), zeros at first

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.register_buffer("pooled_queue", torch.zeros(QUEUE_LEN, config.d_model))
        self.n_codes, self.hard = config.n_plan_codes, config.gumbel_hard
        self.codes = nn.Parameter(torch.randn(self.n_codes, config.plan_dim))
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, P) -> the plan (B, P) and the logits of the codes (B, K)."""
        logits = self.log_scale.exp() * self.cosines(x)
        return self.mix(self.code_weights(logits)), logits

    def cosines(self, x: Tensor) -> Tensor:
        """x: (B, P) -> cosine similarities to the codes, (B, K)."""
        return F.normalize(x.float(), dim=-1) @ F.normalize(self.codes.float(), dim=-1).T

    def code_weights(self, logits: Tensor) -> Tensor:
        """logits: (B, K) -> the weight of each code, (B, K); each row sums to one."""
        if self.training:
            return F.gumbel_softmax(logits, hard=self.hard)
        if self.hard:
            return F.one_hot(logits.argmax(-1), self.n_codes).to(logits.dtype)
        return logits.softmax(-1)

    def mix(self, weights: Tensor) -> Tensor:
        """weights: (B, K) -> the plan, (B, P)."""
        return weights @ self.codes.to(weights.dtype)

    def standardize(self, pooled: Tensor) -> Tensor:
        """Subtracts the mean of the queue and divides by its standard deviation. (B, D) -> same."""
        var, mean = torch.var_mean(self.pooled_queue, 0, correction=0)
        return ((pooled.float() - mean) * (var + EPS).rsqrt()).to(pooled.dtype)

    def update_queue(self, pooled: Sequence[Tensor]) -> None:
        """Adds the pooled states of a training step, (B, D) each, and drops the oldest."""
        rows = torch.cat(list(pooled))[-QUEUE_LEN:]
        is_finite = rows.isfinite().all(1, keepdim=True)
        finite = torch.where(is_finite, rows, 0)
        rows = torch.where(is_finite, rows, finite.sum(0) / is_finite.sum().clamp(min=1))
        queue = torch.cat((self.pooled_queue, rows))[-QUEUE_LEN:]
        first = rows.repeat(-(-QUEUE_LEN // len(rows)), 1)[-QUEUE_LEN:]  # they fill the queue
        self.pooled_queue.copy_(torch.where(self.pooled_queue.any(), queue, first))
