"""What the columns of a table mean: whether the first row is a header, and which columns are the
prompt and the target."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
# Names of a column that numbers the rows, or identifies them.
ROW_NUMBER_NAMES = frozenset("id nº n° n.º n.° núm num # fila índice indice row index".split())
# Words that name a column of a spreadsheet.
COLUMN_WORDS = frozenset(
    """número numero nombre alumno alumna estudiante curso tema nivel nota fecha autor título titulo
    idioma ejercicio frase frases oración oracion oraciones texto textos original corregida
    corregido corrección correccion correcta correcto incorrecta incorrecto palabra palabras lema
    forma significado definición definicion sinónimo traducción traduccion español inglés francés
    resumen solución solucion resultado categoría number name topic level grade date author title
    language sentence phrase text word correct corrected correction meaning definition translation
    spanish english french summary label""".split()
).union(ROW_NUMBER_NAMES, *PAIR_NAMES)
MAX_SINGLE_WORDS = 0.05  # share of cells of one word under a header of single words
MAX_HEADER_WORDS = 4  # of a column's name
ROW_NUMBER = re.compile(r"#?(\d{1,9})[.)ºª°]?")
MAX_SHOWN = 30  # characters of a cell
MAX_SHOWN_COLUMNS = 12


class PairColumns(NamedTuple):
    """The columns of the table that a model was finetuned on: names, or without a header numbers
    from 1. ``n_columns``: of the whole table."""

    prompt: str
    target: str
    n_columns: int


class Wanted(NamedTuple):
    """Which columns to read: a name or a number from 1 each, ``None`` to find it out.

    ``prompts_only``: targets do not matter. ``trained``: the columns that a model was finetuned on,
    the default where the table has them.
    """

    prompt_col: str | None = None
    target_col: str | None = None
    prompts_only: bool = False
    trained: PairColumns | None = None


class Choice(NamedTuple):
    """Indices of the columns to read. ``width``: columns of the table; without a header rows may
    have more or fewer cells. ``is_guess``: nothing says that these are the right ones."""

    prompt: int
    target: int | None
    width: int
    is_guess: bool


def known_pair(names: Iterable[str]) -> tuple[str, str] | None:
    found = set(map(_normalized, names))
    return next(((p, t) for p, t in PAIR_NAMES if p in found and t in found), None)


def _normalized(name: str) -> str:
    return one_line(name).rstrip(":").strip().lower()


def has_header_row(first: Sequence[str], body: Sequence[Sequence[str]], prompts_only: bool) -> bool:
    """Whether the first row names the columns: it has names of a pair, or words that name columns,
    or single words above cells that are numbers or have several words. The first column of three or
    more may lack a name."""
    if len(first) > 2 and not first[0].strip():
        first = first[1:]
    lower = list(map(_normalized, first))
    if known_pair(first) or (len(first) == 1 and lower[0] in TEXT_NAMES):
        return True
    if prompts_only and any(prompt in lower for prompt, _ in PAIR_NAMES):
        return True
    is_short = all(0 < len(name.split()) <= MAX_HEADER_WORDS for name in lower)
    if (
        not is_short
        or len(set(lower)) < len(lower)
        or any(re.search(r"^\d+$|[.,;?!…]$", n) for n in lower)
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


def is_header_row(first: Sequence[str], body: Sequence[Sequence[str]], wanted: Wanted) -> bool:
    """Whether the first row names the columns: it looks like that, or names are wanted."""
    asked = (wanted.prompt_col, wanted.target_col)
    if any(column is not None and not column.isdecimal() for column in asked):
        return True
    if (trained := wanted.trained) is not None and not trained.prompt.isdecimal():
        needed = {trained.prompt} if wanted.prompts_only else {trained.prompt, trained.target}
        if set(map(_normalized, needed)) <= set(map(_normalized, first)):
            return True
    return has_header_row(first, body, wanted.prompts_only)


def choose_columns(
    path: PathLike,
    names: Sequence[str],
    cells: Sequence[Sequence[Any]],
    wanted: Wanted,
    is_json: bool,
) -> Choice:
    """Returns the columns to read: those that are wanted, those of training, those whose names are
    known, or a guess.

    Raises:
        HRMError: a column that is wanted does not exist, both are the same, or nothing says which
            of several columns are the prompt and the target.
    """
    lower, n_cells = list(map(_normalized, names)), len(names) or max(map(len, cells))
    width = len(names) or common_width(cells)

    def find(column: str) -> int:
        found = _find(column, lower, n_cells)
        if found is None:
            shown = ", ".join(column_name(names, i) for i in range(n_cells))
            known = f"its columns are {shown}" if names else f"it has {n_cells} columns"
            raise HRMError(f"{path} has no column {describe(column)}: {known}")
        return found

    # Step 1: columns that are wanted, and those of training.
    prompt = None if wanted.prompt_col is None else find(wanted.prompt_col)
    target = None if wanted.target_col is None else find(wanted.target_col)
    if prompt is not None and prompt == target:
        raise HRMError(f"{path}: prompt and target are the same column: give two")
    prompt, target, is_narrower = _add_trained(wanted, lower, width, prompt, target)
    is_chosen = prompt is not None
    is_free = prompt is None and target is None
    # Step 2: columns whose names are known.
    if is_free and (pair := known_pair(names)):
        return Choice(lower.index(pair[0]), lower.index(pair[1]), width, False)
    if prompt is None:
        prompt = _known(lower, [prompt for prompt, _ in PAIR_NAMES], target)
    if prompt is not None and target is None:
        target = _known(lower, [target for _, target in PAIR_NAMES], prompt)
    if prompt is not None and (target is not None or wanted.prompts_only):
        if target is None and prompt + 1 < width:
            target = prompt + 1
        return Choice(prompt, target, width, is_narrower)
    if is_json and is_free:
        if text := next((n for n in TEXT_NAMES if n in lower), None):
            return Choice(lower.index(text), None, width, False)
        if width > 1:
            keys = ", ".join(map(one_line, names))
            raise HRMError(
                f"{path}: which keys are prompt and target? Its keys are {keys}: give "
                "--prompt_col and --target_col"
            )
    # Step 3: a guess, if there are no more columns than needed. Numbers of the rows do not count.
    n_needed = (prompt is None) + (target is None)
    left = [i for i in range(width) if i not in (prompt, target)]
    left, is_named = _without_row_numbers(left, lower, cells, n_needed, wanted.prompts_only)
    if prompt is None and not left:
        raise HRMError(f"{path} has one column: it cannot be both prompt and target")
    if wanted.prompts_only:
        is_guess = len(left) > 1 or not is_named
        return Choice(left[0], left[1] if len(left) > 1 else None, width, is_guess)
    if is_chosen and (after := [i for i in left if prompt is not None and i > prompt]):
        left = after[:1]
    if len(left) > n_needed:
        raise _unclear(path, names, cells, prompt, target, width)
    if prompt is None:
        prompt = left.pop(0)
    if target is None and left:
        target = left.pop(0)
    return Choice(prompt, target, width, not is_chosen and not is_named)


def common_width(cells: Sequence[Sequence[str]]) -> int:
    """Returns the number of columns of a table without a header: what most rows have, but two if
    any row has a second cell. Empty cells at the end of a row do not count."""
    widths = Counter(
        max((i for i, cell in enumerate(row, 1) if cell.strip()), default=0) for row in cells
    )
    most_common = min(widths, key=lambda width: (-widths[width], width))
    return max(most_common, min(2, max(widths)), 1)


def _find(column: str, lower: Sequence[str], n_columns: int) -> int | None:
    """Returns the index of a column, given its name or its number from 1."""
    if _normalized(column) in lower:
        return lower.index(_normalized(column))
    # int() reads no number of thousands of digits.
    if column.isdecimal() and len(column) < 10 and 1 <= int(column) <= n_columns:
        return int(column) - 1
    return None


def _known(lower: Sequence[str], known: Iterable[str], other: int | None) -> int | None:
    """Returns the index of the first known name that a column other than ``other`` has."""
    found = (lower.index(name) for name in known if name in lower)
    return next((i for i in found if i != other), None)


def _add_trained(
    wanted: Wanted, lower: Sequence[str], width: int, prompt: int | None, target: int | None
) -> tuple[int | None, int | None, bool]:
    """Adds the columns of training to those that are wanted, if the table has them.

    Numbers are those of a table without a header, and used in such tables, if they have as many
    columns or fewer.

    Returns:
        The indices of the prompt and of the target, and whether they are numbers in a table with
        fewer columns: it may lack the targets, or other columns.
    """
    trained = wanted.trained
    if trained is None:
        return prompt, target, False
    is_number = trained.prompt.isdecimal()
    if is_number and (lower or width > trained.n_columns):
        return prompt, target, False
    p, t = _find(trained.prompt, lower, width), _find(trained.target, lower, width)
    if prompt is None and target is None:
        if p is None or (t is None and not wanted.prompts_only):
            return None, None, False
        return p, t, is_number and 1 < width < trained.n_columns
    return (
        p if prompt is None and p != target else prompt,
        t if target is None and t != prompt else target,
        False,
    )


def _without_row_numbers(
    left: list[int],
    lower: Sequence[str],
    cells: Sequence[Sequence[Any]],
    n_needed: int,
    prompts_only: bool,
) -> tuple[list[int], bool]:
    """Leaves out the first columns if they number the rows. A table of two columns keeps both, but
    one of prompts may name its numbers.

    Args:
        left: columns that may be the prompt or the target.
        n_needed: how many of them are needed.

    Returns:
        The other columns, and whether the names say which were left out.
    """
    n_skipped, is_named = 0, True
    while len(left) > 1 and left[0] == n_skipped:
        has_name = bool(lower) and (not lower[left[0]] or lower[left[0]] in ROW_NUMBER_NAMES)
        is_enough = len(left) > n_needed or (prompts_only and has_name)
        if not is_enough or not (has_name or _counts_rows(cells, left[0])):
            break
        is_named = is_named and has_name
        n_skipped, left = n_skipped + 1, left[1:]
    return left, is_named


def _counts_rows(cells: Sequence[Sequence[Any]], column: int) -> bool:
    """Whether the cells of a column are 1, 2, 3 and so on, or begin with 0."""
    found = [ROW_NUMBER.fullmatch(cell_text(row, column).strip()) for row in cells]
    numbers = [int(match[1]) for match in found if match is not None]
    return numbers in (list(range(len(cells))), list(range(1, len(cells) + 1)))


def _unclear(
    path: PathLike,
    names: Sequence[str],
    cells: Sequence[Sequence[Any]],
    prompt: int | None,
    target: int | None,
    width: int,
) -> HRMError:
    """Returns the error that lists the columns, each with its first cell that is not empty."""
    shown = []
    for i in range(min(width, MAX_SHOWN_COLUMNS)):
        texts = (cell_text(row, i) for row in cells)
        example = shorten(next((text for text in texts if text.strip()), ""))
        shown.append(f"{column_name(names, i)} ({example})")
    if width > MAX_SHOWN_COLUMNS:
        shown.append("...")
    missing = [n for n, i in (("prompt", prompt), ("target", target)) if i is None]
    plural = "columns are" if len(missing) > 1 else "column is the"
    return HRMError(
        f"{path}: which {plural} {' and '.join(missing)}? It has {', '.join(shown)}: give "
        f"{' and '.join(f'--{name}_col' for name in missing)}, a {'name or a ' * bool(names)}number"
    )


def cell_text(cells: Sequence[Any], index: int | None) -> str:
    """Returns a cell as text: a value of JSON as JSON writes it, a missing cell as ``""``."""
    value = None if index is None or index >= len(cells) else cells[index]
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\0", "").encode(errors="ignore").decode()


def column_name(names: Sequence[str], index: int) -> str:
    """Returns the name of a column as a message shows it, or its number from 1."""
    name = one_line(names[index]) if index < len(names) else ""
    return name or f"column {index + 1}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def shorten(text: str) -> str:
    """Returns the beginning of a cell, in one line."""
    text = one_line(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
