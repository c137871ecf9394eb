"""Bits per byte on held-out text after some minutes of training, beside other small tools.

    pip install '.[bench]'
    python tests/benchmarks/peers.py corpus.txt held_out.txt --minutes 1 10

The Llama is Hugging Face's, of the same size, with bytes as tokens, the same windows and batches,
the same precision, and AdamW with a cosine schedule; it is trained once with each learning rate of
``--llama_lrs``. HRM-ESP and the Llama are scored in the same windows. PPMd (order 12) and xz
compress the held-out text after the corpus.
"""

import argparse
import lzma
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pyppmd
import torch
from common import machine, new_parser
from llama import LlamaTrainer

from hrm_esp.config import SIZES, HRMConfig, PretrainConfig
from hrm_esp.data import Batch, LMDataset, load_stream
from hrm_esp.device import choose_device, choose_precision, keep_freed_memory
from hrm_esp.evaluation.scoring import scoring_windows
from hrm_esp.generation import window_start, window_stride
from hrm_esp.training import train_lm
from hrm_esp.training.pretrain import FINAL_VAL_BYTES

BATCH_SIZE = 8  # windows
WARMUP_STEPS = 50
MIN_LR = 0.1  # at the end of the cosine schedule, relative to the peak


class Row(NamedTuple):
    """A row of the table."""

    name: str
    minutes: float
    bytes_seen: int
    bits_per_byte: float


def run_hrm(args: argparse.Namespace, minutes: float, seed: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        options = PretrainConfig(minutes=minutes, seed=seed, out_dir=folder)
        result = train_lm(args.corpus, HRMConfig(**SIZES[args.size]), options, val=args.held_out)
    assert result.score is not None
    return Row("HRM-ESP", minutes, result.bytes_seen, result.score.bits_per_byte)


def run_llama(args: argparse.Namespace, minutes: float, lr: float, seed: int) -> Row:
    config, device = HRMConfig(**SIZES[args.size]), choose_device()
    trainer = LlamaTrainer(config, lr, device, choose_precision(device), seed)
    data = LMDataset(load_stream([args.corpus]), config.max_len)
    bytes_seen = train_llama(trainer, data, lr, minutes)
    held_out = load_stream([args.held_out])[:FINAL_VAL_BYTES]
    return Row(
        f"Llama, lr {lr:g}", minutes, bytes_seen, score_llama(trainer, held_out, config.max_len)
    )


def train_llama(trainer: LlamaTrainer, data: LMDataset, lr: float, minutes: float) -> int:
    """Trains for some minutes. Returns the bytes seen."""
    bytes_seen, begin = 0, time.perf_counter()
    for step, batch in enumerate(endless_batches(data)):
        progress = (time.perf_counter() - begin) / (60 * minutes)
        if progress >= 1:
            break
        warmup = min(1, (step + 1) / WARMUP_STEPS)
        decay = MIN_LR + (1 - MIN_LR) * math.cos(progress * math.pi / 2)
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr * warmup * decay
        trainer.train_step(batch)
        bytes_seen += batch.y_out.numel()
    return bytes_seen


def endless_batches(data: LMDataset) -> Iterator[Batch]:
    """Yields full batches, epoch after epoch."""
    for epoch in range(10**9):
        for _, batch in data.batches(lambda: (BATCH_SIZE, 1), 0, epoch):
            yield batch


@torch.inference_mode()
def score_llama(trainer: LlamaTrainer, stream: np.ndarray, max_len: int) -> float:
    """Returns the bits per byte of a stream."""
    trainer.model.eval()
    starts = range(0, window_start(len(stream), max_len) + 1, window_stride(max_len))
    nll = sum(
        trainer.nll(scoring_windows(stream, max_len, starts[i : i + 16])).item()
        for i in range(0, len(starts), 16)
    )
    return nll / math.log(2) / len(stream)


def xz_size(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**28}]
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))


def ppmd_size(data: bytes, max_order: int = 12, megabytes: int = 512) -> int:
    return len(pyppmd.compress(data, max_order=max_order, mem_size=megabytes << 20, variant="H"))


def run_compressor(
    args: argparse.Namespace, name: str, compressed_size: Callable[[bytes], int]
) -> Row:
    corpus = bytes(load_stream([args.corpus]))
    held_out = bytes(load_stream([args.held_out])[:FINAL_VAL_BYTES])
    begin = time.perf_counter()
    n_bytes = compressed_size(corpus + held_out) - compressed_size(corpus)
    minutes = (time.perf_counter() - begin) / 60
    return Row(name, minutes, len(corpus), 8 * n_bytes / len(held_out))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus")
    parser.add_argument("held_out")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--llama_minutes", type=float, nargs="+", default=[10.0])
    parser.add_argument("--llama_lrs", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if choose_device().type == "cpu":
        keep_freed_memory()  # as HRM-ESP does: it makes both faster
    jobs: list[Callable[[], Row]] = [
        partial(run_compressor, args, "PPMd, order 12", ppmd_size),
        partial(run_compressor, args, "xz -9e", xz_size),
    ]
    for seed in range(args.seeds):
        ours = [partial(run_hrm, args, m, seed) for m in args.minutes]
        llamas = [
            partial(run_llama, args, m, lr, seed)
            for m in args.llama_minutes
            for lr in args.llama_lrs
        ]
        for i in range(max(len(ours), len(llamas))):  # in turn
            jobs += ours[i : i + 1] + llamas[i : i + 1]
    rows = []
    for job in jobs:
        rows.append(job())
        print(rows[-1], flush=True)
    print(f"\nsize {args.size}; {machine()}, {choose_device()}")
    print("| model | minutes | bytes seen | bytes/s | bits per byte |")
    print("| --- | --- | --- | --- | --- |")
    for name, minutes, n, bits in sorted(rows, key=lambda row: row.bits_per_byte):
        print(f"| {name} | {minutes:.2g} | {n:,} | {n / minutes / 60:,.0f} | {bits:.3f} |")


if __name__ == "__main__":
    main()
