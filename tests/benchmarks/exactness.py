"""Whether fast generation is exact: three checks of a trained checkpoint.

    python tests/benchmarks/exactness.py checkpoints/pretrain_best.pt held_out.txt

1. Greedy, in float32: fast generation (speculative decoding, packed weights) and plain generation
   continue prompts from the held-out text. Where two texts first differ, the two most likely bytes
   should be equally likely but for rounding.
2. Sampled: a chi-square test compares short texts that were drafted with texts that were not.
3. Scored: the difference in bits per byte that weights in bfloat16 make.
"""

import collections

import numpy as np
import torch
from common import new_parser
from scipy.stats import chi2_contingency

from hrm_esp import GenerationConfig, HRMModel, generate_batch, load_model
from hrm_esp.data import ByteStream, load_stream
from hrm_esp.evaluation import score_stream
from hrm_esp.generation.cpu_kernels import pack_for_cpu, with_modules
from hrm_esp.generation.generate import GenerationSetup, new_decoder
from hrm_esp.generation.speculative import decode

MIN_COUNT = 10  # of a text in both samples together, to be a category of the chi-square test


def prompts_from(stream: ByteStream, n: int, length: int) -> list[str]:
    """Cuts n prompts of about ``length`` bytes from a text, evenly spaced."""
    starts = np.linspace(0, len(stream) - length, n).astype(int)
    return [bytes(stream[i : i + length]).decode(errors="ignore") for i in starts]


def greedy_tokens(model: HRMModel, prompt: str, n_bytes: int, fast: bool) -> list[int]:
    """Continues a prompt greedily by ``n_bytes`` bytes."""
    config = GenerationConfig(
        mode="continue", precision="fp32", temperature=0.0,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    setup = GenerationSetup.create(model, config)
    executor = pack_for_cpu(model.executor, torch.float32) if fast else model.executor
    decoder = new_decoder(model, executor, [prompt], setup)
    draft_len = setup.draft_len if fast else 0
    return [s.token for s in decode(decoder, setup.params, [setup.rng(0)], draft_len)]


def top_two_gap(model: HRMModel, prompt: str, tokens: list[int]) -> float:
    """Returns the difference of the log-probabilities of the two most likely bytes after a prompt
    and some tokens, by plain decoding."""
    setup = GenerationSetup.create(model, GenerationConfig(mode="continue", precision="fp32"))
    decoder = new_decoder(model, model.executor, [prompt], setup)
    log_probs = decoder.verify()
    for token in tokens:
        decoder.append([token])
        log_probs = decoder.verify()
    largest = np.sort(log_probs[0, -1])
    return float(largest[-1] - largest[-2])


def check_greedy(model: HRMModel, prompts: list[str], n_bytes: int) -> None:
    gaps = []
    for prompt in prompts:
        fast, plain = (greedy_tokens(model, prompt, n_bytes, is_fast) for is_fast in (True, False))
        if fast != plain:
            n_equal = int(np.argmin(np.equal(fast, plain)))
            gaps.append(top_two_gap(model, prompt, plain[:n_equal]))
    n_equal_texts = len(prompts) - len(gaps)
    print(f"greedy: {n_equal_texts} of {len(prompts)} texts of {n_bytes} bytes are equal")
    if gaps:
        print(
            "  where the others first differ, the log-probabilities of the two most likely bytes "
            f"differ by at most {max(gaps):.1e}"
        )


def check_sampling(model: HRMModel, prompt: str, n_samples: int) -> None:
    samples = []
    for draft_len, batch_size in ((0, 100), (GenerationConfig().draft_len, 1)):
        completions = generate_batch(
            model, [prompt], num_samples=n_samples, batch_size=batch_size, draft_len=draft_len,
            seed=draft_len, mode="continue", temperature=0.8, precision="fp32", max_new_tokens=4,
        )  # fmt: skip
        samples.append(collections.Counter(c.text for c in completions))
    totals = samples[0] + samples[1]
    frequent = [text for text, n in totals.items() if n >= MIN_COUNT]
    table = [[s[text] for text in frequent] for s in samples]
    if sum(totals[text] for text in frequent) < 2 * n_samples:
        for row in table:
            row.append(n_samples - sum(row))
    p = chi2_contingency(table).pvalue
    print(f"sampled: {n_samples} texts each, {len(frequent)} frequent ones, chi-square p {p:.3f}")


def check_scores(model: HRMModel, stream: ByteStream) -> None:
    packed = with_modules(model, {"executor": pack_for_cpu(model.executor, torch.bfloat16)})
    fp32, bf16 = (score_stream(m, stream).bits_per_byte for m in (model, packed))
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("scored: this CPU has no bfloat16, so the packed weights are in float32")
    print(
        f"scored: {fp32:.4f} bits per byte, with bfloat16 weights {bf16:.4f} ({bf16 - fp32:+.4f})"
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("held_out")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt_bytes", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=300, help="to generate after each prompt")
    parser.add_argument("--samples", type=int, default=4000)
    args = parser.parse_args()
    model, stream = load_model(args.checkpoint), load_stream([args.held_out])
    check_greedy(model, prompts_from(stream, args.prompts, args.prompt_bytes), args.bytes)
    check_sampling(model, prompts_from(stream, 1, 300)[0], args.samples)
    check_scores(model, stream)


if __name__ == "__main__":
    main()
