"""Tables of prompts and targets: TSV, CSV and JSON Lines.

What a table means is found out, and said in one line: its separator, its header, and which columns
are the prompt and the target.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HRMError
from ..files import PathLike
from .corpus_files import check_is_text
from .encodings import guess_encoding, is_utf8
from .text import MAX_UNDECODABLE, TextStats, read_lines

SUFFIXES = (".tsv", ".csv", ".jsonl")
SEPARATORS = ("\t", ";", ",")
SEPARATOR_NAMES = {"\t": "tab", ";": "semicolon", ",": "comma", "": "JSON"}
# Names of the columns, in a header or as keys of JSON: of the prompt, and of the target.
PAIR_NAMES = (
    ("prompt", "target"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("source", "target"),
    ("pregunta", "respuesta"),
    ("entrada", "salida"),
    ("instrucción", "respuesta"),
    ("origen", "destino"),
)
TEXT_NAMES = ("text", "texto")  # of plain text, without a target
N_SNIFFED_ROWS = 1000  # rows that decide the separator
MIN_SHARE = 0.4  # of them that a separator must split into the same number of cells
MAX_WORDS = 0.05  # share of single words in a table whose header is of single words
MAX_SHOWN = 30  # characters of a cell

csv.field_size_limit(2**31 - 1)


def is_table(path: PathLike) -> bool:
    """Whether the name of a file is that of a table."""
    return table_suffix(path) in SUFFIXES


def table_suffix(path: PathLike) -> str:
    """Returns the ending of a name in lower case, without ``.gz``."""
    return Path(str(path).lower().removesuffix(".gz")).suffix


@dataclass
class Table:
    """Rows of a table, and which of their columns are read.

    ``names`` of the columns are empty without a header. ``cells`` of a row may be fewer or more
    than the columns; JSON has a cell for each name, ``None`` where a row lacks the key.
    ``target_column`` is ``None`` if there is no second column. ``rest_is_target``: further cells of
    a row are part of its target, separated by tabs. ``separator`` is empty for JSON.
    """

    path: PathLike
    encoding: str
    separator: str
    names: list[str]
    cells: list[list[str | None]]
    prompt_column: int
    target_column: int | None
    rest_is_target: bool
    escaped_breaks: int = 0

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yields the prompt and the target of each row; either may be empty."""
        for cells in self.cells:
            target = self._cell(cells, self.target_column)
            if self.rest_is_target:
                target = "\t".join(c or "" for c in cells[1:]).rstrip("\t")
            yield self._cell(cells, self.prompt_column), target

    def prompts(self) -> list[str]:
        return [prompt for prompt, _ in self.rows()]

    def column_names(self) -> list[str]:
        """Returns the names of all columns, made up if there is no header."""
        width = max(len(self.names), *map(len, self.cells))
        return [*self.names, *(f"column {i + 1}" for i in range(len(self.names), width))]

    @staticmethod
    def _cell(cells: Sequence[str | None], index: int | None) -> str:
        return "" if index is None or index >= len(cells) else cells[index] or ""

    def describe(self) -> str:
        """Returns one line that says what was understood."""
        kind = SEPARATOR_NAMES[self.separator]
        parts = [kind if kind == "JSON" else f"separated by {kind}"]
        if not is_utf8(self.encoding):
            parts.append(self.encoding)
        parts.append(f"prompt: {self._name(self.prompt_column)}")
        if self.target_column is not None:
            parts.append(f"target: {self._name(self.target_column)}")
        used = {self.prompt_column, self.target_column}
        others = [self._name(i) for i in range(self._n_columns()) if i not in used]
        if others and not self.rest_is_target:
            parts.append(f"not read: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}")
        if not self.names:
            first = " -> ".join(shorten(text) for text in next(self.rows()) if text)
            parts.append(f"no header, first row: {first}")
        return f"{self.path}: {len(self.cells):,} rows, {'; '.join(parts)}{self._describe_rows()}"

    def _describe_rows(self) -> str:
        """Returns what is odd about the rows."""
        rows = list(self.rows())
        counts = Counter(rows)
        targets: dict[str, set[str]] = {}
        for prompt, target in counts:
            targets.setdefault(prompt, set()).add(target)
        n_long = sum(len(cells) > 2 for cells in self.cells) if self.rest_is_target else 0
        n_contradicting = sum(n for (p, _), n in counts.items() if len(targets[p]) > 1)
        widths = Counter(map(len, self.cells)) if self.separator in (";", ",") else Counter([0])
        n_other = widths.total() - widths.most_common(1)[0][1]
        found = {
            "rows without target": sum(not target.strip() for _, target in rows),
            "duplicates": len(rows) - len(counts),
            "rows with the prompt of another row but another target": n_contradicting,
            "rows with further tabs, which are part of the target": n_long,
            "rows with another number of cells": n_other,
            r"cells with \n, read as line breaks": self.escaped_breaks,
        }
        said = [f"{what}: {n:,}" for what, n in found.items() if n]
        return f"; {', '.join(said)}" if said else ""

    def _n_columns(self) -> int:
        return len(self.names) or max(map(len, self.cells), default=0)

    def _name(self, index: int) -> str:
        return self.names[index] if self.names else f"column {index + 1}"


def read_table(
    path: PathLike,
    encoding: str = "utf-8",
    prompt_col: str | None = None,
    target_col: str | None = None,
    prompts_only: bool = False,
) -> Table:
    """Reads a table: JSON Lines by the ending of its name, else cells between separators.

    Args:
        path: the file; ``.gz`` is decompressed, ``-`` is standard input.
        encoding: a file that is not UTF-8 is read in the old encoding that gives Spanish.
        prompt_col, target_col: name of a column, or its number from 1; found out by default.
        prompts_only: only the prompts are of interest.

    Raises:
        HRMError: the file cannot be read, has an unclosed quote, bad JSON or no rows, or lacks a
            column.
    """
    check_is_text(path)
    text, encoding = _read_text(path, encoding)
    if table_suffix(path) == ".jsonl":
        return _read_json(path, text, encoding, prompt_col, target_col)
    separator, raw = _read_cells(path, text)
    n_escaped = sum(r"\n" in cell for row in raw for cell in row)
    cells: list[list[str | None]] = [[cell.replace(r"\n", "\n") for cell in row] for row in raw]
    if not cells:
        raise HRMError(f"no rows in {path}: give a prompt and its target in each row")
    first = [(cell or "").strip() for cell in cells[0]]
    asked = [c for c in (prompt_col, target_col) if c is not None and not c.isdecimal()]
    is_header = bool(asked) or _has_known_names(first, prompts_only)
    if separator != "\t":
        is_header = is_header or _looks_like_header(first, cells[1:])
    names = first if is_header else []
    n_columns = max(map(len, cells))
    prompt, target = _choose_columns(path, names, n_columns, prompt_col, target_col)
    rest = separator == "\t" and not names and prompt_col is None and target_col is None
    cells = cells[1:] if names else cells
    if not cells:
        raise HRMError(f"no rows in {path}, only a header")
    return Table(path, encoding, separator, names, cells, prompt, target, rest, n_escaped)


def _read_text(path: PathLike, encoding: str) -> tuple[str, str]:
    """Returns the text of a file with its line breaks as LF, and the encoding it was read in."""
    stats = TextStats()
    text = "\n".join(read_lines(path, encoding, stats))
    guess = guess_encoding(bytes(stats.kept))
    if guess is not None and str(path) != "-" and is_utf8(encoding):
        return "\n".join(read_lines(path, guess, TextStats())), guess
    stats.bytes = len(text.encode())
    stats.report(path, encoding, MAX_UNDECODABLE)
    return text, encoding


def _read_cells(path: PathLike, text: str) -> tuple[str, list[list[str]]]:
    """Finds the separator; returns it and the cells of the rows that are not blank."""
    is_csv = table_suffix(path) == ".csv"
    if not is_csv and "\t" in text:
        return "\t", _split_tabs(text)
    best, best_share = "", 0.0
    # Step 1: choose the separator with which most rows have one number of cells, two or more.
    for separator in SEPARATORS:  # of equal ones the first
        rows = _csv_rows(text, separator, strict=False)
        if not is_csv and not _has_known_names(next(rows, []), prompts_only=False):
            continue  # sentences have commas, too
        counts = Counter(len(row) for row, _ in zip(rows, range(N_SNIFFED_ROWS), strict=False))
        n_most = max((n for width, n in counts.items() if width > 1), default=0)
        share = n_most / max(1, counts.total())
        if share > max(best_share, MIN_SHARE):
            best, best_share = separator, share
    # Step 2: read the rows.
    if not best:
        if not is_csv:
            return "\t", _split_tabs(text)
        best = ","
    try:
        return best, list(_csv_rows(text, best, strict=True))
    except csv.Error as error:
        number = _line_of_open_quote(text, best)
        raise HRMError(
            f"{path}: a quote that opens in line {number} is not closed as CSV wants it ({error}): "
            'write a quote inside a cell twice, as in "dijo ""sí"""'
        ) from error


def _csv_rows(text: str, separator: str, strict: bool) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=strict)
    return (row for row in reader if any(cell.strip() for cell in row))


def _line_of_open_quote(text: str, separator: str) -> int:
    """Returns the line in which the row begins that the csv module cannot read."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    number = 1
    try:
        for _ in reader:
            number = reader.line_num + 1
    except csv.Error:
        pass
    return number


def _split_tabs(text: str) -> list[list[str]]:
    """Splits rows at tabs. Quotes are part of the text, unless a spreadsheet put them there: around
    all cells, or around cells that hold a tab, a line break or a quote."""
    plain = [line.split("\t") for line in text.split("\n") if line.strip()]
    if '"' not in text:
        return plain
    try:
        quoted = list(_csv_rows(text, "\t", strict=True))
    except csv.Error:
        return plain
    needs_quotes = any(re.search('[\t\n"]', cell) for row in quoted for cell in row)
    cells = [cell for row in plain for cell in row if cell]
    all_quoted = all(len(c) > 1 and c[0] == c[-1] == '"' for c in cells)
    return quoted if (needs_quotes and quoted != plain) or all_quoted else plain


def _read_json(
    path: PathLike, text: str, encoding: str, prompt_col: str | None, target_col: str | None
) -> Table:
    """Reads JSON Lines: an object per line."""
    objects: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise HRMError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise HRMError(f"{path}: line {number} is not a JSON object: give {{...}} in each line")
        objects.append(found)
        names |= dict.fromkeys(found)
    if not objects:
        raise HRMError(f"no rows in {path}: give a JSON object in each line")
    columns = list(names)
    prompt, target = _choose_columns(path, columns, len(columns), prompt_col, target_col)
    cells = [[_json_cell(found.get(name)) for name in columns] for found in objects]
    return Table(path, encoding, "", columns, cells, prompt, target, False)


def _json_cell(value: Any) -> str | None:
    return (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def _known_pair(names: Iterable[str]) -> tuple[str, str] | None:
    found = {name.strip().lower() for name in names}
    return next(((p, t) for p, t in PAIR_NAMES if p in found and t in found), None)


def _has_known_names(first: Sequence[str], prompts_only: bool) -> bool:
    """Whether the first row names the prompt and the target as `PAIR_NAMES` does."""
    lower = [name.strip().lower() for name in first]
    if prompts_only and any(prompt in lower for prompt, _ in PAIR_NAMES):
        return True
    return _known_pair(first) is not None or (len(first) == 1 and lower[0] in TEXT_NAMES)


def _looks_like_header(first: Sequence[str], cells: Sequence[Sequence[str | None]]) -> bool:
    """Whether the first row has one word in each column, and nearly all other cells are numbers or
    have several words."""
    if len(first) < 2 or len(cells) < 5 or len(set(first)) < len(first):
        return False
    if not all(re.fullmatch(r"[^\W\d]\w{,29}", name) for name in first):
        return False
    body = [cell for row in cells for cell in row if cell]
    n_words = sum(re.fullmatch(r"[^\W\d]+", cell) is not None for cell in body)
    return n_words <= MAX_WORDS * len(body)


def _choose_columns(
    path: PathLike,
    names: Sequence[str],
    n_columns: int,
    prompt_col: str | None,
    target_col: str | None,
) -> tuple[int, int | None]:
    """Returns the indices of the prompt and of the target.

    Raises:
        HRMError: a column that was asked for does not exist, or no key of JSON is known.
    """
    lower = [name.strip().lower() for name in names]

    def find(column: str) -> int:
        if column.strip().lower() in lower:
            return lower.index(column.strip().lower())
        if column.isdecimal() and 1 <= int(column) <= n_columns:
            return int(column) - 1
        known = f"its columns are {', '.join(names)}" if names else f"it has {n_columns} columns"
        raise HRMError(f"{path} has no column {column}: {known}")

    prompt = None if prompt_col is None else find(prompt_col)
    target = None if target_col is None else find(target_col)
    if prompt is None and target is None and (pair := _known_pair(names)):
        return lower.index(pair[0]), lower.index(pair[1])
    alone = [name for name in (*(p for p, _ in PAIR_NAMES), *TEXT_NAMES) if name in lower]
    if prompt is None and target is None and alone:
        return lower.index(alone[0]), None
    if table_suffix(path) == ".jsonl" and prompt is None and len(names) > 1:
        raise HRMError(
            f"{path}: which keys are prompt and target? Its keys are {', '.join(names)}: give "
            "--prompt_col and --target_col"
        )
    others = [i for i in range(n_columns) if i not in (prompt, target)]
    if prompt is None and others:
        prompt = others.pop(0)
    if target is None and target_col is None and others:
        target = next((i for i in others if i > (prompt or 0)), others[0])
    if prompt is None:
        raise HRMError(f"{path} has one column: it cannot be both prompt and target")
    return prompt, target


def shorten(text: str) -> str:
    """Returns the beginning of a cell, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def check_table_name(path: PathLike) -> None:
    """Raises HRMError if `write_table` cannot write a file of this name."""
    if table_suffix(path) not in SUFFIXES or str(path).lower().endswith(".gz"):
        raise HRMError(f"cannot write {path}: give a name that ends in .csv, .tsv or .jsonl")
    if not Path(path).parent.is_dir():
        raise HRMError(f"cannot write {path}: give a file in a folder that exists")


def write_table(
    path: PathLike, names: Sequence[str], rows: Iterable[Sequence[str | None]], separator: str = ","
) -> None:
    """Writes a table row by row, so that nothing is lost if the program is stopped.

    Args:
        path: ``.csv`` (with a byte order mark, without which spreadsheets take it for an old
            encoding), ``.tsv`` or ``.jsonl``.
        names: of the columns: the header, or the keys of JSON.
        separator: of CSV.
    """
    suffix = table_suffix(path)
    encoding = "utf-8-sig" if suffix == ".csv" else "utf-8"
    with open(path, "w", encoding=encoding, newline="") as file:
        delimiter = "\t" if suffix == ".tsv" else separator
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        if suffix != ".jsonl":
            writer.writerow(names)
        for cells in rows:
            if suffix == ".jsonl":
                row = dict(zip(names, cells, strict=True))
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                writer.writerow(["" if cell is None else cell for cell in cells])
            file.flush()
