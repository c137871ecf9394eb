"""HRM-ESP: a byte-level language model for Spanish with a Planner and an Executor.

>>> import hrm_esp
>>> model = hrm_esp.load_model("checkpoints/pretrain_best.pt")
>>> hrm_esp.generate(model, "En un lugar de la Mancha", seed=1)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The module of each public name. Names are imported when they are first used, so that importing the
# package does not import torch.
_MODULES = {
    "HRMError": "errors",
    "ContinueConfig": "continue_config",
    "FinetuneConfig": "config",
    "GenerationConfig": "config",
    "HRMConfig": "config",
    "PretrainConfig": "config",
    "SIZES": "config",
    "ByteTokenizer": "tokenizer",
    "load_corpus_lines": "data",
    "dataset_lm": "data",
    "dataset_tsv": "data",
    "RMSNorm": "model",
    "MHA": "model",
    "FFN": "model",
    "DecoderBlock": "model",
    "EncoderBlock": "model",
    "Planner": "model",
    "Executor": "model",
    "HRMModel": "model",
    "generate": "generation",
    "generate_batch": "generation",
    "stream": "generation",
    "evaluate": "evaluation",
    "restore": "restoration",
    "load_model": "training",
    "train_lm": "training",
    "train_ft": "training",
    "Trainer": "training",
    "cli": "",
}
__all__ = ["__version__", *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from . import cli as cli
    from .config import SIZES as SIZES
    from .config import FinetuneConfig as FinetuneConfig
    from .config import GenerationConfig as GenerationConfig
    from .config import HRMConfig as HRMConfig
    from .config import PretrainConfig as PretrainConfig
    from .continue_config import ContinueConfig as ContinueConfig
    from .data import dataset_lm as dataset_lm
    from .data import dataset_tsv as dataset_tsv
    from .data import load_corpus_lines as load_corpus_lines
    from .errors import HRMError as HRMError
    from .evaluation import evaluate as evaluate
    from .generation import generate as generate
    from .generation import generate_batch as generate_batch
    from .generation import stream as stream
    from .model import FFN as FFN
    from .model import MHA as MHA
    from .model import DecoderBlock as DecoderBlock
    from .model import EncoderBlock as EncoderBlock
    from .model import Executor as Executor
    from .model import HRMModel as HRMModel
    from .model import Planner as Planner
    from .model import RMSNorm as RMSNorm
    from .restoration import restore as restore
    from .tokenizer import ByteTokenizer as ByteTokenizer
    from .training import Trainer as Trainer
    from .training import load_model as load_model
    from .training import train_ft as train_ft
    from .training import train_lm as train_lm


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'hrm_esp' has no attribute {name!r}")
    module = _MODULES[name]
    if not module:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(f".{module}", __name__), name)
