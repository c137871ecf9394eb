"""What is scored is not trained on, whatever it is called and however it is stored."""

import gzip
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Run

ARGS = ("--steps", "1", *SMALL, "--overwrite")
BOOK = [f"Esta es la línea número {i} de un libro cualquiera." for i in range(60)]
HELD = [f"Otra cosa dijo el señor {i}, ¿verdad?" for i in range(20)]
WORDS = [f"niño {i}" for i in range(30)]  # each too short to be left out on its own


def text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


def trained_on(folder: Path) -> list[str]:
    """The documents of the training text."""
    return (folder / "checkpoints" / "corpus.tokens").read_bytes()[4096:].decode().splitlines()


def the_file_itself(folder: Path) -> str:
    (folder / "books" / "held.txt").write_text(text(HELD), "utf-8")
    return "books/held.txt"


def a_folder_inside(folder: Path) -> str:
    (folder / "books" / "held").mkdir()
    (folder / "books" / "held" / "a.txt").write_text(text(HELD[:9]), "utf-8")
    (folder / "books" / "held" / "b.txt").write_text(text(HELD[9:]), "utf-8")
    return "books/held"


def a_folder_and_a_copy(folder: Path) -> str:
    shutil.copytree(folder / a_folder_inside(folder), folder / "books" / "held (1)")
    return "books/held"


def stored_as(name: str, *contents: bytes) -> Callable[[Path], str]:
    """The held-out text is outside of the corpus, and inside in another form."""

    def make(folder: Path) -> str:
        (folder / "held.txt").write_text(text(HELD), "utf-8")
        for number, content in enumerate(contents):
            (folder / "books" / f"{number}{name}").write_bytes(content)
        return "held.txt"

    return make


def inside_another_book(folder: Path) -> str:
    (folder / "books" / "b.txt").write_text(text(BOOK[50:] + HELD + ["Fin."]), "utf-8")
    return stored_as(".txt")(folder)


def short_documents(folder: Path) -> str:
    (folder / "held.txt").write_text(text(WORDS), "utf-8")
    (folder / "books" / "b.txt").write_text(text([*BOOK[40:], *WORDS, "Fin."]), "utf-8")
    return "held.txt"


CASES = {
    "the file itself": the_file_itself,
    "a folder inside": a_folder_inside,
    "a folder and a copy": a_folder_and_a_copy,
    "a copy": stored_as(".txt", text(HELD).encode()),
    "gz": stored_as(".txt.gz", gzip.compress(text(HELD).encode())),
    "an old encoding and line endings": stored_as(
        ".txt", text(HELD).replace("\n", "\r\n").encode("latin-1")
    ),
    "decomposed letters": stored_as(".txt", unicodedata.normalize("NFD", text(HELD)).encode()),
    "inside another book": inside_another_book,
    "short documents": short_documents,
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_held_out_text_is_not_trained_on(
    run: Run, tmp_path: Path, make: Callable[[Path], str]
) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(text([*BOOK, "niño 3"]), "utf-8")
    out = run("pretrain", "books", "--val", make(tmp_path), *ARGS)
    assert out.returncode == 0, out.stderr
    read = trained_on(tmp_path)
    assert set(read) >= {*BOOK, "niño 3"} and set(read) - {*BOOK, "Fin.", "niño 3"} == set()
    is_inside = make in (the_file_itself, a_folder_inside)
    n = 0 if is_inside else 30 if make is short_documents else 20
    said = f"left out of the training text: {n} documents"
    assert (said in out.stderr) == (n > 0), out.stderr
    assert "of the held-out text" not in out.stderr


@pytest.mark.parametrize("sep", ["stanza", "file"])
def test_a_poem_that_is_nearly_the_same_is_not_trained_on(
    run: Run, tmp_path: Path, sep: str
) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "held.txt").write_text(text(HELD), "utf-8")
    (tmp_path / "books" / "a.txt").write_text(text([*BOOK, HELD[3]]), "utf-8")
    (tmp_path / "books" / "b.txt").write_text(text(["Título", *HELD, "Fin."]), "utf-8")
    out = run("pretrain", "books", "--val", "held.txt", "--sep", sep, *ARGS)
    assert trained_on(tmp_path) == [*BOOK, HELD[3]], out.stderr
    assert "5% of the held-out text" in out.stderr  # a line of another text


def test_another_held_out_text_is_another_training_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(text(BOOK + HELD), "utf-8")
    for lines in (HELD[:10], HELD[10:]):
        (tmp_path / "held.txt").write_text(text(lines), "utf-8")
        out = run("pretrain", "books", "--val", "held.txt", *ARGS)
        assert out.returncode == 0 and not set(trained_on(tmp_path)) & set(lines), out.stderr


@pytest.mark.parametrize("name", ["corpus", "copy.txt"])
def test_nothing_but_held_out_text_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "corpus").mkdir()
    for path in (tmp_path / "corpus" / "a.txt", tmp_path / "copy.txt"):
        path.write_text(text(BOOK), "utf-8")
    out = run("pretrain", "corpus", "--val", name, *ARGS)
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "--val" in out.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_what_the_training_text_has_is_not_scored(run: Run, tmp_path: Path) -> None:
    """In the tail of a corpus that is held out by default."""
    (tmp_path / "a.txt").write_text(text([*BOOK, *HELD, BOOK[7], "Fin."]), "utf-8")
    args = ("pretrain", "a.txt", "--set", "val_fraction=0.3", *ARGS)
    out = run(*args)
    assert "left out of the held-out text: 1 documents (52 bytes)" in out.stderr
    scored = int(out.stderr.split("held out: ")[1].split(" bytes")[0].replace(",", ""))
    assert trained_on(tmp_path) == [*BOOK, *HELD, BOOK[7], "Fin."]  # of which the tail is held out
    assert scored <= 0.3 * (tmp_path / "a.txt").stat().st_size - 52
    (tmp_path / "a.txt").write_text(text(BOOK + HELD), "utf-8")
    out = run(*args)
    assert "left out" not in out.stderr and "of the held-out text" not in out.stderr


def test_a_tail_that_is_all_repeated_is_scored_with_a_warning(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(BOOK + BOOK[:12]), "utf-8")
    out = run("pretrain", "a.txt", "--set", "val_fraction=0.15", *ARGS)
    assert out.returncode == 0 and "100% of the held-out text" in out.stderr
    assert "left out" not in out.stderr and "bits per byte" in out.stdout


def test_held_out_pairs_are_not_trained_on(run: Run, tmp_path: Path) -> None:
    """Nor pairs that differ in spaces or in how an accent is written. The prompt of a held-out pair
    with another target is trained on."""
    held = [("¿qué año?", "mil"), ("dos palabras", "dos")]
    same = [("dos  palabras ", "dos"), (unicodedata.normalize("NFD", "¿qué año?"), " mil")]
    kept = [("dos palabras", "tres"), ("dospalabras", "dos"), *((str(i), "x") for i in range(8))]
    for name, pairs in (("a.tsv", [*held, *same, *kept]), ("held.tsv", held)):
        (tmp_path / name).write_text("".join(f"{p}\t{t}\n" for p, t in pairs), "utf-8")
    args = ("finetune", "a.tsv", "--from_scratch", "--size", "tiny", "--steps", "1")
    out = run(*args, "--val", "held.tsv")
    assert f" {len(kept)} rows, 2 held out" in out.stderr, out.stderr
