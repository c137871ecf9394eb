"""Bits per byte on held-out text after so many minutes, beside other small tools.

    pip install '.[bench]'
    python tests/benchmarks/peers.py corpus.txt held_out.txt --minutes 1 10

The peer is a Hugging Face Llama with as many weights in its matrices, cross attention aside (as
many layers as Planner and Executor together), bytes as tokens, the same windows and batches, bf16
where the machine has it, and AdamW with a cosine schedule at each of ``--peer_lrs``; its best
counts. Both are scored by the same windows. PPMd (order 12) and xz code the held-out text after the
corpus.
"""

import argparse
import lzma
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyppmd
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hrm_esp.config import SIZES, HRMConfig, PretrainConfig
from hrm_esp.data import Batch, LMDataset, load_stream
from hrm_esp.decoding import window_start
from hrm_esp.device import autocast, choose_device, choose_precision, keep_freed_memory
from hrm_esp.evaluation import scoring_windows
from hrm_esp.tokenizer import PAD, VOCAB_SIZE
from hrm_esp.training import train_lm

Row = tuple[str, float, int, float]  # name, minutes, bytes seen, bits per byte


def ours(args: argparse.Namespace, minutes: float, seed: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        options = PretrainConfig(minutes=minutes, seed=seed, out_dir=folder)
        result = train_lm(args.corpus, HRMConfig(**SIZES[args.size]), options, val=args.held_out)
    assert result.score is not None
    return "HRM-ESP", minutes, result.bytes_seen, result.score.bits_per_byte


def llama(config: HRMConfig, **changes: object) -> LlamaForCausalLM:
    """As many layers as Planner and Executor together: as many weights in its matrices."""
    keywords = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_mult * config.d_model,
        "num_hidden_layers": config.n_layers_enc + config.n_layers_dec,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": config.max_len,
    }
    return LlamaForCausalLM(LlamaConfig(**keywords | changes))


class Peer:
    """The Llama, its training and its scoring."""

    def __init__(self, size: str, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        config = HRMConfig(**SIZES[size])
        self.max_len, self.lr = config.max_len, lr
        self.device = choose_device()
        self.dtype = choose_precision(self.device, "auto")
        self.model = llama(config, use_cache=False).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def nats(self, batch: Batch) -> torch.Tensor:
        batch = batch.to(self.device)
        padded = batch.y_in.masked_fill(batch.y_in == PAD, 0)  # on the right: changes nothing
        with autocast(self.device, self.dtype):
            logits = self.model(padded).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.y_out.flatten(), ignore_index=PAD, reduction="sum"
        )

    def train(self, stream: np.ndarray, minutes: float, batch_size: int = 8) -> int:
        """Returns the bytes seen."""
        data, seen, begin = LMDataset(stream, self.max_len), 0, time.perf_counter()
        self.model.train()
        for step, batch in enumerate(forever(data, batch_size)):
            progress = (time.perf_counter() - begin) / (60 * minutes)
            if progress >= 1:
                break
            warm, fall = min(1, (step + 1) / 50), 0.1 + 0.9 * math.cos(progress * math.pi / 2)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm * fall
            self.step(batch)
            seen += batch.y_out.numel()
        return seen

    def step(self, batch: Batch) -> None:
        (self.nats(batch) / batch.y_out.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def score(self, stream: np.ndarray) -> float:
        self.model.eval()
        last = window_start(len(stream), self.max_len)
        starts = range(0, last + 1, self.max_len - self.max_len // 2)
        nats = sum(
            self.nats(scoring_windows(stream, self.max_len, starts[i : i + 16])).item()
            for i in range(0, len(starts), 16)
        )
        return nats / math.log(2) / len(stream)


def forever(data: LMDataset, batch_size: int) -> Iterator[Batch]:
    for epoch in range(10**9):
        for _, batch in data.batches(lambda: (batch_size, 1), 0, epoch):
            yield batch


def peer(args: argparse.Namespace, minutes: float, lr: float, seed: int) -> Row:
    other = Peer(args.size, lr, seed)
    seen = other.train(load_stream([args.corpus]), minutes)
    return f"Llama, lr {lr:g}", minutes, seen, other.score(load_stream([args.held_out]))


def compressors(corpus: bytes, held_out: bytes) -> Iterator[Row]:
    def xz(data: bytes) -> int:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**28}]
        return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))

    def ppmd(data: bytes) -> int:
        return len(pyppmd.compress(data, max_order=12, mem_size=512 << 20, variant="H"))

    for name, size in (("PPMd, order 12", ppmd), ("xz -9e", xz)):
        begin = time.perf_counter()
        bits = 8 * (size(corpus + held_out) - size(corpus)) / len(held_out)
        yield name, (time.perf_counter() - begin) / 60, len(corpus), bits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("held_out")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--peer_minutes", type=float, nargs="+", default=[10.0])
    parser.add_argument("--peer_lrs", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if choose_device().type == "cpu":
        keep_freed_memory()  # for both
    rows = list(compressors(bytes(load_stream([args.corpus])), bytes(load_stream([args.held_out]))))
    for seed in range(args.seeds):
        jobs = [(ours, (m, seed)) for m in args.minutes]
        others = [(peer, (m, lr, seed)) for m in args.peer_minutes for lr in args.peer_lrs]
        for i in range(max(len(jobs), len(others))):  # alternating
            for queue in (jobs, others):
                if i < len(queue):
                    run, options = queue[i]
                    rows.append(run(args, *options))  # type: ignore[operator]
                    print(rows[-1], flush=True)
    print(f"\nsize {args.size}; {os.cpu_count()} CPUs, {platform.machine()}, {choose_device()}")
    print("| model | minutes | bytes seen | bytes/s | bits per byte |\n| - | - | - | - | - |")
    for name, minutes, seen, bits in sorted(rows, key=lambda row: row[3]):
        print(f"| {name} | {minutes:.2g} | {seen:,} | {seen / minutes / 60:,.0f} | {bits:.3f} |")


if __name__ == "__main__":
    main()
