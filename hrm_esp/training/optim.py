"""Optimizers: Muon for the matrices in the blocks, AdamW for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

from ..config import TrainConfig
from ..device import choose_precision
from ..model import HRMModel, NgramEmbedding

NGRAM_LR = 10.0  # in units of lr: a row of the n-gram table is rarely updated
BETAS = (0.9, 0.95)  # of AdamW and SparseAdam
# Coefficients of the polynomials a x + b x^3 + c x^5 of Polar Express (Amsel et al. 2025, algorithm
# 1), which even out singular values. More than two take longer and improve nothing.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
)
MARGIN = 1.02  # keeps singular values below one after rounding: above one they would grow


@dataclass
class Parameters:
    """The parameters of a model by kind: ``blocks``, the matrices in the blocks; ``tables``, the
    n-gram embeddings; and the ``rest``."""

    blocks: list[nn.Parameter]
    tables: list[nn.Parameter]
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

    def clip_gradients(self, max_norm: float) -> float:
        """Clips the gradients, n-gram embeddings aside; returns the norm of all before, not finite
        if any of them is not."""
        norm = nn.utils.clip_grad_norm_(self.dense, max_norm)
        for table in self.tables:
            if table.grad is not None:
                if table.grad.is_sparse:
                    table.grad = table.grad.coalesce()  # once, for the optimizer too
                norm = norm + table.grad.norm()
        return norm.item()


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) with update sizes that match AdamW's (Liu et al. 2025, section
    2.2), so that one learning rate serves both.

    As ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, but for the polynomials and the
    precision: PyTorch's multiplies in bfloat16 everywhere, which takes about 40 times as long where
    it is emulated, as on most laptops. This one uses float32 there.
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
                scale = 0.2 * max(p.shape) ** 0.5
                p.add_(orthogonalize(update), alpha=-group["lr"] * scale)


def orthogonalize(x: Tensor) -> Tensor:
    """Evens out the singular values of a matrix (N, M), in the fast precision of its device: after
    two polynomials most lie between 1 and 2. Returns (N, M)."""
    is_bf16 = choose_precision(x.device) is torch.bfloat16
    y = x.to(torch.bfloat16 if is_bf16 else torch.float32)
    if is_tall := len(x) > x.shape[1]:
        y = y.T
    y = y / (MARGIN * y.norm()).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if is_tall else y


def set_sparse_tables(model: HRMModel, sparse: bool) -> None:
    """Chooses sparse or dense gradients for the n-gram embeddings. Sparse ones are much faster on
    one device, but NCCL cannot sum them and MPS does not have them."""
    for module in model.modules():
        if isinstance(module, NgramEmbedding):
            module.table.sparse = sparse


def build_optimizers(
    parameters: Parameters, options: TrainConfig, sparse: bool = True
) -> list[Optimizer]:
    """Builds the optimizers. Only the matrices in the blocks have weight decay. Each parameter
    group has a ``scale``, its learning rate in units of ``lr``.

    Args:
        sparse: whether the n-gram embeddings have sparse gradients.
    """
    blocks = {"params": parameters.blocks, "scale": 1.0, "weight_decay": options.weight_decay}
    rest = {"params": parameters.rest, "scale": 1.0, "weight_decay": 0.0}
    tables = {"params": parameters.tables, "scale": NGRAM_LR}
    optimizers: list[Optimizer] = []
    if options.optimizer == "muon":
        optimizers += [Muon([blocks])]
    adamw_groups = [rest] if options.optimizer == "muon" else [blocks, rest]
    optimizers += [AdamW(adamw_groups, betas=BETAS, fused=True)]
    if parameters.tables and sparse:
        optimizers += [SparseAdam([tables], betas=BETAS)]
    elif parameters.tables:
        optimizers += [AdamW([tables], betas=BETAS, weight_decay=0.0)]
    return optimizers


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
