"""Parts of gpu_check.py: the commands as a user runs them, and the tests."""

import contextlib
import json
import math
import re
import signal
import subprocess
import time
from pathlib import Path

import torch
from gpu_common import SAMPLES, Check, read_output, relative_error

from hrm_esp import HRMModel, generate_batch, load_model
from hrm_esp.training import load_checkpoint

MAX_BPB, MAX_QUICK_BPB = 3.0, 9.0  # of a run of 0.6 minutes, and of a few steps
MAX_FP32_DIFFERENCE, MAX_BF16_DIFFERENCE = 1e-4, 5e-3  # in bits per byte
# Tests that train or generate in this process or by the command use the GPU if there is one.
TEST_FILES = ("tests/test_training.py", "tests/test_cli.py", "tests/test_generation.py")
TESTS = (
    "files_of_a_run",
    "seed_determines",
    "resumed_equals",
    "finetuning_starts",
    "accumulated",
    "not_finite",
    "mixed_precision",
    "best_checkpoint",
    "three_jobs",
    "python_api",
    "greedy_text",
    "same_in_a_batch",
    "a_stream",
)
BITWISE_TEST = "resumed_equals_uninterrupted"  # on a GPU sums have no fixed order
QUICK_TEST = "accumulated"


def runs(check: Check) -> None:
    """Runs all commands: training in three precisions side by side, an interrupted and resumed run,
    finetuning, scores, and the speed of generation."""
    precisions = ["fp32"] if check.quick else ["bf16", "fp16", "fp32"]
    processes = start_pretraining(check, precisions)
    if interrupt(check, processes["interrupted"]):
        processes["interrupted"] = start_pretrain(
            check, "interrupted", *step_flags(check), "--resume"
        )
    else:
        del processes["interrupted"]
    for name, process in processes.items():
        report_pretraining(check, name, process)
    if "interrupted" in processes:
        compare_resumed(check)
    best = check.work / precisions[0] / "pretrain_best.pt"
    finetuning = {
        context: check.start_command(
            "finetune", "--ckpt", best, "--context", context, "--out_dir", f"finetune_{context}",
            "--minutes", minutes(check), "--device", check.device,
        )
        for context in ("cross_attention", "plan")
    }  # fmt: skip
    compare_scores(check, best)
    for context, process in finetuning.items():
        report_finetuning(check, context, process)
    tuned = check.work / "finetune_cross_attention" / "finetune_best.pt"
    process = check.start_command(
        "generate", "--ckpt", tuned, "--prompt", "4827", "--device", check.device
    )
    print("4827 ->", read_output(process, 60).strip()[-200:])
    print_generation_speed(check, best)


def minutes(check: Check) -> float:
    return 0.05 if check.quick else 0.6


def step_flags(check: Check) -> tuple[object, ...]:
    """Returns the flags of the runs that are compared bit for bit."""
    return "--size", "tiny", "--steps", 12 if check.quick else 1500


def start_pretrain(check: Check, folder: str, *flags: object) -> subprocess.Popen[str]:
    return check.start_command("pretrain", "--out_dir", folder, "--device", check.device, *flags)


def start_pretraining(check: Check, precisions: list[str]) -> dict[str, subprocess.Popen[str]]:
    """Starts all pretraining runs side by side. Returns them by their folder."""
    timed = ("--size", "tiny" if check.quick else "small", "--minutes", minutes(check))
    return {
        **{p: start_pretrain(check, p, *timed, "--set", f"precision={p}") for p in precisions},
        "no_growth": start_pretrain(
            check, "no_growth", *timed, "--set", "grow=false", "--batch_size", 32
        ),
        "uninterrupted": start_pretrain(check, "uninterrupted", *step_flags(check)),
        "interrupted": start_pretrain(check, "interrupted", *step_flags(check)),
    }


def interrupt(check: Check, process: subprocess.Popen[str]) -> bool:
    """Sends Ctrl-C to a run once it trains. Returns whether it saved its state."""
    deadline = time.perf_counter() + 120
    metrics = check.work / "interrupted" / "metrics.jsonl"
    while not metrics.exists() and time.perf_counter() < deadline:
        time.sleep(0.2)
    time.sleep(2 if check.quick else 6)
    process.send_signal(signal.SIGINT)
    last_line = read_output(process, 60).strip().splitlines()[-1:]
    status = process.returncode
    check.verdict(status in (0, 130), f"Ctrl-C: exit status {status}, {last_line}")
    return status == 130


def parse_result(output: str) -> tuple[float, int]:
    """Returns the held-out score that a command printed, bits per byte or percent of exact match,
    and the bytes seen."""
    scores = re.findall(r"held out: (?:exact match )?([0-9.]+)(?:%| bits| \()", output)
    n_bytes = re.findall(r"([0-9,]+) bytes seen", output)
    score = float(scores[-1]) if scores else math.nan
    return score, int(n_bytes[-1].replace(",", "")) if n_bytes else 0


def report_pretraining(check: Check, name: str, process: subprocess.Popen[str]) -> None:
    output = read_output(process, max(20, min(150, check.seconds_left() - 30)))
    bits, n_bytes = parse_result(output)
    status = process.returncode
    check.verdict(
        status == 0 and bits < (MAX_QUICK_BPB if check.quick else MAX_BPB),
        f"pretrain {name}: exit status {status}, {bits} bits per byte, {n_bytes:,} bytes seen",
    )
    if status:
        print(output[-1500:])


def compare_resumed(check: Check) -> None:
    """Prints how much the resumed run differs from the uninterrupted one."""
    expected, resumed = (
        load_checkpoint(check.work / folder / "pretrain_last.pt").weights
        for folder in ("uninterrupted", "interrupted")
    )
    unequal = [name for name in expected if not torch.equal(expected[name], resumed[name])]
    error, name = max(
        (relative_error(resumed[n], x), n) for n, x in expected.items() if x.is_floating_point()
    )
    print(
        f"resumed and uninterrupted: {len(unequal)} of {len(expected)} tensors differ, by at most "
        f"{error:.1e} ({name})"
    )


def compare_scores(check: Check, checkpoint: Path) -> None:
    """Compares the score of one checkpoint in two precisions and on the CPU."""
    text = check.work / "held_out.txt"
    text.write_bytes((SAMPLES / "cuentos.txt").read_bytes()[-20_000:])
    scores = {}
    for name, flags in {
        "bf16": ("--device", check.device, "--precision", "bf16"),
        "fp32": ("--device", check.device, "--precision", "fp32"),
        "fp32 on the CPU": ("--cpu", "--precision", "fp32"),
    }.items():
        process = check.start_command("evaluate", text, "--ckpt", checkpoint, "--json", *flags)
        lines = read_output(process, 100).strip().splitlines()
        with contextlib.suppress(IndexError, KeyError, ValueError):
            scores[name] = json.loads(lines[-1])["bits_per_byte"]
    print("bits per byte of one checkpoint:", scores)
    if len(scores) < 3:
        check.verdict(False, f"evaluate gave {len(scores)} of 3 scores")
        return
    bf16, fp32, cpu = scores.values()
    check.verdict(
        abs(fp32 - cpu) < MAX_FP32_DIFFERENCE, f"fp32 scores {fp32:.5f}, on the CPU {cpu:.5f}"
    )
    check.verdict(
        abs(bf16 - fp32) < MAX_BF16_DIFFERENCE, f"bf16 scores {bf16:.5f}, fp32 {fp32:.5f}"
    )


def report_finetuning(check: Check, context: str, process: subprocess.Popen[str]) -> None:
    output = read_output(process, max(20, min(120, check.seconds_left() - 20)))
    exact_match, n_bytes = parse_result(output)
    status = process.returncode
    check.verdict(
        status == 0,
        f"finetune --context {context}: exit status {status}, {exact_match}% exact match, "
        f"{n_bytes:,} bytes seen",
    )
    if status:
        print(output[-1500:])


def print_generation_speed(check: Check, checkpoint: Path) -> None:
    """Prints bytes per second of generation, one text and many together."""
    for device in dict.fromkeys((str(check.device), "cpu")):
        model = load_model(checkpoint, device)
        for n_texts, n_bytes in ((1, 200), (16, 100), (64, 60)):
            if check.seconds_left() < 15:
                return
            generate_bytes(model, n_texts, 8)  # warm up
            check.synchronize()
            begin = time.perf_counter()
            n = generate_bytes(model, n_texts, 20 if check.quick else n_bytes)
            speed = n / (time.perf_counter() - begin)
            print(f"generation on {device}, {n_texts} together: {speed:,.0f} bytes/s", flush=True)


def generate_bytes(model: HRMModel, n_texts: int, n_bytes: int) -> int:
    """Generates texts of ``n_bytes`` bytes together. Returns the number of all bytes."""
    completions = generate_batch(
        model, ["El"], num_samples=n_texts, batch_size=n_texts, seed=1, mode="continue",
        min_new_tokens=n_bytes, max_new_tokens=n_bytes, temperature=0.8,
    )  # fmt: skip
    return sum(len(completion.text.encode()) for completion in completions)


def tests(check: Check) -> None:
    """Runs the tests that train and generate."""
    source = "".join((check.root / path).read_text(encoding="utf-8") for path in TEST_FILES)
    unknown = [name for name in TESTS if not re.search(rf"def test_\w*{name}", source)]
    check.verdict(not unknown, f"chosen tests that do not exist: {', '.join(unknown) or 'none'}")
    chosen = QUICK_TEST if check.quick else " or ".join(TESTS)
    if check.is_cuda:
        chosen = f"({chosen}) and not {BITWISE_TEST}"
    process = check.start_python(
        "-m", "pytest", "-n", 2 if check.quick else 12, "-p", "no:cacheprovider",
        *TEST_FILES, "-k", chosen, folder=check.root,
    )  # fmt: skip
    output = read_output(process, max(20, min(90, check.seconds_left() - 10)))
    lines = [
        line[:200]
        for line in output.splitlines()
        if line.startswith(("FAILED", "ERROR")) or " passed" in line or " failed" in line
    ]
    print("\n".join(lines[-25:]) or output[-800:])
    check.verdict(process.returncode == 0, "tests that train and generate")


def two(check: Check) -> None:
    """Starts two processes on one GPU, which NCCL refuses, and prints what the user sees."""
    process = check.start_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hrm_esp",
        "pretrain", "--size", "tiny", "--steps", 2, "--out_dir", "two",
    )  # fmt: skip
    output = read_output(process, 150 if check.quick else 40)
    lines = [
        line
        for line in output.splitlines()
        if "hrm-esp: error" in line or "Duplicate GPU" in line or "Error" in line
    ]
    print("exit status", process.returncode, lines[:4], "TIMEOUT" * output.endswith("TIMEOUT"))
