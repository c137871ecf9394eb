"""The mixture of the network with n-gram counts: the model's probability of a byte.

A network needs many passes to memorize what a table holds after one. So the Executor leaves
memorizing to counts of the training text, and of the text just read, and learns the rest. What the
counts predict is also an input of the network: it learns where they are wrong.

Orders are sorted, n = 1 .. N from the shortest context to the longest; of equal orders, that of the
text just read comes last. Let p_0 be the network's distribution, C_n the count of the context of
order n, c_n(x) how often token x continued it, and D_n by how many different tokens it was
continued:

    p_n(x) = (1 - g_n) p_{n-1}(x) + g_n c_n(x) / C_n                           (interpolation)
    g_n    = sigmoid(a_n log(1 + C_n) + b_n log(1 + D_n) + d_n + (U h)_n),  0 if C_n = 0     (gate)
    p(x)   = (1 - M) p_0(x) + M p_N(x)                                         (cap)

This is deleted interpolation (Jelinek & Mercer 1980) with a learned gate: h is the network's state,
``count_weights`` are (a, b, d), ``gate_proj`` is U. They start as the weights of Witten & Bell
(1991, method C): a = 1, b = -1, d = 0, U = 0. M = MAX_NGRAM_MASS keeps every token possible.

`interpolation_weights` unrolls it to p(x) = w_0 p_0(x) + sum over n of w_n c_n(x) / C_n. That is
the form for tensors and NumPy arrays; `draft_probs` at the end of this file is the form for a
single position, in plain Python.

Before the network has run, its part and its state are unknown. So its input is the same sum without
the network (p_0 = 0) and with U h = 0, see `NgramMixture.probs`.

Shapes: B rows, T positions, R preceding positions, N orders, D = d_model, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from math import exp, log1p
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import RECENT_ORDERS, HRMConfig
from ..data.stream import ByteStream
from ..tokenizer import PAD, VOCAB_SIZE
from .context import (
    Array,
    Continuations,
    NgramContext,
    NgramIndex,
    OrderCounts,
    sort_orders,
)
from .gate_means import GateMeans, MeanGateLogit
from .table import TABLE_ORDERS, NgramTable, following_tokens, recent_counts

MAX_NGRAM_MASS = 1 - 2**-12  # M above
DRAFT_TAIL_MASS = 0.2  # probability mass below which a draft ignores shorter contexts
EPS = np.float32(1e-37)  # so that no logarithm is of zero


def interpolation_weights(
    context_count: Array, n_continuations: Array, gate_logits: Array | float, count_weights: Array
) -> tuple[Array, Array]:
    """Computes the weights of the mixture, on tensors or on NumPy arrays.

    Args:
        context_count, n_continuations, gate_logits: C, D and U h of each context, (..., N).
        count_weights: a, b and d of each order, (N, 3).

    Returns:
        The weight w_0 of the network, (...), and w_n of each order, (..., N).
    """
    xp = array_module(context_count)
    a, b, d = count_weights.T
    score = xp.log(context_count + 1) * a + xp.log(n_continuations + 1) * b + d + gate_logits
    gates = sigmoid(score) * (context_count > 0)
    # remaining[n] = (1 - g_n) (1 - g_{n+1}) ... (1 - g_N)
    remaining = xp.flip(xp.cumprod(xp.flip(1 - gates, (-1,)), -1), (-1,))
    after = xp.concatenate((remaining[..., 1:], xp.ones_like(remaining[..., :1])), -1)
    order_weights = MAX_NGRAM_MASS * gates * after
    return 1 - MAX_NGRAM_MASS + MAX_NGRAM_MASS * remaining[..., 0], order_weights


def mixture_log_probs(
    network_log_probs: Array, gate_logits: Array, count_weights: Array, found: Continuations
) -> Array:
    """Computes the log-probabilities of all tokens, on tensors or on NumPy arrays.

    Args:
        network_log_probs: (B, T, V).
        gate_logits: U h of each order, (B, T, N).
        count_weights: a, b and d of each order, (N, 3).
        found: the continuations of the contexts at the B * T positions.

    Returns:
        (B, T, V).
    """
    xp = array_module(gate_logits)
    network_weight, order_weights = interpolation_weights(
        found.context_count.reshape(gate_logits.shape),
        found.n_continuations.reshape(gate_logits.shape),
        gate_logits,
        count_weights,
    )
    network_weight = network_weight[..., None]
    ngram_probs = sum_continuations(order_weights, found).reshape(network_log_probs.shape)
    probs = ngram_probs + xp.exp(network_log_probs) * network_weight
    # Where no context knows a token, its probability may be too small for an exponential.
    return xp.where(
        ngram_probs > 0, xp.log(probs + EPS), network_log_probs + xp.log(network_weight)
    )


def sum_continuations(order_weights: Array, found: Continuations) -> Array:
    """Sums w_n c_n(x) / C_n over the orders: weights (..., N) of P positions -> (P, V)."""
    mass = order_weights.reshape(-1)[found.context_index] * found.frequency
    return scatter_sum(mass, found.token_index, (len(found.context_count), VOCAB_SIZE))


class NgramMixture(nn.Module):
    """Mixes the network's distribution with n-gram counts; see the equation above."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.recent_len = config.recent_len
        self.recent_orders = [n for n in RECENT_ORDERS if n <= config.count_max]
        self.table = NgramTable([n for n in TABLE_ORDERS if n <= config.count_max])
        orders = self.table.orders + self.recent_orders
        self.sort_index, self.sorted_index = sort_orders(orders)
        self.count_weights = nn.Parameter(torch.tensor([1.0, -1.0, 0.0]).repeat(len(orders), 1))
        self.gate_proj = nn.Linear(config.d_model, len(orders), bias=False)
        nn.init.zeros_(self.gate_proj.weight)
        self.gate_means = GateMeans(len(orders))
        self._index: tuple[Tensor, NgramIndex] | None = None  # and the entries it was made from

    def build(self, stream: ByteStream, path: Path | None = None) -> None:
        """Counts the n-grams of the training text; see `NgramTable.build`."""
        self.table.build(stream, path)

    def index(self) -> NgramIndex:
        """Returns the table in the form that generation looks up."""
        entries = self.table.entries
        if self._index is None or self._index[0] is not entries:
            self._index = entries, NgramIndex(self.table, self.recent_orders)
        return self._index[1]

    @torch.no_grad()
    def lookup(
        self,
        ids: Tensor,
        targets: Tensor,
        preceding_ids: Tensor | None = None,
        leave_one_out: bool = False,
    ) -> tuple[Continuations, Tensor]:
        """Looks up the contexts at all positions, for training.

        Args:
            ids: the window, (B, T).
            targets: what comes next, (B, T); PAD where it does not matter.
            preceding_ids: the text before the window, (B, R); none by default.
            leave_one_out: subtract the n-grams of windows that are part of the counted text, so
                that the model does not learn to rely on counts that unseen text does not have. For
                training only: it uses the targets. The preceding text is not subtracted, which was
                no better.

        Returns:
            The continuations, as tensors, and how often each context was continued by the target,
            (B, T, N).
        """
        preceding_ids = self._recent(ids[:, :0] if preceding_ids is None else preceding_ids)
        next_tokens = torch.where(targets == PAD, following_tokens(ids), targets)
        counts = (
            self.table.lookup(ids, next_tokens, preceding_ids, leave_one_out),
            recent_counts(ids, next_tokens, preceding_ids, self.recent_orders),
        )
        context_count, n_continuations, continuation_count = (
            torch.cat([c[i] for c in counts], dim=-1)[..., self.sort_index] for i in range(3)
        )
        # An index among the table's or the recent contexts becomes one among all of them.
        n_table, n_orders = len(self.table.orders), len(self.sorted_index)
        order_index = torch.tensor(self.sorted_index, device=ids.device)
        context_index = torch.cat(
            [
                c.context_index // len(order) * n_orders + order[c.context_index % len(order)]
                for c, order in zip(
                    counts, (order_index[:n_table], order_index[n_table:]), strict=True
                )
            ]
        )
        context_count = context_count.flatten(0, 1)
        found = Continuations(
            context_count,
            n_continuations.flatten(0, 1),
            context_index,
            context_index // n_orders * VOCAB_SIZE + torch.cat([c.tokens for c in counts]),
            torch.cat([c.counts for c in counts])
            / context_count.flatten()[context_index].clamp(min=1),
        )
        return found, continuation_count

    def target_probs(
        self,
        network_probs: Tensor,
        states: Tensor,
        found: Continuations,
        continuation_count: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Computes the mixture's probability of each target.

        Args:
            network_probs: the network's probability of each target, (B, T).
            states: the network's, (B, T, D).
            found, continuation_count: see `lookup`.

        Returns:
            The probabilities (B, T), and the gate logits U h (B, T, N).
        """
        gate_logits = self.gate_proj(states).float()
        context_count = found.context_count.view(gate_logits.shape)
        network_weight, order_weights = interpolation_weights(
            context_count,
            found.n_continuations.view(gate_logits.shape),
            gate_logits,
            self.count_weights,
        )
        ngram_probs = order_weights * continuation_count / context_count.clamp(min=1)
        return network_probs * network_weight + ngram_probs.sum(-1), gate_logits

    @torch.no_grad()
    def probs(self, found: Continuations) -> Tensor:
        """Computes what the counts alone predict at P positions, the input of the network: (P, V)
        on the device of the weights, probabilities whose sum is at most one."""
        is_tensor = isinstance(found.frequency, Tensor)
        _, order_weights = interpolation_weights(
            found.context_count,
            found.n_continuations,
            0.0,
            self.count_weights if is_tensor else self.count_weights.cpu().numpy(),
        )
        probs = sum_continuations(order_weights, found)
        return probs if is_tensor else torch.from_numpy(probs).to(self.count_weights.device)

    def log_probs(self, logits: Tensor, states: Tensor, found: Continuations) -> Tensor:
        """Computes the mixture's log-probabilities of all tokens.

        Args:
            logits: the network's, (B, T, V).
            states: the network's, (B, T, D).
            found: the continuations of the contexts at the B * T positions, see
                `find_continuations`.

        Returns:
            (B, T, V).
        """
        gate_logits = self.gate_proj(states).float()
        network_log_probs = logits.float().log_softmax(-1)
        if states.device.type != "cpu" or torch.is_grad_enabled():
            found = Continuations(*(torch.from_numpy(a).to(states.device) for a in found))
            return mixture_log_probs(network_log_probs, gate_logits, self.count_weights, found)
        # For the few positions of a decoding step NumPy is several times as fast as PyTorch.
        mixed = mixture_log_probs(
            network_log_probs.numpy(), gate_logits.numpy(), self.count_weights.numpy(), found
        )
        return torch.from_numpy(mixed)

    def find_continuations(self, ids: Tensor, preceding_ids: Tensor | None = None) -> Continuations:
        """Finds the continuations of the contexts at each of ids (B, T), after preceding_ids
        (B, R); of B * T positions. One position at a time: training uses `lookup`."""
        preceding_ids = self._recent(ids[:, :0] if preceding_ids is None else preceding_ids)
        matches = []
        for row, preceding in zip(ids.tolist(), preceding_ids.tolist(), strict=True):
            context = NgramContext(self.index(), preceding)
            for token in row:
                context.append(token)
                matches.append(context.match())
        return self.index().gather_continuations(matches)

    def _recent(self, preceding_ids: Tensor) -> Tensor:
        """Returns the last ``recent_len`` of preceding_ids (B, R)."""
        return preceding_ids[:, max(0, preceding_ids.shape[1] - self.recent_len) :]


def array_module(x: Array) -> Any:
    """Returns torch or NumPy, which name the functions used here alike."""
    return np if isinstance(x, np.ndarray) else torch


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(np.minimum(-x, 80))) if isinstance(x, np.ndarray) else x.sigmoid()


def scatter_sum(values: Array, index: Array, shape: tuple[int, ...]) -> Array:
    """Sums values (M,) that have the same index (M,) into a new array of a shape."""
    if isinstance(values, np.ndarray):
        sums = np.bincount(index, values, math.prod(shape)).astype(np.float32)
    else:
        sums = values.new_zeros(math.prod(shape)).scatter_add(0, index, values)
    return sums.reshape(shape)


def draft_probs(
    longest_first: Iterable[OrderCounts],
    gate_logit: MeanGateLogit,
    count_weights: Sequence[Sequence[float]],
) -> dict[int, float]:
    """Computes what the n-gram counts alone add to p_N at one position, from the longest context to
    the shortest: the sum of the unrolled equation, without tensors and without the cap M.

    Stops where the contexts so far have all but DRAFT_TAIL_MASS of the mass.

    Args:
        longest_first: counts of the contexts at the position, see `NgramIndex.longest_contexts`.
        gate_logit: function from an order's index to its U h.
        count_weights: a, b and d of each order, (N, 3).

    Returns:
        Probabilities of tokens; their sum is the weight of the counts in p_N.
    """
    probs: dict[int, float] = {}
    remaining = 1.0
    for n, context_count, tokens, counts in longest_first:
        a, b, d = count_weights[n]
        score = a * log1p(context_count) + b * log1p(len(tokens)) + d + gate_logit(n)
        gate = 1 / (1 + exp(min(-score, 80)))
        scale = remaining * gate / context_count
        for token, count in zip(tokens, counts):  # noqa: B905
            probs[token] = probs.get(token, 0) + scale * count
        remaining *= 1 - gate
        if remaining < DRAFT_TAIL_MASS:
            break
    return probs
