"""Which files are a corpus: those given, and the text files in the folders given."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from zlib import crc32

from ..console import print0
from ..errors import HRMError
from ..files import PathLike

TEXT_SUFFIXES = (".txt", ".txt.gz")  # files that are read from a folder, in any case
PANDOC = "pandoc {file} -t plain --wrap=none -o {stem}.txt"
WORD_PROCESSOR = f"save it as plain text, or {PANDOC}"
SPREADSHEET = "export it as CSV"
# How to convert files that are not plain text.
CONVERSIONS = {
    ".pdf": "pdftotext {file} {stem}.txt, then --sep blank",
    ".docx": WORD_PROCESSOR,
    ".doc": WORD_PROCESSOR,
    ".odt": WORD_PROCESSOR,
    ".rtf": WORD_PROCESSOR,
    ".epub": PANDOC,
    ".html": PANDOC,
    ".htm": PANDOC,
    ".xlsx": SPREADSHEET,
    ".xls": SPREADSHEET,
    ".ods": SPREADSHEET,
    ".zip": "unpack it",
}
SKETCH_SIZE = 64  # hashes of documents that stand for a file
MIN_SKETCH = 10  # documents from which two files may be copies although some documents differ
MIN_BYTES = 200  # from which two files with fewer documents, all of them equal, are copies
MIN_COMMON = 0.8  # share of them that two copies of a text have in common


def text_files(paths: Sequence[PathLike]) -> list[Path]:
    """Returns the given files, and the text files in the given folders, in order, each once.

    In a folder, files and folders whose name begins with a dot are skipped, and links to folders
    are followed once. One line says what was skipped.

    Raises:
        HRMError: a path does not exist or has to be converted, or a folder holds no text.
    """
    files: dict[Path, Path] = {}  # by their real paths
    skipped: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.is_dir():
            inside = list(_walk(path, set(), skipped))
            if not inside:
                found = f" ({_describe(skipped)})" if skipped else ""
                raise HRMError(f"no {' or '.join(TEXT_SUFFIXES)} file in the folder {path}{found}")
        else:
            if not path.exists():
                raise missing_file(path)
            check_suffix(path)
            inside = [path]
        for file in inside:
            files.setdefault(file.resolve(), file)
    if skipped:
        print0(f"skipped {_describe(skipped)}")
    return list(files.values())


def missing_file(path: PathLike) -> HRMError:
    """Returns the error for a file that does not exist."""
    return HRMError(f"no such file: {path}: check the name and the folder")


def check_suffix(path: PathLike) -> None:
    """Raises HRMError if a file has to be converted, to judge by its suffix alone."""
    suffix = Path(path).suffix.lower()
    if suffix in CONVERSIONS:
        advice = CONVERSIONS[suffix].format(file=path, stem=Path(path).stem)
        raise HRMError(f"{path} is not plain text: {advice}")


def _walk(folder: Path, visited: set[Path], skipped: Counter[str]) -> Iterator[Path]:
    """Yields the text files below a folder, in order; counts the others by the kind of file."""
    real = folder.resolve()
    if real in visited:
        return
    visited.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            skipped["hidden"] += 1
        elif path.is_dir():
            yield from _walk(path, visited, skipped)
        elif path.name.lower().endswith(TEXT_SUFFIXES) and path.is_file():
            yield path
        else:
            skipped[path.suffix.lower() or "without extension"] += 1


def _describe(skipped: Counter[str]) -> str:
    """Says how many files were skipped, and how to convert them."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in skipped.most_common())
    advice = dict.fromkeys(CONVERSIONS[kind] for kind in skipped if kind in CONVERSIONS)
    convert = f"; to read them: {'; '.join(advice)}" if advice else ""
    convert = convert.format(file="FILE", stem="FILE")
    return f"{skipped.total()} files or folders in all: {kinds}{convert}"


class CopyFinder:
    """Finds files with the same text, or nearly the same.

    Of each file it keeps the smallest hashes of its documents (bottom-k sketch: Cohen & Kaplan
    2007).
    """

    def __init__(self) -> None:
        self.sketches: dict[str, set[int]] = {}  # by file
        self.files_of: dict[int, list[str]] = {}  # by hash
        self.copies: list[tuple[str, str]] = []  # a file, and the earlier one that it repeats
        self.sketch: set[int] = set()  # of the file that is read
        self.n_bytes = 0  # in it

    def read(self, documents: Iterable[bytes]) -> Iterator[bytes]:
        """Yields the documents of a file unchanged."""
        self.sketch, self.n_bytes = set(), 0
        for document in documents:
            self.n_bytes += len(document)
            self.sketch.add(crc32(document))
            if len(self.sketch) > 32 * SKETCH_SIZE:
                self.sketch = self._smallest()
            yield document

    def end(self, name: PathLike) -> None:
        """Compares the file that was read with the earlier ones."""
        sketch = self._smallest()
        shared = Counter(file for value in sketch for file in self.files_of.get(value, ()))
        for other, n in shared.most_common(1):
            is_equal = self.sketches[other] == sketch and self.n_bytes >= MIN_BYTES
            is_similar = len(sketch) >= MIN_SKETCH and n >= MIN_COMMON * len(sketch)
            if is_equal or is_similar:
                self.copies.append((str(name), other))
                return
        self.sketches[str(name)] = sketch
        for value in sketch:
            self.files_of.setdefault(value, []).append(str(name))

    def report(self) -> None:
        """Prints how many files repeat another one."""
        if self.copies:
            one, other = self.copies[0]
            print0(
                f"warning: files with the text of an earlier one: {len(self.copies):,}, such as "
                f"{one} (the same text as {other}): remove the copies"
            )

    def _smallest(self) -> set[int]:
        return set(heapq.nsmallest(SKETCH_SIZE, self.sketch))
