"""The command ``hrm-esp``. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from . import __version__
from .config import DEFAULT_DIR, SIZES, FinetuneConfig, HRMConfig, PretrainConfig
from .errors import HRMError, PeerLost

if TYPE_CHECKING:
    from .model import HRMModel
    from .trainer import TrainResult

SAMPLES = Path(__file__).parent / "samples"
STORIES, NUMBERS = SAMPLES / "cuentos.txt", SAMPLES / "numeros.tsv"
# Which of the processes that torchrun started this is.
RANK = int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0
GROUPS = ("data", "model", "training", "run")
Config = TypeVar("Config")

DESCRIPTION = "A byte-level language model for Spanish with a Planner and an Executor."
EXAMPLES = {
    None: """\
examples:
  hrm-esp pretrain                        on the bundled stories, 10 minutes
  hrm-esp finetune                        on the bundled numbers in words
  hrm-esp generate --prompt "4827"        cuatro mil ochocientos veintisiete
  hrm-esp COMMAND --help                  every flag of a command
""",
    "pretrain": """\
examples:
  hrm-esp pretrain corpus.txt
  hrm-esp pretrain books/ --val held_out.txt --minutes 60
  hrm-esp pretrain old.txt --encoding latin-1 --size tiny --epochs 3
""",
    "finetune": """\
examples:
  hrm-esp finetune data.tsv
  hrm-esp finetune data.tsv --ckpt checkpoints/pretrain_last.pt --minutes 15
  hrm-esp finetune data.tsv --from_scratch --size tiny
  hrm-esp finetune data.tsv --context plan --no_gumbel
""",
    "generate": """\
examples:
  hrm-esp generate --prompt "En un lugar de la Mancha"
  hrm-esp generate --prompt "La casa" --temperature 0.6 --top_k 40 --seed 1
  hrm-esp generate --ckpt checkpoints/pretrain_best.pt --mode continue --max_new_tokens 200
  hrm-esp generate --prompt "Había una vez" --num_samples 5 --stop "."
  hrm-esp generate --prompts questions.txt --json > answers.jsonl
""",
    "evaluate": """\
examples:
  hrm-esp evaluate book.txt
  hrm-esp evaluate held_out.tsv --ckpt checkpoints/finetune_best.pt --json
""",
    "plans": """\
examples:
  hrm-esp plans corpus.txt
  hrm-esp plans "Había una vez" "El mar está lejos" -o map.png
""",
    "plot": """\
examples:
  hrm-esp plot checkpoints
  hrm-esp plot small base -o comparison.svg
""",
}


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise HRMError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    argv = [underscored(a) for a in (sys.argv[1:] if argv is None else argv)]
    try:
        args = build_parser().parse_args(argv)
    except HRMError as error:  # the same in all processes
        return 2 if RANK else fail(str(error))
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        if RANK == 0:
            print(file=sys.stderr)
            if type(error).__name__ == "Interrupted":
                print(f"saved: go on with {same_command(argv)} --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone, as in `hrm-esp generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PeerLost as error:
        return fail(str(error)) if RANK == 0 else 2
    except HRMError as error:
        return fail(str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if (line := machine_trouble(error)) is None:
            raise
        return fail(line)


def fail(line: str) -> int:
    where = f"process {RANK}: " if RANK else ""
    print(f"hrm-esp: error: {where}" + " ".join(line.split()), file=sys.stderr)
    return 2


def machine_trouble(error: BaseException) -> str | None:
    """What to do where the machine, and not the program, is at its limit; else ``None``."""
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        then = ": free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{what}{error.strerror or error}{then}"
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory: give a smaller --batch_size, --max_len or --size"
    if "C++ compiler" in text:
        return "--compile needs a C++ compiler: install one, or leave the flag out"
    return None


def underscored(word: str) -> str:
    """``--top-k=5`` as ``--top_k=5``: dashes and underscores are alike in a flag's name."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or len(name) == 2 or " " in name:
        return word
    return "--" + name[2:].replace("-", "_") + equals + value


def same_command(argv: Sequence[str]) -> str:
    import shlex

    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command and"
    return shlex.join(["hrm-esp", *(a for a in argv if a not in ("--resume", "--overwrite"))])


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(Parser, None, prog="hrm-esp", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hrm-esp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = new_parser(commands.add_parser, name, name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    pretrain = command("pretrain", run_pretrain, "Train a model on text.")
    pretrain.add_argument(
        "corpus", nargs="*", help="text files or folders, .gz too (default: the bundled stories)"
    )
    groups = {name: pretrain.add_argument_group(name) for name in GROUPS}
    groups["data"].add_argument(
        "--val",
        metavar="FILE",
        help="text to score on, never trained on (default: the end of the corpus)",
    )
    groups["model"].add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="tiny, small or base: 1.4, 7.6 or 51 million weights; presets some of the flags below "
        "(default: small)",
    )
    add_fields(groups, HRMConfig)
    add_fields(groups, PretrainConfig)
    add_device(groups["run"])

    finetune = command("finetune", run_finetune, "Finetune a model on prompts and answers.")
    finetune.add_argument(
        "tsv", nargs="?", help="rows of prompt TAB target (default: the bundled numbers)"
    )
    groups = {name: finetune.add_argument_group(name) for name in GROUPS}
    groups["data"].add_argument(
        "--val",
        metavar="FILE",
        help="TSV to score on, never trained on (default: some of the rows)",
    )
    groups["model"].add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"where to start (default: the pretrain run in {DEFAULT_DIR})",
    )
    groups["model"].add_argument(
        "--from_scratch", action="store_true", help="start with a new model of --size instead"
    )
    groups["model"].add_argument("--size", choices=SIZES, help="of the new model (default: small)")
    add_fields(groups, FinetuneConfig)
    add_device(groups["run"])

    generate = command("generate", run_generate, "Write: continue a prompt, or answer it.")
    groups = {name: generate.add_argument_group(name) for name in ("what", "how", "run")}
    add = groups["what"].add_argument
    add("--prompt", help="what to continue or to answer (default: nothing)")
    add("--prompts", metavar="FILE", help="a prompt on each line; - is standard input")
    add("--encoding", default="utf-8", help="of the file of --prompts (default: utf-8)")
    add("--num_samples", type=int, default=1, metavar="N", help="texts for each (default: 1)")
    add(
        "--json",
        action="store_true",
        help="a line of JSON for each text: prompt, text, logprob, logprobs, finish_reason",
    )
    add_ckpt(groups["what"])
    add = groups["how"].add_argument
    add(
        "--mode",
        choices=("continue", "answer"),
        help="continue: the prompt and what follows it; answer: only the answer "
        "(default: answer after finetuning, else continue)",
    )
    add("--plan_from", metavar="TEXT", help="guided by this text's plan instead of the prompt's")
    add(
        "--plan_code", type=int, metavar="K",
        help="guided by this code of the codebook, from 0 on; see hrm-esp plans",
    )  # fmt: skip
    add(
        "--guidance", type=float, metavar="G",
        help="how far to follow --plan_from or --plan_code, 0 to 20: 1 is as if it were the "
        "prompt's own plan, and twice as fast; from about 10 on text falls apart (default: 3)",
    )  # fmt: skip
    add("--max_new_tokens", type=int, metavar="N", help="bytes to write at most (default: 512)")
    add(
        "--min_new_tokens", type=int, default=0, metavar="N",
        help="bytes to write at least, unless a stop comes (default: 0)",
    )  # fmt: skip
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before it; may be repeated (default: none)",
    )
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: 0.8; to answer, 0)")
    add("--top_k", type=int, default=0, metavar="K", help="of the K likeliest bytes (default: all)")
    add(
        "--top_p", type=float, default=1.0, metavar="P",
        help="of those, the likeliest that make up P (default: 1)",
    )  # fmt: skip
    add(
        "--min_p", type=float, default=0.0, metavar="P",
        help="of those, the ones at least P times as likely as the likeliest (default: 0)",
    )  # fmt: skip
    add(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed, the same text; of several, by its place (default: a new one)",
    )
    add = groups["run"].add_argument
    add(
        "--batch_size", type=int, default=32, metavar="N",
        help="texts written together, once so many prompts were read (default: 32)",
    )  # fmt: skip
    add(
        "--draft_len", type=int, metavar="N",
        help="bytes that a text written alone is drafted ahead, at most: faster and as likely; "
        "a seed's text is another with it than without (default: 24; 0: none)",
    )  # fmt: skip
    add(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of the weights: auto is bf16 where the hardware has it (default: auto)",
    )  # fmt: skip
    add_device(groups["run"])

    evaluate = command("evaluate", run_evaluate, "Score a text, or a .tsv of prompts and targets.")
    groups = {name: evaluate.add_argument_group(name) for name in ("data", "results", "run")}
    evaluate.add_argument("file", help="the text or .tsv, .gz too")
    add_ckpt(evaluate)
    add = groups["data"].add_argument
    add("--encoding", default="utf-8", help="of the file (default: utf-8)")
    add(
        "--sep", choices=("line", "blank"), default="line",
        help="what ends a document of a text: each line, or a blank one (default: line)",
    )  # fmt: skip
    add = groups["results"].add_argument
    add("--json", action="store_true", help="one JSON object")
    add("--predictions", metavar="FILE", help="write prompt, target and answer of each row here")
    add = groups["run"].add_argument
    add(
        "--batch_size", type=int, default=16, metavar="N",
        help="windows scored together (default: 16)",
    )  # fmt: skip
    add(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of the matrix products (default: auto)",
    )  # fmt: skip
    add_device(groups["run"])

    plans = command("plans", run_plans, "Show what the plans of texts have in common.")
    plans.add_argument(
        "texts", nargs="+", metavar="TEXT", help="a text, or a file with one on each line (or .tsv)"
    )
    add_ckpt(plans)
    plans.add_argument("-o", "--out", metavar="FILE", help="draw a map, too: .png, .svg or .pdf")
    add_device(plans)

    plot = command("plot", run_plot, "Draw the curves of runs.")
    plot.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="the --out_dir of a run")
    plot.add_argument("-o", "--out", default="curves.png", metavar="FILE",
                      help=".png, .svg or .pdf (default: curves.png)")  # fmt: skip
    return parser


def new_parser(make: Any, name: str | None, *args: Any, **keywords: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = make(
        *args,
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **keywords,
    )
    return parser


def add_fields(groups: dict[str, Any], config: type) -> None:
    """A flag for each field of a config; only those given end up among the arguments."""
    types = {"int": int, "float": float, "str": str}
    for f in fields(config):
        meta = f.metadata
        if "hidden" in meta:
            continue
        add = groups[meta["group"]].add_argument
        if isinstance(f.default, bool):
            flag = f"--no_{f.name}" if f.default else f"--{f.name}"
            add(
                flag,
                dest=f.name,
                action="store_const",
                const=not f.default,
                default=argparse.SUPPRESS,
                help=meta["help"],
            )
            continue
        kind = meta.get("type") or types[type(f.default).__name__]
        of_size = "that of --size; small: " if f.name in SIZES["small"] else ""
        default = "" if f.default is None else f" (default: {of_size}{f.default})"
        text = meta["help"] + default
        keywords: dict[str, Any] = {"type": kind, "help": text, "default": argparse.SUPPRESS}
        keywords |= (
            {"choices": meta["choices"]}
            if "choices" in meta
            else {"metavar": "N" if kind is not str else "TEXT"}
        )
        add(f"--{f.name}", **keywords)


def add_ckpt(parser: Any) -> None:
    parser.add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"checkpoint (default: the newest run's best in {DEFAULT_DIR})",
    )


def add_device(parser: Any) -> None:
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    parser.add_argument("--cpu", action="store_true", help="the same as --device cpu")


def from_args(config: type[Config], args: argparse.Namespace, **preset: Any) -> Config:
    """A config of the flags given, over a preset."""
    names = {f.name for f in fields(config)}  # type: ignore[arg-type]
    return config(**preset | {k: v for k, v in vars(args).items() if k in names})


def run_pretrain(args: argparse.Namespace) -> None:
    config = from_args(HRMConfig, args, **SIZES[args.size])
    options = from_args(PretrainConfig, args)

    from .device import choose_device
    from .training import train_lm

    device = choose_device(args.device, args.cpu)
    report(train_lm(args.corpus or [STORIES], config, options, val=args.val, device=device))


def run_finetune(args: argparse.Namespace) -> None:
    options = from_args(FinetuneConfig, args)
    if args.from_scratch and args.ckpt:
        raise HRMError("give --ckpt or --from_scratch, not both")
    if args.from_scratch and options.blocks != "auto":
        raise HRMError("--blocks is of a checkpoint: give it or --from_scratch, not both")
    if args.size and not args.from_scratch:
        raise HRMError("--size is of a new model: give --from_scratch with it, or neither")

    from .checkpoint import find_checkpoint
    from .device import choose_device
    from .training import train_ft

    device = choose_device(args.device, args.cpu)
    start = args.ckpt
    if args.from_scratch:
        start = from_args(HRMConfig, args, **SIZES[args.size or "small"])
    elif start is None:
        start = find_checkpoint(DEFAULT_DIR, ("pretrain",))
    report(train_ft(args.tsv or NUMBERS, start, options, val=args.val, device=device))


def report(result: TrainResult) -> None:
    """What a training came to, and where it is."""
    if RANK:
        return
    print(f"{result.bytes_seen:,} bytes seen in {result.steps:,} steps, {result.seconds:,.0f} s")
    if result.score is not None:
        print(f"held out: {result.score}")
    print(result.best)


def load(args: argparse.Namespace) -> HRMModel:
    gc.disable()  # importing makes no garbage, and looking for it takes 0.1 s
    try:
        from .checkpoint import load_model
        from .device import choose_device

        model = load_model(args.ckpt, choose_device(args.device, args.cpu))
        gc.freeze()
    finally:
        gc.enable()
    return model


def run_generate(args: argparse.Namespace) -> None:
    if args.prompt is not None and args.prompts is not None:
        raise HRMError("give --prompt or --prompts, not both")
    if args.num_samples < 1 or args.batch_size < 1:
        raise HRMError("num_samples and batch_size must be at least 1")
    prompt = os.fsencode(args.prompt or "").decode(errors="ignore")  # argv may hold stray bytes
    stops = [os.fsencode(s).decode(errors="ignore") for s in args.stop]
    model = load(args)

    from .generation import generate_batch, stream

    mode = args.mode or ("answer" if model.stage == "finetune" else "continue")
    names = "max_new_tokens min_new_tokens temperature top_k top_p min_p seed precision draft_len"
    names += " plan_from plan_code guidance"
    given = {n: v for n in names.split() if (v := getattr(args, n)) is not None}
    options: dict[str, Any] = {"mode": mode, "stop": stops, **given}
    prompts = [prompt] if args.prompts is None else read_prompts(args.prompts, args.encoding)
    if mode == "answer":
        prompts = warned(prompts, model.config.max_len)
    utf8_output()
    if args.prompts is None and args.num_samples == 1 and not args.json:
        characters = stream(model, *prompts, **options)
        if mode == "continue":
            print(prompt, end="")
        try:
            for character in characters:
                print(character, end="", flush=True)
        finally:
            print()
        return
    batch = {"num_samples": args.num_samples, "batch_size": args.batch_size}
    for text in generate_batch(model, prompts, **batch, **options):
        if args.json:
            line = json.dumps(text.as_dict(), ensure_ascii=False)
        else:
            whole = text.prompt * (mode == "continue") + text.text
            line = " ".join(whole.splitlines())  # a text a line
        print(line, flush=True)


def utf8_output() -> None:
    """Raises HRMError if nobody could read what is written."""
    if sys.stdout is None:
        raise HRMError("standard output is closed")
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]


def read_prompts(path: str, encoding: str) -> Iterator[str]:
    """The lines of a file, or of standard input, as they come; blank ones, too."""
    from .data import TextStats, read_lines

    stats = TextStats()
    yield from read_lines(path, encoding, stats)
    if stats.undecodable:
        print(f"warning: {stats.undecodable:,} bytes are not {encoding}: is --encoding right?",
              file=sys.stderr)  # fmt: skip


def warned(prompts: Iterable[str], limit: int) -> Iterator[str]:
    """The prompts, with a line on stderr for each that is longer than is read of it."""
    from .data import to_bytes

    for prompt in prompts:
        if len(to_bytes(prompt)) > limit:
            print(f"warning: only the first {limit} bytes of the prompt are read", file=sys.stderr)
        yield prompt


def run_plans(args: argparse.Namespace) -> None:
    model = load(args)

    from .plans import draw_map, lines_of, plans_of, report

    found = plans_of(model, list(lines_of(args.texts)))
    utf8_output()
    for line in report(found):
        print(line)
    if args.out is not None:
        draw_map(found, args.out)
        print(f"\n{args.out}")


def run_plot(args: argparse.Namespace) -> None:
    from .plot import plot

    plot(args.folders, args.out)
    print(args.out)


def run_evaluate(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise HRMError(f"batch_size must be at least 1, not {args.batch_size}")
    model = load(args)

    from .evaluation import evaluate

    score = evaluate(
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
