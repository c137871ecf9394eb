"""The two levels: a Planner that reads, an Executor that writes.

Shapes: B rows, S prompt positions, T written positions, D = d_model, P = plan_dim,
K codes of the codebook, V = vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HRMConfig
from .counts import NgramCounts
from .layers import (
    Angles,
    BlockCache,
    DecoderBlock,
    EncoderBlock,
    KVCache,
    Memory,
    NgramEmbedding,
    RMSNorm,
    Rotary,
    characters,
    linear,
)
from .tokenizer import PAD, PLAN, VOCAB_SIZE


class Positions(nn.Module):
    """Where a token stands: angles for the blocks (rotary) or a vector added to it (learned)."""

    def __init__(self, config: HRMConfig, special: int) -> None:
        """``special``: tokens that come with ``max_len`` bytes."""
        super().__init__()
        self.capacity = config.max_len + special
        rotary = config.positions == "rotary"
        self.rotary = Rotary(config.head_dim, self.capacity) if rotary else None
        self.learned = None if rotary else nn.Embedding(self.capacity, config.d_model)
        if self.learned is not None:
            nn.init.normal_(self.learned.weight, std=0.5)

    def forward(
        self, x: Tensor, start: int = 0, places: Tensor | None = None
    ) -> tuple[Tensor, Angles | None]:
        """x: (B, T, D), the embeddings of positions ``start`` to ``start + T``, or of ``places``
        (B, T)."""
        end = start + x.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} positions, but the model has {self.capacity}")
        at = slice(start, end) if places is None else places
        if self.learned is not None:
            return x + self.learned.weight[at].to(x.dtype), None
        return x, None if self.rotary is None else self.rotary(at)

    def angles_at(self, places: Tensor) -> Angles | None:
        """places: (B, T), from any 0 on -> angles (rotary) or nothing (learned)."""
        return None if self.rotary is None else self.rotary.at(places)


class TokenEmbedding(nn.Embedding):
    """A vector for each token, and to each token those of the n-grams it ends."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__(VOCAB_SIZE, config.d_model)
        self.ngrams = NgramEmbedding(config) if config.ngram_max > 1 else None

    def forward(self, ids: Tensor, before: Tensor | None = None) -> Tensor:
        """ids: (B, T), after the tokens ``before`` (B, R), none by default -> (B, T, D)."""
        x = super().forward(ids)
        if self.ngrams is not None:
            x = x + self.ngrams(ids, ids[:, :0] if before is None else before)
        device = ids.device.type  # in mixed precision the residual stream is in the lower one, too
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


N_POOLED = 1024  # rows by which new ones are standardized


class Codebook(nn.Module):
    """Chooses the plan from K codes by Gumbel-Softmax (Jang et al. 2017, section 2).

    Logits are cosines times a learned scale. In training they are sampled: softly, or hard with
    straight-through gradients. In evaluation there is no noise: the same prompt, the same plan.

    What the Planner pools is standardized before it is projected, by the rows last met in training:
    what all texts have in common is many times longer than what tells them apart, and would leave
    all cosines nearly alike. As in a batch norm, training takes them in; evaluation does not.
    """

    last_pooled: Tensor  # (N_POOLED, D), zeros at first

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.met: list[Tensor] = []  # in the step under way, (B, D) each
        self.register_buffer("last_pooled", torch.zeros(N_POOLED, config.d_model))
        self.n_codes, self.hard = config.n_plan_codes, config.gumbel_hard
        self.codes = nn.Parameter(torch.randn(self.n_codes, config.plan_dim))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, P) -> the plan (B, P) and the logits (B, K)."""
        logits = self.log_scale.exp() * self.cosines(x)
        return self.mix(self.weigh(logits)), logits

    def cosines(self, x: Tensor) -> Tensor:
        """x: (B, P) -> those with the codes, (B, K)."""
        return F.normalize(x.float(), dim=-1) @ F.normalize(self.codes.float(), dim=-1).T

    def standardized(self, pooled: Tensor) -> Tensor:
        """(B, D) -> the same, less the mean of the rows last met, over their deviation."""
        var, mean = torch.var_mean(self.last_pooled, 0, correction=0)
        return ((pooled.float() - mean) * (var + 1e-4).rsqrt()).to(pooled.dtype)

    def remember(self) -> None:
        """Takes in the rows met in a step, once it is done, and forgets the oldest."""
        rows = torch.cat(self.met)
        rows = rows[rows.isfinite().all(1)]
        if len(rows) and not self.last_pooled.any():
            rows = rows.repeat(-(-N_POOLED // len(rows)), 1)
        self.last_pooled.copy_(torch.cat((self.last_pooled, rows))[-N_POOLED:])
        self.met = []

    def weigh(self, logits: Tensor) -> Tensor:
        """Logits (B, K) -> the weight of each code, (B, K), each row summing to one."""
        if self.training:
            return F.gumbel_softmax(logits, hard=self.hard)
        if self.hard:
            return F.one_hot(logits.argmax(-1), self.n_codes).to(logits.dtype)
        return logits.softmax(-1)

    def mix(self, weights: Tensor) -> Tensor:
        """Weights (B, K) -> the plan, (B, P)."""
        return weights @ self.codes.to(weights.dtype)


class Planner(nn.Module):
    """A bidirectional encoder that reads a prompt and writes one plan vector."""

    def __init__(self, config: HRMConfig, tok_emb: TokenEmbedding | None = None) -> None:
        super().__init__()
        self.tok_emb = tok_emb or TokenEmbedding(config)
        self.positions = Positions(config, 2)  # BOS and EOS
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layers_enc))
        self.norm = RMSNorm(config.d_model)
        self.to_plan = linear(config.d_model, config.plan_dim)
        self.codebook = Codebook(config) if config.gumbel else None

    def forward(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """prompt_ids: (B, S), PAD on the right -> the plan (B, P) and, with a codebook, its logits
        (B, K)."""
        return self.plan(self.read(prompt_ids))

    def read(self, prompt_ids: Tensor) -> Memory:
        """prompt_ids: (B, S) -> the prompt's states (B, S, D), which of them are not PAD, and the
        characters they are of."""
        is_token = prompt_ids != PAD
        visible = None if is_token.all() else is_token
        x, angles = self.positions(self.tok_emb(prompt_ids))
        for block in self.blocks:
            x = block(x, angles, visible)
        return Memory(self.norm(x), visible, characters(prompt_ids))

    def plan(self, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """States (B, S, D), mean-pooled without PAD -> plan (B, P), logits (B, K) or None."""
        states, visible, _ = memory
        if visible is None:
            pooled = states.mean(1)
        else:
            weight = visible.to(states.dtype)[..., None]
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.codebook is None:
            return self.to_plan(pooled), None
        if self.training:
            self.codebook.met.append(pooled.detach().float())
        return self.codebook(self.to_plan(self.codebook.standardized(pooled)))

    def last_logits(self) -> Tensor | None:
        """With a codebook, its logits for the rows last met in training, several for each code,
        (N, K). The scale takes no gradient: to be surest of all choices, it would grow for ever.
        """
        if self.codebook is None:
            return None
        rows = self.codebook.last_pooled[-max(256, 8 * self.codebook.n_codes) :]
        plan = self.to_plan(self.codebook.standardized(rows))
        return self.codebook.log_scale.exp().detach() * self.codebook.cosines(plan)


class ExecutorCache:
    """What the Executor has read: for each block, its keys and values.

    Rows may have read texts of different lengths: they end together, at ``length`` (PLAN counts),
    and the first ``offset`` (B,) of each are not its own; ``None``: all are.
    """

    def __init__(self, n_layers: int, capacity: int, memory: Memory | None) -> None:
        reads = 0 if memory is None else memory.states.shape[1]
        self.blocks = [BlockCache(KVCache(capacity), KVCache(reads)) for _ in range(n_layers)]
        self.offset: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.blocks[0].own.capacity

    @property
    def length(self) -> int:
        return self.blocks[0].own.length

    def places(self, n: int) -> Tensor | None:
        """Positions of the next n tokens, (B, n), if rows differ in them."""
        if self.offset is None:
            return None
        return self.length - self.offset[:, None] + torch.arange(n, device=self.offset.device)

    def mask(self, x: Tensor) -> Tensor | None:
        """What is added to the scores of the keys for the next n tokens x (B, n, D): 0 where they
        may be read, else -inf. (n, length + n) or, where rows differ and take one token at a time,
        (B, 1, 1, length + 1); None: all may, or in an empty cache those up to their own."""
        n = x.shape[1]
        if self.offset is not None:
            assert n == 1
            others = torch.arange(self.length + 1, device=x.device) < self.offset[:, None]
            return x.new_zeros(others.shape).masked_fill_(others, -torch.inf)[:, None, None]
        if n == 1 or self.length == 0:
            return None
        return x.new_full((n, self.length + n), -torch.inf).triu_(self.length + 1)

    @property
    def has_memory(self) -> bool:
        """Whether the keys and values of the memory are known."""
        return self.blocks[0].memory.length > 0

    def drop(self, n: int) -> None:
        """Forgets the last n tokens."""
        for block in self.blocks:
            block.own.length -= n

    def shift(self, n: int) -> None:
        """Makes room: forgets the first n slots, which are no row's own."""
        assert self.offset is not None
        self.offset = self.offset - n
        for block in self.blocks:
            block.own.shift(n)

    def put(self, rows: Tensor, n_rows: int, end: int, other: ExecutorCache) -> None:
        """Replaces what the given ones of ``n_rows`` rows have read by what another cache's rows
        have, moved to end at ``end``."""
        if self.offset is None:
            self.offset = torch.zeros(n_rows, dtype=torch.long, device=rows.device)
        self.offset[rows] = end - other.length
        for block, theirs in zip(self.blocks, other.blocks, strict=True):
            block.own.put(rows, n_rows, end, theirs.own)
            block.memory.put(rows, n_rows, theirs.memory.length, theirs.memory)

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch."""
        for block in self.blocks:
            block.own.select(rows)
            block.memory.select(rows)
        if self.offset is not None:
            self.offset = self.offset[rows]


class Nats(NamedTuple):
    """What a batch costs in nats: each row's targets, ``mixed`` with the counts and by the network
    ``alone``, and a token of the prompt to the ``bag`` that the plan foretells, all (B,). With a
    codebook also its ``code_logits`` (B, K)."""

    mixed: Tensor
    alone: Tensor
    bag: Tensor
    code_logits: Tensor | None


def bag_nats(log_p: Tensor, ids: Tensor) -> Tensor:
    """What a token of ids (B, S), PAD aside, costs by one distribution for all of its row, its
    logarithms (B, V), -> (B,)."""
    is_token = ids != PAD
    return -(log_p.gather(1, ids) * is_token).sum(1) / is_token.sum(1).clamp(min=1)


class Executor(nn.Module):
    """A causal decoder that writes byte after byte, the plan in front as a synthetic token."""

    def __init__(self, config: HRMConfig, tok_emb: TokenEmbedding | None = None) -> None:
        super().__init__()
        self.tok_emb = tok_emb or TokenEmbedding(config)
        self.positions = Positions(config, 1)  # PLAN
        self.from_plan = linear(config.plan_dim, config.d_model)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layers_dec))
        self.norm = RMSNorm(config.d_model)
        self.lm_head = linear(config.d_model, VOCAB_SIZE, zero=True)
        self.counts = NgramCounts(config) if config.counts else None

    def forward(
        self,
        y_in: Tensor,
        plan_vec: Tensor,
        memory: Memory | None = None,
        past: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """y_in: (B, T), plan_vec: (B, P) -> the logits of the token after each of y_in, (B, T, V).

        Args:
            memory: the Planner's states of the prompt, read where the model has cross attention.
            past: (B, R), the text before the window that begins with ``y_in``, for the counts
                alone; none by default.
            places: (B, T), which character of the answer each of y_in is part of, for cross
                attention; by default y_in begins the answer.

        Raises:
            ValueError: more positions than ``max_len``.
        """
        states = self.read(y_in, plan_vec, memory, places=places)
        logits: Tensor = self.lm_head(states)
        if self.counts is None:
            return logits
        return self.counts.mix(logits, states, self.counts.followers(y_in, past))

    def nats(
        self,
        y_in: Tensor,
        y_out: Tensor,
        plan_vec: Tensor,
        memory: Memory | None = None,
        past: Tensor | None = None,
        leave_out: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the targets ``y_out`` (B, T) of each row cost in nats, and what they would cost
        without the counts, both (B,); PAD costs nothing. With them the log-probabilities foretold
        at ``[PLAN]``, (B, V).

        Args:
            y_in, plan_vec, memory, past: as in `forward`.
            leave_out: take rows that the counts were made from out of the counts, for training.
        """
        states = self.read(y_in, plan_vec, memory, keeps_plan=True)
        logits = self.lm_head(states).float()
        by_plan = logits[:, 0].log_softmax(-1)
        targets = F.pad(y_out, (1, 0), value=PAD)
        alone = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none"
        ).view(targets.shape)[:, 1:]
        if self.counts is None:
            return alone.sum(1), alone.sum(1), by_plan
        p = self.counts.probability((-alone).exp(), states[:, 1:], y_in, y_out, past, leave_out)
        return -torch.where(y_out != PAD, p, 1.0).log().sum(1), alone.sum(1), by_plan

    def read(
        self,
        y_in: Tensor,
        plan_vec: Tensor,
        memory: Memory | None = None,
        cache: ExecutorCache | None = None,
        places: Tensor | None = None,
        before: Tensor | None = None,
        keeps_plan: bool = False,
    ) -> Tensor:
        """The states from which each next token is foretold, (B, T, D); arguments as in `forward`.

        Args:
            cache: what came before ``y_in``, which is added to it; ``[PLAN]`` is put in front only
                where it is empty.
            before: (B, R), the last tokens in the cache, PAD where there are fewer, for the n-gram
                embeddings.
            keeps_plan: return that of ``[PLAN]``, too, in front, (B, 1 + T, D).
        """
        x = self.tok_emb(y_in, before)
        start = 0 if cache is None else cache.length
        if start == 0:
            plan = self.tok_emb.weight[PLAN] + self.from_plan(plan_vec.to(x.dtype))
            x = torch.cat((plan[:, None].to(x.dtype), x), dim=1)
        positions = mask = None
        if cache is not None:
            positions, mask = cache.places(x.shape[1]), cache.mask(x)
        x, angles = self.positions(x, 0 if positions is not None else start, positions)
        cross_angles = memory_angles = None
        if memory is not None:
            # Characters, not bytes: a letter that gains its accent moves nothing after it, and what
            # is copied stays where it was, however long the prompt.
            places = characters(y_in) if places is None else places
            if start == 0:  # PLAN is where the window begins: at 0 if it is empty
                first = places[:, :1] if places.shape[1] else places.new_zeros(len(places), 1)
                places = torch.cat((first, places), dim=1)
            cross_angles = self.positions.angles_at(places)
            if cache is None or not cache.has_memory:
                memory_angles = self.positions.angles_at(memory.places)
        for i, block in enumerate(self.blocks):
            own = cache and cache.blocks[i]
            x = block(x, angles, memory, cross_angles, memory_angles, own, mask)
        return self.norm(x if keeps_plan or start > 0 else x[:, 1:])


class HRMModel(nn.Module):
    """Planner and Executor.

    ``stage`` says what the weights were last trained for: ``pretrain`` or ``finetune``.
    """

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.config = config
        self.stage = "pretrain"
        tok_emb = TokenEmbedding(config)  # one for both: its n-gram table is most of the weights
        self.planner = Planner(config, tok_emb)
        self.executor = Executor(config, tok_emb)

    def forward(
        self, prompt_ids: Tensor, y_in: Tensor, reads_memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """prompt_ids: (B, S), y_in: (B, T) -> logits (B, T, V), codebook logits (B, K) or None.

        Args:
            reads_memory: (B,) bool, the rows whose Executor may attend to the prompt, if the model
                has cross attention. By default none may, and the Planner's blocks learn nothing.
        """
        plan_vec, code_logits, memory = self.plan(prompt_ids, reads_memory)
        return self.executor(y_in, plan_vec, memory), code_logits

    def nats(
        self,
        prompt_ids: Tensor,
        y_in: Tensor,
        y_out: Tensor,
        reads_memory: Tensor | None = None,
        past: Tensor | None = None,
        leave_out: bool = False,
    ) -> Nats:
        """What the targets cost, and the prompt to the plan. Other arguments as in `forward`.

        Args:
            past, leave_out: see `Executor.nats`.
        """
        plan_vec, code_logits, memory = self.plan(prompt_ids, reads_memory)
        mixed, alone, by_plan = self.executor.nats(y_in, y_out, plan_vec, memory, past, leave_out)
        return Nats(mixed, alone, bag_nats(by_plan, prompt_ids), code_logits)

    def plan(
        self, prompt_ids: Tensor, reads_memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Memory | None]:
        """prompt_ids: (B, S) -> what the Executor gets of it: the plan (B, P) and, where it reads
        it, the memory; between them the codebook logits.

        Where ``reads_memory`` is None, the Planner's blocks learn nothing: through the plan alone
        the gradient of text is faint, and steps along it would carry them off at random.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and reads_memory is not None):
            states = self.planner.read(prompt_ids)
        plan_vec, code_logits = self.planner.plan(states)
        if not self.config.memory or reads_memory is None:
            return plan_vec, code_logits, None
        visible = (prompt_ids != PAD) & reads_memory[:, None]
        return plan_vec, code_logits, states._replace(visible=visible)

    def remember(self) -> None:
        """Once a step of training is done, takes in what was met in it."""
        for part in (self.planner.codebook, self.executor.counts):
            if part is not None:
                part.remember()

    @property
    def device(self) -> torch.device:
        return self.executor.lm_head.weight.device

    def n_parameters(self) -> int:
        """Weights, the n-gram table aside: of that, a byte touches a few rows."""
        tables = {id(m.table.weight) for m in self.modules() if isinstance(m, NgramEmbedding)}
        return sum(p.numel() for p in self.parameters() if id(p) not in tables)
