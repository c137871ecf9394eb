"""Text to batches.

A document is one non-empty line. A corpus is one stream of bytes in which a line break ends each
document; as a target that break is EOS, as an input it is BOS: one token a byte, and the stream can
be kept on disk and memory-mapped as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .denoising import damage
from .distributed import say
from .errors import HRMError
from .files import mapped
from .tokenizer import BOS, EOS, PAD

BREAK = 10  # the byte between documents
UNDECODABLE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of such a byte
TRACE = 5e-4  # the share of undecodable bytes that is not worth a warning
SUFFIXES = (".txt", ".txt.gz")  # what is taken from a folder
HELD_OUT = 0.05  # the share of the data, unless said
FEWEST = 50  # pairs held out, unless said, if that is no more than a fifth
HALVINGS, SHORTEST = 4, 8  # of a window, for text to restore; bytes

Stream = np.ndarray  # uint8, (N,)
PathLike = str | os.PathLike[str]


@dataclass
class TextStats:
    """What reading met: documents, their bytes in UTF-8, and bytes it could not decode."""

    documents: int = 0
    bytes: int = 0
    undecodable: int = 0

    def add(self, document: str) -> None:
        self.documents += 1
        self.bytes += len(document) if document.isascii() else len(document.encode())

    def warn(self, name: PathLike, encoding: str) -> None:
        """Says on stderr how much was undecodable, and warns if it is more than a trace.

        Raises:
            HRMError: so much that this is no text.
        """
        share = self.undecodable / max(1, self.bytes + self.undecodable)
        if share > 0.2:
            raise HRMError(f"{name} is not text in {encoding}: give --encoding, or another file")
        if self.undecodable:
            said = f"{name}: bytes that are not {encoding}, left out: {self.undecodable:,} "
            said += f"({share:.2%})"
            say(said if share <= TRACE else f"warning: {said}; is it --encoding latin-1?")


def to_bytes(text: str) -> bytes:
    """UTF-8 in NFC, so that an accented letter is always the same bytes; no lone surrogates."""
    return unicodedata.normalize("NFC", text).encode(errors="ignore")


def open_text(path: PathLike, encoding: str) -> IO[str]:
    """A text file, gzipped if its name ends in ``.gz``, without its byte order mark; ``-`` is
    standard input.

    Raises:
        HRMError: missing, a folder, unreadable, binary, or an unknown encoding.
    """
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    try:
        if str(path) == "-":
            if sys.stdin is None:
                raise HRMError("there is no standard input: give a file")
            return io.TextIOWrapper(sys.stdin.buffer, encoding=name, errors="surrogateescape")
        opener = gzip.open if str(path).endswith(".gz") else open
        file: IO[str] = opener(path, "rt", encoding=name, errors="surrogateescape")
        if file.seekable():  # and not a pipe
            if "\0" in file.read(65536):
                raise HRMError(
                    f"{path} is not text in {encoding}: give --encoding, or another file"
                )
            file.seek(0)
    except LookupError as error:
        raise HRMError(f"unknown encoding {encoding!r}: try utf-8, latin-1 or cp1252") from error
    except IsADirectoryError as error:
        raise HRMError(f"{path} is a folder: give a file") from error
    except (UnicodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise HRMError(f"{path} cannot be read as {encoding} text: {error}") from error
    except OSError as error:
        raise HRMError(
            f"cannot read {path}: {error.strerror or 'it is not a plain file'}"
        ) from error
    return file


def read_lines(path: PathLike, encoding: str, stats: TextStats) -> Iterator[str]:
    """All lines of a text file, blank ones too, as they come, without what cannot be decoded, which
    is counted.

    Raises:
        HRMError: the file is missing, a folder, or no text.
    """
    with open_text(path, encoding) as file:
        try:
            for line in file:
                line = line.removesuffix("\n")
                if not line.isascii() and (bad := len(UNDECODABLE.findall(line))):
                    stats.undecodable += bad
                    line = UNDECODABLE.sub("", line)
                yield line
        except (UnicodeError, zlib.error, EOFError, OSError) as error:
            raise HRMError(f"{path} cannot be read as {encoding} text: {error}") from error


def load_corpus_lines(
    path: PathLike, encoding: str = "utf-8", stats: TextStats | None = None
) -> Iterator[str]:
    """The non-blank lines of a text file, without their line breaks, one at a time.

    Args:
        path: the file; ``.gz`` is unpacked. A byte order mark and CRLF are no part of a line.
        encoding: of the file; what cannot be decoded is left out.
        stats: counts the lines and bytes yielded, and the bytes that could not be decoded.

    Raises:
        HRMError: the file is missing, a folder, or no text.
    """
    stats = TextStats() if stats is None else stats
    for line in read_lines(path, encoding, stats):
        if line and not line.isspace():
            stats.add(line)
            yield line


def load_paragraphs(
    path: PathLike, encoding: str = "utf-8", stats: TextStats | None = None
) -> Iterator[str]:
    """What stands between blank lines of a text file, its lines joined by spaces; arguments and
    errors as of `load_corpus_lines`."""
    stats = TextStats() if stats is None else stats
    lines = read_lines(path, encoding, stats)
    for is_blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not is_blank:
            paragraph = " ".join(line.strip() for line in group)
            stats.add(paragraph)
            yield paragraph


def text_files(paths: Sequence[PathLike]) -> list[Path]:
    """The files named, and the text files in the folders named, in order.

    Raises:
        HRMError: a path that does not exist, or a folder without text.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
        if not inside:
            raise HRMError(f"no {' or '.join(SUFFIXES)} file in the folder {path}")
        files += inside
    for file in files:
        if not file.exists():
            raise HRMError(f"no such file: {file}")
    return files


def write_stream(files: Sequence[Path], out: IO[bytes], encoding: str, sep: str = "line") -> None:
    """Writes the documents of ``files``, a line break after each.

    Raises:
        HRMError: a file that cannot be read, or no text in any.
    """
    documents, load = 0, load_corpus_lines if sep == "line" else load_paragraphs
    for path in files:
        stats = TextStats()
        for document in load(path, encoding, stats):
            out.write(to_bytes(document) + b"\n")
        stats.warn(path, encoding)
        documents += stats.documents
    if not documents:
        raise HRMError(f"no text in {', '.join(map(str, files[:3]))}")


def load_stream(
    paths: Sequence[PathLike],
    encoding: str = "utf-8",
    token_file: PathLike | None = None,
    sep: str = "line",
) -> Stream:
    """The token stream of some text files, memory-mapped.

    Args:
        paths: files or folders.
        token_file: where to keep the stream; it is used again as long as the sources are the same.
            ``None`` keeps it for this process only.
        sep: what ends a document: each ``line``, or a ``blank`` one.

    Raises:
        HRMError: a file that cannot be read, or no text in any.
    """
    files = text_files(paths)
    if token_file is None:
        with tempfile.TemporaryFile() as file:
            write_stream(files, file, encoding, sep)
            file.flush()
            return np.memmap(file, dtype=np.uint8, mode="r")
    sources = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([2, encoding, sep, sources]).encode()).hexdigest()
    return mapped(Path(token_file), key, lambda file: write_stream(files, file, encoding, sep))


def split_stream(stream: Stream, fraction: float | None) -> tuple[Stream, Stream]:
    """The stream without its tail, and the tail: about ``fraction`` of it (``None``: 5%), whole
    documents if they are not too long."""
    fraction = HELD_OUT if fraction is None else fraction
    cut = len(stream) - round(len(stream) * fraction)
    middle = (cut + len(stream)) // 2  # a document longer than half the tail is cut in two
    (breaks,) = np.nonzero(stream[cut:middle] == BREAK)
    if len(breaks):
        cut += int(breaks[0]) + 1
    return stream[:cut], stream[cut:]


def as_inputs(window: np.ndarray) -> np.ndarray:
    """Stream bytes as the model reads them: int64, a line break is BOS."""
    ids = window.astype(np.int64)
    ids[ids == BREAK] = BOS
    return ids


def as_targets(window: np.ndarray) -> np.ndarray:
    """Stream bytes as the model is to write them: int64, a line break is EOS."""
    ids = window.astype(np.int64)
    ids[ids == BREAK] = EOS
    return ids


class Shard(NamedTuple):
    """Each ``of``-th item from ``rank`` on: what one of several processes takes."""

    rank: int
    of: int


ALL = Shard(0, 1)


class Batch(NamedTuple):
    """One batch: the Planner's ``prompt_ids`` (B, S), the Executor's ``y_in`` (B, T), the tokens to
    predict ``y_out`` (B, T), PAD where there is nothing to predict, and ``reads_memory`` (B,), the
    rows that may attend to the prompt (``None``: text, where none may). ``past`` (B, R) is what was
    read before ``y_in``, PAD on the left, for the counts alone (``None``: nothing)."""

    prompt_ids: Tensor
    y_in: Tensor
    y_out: Tensor
    reads_memory: Tensor | None = None
    past: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """To predict."""
        return int((self.y_out != PAD).sum())

    @property
    def has_targets(self) -> Tensor:
        """Which rows have something to predict, (B,) bool."""
        return (self.y_out != PAD).any(1)

    def idle(self) -> Batch:
        """The same with nothing to predict."""
        return self._replace(y_out=torch.full_like(self.y_out, PAD))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]


class LMDataset(Sequence[Batch]):
    """Windows of ``max_len`` bytes of a stream, for pretraining.

    The stream is taken as a ring, so that windows from any offset cover all of it. Item ``i`` is
    the window from ``i * max_len`` on, as a batch of one.

    Args:
        recent_len: bytes before each window that come with it as the ``past``.
        denoise: the share of the batches that are `damaged` lines instead.
    """

    def __init__(
        self,
        stream: Stream,
        max_len: int,
        planner_view: str = "same",
        recent_len: int = 0,
        denoise: float = 0.0,
    ) -> None:
        self.stream, self.max_len, self.planner_view = stream, max_len, planner_view
        self.denoise = denoise
        # Of a ring smaller than that, nothing that is still to be predicted.
        self.recent_len = max(0, min(recent_len, len(stream) - max_len - 1))

    def __len__(self) -> int:
        return math.ceil(len(self.stream) / self.max_len)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.windows(np.array([index % len(self) * self.max_len]))

    def windows(self, starts: np.ndarray, pieces: int = 1) -> Batch:
        """The windows that predict the bytes from each of ``starts`` (B,) on, each cut into
        ``pieces`` rows of equal length."""
        length = self.max_len // pieces
        starts = (starts[:, None] + np.arange(pieces) * length).ravel()
        ring = self.stream[(starts[:, None] + np.arange(-length, length)) % len(self.stream)]
        y_in, y_out = as_inputs(ring[:, length - 1 : -1]), as_targets(ring[:, length:])
        own = self.planner_view == "same"
        read = as_inputs(ring[:, length:] if own else ring[:, :length])
        prompt_ids = np.concatenate((np.full((len(starts), 1), BOS), read), axis=1)
        earlier = np.arange(-1 - self.recent_len, -1)
        before = self.stream[(starts[:, None] + earlier) % len(self.stream)]
        prompts, inputs, targets, past = map(
            torch.from_numpy, (prompt_ids, y_in, y_out, as_inputs(before))
        )
        return Batch(prompts, inputs, targets, past=past)

    def damaged(
        self, starts: np.ndarray, pieces: int, random: np.random.Generator, shard: Shard = ALL
    ) -> Batch:
        """Damaged lines and what they were, as pairs, from the windows from each of ``starts`` on.

        Each of a window's ``pieces`` is halved some times at random, and each of the parts cut
        short; a line of it, or what is there of the line, is a pair.
        """
        halved = pieces * 2 ** int(random.integers(HALVINGS + 1))
        pieces = max(1, min(halved, self.max_len // SHORTEST))
        length = self.max_len // pieces
        lines: list[str] = []
        for start in (starts[:, None] + np.arange(pieces) * length).ravel():
            size = int(random.integers(length // 2, length + 1))
            part = bytes(self.stream[(start + np.arange(size)) % len(self.stream)])
            lines += filter(None, part.decode(errors="ignore").split("\n"))
        pairs = [
            Pair(cut(damage(line, random).encode(), self.max_len), line.encode()) for line in lines
        ]
        data = TSVDataset(pairs or [Pair(b"", b"")], self.max_len)
        # All of them, but for a few long lines among many short ones: that would mostly be PAD.
        groups = data.groups(3 * len(starts), random.permutation(len(data)))
        return data.share(groups[random.integers(len(groups))], shard)

    def batches(
        self,
        size: Callable[[], tuple[int, int]],
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = ALL,
    ) -> Iterator[tuple[int, Batch]]:
        """All windows from a fresh offset, shuffled; the same for the same seed and epoch.

        Args:
            size: asked before each batch for its number of windows and the pieces of each.
            skip: windows to leave out.
            shard: the part of each batch that is wanted.

        Yields:
            How many windows are behind, and the batch.
        """
        random = np.random.default_rng((seed, epoch))
        starts = random.integers(len(self.stream)) + np.arange(len(self)) * self.max_len
        random.shuffle(starts)
        while skip < len(starts):
            n, pieces = size()
            draw = np.random.default_rng((seed, epoch, 1 + skip))
            chosen = starts[skip : skip + n]
            skip = min(skip + n, len(starts))
            if draw.random() < self.denoise:
                yield skip, self.damaged(chosen, pieces, draw, shard)
            elif len(mine := chosen[shard.rank :: shard.of]):
                yield skip, self.windows(mine, pieces)
            else:
                yield skip, self.windows(chosen[:1], pieces).idle()


def dataset_lm(
    paths: PathLike | Sequence[PathLike],
    max_len: int = 512,
    *,
    planner_view: str = "same",
    encoding: str = "utf-8",
    token_file: PathLike | None = None,
) -> LMDataset:
    """Text files as sequences of ``max_len`` tokens for pretraining.

    Args:
        paths: files or folders; ``.gz`` is unpacked.
        planner_view: what the Planner reads, the ``same`` window or the ``previous`` one.
        token_file: see `load_stream`.

    Raises:
        HRMError: a file that cannot be read, or no text in any.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    return LMDataset(load_stream(paths, encoding, token_file), max_len, planner_view)


class Pair(NamedTuple):
    """A prompt and what to answer, as UTF-8; ``lm`` marks a row without a target: pure LM."""

    prompt: bytes
    target: bytes
    lm: bool = False


def cut(data: bytes, length: int) -> bytes:
    """At most ``length`` bytes, never half a character."""
    return data if len(data) <= length else data[:length].decode(errors="ignore").encode()


def encode_prompt(prompt: str, max_len: int) -> bytes:
    """A prompt to be answered as the Planner reads it: NFC, line breaks as spaces, cut to fit."""
    return cut(to_bytes(re.sub("[\r\n]+", " ", prompt)), max_len)


def prompt_tokens(prompt: bytes) -> list[int]:
    """A prompt to be answered, as the Planner reads it. Its end is a token: without it, what is not
    there any more would have to be noticed, and ``73`` is easily read as ``733``."""
    return [BOS, *prompt, EOS]


class TSVDataset(Sequence[Pair]):
    """Prompt and target pairs, for finetuning."""

    def __init__(self, pairs: Sequence[Pair], max_len: int) -> None:
        self.pairs, self.max_len = pairs, max_len

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        return self.pairs[index]

    def collate(self, pairs: Sequence[Pair]) -> Batch:
        """Pairs as a batch. Of a row without a target the Planner reads BOS alone."""
        prompts = [[BOS] if p.lm else prompt_tokens(p.prompt) for p in pairs]
        targets = [[BOS, *p.target, EOS][: self.max_len + 1] for p in pairs]
        return Batch(
            pad(prompts),
            pad([t[:-1] for t in targets]),
            pad([t[1:] for t in targets]),
            torch.tensor([not p.lm for p in pairs]),
            past=pad_left([b"" if p.lm else p.prompt for p in pairs]),
        )

    def share(self, pairs: Sequence[Pair], shard: Shard) -> Batch:
        """The shard's pairs as a batch; if there are none, one with nothing to predict."""
        if mine := pairs[shard.rank :: shard.of]:
            return self.collate(mine)
        return self.collate(pairs[:1]).idle()

    def groups(self, batch_size: int, order: np.ndarray) -> list[list[Pair]]:
        """The pairs in batches of at most ``batch_size * max_len`` tokens, PAD included.

        Within pools of some thousand pairs taken in ``order``, pairs of like length go together.
        """
        budget, batches = batch_size * self.max_len, []
        for begin in range(0, len(order), 4096):
            pool = [self.pairs[i] for i in order[begin : begin + 4096]]
            pool.sort(key=lambda p: (len(p.prompt) + len(p.target), len(p.target)))
            group: list[Pair] = []
            widest_prompt = widest_target = 0
            for pair in pool:
                prompt = max(widest_prompt, len(pair.prompt) + 2)
                target = max(widest_target, len(pair.target) + 1)
                if group and (len(group) + 1) * (prompt + target) > budget:
                    batches.append(group)
                    group, prompt, target = [], len(pair.prompt) + 2, len(pair.target) + 1
                group.append(pair)
                widest_prompt, widest_target = prompt, target
            batches.append(group)
        return batches

    def batches(
        self,
        size: Callable[[], tuple[int, int]],
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = ALL,
    ) -> Iterator[tuple[int, Batch]]:
        """All pairs once, shuffled; the same for the same seed and epoch.

        Args:
            size: asked once for the tokens of a batch, in units of ``max_len``.
            skip: pairs to leave out.
            shard: the part of each batch that is wanted.

        Yields:
            How many pairs are behind, and the batch.
        """
        random = np.random.default_rng((seed, epoch))
        groups = self.groups(size()[0], random.permutation(len(self.pairs)))
        behind = 0
        for i in random.permutation(len(groups)):
            behind += len(groups[i])
            if behind > skip:
                yield behind, self.share(groups[i], shard)


def pad(rows: list[list[int]]) -> Tensor:
    """Rows of ids as one tensor (B, T), PAD on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def pad_left(rows: Sequence[bytes]) -> Tensor:
    """What was read before a window as ids (B, R), PAD on the left."""
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows]).long()


def dataset_tsv(path: PathLike, max_len: int = 512, *, encoding: str = "utf-8") -> TSVDataset:
    """Reads ``prompt TAB target`` rows; further tabs belong to the target, blank lines are skipped.

    A row without a target has its prompt as target (pure LM). A pair longer than ``max_len`` is
    cut, and a warning counts them.

    Raises:
        HRMError: the file is missing, a folder, no text, or without a single row.
    """
    stats = TextStats()
    pairs, n_cut = [], 0
    for line in load_corpus_lines(path, encoding, stats):
        data = to_bytes(line)
        prompt, _, target = data.partition(b"\t")
        lm = not target.strip()
        if lm:
            target = prompt
        pair = Pair(cut(prompt, max_len), cut(target, max_len), lm)
        n_cut += len(prompt) > max_len or len(target) > max_len
        pairs.append(pair)
    stats.warn(path, encoding)
    if not pairs:
        raise HRMError(f"no rows in {path}: give one 'prompt TAB target' a line")
    if n_cut:
        say(
            f"warning: {path}: {n_cut:,} of {len(pairs):,} pairs are longer than max_len "
            f"({max_len} bytes) and were cut"
        )
    return TSVDataset(pairs, max_len)


def split_pairs(
    data: TSVDataset, fraction: float | None, seed: int
) -> tuple[TSVDataset, TSVDataset]:
    """Two datasets in random order: most rows, and about ``fraction`` of the different ones held
    out, none of which is among the others.

    ``None`` is 5%, and of few rows more, for a choice needs some: 50, or a fifth.
    """
    pairs = [data[i] for i in np.random.default_rng(seed).permutation(len(data))]
    different = list(dict.fromkeys(pairs))
    n = round(len(different) * (HELD_OUT if fraction is None else fraction))
    if fraction is None:
        n = max(n, min(FEWEST, len(different) // 5))
    held_out = set(different[:n])
    rest = [pair for pair in pairs if pair not in held_out]
    return TSVDataset(rest, data.max_len), TSVDataset(different[:n], data.max_len)
