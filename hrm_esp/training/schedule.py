"""Schedules of the learning rate, and of the size of windows and batches."""

from __future__ import annotations

import torch

from ..config import (
    CPU_BATCH,
    CPU_PAIRS,
    GPU_BATCH,
    GPU_PAIRS,
    WIDE,
    WIDE_GPU_BATCH,
    FinetuneConfig,
    HRMConfig,
    PretrainConfig,
    TrainConfig,
)

CPU = torch.device("cpu")

# (end of the phase as a fraction of the run, divisor of the batch size, parts of each window). With
# (0.35, 4, 4) a batch has as many rows as at the end, and each a quarter of the length. On a GPU a
# smaller batch takes hardly less time, so there it keeps its size.
GROWTH = ((0.35, 4, 4), (0.8, 2, 2))


def learning_rate(options: TrainConfig, step: int, progress: float) -> float:
    """Returns the learning rate: warmup, stable, linear decay (Hu et al. 2024, section 4.1).

    Args:
        progress: fraction of the run that is done, 0 to 1.
    """
    warmup = min(1.0, (step + 1) / max(1, options.warmup))
    decay = min(1.0, (1 - progress) / options.decay) if options.decay else 1.0
    return options.lr * warmup * max(0.0, decay)


def choose_batch_size(options: TrainConfig, config: HRMConfig, device: torch.device) -> int:
    """Returns the size of a batch; options may leave it to the device."""
    if options.batch_size is not None:
        return options.batch_size
    is_gpu = device.type == "cuda"
    if isinstance(options, FinetuneConfig):
        return GPU_PAIRS if is_gpu else CPU_PAIRS
    if not is_gpu:
        return CPU_BATCH
    return GPU_BATCH if config.d_model < WIDE else WIDE_GPU_BATCH


def batch_shape(
    options: TrainConfig,
    max_len: int,
    progress: float,
    n_processes: int = 1,
    device: torch.device = CPU,
) -> tuple[int, int]:
    """Returns the windows of a batch, of all processes together, and into how many each is split.

    Short windows in small batches come first (Li et al. 2022): most of what is local is learned
    from them in a fraction of the time.
    """
    assert options.batch_size is not None  # see choose_batch_size
    batch_size = options.batch_size * n_processes
    if isinstance(options, PretrainConfig) and options.grow:
        for until, divisor, n_splits in GROWTH:
            if progress < until and max_len % n_splits == 0:
                divisor = 1 if device.type == "cuda" else divisor
                return max(n_processes, batch_size // divisor), n_splits
    return batch_size, 1
