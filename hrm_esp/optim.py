"""What moves the weights: optimizers, and how the run changes as it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Muon, Optimizer, SparseAdam

from .config import PretrainConfig, TrainConfig
from .layers import NgramEmbedding
from .model import HRMModel

NGRAM_LR = 10.0  # of lr: a row of the n-gram table is met rarely, so its steps are longer
BETAS = (0.9, 0.95)  # of AdamW
NEWTON_SCHULZ = 3  # steps of Muon; five take a tenth more of the time and bring no better text
# Until which share of a run, the fraction of a batch and the pieces of a window.
GROWTH = ((0.35, 4, 4), (0.8, 2, 2))


@dataclass
class Parameters:
    """A model's parameters, by how they are trained."""

    blocks: list[nn.Parameter]  # the 2-D weights in the blocks
    tables: list[nn.Parameter]  # n-gram tables, whose gradients are sparse
    rest: list[nn.Parameter]

    @classmethod
    def of(cls, model: HRMModel) -> Parameters:
        parts = (model.planner, model.executor)
        blocks = [p for part in parts for p in part.blocks.parameters() if p.ndim == 2]
        embeddings = [m for m in model.modules() if isinstance(m, NgramEmbedding)]
        tables = [p for m in embeddings for p in m.parameters()]
        taken = set(map(id, blocks + tables))
        return cls(blocks, tables, [p for p in model.parameters() if id(p) not in taken])

    @property
    def dense(self) -> list[nn.Parameter]:
        return self.blocks + self.rest


def build_optimizers(parameters: Parameters, options: TrainConfig) -> list[Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices in the blocks, its steps scaled to the size of
    AdamW's (Liu et al. 2025, section 2.2), so that one learning rate serves both; AdamW for the
    rest, without weight decay. Each group's ``scale`` is its share of the learning rate."""
    blocks = {"params": parameters.blocks, "scale": 1.0, "weight_decay": options.weight_decay}
    rest = {"params": parameters.rest, "scale": 1.0, "weight_decay": 0.0}
    tables = {"params": parameters.tables, "scale": NGRAM_LR}
    optimizers: list[Optimizer] = []
    if options.optimizer == "muon":
        optimizers += [Muon([blocks], ns_steps=NEWTON_SCHULZ, adjust_lr_fn="match_rms_adamw")]
    by_adamw = [rest] if options.optimizer == "muon" else [blocks, rest]
    optimizers += [AdamW(by_adamw, betas=BETAS, fused=True)]
    if parameters.tables and parameters.tables[0].device.type == "mps":
        optimizers += [AdamW([tables], betas=BETAS, weight_decay=0.0)]
    elif parameters.tables:
        optimizers += [SparseAdam([tables], betas=BETAS)]
    return optimizers


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]


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
