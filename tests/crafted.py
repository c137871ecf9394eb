"""Files that are valid archives with wrong content: checkpoints and states of runs in which one
value is replaced, missing or added.

    python tests/crafted.py checkpoints/finetune_best.pt

Tries all such copies of a checkpoint, of which the tests try some: each must either be refused or
write text with finite probabilities. Takes a minute and more for a small model.
"""

import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_esp.errors import HRMError
from hrm_esp.generation import generate_batch
from hrm_esp.training.checkpoint import load_checkpoint

VALUES: list[Any] = [
    None, True, "x", -1, 0, 1, 2.5, 10**20, -(10**30), math.nan, math.inf, 1e308, [], {},
    {"a": [1]}, torch.zeros(2), torch.zeros(()),
]  # fmt: skip
Keys = tuple[Any, ...]


def paths(content: Any, per_tensors: int | None = None, at: Keys = ()) -> Iterator[Keys]:
    """Yields where the values of nested containers are.

    Args:
        per_tensors: of a dict of tensors, or of dicts of tensors, only so many of each shape.
    """
    if isinstance(content, dict):
        items, n_of = list(content.items()), {}
    elif isinstance(content, list | tuple):
        items, n_of = list(enumerate(content)), {}
    else:
        return
    for key, value in items:
        kind = shapes(value)
        n_of[kind] = n_of.get(kind, 0) + 1
        if kind and per_tensors is not None and n_of[kind] > per_tensors:
            continue
        yield (*at, key)
        yield from paths(value, per_tensors, (*at, key))


def shapes(value: Any) -> tuple[object, ...]:
    """The kind of a tensor, or of the tensors in a dict; nothing for other values."""
    if isinstance(value, Tensor):
        return value.ndim, value.dtype
    if isinstance(value, dict) and value and any(isinstance(v, Tensor) for v in value.values()):
        return tuple(shapes(v) for v in value.values())
    return ()


def get(content: Any, path: Keys) -> Any:
    for key in path:
        content = content[key]
    return content


def replaced(content: Any, path: Keys, value: Any) -> Any:
    """A copy in which the value at a path is another one."""
    key, *rest = path
    copy = content.copy() if isinstance(content, dict) else list(content)
    copy[key] = replaced(copy[key], tuple(rest), value) if rest else value
    return copy


def removed(content: Any, path: Keys) -> Any:
    *at, key = path
    parent = get(content, tuple(at))
    copy = parent.copy() if isinstance(parent, dict) else list(parent)
    del copy[key]
    return replaced(content, tuple(at), copy) if at else copy


def tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    """Other tensors in the place of one."""
    yield "double", t.double()
    yield "half", t.half()
    yield "integers", t.long() + 0
    yield "short", t.short()
    yield "complex", t.to(torch.complex64)
    yield "meta", t.to("meta")
    yield "flat", t.flatten()
    yield "wider", t[None]
    yield "empty", t.new_empty(0)
    yield "twice", torch.cat((t.flatten(), t.flatten()))
    yield "reversed", t.flip(0) if t.ndim else t + 1
    yield "negated", t.neg()
    yield "zeros", torch.zeros_like(t)
    yield "one value", t.new_zeros(1).expand(t.shape) if t.ndim else t
    yield "list", t.tolist() if t.numel() < 1000 else [1]
    yield "parameter", torch.nn.Parameter(t) if t.is_floating_point() else t.bool()
    yield "strided", torch.stack((t, t), -1)[..., 0]
    if t.ndim:
        yield "sparse", t.to_sparse()
        yield "cut", t[:-1]
        if t.numel():
            yield "huge view", t.flatten()[:1].expand(10**12)
    if t.ndim == 2:
        yield "transposed", t.T.contiguous()
        yield "transposed view", t.T
        yield "csr", t.to_sparse_csr()
    if t.is_floating_point():
        yield "gradient", t.clone().requires_grad_()
        yield "negative bit", torch._neg_view(t)
        yield "quantized", torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
        yield "huge", torch.full_like(t, 3e38)
        yield "minus huge", torch.full_like(t, -3e38)
        yield "large", torch.full_like(t, 1e12)
        for value in (math.nan, math.inf, -math.inf):
            other = t.clone()
            other.view(-1)[-1:] = value
            yield str(value), other
        yield "all nan", torch.full_like(t, math.nan)
    else:
        info = torch.iinfo(t.dtype)
        values = (-1, 0, 255, 300, 511, 2**31 - 1, -(2**31))
        for value in (v for v in values if info.min <= v <= info.max):
            for index in (0, -1, len(t) // 2) if t.ndim and len(t) else ():
                other = t.clone()
                other[index] = value
                yield f"{value} at {index}", other


def crafted(content: Any, per_tensors: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yields names and copies of the content of a file with a value replaced, removed or added."""
    for path in paths(content, per_tensors):
        name, value = ".".join(map(str, path)), get(content, path)
        yield f"{name} removed", removed(content, path)
        for other in VALUES:
            kind = type(other).__name__
            yield f"{name} {kind} {str(other)[:20]}", replaced(content, path, other)
        if isinstance(value, Tensor):
            for kind, other in tensors(value):
                yield f"{name} {kind}", replaced(content, path, other)
        elif type(value) in (int, float):
            for other in (value + 1, value - 1, 2 * value, value // 2, float(value), int(value)):
                yield f"{name} {other}", replaced(content, path, other)
        elif isinstance(value, dict):
            for key in ("unknown", 7, None):
                yield f"{name}.{key} added", replaced(content, path, value | {key: 1})


def use(path: Path, name: str) -> None:
    """Loads a crafted checkpoint and writes text with it.

    Raises:
        HRMError: it is refused.
    """
    model = load_checkpoint(path).build_model()
    if name.startswith(("weights", "config")):
        for mode in ("continue", "answer"):
            (text,) = generate_batch(model, ["La"], max_new_tokens=2, mode=mode, seed=0)
            assert all(map(math.isfinite, text.logprobs)), name


def main() -> None:
    warnings.simplefilter("ignore")
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "crafted.pt"
        for name, content in crafted(torch.load(sys.argv[1], weights_only=True)):
            torch.save(content, path)
            try:
                use(path, name)
                outcomes["used"] += 1
            except HRMError:
                outcomes["refused"] += 1
            except Exception as error:
                outcomes["failed"] += 1
                print(f"{name}: {error!r}")
    print(*(f"{n:,} {outcome}" for outcome, n in outcomes.items()), sep=", ")


if __name__ == "__main__":
    main()
