"""The Executor writing, a few tokens at a time; what it has read is kept.

Shapes: B rows, T new tokens, D = d_model, V = vocab_size.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .counts import SURE
from .device import at_most, autocast
from .layers import Memory, begins_character, characters
from .lookup import Place, Reader, foretold_hints, order_weights
from .model import Executor, ExecutorCache, HRMModel
from .sampling import AFTER, Sampling, draw, probabilities, sharpened
from .tokenizer import EOS, PAD

Array = NDArray[np.float32]
TINY = np.float32(1e-37)  # so that no logarithm is of zero


def window_start(n_tokens: int, max_len: int) -> int:
    """Where the Executor's window begins once there are ``n_tokens``.

    Whenever ``max_len`` is full it drops the older half. Scoring uses the same windows.
    """
    stride = max_len - max_len // 2
    return max(0, -(-(n_tokens - max_len) // stride)) * stride


class Decoder:
    """What comes next, for rows of tokens that grow.

    Args:
        executor: the model's own, or a `packed` one.
        plan: (B, P).
        rows: the tokens of each, BOS first.
        memory: of each row's prompt, for the model's cross attention, if it is to be read.
        before: what was read before the first token of each, for the counts.
        dtype: of the products, where the executor is not packed.
    """

    def __init__(
        self,
        model: HRMModel,
        executor: Executor,
        plan: Tensor,
        rows: Sequence[Sequence[int]],
        memory: Memory | None = None,
        before: Sequence[bytes] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.device = model.config, model.device
        # On a CPU only the weights are in a lower precision: the rest would gain nothing.
        self.dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.executor, self.counts = executor, executor.counts
        self.plan, self.memory = plan, memory
        self.before = [list(b) for b in before] if before else [[] for _ in rows]
        self.rows = [list(row) for row in rows]
        self.starts = [-1] * len(rows)  # of the windows; at first none is read
        # Which character of its answer each token is part of: of use to cross attention alone.
        self.characters: list[list[int]] = []
        if memory is not None:
            self.characters = [characters(torch.tensor([row]))[0].tolist() for row in self.rows]
        self.n_new = 1  # tokens at the end of each row that `look` has not seen
        self.cache: ExecutorCache | None = None
        self.readers: list[Reader] = []
        self.found: list[list[Place]] = []  # for each row, of the new tokens: until `look`
        if self.counts is not None:
            self.table = self.counts.table()
            self.gains = self.counts.by_count.detach().cpu().numpy()
            self.gains_list = self.gains.tolist()  # for guesses
            self.trust = self.counts.trust.cpu().numpy()
            self.readers = [self._reader(i) for i in range(len(rows))]
            self.found = [[reader.place()] for reader in self.readers]

    def room(self) -> int:
        """How many tokens may be guessed after the only new one: all must be of one window, and
        rows that end together at different lengths take them one by one."""
        if len(self.rows) > 1 or (self.cache is not None and self.cache.offset is not None):
            return 0
        n = len(self.rows[0])
        return self._start(n) + self.config.max_len - n

    def append(self, tokens: Sequence[int]) -> None:
        """Adds a token to each row."""
        for i, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            row.append(token)
            if self.characters:
                self.characters[i].append(self.characters[i][-1] + begins_character(token))
            if self.counts is None:
                continue
            if self._forgotten(i, len(row)) == self._forgotten(i, len(row) - 1):
                self.readers[i].read(token)
            else:
                self.readers[i] = self._reader(i)
            self.found[i].append(self.readers[i].place())
        self.n_new += 1

    @torch.inference_mode()
    def look(self) -> Array:
        """The log-probabilities of what follows each new token, (B, T, V)."""
        n, every = self.n_new, range(len(self.rows))
        starts = [self._start(len(row)) for row in self.rows]
        moved = [i for i in every if starts[i] != self.starts[i]]
        self.starts = starts
        cache = self._begin(moved) if moved or self.cache is None else self.cache
        if cache.offset is not None and cache.length + n > cache.capacity:
            cache.shift(cache.length - self.config.max_len - 1)
        self.cache = cache
        read = n if cache.length else len(self.rows[0]) - starts[0]
        with self._threads(read), autocast(self.device, self.dtype):
            states = self.executor.read(
                self._ids(row[-read:] for row in self.rows),
                self.plan,
                self.memory,
                cache,
                self._places(every, -read, None),
                self._ids(self._last(i, read) for i in every),
            )[:, -n:]
            logits = self.executor.lm_head(states)
            by_state = None if self.counts is None else self.counts.by_state(states)
        self.n_new = 0
        logprobs: Array = logits.float().log_softmax(-1).cpu().numpy()
        if by_state is None:
            return logprobs
        hints = by_state.float().cpu().numpy()
        found = self.table.followers(list(chain.from_iterable(self.found)))
        self.found = [[] for _ in every]
        times, distinct = (part.reshape(hints.shape) for part in found[:2])
        weights = SURE * order_weights(times, distinct, self.gains, hints)
        rest = 1 - weights.sum(-1, keepdims=True)
        counted = found.expected(weights).reshape(logprobs.shape)
        mixed = np.exp(logprobs) * rest + counted
        # What was never counted is not taken through an exponential, where it could vanish.
        return np.where(counted > 0, np.log(mixed + TINY), logprobs + np.log(rest))

    def undo(self, n: int) -> None:
        """Takes back the last n tokens of the only row."""
        if n == 0:
            return
        assert self.cache is not None
        for tokens in (*self.rows, *self.characters):
            del tokens[-n:]
        self.cache.drop(n)
        for reader in self.readers:
            for _ in range(n):
                reader.unread()

    def guess(self) -> dict[int, float]:
        """What the counts alone expect after the only row's last token, as probabilities, in sum at
        most one."""
        if self.counts is None:
            return {}
        hints = foretold_hints(self.trust, self.readers[0].contexts[-1])
        return self.table.guess(self.found[0][-1], self.gains_list, hints)

    @torch.inference_mode()
    def select(self, kept: Sequence[int]) -> None:
        """Keeps only the given rows."""
        at = torch.tensor(kept, device=self.device)
        for name in ("rows", "characters", "before", "starts", "readers", "found"):
            if values := getattr(self, name):
                setattr(self, name, [values[i] for i in kept])
        self.plan, self.memory = self.plan[at], self._memory(at)
        if self.cache is not None:
            self.cache.select(at)

    def _threads(self, n: int) -> AbstractContextManager[None]:
        """For n tokens of each row. Measured on two cores: two threads are a third faster for those
        of a draft, and slower for one."""
        few = len(self.rows) == 1 and n < 64
        return at_most(1 if n < 4 else 2) if few else nullcontext()

    def _start(self, n_tokens: int) -> int:
        return window_start(n_tokens, self.config.max_len)

    def _forgotten(self, i: int, n_tokens: int) -> int:
        """How much of what was read in a row and before it the counts no longer take in, once the
        row has ``n_tokens``."""
        return max(0, len(self.before[i]) + self._start(n_tokens) - self.config.recent_len)

    def _reader(self, i: int) -> Reader:
        row = self.rows[i]
        return Reader(self.table, (self.before[i] + row)[self._forgotten(i, len(row)) :])

    def _memory(self, rows: Tensor) -> Memory | None:
        if self.memory is None:
            return None
        states, visible, places = self.memory
        return Memory(states[rows], None if visible is None else visible[rows], places[rows])

    def _ids(self, rows: Iterable[list[int]]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.long, device=self.device)

    def _last(self, i: int, n: int) -> list[int]:
        """The tokens before the last n that the n-gram embeddings reach, PAD on the left."""
        reach, row = self.config.ngram_max - 1, self.rows[i]
        end = len(row) - n
        last = row[max(self.starts[i], end - reach) : end]
        return [PAD] * (reach - len(last)) + last

    def _places(self, rows: Iterable[int], begin: int | None, end: int | None) -> Tensor | None:
        """Which character of its answer each token of a part of the rows' windows belongs to."""
        if self.memory is None:
            return None
        return self._ids(self.characters[i][self.starts[i] :][begin:end] for i in rows)

    def _begin(self, moved: list[int]) -> ExecutorCache:
        """Reads anew, but for the new tokens, the windows of the rows whose windows moved. If all
        did and are of one length, nothing is read yet: it can be together with the new ones."""
        groups: dict[int, list[int]] = {}  # those of one length together
        for i in moved:
            groups.setdefault(len(self.rows[i]) - self.starts[i], []).append(i)
        if self.cache is not None and len(moved) < len(self.rows):  # beside those that did not
            cache, end = self.cache, self.cache.length
        elif len(groups) == 1:
            return self._new_cache(self.config.max_len + 1, self.memory)
        else:  # all rows, to end together; room for as many steps again before they are shifted
            cache = self._new_cache(2 * (self.config.max_len + 1), self.memory)
            end = 1 + max(groups) - self.n_new  # PLAN, too
        for rows in groups.values():
            at = torch.tensor(rows, device=self.device)
            cache.put(at, len(self.rows), end, self._read(rows))
        return cache

    def _read(self, rows: list[int]) -> ExecutorCache:
        """The windows of rows of one length, but for the new tokens."""
        at = torch.tensor(rows, device=self.device)
        memory = self._memory(at)
        cache = self._new_cache(self.config.max_len + 1, memory)
        ids = self._ids(self.rows[i][self.starts[i] : -self.n_new] for i in rows)
        places = self._places(rows, None, -self.n_new)
        with autocast(self.device, self.dtype):
            self.executor.read(ids, self.plan[at], memory, cache, places)
        return cache

    def _new_cache(self, capacity: int, memory: Memory | None) -> ExecutorCache:
        return ExecutorCache(self.config.n_layers_dec, capacity, memory)


class Guided:
    """Two decoders of the same rows, with different plans, as one: its log-probabilities are those
    by the second plan and ``scale`` times what the first adds to them (classifier-free guidance,
    Sanchez et al. 2023, section 2)."""

    def __init__(self, towards: Decoder, away: Decoder, scale: float) -> None:
        self.towards, self.away, self.scale = towards, away, np.float32(scale)

    def room(self) -> int:
        return self.towards.room()

    def append(self, tokens: Sequence[int]) -> None:
        self.towards.append(tokens)
        self.away.append(tokens)

    def look(self) -> Array:
        """See `Decoder.look`."""
        towards, away = self.towards.look(), self.away.look()
        guided = away + self.scale * (towards - away)
        guided -= guided.max(-1, keepdims=True)
        return guided - np.log(np.exp(guided).sum(-1, keepdims=True))

    def undo(self, n: int) -> None:
        self.towards.undo(n)
        self.away.undo(n)

    def guess(self) -> dict[int, float]:
        return self.towards.guess()

    def select(self, kept: Sequence[int]) -> None:
        self.towards.select(kept)
        self.away.select(kept)


class Written(NamedTuple):
    """A token chosen for a row, and its log-probability before any restriction, in nats."""

    row: int
    token: int
    logprob: float


@dataclass
class Row:
    """What is being written."""

    index: int
    random: np.random.Generator
    state: int = 0  # of the automaton
    written: bytearray = field(default_factory=bytearray)

    def allowed(self, how: Sampling, draft: Sequence[int] = ()) -> Iterator[NDArray[np.bool_]]:
        """What may come next, and after each token of the draft, (V,) each."""
        state = self.state
        for n, token in enumerate((*draft, EOS), len(self.written)):
            yield how.allowed(state, n)
            state = int(AFTER[state, token])

    def add(self, token: int, how: Sampling) -> bool:
        """Returns whether more is to come."""
        if token == EOS:
            return False
        self.state = int(AFTER[self.state, token])
        self.written.append(token)
        return len(self.written) < how.max_new_tokens and not self.written.endswith(how.stop)


WORTH = 0.3  # a draft less likely to be kept than this is not made longer


class Drafted(NamedTuple):
    """A token drawn to come next, its probability, and those of all it was drawn from."""

    token: int
    chance: float
    choices: list[int]
    chances: list[float]


def draft_ahead(
    decoder: Decoder | Guided, row: Row, how: Sampling, draft_len: int
) -> list[Drafted]:
    """Draws tokens by what the counts expect of the only row, and adds them to the decoder. Whether
    one is drawn does not depend on which it is: that would favour some."""
    draft: list[Drafted] = []
    state, likely = row.state, 1.0
    limit = min(draft_len, how.max_new_tokens - len(row.written) - 1, decoder.room())
    while len(draft) < limit:
        expected = decoder.guess()
        end = expected.pop(EOS, 0.0)  # nothing can be drafted after it
        allowed = how.allowed(state, len(row.written) + len(draft))
        choices = [token for token in expected if allowed[token]]
        masses = [expected[token] for token in choices]
        mass = sum(masses)
        # How often a draft is kept, measured on Don Quijote by the share of the counts.
        likely *= 0.74 + 0.26 * (mass + end)
        if mass <= end or likely < WORTH:
            break
        chances = sharpened(masses, how)
        drawn = bisect(list(accumulate(chances[:-1])), row.random.random())
        token = choices[drawn]
        draft.append(Drafted(token, chances[drawn], choices, chances))
        decoder.append([token])
        state = int(AFTER[state, token])
    return draft


def decode(
    decoder: Decoder | Guided,
    how: Sampling,
    randoms: Sequence[np.random.Generator],
    draft_len: int = 0,
) -> Iterator[Written]:
    """Goes on with the rows of a decoder until each has ended.

    Args:
        randoms: for each row.
        draft_len: so many tokens of a row that is alone are drafted from the counts, at most, and
            looked at together. Each is kept, or replaced and the rest dropped, in such a way that
            the text is a draw from the same distribution (speculative sampling: Leviathan, Kalman
            & Matias 2023, section 2.3).
    """
    rows = [Row(i, random) for i, random in enumerate(randoms)]
    while rows:
        draft = draft_ahead(decoder, rows[0], how, draft_len) if len(rows) == 1 else []
        tokens = [drafted.token for drafted in draft]
        logprobs = decoder.look()
        allowed = np.array([list(row.allowed(how, tokens)) for row in rows])
        p = probabilities(np.where(allowed, logprobs, -np.inf), how)
        kept, last = 0, p[:, 0]
        for token, chance, choices, chances in draft:
            if rows[0].random.random() * chance >= p[0, kept, token]:
                left = last.copy()
                left[0, choices] -= chances
                if (left > 0).any():  # else by rounding alone
                    last = np.maximum(left, 0)
                break
            kept += 1
            last = p[:, kept]
        decoder.undo(len(draft) - kept)
        chosen = [draw(w, row.random.random()) for w, row in zip(last, rows, strict=True)]
        going = []
        for i, row in enumerate(rows):
            for place, token in enumerate([*tokens[:kept], chosen[i]]):
                yield Written(row.index, token, float(logprobs[i, place, token]))
                if not row.add(token, how):
                    break
            else:
                going.append(i)
        if going and len(going) < len(rows):
            decoder.select(going)
        rows = [rows[i] for i in going]
        if rows:
            decoder.append([chosen[i] for i in going])
