"""Whole numbers in Spanish words, to make and to check the bundled samples.

    python tests/number_words.py hrm_esp/samples

writes ``numeros.tsv`` and, with 300 others, ``numeros.held_out.tsv``.
"""

import random
import sys
from pathlib import Path

SMALL = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro "
    "veinticinco veintiséis veintisiete veintiocho veintinueve"
).split()
TENS = "treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
HUNDREDS = (
    "ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos "
    "novecientos"
).split()


def words(n: int) -> str:
    """``n`` from 0 to 999,999 in words: 21000 is *veintiún mil*."""
    thousands, rest = divmod(n, 1000)
    if not thousands:
        return below_1000(n)
    # Before "mil", which is masculine, uno loses its o, and one thousand is plain "mil".
    before = "" if thousands == 1 else apocope(below_1000(thousands)) + " "
    return f"{before}mil {below_1000(rest)}" if rest else f"{before}mil"


def below_1000(n: int) -> str:
    if n == 100:
        return "cien"
    hundreds, rest = divmod(n, 100)
    if hundreds:
        return f"{HUNDREDS[hundreds - 1]} {below_1000(rest)}" if rest else HUNDREDS[hundreds - 1]
    if n < len(SMALL):
        return SMALL[n]
    tens, one = divmod(n, 10)
    return f"{TENS[tens - 3]} y {SMALL[one]}" if one else TENS[tens - 3]


def apocope(text: str) -> str:
    if text.endswith("veintiuno"):
        return text.removesuffix("veintiuno") + "veintiún"
    return text.removesuffix("o") if text.endswith("uno") else text


def draw(chance: random.Random, digits: int) -> int:
    return chance.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def sample(
    n_train: int = 4000, n_held_out: int = 300, seed: int = 1
) -> tuple[list[int], list[int]]:
    """Distinct numbers, drawn evenly by number of digits as far as there are so many."""
    chance = random.Random(seed)
    # Of the short numbers, few as they are, most are for learning.
    held_out: list[int] = []
    for digits, limit in zip(range(1, 7), (2, 18, 70, 70, 70, 70), strict=True):
        group: set[int] = set()
        while len(group) < limit * n_held_out // 300:
            group.add(draw(chance, digits))
        held_out += sorted(group)
    taken, train = set(held_out), []
    space = {d: 10**d - (10 ** (d - 1) if d > 1 else 0) for d in range(1, 7)}
    for n in held_out:
        space[len(str(n))] -= 1
    while len(train) < n_train:
        digits = chance.choice([d for d in space if space[d]])
        while (number := draw(chance, digits)) in taken:
            pass
        taken.add(number)
        train.append(number)
        space[digits] -= 1
    chance.shuffle(held_out)
    return train, held_out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, numbers in zip(("numeros.tsv", "numeros.held_out.tsv"), sample(), strict=True):
        rows = "".join(f"{n}\t{words(n)}\n" for n in numbers)
        (folder / name).write_text(rows, encoding="utf-8")
