"""All hyperparameters: name, default, range and help text.

This module does not import torch, so that ``hrm-esp --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import HRMError
from .options import check_fields, option

DEFAULT_DIR = "checkpoints"
DEFAULT_NEW_TOKENS, DEFAULT_TEMPERATURE, DEFAULT_GUIDANCE = 512, 0.8, 3.0
SEPARATORS = ("line", "blank", "stanza", "file")  # what ends a document
SEP_HELP = (
    "what ends a document. line: each line; blank: a blank line, line breaks are spaces (wrapped "
    "books); stanza: a blank line, line breaks are kept (verse, dialogue, code); file: the end of "
    "the file"
)
PROMPT_COL_HELP = (
    "column of the prompts in a table: name, or number from 1 (default: found by its name, or "
    "the first of two)"
)
TARGET_COL_HELP = (
    "column of the targets: name, or number from 1 (default: found by its name, or the next)"
)
LM_HELP = "accept rows without a target as plain text, without a warning"
ENCODING_HELP = "encoding of the text files, such as latin-1, cp1252 or utf-16"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
RECENT_ORDERS = (4, 6, 10)  # orders of the n-grams counted in the text just read
DEFAULT_COUNT_MEMORY = 640  # MB, at most
MAX_WIDTH = 2**16  # of each dimension of a model, and of its context
MAX_LAYERS = 512
MAX_BATCH = 2**20
MAX_COUNT = 10**9
MAX_STEPS = 10**12
MAX_MINUTES = 10**7
# Sizes of batches: windows, and pairs in units of max_len. On a GPU larger ones take hardly longer.
CPU_BATCH, GPU_BATCH, WIDE_GPU_BATCH, WIDE = 8, 64, 32, 512  # WIDE: a d_model
CPU_PAIRS, GPU_PAIRS = 2, 8

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 128, "n_heads": 4, "n_layers_enc": 1, "n_layers_dec": 3},
    "small": {"d_model": 256, "n_heads": 4, "n_layers_enc": 2, "n_layers_dec": 4},
    "base": {"d_model": 512, "n_heads": 8, "n_layers_enc": 2, "n_layers_dec": 8},
}


@dataclass(frozen=True)
class HRMConfig:
    """The model: all that is needed to rebuild it. Part of every checkpoint.

    Raises:
        HRMError: a value is out of range, or values do not fit together.
    """

    d_model: int = option(256, "model", "width of the residual stream", low=2, high=MAX_WIDTH)
    n_heads: int = option(4, "model", "attention heads; must divide d_model", low=1, high=MAX_WIDTH)
    n_layers_enc: int = option(2, "model", "layers of the Planner", low=1, high=MAX_LAYERS)
    n_layers_dec: int = option(4, "model", "layers of the Executor", low=1, high=MAX_LAYERS)
    ff_mult: int = option(
        4, "model", "width of the feed-forward layers, in units of d_model", flag=False, low=1,
        high=64,
    )  # fmt: skip
    max_len: int = option(512, "model", "context length in bytes", low=8, high=MAX_WIDTH)
    plan_dim: int = option(256, "model", "dimension of the plan vector", low=1, high=MAX_WIDTH)
    gumbel: bool = option(True, "model", "express the plan in a codebook (Gumbel-Softmax)")
    n_plan_codes: int = option(32, "model", "codes in the codebook", low=2, high=MAX_WIDTH)
    gumbel_hard: bool = option(
        False, "model", "straight-through Gumbel-Softmax: exactly one code", flag=False
    )
    positions: str = option(
        "rotary", "model", "position encoding", flag=False, choices=("rotary", "learned")
    )
    count_max: int = option(
        16,
        "model",
        "longest n-gram that is counted, in bytes (2 to 8, 10, 12, 16, 24 or 32); less than 4 "
        "disables the counts",
        flag=False,
        low=0,
        high=32,
    )
    recent_len: int = option(
        4096,
        "model",
        "bytes before the window whose n-grams are counted while reading",
        flag=False,
        low=0,
        high=2**20,
    )
    dropout: float = option(0.0, "model", "dropout rate", low=0, below=1)
    # Not options: decided by PretrainConfig.denoise and sep, FinetuneConfig.context and the pairs.
    cross_attention: bool = field(default=False, metadata={"hidden": True})
    sep: str = field(default="line", metadata={"hidden": True, "choices": SEPARATORS})
    line_breaks: bool = field(default=False, metadata={"hidden": True})  # inside documents

    def __post_init__(self) -> None:
        check_fields(self)
        if self.d_model % self.n_heads:
            raise HRMError(
                f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads})"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise HRMError(
                f"rotary positions need an even d_model / n_heads, not {self.head_dim}: "
                "change n_heads or give --set positions=learned"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def counts_ngrams(self) -> bool:
        """Whether the model mixes n-gram counts with the network."""
        return self.count_max >= RECENT_ORDERS[0]

    @property
    def preceding_len(self) -> int:
        """Bytes before the window that the model uses."""
        return self.recent_len if self.counts_ngrams else 0


@dataclass(frozen=True)
class TrainConfig:
    """Options that pretraining and finetuning share.

    Raises:
        HRMError: a value is out of range, or more than one length of the run is given.
    """

    epochs: int | None = option(
        None, "run", "train for N passes over the data, instead of --minutes", low=1, type=int,
        high=MAX_COUNT,
    )  # fmt: skip
    steps: int | None = option(
        None, "run", "train for N optimizer steps, instead of --minutes", low=1, type=int,
        high=MAX_STEPS,
    )  # fmt: skip
    minutes: float | None = option(
        None, "run", "train for N minutes, such as 0.5 (default: 10)", above=0, type=float,
        high=MAX_MINUTES,
    )  # fmt: skip
    batch_size: int | None = option(
        None,
        "training",
        f"windows of max_len bytes per step and process (default: {CPU_BATCH}; with CUDA "
        f"{GPU_BATCH}, or {WIDE_GPU_BATCH} with a d_model of {WIDE} or more)", low=1,
        high=MAX_BATCH, type=int,
    )  # fmt: skip
    grad_accum: int = option(
        1, "training", "micro-batches per optimizer step", flag=False, low=1, high=10_000
    )
    lr: float = option(6e-3, "training", "peak learning rate", above=0, high=100)
    optimizer: str = option(
        "muon",
        "training",
        "muon: Muon for the matrices in the blocks, AdamW for the rest; adamw: AdamW for all",
        flag=False,
        choices=("muon", "adamw"),
    )
    weight_decay: float = option(
        0.1, "training", "decoupled weight decay of the matrices in the blocks", flag=False, low=0,
        high=100,
    )  # fmt: skip
    warmup: int = option(
        10, "training", "warmup steps of the learning rate", flag=False, low=0, high=MAX_STEPS
    )
    decay: float = option(
        0.4,
        "training",
        "last fraction of the run in which the learning rate decays linearly to 0",
        flag=False,
        low=0,
        high=1,
    )
    patience: int = option(
        2,
        "training",
        "validations worse than the best before the learning rate decays and the run ends; "
        "0 disables it",
        flag=False,
        low=0,
        high=MAX_COUNT,
    )
    grad_clip: float = option(
        1.0,
        "training",
        "maximum gradient norm; 0 disables it",
        flag=False,
        low=0,
        high=1e6,
    )
    codebook_penalty: float = option(
        0.1, "training", "weight of the loss that balances the codes", flag=False, low=0, high=1e6
    )
    precision: str = option(
        "auto",
        "training",
        "precision of matrix products; auto: bf16 where the hardware has it, else fp16 on CUDA, "
        "else fp32",
        flag=False,
        choices=PRECISIONS,
    )
    compile: bool = option(
        False, "training", "torch.compile the blocks, for plain text: slow start", flag=False
    )
    val_fraction: float | None = option(
        None,
        "data",
        "fraction of the data that is held out (default: 0.05; of fewer than 1,000 pairs 50, or a "
        "fifth if that is less)",
        flag=False,
        low=0,
        below=1,
        type=float,
    )
    encoding: str = option("utf-8", "data", ENCODING_HELP, metavar="ENCODING")
    sample_prompt: str | None = option(
        None, "run", "show what the model writes after this prompt at each validation", flag=False,
        type=str,
    )  # fmt: skip
    seed: int = option(0, "run", "random seed of weights, data order and noise", low=0, below=2**63)
    out_dir: str = option(DEFAULT_DIR, "run", "folder of the run", metavar="DIR")
    keep: int | None = option(
        None, "run", "newest epoch checkpoints to keep (default: 3 with --epochs, else 0)",
        flag=False, low=0, high=MAX_COUNT, type=int,
    )  # fmt: skip
    save_every: float = option(
        5.0, "run", "minutes between two saved states, for --resume", flag=False, above=0,
        high=MAX_MINUTES,
    )  # fmt: skip
    resume: bool = option(False, "run", "continue the run in out_dir")
    overwrite: bool = option(False, "run", "discard the existing run in out_dir")

    def __post_init__(self) -> None:
        check_fields(self)
        given = [n for n in ("epochs", "steps", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise HRMError(f"give one of --epochs, --steps and --minutes, not {len(given)}")
        if not given:
            object.__setattr__(self, "minutes", 10.0)
        if self.resume and self.overwrite:
            raise HRMError("give --resume or --overwrite, not both")

    @property
    def n_kept_epochs(self) -> int:
        """``keep`` with its default filled in."""
        return (0 if self.epochs is None else 3) if self.keep is None else self.keep


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Options of pretraining."""

    encoding: str = option("utf-8", "data", ENCODING_HELP, flag=False)
    sep: str = option("line", "data", SEP_HELP, choices=SEPARATORS)
    keep_licence: bool = option(
        False, "data", "keep the licence of Project Gutenberg, which is cut off otherwise",
        flag=False,
    )  # fmt: skip
    count_memory: float | None = option(
        None,
        "data",
        "memory of the n-gram counts in MB; rare contexts are dropped to fit into it (default: an "
        f"eighth of the machine's, {DEFAULT_COUNT_MEMORY} at most)",
        flag=False,
        low=0.001,
        high=10**7,
        type=float,
    )
    planner_input: str = option(
        "same",
        "data",
        "what the Planner reads in training: the same window as the Executor, or the previous one",
        flag=False,
        choices=("same", "previous"),
    )
    grow: bool = option(
        True, "training", "begin with shorter windows and smaller batches", flag=False
    )
    denoise: float = option(
        0.125,
        "training",
        "fraction of the batches in which the Executor restores corrupted text that the Planner "
        "reads",
        flag=False,
        low=0,
        below=1,
    )


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Options of finetuning."""

    prompt_col: str | None = option(None, "data", PROMPT_COL_HELP, metavar="COLUMN", type=str)
    target_col: str | None = option(None, "data", TARGET_COL_HELP, metavar="COLUMN", type=str)
    lm: bool = option(False, "data", LM_HELP)
    batch_size: int | None = option(
        None,
        "training",
        "size of a batch of pairs per process, in units of max_len bytes (default: "
        f"{CPU_PAIRS}; with CUDA {GPU_PAIRS})", low=1, high=MAX_BATCH, type=int,
    )  # fmt: skip
    dropout: float = option(0.2, "model", "dropout rate", low=0, below=1)
    context: str = option(
        "cross_attention",
        "model",
        "how the Executor reads the prompt. cross_attention: the plan, and the Planner's states; "
        "plan: the plan vector only",
        choices=("cross_attention", "plan"),
    )
    gumbel: bool = option(True, "model", "keep the checkpoint's codebook")
    reinit_blocks: str = option(
        "auto",
        "training",
        "reinitialize the self-attention and feed-forward layers of a pretrained checkpoint. "
        "auto: if it predicts the targets much worse than held-out text",
        choices=("auto", "never", "always"),
    )


@dataclass(frozen=True)
class GenerationConfig:
    """Options of generation.

    Raises:
        HRMError: a value is out of range, or options exclude each other.
    """

    mode: str | None = option(
        None,
        "sampling",
        "continue: the prompt and its continuation; answer: the answer only (default: answer after "
        "finetuning, else continue)",
        choices=("continue", "answer"),
        type=str,
    )
    max_new_tokens: int | None = option(
        None,
        "sampling",
        f"maximum number of bytes to generate (default: {DEFAULT_NEW_TOKENS})",
        low=1,
        high=MAX_COUNT,
        type=int,
    )
    min_new_tokens: int = option(
        0, "sampling", "minimum number of bytes to generate, unless a stop sequence comes", low=0,
        high=MAX_COUNT,
    )  # fmt: skip
    temperature: float | None = option(
        None,
        "sampling",
        f"0 is greedy (default: {DEFAULT_TEMPERATURE}; in answer mode 0)",
        low=0,
        high=1e6,
        type=float,
        metavar="T",
    )
    top_k: int = option(
        0, "sampling", "sample from the K most likely bytes; 0 disables it", low=0, metavar="K",
        high=MAX_COUNT,
    )  # fmt: skip
    top_p: float = option(
        1.0,
        "sampling",
        "nucleus sampling: smallest set with total probability P",
        above=0,
        high=1,
        metavar="P",
    )
    min_p: float = option(
        0.0,
        "sampling",
        "drop bytes that are less than P times as likely as the most likely one",
        low=0,
        high=1,
        metavar="P",
    )
    stop: str | Sequence[str] = option((), "sampling", "stop sequence, repeatable", metavar="TEXT")
    seed: int | None = option(
        None, "sampling", "random seed (default: a new one each time)", low=0, below=2**63, type=int
    )
    plan_from: str | None = option(
        None, "plan", "use this text's plan instead of the prompt's", metavar="TEXT", type=str
    )
    plan_code: int | None = option(
        None, "plan", "use the plan of this code of the codebook, from 0; see hrm-esp plans",
        low=0, high=MAX_WIDTH, type=int,
    )  # fmt: skip
    guidance: float | None = option(
        None,
        "plan",
        "classifier-free guidance scale for --plan_from and --plan_code, 0 to 20: 1 disables it "
        f"and is twice as fast (default: {DEFAULT_GUIDANCE:g})",
        low=0,
        high=20,
        type=float,
    )
    precision: str = option(
        "auto",
        "run",
        "precision of the weights; auto: bf16 where the hardware has it",
        choices=("auto", "fp32", "bf16"),
        flag=False,
    )
    draft_len: int = option(
        24,
        "run",
        "speculative decoding: bytes drafted per pass (same distribution, different samples per "
        "seed); 0 disables it",
        flag=False,
        low=0,
        high=MAX_WIDTH,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise HRMError(
                f"min_new_tokens ({self.min_new_tokens}) must not be more than max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if any(type(s) is not str for s in self.stop_sequences):
            raise HRMError("stop must be text, or several texts")
        if any(not s.encode(errors="ignore") for s in self.stop_sequences):
            raise HRMError("stop must not be empty")
        if self.plan_from is not None and self.plan_code is not None:
            raise HRMError("give plan_from or plan_code, not both")
        if self.plan_from is None and self.plan_code is None and self.guidance is not None:
            raise HRMError("guidance needs plan_from or plan_code: give one of them")

    def mode_for(self, stage: str) -> str:
        """Returns ``mode``, by default as it fits what the model was last trained for."""
        return self.mode or ("answer" if stage == "finetune" else "continue")

    @property
    def max_bytes(self) -> int:
        """``max_new_tokens`` with its default filled in."""
        return self.max_new_tokens or max(DEFAULT_NEW_TOKENS, self.min_new_tokens)

    @property
    def stop_sequences(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
