"""What the parts of gpu_check.py share."""

import collections
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import common
import numpy as np
import torch

import hrm_esp
from hrm_esp import SIZES, HRMConfig, HRMModel, PretrainConfig, Trainer, dataset_tsv
from hrm_esp.data import Batch, ByteStream, LMDataset, Pair, TSVDataset

SAMPLES = Path(hrm_esp.__file__).parent / "samples"
ORDER = 5  # of the random text


class Check:
    """Settings, folders and verdicts of one run of the check.

    Args:
        seconds: time limit.
        quick: few steps and small models, and no time limit.
    """

    def __init__(self, device: torch.device, seconds: float, quick: bool) -> None:
        self.begin = time.perf_counter()
        self.device, self.quick = device, quick
        self.seconds = math.inf if quick else seconds
        self.is_cuda = device.type == "cuda"
        self.root = Path.cwd()
        self._temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.work = Path(self._temporary.name)  # deleted at the end
        self.out = Path(os.environ.get("OUT") or tempfile.mkdtemp())
        self.verdicts: list[str] = []

    def seconds_used(self) -> float:
        return time.perf_counter() - self.begin

    def seconds_left(self) -> float:
        return self.seconds - self.seconds_used()

    def synchronize(self) -> None:
        """Waits until the GPU is done."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def mean_seconds(self, call: Callable[[], object], n: int) -> float:
        """Returns the mean time of n calls, after two that are not counted."""
        for _ in range(2):
            call()
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(n):
            call()
        self.synchronize()
        return (time.perf_counter() - begin) / n

    def verdict(self, is_ok: bool, text: str) -> None:
        self.verdicts.append(f"{'OK ' if is_ok else 'BAD'} {text}")
        print(self.verdicts[-1], flush=True)

    @cached_property
    def stream(self) -> ByteStream:
        """Random text: a Markov chain of order 5 trained on the bundled stories. Its table of
        n-grams is as large as that of a book."""
        text, rng = (SAMPLES / "cuentos.txt").read_bytes(), random.Random(0)
        continuations = collections.defaultdict(list)
        for i in range(len(text) - ORDER):
            continuations[text[i : i + ORDER]].append(text[i + ORDER])
        output = bytearray(text[:ORDER])
        while len(output) < (100_000 if self.quick else 2_000_000):
            output.append(rng.choice(continuations.get(bytes(output[-ORDER:])) or text))
        return np.frombuffer(bytes(output), dtype=np.uint8)

    def starts(self, n: int, seed: int = 0) -> np.ndarray:
        """Draws where n windows of the text start."""
        return np.random.default_rng(seed).integers(len(self.stream), size=n)

    def new_model(self, config: HRMConfig) -> HRMModel:
        """Builds a model on the CPU."""
        return common.new_model(config, self.stream, ngram_cache=self.work / "ngrams.counts")

    def new_trainer(self, size: str, batch_size: int) -> Trainer:
        """Builds a trainer for steps in bfloat16, with cross-attention."""
        model = self.new_model(HRMConfig(**SIZES[size], cross_attention=True)).to(self.device)
        options = PretrainConfig(
            steps=10**6, out_dir=str(self.work / "trainer"), precision="bf16", batch_size=batch_size
        )
        return common.new_trainer(model, self.stream, options)

    def start_command(self, *words: object) -> subprocess.Popen[str]:
        """Starts the command ``hrm-esp``."""
        return self.start_python("-m", "hrm_esp", *words)

    def start_python(self, *words: object, folder: Path | None = None) -> subprocess.Popen[str]:
        """Starts a Python process in ``folder``, by default the folder for temporary files."""
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=folder or self.work,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "2"},
        )


def read_output(process: subprocess.Popen[str], seconds: float) -> str:
    """Waits for a process and returns its output; kills it after some seconds."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + "\nTIMEOUT"


def corrupted_batch(data: LMDataset, starts: np.ndarray) -> Batch:
    """Returns a batch of corrupted lines from the windows at ``starts``."""
    return data.corrupted(starts, 1, np.random.default_rng(0))


def example_batches(check: Check, config: HRMConfig, n: int = 4) -> dict[str, Batch]:
    """Returns a batch of each kind, of n windows or 41 pairs."""
    data = LMDataset(check.stream, config.max_len, preceding_len=config.preceding_len)
    starts = check.starts(n)
    rows = list(dataset_tsv(SAMPLES / "numeros.tsv", config.max_len))[:40]
    rows += [Pair(b"solo texto", b"solo texto", lm=True)]
    return {
        "text": data.windows(starts),
        "short text": data.windows(starts, 4),
        "corrupted text": corrupted_batch(data, starts),
        "pairs": TSVDataset(rows, config.max_len).collate(rows),
    }


def small_config(**changes: object) -> HRMConfig:
    """Returns a small model without randomness in its training, the codebook aside."""
    config = HRMConfig(
        d_model=64,
        n_heads=2,
        n_layers_enc=2,
        n_layers_dec=2,
        max_len=64,
        plan_dim=32,
        n_plan_codes=8,
        recent_len=300,
        cross_attention=True,
    )
    return replace(config, **changes)


@torch.no_grad()
def randomize(model: HRMModel, std: float) -> HRMModel:
    """Adds noise to all weights: weights that start at zero would hide errors."""
    for parameter in model.parameters():
        parameter += std * torch.randn_like(parameter)
    return model


def gradients(model: HRMModel) -> dict[str, torch.Tensor]:
    """Returns a copy of the gradients of a model."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the norm of a - b relative to the norm of b."""
    a, b = (x.detach().to("cpu", torch.float64) for x in (a, b))
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
