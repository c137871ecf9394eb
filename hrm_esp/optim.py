"""What moves the weights: optimizers, and how the run changes as it goes on."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer, SparseAdam

from .config import PretrainConfig, TrainConfig
from .layers import NgramEmbedding
from .model import HRMModel

NGRAM_LR = 10.0  # of lr: a row of the n-gram table is met rarely, so its steps are longer
NEWTON_SCHULZ = 3  # steps of Muon; five take a tenth more of the time and bring no better text
# Until which share of a run, the fraction of a batch and the pieces of a window.
GROWTH = ((0.3, 4, 4), (0.7, 2, 2))


def matrices_and_rest(model: HRMModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The 2-D weights inside the blocks, and all other parameters."""
    blocks = [*model.planner.blocks.parameters(), *model.executor.blocks.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    chosen = {*map(id, matrices), *map(id, ngram_tables(model))}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def ngram_tables(model: HRMModel) -> list[nn.Parameter]:
    """The n-gram tables, whose gradients are sparse."""
    tables = [m.table for m in model.modules() if isinstance(m, NgramEmbedding)]
    return [p for table in tables for p in table.parameters()]


def build_optimizers(model: HRMModel, options: TrainConfig) -> list[Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices in the blocks, its steps scaled to the size of
    AdamW's (Liu et al. 2025, section 2.2), so that one learning rate serves both; AdamW for the
    rest, without weight decay."""
    matrices, rest = matrices_and_rest(model)
    adamw: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.95), "fused": True}
    decay = options.weight_decay
    tables = ngram_tables(model)
    sparse = [SparseAdam(tables, lr=options.lr, betas=(0.9, 0.95))] if tables else []
    if options.optimizer == "adamw":
        groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0}]
        return [AdamW(groups, **adamw), *sparse]
    return [
        Muon(
            matrices,
            lr=options.lr,
            weight_decay=decay,
            ns_steps=NEWTON_SCHULZ,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW(rest, weight_decay=0.0, **adamw),
        *sparse,
    ]


def learning_rate(options: TrainConfig, step: int, progress: float) -> float:
    """Warm-up, stable, linear decay (Hu et al. 2024, section 4.1). ``progress``: 0 to 1."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    left = min(1.0, (1 - progress) / options.decay) if options.decay else 1.0
    return options.lr * warm * max(0.0, left)


def batch_shape(options: TrainConfig, max_len: int, progress: float) -> tuple[int, int]:
    """Windows a batch, and the pieces each is cut into.

    Short windows in small batches at first (Li et al. 2022): most of what is near is learned from
    them at a fraction of the time.
    """
    if isinstance(options, PretrainConfig) and options.grow:
        for until, fewer, pieces in GROWTH:
            if progress < until and max_len % pieces == 0:
                return max(1, options.batch_size // fewer), pieces
    return options.batch_size, 1


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * NGRAM_LR if isinstance(optimizer, SparseAdam) else lr
