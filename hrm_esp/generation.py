"""Writing: from prompts to text, one at a time as it comes, or many together."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from .data import as_inputs, encode_prompt, pad, prompt_tokens, to_bytes
from .decoding import Decoder, Guided, Written, decode
from .device import choose_precision
from .errors import HRMError
from .model import Executor, HRMModel
from .packing import packed
from .sampling import Sampling
from .tokenizer import BOS, EOS

DRAFT_LEN = 24
GUIDANCE = 3.0


@dataclass(frozen=True)
class Text:
    """What was written after a prompt.

    ``logprobs`` are those of its bytes and of its end, in nats, as the model sees them before any
    restriction. ``finish_reason`` is ``stop`` (the text ended, or a stop came) or ``length``.
    """

    prompt: str
    text: str
    logprobs: list[float]
    finish_reason: str

    def as_dict(self) -> dict[str, Any]:
        """With the sum of the log-probabilities as ``logprob``."""
        return {**asdict(self), "logprob": sum(self.logprobs)}


@dataclass(frozen=True)
class Settings:
    """How to write: see `stream`.

    Raises:
        HRMError: a value out of its range.
    """

    mode: str
    how: Sampling
    seed: int | None
    dtype: torch.dtype
    draft_len: int
    plan: torch.Tensor | None  # (P,), instead of the prompt's own
    guidance: float  # by it

    @classmethod
    def of(
        cls,
        model: HRMModel,
        mode: str | None = None,
        seed: int | None = None,
        precision: str = "auto",
        draft_len: int = DRAFT_LEN,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] = (),
        plan_from: str | None = None,
        plan_code: int | None = None,
        guidance: float | None = None,
        **sampling: Any,
    ) -> Settings:
        """With what depends on the model and on each other filled in."""
        mode = mode or ("answer" if model.stage == "finetune" else "continue")
        if mode not in ("continue", "answer"):
            raise HRMError(f"mode must be continue or answer, not {mode!r}")
        if seed is not None and not 0 <= seed < 2**63:
            raise HRMError(f"seed must be from 0 to 2^63 - 1, not {seed}")
        if precision not in ("auto", "fp32", "bf16"):
            raise HRMError(f"precision must be auto, fp32 or bf16, not {precision!r}")
        if draft_len < 0:
            raise HRMError(f"draft_len must be 0 (none) or more, not {draft_len}")
        if guidance is None:
            guidance = GUIDANCE
        elif plan_from is None and plan_code is None:
            raise HRMError("guidance is by plan_from or plan_code: give one")
        if not 0 <= guidance <= 20:
            raise HRMError(f"guidance must be from 0 to 20, not {guidance}")
        if max_new_tokens is None:
            max_new_tokens = max(512, sampling.get("min_new_tokens", 0))
        if temperature is None:
            temperature = 0.0 if mode == "answer" else 0.8
        stops = (stop,) if isinstance(stop, str) else stop
        how = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=tuple(to_bytes(s) for s in stops),
            **sampling,
        )
        plan = steering_plan(model, plan_from, plan_code)
        dtype = choose_precision(model.device, precision)
        return cls(mode, how, seed, dtype, draft_len, plan, guidance)

    def random(self, index: int) -> np.random.Generator:
        """Of one of many texts."""
        return np.random.default_rng(None if self.seed is None else (self.seed, index))


@torch.inference_mode()
def steering_plan(model: HRMModel, text: str | None, code: int | None) -> torch.Tensor | None:
    """The plan of a text, or of a code of the codebook, (P,); or none.

    Raises:
        HRMError: both, no codebook, or no such code.
    """
    if text is not None and code is not None:
        raise HRMError("give plan_from or plan_code, not both")
    model.eval()
    if text is not None:
        prompt = prompt_tokens(encode_prompt(text, model.config.max_len))
        return model.planner(torch.tensor([prompt], device=model.device))[0][0]
    if code is None:
        return None
    codebook = model.planner.codebook
    if codebook is None:
        raise HRMError("this model has no codebook: give plan_from instead of plan_code")
    if not 0 <= code < codebook.n_codes:
        raise HRMError(f"plan_code must be from 0 to {codebook.n_codes - 1}, not {code}")
    return codebook.codes[code].detach()


def stream(model: HRMModel, prompt: str, **options: Any) -> Iterator[str]:
    """Writes, yielding character by character; puts the model in evaluation mode.

    Args:
        prompt: any text; it is brought to NFC.
        mode: ``continue`` goes on where the prompt ends; ``answer`` starts anew, guided by the
            plan of the prompt and, if the model has cross attention, by its states: a pretrained
            one restores the prompt. By default ``answer`` for a finetuned model, else ``continue``.
        max_new_tokens: bytes to write at most; 512 by default, or ``min_new_tokens`` if larger.
        min_new_tokens: bytes to write at least, unless a stop comes; 0 by default.
        temperature: 0 is greedy; by default 0.8, to answer 0.
        top_k, top_p, min_p: choose among the k likeliest, among those of them that make up p, and
            among those of them at least ``min_p`` times as likely as the likeliest.
        stop: a text, or several, before which to end.
        seed: the same seed, the same text; by default a new one each time.
        precision: of the weights, ``fp32`` or ``bf16``; by default bf16 where the hardware has it.
        plan_from: a text whose plan is to guide the words, instead of the prompt's.
        plan_code: the code whose plan is to.
        guidance: how far to follow one of these, 0 to 20: 1 writes as if it were the prompt's own
            plan, more goes further the same way (3), at half the speed.
        draft_len: bytes drafted ahead at most (24), see `decode`; 0: none.

    Raises:
        HRMError: a value out of its range.
    """
    return _stream(model, prompt, Settings.of(model, **options))


def _stream(model: HRMModel, prompt: str, settings: Settings) -> Iterator[str]:
    stops = [s.decode() for s in settings.how.stop]
    character, held = b"", ""
    for _, token, _ in write(model, packed(model.executor, settings.dtype), [prompt], settings):
        if token == EOS:
            break
        character += bytes([token])
        try:
            held += character.decode()
        except UnicodeDecodeError:
            continue
        character = b""
        n = len(held) - beginning(held, stops)
        yield from held[:n]
        held = held[n:]
    yield from without_stop(held, stops)


def beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop, or all of it."""
    lengths = (n for s in stops for n in range(len(s), 0, -1) if text.endswith(s[:n]))
    return max(lengths, default=0)


def without_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the stop it ends with, if it does."""
    longest = max((len(s) for s in stops if text.endswith(s)), default=0)
    return text[: len(text) - longest]


def generate(model: HRMModel, prompt: str, **options: Any) -> str:
    """What `stream` writes, as one text, without the prompt; the same arguments."""
    return "".join(stream(model, prompt, **options))


def generate_batch(
    model: HRMModel,
    prompts: Iterable[str],
    *,
    num_samples: int = 1,
    batch_size: int = 32,
    **options: Any,
) -> Iterator[Text]:
    """What follows each prompt, in order, many written together.

    With a seed, each of several texts depends on its place, but not on the others. A text that is
    the only one, or each with a ``batch_size`` of 1, is drafted, and for a seed another one. Puts
    the model in evaluation mode.

    Args:
        prompts: read as they are needed.
        num_samples: texts for each prompt.
        batch_size: texts written together.
        options: as of `stream`.

    Raises:
        HRMError: a value out of its range.
    """
    if num_samples < 1 or batch_size < 1:
        raise HRMError("num_samples and batch_size must be at least 1")
    if isinstance(prompts, str):
        raise TypeError("give a list of prompts, or call generate")
    settings = Settings.of(model, **options)
    return _batches(model, prompts, num_samples, batch_size, settings)


def _batches(
    model: HRMModel, prompts: Iterable[str], num_samples: int, batch_size: int, settings: Settings
) -> Iterator[Text]:
    executor = packed(model.executor, settings.dtype)
    texts, begun = (p for p in prompts for _ in range(num_samples)), 0
    while batch := list(islice(texts, min(batch_size, sys.maxsize))):
        if batch_size > 1 and begun + len(batch) > 1:  # the last, too, if it is one left over
            settings = replace(settings, draft_len=0)
        yield from write_all(model, executor, batch, settings, begun)
        begun += len(batch)


def write(
    model: HRMModel,
    executor: Executor,
    prompts: Sequence[str],
    settings: Settings,
    begun: int = 0,
) -> Iterator[Written]:
    """The tokens of texts written together, as they come, after ``begun`` others."""
    towards = new_decoder(model, executor, prompts, settings)
    decoder: Decoder | Guided = towards
    if settings.plan is not None and settings.guidance != 1:
        away = new_decoder(model, executor, prompts, replace(settings, plan=None))
        decoder = Guided(towards, away, settings.guidance)
    randoms = [settings.random(begun + i) for i in range(len(prompts))]
    return decode(decoder, settings.how, randoms, settings.draft_len)


@torch.inference_mode()
def new_decoder(
    model: HRMModel, executor: Executor, prompts: Sequence[str], settings: Settings
) -> Decoder:
    """One that has the prompts to continue or to answer, and their plans."""
    model.eval()
    if settings.mode == "answer":
        asked = [encode_prompt(p, model.config.max_len) for p in prompts]
        ids = pad([prompt_tokens(p) for p in asked]).to(model.device)
        memory = model.planner.read(ids)
        plan = guiding(model.planner.plan(memory)[0], settings)
        read = memory if model.config.memory else None
        rows = [[BOS]] * len(prompts)
        return Decoder(model, executor, plan, rows, read, asked, settings.dtype)
    rows = [continue_tokens(p) for p in prompts]
    # The Planner reads what it can of the end of a prompt; its plan then stands.
    ends = [[BOS, *row[1:][-model.config.max_len :]] for row in rows]
    plan = guiding(model.planner(pad(ends).to(model.device))[0], settings)
    return Decoder(model, executor, plan, rows, dtype=settings.dtype)


def guiding(plan: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The plans of prompts (B, P), or the one to guide all of them instead."""
    return plan if settings.plan is None else settings.plan.to(plan.dtype).expand_as(plan)


def write_all(
    model: HRMModel,
    executor: Executor,
    prompts: Sequence[str],
    settings: Settings,
    begun: int = 0,
) -> list[Text]:
    """Texts written together; arguments as of `write`."""
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for row, token, logprob in write(model, executor, prompts, settings, begun):
        tokens[row].append(token)
        logprobs[row].append(logprob)
    stops, texts = [s.decode() for s in settings.how.stop], []
    for prompt, ids, of_ids in zip(prompts, tokens, logprobs, strict=True):
        whole = bytes(i for i in ids if i != EOS).decode()
        text = without_stop(whole, stops)
        if text != whole:
            of_ids = of_ids[: len(text.encode())]
        ended = text != whole or ids[-1] == EOS
        texts.append(Text(prompt, text, of_ids, "stop" if ended else "length"))
    return texts


def continue_tokens(prompt: str) -> list[int]:
    """BOS and a prompt to be continued; a line break in it begins a new document."""
    data = b"\n" + to_bytes(re.sub("[\r\n]+", "\n", prompt).lstrip("\n"))
    return as_inputs(np.frombuffer(data, dtype=np.uint8)).tolist()
