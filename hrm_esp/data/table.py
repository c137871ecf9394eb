"""Tables of prompts and targets: TSV, CSV and JSON Lines.

What a table means is found out, and said in one line: its separator, its header, and which columns
are the prompt and the target.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HRMError
from ..files import PathLike
from .columns import (
    PairColumns,
    Wanted,
    cell_text,
    choose_columns,
    column_name,
    is_header_row,
    known_pair,
    shorten,
)
from .encodings import is_utf8
from .text import display_name, read_text

TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl")
SEPARATORS = ("\t", ";", ",")
SEPARATOR_NAMES = {"\t": "tab", ";": "semicolon", ",": "comma"}
N_SNIFFED_ROWS = 1000  # rows that decide the separator
MIN_REGULAR_ROWS = 5  # prompts that show columns by having the same number of cells
MIN_SHARE = 0.5  # of them that a separator must split into the same number of cells

csv.field_size_limit(2**31 - 1)  # a cell may be a whole text; the default is 128 KiB


def is_table(path: PathLike) -> bool:
    """Whether the name of a file is that of a table."""
    return table_suffix(path) in TABLE_SUFFIXES


def table_suffix(path: PathLike) -> str:
    """Returns the extension of a name in lower case, without ``.gz``."""
    return Path(str(path).lower().removesuffix(".gz")).suffix


@dataclass
class Table:
    """Rows of a table, and which of their columns are read.

    ``names`` of the columns are empty without a header. ``cells`` of a row may be fewer or more
    than the columns, whose number is ``width``; JSON has a value for each name, ``None`` where a
    row lacks the key.
    ``target_column`` is ``None`` if there is no second column. ``rest_is_target``: further cells of
    a row are part of its target, separated by tabs. ``separator`` is empty for JSON.
    ``prompts_only``: targets do not matter. ``is_guess``: nothing says that these are the columns
    to read.
    """

    path: PathLike
    encoding: str
    separator: str
    names: list[str]
    cells: list[list[Any]]
    prompt_column: int
    target_column: int | None
    width: int
    rest_is_target: bool
    prompts_only: bool = False
    is_guess: bool = False
    escaped_breaks: int = 0
    quotes_removed: bool = False

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yields the prompt and the target of each row; either may be empty."""
        for cells in self.cells:
            target = cell_text(cells, self.target_column)
            if self.rest_is_target and self.target_column is not None:
                target = "\t".join(cells[self.target_column :]).rstrip("\t")
            yield cell_text(cells, self.prompt_column), target

    def prompts(self) -> list[str]:
        return [prompt for prompt, _ in self.rows()]

    def describe(self) -> str:
        """Returns one line that says what was understood; a warning if that may be wrong."""
        parts = [
            "JSON" if not self.separator else f"separated by {SEPARATOR_NAMES[self.separator]}"
        ]
        if self.separator and self._n_columns() == 1:
            parts = ["one column"]
        if not is_utf8(self.encoding):
            parts.append(self.encoding)
        parts.append(f"prompt: {self._name(self.prompt_column)}")
        used = {self.prompt_column}
        if self.target_column is not None and not self.prompts_only:
            parts.append(f"target: {self._name(self.target_column)}")
            used.add(self.target_column)
        others = [self._name(i) for i in range(self._n_columns()) if i not in used]
        if others and not self.rest_is_target:
            parts.append(f"not read: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}")
        if not self.names:
            first = " -> ".join(shorten(text) for text in next(self.rows()) if text)
            parts.append(f"no header, first row: {first}")
        odd, is_suspicious = self._describe_rows()
        advice = "; choose columns with --prompt_col" if is_suspicious else ""
        advice += " and --target_col" if advice and not self.prompts_only else ""
        name = f"{'warning: ' if is_suspicious else ''}{display_name(self.path)}"
        return f"{name}: {len(self.cells):,} rows, {'; '.join(parts + odd)}{advice}"

    def _describe_rows(self) -> tuple[list[str], bool]:
        """Returns what is odd about the rows, and whether the columns may be wrong."""
        rows = list(self.rows())
        counts = Counter(rows)
        targets: dict[str, set[str]] = {}
        for prompt, target in counts:
            targets.setdefault(prompt, set()).add(target)
        n_contradicting = sum(n for (p, _), n in counts.items() if len(targets[p]) > 1)
        widths = Counter(map(len, self.cells))
        width = len(self.names) or (2 if self.rest_is_target else widths.most_common(1)[0][0])
        n_longer = sum(n for w, n in widths.items() if w > width)
        if self.rest_is_target:
            found = {"rows with further tabs, which are part of the target": n_longer}
        elif self.names:
            found = {"rows with more cells than the header": n_longer}
        else:
            found = {"rows with another number of cells": len(rows) - widths[width]}
        is_ragged = not self.rest_is_target and any(found.values())
        texts = [cell for cells in self.cells for cell in cells if isinstance(cell, str)]
        found["cells with line breaks"] = sum("\n" in text for text in texts)
        found[r"cells with line breaks written as \n"] = self.escaped_breaks
        if not self.prompts_only:
            found |= {
                "rows without target": sum(not target.strip() for _, target in rows),
                "duplicates": len(rows) - len(counts),
                "rows with the prompt of another row but another target": n_contradicting,
            }
        odd = ["quotes around cells removed"] if self.quotes_removed else []
        odd += [f"{what}: {n:,}" for what, n in found.items() if n]
        is_guess = self.is_guess and not self.rest_is_target
        return odd, is_guess or is_ragged

    def pair_columns(self) -> PairColumns | None:
        """Returns the names of the columns that were read, or their numbers without a header;
        ``None`` if there is no target."""
        if self.target_column is None:
            return None
        read = (self.prompt_column, self.target_column)
        prompt, target = (cell_text(self.names, i) if self.names else str(i + 1) for i in read)
        return PairColumns(prompt, target, self.width)

    def _n_columns(self) -> int:
        return len(self.names) or max(map(len, self.cells), default=0)

    def _name(self, index: int) -> str:
        return column_name(self.names, index)


def read_table(
    path: PathLike,
    encoding: str = "utf-8",
    prompt_col: str | None = None,
    target_col: str | None = None,
    prompts_only: bool = False,
    trained: PairColumns | None = None,
) -> Table:
    """Reads a table: JSON Lines by the extension of its name, else cells between separators.

    Args:
        path: the file; ``.gz`` is decompressed, ``-`` is standard input.
        encoding: a file that is not UTF-8 is read in the old encoding that gives Spanish.
        prompt_col, target_col: name of a column, or its number from 1; found out by default.
        prompts_only: only the prompts are of interest.
        trained: the columns that a model was finetuned on, the default where the table has them.

    Raises:
        HRMError: the file cannot be read, has an unclosed quote, bad JSON or no rows, lacks a
            column, or has several and nothing says which ones to read.
    """
    text, stats = read_text(path, encoding)
    wanted = Wanted(prompt_col, target_col, prompts_only, trained)
    if table_suffix(path) == ".jsonl":
        separator, names, cells = "", *_read_json(path, text)
        n_escaped, quotes_removed = 0, False
    else:
        separator, raw, quotes_removed = _read_cells(path, text, wanted)
        n_escaped = sum(cell != unescape(cell) for row in raw for cell in row)
        cells = [list(map(unescape, row)) for row in without_empty_columns(raw)]
        first = [cell.strip() for cell in cells[0]] if cells else []
        is_header = is_header_row(first, cells[1:], wanted)
        names = unique(first) if is_header else []
        if is_header and len(cells) == 1:
            raise HRMError(f"no rows in {path}, only a header")
        cells = cells[1:] if is_header else cells
    if not cells:
        raise HRMError(f"no rows in {path}: give a prompt and its target in each row")
    columns = choose_columns(path, names, cells, wanted, is_json=not separator)
    is_last = columns.target == columns.width - 1 if names else columns.target == 1
    return Table(
        path,
        stats.encoding,
        separator,
        names,
        cells,
        columns.prompt,
        columns.target,
        columns.width,
        rest_is_target=separator == "\t" and is_last and (bool(names) or columns.width <= 2),
        prompts_only=prompts_only,
        is_guess=columns.is_guess,
        escaped_breaks=n_escaped,
        quotes_removed=quotes_removed,
    )


def without_empty_columns(cells: list[list[str]]) -> list[list[str]]:
    """Returns the rows without the columns at their end that are empty in all rows."""
    n = max((i for row in cells for i, cell in enumerate(row, 1) if cell.strip()), default=0)
    return [row[:n] for row in cells]


def unescape(cell: str) -> str:
    r"""Returns a cell with ``\n`` as a line break; ``\\n`` stands for the two characters."""
    if r"\n" not in cell:
        return cell
    return re.sub(r"(\\?)\\n", lambda match: r"\n" if match[1] else "\n", cell)


def unique(names: Sequence[str]) -> list[str]:
    """Returns the names, with a number where one occurred before."""
    found: list[str] = []
    for name in names:
        numbered = (name if i == 1 else f"{name}_{i}" for i in itertools.count(1))
        found.append(next(n for n in numbered if n not in found))
    return found


def _read_cells(path: PathLike, text: str, wanted: Wanted) -> tuple[str, list[list[str]], bool]:
    """Finds the separator. Returns it, the cells of the rows that are not blank, and whether quotes
    around all cells were removed."""
    is_csv = table_suffix(path) == ".csv"
    if not is_csv and "\t" in text:
        return "\t", *_split_tabs(text)
    best, best_share = "", 0.0
    # Step 1: choose the separator that splits most rows into as many cells as the first row,
    # or more.
    if is_csv and (said := re.match(r"sep=([;,\t])\n", text, re.IGNORECASE)):  # a line of Excel's
        best, text = said[1], text[said.end() :]
    for separator in () if best else SEPARATORS:  # of equal ones the first
        rows = list(itertools.islice(_csv_rows(text, separator, strict=False), N_SNIFFED_ROWS + 1))
        width = len(rows[0]) if rows else 0
        if width < 2 or not (is_csv or known_pair(rows[0])):
            continue  # in a file that is no .csv commas are part of sentences
        if _is_prose(rows, wanted):
            continue
        share = sum(len(row) >= width for row in rows) / len(rows)
        if share > max(best_share, MIN_SHARE):
            best, best_share = separator, share
    # Step 2: read the rows.
    is_single = not best
    if is_single:
        if not is_csv:
            return "\t", *_split_tabs(text)
        best = "\t"  # one column, whose cells may be in quotes
    try:
        cells = list(_csv_rows(text, best, strict=True))
    except csv.Error as error:
        number, reason = error.args
        raise HRMError(
            f"{path}: a quote that opens in line {number} is not closed as CSV wants it "
            f"({reason}): "
            'write a quote inside a cell twice, as in "dijo ""sí"""'
        ) from error
    if is_single and all(len(row) == 1 for row in cells):
        # A comma outside quotes: the program that wrote the file separates columns by semicolons.
        best = ";" if "," in re.sub('"[^"]*"', "", text) else ","
    return best, cells, False


def _is_prose(rows: Sequence[list[str]], wanted: Wanted) -> bool:
    """Whether a separator is the punctuation of sentences: a space mostly follows it, which no
    program writes, and it splits the rows into different numbers of cells.

    A few rows of prompts may have the same number by chance, unless a later column is wanted.
    """
    later = [cell for row in rows for cell in row[1:] if cell]
    if sum(cell.startswith(" ") for cell in later) <= len(later) / 2:
        return False
    first, *body = [[cell.strip() for cell in row] for row in rows]
    if is_header_row(first, body, wanted):
        return False
    is_regular = all(len(row) == len(first) for row in body)
    may_be_chance = wanted.prompts_only and len(rows) < MIN_REGULAR_ROWS
    return not is_regular or (may_be_chance and wanted.prompt_col in (None, "1"))


def _csv_rows(text: str, separator: str, strict: bool) -> Iterator[list[str]]:
    """Yields the rows that are not blank.

    Raises:
        csv.Error: a row cannot be read; with the number of its first line, and the reason.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=strict)
    number = 1
    try:
        for row in reader:
            number = reader.line_num + 1
            if any(map(str.strip, row)):
                yield row
    except csv.Error as error:
        raise csv.Error(number, str(error)) from error


def _split_tabs(text: str) -> tuple[list[list[str]], bool]:
    """Splits rows at tabs. Quotes are part of the text, unless a spreadsheet put them there: the
    file is what it writes, with quotes where a cell needs them (Excel: also if it has a comma), or
    around all cells.

    Returns:
        The cells of each row, and whether quotes around all cells were removed.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    plain = [line.split("\t") for line in lines]
    if '"' not in text:
        return plain, False
    try:
        cells = list(_csv_rows(text, "\t", strict=True))
    except csv.Error:
        return plain, False
    if len(set(map(len, cells))) > 1:
        return plain, False
    for special in ('["\t\n]', '["\t\n,]', ""):  # what a cell is quoted for; "" is any cell
        written = "\n".join("\t".join(_quoted(cell, special) for cell in row) for row in cells)
        if written.strip("\n") == text.strip("\n"):
            return cells, not special
    return plain, False


def _quoted(cell: str, special: str) -> str:
    """Returns a cell as a spreadsheet writes it, in quotes if the pattern ``special`` occurs."""
    return '"' + cell.replace('"', '""') + '"' if re.search(special, cell) else cell


def _read_json(path: PathLike, text: str) -> tuple[list[str], list[list[Any]]]:
    """Reads JSON Lines: an object per line. Returns the keys, and each row's values."""
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HRMError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise HRMError(f"{path}: line {number} is not a JSON object: give {{...}} in each line")
        objects.append(found)
    names = list(dict.fromkeys(name for found in objects for name in found))
    return names, [[found.get(name) for name in names] for found in objects]


def check_table_name(path: PathLike) -> None:
    """Raises HRMError if `write_table` cannot write a file of this name."""
    if table_suffix(path) not in TABLE_SUFFIXES or str(path).lower().endswith(".gz"):
        raise HRMError(f"cannot write {path}: give a name that ends in .csv, .tsv or .jsonl")


def write_table(
    path: PathLike,
    names: Sequence[str],
    rows: Iterable[Sequence[Any]],
    separator: str = ",",
    header: bool = True,
) -> int:
    """Writes a table row by row, so that nothing is lost if the program is stopped.

    Args:
        path: ``.csv`` (with a byte order mark, without which spreadsheets take it for an old
            encoding), ``.tsv`` or ``.jsonl``.
        names: of the columns: the header, or the keys of JSON.
        rows: the first one is taken before an existing file is overwritten.
        separator: of CSV.
        header: write the names in the first row of CSV and TSV.

    Returns:
        The number of rows.
    """
    suffix, rows = table_suffix(path), iter(rows)
    first = next(rows, None)
    encoding = "utf-8-sig" if suffix == ".csv" else "utf-8"
    with open(path, "w", encoding=encoding, newline="") as file:
        delimiter = "\t" if suffix == ".tsv" else separator
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        if header and suffix != ".jsonl":
            writer.writerow(names)
        n = 0
        for cells in itertools.chain([] if first is None else [first], rows):
            n += 1
            if suffix == ".jsonl":
                row = dict(zip(names, cells, strict=True))
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                writer.writerow([cell_text(cells, i) for i in range(len(cells))])
            file.flush()
    return n
