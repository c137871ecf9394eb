"""Restoring accents, ñ and ü: the form of each word is chosen in its context.

1. The forms of each word are those that the training text has. Sentences in another language, and
   code, are left out.
2. A bigram model of words, made from the n-gram counts, gives the most likely path through the
   forms (Viterbi algorithm).
3. Where other forms are nearly as likely, the model scores the text around the word with each.
4. The form with the highest score wins; its probability is the softmax of the scores. A text that
   has most of its marks has lost few of them: a form that adds a mark is multiplied by the share of
   marks that are missing, which is estimated from the text (the block, of a long one).

In the bigram model a form f has after a word w the probability (c(w, f) + PRIOR p(f)) / (c(w) +
PRIOR), with counts c and relative frequencies p: a Dirichlet prior (MacKay & Peto 1995).
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..data import Batch, pad
from ..device import adapt_threads, autocast, choose_precision, eval_mode
from ..errors import HRMError
from ..model import HRMModel
from ..ngrams.lexicon import Lexicon
from ..tokenizer import BOS
from .words import MARKED, Word, find_words, sentence_ends

PRIOR = 200  # concentration of the Dirichlet prior, in occurrences
UNSEEN = 0.1  # pseudo-count that is added to each form
MAX_LOG_ODDS = 4.0  # nats by which a form may be less likely by the counts and still be scored
COUNT_WEIGHT = 0.5  # of the bigram model's score beside the model's, which knows the counts, too
N_BEFORE, N_AFTER = 80, 32  # characters around a word that are scored with it
BATCH_TOKENS = 8192
EM_ITERATIONS = 8
SPANISH_LOG_FREQ = -7.5  # mean logarithm of the relative frequency of a word in Spanish prose
MIN_WORDS = 6  # by which a sentence is judged


class WordForm(NamedTuple):
    """A word of a text, text[begin:end], the form that it should have, and its probability."""

    begin: int
    end: int
    form: str
    prob: float


class Restorer:
    """Restores texts with a model.

    Raises:
        HRMError: the model has no n-gram counts, or was finetuned: then it no longer knows how
            texts go on.
    """

    def __init__(self, model: HRMModel, precision: str = "auto") -> None:
        ngrams = model.executor.ngrams
        if model.stage == "finetune" or ngrams is None or not len(ngrams.table.entries):
            reason = "was finetuned" if model.stage == "finetune" else "has no n-gram counts"
            raise HRMError(
                f"this model {reason}, so it cannot restore a text: give the checkpoint of a "
                "pretrain run, such as pretrain_best.pt"
            )
        self.model, self.lexicon = model, Lexicon(ngrams.table)
        self.dtype = choose_precision(model.device, precision)

    def restore_words(self, text: str, force: bool = False) -> Iterator[WordForm]:
        """Yields the words of a text, in order, with the form that each should have. A form has as
        many characters as the word.

        Args:
            force: also reconsider words that have marks, and assume that any mark may be missing.
        """
        # Step 1: the forms of each word, and where sentences begin.
        words, ends = list(find_words(text, force)), sentence_ends(text)
        sentences = [bisect.bisect_right(ends, word.begin) for word in words]
        for i, is_foreign in enumerate(self.foreign_words(words, sentences)):
            begin, end, forms = words[i]
            forms = [text[begin:end]] if is_foreign else self.known_forms(forms)
            words[i] = Word(begin, end, forms)
        # Step 2: the most likely path through them, by the counts.
        chosen = self.viterbi(words, sentences)
        letters = list(text)
        for word, form in zip(words, chosen, strict=True):
            letters[word.begin : word.end] = form
        # Step 3: score the forms that are nearly as likely.
        max_len = self.model.config.max_len
        scores: list[dict[str, float]] = []  # of the forms of each word, in nats
        rows: list[tuple[int, str, bytes]] = []
        for i, (word, sentence) in enumerate(zip(words, sentences, strict=True)):
            likely = self.likely_forms(words, sentences, chosen, i)
            scores.append(likely)
            if len(likely) > 1:
                begin, end = ends[sentence - 1] if sentence else 0, ends[sentence]
                before, after = window(letters, word, begin, end, max_len)
                for form in likely:
                    rows.append((i, form, (before + form.encode() + after)[:max_len]))
        log_probs = text_log_probs(self.model, [row for *_, row in rows], self.dtype)
        for (i, form, _), log_prob in zip(rows, log_probs, strict=True):
            scores[i][form] = COUNT_WEIGHT * scores[i][form] + log_prob
        # Step 4: choose.
        originals = [text[word.begin : word.end] for word in words]
        log_omission = 0.0 if force else math.log(omission_rate(originals, scores))
        for word, original, values in zip(words, originals, scores, strict=True):
            values = {f: value + (f != original) * log_omission for f, value in values.items()}
            form = max(values, key=values.__getitem__)
            prob = 1 / sum(math.exp(value - values[form]) for value in values.values())
            yield WordForm(word.begin, word.end, form, prob)

    def foreign_words(self, words: Sequence[Word], sentences: Sequence[int]) -> list[bool]:
        """Returns for each word whether its sentence is in another language or code: its words are
        rarer than those of Spanish, on average. A short sentence is judged with the words before
        it."""
        lexicon = self.lexicon
        log_freqs = [
            math.log((max(map(lexicon.count, word.forms)) + UNSEEN) / lexicon.n_words)
            for word in words
        ]
        limit = (math.log(UNSEEN / lexicon.n_words) + SPANISH_LOG_FREQ) / 2
        found: list[bool] = []
        for _, group in itertools.groupby(sentences):
            end = len(found) + len(list(group))
            sample = log_freqs[max(0, min(len(found), end - MIN_WORDS)) : end]
            is_foreign = len(sample) >= MIN_WORDS / 2 and sum(sample) < limit * len(sample)
            found += [is_foreign] * (end - len(found))
        return found

    def known_forms(self, forms: list[str]) -> list[str]:
        """Returns the first form and those that the training text has; all if it has none."""
        counts = list(map(self.lexicon.count, forms))
        if not any(counts):
            return forms
        return forms[:1] + [f for f, n in zip(forms[1:], counts[1:], strict=True) if n]

    def log_prob(self, form: str, previous: str | None) -> float:
        """Returns the logarithm of the probability of a form after another word, by the counts;
        ``None``: at the beginning of a document."""
        lexicon = self.lexicon
        prob = (lexicon.count(form) + UNSEEN) / lexicon.n_words
        if previous is not None:
            prob = lexicon.pair_count(previous, form) + PRIOR * prob
            prob /= lexicon.count(previous) + PRIOR
        return math.log(prob)

    def viterbi(self, words: Sequence[Word], sentences: Sequence[int]) -> list[str]:
        """Returns the most likely form of each word by the counts."""
        scores, back = [0.0], []
        for i, word in enumerate(words):
            previous: Sequence[str | None] = words[i - 1].forms if i else [None]
            if i and sentences[i] != sentences[i - 1]:
                previous = [None] * len(previous)
            steps = [
                [score + self.log_prob(form, p) for score, p in zip(scores, previous, strict=True)]
                for form in word.forms
            ]
            scores = [max(step) for step in steps]
            back.append([step.index(score) for step, score in zip(steps, scores, strict=True)])
        best, chosen = scores.index(max(scores)), []
        for word, origin in zip(reversed(words), reversed(back), strict=True):
            chosen.append(word.forms[best])
            best = origin[best]
        return chosen[::-1]

    def likely_forms(
        self, words: Sequence[Word], sentences: Sequence[int], chosen: Sequence[str], i: int
    ) -> dict[str, float]:
        """Returns the log-probabilities, by the counts, of the forms of word ``i`` that are likely
        between its neighbors."""
        forms = words[i].forms
        if len(forms) == 1:
            return {forms[0]: 0.0}
        has_previous = i > 0 and sentences[i - 1] == sentences[i]
        has_next = i + 1 < len(words) and sentences[i + 1] == sentences[i]
        found = {}
        for form in forms:
            found[form] = self.log_prob(form, chosen[i - 1] if has_previous else None)
            if has_next:
                found[form] += self.log_prob(chosen[i + 1], form)
        least = max(found.values()) - MAX_LOG_ODDS
        return {form: value for form, value in found.items() if value >= least}


def restore(
    model: HRMModel, text: str, *, force: bool = False, min_p: float = 0.0, precision: str = "auto"
) -> str:
    """Returns a text with its accents, ñ and ü. Nothing else in it changes.

    Args:
        model: pretrained on text.
        force: also reconsider words that have marks, and assume that any mark may be missing.
        min_p: leave words as they are whose best form is less probable than this.

    Raises:
        HRMError: the model has no n-gram counts, or was finetuned.
    """
    letters = list(text)
    for begin, end, form, prob in Restorer(model, precision).restore_words(text, force):
        if prob >= min_p:
            letters[begin:end] = form
    return "".join(letters)


def omission_rate(words: Sequence[str], scores: Sequence[dict[str, float]]) -> float:
    """Estimates the probability, 0 to 1, that the writer left out the marks of a word that has
    some, by expectation maximization.

    Args:
        words: as they are written.
        scores: of the forms of each word, in nats.
    """
    n_marked = sum(not MARKED.isdisjoint(word) for word in words)
    rate = 1.0
    for _ in range(EM_ITERATIONS if n_marked else 0):
        n_omitted = 0.0
        for word, values in zip(words, scores, strict=True):
            if len(values) > 1 or word not in values:
                best = max(values.values())
                changed = rate * sum(math.exp(v - best) for f, v in values.items() if f != word)
                n_omitted += changed / (changed + math.exp(values.get(word, -math.inf) - best))
        rate = (n_omitted + 1) / (n_omitted + n_marked + 1)
    return rate


def window(letters: Sequence[str], word: Word, begin: int, end: int, max_len: int) -> list[bytes]:
    """Returns the text before and after a word that is scored with it, at most about ``max_len``
    bytes in all.

    Args:
        letters: of the whole text.
        begin, end: of the word's sentence.
    """
    n_before, n_after = min(N_BEFORE, max_len // 2), min(N_AFTER, max_len // 8)
    first = word.begin - n_before
    if first > begin:
        spaces = (i for i in range(first, word.begin) if letters[i].isspace())
        begin = next(spaces, first)
    before = "".join(letters[begin : word.begin]).lstrip()
    after = "".join(letters[word.end : min(end, word.end + n_after)]).rstrip()
    return [re.sub(r"\s+", " ", part).encode(errors="replace") for part in (before, after)]


@torch.inference_mode()
def text_log_probs(model: HRMModel, texts: Sequence[bytes], dtype: torch.dtype) -> list[float]:
    """Returns the log-probability of each text, in nats, as the beginning of a document."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    log_probs = [0.0] * len(texts)
    while order:
        n = max(1, min(len(order), BATCH_TOKENS // max(1, len(texts[order[-1]]))))
        group = [order.pop() for _ in range(n)]
        adapt_threads()
        inputs, targets = (
            pad([[BOS, *texts[i][:-1]] for i in group]),
            pad([texts[i] for i in group]),
        )
        batch = Batch(torch.full((n, 1), BOS), inputs, targets).to(model.device)
        with eval_mode(model), autocast(model.device, dtype):
            nll = model.nll(*batch).mixture
        for i, value in zip(group, nll.tolist(), strict=True):
            log_probs[i] = -value
    return log_probs
