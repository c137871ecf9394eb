"""The command line's parser. Flags of hyperparameters are made from the configs.

This module does not import torch, so that ``hrm-esp --help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Any, NoReturn, TypeVar

from .. import __version__
from ..config import (
    DEFAULT_DIR,
    ENCODING_HELP,
    LM_HELP,
    PRECISIONS,
    PROMPT_COL_HELP,
    SEP_HELP,
    SEPARATORS,
    SIZES,
    TARGET_COL_HELP,
    FinetuneConfig,
    GenerationConfig,
    HRMConfig,
    PretrainConfig,
)
from ..continue_config import ContinueConfig
from ..errors import HRMError
from ..options import number
from .examples import EXAMPLES

Config = TypeVar("Config")
DESCRIPTION = "A byte-level language model for Spanish with a Planner and an Executor."
TRAIN_GROUPS = ("data", "model", "training", "run")
TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": number, "str": str}
OF_MODEL = ("default: ", "default: as in finetuning, else ")
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Parser(argparse.ArgumentParser):
    """Reports a mistake as an HRMError."""

    def error(self, message: str) -> NoReturn:
        if missing := re.search(r"(--\w+): expected one argument", message):
            message += f"; if it begins with a dash: {missing[1]}=VALUE"
        raise HRMError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser. ``args.command`` is the name of the command."""
    parser = _new_parser(Parser, "", prog="hrm-esp", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hrm-esp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, add_flags, text in (
        ("pretrain", _add_pretrain, "Train a model on text."),
        ("finetune", _add_finetune, "Finetune a model on prompts and targets."),
        ("generate", _add_generate, "Continue a prompt, or answer it."),
        ("evaluate", _add_evaluate, "Score a model on a text, or on a table of pairs."),
        ("restore", _add_restore, "Restore the accents, ñ and ü of a text."),
        ("pairs", _add_pairs, "Make pairs for restoring accents from a text."),
        ("info", _add_info, "Describe a checkpoint and the files of its run."),
        ("plans", _add_plans, "Show what the plans of texts stand for."),
        ("plot", _add_plot, "Draw the curves of runs."),
    ):
        command = _new_parser(commands.add_parser, name, name, help=text, description=text)
        command.set_defaults(command=name)
        add_flags(command)
    return parser


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus", nargs="*", help="text files or folders, .gz too (default: the bundled stories)"
    )
    groups = {name: parser.add_argument_group(name) for name in TRAIN_GROUPS}
    groups["data"].add_argument(
        "--val",
        metavar="PATH",
        help="held-out text, a file or a folder; never trained on (default: the end of the corpus)",
    )
    groups["model"].add_argument(
        "--ckpt",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="pretrained checkpoint to train further, or its folder (default: train a new model); "
        f"its model is kept, and the default of --lr is {ContinueConfig.lr:g}",
    )
    groups["model"].add_argument(
        "--size",
        choices=SIZES,
        help="1.4, 7.6 or 51 million weights; sets d_model, n_heads and the number of layers "
        "(default: small)",
    )
    add_fields(groups, HRMConfig)
    add_fields(groups, PretrainConfig)
    _add_set(groups["run"], HRMConfig, PretrainConfig, ContinueConfig)
    _add_device(groups["run"])


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "table",
        nargs="?",
        help="prompts and targets: .tsv, .csv or .jsonl, .gz too (default: the bundled numbers)",
    )
    groups = {name: parser.add_argument_group(name) for name in TRAIN_GROUPS}
    groups["data"].add_argument(
        "--val", metavar="FILE", help="held-out table (default: some of the rows)"
    )
    groups["model"].add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"checkpoint to start from (default: best checkpoint of pretraining in {DEFAULT_DIR})",
    )
    groups["model"].add_argument(
        "--from_scratch", action="store_true", help="start from a new model of --size"
    )
    groups["model"].add_argument(
        "--size", choices=SIZES, help="size of the new model (default: small)"
    )
    add_fields(groups, FinetuneConfig)
    _add_set(groups["run"], FinetuneConfig, HRMConfig)
    _add_device(groups["run"])


def _add_generate(parser: argparse.ArgumentParser) -> None:
    groups = {n: parser.add_argument_group(n) for n in ("input", "sampling", "plan", "run")}
    add = groups["input"].add_argument
    add(
        "--prompt",
        help="text to continue or to answer (default: on a terminal, ask for one line after "
        "another; from a pipe, a prompt per line; else empty)",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="a prompt per line, or a table (.tsv, .csv, .jsonl); - is standard input",
    )
    add("--prompt_col", metavar="COLUMN", help=PROMPT_COL_HELP.replace(*OF_MODEL))
    _add_encoding(groups["input"])
    add("--keep_blank", action="store_true", help="do not skip blank prompts of the --prompts file")
    add("--num_samples", type=int, default=1, metavar="N", help="texts per prompt (default: 1)")
    add(
        "--json",
        action="store_true",
        help="a JSON object per text: prompt, text, logprob, logprobs, finish_reason",
    )
    add(
        "-o",
        "--out",
        metavar="FILE",
        help="write a table here (.csv, .tsv, .jsonl): that of --prompts or the prompts, and the "
        "texts in a column `answer`",
    )
    add(
        "--copied",
        action="store_true",
        help="say at the end how much of the texts stands in the training text",
    )
    _add_ckpt(groups["input"])
    add_fields(groups, GenerationConfig)
    groups["run"].add_argument(
        "--batch_size", type=int, metavar="N",
        help="texts generated together (default: 32; 1 for --prompts - from a pipe)",
    )  # fmt: skip
    _add_device(groups["run"], "cpu")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a text, or a table of pairs (.tsv, .csv, .jsonl); .gz too")
    _add_ckpt(parser)
    groups = {name: parser.add_argument_group(name) for name in ("data", "results", "run")}
    add = groups["data"].add_argument
    _add_encoding(groups["data"])
    add(
        "--sep",
        choices=SEPARATORS,
        help=f"of a text: {SEP_HELP} (default: as in pretraining)",
    )
    add("--keep_licence", action="store_true", help="keep Project Gutenberg's licence in a text")
    add("--prompt_col", metavar="COLUMN", help=PROMPT_COL_HELP.replace(*OF_MODEL))
    add("--target_col", metavar="COLUMN", help=TARGET_COL_HELP.replace(*OF_MODEL))
    add("--lm", action="store_true", help=LM_HELP)
    add = groups["results"].add_argument
    add(
        "--by",
        choices=("word", "line", "byte"),
        help="surprisal in bits of each word, line or byte, as TSV (of a table: of its targets); "
        "on a terminal `word` shows shaded text",
    )
    add("--html", metavar="FILE", help="write a page here that shades the words by their bits")
    add("--json", action="store_true", help="print a JSON object, with --by one per row")
    add("--predictions", metavar="FILE", help="write prompt, target and answer of each row here")
    add = groups["run"].add_argument
    add("--batch_size", type=int, default=16, metavar="N", help="windows per batch (default: 16)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="precision of matrix products (default: auto)",
    )
    _add_device(groups["run"])


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", default="-", help="a text, .gz too (default: standard input)"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="write the text here")
    parser.add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"pretrained checkpoint, or the folder of its run (default: {DEFAULT_DIR})",
    )
    parser.add_argument(
        "--min_p", type=number, default=0.0, metavar="P",
        help="leave a word as it is unless its new form has this probability (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--force",
        action="store_true",
        help="reconsider words that have accents, too, and assume that any accent may be missing",
    )
    parser.add_argument(
        "--diff",
        action="store_true",
        help="instead of the text, show each changed word with its probability",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="instead of the text, a JSON object per word: line, word, form, p, changed",
    )
    _add_encoding(parser)
    _add_device(parser)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help="a text file, .gz too, or a folder")
    parser.add_argument("-o", "--out", metavar="FILE", help=".tsv (default: standard output)")
    parser.add_argument(
        "--max_bytes", type=int, default=300, metavar="N",
        help="leave out longer sentences (default: 300)",
    )  # fmt: skip
    _add_encoding(parser)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ckpt",
        nargs="?",
        default=DEFAULT_DIR,
        metavar="CKPT",
        help=f"checkpoint, or the folder of a run (default: {DEFAULT_DIR})",
    )
    parser.add_argument(
        "--card", choices=("es", "en"), help="print a model card in Spanish or English instead"
    )


def _add_plans(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="a text, a text file, a folder, or a table of prompts",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="a JSON object per text: text, code, probabilities of the codes, vector",
    )
    _add_ckpt(parser)
    _add_encoding(parser)
    parser.add_argument("-o", "--out", metavar="FILE", help="draw a map: .png, .svg or .pdf")
    _add_device(parser)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", default=[DEFAULT_DIR], metavar="RUN_FOLDER",
                        help=f"the --out_dir of a run (default: {DEFAULT_DIR})")  # fmt: skip
    parser.add_argument("-o", "--out", default="curves.png", metavar="FILE",
                        help=".png, .svg or .pdf (default: curves.png)")  # fmt: skip


def _new_parser(make: Any, name: str, *args: Any, **keywords: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = make(
        *args,
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **keywords,
    )
    return parser


def _add_ckpt(parser: Any) -> None:
    parser.add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"checkpoint, or the folder of a run (default: {DEFAULT_DIR})",
    )


def _add_encoding(parser: Any) -> None:
    parser.add_argument(
        "--encoding",
        metavar="ENCODING",
        default="utf-8",
        help=f"{ENCODING_HELP} (default: utf-8)",
    )


def _add_device(parser: Any, default: str = "the best available") -> None:
    parser.add_argument("--device", help=f"cuda, cuda:1, mps or cpu (default: {default})")
    parser.add_argument("--cpu", action="store_true", help="same as --device cpu")


def _add_set(group: Any, *configs: type) -> None:
    group.add_argument(
        "--set",
        action=SetAction,
        configs=configs,
        metavar="NAME=VALUE",
        default=argparse.SUPPRESS,
        help="set any other hyperparameter, repeatable; --set help lists them",
    )


def options(*configs: type) -> dict[str, Field[Any]]:
    """Returns the fields of some configs that can be set, by name; the first config wins."""
    found: dict[str, Field[Any]] = {}
    for config in configs:
        for f in fields(config):
            if "hidden" not in f.metadata:
                found.setdefault(f.name, f)
    return found


def option_type(f: Field[Any]) -> Callable[[str], Any]:
    """Returns what makes an option's value of a text of the command line."""
    kind: type = f.metadata.get("type") or type(f.default)
    return TYPES[kind.__name__]


def option_default(f: Field[Any]) -> str:
    """Returns the default of an option as its help shows it."""
    if f.default is None or f.default == ():
        return ""
    prefix = "that of --size; small: " if f.name in SIZES["small"] else ""
    return f" (default: {prefix}{f.default})"


def add_fields(groups: dict[str, Any], config: type) -> None:
    """Adds a flag for each field of a config that has one. Only flags that are given become
    attributes of the parsed arguments."""
    for f in fields(config):
        rules = f.metadata
        if "hidden" in rules or not rules["flag"]:
            continue
        add, text = groups[rules["group"]].add_argument, rules["help"]
        if isinstance(f.default, bool):
            flag = f"--no_{f.name}" if f.default else f"--{f.name}"
            add(
                flag,
                dest=f.name,
                action="store_const",
                const=not f.default,
                default=argparse.SUPPRESS,
                help=f"do not {text}" if f.default else text,
            )
            continue
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS}
        if isinstance(f.default, tuple):
            keywords |= {"action": "append", "metavar": rules["metavar"]}
        elif "choices" in rules:
            keywords["choices"] = rules["choices"]
        else:
            kind = option_type(f)
            keywords |= {
                "type": kind,
                "metavar": rules.get("metavar", "TEXT" if kind is str else "N"),
            }
        add(f"--{f.name}", help=text + option_default(f), **keywords)


class SetAction(argparse.Action):
    """``--set name=value`` sets a field of a config; ``--set help`` lists the fields."""

    def __init__(self, *args: Any, configs: Sequence[type], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.configs = configs

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any
    ) -> None:
        if value == "help":
            for name, f in options(*self.configs).items():
                if not f.metadata["flag"]:
                    print(f"{name:18} {describe_option(f)}")
            parser.exit()
        name, equals, text = value.partition("=")
        name = name.strip().replace("-", "_")
        known = options(*self.configs)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise HRMError(
                f"--set {value}: no such name; {hint}{parser.prog} --set help lists the names"
            )
        if not equals:
            raise HRMError(f"--set {value}: give a value, as in --set {name}=VALUE")
        if known[name].metadata["flag"] and known[name].default is False:
            raise HRMError(f"--set {value}: give --{name}")  # --resume and --overwrite
        setattr(namespace, name, parse_value(known[name], text))


def parse_value(f: Field[Any], text: str) -> Any:
    """Converts the text of a value to the type of its field.

    Raises:
        HRMError: the text is no such value.
    """
    if isinstance(f.default, bool):
        if text.strip().lower() not in BOOLS:
            raise HRMError(f"--set {f.name}: give true or false, not {text!r}")
        return BOOLS[text.strip().lower()]
    if "choices" in f.metadata:
        return text.strip()
    try:
        return option_type(f)(text)
    except ValueError as error:
        kind = option_type(f).__name__
        raise HRMError(f"--set {f.name}: {text!r} is not a valid {kind}") from error


def describe_option(f: Field[Any]) -> str:
    """Returns the help of an option that has no flag."""
    choices = f"{' | '.join(f.metadata['choices'])}; " if "choices" in f.metadata else ""
    return f"{choices}{f.metadata['help']}{option_default(f)}"


def from_args(config: type[Config], args: argparse.Namespace, **preset: Any) -> Config:
    """Builds a config from the flags that were given, over a preset."""
    names = {f.name for f in fields(config)}  # type: ignore[arg-type]
    return config(**preset | {k: v for k, v in vars(args).items() if k in names})
