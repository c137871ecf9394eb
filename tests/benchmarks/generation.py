"""Speed of generation, beside plain decoding of the same model and beside Hugging Face.

    pip install '.[bench]'
    python tests/benchmarks/generation.py checkpoints/pretrain_best.pt [MORE CHECKPOINTS]

For each checkpoint, and for 1 and 16 texts at once: HRM-ESP; plain decoding, which is the same
model with its KV cache, one byte per step, without drafts and packed weights; and ``generate`` of a
Hugging Face Llama of the same size, in float32. Then the time from the command to the first
character and the peak of memory, beside those of ``import torch``. All figures are medians, timed
in turn.
"""

import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import new_parser, time_alternately
from llama import new_llama
from transformers import LlamaForCausalLM

from hrm_esp import GenerationConfig, HRMModel, generate_batch, load_model
from hrm_esp.generation.generate import GenerationSetup, new_decoder
from hrm_esp.generation.speculative import decode
from hrm_esp.tokenizer import BOS, EOS, PAD

PROMPT = "En un lugar"
PEAK_MEMORY = """\
import resource, subprocess, sys
subprocess.run(sys.argv[1:], capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

Generator = Callable[[int, int, int], int]  # texts, bytes of each, seed -> bytes generated


def generate_fast(model: HRMModel, n_texts: int, n_bytes: int, seed: int) -> int:
    completions = generate_batch(
        model, [PROMPT], num_samples=n_texts, seed=seed, mode="continue", temperature=0.8,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    return sum(len(c.text.encode()) for c in completions)


def generate_plain(model: HRMModel, n_texts: int, n_bytes: int, seed: int) -> int:
    config = GenerationConfig(
        mode="continue", seed=seed, precision="fp32", temperature=0.8,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    setup = GenerationSetup.create(model, config)
    decoder = new_decoder(model, model.executor, [PROMPT] * n_texts, setup)
    return sum(1 for _ in decode(decoder, setup.params, [setup.rng(i) for i in range(n_texts)]))


def generate_llama(llama: LlamaForCausalLM, n_texts: int, n_bytes: int, seed: int) -> int:
    torch.manual_seed(seed)
    ids = torch.tensor([[BOS, *PROMPT.encode()]]).expand(n_texts, -1)
    output = llama.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=0,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    return output[:, ids.shape[1] :].numel()


def median_speeds(
    generators: dict[str, Generator], n_texts: int, n_bytes: int, repeats: int
) -> list[float]:
    """Returns the median bytes per second of each generator."""
    for generate in generators.values():  # warm up
        generate(n_texts, 8, 0)
    timings = time_alternately(
        {
            name: lambda seed, generate=generate: generate(n_texts, n_bytes, seed)
            for name, generate in generators.items()
        },
        repeats,
    )
    return [statistics.median(t.result / t.seconds for t in rows) for rows in timings.values()]


def first_output(command: list[str]) -> float:
    """Returns the seconds until a command prints something, or ends."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - begin


def peak_memory(command: list[str]) -> float:
    """Returns the peak of memory of a command, in MB."""
    process = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, *command], capture_output=True, check=True
    )
    return int(process.stdout) / 1024


def print_speeds(checkpoints: list[str], n_bytes: int, repeats: int) -> None:
    print(f"{platform.machine()}, {torch.get_num_threads()} threads; bytes/s of all texts\n")
    print("| checkpoint | weights | texts | HRM-ESP | plain | Hugging Face | HRM-ESP / HF |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path, n_texts in itertools.product(checkpoints, (1, 16)):
        model = load_model(path)
        llama = new_llama(
            model.config, max_position_embeddings=4096,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        ).eval()  # fmt: skip
        generators: dict[str, Generator] = {
            "fast": lambda *args, model=model: generate_fast(model, *args),
            "plain": lambda *args, model=model: generate_plain(model, *args),
            "Hugging Face": lambda *args, llama=llama: generate_llama(llama, *args),
        }
        length = n_bytes if n_texts == 1 else n_bytes // 4
        fast, plain, hf = median_speeds(generators, n_texts, length, repeats)
        print(
            f"| {path} | {model.n_parameters():,} | {n_texts} | {fast:,.0f} | {plain:,.0f} "
            f"| {hf:,.0f} | {fast / hf:.1f} |",
            flush=True,
        )


def print_start_up(checkpoints: list[str], repeats: int) -> None:
    print("\n| command | first character, s | peak memory, MB |\n| --- | --- | --- |")
    generate = [sys.executable, "-m", "hrm_esp", "generate", "--prompt", PROMPT, "--mode", "answer"]
    commands = {"import torch": [sys.executable, "-c", "import torch"]}
    commands |= {f"generate, {path}": [*generate, "--ckpt", path] for path in checkpoints}
    timings = time_alternately(
        {
            name: lambda _, command=command: (first_output(command), peak_memory(command))
            for name, command in commands.items()
        },
        repeats,
    )
    for name, rows in timings.items():
        seconds, peak = map(statistics.median, zip(*(t.result for t in rows), strict=True))
        print(f"| {name} | {seconds:.2f} | {peak:.0f} |")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--bytes", type=int, default=1000, help="per text; a quarter of 16 texts")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print_speeds(args.checkpoints, args.bytes, args.repeats)
    print_start_up(args.checkpoints, args.repeats)


if __name__ == "__main__":
    main()
