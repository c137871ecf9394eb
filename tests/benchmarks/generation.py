"""Speed of writing, beside the same model decoded plainly and beside Hugging Face.

    pip install '.[bench]'
    python tests/benchmarks/generation.py checkpoints/pretrain_best.pt [MORE CHECKPOINTS]

For each checkpoint and for 1 and 16 texts at once, in turn: this generator; the model with its
cache alone, one byte a step, its weights as they are; Hugging Face ``generate`` on a Llama with as
many weights in its matrices, in float32. Then the time from the command to the first character and
the peak of memory, beside those of ``import torch``. Medians.
"""

import argparse
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from peers import llama
from transformers import LlamaForCausalLM

from hrm_esp import HRMModel, generate_batch, load_model
from hrm_esp.decoding import decode
from hrm_esp.generation import Settings, new_decoder
from hrm_esp.tokenizer import BOS, EOS, PAD

PROMPT = "En un lugar"


def fast(model: HRMModel, n_texts: int, n_bytes: int, seed: int) -> int:
    """Returns the bytes written, as the others do."""
    texts = generate_batch(
        model, [PROMPT], num_samples=n_texts, seed=seed, mode="continue", temperature=0.8,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    return sum(len(t.text.encode()) for t in texts)


def plain(model: HRMModel, n_texts: int, n_bytes: int, seed: int) -> int:
    settings = Settings.of(
        model, mode="continue", seed=seed, precision="fp32", temperature=0.8,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    decoder = new_decoder(model, model.executor, [PROMPT] * n_texts, settings)
    return sum(1 for _ in decode(decoder, settings.how, list(map(settings.random, range(n_texts)))))


def hugging_face(peer: LlamaForCausalLM, n_texts: int, n_bytes: int, seed: int) -> int:
    torch.manual_seed(seed)
    ids = torch.tensor([[BOS, *PROMPT.encode()]]).expand(n_texts, -1)
    written = peer.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=0,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    return written[:, ids.shape[1] :].numel()


Writer = Callable[[int, int, int], int]  # texts, bytes of each, seed -> bytes written


def speeds(writers: dict[str, Writer], n_texts: int, n_bytes: int, repeats: int) -> list[float]:
    """Median bytes a second of each, taken in turn, as machines are noisy."""
    found: dict[str, list[float]] = {name: [] for name in writers}
    for seed in range(-1, repeats):  # the first does not count
        for name, write in writers.items():
            start = time.perf_counter()
            n = write(n_texts, n_bytes if seed >= 0 else 8, max(0, seed))
            if seed >= 0:
                found[name].append(n / (time.perf_counter() - start))
    return [statistics.median(f) for f in found.values()]


def first_character(command: list[str]) -> tuple[float, float]:
    """Seconds until the first output, or the end if there is none, and the peak of memory in MB."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True); "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    peak = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, check=True)
    return seconds, int(peak.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--bytes", type=int, default=1000, help="of a text (16 texts: a quarter)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads; bytes/s in all\n")
    print(
        "| checkpoint | weights | texts | HRM-ESP | plain | Hugging Face | HRM-ESP / Hugging Face |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path, n_texts in itertools.product(args.checkpoints, (1, 16)):
        model = load_model(path)
        peer = llama(
            model.config, max_position_embeddings=4096,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        ).eval()  # fmt: skip
        writers: dict[str, Writer] = {
            "fast": lambda *a, m=model: fast(m, *a),
            "plain": lambda *a, m=model: plain(m, *a),
            "Hugging Face": lambda *a, p=peer: hugging_face(p, *a),
        }
        n_bytes = args.bytes if n_texts == 1 else args.bytes // 4
        a, b, c = speeds(writers, n_texts, n_bytes, args.repeats)
        weights = f"{model.n_parameters():,} | {n_texts}"
        print(f"| {path} | {weights} | {a:,.0f} | {b:,.0f} | {c:,.0f} | {a / c:.1f} |", flush=True)
    print("\n| | first character, s | peak, MB |\n| --- | --- | --- |")
    generate = [sys.executable, "-m", "hrm_esp", "generate", "--prompt", PROMPT, "--mode", "answer"]
    commands = {"import torch": [sys.executable, "-c", "import torch"]}
    commands |= {f"generate, {path}": [*generate, "--ckpt", path] for path in args.checkpoints}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            found[name].append(first_character(command))
    for name, rows in found.items():
        seconds, peaks = map(statistics.median, zip(*rows, strict=True))
        print(f"| {name} | {seconds:.2f} | {peaks:.0f} |")


if __name__ == "__main__":
    main()
