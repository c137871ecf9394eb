"""Decoders: the Executor with its caches, a few tokens at a time.

Shapes: B rows, T pending tokens, S prompt positions, P = plan_dim, D = d_model, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device import adapt_threads, autocast, limit_threads
from ..model import EncoderOutput, Executor, ExecutorCache, HRMModel
from ..model.embeddings import character_positions
from ..ngrams import ContextMatch, Continuations, NgramContext
from ..ngrams.mixture import count_gate_logits, count_probs
from ..tokenizer import starts_character
from .windows import window_start

MIN_DRAFT_PROB = 2**-8  # a draft samples no token that is less likely

Array = NDArray[np.float32]


@dataclass
class DecoderRow:
    """One row of a decoder.

    ``tokens`` begin with BOS; ``preceding`` is the text before them, for the n-gram counts only.
    ``char_positions``: the character of the answer each token is part of, with cross-attention
    only. ``window_start``: of the window in the cache, -1 if there is none. With n-gram counts
    ``context`` is the end of the text from ``context_start`` on, and ``matches`` are the contexts
    at the tokens of the window.
    """

    tokens: list[int]
    preceding: list[int]
    char_positions: list[int]
    window_start: int = -1
    context_start: int = 0
    context: NgramContext | None = None
    matches: list[ContextMatch] = field(default_factory=list)


class Decoder:
    """Computes the distribution of the next token for rows that grow.

    `append` adds tokens. They are *pending* until `verify` predicts the token after each of them.

    Args:
        executor: of the model, possibly in the form of `pack_for_cpu`.
        plan: (B, P).
        sequences: the tokens of each row, BOS first.
        encoded: the Planner's states of the prompts, for cross-attention.
        preceding: the text before each row, for the n-gram counts only.
        dtype: autocast dtype on a GPU.
    """

    def __init__(
        self,
        model: HRMModel,
        executor: Executor,
        plan: Tensor,
        sequences: Sequence[Sequence[int]],
        encoded: EncoderOutput | None = None,
        preceding: Sequence[bytes] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.device = model.config, model.device
        # On a CPU only the packed weights are in lower precision: autocast would gain nothing.
        self.dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.executor, self.ngrams = executor, executor.ngrams
        self.plan, self.encoded = plan, encoded
        self.n_pending = 1  # tokens at the end of each row whose next token `verify` predicts
        self.cache: ExecutorCache | None = None
        self.rows = []
        for tokens, before in zip(sequences, preceding or [b""] * len(sequences), strict=True):
            chars = (
                [] if encoded is None else character_positions(torch.tensor([tokens]))[0].tolist()
            )
            self.rows.append(DecoderRow(list(tokens), list(before), chars))
        if self.ngrams is not None:
            self.index = self.ngrams.index()
            self.gate_weights = self.ngrams.count_gates.arrays()
            for row in self.rows:
                self._extend_context(row)

    def max_draft_len(self) -> int:
        """Returns how many tokens may be drafted after the pending one: all must fit in one window.
        Rows of different lengths take one token at a time."""
        if len(self.rows) > 1 or (self.cache is not None and self.cache.offset is not None):
            return 0
        n = len(self.rows[0].tokens)
        return self._window_start(n) + self.config.max_len - n

    def append(self, tokens: Sequence[int]) -> None:
        """Adds a token to each row."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.tokens.append(token)
            if row.char_positions:
                row.char_positions.append(row.char_positions[-1] + starts_character(token))
            if self.ngrams is not None:
                self._extend_context(row)
        self.n_pending += 1

    @torch.inference_mode()
    def verify(self) -> Array:
        """Runs the Executor. Returns the log-probabilities of the token after each pending token,
        (B, T, V)."""
        # Step 1: start new windows where the old ones are full.
        n = self.n_pending
        moved = []
        for i, row in enumerate(self.rows):
            start = self._window_start(len(row.tokens))
            if start != row.window_start:
                row.window_start = start
                moved.append(i)
        cache = self._prefill(moved) if moved or self.cache is None else self.cache
        if cache.offset is not None and cache.length + n > cache.capacity:
            cache.drop_prefix(cache.length - self.config.max_len - 1)
        self.cache = cache
        # Step 2: run the Executor, on the whole window if the cache is empty.
        n_read = n if cache.length else len(self.rows[0].tokens) - self.rows[0].window_start
        found = self._continuations(self.rows, -n_read, None)
        with self._threads(n_read), autocast(self.device, self.dtype):
            states = self.executor.hidden_states(
                self._ids(row.tokens[-n_read:] for row in self.rows),
                self.plan,
                self.encoded,
                self._ngram_features(found, len(self.rows)),
                cache,
                self._char_positions(self.rows, -n_read, None),
            )[:, -n:]
            logits = self.executor.lm_head(states)
            # Step 3: mix with the n-gram counts.
            if self.ngrams is None or found is None:
                log_probs = logits.float().log_softmax(-1)
            else:
                if n < n_read:
                    found = self._continuations(self.rows, -n, None)
                    assert found is not None
                log_probs = self.ngrams.log_probs(logits, states, found)
        self.n_pending = 0
        array: Array = log_probs.cpu().numpy()
        return array

    def rollback(self, n: int) -> None:
        """Removes the last n tokens of the only row."""
        if n == 0:
            return
        assert self.cache is not None
        (row,) = self.rows
        del row.tokens[-n:], row.char_positions[-n:]
        self.cache.truncate(n)
        if row.context is not None:
            row.context.rollback(n)
            del row.matches[-n:]

    def draft_probs(self) -> dict[int, float]:
        """Predicts the token after the last pending one of the only row, by n-gram counts alone.
        Returns probabilities whose sum is at most one."""
        row = self.rows[0]
        if row.context is None:
            return {}
        found = self.index.gather_continuations(row.matches[-1:])
        (probs,) = count_probs(found, count_gate_logits(found, self.gate_weights))
        (tokens,) = (probs > MIN_DRAFT_PROB).nonzero()
        return dict(zip(tokens.tolist(), probs[tokens].tolist(), strict=True))

    @torch.inference_mode()
    def select(self, indices: Sequence[int]) -> None:
        """Keeps only the given rows."""
        index = torch.tensor(indices, device=self.device)
        self.rows = [self.rows[i] for i in indices]
        self.plan, self.encoded = self.plan[index], self._select_encoded(index)
        if self.cache is not None:
            self.cache.select(index)

    def _threads(self, n: int) -> AbstractContextManager[None]:
        """Limits the CPU threads for n tokens per row. On two cores two threads are a third faster
        for the tokens of a draft, and slower for a single one."""
        adapt_threads()
        is_small = len(self.rows) == 1 and n < 64
        return limit_threads(1 if n < 4 else 2) if is_small else nullcontext()

    def _window_start(self, n_tokens: int) -> int:
        return window_start(n_tokens, self.config.max_len)

    def _extend_context(self, row: DecoderRow) -> None:
        """Adds the last token of a row to its n-gram context, or starts a new one and adds the
        tokens of the window: the text whose n-grams are counted moves with the window."""
        window_start = self._window_start(len(row.tokens))
        window_len = len(row.tokens) - window_start
        start = max(0, len(row.preceding) + window_start - self.config.recent_len)
        if row.context is not None and start == row.context_start:
            added = row.tokens[-1:]
        else:
            text = row.preceding + row.tokens
            row.context = NgramContext(self.index, text[start : len(text) - window_len + 1])
            row.context_start, row.matches = start, [row.context.match()]
            added = row.tokens[window_start + 1 :]
        for token in added:
            row.context.append(token)
            row.matches.append(row.context.match())
        del row.matches[:-window_len]

    def _continuations(
        self, rows: Sequence[DecoderRow], begin: int | None, end: int | None
    ) -> Continuations | None:
        """Returns the continuations of the contexts in a part of the rows' windows, ``None``
        without n-gram counts."""
        if self.ngrams is None:
            return None
        matches = chain.from_iterable(row.matches[begin:end] for row in rows)
        return self.index.gather_continuations([*matches])

    def _ngram_features(self, found: Continuations | None, n_rows: int) -> Tensor | None:
        """Returns what the Executor reads of the n-gram counts, (n_rows, T, V + 2 N)."""
        if self.ngrams is None or found is None:
            return None
        features = self.ngrams.features(found, self.gate_weights)
        return features.view(n_rows, len(features) // n_rows, features.shape[1])

    def _select_encoded(self, index: Tensor) -> EncoderOutput | None:
        if self.encoded is None:
            return None
        states, mask, chars = self.encoded
        return EncoderOutput(states[index], None if mask is None else mask[index], chars[index])

    def _ids(self, rows: Iterable[list[int]]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.long, device=self.device)

    def _char_positions(
        self, rows: Iterable[DecoderRow], begin: int | None, end: int | None
    ) -> Tensor | None:
        """Returns the character positions of a part of the rows' windows."""
        if self.encoded is None:
            return None
        return self._ids(row.char_positions[row.window_start :][begin:end] for row in rows)

    def _prefill(self, moved: list[int]) -> ExecutorCache:
        """Reads the windows of the rows whose windows moved, without the pending tokens.

        If all rows moved and have one length, nothing is read yet: the whole window is read
        together with the pending tokens.
        """
        by_length: dict[int, list[int]] = {}
        for i in moved:
            row = self.rows[i]
            by_length.setdefault(len(row.tokens) - row.window_start, []).append(i)
        if self.cache is not None and len(moved) < len(self.rows):
            cache, end = self.cache, self.cache.length
        elif len(by_length) == 1:
            return self._new_cache(self.config.max_len + 1, self.encoded)
        else:
            # Rows of different lengths end together; twice the size, so that they move rarely.
            cache = self._new_cache(2 * (self.config.max_len + 1), self.encoded)
            end = 1 + max(by_length) - self.n_pending  # with [PLAN]
        for group in by_length.values():
            index = torch.tensor(group, device=self.device)
            cache.copy_rows(index, len(self.rows), end, self._prefill_group(group))
        return cache

    def _prefill_group(self, group: list[int]) -> ExecutorCache:
        """Reads the windows of rows of one length, without the pending tokens."""
        index = torch.tensor(group, device=self.device)
        rows, n = [self.rows[i] for i in group], self.n_pending
        encoded = self._select_encoded(index)
        cache = self._new_cache(self.config.max_len + 1, encoded)
        ids = self._ids(row.tokens[row.window_start : -n] for row in rows)
        chars = self._char_positions(rows, None, -n)
        features = self._ngram_features(self._continuations(rows, None, -n), len(rows))
        with autocast(self.device, self.dtype):
            self.executor.hidden_states(ids, self.plan[index], encoded, features, cache, chars)
        return cache

    def _new_cache(self, capacity: int, encoded: EncoderOutput | None) -> ExecutorCache:
        prompt_len = 0 if encoded is None else encoded.states.shape[1]
        return ExecutorCache(self.config.n_layers_dec, capacity, prompt_len)


class GuidedDecoder:
    """Classifier-free guidance (Sanchez et al. 2023, section 2): two decoders of the same rows with
    different plans. Log-probabilities are unconditional + scale * (conditional - unconditional),
    normalized."""

    def __init__(self, conditional: Decoder, unconditional: Decoder, scale: float) -> None:
        self.conditional, self.unconditional = conditional, unconditional
        self.scale = np.float32(scale)

    def max_draft_len(self) -> int:
        return self.conditional.max_draft_len()

    def append(self, tokens: Sequence[int]) -> None:
        self.conditional.append(tokens)
        self.unconditional.append(tokens)

    def verify(self) -> Array:
        """See `Decoder.verify`."""
        conditional, unconditional = self.conditional.verify(), self.unconditional.verify()
        guided = unconditional + self.scale * (conditional - unconditional)
        guided -= guided.max(-1, keepdims=True)
        return guided - np.log(np.exp(guided).sum(-1, keepdims=True))

    def rollback(self, n: int) -> None:
        self.conditional.rollback(n)
        self.unconditional.rollback(n)

    def draft_probs(self) -> dict[int, float]:
        return self.conditional.draft_probs()

    def select(self, indices: Sequence[int]) -> None:
        self.conditional.select(indices)
        self.unconditional.select(indices)
