"""The commands evaluate, restore, pairs, info, plans and plot.

Modules that import torch are imported inside the functions, as in commands.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..config import DEFAULT_DIR, MAX_COUNT, MAX_WIDTH
from ..errors import HRMError
from ..json_lines import to_json
from ..options import check_bounds
from ..streams import STDERR, require_stdout
from .common import clean_argument, load_model

if TYPE_CHECKING:
    from ..evaluation import Surprisal
    from ..model import HRMModel


def evaluate(args: argparse.Namespace) -> None:
    require_stdout()
    check_bounds("batch_size", args.batch_size, low=1, high=MAX_WIDTH)
    from ..data import is_table

    of_table, of_text = ("prompt_col", "target_col", "lm"), ("sep", "keep_licence")
    for name in of_text if is_table(args.file) else of_table:
        if getattr(args, name):
            kind = "a text" if is_table(args.file) else "a table"
            raise HRMError(f"--{name} is for {kind}: leave it out")
    if args.by is not None or args.html is not None:
        show_surprisal(args)
        return
    model = load_model(args)

    from .. import evaluation

    score = evaluation.evaluate(
        model,
        args.file,
        encoding=args.encoding,
        sep=args.sep,
        keep_licence=args.keep_licence,
        prompt_col=args.prompt_col,
        target_col=args.target_col,
        lm=args.lm,
        precision=args.precision,
        batch_size=args.batch_size,
        show_progress=True,
        predictions=args.predictions,
    )
    print(to_json(asdict(score)) if args.json else score)


def show_surprisal(args: argparse.Namespace) -> None:
    """Prints the surprisal of each part of a file, and writes the page of --html. The score of the
    whole goes to stderr."""
    if args.predictions is not None:
        raise HRMError("give --predictions or --by, not both")
    if args.html is not None and args.by not in (None, "word"):
        raise HRMError("--html shows words: leave out --by")
    if args.html is not None and args.json:
        raise HRMError("give --html or --json, not both")
    from ..files import atomic_write, check_output

    if args.html is not None:
        check_output("--html", args.html, args.file)
    model = load_model(args)

    from ..analysis.surprisal import page, terminal_lines
    from ..data import is_table
    from ..evaluation import TextScore

    found, shown = list(surprisals(model, args)), columns(args.by or "word")
    n_bytes = sum(part.n_bytes for part in found)
    score = TextScore(sum(part.bits for part in found) / max(1, n_bytes), n_bytes)
    if args.html is not None:
        file_name = Path(args.file).name.encode(errors="replace").decode()
        is_wrapped = not is_table(args.file) and (args.sep or model.config.sep) == "blank"
        with atomic_write(Path(args.html).resolve()) as file:
            for text in page(found, file_name, score, is_wrapped):
                file.write(text.encode())
        print(args.html)
    elif args.json:
        for part in found:
            print(to_json({name: getattr(part, field) for name, field in shown}))
    elif args.by == "word" and sys.stdout.isatty():
        for line in terminal_lines(found):
            print(line)
    else:
        print("\t".join(name for name, _ in shown))
        for part in found:
            values = (getattr(part, field) for _, field in shown)
            print("\t".join(f"{v:.6f}" if isinstance(v, float) else str(v) for v in values))
    print(score, file=STDERR)


def columns(by: str) -> list[tuple[str, str]]:
    """Returns the names of the columns of --by, and the fields of `Surprisal` that they show."""
    number = [] if by == "line" else [(f"{by}_no", "number")]
    size = [] if by == "byte" else [("bytes", "n_bytes")]
    text = "text" if by == "line" else by
    return [("line", "line"), *number, (text, "text"), ("bits", "bits"), *size]


def surprisals(model: HRMModel, args: argparse.Namespace) -> Iterator[Surprisal]:
    """Yields the surprisal of each part of a file."""
    from ..console import progress_bar
    from ..data import LineNumbers, dataset_tsv, is_table, load_stream
    from ..device import choose_precision
    from ..evaluation import target_surprisals, text_surprisals

    by, dtype = args.by or "word", choose_precision(model.device, args.precision)
    if is_table(args.file):
        data = dataset_tsv(
            args.file, model.config.max_len, encoding=args.encoding,
            prompt_col=args.prompt_col, target_col=args.target_col, lm=args.lm,
            trained=model.columns,
        )  # fmt: skip
        with progress_bar(len(data), "row") as bar:
            yield from target_surprisals(model, data, by, dtype, args.batch_size, bar.update)
        return
    if model.stage == "finetune":
        print(
            "warning: a finetuned model predicts answers, not running text: its bits say little",
            file=STDERR,
        )
    sep = model.config.sep if args.sep is None else args.sep
    lines = LineNumbers()
    stream = load_stream(
        [args.file], args.encoding, sep=sep, keep_licence=args.keep_licence, lines=lines
    )
    with progress_bar(len(stream), "B") as bar:
        yield from text_surprisals(model, stream, lines, by, dtype, args.batch_size, bar.update)


def restore(args: argparse.Namespace) -> None:
    require_stdout()
    check_bounds("min_p", args.min_p, low=0, high=1)
    if (args.diff, args.json, args.out is not None).count(True) > 1:
        raise HRMError("give one of --diff, --json and -o")
    from ..files import atomic_write, check_output

    if args.out is not None:
        check_output("-o", args.out, args.file)

    from ..restoration import Restorer, TextBlocks
    from ..training import find_checkpoint

    blocks = TextBlocks(args.file, args.encoding)
    if args.ckpt is None or Path(args.ckpt).is_dir():
        args.ckpt = find_checkpoint(args.ckpt or DEFAULT_DIR, ("pretrain",))
    restorer = Restorer(load_model(args))
    with ExitStack() as stack:
        file: IO[bytes] = sys.stdout.buffer
        if args.out is not None:
            file = stack.enter_context(atomic_write(Path(args.out).resolve()))
        n_words = n_changed = n_unsure = 0
        line = 1
        for text in blocks:
            letters, counted = list(text), 0
            for begin, end, form, prob in restorer.restore_words(text, args.force):
                n_words += 1
                if form == (word := text[begin:end]):
                    continue
                is_sure = prob >= args.min_p
                n_changed, n_unsure = n_changed + is_sure, n_unsure + (not is_sure)
                if is_sure:
                    letters[begin:end] = form  # as many characters as the word
                line, counted = line + text.count("\n", counted, begin), begin
                if args.json:
                    found = {"line": line, "word": word, "form": form, "p": prob}
                    print(to_json(found | {"changed": is_sure}), flush=True)
                elif args.diff and is_sure:
                    print(f"{line}: {word} -> {form} {prob:.2f}", flush=True)
            line += text.count("\n", counted)
            if not (args.diff or args.json):
                file.write(blocks.encode("".join(letters)))
                file.flush()
    unsure = f", {n_unsure:,} left as unsure" if args.min_p else ""
    print(f"{n_words:,} words, {n_changed:,} changed{unsure}", file=STDERR)


def pairs(args: argparse.Namespace) -> None:
    check_bounds("max_bytes", args.max_bytes, low=1, high=MAX_COUNT)

    from ..data import accent_pairs
    from ..files import atomic_write, check_output

    rows = accent_pairs(args.text, args.max_bytes, args.encoding)
    lines = (f"{prompt}\t{target}\n" for prompt, target in rows)
    if args.out is None:
        require_stdout()
        sys.stdout.writelines(lines)
        return
    check_output("-o", args.out, args.text)
    n = 0
    with atomic_write(Path(args.out).resolve()) as file:
        for line in lines:
            file.write(line.encode())
            n += 1
        if not n:
            raise HRMError(f"no sentence of at most {args.max_bytes} bytes in {args.text}")
    print(f"{n:,} pairs in {args.out}")


def info(args: argparse.Namespace) -> None:
    require_stdout()

    from ..analysis.info import card, describe

    if args.card is not None:
        print(card(args.ckpt, args.card))
        return
    for line in describe(args.ckpt):
        print(line)


def plans(args: argparse.Namespace) -> None:
    require_stdout()
    model = load_model(args)

    from ..analysis.plans import as_dicts, compute_plans, draw_map, read_texts, report

    texts = read_texts(
        map(clean_argument, args.texts), args.encoding, model.config.sep, model.columns
    )
    found = compute_plans(model, list(texts))
    for line in map(to_json, as_dicts(found)) if args.json else report(found):
        print(line)
    if args.out is not None:
        draw_map(found, args.out)
        print(f"\n{args.out}", file=STDERR if args.json else sys.stdout)


def plot(args: argparse.Namespace) -> None:
    from ..analysis import plot as analysis_plot

    analysis_plot.plot(args.folders, args.out)
    print(args.out)
