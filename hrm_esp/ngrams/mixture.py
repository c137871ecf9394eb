"""The mixture of the network with n-gram counts: the model's probability of a byte.

A network needs many passes to memorize what a table holds after one. So the Executor leaves
memorizing to counts of the training text, and of the text just read, and learns the rest. What the
counts predict is also an input of the network: it learns where they are wrong.

Contexts are the last n tokens, and words (see hashing.py); each is looked up in the training text
and in the text just read. Orders are sorted, n = 1 .. N from the shortest context to the longest,
those of words last; of equal orders, that of the text just read comes last. Let C_n be the count of
the context of order n, c_n(x) how often token x continued it, and D_n by how many different tokens
it was continued:

    p_n(x) = (1 - g_n) p_{n-1}(x) + g_n c_n(x) / C_n                           (interpolation)
    g_n    = sigmoid(a_n log(1 + C_n) + b_n log(1 + D_n) + d_n + (U h)_n),  0 if C_n = 0     (gate)
    p(x)   = (1 - M) p_0(x) + M p_N(x)                                         (cap)

This is deleted interpolation (Jelinek & Mercer 1980) with learned gates: p_0 is the network's
distribution, h its state, ``count_weights`` are (a, b, d), ``gate_proj`` is U. They start as the
weights of Witten & Bell (1991, method C): a = 1, b = -1, d = 0, U = 0. M = MAX_NGRAM_MASS keeps
every token possible.

Before the network has run, its part and its state are unknown. So what the counts alone predict,
which the network reads and drafts are sampled from, is the same sum with p_0 = 0 and with gates
that know only the counts and the last token, t:

    g_n = sigmoid(z_n)
    z   = log(1 + C) - log(1 + D) + W_2 relu(W_1 [log(1 + C), log(1 + D)] + E_t) + v

`CountGates` has their weights. They have a loss of their own, in which p_0 is uniform.

`interpolation_weights` unrolls the sum to p(x) = w_0 p_0(x) + sum over n of w_n c_n(x) / C_n. All
functions of this file take tensors, for training, or NumPy arrays: for the few positions of a
decoding step NumPy is several times as fast as PyTorch.

Shapes: B rows, T positions, R preceding positions, P positions of all rows (B * T), N orders, H =
GATE_DIM, D = d_model, V = vocab_size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import RECENT_ORDERS, HRMConfig
from ..data.stream import ByteStream
from ..tokenizer import PAD, VOCAB_SIZE
from .context import Array, Continuations, NgramContext, NgramIndex, sort_orders
from .hashing import WORD_ORDERS, ContextHasher
from .table import TABLE_ORDERS, NgramTable, following_tokens, recent_counts

MAX_NGRAM_MASS = 1 - 2**-12  # M above
GATE_DIM = 32  # H above
EPS = np.float32(1e-37)  # so that no logarithm is of zero
MIN_PROB = np.float32(1e-6)  # below it may be what rounding leaves of a count that was subtracted


class GateWeights(NamedTuple):
    """The weights of z, tensors or NumPy arrays: E (V, H), W_1 (H, 2 N), W_2 (N, H) and v (N,)."""

    token_emb: Array
    hidden: Array
    out: Array
    bias: Array


def count_gate_logits(found: Continuations, weights: GateWeights) -> Array:
    """Computes z of each context, the logits of the gates of the counts alone: (P, N)."""
    token_emb = embed(found.last_tokens, weights.token_emb)
    hidden = found.log_counts @ weights.hidden.T + token_emb
    n_orders = len(weights.bias)
    log_c, log_d = found.log_counts[:, :n_orders], found.log_counts[:, n_orders:]
    return log_c - log_d + hidden.clip(min=0) @ weights.out.T + weights.bias


def mixture_gate_logits(found: Continuations, count_weights: Array, state_logits: Array) -> Array:
    """Computes the logits of the mixture's gates: (P, N).

    Args:
        count_weights: a, b and d of each order, (N, 3).
        state_logits: U h, (P, N).
    """
    a, b, d = count_weights.T
    log_c, log_d = found.log_counts[:, : len(a)], found.log_counts[:, len(a) :]
    logits: Array = log_c * a + log_d * b + d
    return logits + state_logits


def interpolation_weights(context_count: Array, gate_logits: Array) -> tuple[Array, Array]:
    """Computes the weights of the mixture.

    Args:
        context_count: C of each context, (P, N).
        gate_logits: logits of the gates, (P, N).

    Returns:
        The weight w_0 of the network, (P,), and w_n of each order, (P, N).
    """
    is_known = context_count > 0
    gates: Array = sigmoid(gate_logits) * is_known
    remaining: Array
    # remaining[n] = (1 - g_N) (1 - g_{N-1}) ... of the n longest contexts
    if isinstance(gates, Tensor):  # a product's gradient would divide by its factors
        log_closed = torch.where(is_known, F.logsigmoid(-gate_logits), 0)
        log_closed = F.pad(flip(log_closed), (1, 0))
        remaining = log_closed.cumsum(-1).exp()
    else:
        closed = np.concatenate((np.ones_like(gates[:, :1]), flip(1 - gates)), -1)
        remaining = closed.cumprod(-1)
    order_weights = MAX_NGRAM_MASS * gates * flip(remaining[:, :-1])
    return 1 - MAX_NGRAM_MASS + MAX_NGRAM_MASS * remaining[:, -1], order_weights


def sum_continuations(order_weights: Array, found: Continuations) -> Array:
    """Sums w_n c_n(x) / C_n over the orders: weights (P, N) -> (P, V)."""
    mass = order_weights.reshape(-1)[found.context_index] * found.frequency
    return scatter_sum(mass, found.token_index, (len(found.context_count), VOCAB_SIZE))


def count_probs(found: Continuations, gate_logits: Array) -> Array:
    """Computes what the counts alone predict: (P, V), probabilities whose sum is at most one.

    Args:
        gate_logits: z of each context, (P, N).
    """
    _, order_weights = interpolation_weights(found.context_count, gate_logits)
    return sum_continuations(order_weights, found)


def count_features(found: Continuations, gate_logits: Array) -> Array:
    """Computes what the network reads of the counts: the square roots of what they predict, so that
    small probabilities differ, and the logarithms of C and D, (P, V + 2 N).

    Args:
        gate_logits: z of each context, (P, N).
    """
    xp = array_module(gate_logits)
    probs = xp.sqrt((count_probs(found, gate_logits) - MIN_PROB).clip(min=0))
    return xp.concatenate((probs, found.log_counts / 2), -1)


def mixture_log_probs(network_log_probs: Array, gate_logits: Array, found: Continuations) -> Array:
    """Computes the log-probabilities of all tokens.

    Args:
        network_log_probs: (P, V).
        gate_logits: of each context, (P, N).

    Returns:
        (P, V).
    """
    xp = array_module(gate_logits)
    network_weight, order_weights = interpolation_weights(found.context_count, gate_logits)
    network_weight = network_weight[:, None]
    ngram_probs = sum_continuations(order_weights, found)
    probs = ngram_probs + xp.exp(network_log_probs) * network_weight
    # Where no context knows a token, its probability may be too small for an exponential.
    return xp.where(
        ngram_probs > 0, xp.log(probs + EPS), network_log_probs + xp.log(network_weight)
    )


class WindowCounts(NamedTuple):
    """The ``found`` continuations of the contexts at all positions, as tensors, and how often each
    context was continued by the target, ``target_count`` (P, N)."""

    found: Continuations
    target_count: Tensor


class CountGates(nn.Module):
    """The weights of z. At first its gates are those of Witten & Bell."""

    def __init__(self, n_orders: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(VOCAB_SIZE, GATE_DIM)
        self.hidden = nn.Linear(2 * n_orders, GATE_DIM, bias=False)
        self.out = nn.Linear(GATE_DIM, n_orders)
        nn.init.normal_(self.token_emb.weight, std=0.3)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def weights(self) -> GateWeights:
        return GateWeights(
            self.token_emb.weight, self.hidden.weight, self.out.weight, self.out.bias
        )

    def arrays(self) -> GateWeights:
        """Returns the weights as NumPy arrays."""
        return GateWeights(*(weight.detach().cpu().numpy() for weight in self.weights()))


class NgramMixture(nn.Module):
    """Mixes the network's distribution with n-gram counts; see the equation above."""

    sort_index: Tensor  # (N,) int64, the permutation that sorts the orders
    sorted_index: Tensor  # (N,) int64, its inverse

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.recent_len = config.recent_len
        self.recent_orders, table_orders = (
            [*WORD_ORDERS, *(n for n in orders if n <= config.count_max)]
            for orders in (RECENT_ORDERS, TABLE_ORDERS)
        )
        self.table = NgramTable(table_orders)
        orders = self.table.orders + self.recent_orders
        for name, index in zip(("sort_index", "sorted_index"), sort_orders(orders), strict=True):
            self.register_buffer(name, torch.tensor(index), persistent=False)
        self.n_features = VOCAB_SIZE + 2 * len(orders)
        self.count_gates = CountGates(len(orders))
        self.count_weights = nn.Parameter(torch.tensor([1.0, -1.0, 0.0]).repeat(len(orders), 1))
        self.gate_proj = nn.Linear(config.d_model, len(orders), bias=False)
        nn.init.zeros_(self.gate_proj.weight)
        self._index: tuple[Tensor, NgramIndex] | None = None  # and the entries it was made from

    def build(self, stream: ByteStream) -> None:
        """Counts the n-grams of the training text; see `NgramTable.build`."""
        self.table.build(stream)

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
    ) -> WindowCounts:
        """Looks up the contexts at all positions, for training.

        Args:
            ids: the window, (B, T).
            targets: what comes next, (B, T); PAD where it does not matter.
            preceding_ids: the text before the window, (B, R); none by default.
            leave_one_out: subtract the n-grams of windows that are part of the counted text, so
                that the model does not learn to rely on counts that unseen text does not have. For
                training only: it uses the targets. The preceding text is not subtracted, which was
                no better.
        """
        # Step 1: hash the contexts.
        n_preceding = 0
        sequence = ids
        if preceding_ids is not None:
            preceding_ids = self._recent(preceding_ids)
            n_preceding = preceding_ids.shape[1]
            sequence = torch.cat((preceding_ids, ids), dim=1)
        next_tokens = following_tokens(sequence)
        target_tokens = next_tokens[:, n_preceding:]
        target_tokens.copy_(torch.where(targets == PAD, target_tokens, targets))
        hasher = ContextHasher(sequence)
        in_window = hasher.hashes(self.table.orders, n_preceding)
        # Step 2: look them up.
        counts = (
            self.table.lookup(*in_window, ids, target_tokens, leave_one_out),
            recent_counts(*hasher.hashes(self.recent_orders), next_tokens, n_preceding),
        )
        # Step 3: sort by order.
        (n_rows, n), n_orders = ids.shape, len(self.sort_index)
        context_count, n_continuations, continuation_count = (
            torch.stack([torch.cat([c[i][..., -n:] for c in counts], dim=1) for i in range(3)])
            .transpose(-1, -2)
            .index_select(-1, self.sort_index)
            .flatten(1, 2)
        )
        n_continuations = torch.where(context_count > 0, n_continuations, 0)
        # Step 4: an index among the contexts of one source becomes one among all of them.
        position = torch.arange(n_rows * n, device=ids.device).view(n_rows, 1, n)
        order_index = self.sorted_index.split([len(self.table.orders), len(self.recent_orders)])
        of_source = []
        for c, order in zip(counts, order_index, strict=True):
            index = F.pad(position * n_orders + order[:, None], (c.context_count.shape[-1] - n, 0))
            of_source.append(index.flatten()[c.context_index])
        context_index = torch.cat(of_source)
        found = Continuations(
            ids.flatten(),
            context_count,
            torch.cat((context_count, n_continuations), dim=-1).log1p(),
            context_index,
            context_index // n_orders * VOCAB_SIZE + torch.cat([c.tokens for c in counts]),
            torch.cat([c.counts for c in counts])
            / context_count.clamp(min=1).flatten()[context_index],
        )
        return WindowCounts(found, continuation_count)

    def count_gate_logits(self, found: Continuations) -> Tensor:
        """Computes z of each context, for training: (P, N)."""
        logits: Tensor = count_gate_logits(found, self.count_gates.weights())
        return logits

    def gate_logits(self, found: Continuations, states: Tensor) -> Tensor:
        """Computes the logits of the mixture's gates, for training: (P, N). States (B, T, D)."""
        state_logits = self.gate_proj(states).float().flatten(0, 1)
        logits: Tensor = mixture_gate_logits(found, self.count_weights, state_logits)
        return logits

    def target_probs(
        self,
        base_probs: Tensor | float,
        gate_logits: Tensor,
        found: Continuations,
        target_count: Tensor,
    ) -> Tensor:
        """Computes the mixture's probability of each target.

        Args:
            base_probs: p_0 of each target, (P,).
            gate_logits: logits of the gates, (P, N).
            found, target_count: see `WindowCounts`.

        Returns:
            (P,).
        """
        base_weight, order_weights = interpolation_weights(found.context_count, gate_logits)
        frequency = target_count / found.context_count.clamp(min=1)
        return base_probs * base_weight + (order_weights * frequency).sum(-1)

    @torch.no_grad()
    def features(self, found: Continuations, weights: GateWeights | None = None) -> Tensor:
        """Computes `count_features` outside of training: (P, V + 2 N), on the model's device.

        Args:
            weights: `CountGates.arrays`, if they are known.
        """
        weights = weights or self.count_gates.arrays()
        array = count_features(found, count_gate_logits(found, weights))
        return torch.from_numpy(array).to(self.gate_proj.weight.device)

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
        network_log_probs = logits.float().log_softmax(-1).flatten(0, 1)
        if states.device.type != "cpu" or torch.is_grad_enabled():
            found = Continuations(*(torch.from_numpy(a).to(states.device) for a in found))
            gate_logits = self.gate_logits(found, states)
            mixed = mixture_log_probs(network_log_probs, gate_logits, found)
        else:
            state_logits = self.gate_proj(states).float().flatten(0, 1).numpy()
            gate_logits = mixture_gate_logits(found, self.count_weights.numpy(), state_logits)
            array = mixture_log_probs(network_log_probs.numpy(), gate_logits, found)
            mixed = torch.from_numpy(array)
        return mixed.view_as(logits)

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


def embed(ids: Array, weight: Array) -> Array:
    return weight[ids] if isinstance(weight, np.ndarray) else F.embedding(ids, weight)


def flip(x: Array) -> Array:
    return x[..., ::-1] if isinstance(x, np.ndarray) else x.flip(-1)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(np.minimum(-x, 80))) if isinstance(x, np.ndarray) else x.sigmoid()


def scatter_sum(values: Array, index: Array, shape: tuple[int, ...]) -> Array:
    """Sums values (M,) that have the same index (M,) into a new array of a shape."""
    if isinstance(values, np.ndarray):
        sums = np.bincount(index, values, math.prod(shape)).astype(np.float32)
    else:
        sums = values.new_zeros(math.prod(shape)).scatter_add(0, index, values)
    return sums.reshape(shape)
