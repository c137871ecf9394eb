"""The Executor writes text byte by byte, conditioned on a plan.

Shapes: B rows, S prompt positions, T positions, R preceding positions, D = d_model, P = plan_dim,
N orders of n-grams, V = vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HRMConfig
from ..ngrams import NgramMixture
from ..ngrams.mixture import WindowCounts, count_features
from ..tokenizer import PAD, PLAN, VOCAB_SIZE
from .embeddings import PositionEncoding, TokenEmbedding, character_positions
from .kv_cache import ExecutorCache
from .layers import CrossInputs, DecoderBlock, RMSNorm, linear
from .planner import EncoderOutput


class TargetLoss(NamedTuple):
    """Negative log-likelihood of each target, in nats, (B, T), 0 at PAD: of the ``mixture``, of the
    ``network`` alone and of the ``counts`` alone, 0 without n-gram counts. ``plan_log_probs``
    (B, V) are the log-probabilities at [PLAN]."""

    mixture: Tensor
    network: Tensor
    counts: Tensor
    plan_log_probs: Tensor


class Executor(nn.Module):
    """A causal decoder. The plan, projected to a synthetic [PLAN] token, precedes its input."""

    def __init__(self, config: HRMConfig, tok_emb: TokenEmbedding | None = None) -> None:
        super().__init__()
        self.tok_emb = tok_emb or TokenEmbedding(config)
        self.positions = PositionEncoding(config, 1)  # PLAN
        self.from_plan = linear(config.plan_dim, config.d_model)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layers_dec))
        self.norm = RMSNorm(config.d_model)
        self.lm_head = linear(config.d_model, VOCAB_SIZE, zero=True)
        self.ngrams = NgramMixture(config) if config.counts_ngrams else None
        self.from_ngrams = None
        if self.ngrams is not None:
            self.from_ngrams = linear(self.ngrams.n_features, config.d_model)
            nn.init.normal_(self.from_ngrams.weight)  # as token embeddings
            self.from_ngrams.weight.data[:, VOCAB_SIZE:] *= 0.1  # logarithms of counts are larger

    def forward(
        self,
        y_in: Tensor,
        plan: Tensor,
        encoded: EncoderOutput | None = None,
        preceding_ids: Tensor | None = None,
        char_positions: Tensor | None = None,
    ) -> Tensor:
        """Computes the log-probabilities of the next token at each position, mixed with the n-gram
        counts if the model has them.

        This is the reference form: it looks up one position at a time. Training uses `nll`,
        generation a decoder with caches.

        Args:
            y_in: (B, T).
            plan: (B, P).
            encoded: the Planner's states of the prompt, for cross-attention.
            preceding_ids: (B, R), the text before ``y_in``, for the n-gram counts only.
            char_positions: (B, T), the character of the answer each of y_in is part of, for
                cross-attention; by default y_in begins the answer.

        Returns:
            (B, T, V).

        Raises:
            ValueError: ``y_in`` is longer than ``max_len``.
        """
        found = features = None
        if self.ngrams is not None:
            found = self.ngrams.find_continuations(y_in, preceding_ids)
            features = self.ngrams.features(found).view(*y_in.shape, -1)
        states = self.hidden_states(y_in, plan, encoded, features, char_positions=char_positions)
        logits: Tensor = self.lm_head(states)
        if self.ngrams is None or found is None:
            return logits.log_softmax(-1)
        return self.ngrams.log_probs(logits, states, found)

    def nll(
        self,
        y_in: Tensor,
        y_out: Tensor,
        plan: Tensor,
        encoded: EncoderOutput | None = None,
        preceding_ids: Tensor | None = None,
        leave_one_out: bool = False,
        window_counts: WindowCounts | None = None,
    ) -> TargetLoss:
        """Computes the negative log-likelihood of the targets.

        Args:
            y_out: (B, T), the targets; PAD is ignored.
            leave_one_out: for training, see `NgramMixture.lookup`.
            window_counts: what that returned, if it was called before.

        Other arguments and errors as in `forward`.
        """
        # Step 1: the n-gram counts alone.
        features = None
        if self.ngrams is not None:
            found, target_count = window_counts or self.ngrams.lookup(
                y_in, y_out, preceding_ids, leave_one_out
            )
            count_logits = self.ngrams.count_gate_logits(found)
            features = count_features(found, count_logits.detach()).view(*y_in.shape, -1)
        # Step 2: the network alone. The first position is [PLAN], which has no target.
        states = self.hidden_states(y_in, plan, encoded, features, keep_plan=True)
        logits = self.lm_head(states).float()
        plan_log_probs = logits[:, 0].log_softmax(-1)
        targets = F.pad(y_out, (1, 0), value=PAD)
        network = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none"
        ).view(targets.shape)[:, 1:]
        if self.ngrams is None:
            return TargetLoss(network, network, torch.zeros_like(network), plan_log_probs)
        # Step 3: the mixture of both.
        ngrams = self.ngrams

        def target_nll(base_probs: Tensor | float, gate_logits: Tensor) -> Tensor:
            probs = ngrams.target_probs(base_probs, gate_logits, found, target_count)
            return -torch.where(y_out != PAD, probs.view(y_out.shape), 1.0).log()

        mixture = target_nll((-network).exp().flatten(), ngrams.gate_logits(found, states[:, 1:]))
        counts = target_nll(1 / VOCAB_SIZE, count_logits)
        return TargetLoss(mixture, network, counts, plan_log_probs)

    def hidden_states(
        self,
        y_in: Tensor,
        plan: Tensor,
        encoded: EncoderOutput | None = None,
        ngram_features: Tensor | None = None,
        cache: ExecutorCache | None = None,
        char_positions: Tensor | None = None,
        keep_plan: bool = False,
    ) -> Tensor:
        """Runs the blocks. Returns the states that predict each next token, (B, T, D).

        Args:
            ngram_features: what the n-gram counts say after each of y_in, (B, T, V + 2 N), see
                `NgramMixture.features`; ``None`` in a model without counts.
            cache: of the tokens before ``y_in``; y_in is added. [PLAN] precedes y_in only where the
                cache is empty.
            keep_plan: also return the state of [PLAN], as the first, (B, 1 + T, D).

        Other arguments and errors as in `forward`.
        """
        # Step 1: embed the tokens, with [PLAN] in front at the start of a window.
        x = self.tok_emb(y_in)
        if self.from_ngrams is not None:
            assert ngram_features is not None
            x = x + self.from_ngrams(ngram_features).to(x.dtype)
        is_start = cache is None or cache.length == 0
        if is_start:
            plan_token = self.tok_emb.weight[PLAN] + self.from_plan(plan.to(x.dtype))
            x = torch.cat((plan_token[:, None].to(x.dtype), x), dim=1)
        # Step 2: add positions, and prepare what cross-attention reads.
        n = x.shape[1]
        positions = slice(0, n) if cache is None else cache.positions(n)
        mask = None if cache is None else cache.attention_bias(x)
        x, freqs_cis = self.positions(x, positions)
        cross = None
        if encoded is not None:
            chars = character_positions(y_in) if char_positions is None else char_positions
            if is_start:  # [PLAN] is where the window begins, at 0 if it is empty
                first = chars[:, :1] if chars.shape[1] else chars.new_zeros(len(chars), 1)
                chars = torch.cat((first, chars), dim=1)
            cross = self._cross_inputs(encoded, chars, cache, x.dtype)
        # Step 3: run the blocks.
        for i, block in enumerate(self.blocks):
            x = block(x, freqs_cis, cross, None if cache is None else cache.blocks[i], mask)
        return self.norm(x if keep_plan or not is_start else x[:, 1:])

    def _cross_inputs(
        self,
        encoded: EncoderOutput,
        char_positions: Tensor,
        cache: ExecutorCache | None,
        dtype: torch.dtype,
    ) -> CrossInputs:
        """Positions in cross-attention count characters, not bytes: a letter that gains an accent
        moves nothing after it, and a copy stays at the position of its original."""
        rotary, is_cached = self.positions.rotary, cache is not None and cache.has_prompt
        return CrossInputs(
            encoded.states,
            encoded.mask,
            rotary.freqs_cis(char_positions).to(dtype),
            None if is_cached else rotary.freqs_cis(encoded.char_positions).to(dtype),
        )
