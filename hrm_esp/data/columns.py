"""What the columns of a table mean: whether the first row is a header, and which columns are the
prompt and the target."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import HRMError
from ..files import PathLike
from ..options import describe

# Names of the columns, in a header or as keys of JSON: of the prompt, and of the target.
PAIR_NAMES = (
    ("prompt", "target"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("question", "answer"),
    ("source", "target"),
    ("pregunta", "respuesta"),
    ("entrada", "salida"),
    ("instrucción", "respuesta"),
    ("origen", "destino"),
)
TEXT_NAMES = ("text", "texto")  # of plain text, without a target
# Words that name a column of a spreadsheet.
COLUMN_WORDS = frozenset(
    """id número numero nombre alumno alumna curso tema nivel nota fecha autor título titulo idioma
    frase frases oración oracion texto textos original corregida corregido corrección correccion
    correcta incorrecta palabra palabras lema forma significado definición definicion sinónimo
    traducción traduccion español inglés francés resumen solución solucion resultado categoría
    number name topic level grade date author title language sentence phrase text word correct
    corrected correction meaning definition translation spanish english french summary
    label""".split()
) | {name for pair in PAIR_NAMES for name in pair}
MAX_SINGLE_WORDS = 0.05  # share of cells of one word under a header of single words
MAX_HEADER_WORDS = 4  # of a column's name


def known_pair(names: Iterable[str]) -> tuple[str, str] | None:
    found = set(map(_normalized, names))
    return next(((p, t) for p, t in PAIR_NAMES if p in found and t in found), None)


def _normalized(name: str) -> str:
    return name.strip().rstrip(":").strip().lower()


def has_header_row(first: Sequence[str], body: Sequence[Sequence[str]], prompts_only: bool) -> bool:
    """Whether the first row names the columns: it has names of a pair, or words that name columns,
    or single words above cells that are numbers or have several words."""
    lower = list(map(_normalized, first))
    if known_pair(first) or (len(first) == 1 and lower[0] in TEXT_NAMES):
        return True
    if prompts_only and any(prompt in lower for prompt, _ in PAIR_NAMES):
        return True
    is_short = all(0 < len(name.split()) <= MAX_HEADER_WORDS for name in lower)
    if (
        not is_short
        or len(set(lower)) < len(lower)
        or any(re.search("[.,;?!…]$", n) for n in lower)
    ):
        return False
    n_words = sum(name.split()[0] in COLUMN_WORDS for name in lower)
    if (len(first) > 1 or prompts_only) and n_words >= len(first) / 2:
        return True
    if len(first) < 2 or len(body) < 5:
        return False
    cells = [cell for row in body for cell in row if cell]
    n_single = sum(re.fullmatch(r"[^\W\d]+", cell) is not None for cell in cells)
    is_single = all(re.fullmatch(r"[^\W\d]+", name) for name in first)
    has_text = any(" " in cell for cell in cells)
    return is_single and has_text and n_single <= MAX_SINGLE_WORDS * len(cells)


def choose_columns(
    path: PathLike,
    names: Sequence[str],
    n_columns: int,
    prompt_col: str | None,
    target_col: str | None,
    prompts_only: bool,
    is_json: bool,
) -> tuple[int, int | None, bool]:
    """Returns the indices of the prompt and of the target, and whether they are a guess.

    Raises:
        HRMError: a column that was asked for does not exist, both are the same, or no key of JSON
            is known.
    """
    lower = list(map(_normalized, names))

    def find(column: str) -> int:
        if _normalized(column) in lower:
            return lower.index(_normalized(column))
        # int() reads no number of thousands of digits.
        if column.isdecimal() and len(column) < 10 and 1 <= int(column) <= n_columns:
            return int(column) - 1
        known = f"its columns are {', '.join(names)}" if names else f"it has {n_columns} columns"
        raise HRMError(f"{path} has no column {describe(column)}: {known}")

    prompt = None if prompt_col is None else find(prompt_col)
    target = None if target_col is None else find(target_col)
    if prompt is not None and prompt == target:
        raise HRMError(f"{path}: prompt and target are the same column: give two")
    if prompt is None and target is None:
        if pair := known_pair(names):
            return lower.index(pair[0]), lower.index(pair[1]), False
        prompt = next((lower.index(p) for p, _ in PAIR_NAMES if p in lower), None)
        if prompt is not None and prompts_only:
            return prompt, None, False
        if is_json and (text := next((n for n in TEXT_NAMES if n in lower), None)):
            return lower.index(text), None, False
        if is_json and n_columns > 1:
            raise HRMError(
                f"{path}: which keys are prompt and target? Its keys are {', '.join(names)}: give "
                "--prompt_col and --target_col"
            )
    is_guess = prompt_col is None
    others = [i for i in range(n_columns) if i not in (prompt, target)]
    if prompt is None and others:
        prompt = others.pop(0)
    if prompt is None:
        raise HRMError(f"{path} has one column: it cannot be both prompt and target")
    if target is None and others:
        target = next((i for i in others if i > prompt), others[0])
    return prompt, target, is_guess
