"""``hrm-esp generate`` without a prompt on a terminal: a line in, a text out, until Ctrl-D."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import GenerationConfig
from ..errors import HRMError
from ..options import number
from .common import clean_argument

if TYPE_CHECKING:
    from ..model import HRMModel

# Name of the command, the field that it sets, the type of its value, and its help.
SETTINGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "/temperature": ("temperature", number, "0 is greedy; higher is more varied"),
    "/seed": ("seed", int, "the same seed and line give the same text"),
    "/plan": ("plan_code", int, "use the plan of code N; without N, the plan of the line"),
    "/length": ("max_new_tokens", int, "maximum number of bytes"),
}
HELP = "\n".join(
    (
        *(f"{name + ' N':16} {text}" for name, (_, _, text) in SETTINGS.items()),
        f"{'/again':16} another text for the last line (temperature above 0)",
        f"{'/help':16} this list",
        f"{'Ctrl-C':16} ends the text",
        f"{'/quit, Ctrl-D':16} ends the session",
    )
)


def converse(model: HRMModel, config: GenerationConfig) -> None:
    """Reads lines from the terminal and writes a text for each, until Ctrl-D."""
    with suppress(ImportError):  # history and arrow keys, where Python has them
        importlib.import_module("readline")
    mode = config.mode_for(model.stage)
    does = "answers each line" if mode == "answer" else "continues each line"
    print(f"This model {does}; it does not remember the lines before.")
    print("/help lists commands; /quit or Ctrl-D ends.")
    last: str | None = None
    while True:
        try:
            line = clean_argument(input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith("/"):
                name, _, value = line.strip().partition(" ")
                if name == "/quit":
                    return
                if name == "/again":
                    if last is None:
                        raise HRMError("nothing to repeat yet")
                    if config.seed is not None:
                        config = replace(config, seed=(config.seed + 1) % 2**63)
                    write(model, last, config, mode)
                else:
                    config = change(config, name, value.strip())
            elif line.strip():
                last = line
                write(model, line, config, mode)
        except HRMError as error:
            print(error)


def change(config: GenerationConfig, name: str, value: str) -> GenerationConfig:
    """Carries out a command that begins with a slash. Returns the new options.

    Raises:
        HRMError: no such command or value.
    """
    if name == "/help":
        print(HELP)
        return config
    if name not in SETTINGS:
        raise HRMError("no such command: see /help")
    field, kind, _ = SETTINGS[name]
    changes: dict[str, Any] = {field: None}
    if field == "plan_code":
        changes["plan_from"] = None
    if value:
        try:
            changes[field] = kind(value)
        except ValueError as error:
            raise HRMError(f"{name}: {value!r} is not a number") from error
    elif field == "plan_code":
        changes["guidance"] = None  # it needs a chosen plan
    config = replace(config, **changes)
    print(f"{name[1:]}: {value or 'the default'}")
    return config


def write(model: HRMModel, prompt: str, config: GenerationConfig, mode: str) -> None:
    """Writes a text character by character; Ctrl-C ends it."""
    from ..generation import stream

    try:
        characters = stream(model, prompt, config)
        if mode == "continue":
            print(prompt, end="", flush=True)
        for character in characters:
            print(character, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
