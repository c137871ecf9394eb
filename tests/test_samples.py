import unicodedata

from number_words import sample, words

from hrm_esp.cli.commands import NUMBERS, SAMPLES, STORIES
from hrm_esp.data.report import looks_like_verse

HELD_OUT = SAMPLES / "numeros.held_out.tsv"

KNOWN = {
    0: "cero", 16: "dieciséis", 21: "veintiuno", 22: "veintidós", 31: "treinta y uno", 100: "cien",
    101: "ciento uno", 555: "quinientos cincuenta y cinco", 1000: "mil", 1001: "mil uno",
    4827: "cuatro mil ochocientos veintisiete", 21000: "veintiún mil",
    31021: "treinta y un mil veintiuno", 100000: "cien mil", 101101: "ciento un mil ciento uno",
    700716: "setecientos mil setecientos dieciséis",
    999999: "novecientos noventa y nueve mil novecientos noventa y nueve",
}  # fmt: skip


def test_numbers_in_words() -> None:
    for number, text in KNOWN.items():
        assert words(number) == text


def test_the_shipped_numbers() -> None:
    train, held_out = (
        [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (NUMBERS, HELD_OUT)
    )
    assert len(train) >= 2000 and len(held_out) == 300
    for number, text in train + held_out:
        assert text == words(int(number))
    assert not {n for n, _ in train} & {n for n, _ in held_out}
    assert ([int(n) for n, _ in train], [int(n) for n, _ in held_out]) == sample()
    by_digits = [sum(len(n) == d for n, _ in train) for d in range(3, 7)]
    assert max(by_digits) < 1.3 * min(by_digits)


def test_the_shipped_stories() -> None:
    text = STORIES.read_text(encoding="utf-8")
    stories = text.splitlines()
    assert len(text.encode()) >= 60_000 and text == unicodedata.normalize("NFC", text)
    assert all(300 < len(s.encode()) < 1000 and s == s.strip() for s in stories)
    openings = {s.split(".")[0] for s in stories}
    assert len(openings) == len(stories)
    sentences = [s for story in stories for s in story.split(". ") if len(s) > 30]
    assert len(set(sentences)) > 0.99 * len(sentences)
    for story in stories:
        assert story.count("¿") == story.count("?") and story.count("¡") == story.count("!")
        assert story.count("«") == story.count("»") and "  " not in story


def test_the_shipped_verse() -> None:
    text = (SAMPLES / "versos.txt").read_text(encoding="utf-8")
    assert len(text.encode()) >= 40_000 and text == unicodedata.normalize("NFC", text)
    lines = [line for line in text.split("\n") if line]
    assert len(set(lines)) == len(lines) and "\n\n\n" not in text
    assert all(12 < len(line) < 50 and line == line.strip() for line in lines)
    assert all(c.isalpha() or c in " ,.;:¿?¡!«»—()…\n" for c in text)
    for opening, closing in ("«»", "¿?", "¡!"):
        assert text.count(opening) == text.count(closing)
    assert looks_like_verse("\n".join(lines).encode())
    assert not looks_like_verse(STORIES.read_bytes()) and not looks_like_verse(NUMBERS.read_bytes())
