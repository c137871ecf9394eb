"""What the codes of the codebook carry.

    python tests/benchmarks/codes.py checkpoints/pretrain_best.pt corpus.txt --val held_out.txt

Prints three tables:

- how many codes the windows and the lines of the corpus use (perplexity);
- with ``--val``: bits per window of a held-out text, by the network alone, given the plan of the
  window itself, of the window before it, and of an unrelated window;
- p-values of permutation tests, for each pair of the codes that windows use most: whether texts
  generated with the one code and with the other differ in their byte trigrams. Guidance makes them
  differ more; ``--guidance 1`` tests the plan alone.

Shapes: N windows, lines or texts, P = plan_dim, K codes.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from common import new_parser
from scipy.sparse import csr_matrix

from hrm_esp import HRMModel, generate_batch, load_corpus_lines, load_model
from hrm_esp.analysis.plans import compute_plans
from hrm_esp.data import ByteStream, as_inputs, as_targets, load_stream
from hrm_esp.evaluation import perplexity
from hrm_esp.tokenizer import BOS

BATCH_SIZE = 16


@torch.inference_mode()
def plans_of_windows(
    model: HRMModel, stream: ByteStream, starts: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the plans (N, P) and the code logits (N, K) of the windows at ``starts`` (N,)."""
    length = min(model.config.max_len, len(stream))
    ids = torch.tensor(np.stack([[BOS, *as_inputs(stream[i : i + length])] for i in starts]))
    plans, logits = zip(*(model.planner(part) for part in ids.split(BATCH_SIZE)), strict=True)
    return torch.cat(plans), torch.cat(logits)


def codes_of_windows(model: HRMModel, path: str, n: int) -> np.ndarray:
    """Returns the codes of n windows, evenly spaced in a text, (N,)."""
    stream = load_stream([path])
    starts = np.linspace(0, max(0, len(stream) - model.config.max_len), n).astype(int)
    return plans_of_windows(model, stream, starts)[1].argmax(-1).numpy()


def codes_of_lines(model: HRMModel, path: str, n: int) -> np.ndarray:
    """Returns the codes of at most n lines, evenly spaced in a text, (N,)."""
    lines = list(load_corpus_lines(path))
    probs = compute_plans(model, lines[:: -(-len(lines) // n)]).code_probs
    assert probs is not None
    return probs.argmax(-1)


@torch.inference_mode()
def bits_by_plan(model: HRMModel, path: str, n: int) -> dict[str, np.ndarray]:
    """Returns the bits of n windows of a text by the network alone, (N,), for three kinds of
    plans."""
    stream, length = load_stream([path]), model.config.max_len
    starts = np.linspace(length, len(stream) - length, n).astype(int)
    own, _ = plans_of_windows(model, stream, starts)
    previous, _ = plans_of_windows(model, stream, starts - length)
    windows = np.stack([stream[i - 1 : i + length] for i in starts])
    y_in = torch.from_numpy(as_inputs(windows[:, :-1])).split(BATCH_SIZE)
    y_out = torch.from_numpy(as_targets(windows[:, 1:])).split(BATCH_SIZE)
    bits = {}
    for name, plans in (
        ("of the window itself", own),
        ("of the window before", previous),
        ("of an unrelated window", own.roll(n // 2, 0)),
    ):
        parts = zip(y_in, y_out, plans.split(BATCH_SIZE), strict=True)
        nll = torch.cat([model.executor.nll(*part).network.sum(1) for part in parts])
        bits[name] = nll.numpy() / np.log(2)
    return bits


def trigram_counts(texts: list[str]) -> csr_matrix:
    """Counts the byte trigrams of each text, (N, 2^24)."""
    rows, columns = [], []
    for i, text in enumerate(texts):
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        trigrams = data[:-2] << 16 | data[1:-1] << 8 | data[2:]
        rows.append(np.full(len(trigrams), i))
        columns.append(trigrams)
    row, column = np.concatenate(rows), np.concatenate(columns)
    return csr_matrix((np.ones(len(row)), (row, column)), shape=(len(texts), 2**24))


def p_value(group: list[str], other: list[str], n_permutations: int) -> float:
    """Returns the p-value of the distance between the trigram frequencies of two groups of
    texts, by a permutation test."""
    counts = trigram_counts(group + other)
    counts = counts[:, np.flatnonzero(counts.sum(0))]
    rng, n = np.random.default_rng(0), len(group)

    def distance(order: np.ndarray) -> float:
        totals = [np.asarray(counts[part].sum(0)).ravel() for part in (order[:n], order[n:])]
        frequencies = [total / total.sum() for total in totals]
        return float(np.abs(frequencies[0] - frequencies[1]).sum())

    observed = distance(np.arange(counts.shape[0]))
    at_least = sum(
        distance(rng.permutation(counts.shape[0])) >= observed for _ in range(n_permutations)
    )
    return (1 + at_least) / (1 + n_permutations)


def print_bits(bits: dict[str, np.ndarray]) -> None:
    """Prints the bits per window with each kind of plan, and the differences from the first."""
    print("\n| plan | bits per window | difference, 95% interval |\n| --- | --- | --- |")
    own = next(iter(bits.values()))
    for name, values in bits.items():
        difference = values - own
        error = difference.std() / len(difference) ** 0.5
        print(f"| {name} | {values.mean():.2f} | {difference.mean():.2f} ± {1.96 * error:.2f} |")


def generate_by_code(
    model: HRMModel, codes: np.ndarray, n_samples: int, n_bytes: int, guidance: float | None
) -> Iterator[tuple[int, list[str]]]:
    """Yields each code and the texts generated with it."""
    for code in codes.tolist():
        completions = generate_batch(
            model, [""], num_samples=n_samples, plan_code=code, mode="continue",
            guidance=guidance, seed=code, min_new_tokens=n_bytes, max_new_tokens=n_bytes,
        )  # fmt: skip
        yield code, [completion.text for completion in completions]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("corpus")
    parser.add_argument("--val", help="held-out text")
    parser.add_argument("--val_windows", type=int, default=200, help="windows of it to score")
    parser.add_argument("--pieces", type=int, default=1000, help="windows and lines of the corpus")
    parser.add_argument("--codes", type=int, default=2, help="codes to generate with")
    parser.add_argument("--samples", type=int, default=200, help="texts per code")
    parser.add_argument("--bytes", type=int, default=200, help="bytes per text")
    parser.add_argument("--guidance", type=float, help="scale (default: that of generation)")
    parser.add_argument("--permutations", type=int, default=999)
    args = parser.parse_args()
    model = load_model(args.checkpoint)
    if model.planner.codebook is None:
        parser.error(f"{args.checkpoint} has no codebook")
    print("| pieces of the corpus | codes used (perplexity) |\n| --- | --- |")
    counts = {}
    for name, find_codes in (("windows", codes_of_windows), ("lines", codes_of_lines)):
        codes = find_codes(model, args.corpus, args.pieces)
        counts[name] = np.bincount(codes, minlength=model.config.n_plan_codes)
        n_used = perplexity(torch.from_numpy(counts[name]).float())
        print(f"| {len(codes):,} {name} | {n_used:.1f} |", flush=True)
    if args.val:
        print_bits(bits_by_plan(model, args.val, args.val_windows))
    most_used = np.argsort(-counts["windows"])[: args.codes]
    texts = dict(generate_by_code(model, most_used, args.samples, args.bytes, args.guidance))
    print("\n| codes | p |\n| --- | --- |")
    for a, b in itertools.combinations(texts, 2):
        print(f"| {a}, {b} | {p_value(texts[a], texts[b], args.permutations):.3f} |")


if __name__ == "__main__":
    main()
