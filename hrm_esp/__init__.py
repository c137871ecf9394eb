"""HRM-ESP: a byte-level language model for Spanish with a Planner and an Executor.

>>> import hrm_esp
>>> model = hrm_esp.load_model("checkpoints/pretrain_best.pt")
>>> hrm_esp.generate(model, "En un lugar de la Mancha", seed=1)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that nothing pays for torch
# that does not need it.
_HOME = {
    "ByteTokenizer": "tokenizer",
    "HRMError": "errors",
    "FinetuneConfig": "config",
    "HRMConfig": "config",
    "PretrainConfig": "config",
    "SIZES": "config",
    "HRMModel": "model",
    "load_corpus_lines": "data",
    "dataset_lm": "data",
    "dataset_tsv": "data",
    "load_model": "checkpoint",
    "generate": "generation",
    "generate_batch": "generation",
    "stream": "generation",
    "evaluate": "evaluation",
    "train_lm": "training",
    "train_ft": "training",
}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604

if TYPE_CHECKING:
    from .checkpoint import load_model as load_model
    from .config import SIZES as SIZES
    from .config import FinetuneConfig as FinetuneConfig
    from .config import HRMConfig as HRMConfig
    from .config import PretrainConfig as PretrainConfig
    from .data import dataset_lm as dataset_lm
    from .data import dataset_tsv as dataset_tsv
    from .data import load_corpus_lines as load_corpus_lines
    from .errors import HRMError as HRMError
    from .evaluation import evaluate as evaluate
    from .generation import generate as generate
    from .generation import generate_batch as generate_batch
    from .generation import stream as stream
    from .model import HRMModel as HRMModel
    from .tokenizer import ByteTokenizer as ByteTokenizer
    from .training import train_ft as train_ft
    from .training import train_lm as train_lm


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hrm_esp' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
