"""Options of continued pretraining. Like `config`, this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import DEFAULT_DIR, PretrainConfig
from .options import option


@dataclass(frozen=True)
class ContinueConfig(PretrainConfig):
    """Options of continued pretraining: training a pretrained model further, on another text.

    ``ckpt``: the checkpoint to start from, or the folder of its run.
    """

    ckpt: str = field(default=DEFAULT_DIR, metadata={"hidden": True})
    # A tenth of a new model's: the old text is forgotten least, see docs/results.md.
    lr: float = option(6e-4, "training", "peak learning rate", above=0, high=100)
    counts: str = option(
        "add",
        "data",
        "with --ckpt: the n-gram counts. add: those of the new text are added to the checkpoint's; "
        "new: those of the new text only",
        flag=False,
        choices=("add", "new"),
    )
    val_old: str | None = option(
        None,
        "data",
        "with --ckpt: held-out text like the old training text, to score before and after",
        flag=False,
        type=str,
    )
