"""Numbers and dates as Spanish writes them."""

from __future__ import annotations

from datetime import date

SWAPPED = str.maketrans(",.", ".,")
MONTHS = (
    "enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto", "septiembre",
    "octubre", "noviembre", "diciembre",
)  # fmt: skip


def spanish_number(number: str) -> str:
    """Returns a number with its points and commas swapped: 1,234.5 is 1.234,5."""
    return number.translate(SWAPPED)


def spanish_date(iso: str) -> str:
    """Returns a date such as 2026-11-28 in words, and any other text as it is."""
    try:
        day = date.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{day.day} de {MONTHS[day.month - 1]} de {day.year}"
