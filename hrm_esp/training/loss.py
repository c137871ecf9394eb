"""The training loss: a function of a model and a batch.

    total = mean over targets of (-log p_mixture - log p_network - log p_counts)
            + BOW_WEIGHT * mean over rows of text of the bag-of-words loss of the plan
            + codebook_penalty * the loss that balances the codes

The network is trained within the mixture with n-gram counts and also alone: otherwise it would
learn only what the counts leave to it. The gates of the counts learn from p_counts only. In a
model without counts there is no such term, and p_mixture is p_network.

Shapes: B rows, Q rows of the codebook's queue, K codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch
from ..model import HRMModel, LossTerms
from ..ngrams.mixture import WindowCounts

# The plan alone predicts which bytes the Planner read, in any order (bag-of-words loss: Zhao et al.
# 2017, section 3.3). It says little about any single byte: without this loss the Executor learns to
# ignore it.
BOW_WEIGHT = 0.6
SINKHORN_TAU = 0.5  # temperature: lower assigns each row to fewer codes
SINKHORN_ITERATIONS = 3


class BatchSizes(NamedTuple):
    """What to divide the sums of a step by: the targets, rows, and rows of plain text with targets,
    of all its micro-batches in all processes."""

    n_targets: float
    n_rows: float
    n_text_rows: float

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> BatchSizes:
        """Adds up the sizes of some batches."""
        sizes = [
            (b.n_targets, len(b.y_out), int(b.has_targets.sum()) if b.cross_attends is None else 0)
            for b in batches
        ]
        return cls(*map(sum, zip(*sizes, strict=True)))


class Loss(NamedTuple):
    """The scalar to minimize, and the ``terms`` it was made from. After the optimizer's step, pass
    ``terms.pooled`` to `HRMModel.update_code_queue`."""

    total: Tensor
    terms: LossTerms


def loss(
    model: HRMModel,
    batch: Batch,
    codebook_penalty: float = 0.1,
    sizes: BatchSizes | None = None,
    window_counts: WindowCounts | None = None,
) -> Loss:
    """Computes the training loss of a batch.

    Args:
        batch: on the model's device.
        codebook_penalty: weight of `code_balance_loss`.
        sizes: of the whole step, if the batch is a part of it; by default of the batch.
        window_counts: of the batch, see `Executor.nll`.
    """
    sizes = sizes or BatchSizes.of([batch])
    terms = model.nll(*batch, leave_one_out=True, window_counts=window_counts)
    total = (terms.mixture + terms.network + terms.counts).sum() / sizes.n_targets
    if batch.cross_attends is None:
        plan_bow = (terms.plan_bow * batch.has_targets).sum()
        total = total + BOW_WEIGHT * plan_bow / max(1, sizes.n_text_rows)
    queue_logits = model.planner.queue_logits()
    if queue_logits is not None:
        weight = codebook_penalty * len(batch.y_out) / sizes.n_rows
        total = total + weight * code_balance_loss(queue_logits)
    return Loss(total, terms)


class LossModule(nn.Module):
    """`loss` as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: HRMModel, codebook_penalty: float) -> None:
        super().__init__()
        self.model, self.codebook_penalty = model, codebook_penalty

    def forward(
        self, batch: Batch, sizes: BatchSizes, window_counts: WindowCounts | None = None
    ) -> Loss:
        return loss(self.model, batch, self.codebook_penalty, sizes, window_counts)


def sinkhorn_assignment(code_logits: Tensor) -> Tensor:
    """Assigns rows to codes so that all codes get about the same number of rows: (Q, K), each row
    sums to one (Sinkhorn's algorithm, as in Caron et al. 2020, SwAV, section 3.1)."""
    log_p = code_logits.float() / SINKHORN_TAU
    for _ in range(SINKHORN_ITERATIONS):
        log_p = log_p - log_p.logsumexp(0)
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    return log_p.exp()


def code_balance_loss(code_logits: Tensor) -> Tensor:
    """Cross-entropy of the rows' codes to `sinkhorn_assignment`, in nats.

    It is 0 when each row is sure of its code and all codes are used equally. A code that no row
    chooses has a gradient, too.

    Args:
        code_logits: (Q, K), with Q several times K.
    """
    assignment = sinkhorn_assignment(code_logits.detach())
    return -(assignment * code_logits.float().log_softmax(-1)).sum(-1).mean()


def code_counts(code_logits: Tensor) -> Tensor:
    """Returns how many rows choose each code. code_logits: (B, K) -> (K,)."""
    return F.one_hot(code_logits.argmax(-1), code_logits.shape[-1]).sum(0).float()
