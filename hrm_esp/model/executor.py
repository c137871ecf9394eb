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
from ..tokenizer import PAD, PLAN, VOCAB_SIZE
from .embeddings import PositionEncoding, TokenEmbedding, character_positions
from .kv_cache import ExecutorCache
from .layers import CrossInputs, DecoderBlock, RMSNorm, linear
from .planner import EncoderOutput

EPS = 1e-6  # probability below which the network does not see what the counts predict


class TargetLoss(NamedTuple):
    """Negative log-likelihood of the targets of each row, in nats, (B,): of the ``mixture`` and of
    the ``network`` alone. ``plan_log_probs`` (B, V) are the log-probabilities at [PLAN];
    ``gate_logits`` (B, T, N) those of the mixture, ``None`` without n-gram counts."""

    mixture: Tensor
    network: Tensor
    plan_log_probs: Tensor
    gate_logits: Tensor | None


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
        self.from_ngrams = linear(VOCAB_SIZE, config.d_model) if config.counts_ngrams else None
        if self.from_ngrams is not None:
            nn.init.normal_(self.from_ngrams.weight)  # as token embeddings

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
        found = probs = None
        if self.ngrams is not None:
            found = self.ngrams.find_continuations(y_in, preceding_ids)
            probs = self.ngrams.probs(found).view(*y_in.shape, -1)
        states = self.hidden_states(y_in, plan, encoded, probs, char_positions=char_positions)
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
    ) -> TargetLoss:
        """Computes the negative log-likelihood of the targets.

        Args:
            y_out: (B, T), the targets; PAD is ignored.
            leave_one_out: for training, see `NgramMixture.lookup`.

        Other arguments and errors as in `forward`.
        """
        # Step 1: the n-gram counts.
        probs = None
        if self.ngrams is not None:
            found, continuation_count = self.ngrams.lookup(
                y_in, y_out, preceding_ids, leave_one_out
            )
            probs = self.ngrams.probs(found).view(*y_in.shape, -1)
        # Step 2: the network alone. The first position is [PLAN], which has no target.
        states = self.hidden_states(y_in, plan, encoded, probs, keep_plan=True)
        logits = self.lm_head(states).float()
        plan_log_probs = logits[:, 0].log_softmax(-1)
        targets = F.pad(y_out, (1, 0), value=PAD)
        network = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none"
        ).view(targets.shape)[:, 1:]
        if self.ngrams is None:
            return TargetLoss(network.sum(1), network.sum(1), plan_log_probs, None)
        # Step 3: the mixture of both.
        target_probs, gate_logits = self.ngrams.target_probs(
            (-network).exp(), states[:, 1:], found, continuation_count
        )
        mixture = -torch.where(y_out != PAD, target_probs, 1.0).log()
        return TargetLoss(mixture.sum(1), network.sum(1), plan_log_probs, gate_logits)

    def hidden_states(
        self,
        y_in: Tensor,
        plan: Tensor,
        encoded: EncoderOutput | None = None,
        ngram_probs: Tensor | None = None,
        cache: ExecutorCache | None = None,
        char_positions: Tensor | None = None,
        keep_plan: bool = False,
    ) -> Tensor:
        """Runs the blocks. Returns the states that predict each next token, (B, T, D).

        Args:
            ngram_probs: what the n-gram counts predict after each of y_in, (B, T, V); ``None`` in a
                model without counts. The network reads square roots: small probabilities differ.
            cache: of the tokens before ``y_in``; y_in is added. [PLAN] precedes y_in only where the
                cache is empty.
            keep_plan: also return the state of [PLAN], as the first, (B, 1 + T, D).

        Other arguments and errors as in `forward`.
        """
        # Step 1: embed the tokens, with [PLAN] in front at the start of a window.
        x = self.tok_emb(y_in)
        if self.from_ngrams is not None:
            assert ngram_probs is not None
            # What rounding leaves of a count that was subtracted must not be seen.
            x = x + self.from_ngrams((ngram_probs - EPS).clamp(min=0).sqrt()).to(x.dtype)
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
            cross = self._cross_inputs(encoded, chars, cache)
        # Step 3: run the blocks.
        for i, block in enumerate(self.blocks):
            x = block(x, freqs_cis, cross, None if cache is None else cache.blocks[i], mask)
        return self.norm(x if keep_plan or not is_start else x[:, 1:])

    def _cross_inputs(
        self, encoded: EncoderOutput, char_positions: Tensor, cache: ExecutorCache | None
    ) -> CrossInputs:
        """Positions in cross-attention count characters, not bytes: a letter that gains an accent
        moves nothing after it, and a copy stays at the position of its original."""
        rotary, is_cached = self.positions.rotary, cache is not None and cache.has_prompt
        return CrossInputs(
            encoded.states,
            encoded.mask,
            rotary.freqs_cis(char_positions),
            None if is_cached else rotary.freqs_cis(encoded.char_positions),
        )
