"""What moves the weights: optimizers, and how the run changes as it goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

from .config import PretrainConfig, TrainConfig
from .device import choose_precision
from .layers import NgramEmbedding
from .model import HRMModel

NGRAM_LR = 10.0  # of lr: a row of the n-gram table is met rarely, so its steps are longer
BETAS = (0.9, 0.95)  # of AdamW
# The polynomials a x + b x^3 + c x^5 that bring singular values near one, of Polar Express (Amsel
# et al. 2025, algorithm 1). More of them take longer and bring no better text.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
)
MARGIN = 1.02  # so that rounding brings no singular value above one, where they would grow
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


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024), its steps scaled to the size of AdamW's (Liu et al. 2025, section
    2.2), so that one learning rate serves both.

    PyTorch's multiplies in bfloat16 whatever the hardware, which takes some 40 times as long where
    that is emulated, as on most laptops: here it is float32 there. All else is as PyTorch's with
    ``adjust_lr_fn="match_rms_adamw"``, but for the polynomials.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum_buffer"], group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(p.shape) ** 0.5
                p.add_(orthogonalized(update), alpha=-group["lr"] * size)


def orthogonalized(x: Tensor) -> Tensor:
    """A matrix (N, M) with its singular values brought near one, in the precision that its device
    is fast in."""
    low = choose_precision(x.device)
    y = x.to(torch.bfloat16 if low is torch.bfloat16 else torch.float32)
    if is_tall := len(x) > x.shape[1]:
        y = y.T
    y = y / (MARGIN * y.norm()).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if is_tall else y


def build_optimizers(
    parameters: Parameters, options: TrainConfig, sparse: bool = True
) -> list[Optimizer]:
    """Muon for the matrices in the blocks, AdamW for the rest, without weight decay. Each group's
    ``scale`` is its share of the learning rate.

    Args:
        sparse: whether the gradients of the n-gram tables are.
    """
    blocks = {"params": parameters.blocks, "scale": 1.0, "weight_decay": options.weight_decay}
    rest = {"params": parameters.rest, "scale": 1.0, "weight_decay": 0.0}
    tables = {"params": parameters.tables, "scale": NGRAM_LR}
    optimizers: list[Optimizer] = []
    if options.optimizer == "muon":
        optimizers += [Muon([blocks])]
    by_adamw = [rest] if options.optimizer == "muon" else [blocks, rest]
    optimizers += [AdamW(by_adamw, betas=BETAS, fused=True)]
    if parameters.tables and sparse:
        optimizers += [SparseAdam([tables], betas=BETAS)]
    elif parameters.tables:
        optimizers += [AdamW([tables], betas=BETAS, weight_decay=0.0)]
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


def batch_shape(
    options: TrainConfig, max_len: int, progress: float, n_processes: int = 1
) -> tuple[int, int]:
    """Windows a batch, of all processes together, and the pieces each is cut into.

    Short windows in small batches at first (Li et al. 2022): most of what is near is learned from
    them at a fraction of the time.
    """
    batch_size = options.batch_size * n_processes
    if isinstance(options, PretrainConfig) and options.grow:
        for until, fewer, pieces in GROWTH:
            if progress < until and max_len % pieces == 0:
                return max(n_processes, batch_size // fewer), pieces
    return batch_size, 1
