"""Restoring accents, ñ and ü."""

from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TEXT, Run, random_model
from hypothesis import example, given
from hypothesis import strategies as st

from hrm_esp import HRMError, HRMModel, load_model, restore
from hrm_esp.data import strip_accents
from hrm_esp.ngrams.lexicon import Lexicon
from hrm_esp.restoration import Restorer, TextBlocks
from hrm_esp.restoration.words import MARKED, find_words, word_forms

PLAIN = strip_accents(TEXT)
STRANGE = (  # nothing in it is a word but `y`, which has no vowel
    "Y http://ejemplo.com/nina?pajaro=1, www.nina.es y nina@jardin.es.\r\n"
    "\tY jardin.txt, /casa/nina y nina2, niñaBuena y f(nina) {nina}\r\n\r\n"
    "nin\u0303a façade naïve  Größe\x0b nina_el <b>nina</b>\ufeff --- 25º 3.000\n"
)


@pytest.fixture(scope="module")
def model(trained: Path) -> HRMModel:
    return load_model(trained / "checkpoints" / "pretrain_best.pt")


def test_marks_of_the_training_text_come_back(model: HRMModel) -> None:
    """All but those which both forms have: `el` and `él`."""
    assert sum(a != b for a, b in zip(TEXT, PLAIN, strict=True)) > 200
    restored = restore(model, PLAIN)
    wrong = [(a, b) for a, b in zip(TEXT.split(), restored.split(), strict=True) if a != b]
    assert len(wrong) <= len(TEXT.split()) / 100, Counter(wrong)


def test_what_is_no_plain_word_stays(model: HRMModel) -> None:
    assert restore(model, STRANGE) == STRANGE
    assert restore(model, STRANGE, force=True) == STRANGE


@given(st.text(st.sampled_from("aenuñágqo NÑÉü.,\n\r\t\u0303\u0301-(@/1ç\udcf1"), max_size=80))
@example("Nino\u0301n guena queria güe\n")
def test_only_marks_change(model: HRMModel, text: str) -> None:
    """Nothing else, and of a word that has a mark nothing, unless it is asked for."""
    restored = restore(model, text)
    assert len(restored) == len(text)
    for before, after in zip(text, restored, strict=True):
        assert before == after or (after in MARKED and strip_accents(after) == before)
    forced = restore(model, text, force=True)
    assert unicodedata.normalize("NFD", strip_accents(forced)) == unicodedata.normalize(
        "NFD", strip_accents(text)
    ) or any(c in text for c in "\u0301\u0303")
    for word, marked in zip(re.findall(r"\w+", text), re.findall(r"\w+", restored), strict=True):
        if not word.isascii():
            assert word == marked
        assert sum(c in "áéíóúÁÉÍÓÚ" for c in marked) <= max(
            1, sum(c in "áéíóúÁÉÍÓÚ" for c in word)
        )


@given(st.text(st.sampled_from("aeinugqb"), min_size=1, max_size=9))
def test_forms_of_a_word(word: str) -> None:
    forms = word_forms(word)
    assert forms[0] == word and len(set(forms)) == len(forms)
    for form in forms:
        assert strip_accents(form) == word and len(form) == len(word)
        assert sum(c in "áéíóú" for c in form) <= 1
    assert not any("qú" in form or re.search("gü(?![eiéí])", form) for form in forms)
    for i, letter in enumerate(word):
        if letter in "aeio":
            accented = word[:i] + dict(zip("aeio", "áéíó", strict=True))[letter] + word[i + 1 :]
            assert accented in forms


def test_words_are_counted_as_in_the_text(model: HRMModel) -> None:
    assert model.executor.ngrams is not None
    lexicon = Lexicon(model.executor.ngrams.table)
    # Held out is the end of the text: words of its beginning are counted in full.
    counted = Counter(re.findall(r"[^\W\d_]+", TEXT.lower()))
    assert lexicon.count("niña") == lexicon.count("niña") > 0.8 * counted["niña"]
    assert lexicon.count("Niña") == lexicon.count("NIña") == lexicon.count("niña")
    assert lexicon.count("nina") == 0 == lexicon.count("ni")
    assert lexicon.pair_count("la", "niña") == lexicon.count("niña")
    assert lexicon.pair_count("niña", "la") == 0
    assert lexicon.n_words > lexicon.count("la")


def test_the_path_is_the_most_likely_one(model: HRMModel) -> None:
    """Against all paths through a short text."""
    restorer = Restorer(model)
    words = list(find_words("El jardin el durmio si"))
    words = [w._replace(forms=w.forms[:3]) for w in words]

    def paths(i: int, previous: str | None) -> Iterator[tuple[float, list[str]]]:
        if i == len(words):
            yield 0.0, []
            return
        for form in words[i].forms:
            score = restorer.log_prob(form, previous)
            yield from ((score + rest, [form, *path]) for rest, path in paths(i + 1, form))

    path = restorer.viterbi(words, [0] * len(words))
    score = sum(map(restorer.log_prob, path, [None, *path]))
    assert score == pytest.approx(max(paths(0, None))[0])
    assert path[1] == "jardín"


def test_probabilities(model: HRMModel) -> None:
    found = list(Restorer(model).restore_words(PLAIN[:2000]))
    assert all(0 < word.prob <= 1 + 1e-9 for word in found)
    unsure = [word for word in found if word.prob < 1]
    assert unsure
    limit = sorted(word.prob for word in unsure)[len(unsure) // 2]
    text = restore(model, PLAIN[:2000], min_p=limit)
    for begin, end, form, prob in found:
        assert text[begin:end] == (form if prob >= limit else PLAIN[begin:end])
    assert math.isclose(max(w.prob for w in found), 1)


def test_a_text_with_its_marks_stays(model: HRMModel) -> None:
    """An `el` in it is hardly ever an `él` that lost its accent."""
    assert restore(model, TEXT) == TEXT
    probs = []
    for text in ("—Si —dijo el.", f"{TEXT}\n—Sí —dijo el."):
        *_, word = Restorer(model).restore_words(text)
        assert word.form in ("el", "él")
        probs.append(word.prob if word.form == "él" else 1 - word.prob)
    assert probs[1] < probs[0]


def test_other_languages_and_code_stay(model: HRMModel) -> None:
    english = "Those people released another version, pina, without any warranty whatsoever.\n"
    code = "if not value and other is None or nina else nothing\n"
    spanish = "La nina buscó una pina en el jardin.\n"
    restored = restore(model, english + spanish + code + spanish)
    expected = "La niña buscó una piña en el jardín.\n"
    assert restored == english + expected + code + expected


def test_force_reconsiders_marks(model: HRMModel) -> None:
    wrong = "La nína buscó una píña en el jardin"
    assert restore(model, wrong) == "La nína buscó una píña en el jardín"
    assert restore(model, wrong, force=True) == "La niña buscó una piña en el jardín"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "utf-8-sig"])
def test_the_command_keeps_every_byte_between_words(
    trained: Path, run: Run, tmp_path: Path, encoding: str
) -> None:
    """Files of several blocks, in the encoding that they have."""
    strange = STRANGE if "utf" in encoding else "jardin.txt\r\n\ttres  años\n\n"
    text = (strange + PLAIN[:3000] + "\r\n\r\n") * (40 if encoding == "utf-8" else 1)
    if encoding == "latin-1":
        text = text.replace("—", "-")
    data = text.encode(encoding)
    (tmp_path / "text.txt").write_bytes(data)
    (tmp_path / "text.gz").write_bytes(gzip.compress(data))
    checkpoint = trained / "checkpoints" / "pretrain_best.pt"
    blocks = TextBlocks(tmp_path / "text.txt")
    read = "".join(blocks)
    assert b"".join(map(blocks.encode, [read[:100], read[100:]])) == data
    if encoding == "utf-8":
        assert read == text and len(list(blocks)) > 1
        return
    out = tmp_path / "out.txt"
    with open(out, "wb") as file:
        command = [sys.executable, "-m", "hrm_esp", "restore", "text.gz", "--ckpt", str(checkpoint)]
        subprocess.run(command, cwd=tmp_path, stdout=file, check=True)
    restored = out.read_bytes().decode(encoding)
    assert restored.startswith(strange) and "niña" in restored[len(strange) :]
    assert strip_accents(restored[len(strange) :]) == text[len(strange) :]


@pytest.mark.parametrize(
    "data, encoding",
    [
        (b"\xfe\xff" + "niña\r\n".encode("utf-16-be"), "utf-8"),
        (b"\xff\xfe" + "niña".encode("utf-16-le") + b"\x00\xd8", "utf-8"),
        ("niña\n".encode("utf-16-le"), "utf-16"),
        ("niña\n".encode("utf-32"), "utf-32"),
        (b"\xef\xbb\xbfnina\n\xff", "utf-8"),
        ("niña\n".encode(), "utf-8-sig"),
        ("niña\n".encode("cp850"), "cp850"),
        (b"", "utf-8"),
        (b"\n" * 40_000, "utf-8"),
        ("ñ".encode() * 40_000, "utf-8"),
    ],
)
def test_blocks_keep_every_byte(tmp_path: Path, data: bytes, encoding: str) -> None:
    (tmp_path / "text.txt").write_bytes(data)
    blocks = TextBlocks(tmp_path / "text.txt", encoding)
    assert b"".join(map(blocks.encode, blocks)) == data


def test_long_words_take_no_time(model: HRMModel) -> None:
    text = f"La {'na' * 500} buscó {'ne' * 60} {'nu' * 40} y una pina en el jardin. " + "nan" * 9000
    begin = time.perf_counter()
    restored = restore(model, text)
    assert time.perf_counter() - begin < 20
    assert restored == text.replace("pina", "piña").replace("jardin", "jardín")


def test_diff_and_json(trained: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Nada.\nLa nina guardo una pina\n\nen el jardin\n")
    flags = ("a.txt", "--ckpt", trained / "checkpoints" / "pretrain_best.pt")
    diff = run("restore", *flags, "--diff").stdout.splitlines()
    assert [line.rpartition(" ")[0] for line in diff] == [
        "2: nina -> niña", "2: guardo -> guardó", "2: pina -> piña", "4: jardin -> jardín",
    ]  # fmt: skip
    out = run("restore", *flags, "--json", "--min_p", "1")
    found = [json.loads(line) for line in out.stdout.splitlines()]
    assert [row["form"] for row in found] == ["niña", "guardó", "piña", "jardín"]
    n_unsure = sum(not row["changed"] for row in found)
    assert out.stderr == f"9 words, {4 - n_unsure} changed, {n_unsure} left as unsure\n"


def test_lines_are_restored_as_they_come(trained: Path) -> None:
    checkpoint = trained / "checkpoints" / "pretrain_best.pt"
    command = [sys.executable, "-m", "hrm_esp", "restore", "--ckpt", str(checkpoint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for line, expected in ((b"La nina.\n", "La niña.\n"), (b"El jardin.\n", "El jardín.\n")):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().decode() == expected
        process.stdin.close()


def test_models_that_cannot_restore(trained: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("La nina.\n")
    out = run("restore", "a.txt", "--ckpt", trained / "checkpoints" / "finetune_best.pt")
    assert out.returncode == 2 and "was finetuned" in out.stderr and not out.stdout
    with pytest.raises(HRMError, match="has no n-gram counts"):
        restore(random_model(count_max=0), "La nina.")
    for encoding in ("ascii", "utf-7", "unicode_escape", "base64", "idna", "cp500", "nothing"):
        out = run("restore", "a.txt", "--encoding", encoding)
        assert out.returncode == 2 and out.stderr.count("\n") == 1 and encoding in out.stderr
