"""What the plans of texts stand for: their codes, typical words and lines, a map.

Shapes: N texts, P = plan_dim, K codes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..console import print0
from ..data import (
    PairColumns,
    encode_prompt,
    is_table,
    load_stream,
    pad,
    prompt_tokens,
    read_table,
    stream_documents,
)
from ..data.corpus_files import CONVERSIONS, TEXT_SUFFIXES
from ..device import eval_mode
from ..errors import HRMError, NotFinite
from ..evaluation import perplexity
from ..model import HRMModel

BATCH_SIZE = 64
MAX_SHOWN = 60  # characters of a text
MAX_NEIGHBORS = 50  # pairs of texts with similar plans
MAX_LABELS = 40  # of a map
WORD = re.compile(r"\w{3,}")


class Plans(NamedTuple):
    """N texts and their plans (N, P); with a codebook also the probability of each code, (N, K)."""

    texts: list[str]
    vectors: NDArray[np.float32]
    code_probs: NDArray[np.float32] | None


@torch.inference_mode()
def compute_plans(model: HRMModel, texts: Sequence[str]) -> Plans:
    """Computes the plan of each text, read as a prompt.

    Raises:
        HRMError: there is no text, or plans are not finite.
    """
    if not texts:
        raise HRMError("there is no text: give texts, or files with a text per line")
    vectors, code_probs = [], []
    with eval_mode(model):
        for begin in range(0, len(texts), BATCH_SIZE):
            batch = texts[begin : begin + BATCH_SIZE]
            config = model.config
            prompts = [
                prompt_tokens(encode_prompt(t, config.max_len, config.line_breaks)) for t in batch
            ]
            plan, logits = model.planner(pad(prompts).to(model.device))
            vectors.append(plan.float().cpu().numpy())
            if not np.isfinite(vectors[-1]).all():
                raise NotFinite
            if logits is not None:
                code_probs.append(logits.float().softmax(-1).cpu().numpy())
    return Plans(
        list(texts), np.concatenate(vectors), np.concatenate(code_probs) if code_probs else None
    )


def read_texts(
    arguments: Iterable[str],
    encoding: str = "utf-8",
    sep: str = "line",
    trained: PairColumns | None = None,
) -> Iterator[str]:
    """Yields the documents of arguments that are files (of a table the prompts), and other
    arguments as they are.

    Args:
        sep: what ends a document, see `load_documents`.
        trained: of a table, see `read_table`.

    Raises:
        HRMError: a file cannot be read, or a name of a file that does not exist.
    """
    for argument in arguments:
        if is_table(argument):
            table = read_table(argument, encoding, prompts_only=True, trained=trained)
            print0(table.describe())
            yield from table.prompts()
        elif is_file_name(argument):
            yield from stream_documents(load_stream([argument], encoding, sep=sep))
        else:
            yield argument


def is_file_name(argument: str) -> bool:
    """Whether an argument is a file or folder, or named like one, rather than a text."""
    try:
        exists = Path(argument).exists()
    except (OSError, ValueError):  # too long for a name
        return False
    return exists or argument.lower().endswith((*TEXT_SUFFIXES, *CONVERSIONS))


def as_dicts(plans: Plans) -> Iterator[dict[str, Any]]:
    """Yields each text and its plan: the ``vector`` (P,), and with a codebook the ``probabilities``
    (K,) of the codes and the most likely ``code``; without one these are ``None``."""
    for i, text in enumerate(plans.texts):
        probs = None if plans.code_probs is None else plans.code_probs[i]
        yield {
            "text": text,
            "code": None if probs is None else int(probs.argmax()),
            "probabilities": None if probs is None else [round(float(p), 6) for p in probs],
            "vector": [round(float(x), 6) for x in plans.vectors[i]],
        }


def report(plans: Plans) -> Iterator[str]:
    """Yields lines that describe the codes of the plans, or without a codebook similar plans."""
    if plans.code_probs is None:
        yield from report_neighbors(plans)
        return
    words = [set(WORD.findall(text.lower())) for text in plans.texts]
    word_counts = Counter(word for text_words in words for word in text_words)
    chosen = plans.code_probs.argmax(-1)
    counts = np.bincount(chosen, minlength=plans.code_probs.shape[1])
    n_used = perplexity(torch.from_numpy(counts).float())
    yield f"{len(plans.texts):,} texts, {n_used:.1f} of {len(counts)} codes (perplexity)"
    for code in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        (indices,) = np.nonzero(chosen == code)
        yield f"\ncode {code}: {len(indices) / len(chosen):.1%}"
        typical = typical_words([words[i] for i in indices], word_counts, len(words))
        if typical:
            yield f"  words: {', '.join(typical)}"
        for i in indices[np.argsort(-plans.code_probs[indices, code], kind="stable")][:3]:
            yield f"  {plans.code_probs[i, code]:.2f}  {shorten(plans.texts[i])}"


def typical_words(
    texts: Sequence[set[str]], word_counts: Counter[str], n_texts: int, n_words: int = 8
) -> list[str]:
    """Returns the words that are more frequent in these texts than in all.

    Words are ranked by the smoothed log-ratio of their frequencies, times how many of the texts
    have the word.

    Args:
        texts: the words of each of these texts.
        word_counts: how many of all texts have each word.
        n_texts: number of all texts.
    """
    own_counts = Counter(word for words in texts for word in words)
    weight = {
        word: n * np.log((n + 0.5) / (len(texts) + 1) * (n_texts + 1) / (word_counts[word] + 0.5))
        for word, n in own_counts.items()
        if n > 1
    }
    ranked = sorted(weight, key=weight.__getitem__, reverse=True)
    return [word for word in ranked[:n_words] if weight[word] > 0]


def report_neighbors(plans: Plans) -> Iterator[str]:
    """Yields each text with the text whose plan is most similar, most similar pairs first, by the
    cosine of the plans without their mean."""
    centered = plans.vectors - plans.vectors.mean(0)
    centered /= np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-9)
    similarity = centered @ centered.T
    np.fill_diagonal(similarity, -1)
    nearest = similarity.argmax(1)
    yield f"{len(nearest):,} texts, continuous plans; each text and its nearest neighbor"
    if len(nearest) > 1:
        for i in np.argsort(-similarity.max(1), kind="stable")[:MAX_NEIGHBORS]:
            j = nearest[i]
            yield f"  {similarity[i, j]:.2f}  {shorten(plans.texts[i])} ~ {shorten(plans.texts[j])}"


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def draw_map(plans: Plans, out: str) -> None:
    """Draws the plans by their first two principal components, colored by code.

    Raises:
        HRMError: matplotlib is missing, or the file type is unknown.
    """
    from .plot import figure

    centered = plans.vectors - plans.vectors.mean(0)
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    x, y = (centered @ axes[:2].T).T if len(axes) > 1 else np.zeros((2, len(centered)))
    codes = None if plans.code_probs is None else plans.code_probs.argmax(-1)
    with figure(out, 1, 1, (9, 7)) as panels:
        panel = panels.flat[0]
        panel.scatter(x, y, c=codes, cmap="viridis", s=18, alpha=0.7)
        panel.set_xlabel("first principal component")
        panel.set_ylabel("second principal component")
        labelled = np.linspace(0, len(x) - 1, min(len(x), MAX_LABELS)).astype(int)
        labels = [
            plans.texts[i][:24] + ("" if codes is None else f" ({codes[i]})") for i in labelled
        ]
        label_points(panel, x[labelled], y[labelled], labels)


def label_points(panel: Any, x: np.ndarray, y: np.ndarray, labels: Sequence[str]) -> list[Any]:
    """Labels points, except where a label would cover an earlier one.

    Returns:
        The labels, as matplotlib annotations.
    """
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    annotations = [
        panel.annotate(label, at, fontsize=8, xytext=(3, 3), textcoords="offset points", bbox=box)
        for *at, label in zip(x, y, labels, strict=True)
    ]
    panel.figure.canvas.draw()  # the extents are not known before
    kept: list[Any] = []
    for text in annotations:
        if any(text.get_window_extent().overlaps(other.get_window_extent()) for other in kept):
            text.remove()
        else:
            kept.append(text)
    return kept
