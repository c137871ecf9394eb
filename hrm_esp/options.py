"""Fields of the configs: how they are declared, and how their values are checked.

This module does not import torch, so that ``hrm-esp --help`` answers at once.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import field, fields
from types import NoneType
from typing import Any

from .errors import HRMError

# The types of a field's values, by its annotation. A bool is no int: types must be equal.
TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "Sequence[str]": (tuple, list),
    "None": (NoneType,),
}
BOUNDS = {
    "low": ("at least", operator.ge),
    "high": ("at most", operator.le),
    "above": ("more than", operator.gt),
    "below": ("less than", operator.lt),
}
MAX_SHOWN = 60  # characters of a value in an error message


def option(default: Any, group: str, text: str, *, flag: bool = True, **rules: Any) -> Any:
    """Declares a dataclass field that can be set from the command line.

    Args:
        default: the field's default. A ``bool`` that is true becomes the flag ``--no_<name>``.
        group: the heading under which ``--help`` lists the flag.
        text: what the field does; of a ``bool``, what it does when true.
        flag: the field has a flag of its own; otherwise it is set with ``--set name=value``.
        rules: ``choices``, ``type`` and ``metavar`` as in ``argparse``; ``low`` and ``high``, the
            smallest and largest value allowed; ``above`` and ``below``, exclusive bounds.
    """
    return field(default=default, metadata={"group": group, "help": text, "flag": flag, **rules})


def flag_name(config: Any, name: str) -> str:
    """Returns how a field of a config is set on the command line: ``--lr``, ``--set warmup``."""
    (f,) = (f for f in fields(config) if f.name == name)
    return f"--{name}" if f.metadata["flag"] else f"--set {name}"


def check_fields(config: Any) -> None:
    """Checks the fields of a dataclass against their types, ``choices`` and bounds. Fields of types
    that are not in `TYPES` are not checked. With the rule ``finite=False`` a number may also be
    infinite or NaN.

    Raises:
        HRMError: a value is not allowed.
    """
    for f in fields(config):
        value, rules = getattr(config, f.name), f.metadata
        names = f.type.split(" | ")
        if not TYPES.keys() >= set(names):
            continue
        if not any(type(value) in TYPES[name] for name in names):
            raise HRMError(f"{f.name} must be of type {f.type}, not {describe(value)}")
        if value is None:
            continue
        if "choices" in rules and value not in rules["choices"]:
            choices = ", ".join(rules["choices"])
            raise HRMError(f"{f.name} must be one of {choices}, not {describe(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            if rules.get("finite", True):
                raise HRMError(f"{f.name} must be a finite number, not {value}")
            continue
        check_bounds(f.name, value, **rules)


def check_bounds(name: str, value: float, **rules: Any) -> None:
    """Checks a number against those of the rules that are bounds; see `option`.

    Raises:
        HRMError: it is out of bounds.
    """
    for rule, (words, is_inside) in BOUNDS.items():
        if rule in rules and not is_inside(value, rules[rule]):
            raise HRMError(f"{name} must be {words} {rules[rule]:,}, not {describe(value)}")


def number(text: str) -> float:
    """Returns a number that is written with a decimal point or, as in Spanish, a decimal comma.

    Raises:
        ValueError: it is no number.
        HRMError: its comma may separate thousands.
    """
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+", text.strip()):
        one, other = text.replace(",", ""), text.replace(",", ".", 1).replace(",", "")
        raise HRMError(f"the comma of {text} may mean thousands or decimals: give {one} or {other}")
    return float(text.replace(",", "."))


def describe(value: object) -> str:
    """Returns a value as an error message shows it: in a few words, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {value.bit_length() * math.log10(2):.0f} digits"
    if isinstance(value, str | int | float | NoneType):
        text = repr(value)
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return f"a {type(value).__name__}"
