"""Whether fast writing is the model's: three checks on a trained checkpoint.

    python tests/benchmarks/exactness.py checkpoints/pretrain_best.pt held_out.txt

Greedily, in float32: texts that go on from pieces of the held-out text, fast (drafted, weights
packed) and plain; where they differ first, the two likeliest bytes of the plain one should be as
good as equal. Sampled: the texts of a few bytes that were drafted and those that were not, by a
chi-square test. Scored: what weights in bfloat16 cost in bits per byte.
"""

import argparse
import collections
import copy

import numpy as np
import torch
from scipy.stats import chi2_contingency

from hrm_esp import HRMModel, generate_batch, load_model
from hrm_esp.data import load_stream
from hrm_esp.decoding import decode
from hrm_esp.evaluation import score_stream
from hrm_esp.generation import DRAFT_LEN, Settings, new_decoder
from hrm_esp.packing import packed


def pieces(path: str, n: int, length: int) -> list[str]:
    """n pieces of a text, of about so many bytes each, from all of it."""
    stream = load_stream([path])
    starts = np.linspace(0, len(stream) - length, n).astype(int)
    return [bytes(stream[i : i + length]).decode(errors="ignore") for i in starts]


def greedy(model: HRMModel, prompt: str, n_bytes: int, fast: bool) -> list[int]:
    settings = Settings.of(
        model, mode="continue", precision="fp32", temperature=0.0,
        min_new_tokens=n_bytes, max_new_tokens=n_bytes,
    )  # fmt: skip
    executor = packed(model.executor, torch.float32) if fast else model.executor
    decoder = new_decoder(model, executor, [prompt], settings)
    draft_len = settings.draft_len if fast else 0
    written = decode(decoder, settings.how, [settings.random(0)], draft_len)
    return [token for _, token, _ in written]


def gap(model: HRMModel, prompt: str, written: list[int]) -> float:
    """Between the log-probabilities of the two bytes likeliest to come next, decoded plainly."""
    settings = Settings.of(model, mode="continue", precision="fp32")
    decoder = new_decoder(model, model.executor, [prompt], settings)
    decoder.look()
    for token in written:
        decoder.append([token])
        logprobs = decoder.look()
    best = np.sort(logprobs[0, -1])
    return float(best[-1] - best[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("held_out")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt_bytes", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=300, help="to write after each prompt")
    parser.add_argument("--samples", type=int, default=4000)
    args = parser.parse_args()
    model = load_model(args.checkpoint)

    gaps = []
    for prompt in pieces(args.held_out, args.prompts, args.prompt_bytes):
        one, other = (greedy(model, prompt, args.bytes, fast) for fast in (True, False))
        if one != other:
            same = next(i for i, pair in enumerate(zip(one, other)) if len(set(pair)) > 1)  # noqa: B905
            gaps.append(gap(model, prompt, other[:same]))
    print(f"greedy: {args.prompts - len(gaps)} of {args.prompts} texts of {args.bytes} bytes equal")
    if gaps:
        print(
            f"  between the two likeliest bytes where others differ first: at most {max(gaps):.1e}"
        )

    asked = {"mode": "continue", "temperature": 0.8, "precision": "fp32", "max_new_tokens": 4}
    (prompt,) = pieces(args.held_out, 1, 300)
    counts = []
    for draft_len, size in ((0, 100), (DRAFT_LEN, 1)):
        texts = generate_batch(
            model, [prompt], num_samples=args.samples, batch_size=size, draft_len=draft_len,
            seed=draft_len, **asked,
        )  # fmt: skip
        counts.append(collections.Counter(t.text for t in texts))
    often = [t for t in counts[0] | counts[1] if counts[0][t] + counts[1][t] >= 10]
    table = [[c[t] for t in often] + [args.samples - sum(c[t] for t in often)] for c in counts]
    p = chi2_contingency(table).pvalue
    print(f"sampled: {args.samples} texts each way, {len(often)} kinds, chi-square p {p:.3f}")

    stream = load_stream([args.held_out])
    low = copy.copy(model)
    low._modules = model._modules | {"executor": packed(model.executor, torch.bfloat16)}
    bits = [score_stream(m, stream).bits_per_byte for m in (model, low)]
    print(
        f"scored: {bits[0]:.4f} bits per byte, in bfloat16 {bits[1]:.4f} ({bits[1] - bits[0]:+.4f})"
    )


if __name__ == "__main__":
    main()
