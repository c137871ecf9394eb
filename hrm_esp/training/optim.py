"""Optimizers: Muon for the matrices in the blocks, AdamW for the rest."""

from __future__ import annotations

import math
from collections import defaultdict

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
            # Step 1: momentum (Nesterov) and weight decay.
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            # Step 2: orthogonalize, on a GPU all matrices of a shape at once: starting an operation
            # takes longer than most of these. On a CPU batched products of large matrices are slow.
            same_shape: dict[object, list[int]] = defaultdict(list)
            for i, p in enumerate(params):
                same_shape[p.shape if p.is_cuda else i].append(i)
            for indices in same_shape.values():
                chosen, of_shape = [params[i] for i in indices], [updates[i] for i in indices]
                x = torch.stack(of_shape) if len(indices) > 1 else of_shape[0]
                # Contiguous, as the weights are: otherwise they would be added one by one.
                x = orthogonalize(x).to(chosen[0].dtype).contiguous()
                scale = 0.2 * max(chosen[0].shape) ** 0.5
                torch._foreach_add_(
                    chosen, list(x) if len(indices) > 1 else [x], alpha=-group["lr"] * scale
                )


def orthogonalize(x: Tensor) -> Tensor:
    """Evens out the singular values of a matrix (N, M), or of each of K matrices (K, N, M), in the
    fast precision of its device: after two polynomials most lie between 1 and 2. Returns the same
    shape."""
    is_bf16 = choose_precision(x.device) is torch.bfloat16
    y = x.to(torch.bfloat16 if is_bf16 else torch.float32)
    if is_tall := x.shape[-2] > x.shape[-1]:
        y = y.mT
    y = y / (MARGIN * torch.linalg.matrix_norm(y, keepdim=True)).clamp(min=1e-7)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in POLAR_EXPRESS:
        gram = y @ y.mT
        y = add_product(y, add_product(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if is_tall else y


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


def clip_gradients(model: HRMModel, max_norm: float) -> Tensor:
    """Scales the gradients down to a norm of at most ``max_norm``, 0 for any. Returns their norm
    before that, ()."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
