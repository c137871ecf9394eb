"""Whether the codes of plans carry something: how evenly a text uses them, and whether what is
written with one code differs from what is written with another.

    python tests/benchmarks/codes.py checkpoints/pretrain_best.pt corpus.txt

Prints the perplexity of the codes of windows and of lines of the text; with ``--val``, of a text
never trained on, what windows of it cost the network alone with their own plan, with that of the
window before, and with that of another; and for each pair of the codes used most a permutation
test: the distance between the trigrams of bytes of the texts written with one and with the other
(``--guidance 1``: by the plan alone), beside those when the same texts are dealt out at random.
"""

import argparse
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix

from hrm_esp import HRMModel, generate_batch, load_model
from hrm_esp.data import Stream, as_inputs, as_targets, load_corpus_lines, load_stream
from hrm_esp.plans import plans_of
from hrm_esp.progress import perplexity
from hrm_esp.tokenizer import BOS


def checked(path: str, model: HRMModel) -> HRMModel:
    """Refuses a model without a codebook, or with several."""
    if model.planner.codebook is None or model.config.n_plan_groups > 1:
        raise SystemExit(f"{path} does not have one codebook")
    return model


@torch.inference_mode()
def read(model: HRMModel, stream: Stream, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The plans of the windows from each of starts (n,) on, (n, P), and their logits, (n, K)."""
    size = min(model.config.max_len, len(stream))
    ids = torch.tensor(np.stack([[BOS, *as_inputs(stream[i : i + size])] for i in starts]))
    plans, logits = zip(*(model.planner(part) for part in ids.split(16)), strict=True)
    return torch.cat(plans), torch.cat(logits)


def codes_of_windows(model: HRMModel, path: str, n: int) -> np.ndarray:
    """The code of each of n windows from all of a text, (n,)."""
    stream = load_stream([path])
    starts = np.linspace(0, max(0, len(stream) - model.config.max_len), n).astype(int)
    return read(model, stream, starts)[1].argmax(-1).numpy()


@torch.inference_mode()
def worth(model: HRMModel, path: str, n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names of plans, and what each of n windows of a text costs with that one, in bits, (n,)."""
    stream, size = load_stream([path]), model.config.max_len
    starts = np.linspace(size, len(stream) - size, n).astype(int)
    own, _ = read(model, stream, starts)
    before, _ = read(model, stream, starts - size)
    ids = np.stack([stream[i - 1 : i + size] for i in starts])
    y_in = torch.from_numpy(as_inputs(ids[:, :-1]))
    y_out = torch.from_numpy(as_targets(ids[:, 1:]))
    for name, plans in (
        ("its own", own), ("that of the window before", before), ("another's", own.roll(n // 2, 0)),
    ):  # fmt: skip
        nats = [
            model.executor.nats(*part)[1]
            for part in zip(y_in.split(16), y_out.split(16), plans.split(16), strict=True)
        ]
        yield name, torch.cat(nats).numpy() / np.log(2)


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
    parser.add_argument("--val", help="a text never trained on")
    parser.add_argument("--windows", type=int, default=200, help="of it that are scored")
    parser.add_argument("--pieces", type=int, default=1000, help="of the text whose codes are told")
    parser.add_argument("--codes", type=int, default=2, help="how many to write with")
    parser.add_argument("--samples", type=int, default=200, help="texts for each code")
    parser.add_argument("--bytes", type=int, default=200, help="of each text")
    parser.add_argument("--guidance", type=float, help="by the codes; as by default")
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
    if args.val:
        costs = dict(worth(model, args.val, args.windows))
        print("\n| plan | bits a window | more than with its own |\n| --- | --- | --- |")
        for name, cost in costs.items():
            more = cost - costs["its own"]
            error = more.std() / len(more) ** 0.5
            print(f"| {name} | {cost.mean():.2f} | {more.mean():.2f} ± {1.96 * error:.2f} |")
    written = {
        int(code): [
            text.text
            for text in generate_batch(
                model, [""], num_samples=args.samples, plan_code=int(code), mode="continue",
                guidance=args.guidance, seed=int(code), max_new_tokens=args.bytes,
                min_new_tokens=args.bytes,
            )
        ]
        for code in np.argsort(-used["windows"])[: args.codes]
    }  # fmt: skip
    print("\n| codes | p |\n| --- | --- |")
    for a, b in itertools.combinations(written, 2):
        print(f"| {a}, {b} | {p_value(written[a], written[b], args.permutations):.3f} |")


if __name__ == "__main__":
    main()
