"""JSON on single lines: what the commands print with ``--json``, and the log of a run."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any) -> str:
    """Returns a value as one line of JSON. NaN and infinities, which JSON does not have, become
    null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_entry(line: bytes) -> dict[str, Any] | None:
    """Returns the entry on a line of a log, ``metrics.jsonl``: a JSON object with a ``stage`` and a
    ``step``. ``None`` if the line is something else, such as half an entry after a crash."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    return entry if isinstance(entry.get("stage"), str) else None


def describe_skipped(path: object, n: int) -> str:
    """Returns a message about the ``n`` lines of a log that are not entries."""
    return f"{path}: {n:,} {'line is not an entry' if n == 1 else 'lines are not entries'}: skipped"
