"""Parts of gpu_check.py: how fast training is, and where the time goes."""

import collections
import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import count_flops
from gpu_common import Check, corrupted_batch

from hrm_esp import Trainer
from hrm_esp.data import Batch, LMDataset
from hrm_esp.device import autocast, choose_device, choose_precision
from hrm_esp.training import loss

Step = Callable[[list[Batch], list[Batch]], object]  # takes the batches of the next step, too
PEAK_FLOPS = 989e12  # per second, dense bfloat16: datasheet of the H100 and the H200


def env(check: Check) -> None:
    """Prints versions, and the speed of products, copies and kernel launches."""
    print(f"torch {torch.__version__}, python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
    print(f"choose_device: {choose_device()}, choose_precision: {choose_precision(check.device)}")
    if not check.is_cuda:
        return
    print(
        torch.cuda.get_device_name(check.device),
        torch.cuda.get_device_capability(check.device),
        "NCCL",
        torch.cuda.nccl.version(),
    )
    n = 8192
    a, b = (torch.randn(n, n, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = check.mean_seconds(lambda: a @ b, 10)
    print(f"bfloat16 products: {2 * n**3 / seconds / 1e12:.0f} TFLOP/s")
    block = torch.empty(2**30, dtype=torch.uint8, device=check.device)
    seconds = check.mean_seconds(block.clone, 10)
    print(f"copies: {2 * 2**30 / seconds / 1e12:.2f} TB/s read and written")
    x = torch.zeros(8, device=check.device)
    check.synchronize()
    begin = time.perf_counter()
    for _ in range(3000):
        x.add_(1)
    seconds = time.perf_counter() - begin  # without waiting for the GPU
    print(f"launch of an operation from Python: {seconds / 3000 * 1e6:.1f} us")


def windows(trainer: Trainer, check: Check, n: int, seed: int = 0) -> Batch:
    """Returns a batch of n windows of plain text."""
    assert isinstance(trainer.data, LMDataset)
    return trainer.data.windows(check.starts(n, seed))


def corrupted(trainer: Trainer, check: Check, n: int) -> Batch:
    """Returns a batch of corrupted lines of n windows."""
    assert isinstance(trainer.data, LMDataset)
    return corrupted_batch(trainer.data, check.starts(n))


def waits(check: Check) -> None:
    """Prints the source lines of a step at which the CPU waits for the GPU."""
    size, n = ("tiny", 2) if check.quick else ("small", 8)
    trainer = check.new_trainer(size, n)
    for name, batch in (
        ("text", windows(trainer, check, n)),
        ("corrupted text", corrupted(trainer, check, n)),
    ):
        trainer.train_step([batch])
        check.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if check.is_cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train_step([batch])
            finally:
                if check.is_cuda:
                    torch.cuda.set_sync_debug_mode("default")
        lines = collections.Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
        )
        print(f"waits in a step of {name}: {sum(lines.values())}:", dict(lines.most_common(14)))


def speed(check: Check) -> None:
    """Prints bytes per second by model and batch size, beside a Llama of the same size. Batches are
    made beforehand."""
    print("| model | batch | ms per step | bytes/s | MFU | memory, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    plan = {"small": (8, 32, 64, 128, 256), "base": (8, 32, 64, 128), "tiny": (8, 64)}
    for size, batch_sizes in ({"tiny": (2,)} if check.quick else plan).items():
        print_speeds(check, size, batch_sizes)
        if check.is_cuda:
            torch.cuda.empty_cache()
    trainer = check.new_trainer("tiny", 8)
    for n in (2,) if check.quick else (8, 64, 256):
        seconds = [
            check.mean_seconds(lambda n=n, make=make: make(trainer, check, n), 1)
            for make in (windows, corrupted)
        ]
        text_ms, corrupted_ms = (1e3 * s for s in seconds)
        print(
            f"making a batch of {n} on the CPU: text {text_ms:.1f} ms, "
            f"corrupted text {corrupted_ms:.1f} ms"
        )


def print_speeds(check: Check, size: str, batch_sizes: tuple[int, ...]) -> None:
    """Prints the rows of one model size."""
    from llama import LlamaTrainer  # needs transformers

    trainer = check.new_trainer(size, 8)
    llama = LlamaTrainer(trainer.model.config, 1e-3, check.device, torch.bfloat16)
    example = windows(trainer, check, 1)
    n_bytes = example.y_out.numel()

    def hrm_nll() -> torch.Tensor:
        with autocast(check.device, trainer.dtype):
            return loss(trainer.model, example.to(check.device)).total

    models: dict[str, tuple[Step, float]] = {
        f"HRM-ESP {size}": (
            lambda batch, following: trainer.train_step(batch, following),
            count_flops(lambda: hrm_nll().backward()) / n_bytes,
        ),
        f"Llama {size}": (
            lambda batch, following: llama.train_step(*batch),
            count_flops(lambda: llama.nll(example).backward()) / n_bytes,
        ),
    }
    for n in batch_sizes:
        if check.seconds_left() < 60:
            return
        batches = [windows(trainer, check, n, seed) for seed in range(3)]
        for name, (step, flops_per_byte) in models.items():
            print_speed(check, name, n, step, batches, flops_per_byte)
    if size == "small":
        for n in (8, 64):
            batch = corrupted(trainer, check, n)
            step = models["HRM-ESP small"][0]
            print_speed(check, "HRM-ESP small, corrupted text", n, step, [batch], None)


def print_speed(
    check: Check,
    name: str,
    batch_size: int,
    step: Step,
    batches: list[Batch],
    flops_per_byte: float | None,
) -> None:
    """Times steps on some batches, and prints a row."""
    steps = [[batch] for batch in batches]
    pairs = itertools.pairwise(itertools.cycle(steps))
    try:
        if check.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = check.mean_seconds(lambda: step(*next(pairs)), 2 if check.quick else 12)
    except torch.OutOfMemoryError:
        print(f"| {name} | {batch_size} | out of memory | | | |", flush=True)
        torch.cuda.empty_cache()
        return
    bytes_per_second = batches[0].n_targets / seconds
    mfu = "" if flops_per_byte is None else f"{flops_per_byte * bytes_per_second / PEAK_FLOPS:.1%}"
    memory = torch.cuda.max_memory_allocated() / 1e9 if check.is_cuda else 0.0
    print(
        f"| {name} | {batch_size} | {seconds * 1e3:.1f} | {bytes_per_second:,.0f} | {mfu} "
        f"| {memory:.1f} |",
        flush=True,
    )


def where(check: Check) -> None:
    """Prints the time of the parts of a step, by the clock and by the profiler."""
    for size, n in [("tiny", 2)] if check.quick else [("small", 8), ("small", 64), ("base", 32)]:
        trainer = check.new_trainer(size, n)
        batch = windows(trainer, check, n)
        trainer.train_step([batch])
        seconds = time_parts(check, trainer, batch)
        print(f"{size}, batch {n}, ms:", {k: round(1e3 * v, 2) for k, v in seconds.items()})
        profile_step(check, trainer, batch, seconds["step"], f"trace_{size}_{n}.json.gz")


def time_parts(check: Check, trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Returns the seconds of the parts of a step."""
    repeats = 2 if check.quick else 8
    model, on_device = trainer.model, batch.to(check.device)
    ngrams = model.executor.ngrams
    assert ngrams is not None

    def forward() -> torch.Tensor:
        with autocast(check.device, trainer.dtype):
            return loss(model, on_device).total

    def forward_backward() -> None:
        forward().backward()
        model.zero_grad()

    seconds = {
        "step": check.mean_seconds(lambda: trainer.train_step([batch]), repeats),
        "forward": check.mean_seconds(forward, repeats),
        "forward and backward": check.mean_seconds(forward_backward, repeats),
    }
    window = on_device.y_in, on_device.y_out, on_device.preceding_ids
    seconds["n-gram lookup"] = check.mean_seconds(
        lambda: ngrams.lookup(*window, leave_one_out=True), repeats
    )
    for _ in range(3):  # the last one counts
        forward().backward()
        for optimizer in trainer.optimizers:
            check.synchronize()
            begin = time.perf_counter()
            optimizer.step()
            check.synchronize()
            seconds[type(optimizer).__name__] = time.perf_counter() - begin
        model.zero_grad()
    return seconds


def profile_step(check: Check, trainer: Trainer, batch: Batch, step: float, trace: str) -> None:
    """Profiles a step: prints its kernels and writes a trace. ``step`` is its time in seconds."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * check.is_cuda
    with profile(activities=activities) as profiler:
        trainer.train_step([batch])
        check.synchronize()
    events = profiler.key_averages()
    kernels = [e for e in events if str(e.device_type).endswith("CUDA")]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    calls = {
        name: sum(e.count for e in events if name in e.key)
        for name in ("LaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaMemsetAsync")
    }
    print(f"  kernels take {1e3 * busy:.2f} ms, {busy / step:.0%} of the step; calls: {calls}")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:12]:
        print(f"    {e.self_device_time_total / 1e3:7.3f} ms {e.count:4d} x {e.key[:110]}")
    if check.is_cuda:
        profiler.export_chrome_trace(str(check.out / trace))


def compiled(check: Check) -> None:
    """Prints how long torch.compile takes, and how fast steps of plain text are then, beside a
    compiled Llama."""
    from llama import LlamaTrainer  # needs transformers

    print("| model, compiled | batch | ms per step | bytes/s | MFU | memory, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size, n in [("tiny", 2)] if check.quick else [("small", 64), ("small", 128), ("base", 64)]:
        trainer = check.new_trainer(size, n)
        backend = "eager" if check.quick else "inductor"
        for block in (*trainer.model.planner.blocks, *trainer.model.executor.blocks):
            block.compile(backend=backend)
        llama = LlamaTrainer(trainer.model.config, 1e-3, check.device, torch.bfloat16)
        llama.model.compile(backend=backend)
        batches = [windows(trainer, check, n, seed) for seed in range(3)]
        steps: dict[str, Step] = {
            f"HRM-ESP {size}": lambda batch, following, step=trainer.train_step: step(
                batch, following
            ),
            f"Llama {size}": lambda batch, following, step=llama.train_step: step(*batch),
        }
        for name, step in steps.items():
            begin = time.perf_counter()
            step(batches[:1], batches[1:2])
            check.synchronize()
            print(f"{name}: first step {time.perf_counter() - begin:.0f} s")
            print_speed(check, name, n, step, batches, None)
