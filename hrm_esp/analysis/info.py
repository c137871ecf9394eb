"""What a checkpoint is: its model, what made it, and the files beside it; as lines or as a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SIZES, HRMConfig
from ..data import PairColumns
from ..data.columns import shorten
from ..files import PathLike
from ..model.skeleton import skeleton
from ..training import checkpoint_path, load_checkpoint
from ..training.weights import ENTRIES
from .spanish import spanish_date, spanish_number

# What the files of a run folder are for, by the ends of their names, and whether to keep them.
FILES = {
    "_best.pt": ("the best model", "keep"),
    "_last.pt": ("the model at the end of the run", "may be deleted"),
    "_state.pt": ("for --resume only", "may be deleted when the run is over"),
    "corpus.tokens": ("the corpus as it was read", "may be deleted: made again when needed"),
    "ngrams.counts": ("n-gram counts of the corpus", "may be deleted: made again when needed"),
    "metrics.jsonl": ("log of the run, for hrm-esp plot", "keep"),
    ".pt": ("a model during the run", "may be deleted"),
}
UNKNOWN = "-"
# What a stage was trained on: a text, or pairs.
TEXT = {
    "en": "{data} ({bytes} bytes, {encoding}, --sep {sep})",
    "es": "{data} ({bytes} bytes, {encoding}, {sep})",
}
PAIRS = {"en": "{data} ({rows} prompts)", "es": "{data} ({rows} ejemplos)"}
SPANISH_SEP = {
    "line": "un documento por línea",
    "blank": "una línea en blanco entre párrafos",
    "stanza": "una línea en blanco entre estrofas",
    "file": "un documento por archivo",
}
FRONT_MATTER = """---
language: es
library_name: hrm-esp
pipeline_tag: text-generation
---

"""
CARDS = {
    "es": """# {name}

Modelo de lenguaje en español que lee y escribe bytes, entrenado con HRM-ESP {version}.

| | |
| --- | --- |
| tamaño | {weights} parámetros y {counts} conteos de n-gramas |
| entrenado con | {data} |
| bytes leídos en el entrenamiento | {seen} |
| bits por byte en datos no vistos | {score} |
| fecha | {date} |

```
{command}
hrm-esp generate --ckpt {file}
```

Lo que escribe se parece a los textos con los que se entrenó, pero no es información fiable.""",
    "en": """# {name}

A byte-level language model for Spanish, trained with HRM-ESP {version}.

| | |
| --- | --- |
| size | {weights} weights and {counts} n-gram counts |
| trained on | {data} |
| bytes seen in training | {seen} |
| bits per byte on held-out data | {score} |
| date | {date} |

```
{command}
hrm-esp generate --ckpt {file}
```

What it writes resembles the texts that it was trained on, but is no reliable information.""",
}


@dataclass
class Facts:
    """What is known about a checkpoint. ``weights`` and ``counts`` are numbers of weights and of
    entries in the table of n-gram counts; ``texts``: what is known about each text or table that it
    was trained on, the oldest first; ``columns``: of the table that it was finetuned on, empty if
    they are not known."""

    name: str
    file: str
    stage: str
    size: str
    weights: int
    counts: int
    texts: list[dict[str, Any]]
    columns: str
    seen: int
    steps: int
    score: str
    date: str
    version: str
    command: str


def read_facts(path: Path) -> Facts:
    """Reads a checkpoint.

    Raises:
        HRMError: see `load_checkpoint`.
    """
    checkpoint = load_checkpoint(path)
    n_counts = checkpoint.weights[ENTRIES].numel() if ENTRIES in checkpoint.weights else 0
    known = checkpoint.origin
    origin = known.get(checkpoint.stage, {})
    texts = [*known.get("earlier", []), known.get("pretrain", {}), known.get("finetune", {})]
    return Facts(
        name=path.resolve().parent.name,
        file=path.name,
        stage=checkpoint.stage,
        size=size_name(checkpoint.config),
        weights=skeleton(checkpoint.config).n_parameters(),
        counts=n_counts,
        texts=texts,
        columns=describe_columns(checkpoint.columns),
        seen=checkpoint.bytes_seen,
        steps=checkpoint.step,
        score=UNKNOWN if checkpoint.val_bpb is None else f"{checkpoint.val_bpb:.3f}",
        date=str(origin.get("date", UNKNOWN)),
        version=checkpoint.version,
        command=str(origin.get("command") or UNKNOWN),
    )


def size_name(config: HRMConfig) -> str:
    """Returns the --size of a config, or its dimensions."""
    for name, values in SIZES.items():
        if all(getattr(config, field) == value for field, value in values.items()):
            return name
    return f"{config.n_layers_enc} + {config.n_layers_dec} layers of {config.d_model}"


def describe_data(texts: list[dict[str, Any]], language: str = "en") -> str:
    """Returns what a checkpoint was trained on, in words."""
    return ", ".join(describe_text(t, language) for t in texts if "data" in t) or UNKNOWN


def describe_text(known: dict[str, Any], language: str) -> str:
    """Returns what a stage was trained on, in words."""
    numbers = {n: localized(f"{known[n]:,}", language) for n in ("bytes", "rows") if n in known}
    values = known | numbers
    if "rows" in known:
        return PAIRS[language].format_map(values)
    if language == "es":
        sep = SPANISH_SEP.get(known["sep"], known["sep"])
        values |= {"encoding": known["encoding"].upper(), "sep": sep}
    return TEXT[language].format_map(values)


def localized(number: str, language: str) -> str:
    """Returns a number as a language writes it."""
    return spanish_number(number) if language == "es" else number


def describe_columns(columns: PairColumns | None) -> str:
    """Returns the columns of a table by their names or numbers, in words."""
    if columns is None:
        return ""
    return f"prompt: {shorten(columns.prompt)}; target: {shorten(columns.target)}"


def describe(path: PathLike) -> Iterator[str]:
    """Yields the lines of `hrm-esp info` about a checkpoint, or the best one in a folder.

    Raises:
        HRMError: see `load_checkpoint` and `checkpoint_path`.
    """
    path = checkpoint_path(path)
    known = read_facts(path)
    for name, value in (
        ("checkpoint", path),
        ("stage", known.stage),
        ("size", f"{known.size}: {known.weights:,} weights, {known.counts:,} n-gram counts"),
        ("trained on", describe_data(known.texts)),
        ("columns", known.columns),
        ("seen", f"{known.seen:,} bytes in {known.steps:,} steps"),
        ("held out", f"{known.score} bits per byte"),
        ("made", f"{known.date} by hrm-esp {known.version}"),
        ("command", known.command),
    ):
        if value:
            yield f"{name:11} {value}"
    yield ""
    for file in sorted(path.parent.iterdir()):
        kind = next((kind for end, kind in FILES.items() if file.name.endswith(end)), None)
        if kind is not None and file.is_file():
            yield f"{file.name:20} {file.stat().st_size / 1e6:8.1f} MB  {kind[0]}; {kind[1]}"


def card(path: PathLike, language: str) -> str:
    """Returns a model card in Markdown for a checkpoint, or for the best one in a folder.

    Args:
        language: ``es`` or ``en``.

    Raises:
        HRMError: see `load_checkpoint` and `checkpoint_path`.
    """
    known = read_facts(checkpoint_path(path))
    numbers = {"weights": f"{known.weights:,}", "counts": f"{known.counts:,}"}
    numbers |= {"seen": f"{known.seen:,}", "score": known.score}
    values = vars(known) | {name: localized(text, language) for name, text in numbers.items()}
    values["data"] = describe_data(known.texts, language)
    values["date"] = spanish_date(known.date) if language == "es" else known.date
    return FRONT_MATTER + CARDS[language].format_map(values)
