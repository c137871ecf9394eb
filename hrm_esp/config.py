"""Every hyperparameter, stated once: its name, default, meaning and the flag made from it.

Nothing here imports torch, so that ``hrm-esp --help`` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import HRMError

DEFAULT_DIR = "checkpoints"
RECENT_ORDERS = (4, 6, 10)  # of the n-grams counted in what was read last

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 128, "n_heads": 4, "n_layers_enc": 1, "n_layers_dec": 3},
    "small": {"d_model": 256, "n_heads": 4, "n_layers_enc": 2, "n_layers_dec": 4},
    "base": {"d_model": 512, "n_heads": 8, "n_layers_enc": 2, "n_layers_dec": 8},
}


def option(default: Any, group: str, text: str, **keywords: Any) -> Any:
    """A dataclass field that is a command-line flag too; the text describes the flag.

    Args:
        default: the field's default; a ``bool`` that is true becomes the flag ``--no_<name>``.
        group: the heading under which ``--help`` lists the flag.
        text: the flag's help.
        keywords: ``choices`` and ``type`` as in ``argparse``; ``low`` and ``high``, the smallest
            and largest value allowed; ``above`` and ``below``, bounds no value may reach.
    """
    return field(default=default, metadata={"group": group, "help": text, **keywords})


def check_fields(config: Any) -> None:
    """Raises HRMError unless every field keeps to its own ``choices`` and bounds."""
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if value is None:
            continue
        if "choices" in meta and value not in meta["choices"]:
            raise HRMError(f"{f.name} must be one of {', '.join(meta['choices'])}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise HRMError(f"{f.name} must be a finite number, not {value}")
        if "low" in meta and value < meta["low"]:
            raise HRMError(f"{f.name} must be at least {meta['low']}, not {value}")
        if "high" in meta and value > meta["high"]:
            raise HRMError(f"{f.name} must be at most {meta['high']}, not {value}")
        if "above" in meta and value <= meta["above"]:
            raise HRMError(f"{f.name} must be more than {meta['above']}, not {value}")
        if "below" in meta and value >= meta["below"]:
            raise HRMError(f"{f.name} must be less than {meta['below']}, not {value}")


@dataclass(frozen=True)
class HRMConfig:
    """What a model is: enough to rebuild it, kept in every checkpoint.

    Raises:
        HRMError: a value out of its range, or values that do not fit together.
    """

    d_model: int = option(256, "model", "width of the residual stream", low=2)
    n_heads: int = option(4, "model", "attention heads; must divide d_model", low=1)
    n_layers_enc: int = option(2, "model", "blocks of the Planner", low=1)
    n_layers_dec: int = option(4, "model", "blocks of the Executor", low=1)
    ff_mult: int = option(4, "model", "width of the feed-forward part, in d_model", low=1)
    max_len: int = option(512, "model", "bytes the Executor sees at once", low=8)
    plan_dim: int = option(256, "model", "width of the plan vector", low=1)
    gumbel: bool = option(
        True, "model", "a continuous plan instead of one expressed in a codebook's codes"
    )
    n_plan_codes: int = option(32, "model", "codes the plan is chosen from", low=2)
    gumbel_hard: bool = option(
        False, "model", "straight-through Gumbel-Softmax: exactly one code, also in training"
    )
    positions: str = option(
        "rotary", "model", "how a token knows its place", choices=("rotary", "learned")
    )
    ngram_max: int = option(
        4, "model", "hashed n-gram embeddings of orders 2 to N; 1 is none", low=1, below=17
    )
    ngram_bits: int = option(14, "model", "2^N rows for each order", low=1, below=25)
    ngram_dropout: float = option(
        0.5, "model", "share of the n-gram vectors dropped in training, 0 to 1", low=0, below=1
    )
    count_max: int = option(
        16,
        "model",
        "length of the longest n-grams counted, in the training text and in what was read last; "
        "under 4 is none",
        low=0,
    )
    recent_len: int = option(
        4096,
        "model",
        "bytes before the window whose n-grams are counted, too, as the Executor reads",
        low=0,
    )
    dropout: float = option(
        0.0, "model", "share of activations dropped in training, 0 to 1", low=0, below=1
    )
    # Not a flag of its own: PretrainConfig.denoise and FinetuneConfig.context decide it.
    memory: bool = field(default=False, metadata={"hidden": True})

    def __post_init__(self) -> None:
        check_fields(self)
        if self.d_model % self.n_heads:
            raise HRMError(
                f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads})"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise HRMError(
                f"rotary positions need an even d_model / n_heads, not {self.head_dim}: "
                "change n_heads or give --positions learned"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def counts(self) -> bool:
        """Whether n-grams are counted at all."""
        return self.count_max >= RECENT_ORDERS[0]

    @property
    def past_len(self) -> int:
        """Bytes before the window that are of any use."""
        return self.recent_len if self.counts else 0


@dataclass(frozen=True)
class TrainConfig:
    """What both trainings have in common.

    Raises:
        HRMError: a value out of its range, or two lengths for one run.
    """

    epochs: int | None = option(
        None, "run", "train for N passes over the data, instead of --minutes", low=1, type=int
    )
    steps: int | None = option(
        None, "run", "train for N optimizer steps, instead of --minutes", low=1, type=int
    )
    minutes: float | None = option(
        None, "run", "train for N minutes, such as 0.5 (default: 10)", above=0, type=float
    )
    batch_size: int = option(
        8, "training", "windows of max_len bytes a step, in each process", low=1
    )
    grad_accum: int = option(1, "training", "batches whose gradients make one step", low=1)
    lr: float = option(6e-3, "training", "peak learning rate", above=0)
    optimizer: str = option(
        "muon",
        "training",
        "muon: Muon for the matrices in the blocks, AdamW for the rest; adamw: AdamW for all",
        choices=("muon", "adamw"),
    )
    weight_decay: float = option(
        0.1, "training", "decoupled weight decay of the matrices in the blocks", low=0
    )
    warmup: int = option(10, "training", "steps in which the learning rate rises", low=0)
    decay: float = option(
        0.4, "training", "last share of the run, 0 to 1, in which it falls to zero", low=0, high=1
    )
    patience: int = option(
        2,
        "training",
        "scorings worse than the best, of some 8 in a run, after which the learning rate begins "
        "to fall and the run ends early; 0 is never",
        low=0,
    )
    grad_clip: float = option(
        1.0, "training", "largest gradient norm, n-gram tables aside; 0 is no limit", low=0
    )
    codebook_penalty: float = option(
        0.1, "training", "weight of the reward for using all codes alike, in nats", low=0
    )
    precision: str = option(
        "auto",
        "training",
        "auto is bf16 where the hardware has it, else fp16 on CUDA, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = option(
        False, "training", "torch.compile the blocks: slow to start, then faster"
    )
    val_fraction: float | None = option(
        None,
        "data",
        "share of the data, 0 to 1, held out and never trained on (default: 0.05; of fewer than "
        "1,000 pairs 50, or a fifth if that is less)",
        low=0,
        below=1,
        type=float,
    )
    encoding: str = option("utf-8", "data", "of the text files: latin-1, cp1252, utf-16, ...")
    sample_prompt: str | None = option(
        None, "run", "at each scoring, show what the model makes of this prompt", type=str
    )
    seed: int = option(
        0, "run", "of the weights, the order of the data and all noise", low=0, below=2**63
    )
    out_dir: str = option(DEFAULT_DIR, "run", "folder for the checkpoints")
    keep: int = option(3, "run", "epoch checkpoints to keep, the newest", low=1)
    save_every: float = option(
        5.0, "run", "minutes between two saved states, from which a run can be resumed", above=0
    )
    resume: bool = option(False, "run", "go on with the run in out_dir where it stopped")
    overwrite: bool = option(False, "run", "start anew in a folder that holds a run")

    def __post_init__(self) -> None:
        check_fields(self)
        given = [n for n in ("epochs", "steps", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise HRMError(f"give one of --epochs, --steps and --minutes, not {len(given)}")
        if not given:
            object.__setattr__(self, "minutes", 10.0)
        if self.resume and self.overwrite:
            raise HRMError("give --resume or --overwrite, not both")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """How to pretrain."""

    sep: str = option(
        "line",
        "data",
        "what ends a document: each line, or a blank one, for books with hard-wrapped lines",
        choices=("line", "blank"),
    )
    planner_view: str = option(
        "same",
        "data",
        "the Planner reads the window being written (same), so that the Executor learns what plans "
        "say, or the one before it (previous)",
        choices=("same", "previous"),
    )
    grow: bool = option(True, "training", "full windows and batches from the start")
    denoise: float = option(
        0.125,
        "training",
        "share of the batches in which the Executor restores damaged lines that the Planner reads; "
        "finetuning builds on it",
        low=0,
        below=1,
    )


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """How to finetune."""

    batch_size: int = option(
        2, "training", "pairs a step, in each process, in units of max_len bytes", low=1
    )
    dropout: float = option(
        0.2, "model", "share of activations dropped in training, 0 to 1", low=0, below=1
    )
    ngram_dropout: float = option(
        0.5, "model", "share of the n-gram vectors dropped in training, 0 to 1", low=0, below=1
    )
    context: str = option(
        "memory",
        "model",
        "memory: the Executor also attends to the Planner's states of the prompt; "
        "plan: it has the plan vector alone",
        choices=("memory", "plan"),
    )
    gumbel: bool = option(True, "model", "drop the checkpoint's codebook: a continuous plan")
    blocks: str = option(
        "auto",
        "training",
        "keep: all of the checkpoint; new: the self attention and feed-forward of all blocks begin "
        "as in a new model; auto: new if a pretrained checkpoint foretells the answers much worse "
        "than held-out text",
        choices=("auto", "keep", "new"),
    )
