"""Writing: from a prompt to text, byte by byte, always valid UTF-8."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import as_inputs, encode_prompt, pad, pad_left, prompt_tokens, to_bytes
from .errors import HRMError
from .layers import Memory, characters
from .model import ExecutorCache, HRMModel
from .tokenizer import BOS, EOS, VOCAB_SIZE


@dataclass(frozen=True)
class Sampling:
    """How the next byte is chosen.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 restrict nothing.

    Raises:
        HRMError: a value out of its range.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise HRMError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise HRMError(
                f"min_new_tokens must be from 0 to max_new_tokens ({self.max_new_tokens}), "
                f"not {self.min_new_tokens}"
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise HRMError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise HRMError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise HRMError(f"top_p must be more than 0 and at most 1, not {self.top_p}")


# UTF-8 as an automaton (Unicode 16, table 3-7). State 0 is a character's end; the others say what
# may follow: so many bytes 80..BF, or first one from the narrower range after E0, ED, F0 or F4.
_FOLLOW = {1: (0x80, 0xBF, 0), 2: (0x80, 0xBF, 1), 3: (0x80, 0xBF, 2)}
_FOLLOW |= {4: (0xA0, 0xBF, 1), 5: (0x80, 0x9F, 1), 6: (0x90, 0xBF, 2), 7: (0x80, 0x8F, 2)}
_LEAD = [(0x00, 0x7F, 0, 1), (0xC2, 0xDF, 1, 2), (0xE0, 0xE0, 4, 3), (0xE1, 0xEC, 2, 3)]
_LEAD += [(0xED, 0xED, 5, 3), (0xEE, 0xEF, 2, 3), (0xF0, 0xF0, 6, 4), (0xF1, 0xF3, 3, 4)]
_LEAD += [(0xF4, 0xF4, 7, 4)]


def _utf8_tables() -> tuple[Tensor, Tensor]:
    """What may come, (8 states, 5 sizes of room left, V) bool, and the state after it, (8, V)."""
    allowed = torch.zeros(8, 5, VOCAB_SIZE, dtype=torch.bool)
    after = torch.zeros(8, VOCAB_SIZE, dtype=torch.long)
    for low, high, state, length in _LEAD:
        allowed[0, length:, low : high + 1] = True
        after[0, low : high + 1] = state
    allowed[0, :, EOS] = True
    for state, (low, high, then) in _FOLLOW.items():
        allowed[state, :, low : high + 1] = True
        after[state, low : high + 1] = then
    return allowed, after


ALLOWED, AFTER = _utf8_tables()


def choose(logits: Tensor, how: Sampling, generator: torch.Generator | None) -> Tensor:
    """Logits (B, V), -inf where forbidden -> the chosen tokens (B,).

    Top-k (Fan et al. 2018, section 5.1), then top-p (Holtzman et al. 2020, section 3.1).
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    # Relative to the largest, so that a tiny temperature overflows to -inf and not to NaN.
    logits = (logits - logits.max(-1, keepdim=True).values) / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        smallest = logits.topk(how.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probabilities = logits.softmax(-1)
    if how.top_p < 1:
        ordered, order = torch.sort(probabilities, stable=True, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= how.top_p, 0.0)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def window_start(n_tokens: int, max_len: int) -> int:
    """Where the Executor's window begins once there are ``n_tokens``.

    Whenever ``max_len`` is full it drops the older half. Scoring uses the same windows.
    """
    stride = max_len - max_len // 2
    return max(0, -(-(n_tokens - max_len) // stride)) * stride


class Decoder:
    """The logits of the next token, for B rows that grow together.

    Args:
        before: (B, R), what was read before the first token, PAD on the left, for the counts.
    """

    def __init__(
        self,
        model: HRMModel,
        plan: Tensor,
        memory: Memory | None = None,
        use_cache: bool = True,
        before: Tensor | None = None,
    ) -> None:
        self.model, self.plan, self.memory, self.use_cache = model, plan, memory, use_cache
        self.before = before
        self.start = -1
        self.cache: ExecutorCache | None = None

    def next_logits(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T), all so far, BOS first -> (B, V) on the CPU."""
        start = window_start(tokens.shape[1], self.model.config.max_len)
        if self.cache is None or start != self.start:
            self.start = start
            self.cache = self.model.new_cache(self.memory) if self.use_cache else None
        known = 0 if self.cache is None else max(0, self.cache.length - 1)
        y_in = tokens[:, start + known :].to(self.model.device)
        past = None
        if not known:
            past = tokens[:, :start]
            if self.before is not None:
                past = torch.cat((self.before, past), dim=1)
            past = past.to(self.model.device)
        places = None  # of use to cross attention alone
        if self.memory is not None:
            places = characters(tokens)[:, start + known :].to(self.model.device)
        logits = self.model.executor(y_in, self.plan, self.memory, self.cache, past, places)
        return logits[:, -1].float().cpu()

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch."""
        self.plan = self.plan[rows]
        if self.before is not None:
            self.before = self.before[rows.cpu()]
        if self.memory is not None:
            states, visible, places = self.memory
            visible = None if visible is None else visible[rows]
            self.memory = Memory(states[rows], visible, places[rows])
        if self.cache is not None:
            self.cache.select(rows)


def decode(
    decoder: Decoder, tokens: Tensor, how: Sampling, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Goes on from tokens (B, T); yields each row's next token (B,), EOS from its end on."""
    n_rows = len(tokens)
    alive = torch.arange(n_rows)
    state = torch.zeros(n_rows, dtype=torch.long)
    for n in range(how.max_new_tokens):
        allowed = ALLOWED[state, min(4, how.max_new_tokens - n)]
        if n < how.min_new_tokens:
            allowed = allowed.clone()
            allowed[:, EOS] = False
        logits = decoder.next_logits(tokens).masked_fill(~allowed, -math.inf)
        chosen = choose(logits, how, generator)
        row_tokens = torch.full((n_rows,), EOS)
        row_tokens[alive] = chosen
        yield row_tokens
        going = (chosen != EOS).nonzero()[:, 0]
        if not len(going):
            return
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        state = AFTER[state, chosen]
        if len(going) < len(alive):
            decoder.select(going.to(decoder.model.device))
            alive, state, tokens = alive[going], state[going], tokens[going]


def continue_tokens(prompt: str) -> Tensor:
    """BOS and a prompt to be continued, (1, T); a line break in it begins a new document."""
    data = b"\n" + to_bytes(re.sub("[\r\n]+", "\n", prompt).lstrip("\n"))
    return torch.from_numpy(as_inputs(np.frombuffer(data, dtype=np.uint8)))[None]


def stream(
    model: HRMModel,
    prompt: str,
    *,
    mode: str | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[str]:
    """Writes, yielding character by character; puts the model in evaluation mode.

    Args:
        prompt: any text; it is brought to NFC.
        mode: ``continue`` goes on where the prompt ends; ``answer`` starts anew, guided by the
            plan of the prompt and, if the model has cross attention, by its states: a pretrained
            one restores the prompt. By default ``answer`` for a finetuned model, else ``continue``.
        max_new_tokens: bytes to write at most; 512 by default, or ``min_new_tokens`` if larger.
        min_new_tokens: bytes to write at least.
        temperature: 0 is greedy; by default 0.8, to answer 0.
        top_k, top_p: choose among the ``k`` likeliest, and among those that make up ``p``.
        seed: the same seed, the same text; by default a new one each time.
        use_cache: off, every step reads the whole window again: slow, and the same text.

    Raises:
        HRMError: a value out of its range.
    """
    mode = mode or ("answer" if model.stage == "finetune" else "continue")
    if mode not in ("continue", "answer"):
        raise HRMError(f"mode must be continue or answer, not {mode!r}")
    if max_new_tokens is None:
        max_new_tokens = max(512, min_new_tokens)
    if temperature is None:
        temperature = 0.0 if mode == "answer" else 0.8
    how = Sampling(max_new_tokens, min_new_tokens, temperature, top_k, top_p)
    if seed is not None and not 0 <= seed < 2**63:
        raise HRMError(f"seed must be from 0 to 2^63 - 1, not {seed}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return _stream(model, prompt, mode, how, generator, use_cache)


@torch.inference_mode()
def _stream(
    model: HRMModel,
    prompt: str,
    mode: str,
    how: Sampling,
    generator: torch.Generator,
    use_cache: bool,
) -> Iterator[str]:
    model.eval()
    if mode == "answer":
        tokens = torch.tensor([[BOS]])
        decoder = answer_decoder(model, [encode_prompt(prompt, model.config.max_len)], use_cache)
    else:
        tokens = continue_tokens(prompt)
        # The Planner reads what it can of the end of the prompt; its plan then stands.
        read = torch.cat((torch.tensor([[BOS]]), tokens[:, 1:][:, -model.config.max_len :]), 1)
        plan, _ = model.planner(read.to(model.device))
        decoder = Decoder(model, plan, None, use_cache)
    character = b""
    for chosen in decode(decoder, tokens, how, generator):
        token = int(chosen[0])
        if token == EOS:
            return
        character += bytes([token])
        try:
            yield character.decode()
            character = b""
        except UnicodeDecodeError:
            continue


def answer_decoder(model: HRMModel, prompts: Sequence[bytes], use_cache: bool = True) -> Decoder:
    """A decoder that answers each prompt from BOS, with its plan and, if the model reads it, its
    memory."""
    ids = pad([prompt_tokens(p) for p in prompts]).to(model.device)
    states = model.planner.read(ids)
    plan, _ = model.planner.plan(states)
    memory = states if model.config.memory else None
    return Decoder(model, plan, memory, use_cache, pad_left(prompts))


def generate(model: HRMModel, prompt: str, **options: object) -> str:
    """What `stream` writes, as one text, without the prompt; the same arguments."""
    return "".join(stream(model, prompt, **options))  # type: ignore[arg-type]


@torch.inference_mode()
def answer_batch(model: HRMModel, prompts: Sequence[bytes], max_new_tokens: int = 512) -> list[str]:
    """The greedy answers to prompts, decoded together."""
    how = Sampling(max_new_tokens, temperature=0.0)
    rows: list[bytearray] = [bytearray() for _ in prompts]
    start = torch.full((len(prompts), 1), BOS)
    for chosen in decode(answer_decoder(model, prompts), start, how, None):
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if token != EOS:
                row.append(token)
    return [row.decode() for row in rows]
