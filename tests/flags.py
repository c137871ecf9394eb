"""Makes docs/flags.md from the parser.

python tests/flags.py
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from hrm_esp.cli.parser import SetAction, build_parser, describe_option, options

PATH = Path(__file__).parent.parent / "docs" / "flags.md"
INTRODUCTION = """\
# Flags

Made from the parser by `python tests/flags.py`. Dashes and underscores are equal: `--top-k` is
`--top_k`. All other hyperparameters are set with `--set name=value`, which may be repeated, and
`hrm-esp pretrain --set help` lists them.
"""


def flag(action: argparse.Action) -> str:
    """Returns a flag as it is written: ``--size tiny|small|base``."""
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if not action.option_strings or action.nargs == 0:
        return name
    values = "|".join(map(str, action.choices)) if action.choices else action.metavar
    return f"{name} {values or action.dest.upper()}"


def table(rows: list[tuple[str, str]]) -> Iterator[str]:
    yield "| name | what it does |\n| --- | --- |"
    for name, text in rows:
        name, text = (part.replace("|", "\\|") for part in (name, text))
        yield f"| `{name}` | {text} |"


def document() -> str:
    lines = [INTRODUCTION]
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    for name, parser in commands.items():
        actions = [a for a in parser._actions if a.dest != "help"]
        lines += [f"## hrm-esp {name}\n", f"{parser.description}\n"]
        lines += [*table([(flag(a), a.help or "") for a in actions]), ""]
        for action in actions:
            if isinstance(action, SetAction):
                known = options(*action.configs).items()
                rows = [(n, describe_option(f)) for n, f in known if not f.metadata["flag"]]
                lines += ["With `--set`:\n", *table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
