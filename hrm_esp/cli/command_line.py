"""From the words of a command line to parsed arguments."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from ..config import FinetuneConfig, HRMConfig, PretrainConfig
from ..continue_config import ContinueConfig
from ..errors import HRMError
from .parser import build_parser, options

# The configs of which each command of training has flags, and those it sets with --set, too.
CONFIGS: dict[str, tuple[tuple[type, ...], tuple[type, ...]]] = {
    "pretrain": ((HRMConfig, PretrainConfig), (ContinueConfig,)),
    "finetune": ((FinetuneConfig,), (HRMConfig,)),
}


def expand_options(argv: Sequence[str]) -> list[str]:
    """Replaces ``--name value`` by ``--set name=value`` for the hyperparameters of training that
    have no flag; for one that is true or false, also ``--name`` and ``--no_name``."""
    if not argv or argv[0] not in CONFIGS:
        return list(argv)
    with_flags, others = CONFIGS[argv[0]]
    flags = {name for name, f in options(*with_flags).items() if f.metadata["flag"]}
    known = {n: f for n, f in options(*with_flags, *others).items() if n not in flags}
    words, expanded = iter(argv), []
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        is_no = name.startswith("no_") and not equals
        name = name.removeprefix("no_") if is_no else name
        is_bool = name in known and isinstance(known[name].default, bool)
        if not flag.startswith("--") or name not in known or (is_no and not is_bool):
            expanded.append(word)
            continue
        if is_bool and not equals:
            value = "false" if is_no else "true"
        elif not equals:
            value = next(words, "")
        expanded += ["--set", f"{name}={value}"]
    return expanded


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. What follows ``--`` are no flags.

    Raises:
        HRMError: a mistake in it.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    words = expand_options([normalize_flag(word) for word in argv[:end]])
    args, unknown = build_parser().parse_known_args([*words, *argv[end:]])
    if unknown:
        text = " ".join(unknown)
        is_prompt = args.command == "generate" and not text.startswith("-")
        advice = f"see hrm-esp {args.command} --help"
        if is_prompt:
            advice = f"give the text with --prompt {shlex.quote(text)}"
        raise HRMError(f"unrecognized arguments: {text} ({advice})")
    return args


def normalize_flag(word: str) -> str:
    """Replaces dashes in the name of a flag: ``--top-k=5`` becomes ``--top_k=5``."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or " " in name:
        return word
    return "--" + name[2:].replace("-", "_") + equals + value
