"""People's files as they are: what is read of each, and what is said about it."""

import csv
import gzip
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT, Run

from hrm_esp.data import PairColumns, dataset_tsv, load_stream, read_table, write_table
from hrm_esp.errors import HRMError

SPANISH = "La niña preguntó: «¿Cuándo volverá papá?»\nEl señor cayó al río.\n"
CURLY = "—¿Qué dijo? —“Nada”, contestó…\n"
VERSE = "Sube la luna\ndespacio,\n\nque nadie la vio subir\n  y nadie la vio bajar.\n"
ROWS = [("¿qué?", "eso"), ("el año; sí", "dos, tres"), ('dijo "no"', "uno\ndos")]


Case = tuple[bytes, Any, str, str, dict[str, Any]]


def case(
    content: bytes | str, expected: object, said: str = "", name: str = "", **options: object
) -> Case:
    """A file: what is read of it (``None`` if it is refused), and a part of what is said."""
    data = content.encode() if isinstance(content, str) else content
    return data, expected, said, name, options


def read_and_said(
    path: Path, data: bytes, read: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """What is read of a file (``None`` if it is refused), and what is said."""
    path.write_bytes(data)
    try:
        found, error = read(path), ""
    except HRMError as refused:
        found, error = None, str(refused)
        assert "\n" not in error
    return found, capsys.readouterr().err + error


GUTENBERG = (
    "The Project Gutenberg eBook of X\n\nTitle: X\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n"
    "Uno.\n\nDos.\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nThis eBook is for anyone.\n"
)
TEXTS = {
    "utf-8": case(SPANISH, SPANISH),
    "utf-8 with a mark": case(b"\xef\xbb\xbf" + SPANISH.encode(), SPANISH),
    "windows line endings": case(SPANISH.replace("\n", "\r\n"), SPANISH),
    "old mac line endings": case(SPANISH.replace("\n", "\r"), SPANISH),
    "no line break at the end": case(SPANISH.strip(), SPANISH),
    "gz": case(gzip.compress(SPANISH.encode()), SPANISH, name="a.TXT.GZ"),
    "utf-16 with a mark": case(SPANISH.encode("utf-16"), SPANISH, "UTF-16"),
    "big-endian utf-16": case(b"\xfe\xff" + SPANISH.encode("utf-16-be"), SPANISH, "UTF-16"),
    "utf-16 without a mark": case(SPANISH.encode("utf-16-le"), None, "--encoding utf-16-le"),
    "utf-16 without a mark, named": case(
        SPANISH.encode("utf-16-le"), SPANISH, encoding="utf-16-le"
    ),
    "latin-1": case(SPANISH.encode("latin-1"), SPANISH, "--encoding latin-1"),
    "cp1252": case(CURLY.encode("cp1252"), CURLY, "--encoding cp1252"),
    "cp1252, named": case(CURLY.encode("cp1252"), CURLY, encoding="cp1252"),
    "an old mac's": case(SPANISH.encode("mac_roman"), SPANISH, "mac_roman"),
    "cp1252, only dashes": case("— No se. —Ya.\n".encode("cp1252"), "— No se. —Ya.\n", "cp1252"),
    "dos": case("La niña preguntó.\n".encode("cp850"), "La niña preguntó.\n", "cp850"),
    "a line of latin-1": case(
        (SPANISH * 9).encode() + b"ca\xf1a\n", SPANISH * 9 + "caa\n", "try --encoding latin-1"
    ),
    "a mark against the flag": case(
        b"\xef\xbb\xbf" + SPANISH.encode(), SPANISH, "as its byte order mark", encoding="latin-1"
    ),
    "files joined with their marks": case("uno\n\ufeffdos\n", "uno\ndos\n"),
    "a stray byte": case(
        b"a\xff" + TEXT.encode() * 3, "a" + TEXT * 3 + "\n", "skipped 1 bytes"
    ),
    "utf-8 saved twice": case(
        SPANISH.encode().decode("latin-1"), SPANISH.encode().decode("latin-1"), "iconv"
    ),
    "utf-8 read as latin-1": case(
        SPANISH, SPANISH.encode().decode("latin-1"), "leave out --encoding latin-1",
        encoding="latin-1",
    ),
    "a nul": case(
        "uno\ndos\0\n" + SPANISH, "uno\ndos\n" + SPANISH, "1 NUL bytes, the first in line 2"
    ),
    "binary": case(bytes(range(16)) * 40, None, "is not text"),
    "nothing": case("\n \n", None, "no text"),
    "licence": case(GUTENBERG, "Uno.\nDos.\n", "cut 6 lines"),
    "licence, kept": case(GUTENBERG, "".join(
        line + "\n" for line in GUTENBERG.split("\n") if line), keep_licence=True),
    "the end of a licence alone": case(
        "Uno.\n*** END OF THIS PROJECT GUTENBERG EBOOK\nx\n", "Uno.\n", "cut 2"
    ),
    "stars of a text": case("Uno\n*** END OF THE FIRST PART ***\nx\n",
                                 "Uno\n*** END OF THE FIRST PART ***\nx\n"),
    "wrapped lines": case("uno\ndos\n\ntres\n", "uno dos\ntres\n", sep="blank"),
    "stanzas": case(
        VERSE, "Sube la luna\rdespacio,\nque nadie la vio subir\r  y nadie la vio bajar.\n",
        sep="stanza",
    ),
    "a poem a file": case(
        "\n" + VERSE, VERSE.strip("\n").replace("\n", "\r") + "\n", sep="file"
    ),
    "word": case(b"PK\3\4", None, "-t plain --wrap=none -o a.txt", name="a.docx"),
    "pdf": case(b"%PDF-1.4", None, "a.pdf a.txt, then --sep blank", name="a.pdf"),
    "a page": case("<p>hola</p>", None, "a.HTML -t plain --wrap=none", name="a.HTML"),
    "a spreadsheet": case(b"PK\3\4", None, "CSV", name="a.xlsx"),
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Case) -> None:
    data, expected, said, name, options = text

    def read(path: Path) -> str:
        return load_stream([path], **options).tobytes().decode()

    found, shown = read_and_said(tmp_path / (name or "a.txt"), data, read, capsys)
    assert found == expected
    assert said in shown and shown.count("\n") <= 1
    if expected is not None and not said:
        assert not shown


def csv_bytes(rows: list[tuple[str, str]], encoding: str = "utf-8", **options: object) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows(rows)
    return file.getvalue().encode(encoding)


def jsonl(*names: str) -> str:
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in ROWS)


HEADER = [("pregunta", "respuesta")]
SENTENCES = [(f"una frase {i}", f"otra frase {i}") for i in range(9)]
TABLES = {
    "tsv": case("uno\t1\n\ndos\t2\n", [("uno", "1"), ("dos", "2")], "tab", "a.tsv"),
    "tsv in capitals": case("uno\t1\n", [("uno", "1")], "tab", "A.TSV"),
    "tsv with quotes of its own": case(
        '"Sí", dijo.\t"No".\n"x\ty\n', [('"Sí", dijo.', '"No".'), ('"x', "y")], "tab", "a.tsv"
    ),
    "excel-tab": case(csv_bytes(ROWS, dialect="excel-tab"), ROWS, "tab", "a.tsv"),
    "quotes that are not a spreadsheet's": case(
        'a\tb\n"c\td\ne\tf "\n', [("a", "b"), ('"c', "d"), ("e", 'f "')], "tab", "a.tsv"
    ),
    "excel-tab, all quoted": case(
        '"a"\t"b"\n"c"\t"d"\n', [("a", "b"), ("c", "d")], "quotes around cells removed", "a.tsv"
    ),
    "excel with its separator": case("sep=;\npregunta;respuesta\na, b;c\n", [("a, b", "c")]),
    "a row of latin-1 in utf-8": case(
        "año;niño\n".encode() * 9 + b"a\xf1o;y\n", [("año", "niño")] * 9 + [("ao", "y")],
        "skipped 1",
    ),
    "more cells than the header": case(
        "prompt,target\nhola, que tal,bien\n", [("hola", " que tal")],
        "warning: ",
    ),
    "further tabs under a header": case(
        "prompt\ttarget\nhola\tuno\tdos\n", [("hola", "uno\tdos")], "further tabs", "a.tsv"
    ),
    "one column with commas": case(
        "Frase mal escrita\nhola, que\nbien\n",
        [("Frase mal escrita", ""), ("hola, que", ""), ("bien", "")], "one column",
    ),
    "one column with quotes": case(
        'Frase\n"dijo ""no"", y\nse fue"\nbien\n',
        [("Frase", ""), ('dijo "no", y\nse fue', ""), ("bien", "")], "one column",
    ),
    "one column, named": case("a\nx, y\n", [("x, y", "")], "one column", prompt_col="a"),
    "a teacher's header": case(
        "Frase mal escrita;Frase corregida\nhola;Hola\n", [("hola", "Hola")],
        "target: Frase corregida",
    ),
    "a teacher's header of three": case(
        "Frase mal escrita;Frase corregida;Curso\nhola;Hola;1\n", None,
        "which columns are prompt and target? It has Frase mal escrita (hola), Frase corregida "
        "(Hola), Curso (1): give --prompt_col and --target_col, a name or a number",
    ),
    "a column of row numbers": case(
        "nº;Frase;Corrección\n7;hola;Hola\n7;ola;Hola\n", [("hola", "Hola"), ("ola", "Hola")],
        "prompt: Frase; target: Corrección; not read: nº",
    ),
    "row numbers without a header": case(
        "1;ola;hola\n2;abion;avión\n", [("ola", "hola"), ("abion", "avión")], "warning: "
    ),
    "row numbers of a tsv": case(
        "1.\tola\thola\n2.\tabion\tavión\n", [("ola", "hola"), ("abion", "avión")],
        "not read: column 1", "a.tsv",
    ),
    "row numbers and names": case(
        "1;Ana;ola;hola\n2;;abion;avión\n", None, "It has column 1 (1), column 2 (Ana), column 3 "
        "(ola), column 4 (hola): give --prompt_col and --target_col, a number",
    ),
    "row numbers and names in a tsv": case(
        "1\tAna\tola\thola\n2\tEva\tabion\tavión\n", None, "column 2 (Ana)", "a.tsv",
    ),
    "columns of a tsv by number": case(
        "1\tAna\tola\thola\n2\tEva\tabion\tavión\n", [("ola", "Ana"), ("abion", "Eva")], "tab",
        "a.tsv", prompt_col="3", target_col="2",
    ),
    "numbers that do not count the rows": case(
        "31;treinta y uno;thirty-one\n78;setenta y ocho;seventy-eight\n", None, "column 1 (31)"
    ),
    "two columns, the first counts the rows": case(
        "1;uno\n2;dos\n", [("1", "uno"), ("2", "dos")], "prompt: column 1"
    ),
    "only the prompt is named": case(
        "nº,alumno,frase,corrección\n1,Ana,ola,hola\n", [("ola", "hola")],
        "not read: nº, alumno", prompt_col="frase",
    ),
    "no column after the prompt": case(
        "frase,corrección,curso\nola,hola,1\n", None, "which column is the target?",
        prompt_col="3",
    ),
    "a header with a line break": case(
        '"Frase\nmal escrita";b;c\nola;hola;1\n', [("ola", "hola")], "prompt: Frase mal escrita;",
        prompt_col="frase mal escrita",
    ),
    "one column wanted, the other one of training": case(
        "a;b;c\nx;y;z\n", [("y", "x")], prompt_col="b", trained=PairColumns("c", "a", 3)
    ),
    "columns of training": case(
        "a;b;c\nx;y;z\n", [("z", "x")], "not read: b", trained=PairColumns("C", "a", 5)
    ),
    "known names before numbers of training": case(
        "x;pregunta;respuesta\na;q;r\n", [("q", "r")], trained=PairColumns("1", "2", 3)
    ),
    "row numbers without a name": case(
        ",frase,corrección\n0,ola,hola\n1,baca,vaca\n", [("ola", "hola"), ("baca", "vaca")],
        "target: corrección; not read: column 1",
    ),
    "a number is no name": case(
        "1;Título de un libro\n2;Cien años\n", [("1", "Título de un libro"), ("2", "Cien años")],
        "no header",
    ),
    "a column of answers": case("pregunta;x;answer\nq;1;a\n", [("q", "a")], "not read: x"),
    "columns that excel left empty": case(
        "Frase;Corrección;;\nola;hola;;\n", [("ola", "hola")], "target: Corrección"
    ),
    "excel-tab with commas": case(
        '"ola, ana"\thola\n"dijo ""no"""\tsí\n', [("ola, ana", "hola"), ('dijo "no"', "sí")],
        "tab", "a.tsv",
    ),
    "one known name": case("texto,resumen\nuno,dos\n", [("uno", "dos")], "target: resumen"),
    "three columns, unknown": case("uno;dos;tres\n", None, "column 3 (tres)"),
    "the same column twice": case("a;b\n", None, "the same", prompt_col="1", target_col="1"),
    "instructions": case(
        '{"instruction": "a", "input": "", "output": "b"}\n', [("a", "b")], "not read: input",
        "a.jsonl",
    ),
    "half a character in json": case(
        '{"prompt": "a\\ud800", "target": "b\\u0000"}\n', [("a", "b")], "JSON", "a.jsonl"
    ),
    "deep json": case('{"prompt": ' + "[" * 10**5, None, "line 1 is not JSON", "a.jsonl"),
    "a backslash and an n": case(r"a;\\nu", [("a", r"\nu")], "semicolon"),
    "excel": case(csv_bytes(ROWS, dialect="excel"), ROWS, "comma"),
    "spanish excel": case(
        csv_bytes(HEADER + ROWS, "cp1252", delimiter=";"), ROWS, "semicolon; latin-1"
    ),
    "spanish excel with curly quotes": case(
        csv_bytes([("“sí”", "año")], "cp1252", delimiter=";"), [("“sí”", "año")], "cp1252"
    ),
    "excel's utf-8": case(
        b"\xef\xbb\xbf" + csv_bytes(ROWS, delimiter=";"), ROWS, "semicolon; prompt"
    ),
    "excel's unicode text": case(
        csv_bytes(ROWS, "utf-16", dialect="excel-tab"), ROWS, "tab; utf-16", "a.txt"
    ),
    "all quoted": case(csv_bytes(ROWS, quoting=csv.QUOTE_ALL), ROWS, "comma"),
    "gz": case(gzip.compress(csv_bytes(ROWS)), ROWS, "comma", "a.csv.gz"),
    "a header": case(csv_bytes(HEADER + ROWS), ROWS, "prompt: pregunta; target: respuesta"),
    "a header of other names": case(
        csv_bytes([("frase", "versión"), *SENTENCES]), SENTENCES, "prompt: frase; target: versión"
    ),
    "no header": case("gato;cat\nperro;dog\n", [("gato", "cat"), ("perro", "dog")],
                            "no header, first row: gato -> cat"),
    "columns by name": case(
        "id,b,a\n1,x,y\n", [("y", "x")], "not read: id", prompt_col="a", target_col="B"
    ),
    "columns by number": case("1,x,y\n", [("y", "x")], prompt_col="3", target_col="2"),
    "a column that is not there": case("a;b\nx;y\n", None, "are a, b", prompt_col="c"),
    "a column of many digits": case("a;b\nx;y\n", None, "has 2 columns", prompt_col="9" * 5000),
    "jsonl": case(jsonl("prompt", "completion"), ROWS, "JSON", "a.jsonl"),
    "jsonl of questions": case(jsonl("question", "answer"), ROWS, "JSON", "a.JSONL"),
    "jsonl of text": case('{"text": "uno"}\n', [("uno", "")], "no target", "a.jsonl"),
    "jsonl of other keys": case(jsonl("x", "y"), None, "Its keys are x, y", "a.jsonl"),
    "jsonl of other keys, named": case(
        jsonl("y", "x"), ROWS, "JSON", "a.jsonl", prompt_col="y", target_col="x"
    ),
    "bad json": case('{"prompt": "a"}\n{"prompt"\n', None, "line 2", "a.jsonl"),
    "no object": case("[1]\n", None, "line 1", "a.jsonl"),
    "an unclosed quote": case('a;b\nc;"d\ne;f\n', None, "line 2"),
    "no second column": case("uno\ndos\n", [("uno", ""), ("dos", "")], "2 of 2 rows"),
    "some without a target": case("a;b\nc;\nd;e\n", [("a", "b"), ("c", ""), ("d", "e")],
                                        "1 of 3 rows have no target"),
    "on purpose": case("a;b\nc;\n", [("a", "b"), ("c", "")], "without target: 1", lm=True),
    "duplicates": case("a;b\na;b\n", [("a", "b")] * 2, "duplicates: 1"),
    "contradictions": case("a;b\na;c\n", [("a", "b"), ("a", "c")], "another target: 2"),
    "commas without quotes": case(
        "a,b\nc,d\ne,f,g\n", [("a", "b"), ("c", "d"), ("e", "f")], "another number of cells: 1"
    ),
    "further tabs under a header of two": case(
        "prompt\ttarget\nhola\tuno\nsí\tuno\tdos\n", [("hola", "uno"), ("sí", "uno\tdos")],
        "part of the target: 1", "a.tsv",
    ),
    "further tabs": case(
        "a\tb\nc\td\te\n", [("a", "b"), ("c", "d\te")], "further tabs", "a.tsv"
    ),
    "empty columns at the end": case("a\tb\t\t\n", [("a", "b")], "tab", "a.tsv"),
    "escaped breaks": case(r"a;uno\ndos", [("a", "uno\ndos")], r"written as \n: 1"),
    "a spreadsheet itself": case(b"PK\3\4", None, "export it as CSV", "a.ods"),
    "nothing": case("\n", None, "no rows"),
    "a header alone": case("prompt,target\n", None, "only a header"),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], table: Case) -> None:
    data, rows, said, name, options = table

    def read(path: Path) -> list[tuple[bytes, bytes]]:
        pairs = dataset_tsv(path, **options).pairs
        return [(p.prompt, b"" if p.lm else p.target) for p in pairs]

    found, shown = read_and_said(tmp_path / (name or "a.csv"), data, read, capsys)
    expected = rows and [tuple(c.replace("\n", "\r").encode() for c in row) for row in rows]
    assert found == expected and said in shown


PHRASES = ["Ola, que tal", "Fui al mercado, compré pan, leche y huevos", "Sí, claro", "Bueno"]
LINES = "".join(line + "\n" for line in PHRASES)
PROMPTS = {
    "excel": case("".join(f'"{p}"\n' if "," in p else p + "\n" for p in PHRASES), PHRASES),
    "spanish excel": case(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(), PHRASES),
    "spanish excel, old": case(LINES.encode("cp1252"), PHRASES, "latin-1; prompt: column 1"),
    "with a header": case("Oraciones\n" + LINES, PHRASES, "prompt: Oraciones"),
    "with a header of training": case(
        "Mal escritas\n" + LINES, PHRASES, "prompt: Mal escritas",
        trained=PairColumns("mal escritas", "bien", 4),
    ),
    "a comma in each row": case("Ola, que tal\nSí, claro\n", ["Ola, que tal", "Sí, claro"]),
    "one row": case("Ola, que tal\n", ["Ola, que tal"]),
    "semicolons": case("Vine; vi\nFui; volví; vencí\n", ["Vine; vi", "Fui; volví; vencí"]),
    "columns that excel left empty": case("Frase;\nOla, que tal;\n", ["Ola, que tal"]),
    "tsv": case(
        'Frase\n"Ola, que tal"\n"Dijo ""no"""\n', ["Ola, que tal", 'Dijo "no"'], "", "a.tsv"
    ),
    "two columns": case("ola, ana;hola\neva, sí;Eva\n", ["ola, ana", "eva, sí"], "semicolon"),
    "two columns typed by hand": case("frase, corrección\nola, hola\n", ["ola"], "prompt: frase"),
    "numbered": case("nº;Frase\n1;ola\n2;abion\n", ["ola", "abion"], "prompt: Frase; not read: nº"),
    "more columns": case("Alumno;Frase;Curso\nAna;ola;1\n", ["Ana"], "warning: "),
    "a comma in each row, but another column wanted": case(
        "hola, ola\nvaca, baca\n", [" ola", " baca"], "comma; prompt: column 2", prompt_col="2"
    ),
    "columns of training": case(
        "Alumno;Frase;Curso\nAna;ola;1\n", ["ola"], "a.csv: ",
        trained=PairColumns("frase", "corrección", 3),
    ),
    "numbers of training": case(
        "1;Ana;ola\n2;Eva;baca\n", ["ola", "baca"], "warning: ", trained=PairColumns("3", "4", 4)
    ),
    "numbers of training, one column": case(LINES, PHRASES, trained=PairColumns("1", "2", 2)),
    "numbers of training and a header": case(
        "tema;pregunta\nola;q\n", ["q"], trained=PairColumns("1", "2", 2)
    ),
    "numbers of training, more columns": case(
        "1;Ana;ola\n2;Eva;baca\n", ["Ana", "Eva"], "warning: ", trained=PairColumns("1", "2", 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_prompts_of_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: Case
) -> None:
    data, expected, said, name, options = prompts

    def read(path: Path) -> list[str]:
        table = read_table(path, prompts_only=True, **options)
        print(table.describe(), file=sys.stderr)
        return table.prompts()

    found, shown = read_and_said(tmp_path / (name or "a.csv"), data, read, capsys)
    assert found == expected and said in shown
    assert said or "warning" not in shown


def test_held_out_pairs_have_the_columns_of_the_training_pairs(tmp_path: Path) -> None:
    from hrm_esp import FinetuneConfig
    from hrm_esp.training.finetune import load_pairs

    (tmp_path / "a.csv").write_text("nº;frase;corrección\n1;ola;hola\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("frase;curso;corrección\nbaca;1;vaca\n", encoding="utf-8")
    data, held_out = load_pairs(tmp_path / "a.csv", tmp_path / "b.csv", 32, FinetuneConfig())
    assert [(p.prompt, p.target) for p in held_out] == [(b"baca", b"vaca")]
    assert data.columns == ("frase", "corrección", 3)


def test_a_list_of_excel_gets_its_answers_in_a_column_of_excel(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    """Spanish Excel separates columns by semicolons, and opens no others."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "es.csv").write_bytes(LINES.replace("\n", "\r\n").encode("cp1252"))
    (tmp_path / "en.csv").write_bytes(csv_bytes([(p,) for p in PHRASES]))  # type: ignore[misc]
    for name, separator in (("es.csv", ";"), ("en.csv", ",")):
        out = run("generate", "--prompts", name, "-o", f"out_{name}", "--max_new_tokens", "2")
        assert out.returncode == 0, out.stderr
        text = (tmp_path / f"out_{name}").read_text("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text), delimiter=separator))
        assert [row[0] for row in rows] == PHRASES and all(len(row) == 2 for row in rows)


def test_a_finetuned_model_knows_its_columns(trained: Path, run: Run, tmp_path: Path) -> None:
    rows = [("nº", "alumno", "frase", "corrección")]
    rows += [(str(i + 1), "Ana", f"abion {i}", f"avión {i}") for i in range(9)]
    (tmp_path / "t.csv").write_bytes(csv_bytes(rows))  # type: ignore[arg-type]
    (tmp_path / "list.csv").write_text("alumno;frase\nAna;ola\n", encoding="utf-8")
    start = trained / "checkpoints" / "pretrain_best.pt"
    args = ("finetune", "t.csv", "--ckpt", start, "--steps", "2")
    out = run(*args)
    assert out.returncode == 2 and not (tmp_path / "checkpoints").exists()
    assert out.stderr.splitlines()[-1].endswith(
        "t.csv: which columns are prompt and target? It has nº (1), alumno (Ana), frase (abion 0), "
        "corrección (avión 0): give --prompt_col and --target_col, a name or a number"
    )
    columns = ("--prompt_col", "frase", "--target_col", "corrección")
    assert run(*args, *columns).returncode == 0
    assert "\ncolumns     prompt: frase; target: corrección\n" in run("info").stdout
    understood = "prompt: frase; target: corrección; not read: nº, alumno"
    for command in (("evaluate", "t.csv"), ("evaluate", "t.csv", "--by", "word")):
        out = run(*command)
        assert out.returncode == 0 and understood in out.stderr
        assert out.stdout == run(*command, *columns).stdout
    out = run("generate", "--prompts", "list.csv", "--json", "--max_new_tokens", "1")
    assert json.loads(out.stdout)["prompt"] == "ola" and "warning" not in out.stderr
    out = run("generate", "--prompts", "list.csv", "--json", "--max_new_tokens", "1",
              "--prompt_col", "alumno")  # fmt: skip
    assert json.loads(out.stdout)["prompt"] == "Ana"
    assert (
        "prompt: alumno; target: frase"
        in run("evaluate", "t.csv", "--prompt_col", "alumno", "--target_col", "frase").stderr
    )
    out = run(*args, "--prompt_col", "2", "--target_col", "3", "--resume")
    assert out.returncode == 2 and "data changed" in out.stderr
    out = run(*args, "--prompt_col", "3", "--target_col", "4", "--resume")  # the same pairs
    assert out.returncode == 0, out.stderr
    assert "columns     prompt: frase" in run("info").stdout
    content = torch.load(tmp_path / "checkpoints" / "finetune_best.pt", weights_only=True)
    for name in ("prompt_col", "target_col", "n_columns"):
        del content["origin"]["finetune"][name]
    torch.save(content, tmp_path / "old.pt")
    assert "columns" not in run("info", "old.pt").stdout
    out = run("evaluate", "t.csv", "--ckpt", "old.pt")
    assert out.returncode == 2 and "which columns" in out.stderr


def test_the_same_pairs_in_any_form_are_the_same_batches(tmp_path: Path) -> None:
    from hrm_esp.cli.commands import NUMBERS

    lines = NUMBERS.read_text("utf-8").splitlines()[:300]
    rows = [(n, f"¡{words}, señor!") for n, words in (line.split("\t") for line in lines)]
    (tmp_path / "a.tsv").write_text("".join(f"{p}\t{t}\n" for p, t in rows), encoding="utf-8")
    (tmp_path / "b.csv").write_bytes(csv_bytes(HEADER + rows, "cp1252", delimiter=";"))
    (tmp_path / "c.csv").write_bytes(csv_bytes(HEADER + rows, quoting=csv.QUOTE_ALL))
    objects = (json.dumps({"input": p, "output": t}) for p, t in rows)
    (tmp_path / "d.jsonl").write_text("\n".join(objects), encoding="utf-8")
    batches = []
    for name in ("a.tsv", "b.csv", "c.csv", "d.jsonl"):
        found = dataset_tsv(tmp_path / name, 64).batches(lambda: (2, 1), seed=0, epoch=0)
        batches.append([[None if x is None else x.tolist() for x in batch] for _, batch in found])
    assert len(batches[0]) > 100 and all(other == batches[0] for other in batches)


def notebook_folder(folder: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("secreto")
    (folder / "a.ipynb").write_text("{}")


def macos_folder(folder: Path) -> None:
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("books/b.txt", "dos\n")
        archive.writestr("books/._b.txt", b"\0\5\x16\7\0secreto")
        archive.writestr("__MACOSX/books/._b.txt", b"\0\5\x16\7\0secreto")
        archive.writestr("books/.DS_Store", b"\0\0\0\1Bud1secreto")
    with zipfile.ZipFile(folder / "all.zip") as archive:
        archive.extractall(folder)


def linked_folder(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "b.txt").write_text("dos\n")
    (folder / "link").symlink_to(folder / "other")
    (folder / "other" / "loop").symlink_to(folder)
    (folder / "c.txt").symlink_to(folder / "a.txt")


def folder_of_documents(folder: Path) -> None:
    for name in ("x.docx", "y.DOCX", "z.pdf", "w.epub", "data.csv", "noending"):
        (folder / name).write_bytes(b"secreto")
    (folder / "B.TXT").write_text("dos\n")


FOLDERS = [
    (notebook_folder, "uno\n", "1 hidden, 1 .ipynb"),
    (macos_folder, "uno\ndos\n", "3 hidden"),
    (linked_folder, "uno\ndos\n", ""),
    (folder_of_documents, "dos\nuno\n", "pandoc"),
]


@pytest.mark.parametrize(
    ("make", "read", "said"), FOLDERS, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_folder(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    read: str,
    said: str,
) -> None:
    (tmp_path / "a.txt").write_text("uno\n")
    make(tmp_path)
    assert load_stream([tmp_path]).tobytes().decode() == read
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == bool(said)


def test_a_folder_without_text_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(HRMError, match=r"1 \.docx.*pandoc"):
        load_stream([tmp_path])


def test_copies_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"Esta es la línea número {i} de un libro." for i in range(200)]
    for name, content in {
        "a.txt": lines,
        "b.txt": [*lines[:195], "Otra.", "línea más."],  # nearly the same
        "c.txt": [f"Otro libro, línea {i}." for i in range(200)],
    }.items():
        (tmp_path / name).write_text("\n".join(content), encoding="utf-8")
    (tmp_path / "d.txt").write_text("\r\n".join(lines), encoding="utf-8")
    load_stream([tmp_path])
    shown = capsys.readouterr().err
    assert "an earlier one: 2, " in shown and "c.txt" not in shown
    (tmp_path / "b.txt").unlink()
    (tmp_path / "d.txt").unlink()
    load_stream([tmp_path])
    assert not capsys.readouterr().err
    (tmp_path / "e.txt").write_text("Capítulo I\nFin\n", encoding="utf-8")
    (tmp_path / "f.txt").write_text("Capítulo I\nFin\n", encoding="utf-8")
    load_stream([tmp_path])
    assert not capsys.readouterr().err
    (tmp_path / "g.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    load_stream([tmp_path], sep="file")
    assert "an earlier one: 1, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [("a" * 3000, "one document of"), ("un solo documento, sin más\n", "one document of"),
     ("abc", "one document of"), ("a\nb\n" * 50, "documents")],
    ids=["one line", "one document", "three bytes", "many"],
)  # fmt: skip
def test_any_corpus_is_described_and_trained_on(
    run: Run, tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    out = run("pretrain", "a.txt", "--steps", "1", "--size", "tiny", *SMALL)
    assert out.returncode == 0, out.stderr
    (line,) = [line for line in out.stderr.splitlines() if line.startswith("corpus: ")]
    assert said in line and "--size tiny" not in out.stderr


def test_verse_is_noticed_and_kept(run: Run, tmp_path: Path) -> None:
    stanza = (
        "Sube la luna despacio\ncon un farol en la mano,\ny en la puerta de la venta\n"
        "se ha dormido un perro blanco"
    )
    (tmp_path / "verse.txt").write_text("\n\n".join([f"{stanza} {i}." for i in range(40)]), "utf-8")
    (tmp_path / "prose.txt").write_text(TEXT, "utf-8")
    args = ("--steps", "2", *SMALL, "--overwrite")
    assert "--sep stanza" in run("pretrain", "verse.txt", *args).stderr
    assert "--sep stanza" not in run("pretrain", "prose.txt", *args).stderr
    out = run("pretrain", "verse.txt", *args, "--sep", "stanza")
    assert out.returncode == 0 and "--sep stanza" not in out.stderr
    score = json.loads(run("evaluate", "verse.txt", "--json").stdout)  # separated as in training
    assert score["n"] == sum(len(f"{stanza} {i}.".encode()) + 1 for i in range(40))
    prompt = "Sube la luna\ncon un farol\n"
    out = run("generate", "--prompt", prompt, "--max_new_tokens", "40", "--seed", "1")
    assert out.stdout.startswith(prompt) and "\r" not in out.stdout


def test_prompts_of_a_table_and_answers_as_a_new_column(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "q.csv").write_bytes(
        csv_bytes([("tema", "pregunta"), ("a", "1\n2"), ("b", "¿7?")], "cp1252", delimiter=";")
    )
    args = ("generate", "--prompts", "q.csv", "--max_new_tokens", "6")
    out = run(*args, "-o", "answers.csv")
    assert out.returncode == 0 and "prompt: pregunta" in out.stderr, out.stderr
    answers = read_table(tmp_path / "answers.csv", target_col="answer")
    assert answers.names == ["tema", "pregunta", "answer"] and answers.separator == ";"
    assert [cells[:2] for cells in answers.cells] == [["a", "1\n2"], ["b", "¿7?"]]
    shown = [json.loads(line) for line in run(*args, "--json").stdout.splitlines()]
    assert [s["prompt"] for s in shown] == ["1\n2", "¿7?"]
    assert [s["text"] for s in shown] == [cells[2] for cells in answers.cells]
    assert run(*args, "-o", "q.csv").returncode == 2  # not over the questions
    out = run(*args, "-o", "a.jsonl", "--num_samples", "2", "--temperature", "1")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert [row["tema"] for row in rows] == ["a", "a", "b", "b"]
    (tmp_path / "plain.txt").write_text("uno\ndos\n")
    out = run("generate", "--prompts", "plain.txt", "-o", "p.tsv", "--max_new_tokens", "3")
    assert read_table(tmp_path / "p.tsv").prompts() == ["uno", "dos"], out.stderr


def test_a_table_that_is_written_is_read_back(tmp_path: Path) -> None:
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        write_table(tmp_path / name, ["prompt", "target"], ROWS)
        assert list(read_table(tmp_path / name).rows()) == ROWS


def test_a_hyperparameter_without_a_flag_may_be_given_like_one(run: Run, tmp_path: Path) -> None:
    from hrm_esp.cli.command_line import expand_options

    given = ["pretrain", "a.txt", "--keep_licence", "--no_grow", "--warmup=3", "--decay", "0.1"]
    expanded = ["keep_licence=true", "grow=false", "warmup=3", "decay=0.1"]
    assert expand_options(given) == [*given[:2], *(w for e in expanded for w in ("--set", e))]
    assert expand_options(["generate", "--warmup", "3"]) == ["generate", "--warmup", "3"]
    (tmp_path / "a.txt").write_text(GUTENBERG, encoding="utf-8")
    args = ("pretrain", "a.txt", "--steps", "1", *SMALL, "--overwrite")
    assert "cut 6 lines" in run(*args).stderr
    out = run(*args, "--keep-licence", "--warmup", "3")
    assert out.returncode == 0 and "cut" not in out.stderr, out.stderr


def test_a_table_without_targets_is_plain_text_only_on_purpose(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(TEXT, encoding="utf-8")
    args = ("finetune", "a.tsv", "--from_scratch", "--steps", "1", "--set", "d_model=32")
    out = run(*args)
    assert out.returncode == 2 and "--lm" in out.stderr.splitlines()[-1]
    assert run(*args, "--lm").returncode == 0


def test_line_breaks_of_cells_are_learned(tmp_path: Path) -> None:
    """Those of a prompt are read as in training, and answers have real ones."""
    import torch
    from conftest import CONFIG

    from hrm_esp import FinetuneConfig, generate, load_model, train_ft

    rows = [(f"{a}\n{b}", f"{b}\n{a}") for a in "abc" for b in "abc"]
    write_table(tmp_path / "a.csv", ["prompt", "target"], rows)
    options = FinetuneConfig(steps=100, out_dir=str(tmp_path), val_fraction=0.0, dropout=0.0)
    model = load_model(
        train_ft(tmp_path / "a.csv", CONFIG, options, device=torch.device("cpu")).best
    )
    assert model.config.line_breaks
    answers = [generate(model, prompt, max_new_tokens=9) for prompt, _ in rows]
    assert np.mean([answer.count("\n") == 1 for answer in answers]) > 0.8
    assert not any("\r" in answer for answer in answers)
    assert generate(model, "a\r\nb", max_new_tokens=9) == generate(model, "a\nb", max_new_tokens=9)


def test_an_existing_table_is_kept_if_the_prompts_cannot_be_read(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "keep.csv").write_text("valioso")
    (tmp_path / "bad.txt").write_bytes(bytes(range(16)) * 9)
    for prompts in ("nope.txt", "nope.csv", "bad.txt"):
        assert run("generate", "--prompts", prompts, "-o", "keep.csv").returncode == 2
    assert (tmp_path / "keep.csv").read_text() == "valioso"


def test_a_table_from_a_pipe(trained: Path, run: Run, tmp_path: Path) -> None:
    import os
    import threading

    os.mkfifo(tmp_path / "p.csv")
    data = csv_bytes([("pregunta", "x"), ("¿año?", "1")], "cp1252", delimiter=";")
    threading.Thread(target=(tmp_path / "p.csv").write_bytes, args=[data], daemon=True).start()
    ckpt = trained / "checkpoints" / "pretrain_best.pt"
    out = run("generate", "--ckpt", ckpt, "--prompts", "p.csv", "--json", "--max_new_tokens", "1")
    assert json.loads(out.stdout)["prompt"] == "¿año?"


def test_rows_without_a_header_and_json_values_stay_as_they_are(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "a.csv").write_text("gato;cat\nperro;dog\n")
    (tmp_path / "b.jsonl").write_text('{"id": 5, "prompt": "uno", "tags": ["x"], "ok": true}\n')
    for name in ("a.csv", "b.jsonl"):
        out = run("generate", "--prompts", name, "-o", f"out.{name}", "--max_new_tokens", "2")
        assert out.returncode == 0, out.stderr
    rows = read_table(tmp_path / "out.a.csv", prompts_only=True)
    assert not rows.names and [cells[:2] for cells in rows.cells] == [
        ["gato", "cat"],
        ["perro", "dog"],
    ]
    found = json.loads((tmp_path / "out.b.jsonl").read_text("utf-8"))
    assert list(found) == ["id", "prompt", "tags", "ok", "answer"] and found["tags"] == ["x"]


def test_pairs_of_a_file_in_an_old_encoding(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("El niño comió pan.\n".encode("latin-1"))
    out = run("pairs", "old.txt")
    assert out.stdout == "El nino comio pan.\tEl niño comió pan.\n"
    assert "read as latin-1" in out.stderr


def test_plans_of_files_and_of_long_texts(trained: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    (tmp_path / "old.txt").write_bytes(SPANISH.encode("latin-1"))
    out = run("plans", "old.txt", "palabra " * 60, "--json")
    assert "read as latin-1" in out.stderr
    assert [json.loads(x)["text"] for x in out.stdout.splitlines()] == [
        *SPANISH.splitlines(), "palabra " * 60,
    ]  # fmt: skip
    for missing in ("nope.txt", "nope.csv"):
        assert run("plans", missing).returncode == 2


def test_plans_as_json(trained: Path, run: Run) -> None:
    out = run("plans", "corpus.txt", "--json", cwd=trained)
    found = [json.loads(line) for line in out.stdout.splitlines()]
    assert [f["text"] for f in found] == TEXT.split("\n")
    for f in found:
        assert sum(f["probabilities"]) == pytest.approx(1, abs=1e-4)
        assert f["code"] == int(np.argmax(f["probabilities"])) and len(f["vector"]) == 16


def test_long_prompts_are_two_lines_at_most(trained: Path, run: Run) -> None:
    long, args = "palabra " * 30, ("generate", "--prompts", "-", "--max_new_tokens", "1")
    for n in range(4):
        err = run(*args, input=f"{long}\nsol\n" * n + "mar\n", cwd=trained).stderr
        assert err.count("only the first 64 bytes") == (n > 0) and err.count("\n") == min(n, 2)
        assert n < 2 or f"{n} prompts" in err


def test_prompts_in_utf16_from_standard_input(trained: Path, hrm_esp_command: list[str]) -> None:
    import subprocess

    out = subprocess.run(
        [*hrm_esp_command, "generate", "--prompts", "-", "--json", "--max_new_tokens", "2"],
        cwd=trained, input="niño\nseñor\n".encode("utf-16"), capture_output=True,
    )  # fmt: skip
    assert [json.loads(line)["prompt"] for line in out.stdout.splitlines()] == ["niño", "señor"]


def test_blank_prompts_are_skipped(trained: Path, run: Run, tmp_path: Path) -> None:
    """In a table that is written they keep their row."""
    (tmp_path / "checkpoints").symlink_to(trained / "checkpoints")
    args = ("generate", "--max_new_tokens", "3", "--mode", "answer", "--seed", "1", "--prompts")
    text = "\nsol\n \t\n\nmar\n\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    out = run(*args, "a.txt", "--json", "--num_samples", "2")
    prompts = [json.loads(line)["prompt"] for line in out.stdout.splitlines()]
    assert prompts == ["sol", "sol", "mar", "mar"]
    assert "skipped 4 blank prompts" in out.stderr and out.stderr.count("\n") == 1
    assert run(*args, "-", "--json", "--num_samples", "2", input=text).stdout == out.stdout
    out = run(*args, "a.txt", "--json", "--keep_blank")
    prompts = [json.loads(line)["prompt"] for line in out.stdout.splitlines()]
    assert prompts == ["", "sol", " \t", "", "mar", ""] and not out.stderr
    (tmp_path / "q.csv").write_text("pregunta,x\nsol,1\n ,2\nmar,3\n,4\n", encoding="utf-8")
    for n in (1, 2):
        written = (*args, "q.csv", "-o", "answers.csv", "--num_samples", n)
        assert "skipped 2 blank prompts" in run(*written).stderr
        rows = read_table(tmp_path / "answers.csv").cells
        expected = [("1", True)] * n + [("2", False)] + [("3", True)] * n + [("4", False)]
        assert [(row[1], bool(row[2])) for row in rows] == expected


def test_a_gzip_of_blank_prompts_ends_soon(trained: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\n" * 200_000))
    out = run("generate", "--prompts", tmp_path / "a.txt.gz", cwd=trained)
    assert out.returncode == 0 and not out.stdout
    assert "skipped 200,000 blank prompts" in out.stderr
