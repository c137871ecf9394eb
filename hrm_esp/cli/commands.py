"""What each command does. Results go to stdout, everything else to stderr.

Modules that import torch are imported inside the functions, so that mistakes in flags are reported
at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import (
    DEFAULT_DIR,
    SIZES,
    FinetuneConfig,
    GenerationConfig,
    HRMConfig,
    PretrainConfig,
)
from ..errors import HRMError
from .parser import from_args, options
from .rank import RANK

if TYPE_CHECKING:
    from ..model import HRMModel
    from ..training import TrainResult

SAMPLES = Path(__file__).parent.parent / "samples"
STORIES, NUMBERS = SAMPLES / "cuentos.txt", SAMPLES / "numeros.tsv"


def pretrain(args: argparse.Namespace) -> None:
    config = from_args(HRMConfig, args, **SIZES[args.size])
    train_options = from_args(PretrainConfig, args)

    from ..device import choose_device
    from ..training import train_lm

    device = choose_device(args.device, args.cpu)
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

    from ..device import choose_device
    from ..training import find_checkpoint, train_ft

    device = choose_device(args.device, args.cpu)
    start = args.ckpt
    if args.from_scratch:
        start = from_args(HRMConfig, args, **SIZES[args.size or "small"])
    elif start is None:
        start = find_checkpoint(DEFAULT_DIR, ("pretrain",))
    print_result(train_ft(args.tsv or NUMBERS, start, train_options, val=args.val, device=device))


def print_result(result: TrainResult) -> None:
    """Prints the score and the best checkpoint, in the first process."""
    if RANK:
        return
    print(f"{result.bytes_seen:,} bytes seen in {result.steps:,} steps, {result.seconds:,.0f} s")
    if result.score is not None:
        print(f"held out: {result.score}")
    print(result.best)


def load_model(args: argparse.Namespace) -> HRMModel:
    gc.disable()  # imports create no garbage, and looking for it takes 0.1 s
    try:
        from .. import training
        from ..device import choose_device

        model = training.load_model(args.ckpt, choose_device(args.device, args.cpu))
        gc.freeze()
    finally:
        gc.enable()
    return model


def generate(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.prompts is not None:
        raise HRMError("give --prompt or --prompts, not both")
    if args.num_samples < 1 or args.batch_size < 1:
        raise HRMError("num_samples and batch_size must be at least 1")
    prompt = drop_stray_bytes(args.prompt or "")
    if "stop" in args:
        args.stop = [drop_stray_bytes(s) for s in args.stop]
    config = from_args(GenerationConfig, args)
    model = load_model(args)

    from ..generation import generate_batch, stream

    mode = config.mode_for(model.stage)
    prompts = [prompt] if args.prompts is None else read_prompts(args.prompts, args.encoding)
    if mode == "answer":
        prompts = warn_if_cut(prompts, model.config.max_len)
    use_utf8_stdout()
    if args.prompts is None and args.num_samples == 1 and not args.json:
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
    for completion in completions:
        if args.json:
            line = json.dumps(completion.as_dict(), ensure_ascii=False)
        else:
            text = completion.prompt * (mode == "continue") + completion.text
            line = " ".join(text.splitlines())  # one text per line
        print(line, flush=True)


def drop_stray_bytes(argument: str) -> str:
    """Removes bytes that are not UTF-8 from an argument."""
    return os.fsencode(argument).decode(errors="ignore")


def use_utf8_stdout() -> None:
    """Sets the encoding of standard output to UTF-8.

    Raises:
        HRMError: standard output is closed.
    """
    if sys.stdout is None:
        raise HRMError("standard output is closed")
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]


def read_prompts(path: str, encoding: str) -> Iterator[str]:
    """Yields the lines of a file, or of standard input, as they come; blank ones too."""
    from ..data.text import TextStats, read_lines

    stats = TextStats()
    yield from read_lines(path, encoding, stats)
    if stats.undecodable:
        print(
            f"warning: skipped {stats.undecodable:,} bytes that are not {encoding}: check "
            "--encoding",
            file=sys.stderr,
        )


def warn_if_cut(prompts: Iterable[str], max_len: int) -> Iterator[str]:
    """Yields the prompts, with a warning for each that the model does not read to its end."""
    from ..data import to_bytes

    for prompt in prompts:
        if len(to_bytes(prompt)) > max_len:
            print(
                f"warning: only the first {max_len} bytes of the prompt are read", file=sys.stderr
            )
        yield prompt


def evaluate(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise HRMError(f"batch_size must be at least 1, not {args.batch_size}")
    model = load_model(args)

    from .. import evaluation

    score = evaluation.evaluate(
        model,
        args.file,
        encoding=args.encoding,
        sep=args.sep,
        precision=args.precision,
        batch_size=args.batch_size,
        show_progress=True,
        predictions=args.predictions,
    )
    print(json.dumps(asdict(score)) if args.json else score)


def pairs(args: argparse.Namespace) -> None:
    if args.max_bytes < 1:
        raise HRMError(f"max_bytes must be at least 1, not {args.max_bytes}")

    from ..data import accent_pairs
    from ..files import atomic_write

    rows = accent_pairs(args.text, args.max_bytes, args.encoding)
    lines = (f"{prompt}\t{target}\n" for prompt, target in rows)
    if args.out is None:
        use_utf8_stdout()
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
    model = load_model(args)

    from ..analysis.plans import compute_plans, draw_map, read_texts, report

    found = compute_plans(model, list(read_texts(args.texts)))
    use_utf8_stdout()
    for line in report(found):
        print(line)
    if args.out is not None:
        draw_map(found, args.out)
        print(f"\n{args.out}")


def plot(args: argparse.Namespace) -> None:
    from ..analysis import plot as analysis_plot

    analysis_plot.plot(args.folders, args.out)
    print(args.out)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pretrain": pretrain,
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "pairs": pairs,
    "plans": plans,
    "plot": plot,
}
