"""What each command does. Results go to stdout, everything else to stderr.

Modules that import torch are imported inside the functions, so that mistakes in flags are reported
at once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

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
from ..continue_config import ContinueConfig
from ..errors import HRMError
from ..json_lines import to_json
from ..launch import launched_rank
from ..options import check_bounds
from ..streams import STDERR, flush_stdout, require_stdout
from .common import choose_device, clean_argument, load_model
from .parser import from_args, options
from .text_commands import evaluate, info, pairs, plans, plot, restore

if TYPE_CHECKING:
    from ..data import ByteStream, PairColumns, Table
    from ..generation import Completion
    from ..training import TrainResult

SAMPLES = Path(__file__).parent.parent / "samples"
STORIES, NUMBERS = SAMPLES / "cuentos.txt", SAMPLES / "numeros.tsv"


def pretrain(args: argparse.Namespace) -> None:
    config, train_options = pretrain_options(args)

    from ..training import train_lm

    device = choose_device(args)
    result = train_lm(args.corpus or [STORIES], config, train_options, val=args.val, device=device)
    print_result(result)


def pretrain_options(args: argparse.Namespace) -> tuple[HRMConfig | None, PretrainConfig]:
    """Returns the config of the new model, ``None`` with --ckpt, and the options of the run."""
    if "ckpt" not in args:
        of_ckpt = options(ContinueConfig).keys() - options(PretrainConfig).keys()
        if given := sorted(of_ckpt & vars(args).keys()):
            raise HRMError(f"--set {given[0]} is for training a checkpoint further: give --ckpt")
        config = from_args(HRMConfig, args, **SIZES[args.size or "small"])
        return config, from_args(PretrainConfig, args)
    given = sorted(options(HRMConfig).keys() & vars(args).keys())
    if args.size:
        given = ["size"]
    if given:
        raise HRMError(
            f"{given[0]} is for a new model, and --ckpt is trained as it is: leave out {given[0]}, "
            "or --ckpt"
        )
    return None, from_args(ContinueConfig, args)


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


def print_result(result: TrainResult) -> None:
    """Prints the score and the best checkpoint, in the first process. The run is over: it is no
    error if they cannot be printed."""
    if launched_rank():
        return

    from ..training import ContinueResult

    with suppress(OSError):
        print(
            f"{result.bytes_seen:,} bytes seen in {result.steps:,} steps, {result.seconds:,.0f} s"
        )
        if result.score is not None:
            print(f"held out: {result.score}")
        if isinstance(result, ContinueResult):
            for name, change in (("new", result.new), ("old", result.old)):
                if change is not None:
                    print(f"{name} text: {change} (bits per byte)")
        print(result.best)
    flush_stdout()


def generate(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.prompts is not None:
        raise HRMError("give --prompt or --prompts, not both")
    if args.prompt is None and args.prompts is None and is_pipe(sys.stdin):
        args.prompts = "-"
    check_bounds("num_samples", args.num_samples, low=1, high=MAX_COUNT)
    if args.batch_size is None:  # what comes through a pipe is answered line by line
        args.batch_size = 32 if args.prompts is None or Path(args.prompts).is_file() else 1
    check_bounds("batch_size", args.batch_size, low=1, high=MAX_WIDTH)
    if args.out is None:
        require_stdout()
    else:
        check_out(args)
    is_single = args.prompts is None and args.num_samples == 1 and not args.json
    is_single = is_single and args.out is None
    corpus = open_training_text(args) if args.copied else None
    prompt = clean_argument(args.prompt or "")
    if "stop" in args:
        args.stop = [clean_argument(s) for s in args.stop]
    config = from_args(GenerationConfig, args)
    # A token is many small operations, which a GPU takes longer to start than a CPU to compute.
    model = load_model(args, "cpu")
    if is_single and args.prompt is None and is_terminal():
        from .conversation import converse

        converse(model, config)
        return

    from ..generation import generate_batch, stream

    mode = config.mode_for(model.stage)
    table = None
    prompts: Iterable[str] = [prompt]
    if args.prompts is not None:
        table = read_prompt_table(args, model.columns)
        prompts = read_prompts(args.prompts, args.encoding) if table is None else table.prompts()
        prompts = prompts if args.keep_blank else without_blanks(prompts)
    if mode == "answer":
        prompts = warn_if_cut(prompts, model.config.max_len)
    if is_single:
        (prompt,) = prompts
        characters = stream(model, prompt, config)
        if mode == "continue":
            print(prompt, end="")
        text = ""
        try:
            for character in characters:
                print(character, end="", flush=True)
                text += character
        finally:
            print()
        report_copied([text], corpus)
        return
    texts: list[str] = []
    completions = generate_batch(
        model, prompts, config, num_samples=args.num_samples, batch_size=args.batch_size
    )
    if corpus is not None:
        completions = keep_texts(completions, texts)
    write_texts(completions, table, mode, model.config.line_breaks, args)
    report_copied(texts, corpus)


def write_texts(
    completions: Iterable[Completion],
    table: Table | None,
    mode: str,
    line_breaks: bool,
    args: argparse.Namespace,
) -> None:
    """Writes texts to the table of -o, or prints them as they come."""
    if args.out is not None:
        write_completions(completions, table, args)
        return
    for completion in completions:
        text = completion.prompt * (mode == "continue") + completion.text
        if args.json:
            print(to_json(completion.as_dict()), flush=True)
        elif line_breaks:
            print(f"{text}\n", flush=True)  # a blank line between two texts
        else:
            print(" ".join(text.splitlines()), flush=True)  # one text per line


def open_training_text(args: argparse.Namespace) -> ByteStream:
    """Opens the training text of the checkpoint, for --copied."""
    from ..analysis.copied import training_text
    from ..training import checkpoint_path, find_checkpoint

    return training_text(find_checkpoint() if args.ckpt is None else checkpoint_path(args.ckpt))


def keep_texts(completions: Iterable[Completion], texts: list[str]) -> Iterator[Completion]:
    """Yields completions and appends their texts to a list."""
    for completion in completions:
        texts.append(completion.text)
        yield completion


def report_copied(texts: list[str], corpus: ByteStream | None) -> None:
    """Says on stderr how much of the texts stands in the training text."""
    if corpus is not None:
        from ..analysis.copied import find_copied

        print(find_copied(texts, corpus), file=STDERR)


def is_pipe(file: TextIO | None) -> bool:
    """Whether a standard stream is a pipe or a file."""
    try:
        mode = os.fstat(file.fileno()).st_mode if file is not None else 0
    except (OSError, ValueError):  # a replaced stream
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def is_terminal() -> bool:
    """Whether someone sits at the keyboard and reads what is printed."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def read_prompt_table(args: argparse.Namespace, trained: PairColumns | None) -> Table | None:
    """Reads the table of --prompts, if its name is that of one.

    Args:
        trained: see `read_table`.
    """
    from ..data import is_table, read_table

    if not is_table(args.prompts):
        if args.prompt_col is not None:
            raise HRMError("--prompt_col needs a table: give --prompts FILE.csv, .tsv or .jsonl")
        return None
    table = read_table(
        args.prompts, args.encoding, args.prompt_col, prompts_only=True, trained=trained
    )
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
    from ..files import check_output

    if args.json:
        raise HRMError("give --json or -o, not both")
    check_table_name(args.out)
    check_output("-o", args.out, args.prompts, is_replaced=False)


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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "restore": restore,
    "pairs": pairs,
    "info": info,
    "plans": plans,
    "plot": plot,
}
