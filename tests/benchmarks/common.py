"""What several benchmarks share: arguments, timing, models and trainers."""

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm_esp import HRMConfig, HRMModel, PretrainConfig, Trainer
from hrm_esp.data import ByteStream, LMDataset


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help keeps the line breaks of a docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def machine() -> str:
    """Describes this machine, for the line above a table."""
    return f"{os.cpu_count()} CPUs, {platform.machine()}"


class Timing(NamedTuple):
    """Duration and result of one call."""

    seconds: float
    result: Any


def time_call(call: Callable[[], object]) -> Timing:
    """Calls a function and waits until the GPU is done, too."""
    begin = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - begin, result)


def time_alternately(
    calls: dict[str, Callable[[int], object]], repeats: int, n_warmup: int = 0
) -> dict[str, list[Timing]]:
    """Times functions in turn, so that all of them run while the machine is equally busy.

    Args:
        calls: each takes the index of the repeat.
        n_warmup: repeats that come first and are not returned.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in calls}
    for i in range(n_warmup + repeats):
        for name, call in calls.items():
            timings[name].append(time_call(lambda call=call, i=i: call(max(0, i - n_warmup))))
    return {name: values[n_warmup:] for name, values in timings.items()}


def count_flops(call: Callable[[], object]) -> int:
    """Counts the floating-point operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def new_model(
    config: HRMConfig, stream: ByteStream, seed: int = 0, ngram_cache: Path | None = None
) -> HRMModel:
    """Builds a model with the n-gram counts of a stream.

    Args:
        ngram_cache: file that keeps the counts for the next model.
    """
    torch.manual_seed(seed)
    model = HRMModel(config)
    if model.executor.ngrams is not None:
        model.executor.ngrams.table.build(stream, ngram_cache)
    return model


def new_trainer(model: HRMModel, stream: ByteStream, options: PretrainConfig) -> Trainer:
    """Builds a trainer that pretrains on a stream, without validation."""
    config = model.config
    data = LMDataset(
        stream, config.max_len, options.planner_input, config.preceding_len, options.denoise
    )
    model.train()
    return Trainer(model, data, options, stage="pretrain", data_id="")
