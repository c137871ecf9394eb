"""Generation: from prompts to text, one text as a stream or many together.

Shapes: B prompts, P = plan_dim.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..config import DEFAULT_GUIDANCE, DEFAULT_TEMPERATURE, GenerationConfig
from ..data import (
    as_inputs,
    document_bytes,
    document_text,
    encode_continuation,
    encode_prompt,
    pad,
    prompt_tokens,
)
from ..device import choose_precision, eval_mode
from ..errors import HRMError
from ..model import Executor, HRMModel
from ..tokenizer import BOS, EOS
from .cpu_kernels import pack_for_cpu
from .decoder import Decoder, GuidedDecoder
from .sampling import SamplingParams
from .speculative import SampledToken, decode


@dataclass(frozen=True)
class Completion:
    """A generated text.

    ``logprobs``: log-probabilities of its bytes and of its end, in nats, before any filter.
    ``finish_reason``: ``stop`` (the text ended, or a stop sequence came) or ``length``.
    """

    prompt: str
    text: str
    logprobs: list[float]
    finish_reason: str

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, and ``logprob``, the sum of ``logprobs``."""
        return {**asdict(self), "logprob": sum(self.logprobs)}


@dataclass(frozen=True)
class GenerationSetup:
    """A `GenerationConfig` with all that depends on the model filled in. ``plan`` (P,) replaces the
    plans of the prompts; ``dtype`` is that of the weights."""

    mode: str
    params: SamplingParams
    seed: int | None
    dtype: torch.dtype
    draft_len: int
    plan: torch.Tensor | None
    guidance: float

    @classmethod
    def create(cls, model: HRMModel, config: GenerationConfig) -> GenerationSetup:
        """Fills in what depends on the model.

        Raises:
            HRMError: the model has no codebook, or no such code.
        """
        mode = config.mode_for(model.stage)
        temperature = config.temperature
        if temperature is None:
            temperature = 0.0 if mode == "answer" else DEFAULT_TEMPERATURE
        params = SamplingParams(
            max_new_tokens=config.max_bytes,
            min_new_tokens=config.min_new_tokens,
            temperature=temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            stop=tuple(map(document_bytes, config.stop_sequences)),
        )
        return cls(
            mode,
            params,
            config.seed,
            choose_precision(model.device, config.precision),
            config.draft_len,
            chosen_plan(model, config),
            DEFAULT_GUIDANCE if config.guidance is None else config.guidance,
        )

    def rng(self, index: int) -> np.random.Generator:
        """Returns the random generator of the text at ``index``."""
        return np.random.default_rng(None if self.seed is None else (self.seed, index))


@torch.inference_mode()
def chosen_plan(model: HRMModel, config: GenerationConfig) -> torch.Tensor | None:
    """Returns the plan that ``plan_from`` or ``plan_code`` selects, (P,), or ``None``.

    Raises:
        HRMError: the model has no codebook, or no such code.
    """
    if config.plan_from is not None:
        max_len, line_breaks = model.config.max_len, model.config.line_breaks
        prompt = prompt_tokens(encode_prompt(config.plan_from, max_len, line_breaks))
        with eval_mode(model):
            return model.planner(torch.tensor([prompt], device=model.device))[0][0]
    if config.plan_code is None:
        return None
    codebook = model.planner.codebook
    if codebook is None:
        raise HRMError("this model has no codebook: give plan_from instead of plan_code")
    if config.plan_code >= codebook.n_codes:
        raise HRMError(
            f"plan_code must be from 0 to {codebook.n_codes - 1}, not {config.plan_code}"
        )
    return codebook.codes[config.plan_code].detach()


def stream(
    model: HRMModel, prompt: str, config: GenerationConfig | None = None, **options: Any
) -> Iterator[str]:
    """Generates a text and yields it character by character.

    Args:
        prompt: any text; it is normalized to NFC.
        config: the options of generation.
        options: fields of `GenerationConfig`, in place of those in ``config``.

    Raises:
        HRMError: an option is out of range.
        TypeError: there is no such option.
    """
    return _stream(model, prompt, _setup(model, config, options))


def generate(
    model: HRMModel, prompt: str, config: GenerationConfig | None = None, **options: Any
) -> str:
    """Generates a text and returns it without the prompt. Arguments and errors as in `stream`."""
    with eval_mode(model):
        return "".join(stream(model, prompt, config, **options))


def generate_batch(
    model: HRMModel,
    prompts: Iterable[str],
    config: GenerationConfig | None = None,
    *,
    num_samples: int = 1,
    batch_size: int = 32,
    **options: Any,
) -> Iterator[Completion]:
    """Generates texts for many prompts, in order, ``batch_size`` texts at a time.

    With a seed, a text depends on its index but not on the other texts. A single text is generated
    with speculative decoding, so its sample differs from that of the same text in a batch.

    Args:
        prompts: read as they are needed.
        num_samples: texts per prompt.
        batch_size: texts generated together.

    Other arguments and errors as in `stream`.
    """
    if num_samples < 1 or batch_size < 1:
        raise HRMError("num_samples and batch_size must be at least 1")
    if isinstance(prompts, str):
        raise TypeError("give a list of prompts, or call generate")
    setup = _setup(model, config, options)
    return _generate_batches(model, prompts, num_samples, batch_size, setup)


def _setup(
    model: HRMModel, config: GenerationConfig | None, options: dict[str, Any]
) -> GenerationSetup:
    return GenerationSetup.create(model, replace(config or GenerationConfig(), **options))


def _stream(model: HRMModel, prompt: str, setup: GenerationSetup) -> Iterator[str]:
    stops = [document_text(s) for s in setup.params.stop]
    executor = pack_for_cpu(model.executor, setup.dtype)
    character, buffer = b"", ""  # bytes of a character; text that may be part of a stop sequence
    for _, token, _ in sample_tokens(model, executor, [prompt], setup):
        if token == EOS:
            break
        character += bytes([token])
        try:
            buffer += document_text(character)
        except UnicodeDecodeError:
            continue
        character = b""
        n = len(buffer) - partial_stop_len(buffer, stops)
        yield from buffer[:n]
        buffer = buffer[n:]
    yield from strip_stop(buffer, stops)


def partial_stop_len(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters at the end of a text may begin, or be, a stop sequence."""
    lengths = (n for s in stops for n in range(len(s), 0, -1) if text.endswith(s[:n]))
    return max(lengths, default=0)


def strip_stop(text: str, stops: Sequence[str]) -> str:
    """Removes the stop sequence at the end of a text, if there is one."""
    longest = max((len(s) for s in stops if text.endswith(s)), default=0)
    return text[: len(text) - longest]


def _generate_batches(
    model: HRMModel,
    prompts: Iterable[str],
    num_samples: int,
    batch_size: int,
    setup: GenerationSetup,
) -> Iterator[Completion]:
    executor = pack_for_cpu(model.executor, setup.dtype)
    repeated, n_done = (p for p in prompts for _ in range(num_samples)), 0
    while batch := list(islice(repeated, min(batch_size, sys.maxsize))):
        if batch_size > 1 and n_done + len(batch) > 1:  # also for a last text that is left over
            setup = replace(setup, draft_len=0)
        yield from complete(model, executor, batch, setup, n_done)
        n_done += len(batch)


def complete(
    model: HRMModel,
    executor: Executor,
    prompts: Sequence[str],
    setup: GenerationSetup,
    first_index: int = 0,
) -> list[Completion]:
    """Generates a text for each prompt, all together. Arguments as in `sample_tokens`."""
    tokens: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    with eval_mode(model):
        for i, token, log_prob in sample_tokens(model, executor, prompts, setup, first_index):
            tokens[i].append(token)
            log_probs[i].append(log_prob)
    stops, completions = [document_text(s) for s in setup.params.stop], []
    for prompt, ids, ids_log_probs in zip(prompts, tokens, log_probs, strict=True):
        whole = document_text(bytes(i for i in ids if i != EOS))
        text = strip_stop(whole, stops)
        if text != whole:
            ids_log_probs = ids_log_probs[: len(text.encode())]
        is_stopped = text != whole or ids[-1] == EOS
        completions.append(
            Completion(prompt, text, ids_log_probs, "stop" if is_stopped else "length")
        )
    return completions


def sample_tokens(
    model: HRMModel,
    executor: Executor,
    prompts: Sequence[str],
    setup: GenerationSetup,
    first_index: int = 0,
) -> Iterator[SampledToken]:
    """Yields the tokens of the texts of B prompts as they are sampled. Between two tokens the model
    is in the mode that it was in.

    Args:
        executor: of the model, possibly in the form of `pack_for_cpu`.
        first_index: number of texts before these; with a seed, texts depend on their index.
    """
    with eval_mode(model):
        conditional = new_decoder(model, executor, prompts, setup)
        decoder: Decoder | GuidedDecoder = conditional
        if setup.plan is not None and setup.guidance != 1:
            unconditional = new_decoder(model, executor, prompts, replace(setup, plan=None))
            decoder = GuidedDecoder(conditional, unconditional, setup.guidance)
    rngs = [setup.rng(first_index + i) for i in range(len(prompts))]
    tokens = decode(decoder, setup.params, rngs, setup.draft_len)
    if not any(m.training for m in model.modules()):
        yield from tokens
        return
    while True:
        with eval_mode(model):
            token = next(tokens, None)
        if token is None:
            return
        yield token


@torch.inference_mode()
def new_decoder(
    model: HRMModel, executor: Executor, prompts: Sequence[str], setup: GenerationSetup
) -> Decoder:
    """Runs the Planner on B prompts; returns a decoder that continues or answers them."""
    planner, max_len = model.planner, model.config.max_len
    if setup.mode == "answer":
        encoded_prompts = [encode_prompt(p, max_len, model.config.line_breaks) for p in prompts]
        ids = pad([prompt_tokens(p) for p in encoded_prompts]).to(model.device)
        encoded = planner.encode(ids)
        plan = _select_plan(planner.pool(encoded).plan, setup)
        cross = encoded if model.config.cross_attention else None
        starts = [[BOS]] * len(prompts)
        return Decoder(model, executor, plan, starts, cross, encoded_prompts, setup.dtype)
    sequences = [continuation_tokens(p, model.config.sep) for p in prompts]
    # The Planner reads the end of a long prompt; the plan stays the same for the whole text.
    ends = [[BOS, *tokens[1:][-max_len:]] for tokens in sequences]
    plan = _select_plan(planner(pad(ends).to(model.device))[0], setup)
    return Decoder(model, executor, plan, sequences, dtype=setup.dtype)


def _select_plan(plans: torch.Tensor, setup: GenerationSetup) -> torch.Tensor:
    """Returns the plans of the prompts, (B, P), or the chosen plan for all of them."""
    return plans if setup.plan is None else setup.plan.to(plans.dtype).expand_as(plans)


def continuation_tokens(prompt: str, sep: str = "line") -> list[int]:
    """Returns the tokens of a prompt to be continued: BOS first; see `encode_continuation`."""
    data = b"\n" + encode_continuation(prompt, sep)
    return as_inputs(np.frombuffer(data, dtype=np.uint8)).tolist()
