"""Whether the codes of plans carry something: how evenly a text uses them, and whether what is
written with one code differs from what is written with another.

    python tests/benchmarks/codes.py checkpoints/pretrain_best.pt corpus.txt

Prints the perplexity of the codes of windows and of lines of the text and, for each pair of the
codes used most, a permutation test: the distance between the trigrams of bytes of the texts written
with one and with the other, beside those when the same texts are dealt out at random.
"""

import argparse
import itertools

import numpy as np
import torch
from scipy.sparse import csr_matrix

from hrm_esp import HRMModel, generate_batch, load_model
from hrm_esp.data import as_inputs, load_corpus_lines, load_stream
from hrm_esp.plans import plans_of
from hrm_esp.progress import perplexity
from hrm_esp.tokenizer import BOS


def checked(path: str, model: HRMModel) -> HRMModel:
    """Refuses a model without a codebook, or with several."""
    if model.planner.codebook is None or model.config.n_plan_groups > 1:
        raise SystemExit(f"{path} does not have one codebook")
    return model


def codes_of_windows(model: HRMModel, path: str, n: int) -> np.ndarray:
    """The code of each of n windows from all of a text, (n,)."""
    stream = load_stream([path])
    size = min(model.config.max_len, len(stream))
    starts = np.linspace(0, len(stream) - size, n).astype(int)
    ids = torch.tensor(np.stack([[BOS, *as_inputs(stream[i : i + size])] for i in starts]))
    with torch.inference_mode():
        logits = [model.planner(part)[1] for part in ids.split(16)]
    return torch.cat([part for part in logits if part is not None]).argmax(-1).numpy()


def codes_of_lines(model: HRMModel, path: str, n: int) -> np.ndarray:
    """The code of each of at most n lines from all of a text, (n,)."""
    lines = list(load_corpus_lines(path))
    choices = plans_of(model, lines[:: -(-len(lines) // n)]).choices
    assert choices is not None
    return choices[:, 0].argmax(-1)


def trigrams(texts: list[str]) -> csr_matrix:
    """How often each text has each trigram of bytes, (texts, 2^24)."""
    rows, columns = [], []
    for i, text in enumerate(texts):
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        found = data[:-2] << 16 | data[1:-1] << 8 | data[2:]
        rows.append(np.full(len(found), i))
        columns.append(found)
    row, column = np.concatenate(rows), np.concatenate(columns)
    return csr_matrix((np.ones(len(row)), (row, column)), shape=(len(texts), 2**24))


def p_value(one: list[str], other: list[str], permutations: int) -> float:
    """Of the distance between the shares of the trigrams in two groups of texts."""
    counts = trigrams(one + other)
    counts = counts[:, np.flatnonzero(counts.sum(0))]
    chance, n = np.random.default_rng(0), len(one)

    def distance(order: np.ndarray) -> float:
        sides = [np.asarray(counts[part].sum(0)).ravel() for part in (order[:n], order[n:])]
        a, b = (side / side.sum() for side in sides)
        return float(np.abs(a - b).sum())

    found = distance(np.arange(counts.shape[0]))
    as_far = [distance(chance.permutation(counts.shape[0])) >= found for _ in range(permutations)]
    return (1 + sum(as_far)) / (1 + permutations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--pieces", type=int, default=1000, help="of the text whose codes are told")
    parser.add_argument("--codes", type=int, default=2, help="how many to write with")
    parser.add_argument("--samples", type=int, default=200, help="texts for each code")
    parser.add_argument("--bytes", type=int, default=200, help="of each text")
    parser.add_argument("--permutations", type=int, default=999)
    args = parser.parse_args()
    model = checked(args.checkpoint, load_model(args.checkpoint))
    n_codes = model.config.n_plan_codes
    print("| pieces of the text | codes used (perplexity) |\n| --- | --- |")
    used = {}
    for name, find in (("windows", codes_of_windows), ("lines", codes_of_lines)):
        used[name] = np.bincount(find(model, args.text, args.pieces), minlength=n_codes)
        n = used[name].sum()
        print(f"| {n:,} {name} | {perplexity(torch.tensor(used[name][None])):.1f} |", flush=True)
    written = {
        int(code): [
            text.text
            for text in generate_batch(
                model, [""], num_samples=args.samples, plan_code=int(code), mode="continue",
                seed=int(code), max_new_tokens=args.bytes, min_new_tokens=args.bytes,
            )
        ]
        for code in np.argsort(-used["windows"])[: args.codes]
    }  # fmt: skip
    print("\n| codes | p |\n| --- | --- |")
    for a, b in itertools.combinations(written, 2):
        print(f"| {a}, {b} | {p_value(written[a], written[b], args.permutations):.3f} |")


if __name__ == "__main__":
    main()
