"""Optimizers: Muon for the matrices in the blocks, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ..config import TrainConfig
from ..device import choose_precision
from ..model import HRMModel

BETAS = (0.9, 0.95)
# Coefficients of the polynomials a x + b x^3 + c x^5 of Polar Express (Amsel et al. 2025, algorithm
# 1), which even out singular values. More than two take longer and improve nothing.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
)
MARGIN = 1.02  # keeps singular values below one after rounding: above one they would grow


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


def build_optimizers(model: HRMModel, options: TrainConfig) -> list[Optimizer]:
    """Builds the optimizers. Only the matrices in the blocks have weight decay."""
    parts = (model.planner, model.executor)
    matrices = [p for part in parts for p in part.blocks.parameters() if p.ndim == 2]
    is_matrix = set(map(id, matrices))
    blocks = {"params": matrices, "weight_decay": options.weight_decay}
    rest = {
        "params": [p for p in model.parameters() if id(p) not in is_matrix],
        "weight_decay": 0.0,
    }
    if options.optimizer == "muon":
        return [Muon([blocks]), AdamW([rest], betas=BETAS, fused=True)]
    return [AdamW([blocks, rest], betas=BETAS, fused=True)]


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
