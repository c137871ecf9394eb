"""What the plans of texts say: which codes they have, and what those stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .data import encode_prompt, load_corpus_lines, pad, prompt_tokens
from .errors import HRMError
from .model import HRMModel
from .progress import perplexity

BATCH = 64  # texts read together
SHOWN = 60  # characters of a text
WORD = re.compile(r"\w{3,}")


class Plans(NamedTuple):
    """N texts; their plans (N, P); with a codebook, how much each code is chosen, (N, K)."""

    texts: list[str]
    vectors: NDArray[np.float32]
    choices: NDArray[np.float32] | None


@torch.inference_mode()
def plans_of(model: HRMModel, texts: Sequence[str]) -> Plans:
    """Reads each text as a prompt.

    Raises:
        HRMError: no text.
    """
    if not texts:
        raise HRMError("there is no text to plan: give texts, or files with a text on each line")
    model.eval()
    vectors, choices = [], []
    for begin in range(0, len(texts), BATCH):
        prompts = [encode_prompt(t, model.config.max_len) for t in texts[begin : begin + BATCH]]
        ids = pad([prompt_tokens(p) for p in prompts]).to(model.device)
        plan, logits = model.planner(ids)
        vectors.append(plan.float().cpu().numpy())
        if logits is not None:
            choices.append(logits.float().softmax(-1).cpu().numpy())
    return Plans(list(texts), np.concatenate(vectors), np.concatenate(choices) if choices else None)


def lines_of(given: Sequence[str]) -> Iterator[str]:
    """The lines of the files among what is given (of a ``.tsv`` the prompts), and the rest as it
    is."""
    for text in given:
        if not Path(text).is_file():
            yield text
        else:
            for line in load_corpus_lines(text):
                yield line.split("\t")[0] if text.endswith((".tsv", ".tsv.gz")) else line


def report(plans: Plans) -> Iterator[str]:
    """Lines that say what the plans have in common."""
    if plans.choices is None:
        yield from closest(plans)
        return
    words = [set(WORD.findall(text.lower())) for text in plans.texts]
    everywhere = Counter(word for of_text in words for word in of_text)
    chosen = plans.choices.argmax(-1)
    counts = np.bincount(chosen, minlength=plans.choices.shape[1])
    used = perplexity(torch.from_numpy(counts).float())
    yield f"{len(plans.texts):,} texts, {used:.1f} of {len(counts)} codes (perplexity)"
    for code in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        (texts,) = np.nonzero(chosen == code)
        yield f"\ncode {code}: {len(texts) / len(chosen):.1%}"
        told = telling([words[i] for i in texts], everywhere, len(words))
        if told:
            yield f"  words: {', '.join(told)}"
        for i in texts[np.argsort(-plans.choices[texts, code], kind="stable")][:3]:
            yield f"  {plans.choices[i, code]:.2f}  {shortened(plans.texts[i])}"


def telling(texts: Sequence[set[str]], everywhere: Counter[str], n_texts: int) -> list[str]:
    """The words that stand in these texts more often than in all, by the logarithm of the ratio,
    smoothed, times how many of them have the word."""
    here = Counter(word for words in texts for word in words)
    weight = {
        word: n * np.log((n + 0.5) / (len(texts) + 1) * (n_texts + 1) / (everywhere[word] + 0.5))
        for word, n in here.items()
        if n > 1
    }
    return [w for w in sorted(weight, key=weight.__getitem__, reverse=True)[:8] if weight[w] > 0]


def closest(plans: Plans) -> Iterator[str]:
    """To each text the one whose plan is most like its own, by the cosine of what differs from the
    mean; the closest first."""
    centred = plans.vectors - plans.vectors.mean(0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    likeness = centred @ centred.T
    np.fill_diagonal(likeness, -1)
    best = likeness.argmax(1)
    yield f"{len(best):,} texts, continuous plans; to each the closest"
    for i in np.argsort(-likeness.max(1), kind="stable")[:50]:
        if len(best) > 1:
            yield f"  {likeness[i, best[i]]:.2f}  {shortened(plans.texts[i])} ~ " + shortened(
                plans.texts[best[i]]
            )


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def draw_map(plans: Plans, out: str) -> None:
    """Draws the plans by their first two principal components, coloured by code.

    Raises:
        HRMError: matplotlib is missing, or the file's ending is unknown.
    """
    from .plot import figure

    centred = plans.vectors - plans.vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    x, y = (centred @ axes[:2].T).T if len(axes) > 1 else np.zeros((2, len(centred)))
    codes = None if plans.choices is None else plans.choices.argmax(-1)
    with figure(out, 1, 1, (9, 7)) as panels:
        panel = panels.flat[0]
        panel.scatter(x, y, c=codes, cmap="viridis", s=18, alpha=0.7)
        panel.set_xlabel("first principal component")
        panel.set_ylabel("second")
        some = np.linspace(0, len(x) - 1, min(len(x), 40)).astype(int)
        of_code = ["" if codes is None else f" ({codes[i]})" for i in some]
        labels = [plans.texts[i][:24] + code for i, code in zip(some, of_code, strict=True)]
        label_points(panel, x[some], y[some], labels)


def label_points(panel: Any, x: np.ndarray, y: np.ndarray, labels: Sequence[str]) -> list[Any]:
    """Writes the labels of points beside them, but for those that would cover an earlier one.

    Returns:
        Those written, as matplotlib's annotations.
    """
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    texts = [
        panel.annotate(label, at, fontsize=8, xytext=(3, 3), textcoords="offset points", bbox=box)
        for *at, label in zip(x, y, labels, strict=True)
    ]
    panel.figure.canvas.draw()  # only then is known how much room each takes
    kept: list[Any] = []
    for text in texts:
        if any(text.get_window_extent().overlaps(other.get_window_extent()) for other in kept):
            text.remove()
        else:
            kept.append(text)
    return kept
