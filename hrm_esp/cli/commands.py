"""What each command does. Results go to stdout, everything else to stderr.

Modules that import torch are imported inside the functions, so that mistakes in flags are reported
at once.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import (
    DEFAULT_DIR,
    MAX_COUNT,
    MAX_WIDTH,
    SIZES,
    FinetuneConfig,
    GenerationConfig,
    HRMConfig,
    PretrainConfig,
)
from ..errors import HRMError
from ..json_lines import to_json
from ..launch import launched_rank
from ..options import check_bounds
from ..streams import STDERR, flush_stdout, require_stdout
from .parser import from_args, options

if TYPE_CHECKING:
    import torch

    from ..data import Table
    from ..generation import Completion
    from ..model import HRMModel
    from ..training import TrainResult

SAMPLES = Path(__file__).parent.parent / "samples"
STORIES, NUMBERS = SAMPLES / "cuentos.txt", SAMPLES / "numeros.tsv"


def pretrain(args: argparse.Namespace) -> None:
    config = from_args(HRMConfig, args, **SIZES[args.size])
    train_options = from_args(PretrainConfig, args)

    from ..training import train_lm

    device = choose_device(args)
    result = train_lm(args.corpus or [STORIES], config, train_options, val=args.val, device=device)
    print_result(result)


def finetune(args: argparse.Namespace) -> None:
    train_options = from_args(FinetuneConfig, args)
    if args.from_scratch and args.ckpt:
        raise HRMError("give --ckpt or --from_scratch, not both")
    if args.from_scratch and train_options.reinit_blocks != "auto":
        raise HRMError("--reinit_blocks needs a checkpoint: leave out --from_scratch")
    if not args.from_scratch:
        if args.size:
            raise HRMError("--size is for a new model: give --from_scratch, too")
        of_new_model = options(HRMConfig).keys() - options(FinetuneConfig).keys()
        if given := sorted(of_new_model & vars(args).keys()):
            raise HRMError(f"--set {given[0]} is for a new model: give --from_scratch, too")

    from ..training import find_checkpoint, train_ft

    device = choose_device(args)
    start = args.ckpt
    if args.from_scratch:
        start = from_args(HRMConfig, args, **SIZES[args.size or "small"])
    elif start is None:
        start = find_checkpoint(DEFAULT_DIR, ("pretrain",))
    print_result(train_ft(args.table or NUMBERS, start, train_options, val=args.val, device=device))


def choose_device(args: argparse.Namespace) -> torch.device:
    """Returns the device of --device and --cpu, and sets the number of CPU threads."""
    from .. import device

    device.limit_to_usable_cpus()
    return device.choose_device(args.device, args.cpu)


def print_result(result: TrainResult) -> None:
    """Prints the score and the best checkpoint, in the first process. The run is over: it is no
    error if they cannot be printed."""
    if launched_rank():
        return
    with suppress(OSError):
        print(
            f"{result.bytes_seen:,} bytes seen in {result.steps:,} steps, {result.seconds:,.0f} s"
        )
        if result.score is not None:
            print(f"held out: {result.score}")
        print(result.best)
    flush_stdout()


def load_model(args: argparse.Namespace) -> HRMModel:
    gc.disable()  # imports create no garbage, and looking for it takes 0.1 s
    try:
        from .. import training
        from ..device import start_adapting_threads

        model = training.load_model(args.ckpt, choose_device(args))
        start_adapting_threads()
        gc.freeze()
    finally:
        gc.enable()
    return model


def generate(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.prompts is not None:
        raise HRMError("give --prompt or --prompts, not both")
    check_bounds("num_samples", args.num_samples, low=1, high=MAX_COUNT)
    check_bounds("batch_size", args.batch_size, low=1, high=MAX_WIDTH)
    if args.out is None:
        require_stdout()
    else:
        check_out(args)
    prompt = clean_argument(args.prompt or "")
    if "stop" in args:
        args.stop = [clean_argument(s) for s in args.stop]
    config = from_args(GenerationConfig, args)
    model = load_model(args)

    from ..generation import generate_batch, stream

    mode = config.mode_for(model.stage)
    table = None
    prompts: Iterable[str] = [prompt]
    if args.prompts is not None:
        table = read_prompt_table(args)
        prompts = read_prompts(args.prompts, args.encoding) if table is None else table.prompts()
        prompts = prompts if args.keep_blank else without_blanks(prompts)
    if mode == "answer":
        prompts = warn_if_cut(prompts, model.config.max_len)
    if args.prompts is None and args.num_samples == 1 and not args.json and args.out is None:
        (prompt,) = prompts
        characters = stream(model, prompt, config)
        if mode == "continue":
            print(prompt, end="")
        try:
            for character in characters:
                print(character, end="", flush=True)
        finally:
            print()
        return
    completions = generate_batch(
        model, prompts, config, num_samples=args.num_samples, batch_size=args.batch_size
    )
    if args.out is not None:
        write_completions(completions, table, args)
        return
    for completion in completions:
        text = completion.prompt * (mode == "continue") + completion.text
        if args.json:
            print(to_json(completion.as_dict()), flush=True)
        elif model.config.line_breaks:
            print(f"{text}\n", flush=True)  # a blank line between two texts
        else:
            print(" ".join(text.splitlines()), flush=True)  # one text per line


def read_prompt_table(args: argparse.Namespace) -> Table | None:
    """Reads the table of --prompts, if its name is that of one."""
    from ..data import is_table, read_table

    if not is_table(args.prompts):
        if args.prompt_col is not None:
            raise HRMError("--prompt_col needs a table: give --prompts FILE.csv, .tsv or .jsonl")
        return None
    table = read_table(args.prompts, args.encoding, args.prompt_col, prompts_only=True)
    print(table.describe(), file=STDERR)
    return table


def write_completions(
    completions: Iterable[Completion], table: Table | None, args: argparse.Namespace
) -> None:
    """Writes the rows of the table of --prompts, or the prompts, with a column of the texts. A row
    whose prompt was skipped has an empty text."""
    from ..data import write_table
    from ..data.table import unique

    def rows() -> Iterator[list[Any]]:
        if table is None:
            yield from ([completion.prompt, completion.text] for completion in completions)
            return
        found = iter(completions)
        for cells, prompt in zip(table.cells, table.prompts(), strict=True):
            cells = [*cells, *[None] * (width - len(cells))]
            if args.keep_blank or not is_blank(prompt):
                for completion in itertools.islice(found, args.num_samples):
                    yield [*cells, completion.text]
            else:
                yield [*cells, ""]
        deque(found, maxlen=0)  # it says at its end what was skipped

    names = ["prompt"] if table is None else table.names
    width = max(len(names), 1 if table is None else max(map(len, table.cells)))
    made_up = [f"column {i + 1}" for i in range(len(names), width)]
    separator = "," if table is None or table.separator not in (";", ",") else table.separator
    columns = unique([*names, *made_up, "answer"])
    n = write_table(args.out, columns, rows(), separator, header=len(names) > 0)
    print(f"{n:,} texts in {args.out}")


def check_out(args: argparse.Namespace) -> None:
    """Raises HRMError if the table of -o cannot be written."""
    from ..data import check_table_name

    if args.json:
        raise HRMError("give --json or -o, not both")
    check_table_name(args.out)
    exist = args.prompts and Path(args.prompts).exists() and Path(args.out).exists()
    if exist and Path(args.out).samefile(args.prompts):
        raise HRMError(f"-o would overwrite {args.prompts}: give another file")


def clean_argument(argument: str) -> str:
    """Returns a text from the command line without bytes that are not UTF-8, its line breaks as
    LF."""
    text = os.fsencode(argument).decode(errors="ignore")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_prompts(path: str, encoding: str) -> Iterator[str]:
    """Yields the lines of a file, or of standard input as they come; blank ones too."""
    from ..data.text import TextStats, guess_and_read, read_lines

    def read(encoding: str, stats: TextStats) -> Iterator[str]:
        for line in read_lines(path, encoding, stats):
            stats.add(line)
            yield line

    stats = TextStats()
    if Path(path).is_file():  # it can be read twice
        _, stats = guess_and_read(encoding, lambda *args: deque(read(*args), maxlen=0))
        stats.report_guess(path)
        stats.report(path)
        yield from read_lines(path, stats.encoding, TextStats())
    else:
        yield from read(encoding, stats)
        stats.report(path)


def warn_if_cut(prompts: Iterable[str], max_len: int) -> Iterator[str]:
    """Yields the prompts. Warns at the first one that the model does not read to its end, and says
    at the end how many there were."""
    from ..data import to_bytes

    n_long = 0
    for prompt in prompts:
        if len(to_bytes(prompt)) > max_len:
            n_long += 1
            if n_long == 1:
                line = f"warning: only the first {max_len} bytes of a prompt are read"
                print(line, file=STDERR)
        yield prompt
    if n_long > 1:
        print(f"warning: {n_long:,} prompts are longer and were cut", file=STDERR)


def is_blank(prompt: str) -> bool:
    return not prompt.strip()


def without_blanks(prompts: Iterable[str]) -> Iterator[str]:
    """Yields the prompts that are not blank. Says at the end how many were."""
    n_blank = 0
    for prompt in prompts:
        if is_blank(prompt):
            n_blank += 1
        else:
            yield prompt
    if n_blank:
        print(f"skipped {n_blank:,} blank prompts (--keep_blank keeps them)", file=STDERR)


def evaluate(args: argparse.Namespace) -> None:
    require_stdout()
    check_bounds("batch_size", args.batch_size, low=1, high=MAX_WIDTH)
    from ..data import is_table

    of_table, of_text = ("prompt_col", "target_col", "lm"), ("sep", "keep_licence")
    for name in of_text if is_table(args.file) else of_table:
        if getattr(args, name):
            kind = "a text" if is_table(args.file) else "a table"
            raise HRMError(f"--{name} is for {kind}: leave it out")
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


def restore(args: argparse.Namespace) -> None:
    require_stdout()
    check_bounds("min_p", args.min_p, low=0, high=1)
    if args.diff and args.json:
        raise HRMError("give --diff or --json, not both")

    from ..restoration import Restorer, TextBlocks
    from ..training import find_checkpoint

    blocks = TextBlocks(args.file, args.encoding)
    if args.ckpt is None:
        args.ckpt = find_checkpoint(DEFAULT_DIR, ("pretrain",))
    restorer = Restorer(load_model(args))
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
                letters[begin:end] = form
            line, counted = line + text.count("\n", counted, begin), begin
            if args.json:
                found = {"line": line, "word": word, "form": form, "p": prob, "changed": is_sure}
                print(to_json(found), flush=True)
            elif args.diff and is_sure:
                print(f"{line}: {word} -> {form} {prob:.2f}", flush=True)
        line += text.count("\n", counted)
        if not (args.diff or args.json):
            sys.stdout.buffer.write(blocks.encode("".join(letters)))
            sys.stdout.buffer.flush()
    unsure = f", {n_unsure:,} left as unsure" if args.min_p else ""
    print(f"{n_words:,} words, {n_changed:,} changed{unsure}", file=STDERR)


def pairs(args: argparse.Namespace) -> None:
    check_bounds("max_bytes", args.max_bytes, low=1, high=MAX_COUNT)

    from ..data import accent_pairs
    from ..files import atomic_write

    rows = accent_pairs(args.text, args.max_bytes, args.encoding)
    lines = (f"{prompt}\t{target}\n" for prompt, target in rows)
    if args.out is None:
        require_stdout()
        sys.stdout.writelines(lines)
        return
    out = Path(args.out).resolve()
    if not out.parent.is_dir() or (out.exists() and not out.is_file()):
        raise HRMError(f"cannot write {args.out}: give a file in a folder that exists")
    if out.exists() and Path(args.text).exists() and out.samefile(args.text):
        raise HRMError(f"-o would overwrite {args.text}: give another file")
    n = 0
    with atomic_write(out) as file:
        for line in lines:
            file.write(line.encode())
            n += 1
        if not n:
            raise HRMError(f"no sentence of at most {args.max_bytes} bytes in {args.text}")
    print(f"{n:,} pairs in {args.out}")


def plans(args: argparse.Namespace) -> None:
    require_stdout()
    model = load_model(args)

    from ..analysis.plans import as_dicts, compute_plans, draw_map, read_texts, report

    texts = read_texts(map(clean_argument, args.texts), args.encoding, model.config.sep)
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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "restore": restore,
    "pairs": pairs,
    "plans": plans,
    "plot": plot,
}
