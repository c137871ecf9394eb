"""Surprisal of words, lines and bytes, against plain recomputation."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PAIRS, TEXT, Run, random_model

from hrm_esp import HRMModel
from hrm_esp.data import LineNumbers, TSVDataset, dataset_tsv, load_stream, prompt_tokens
from hrm_esp.evaluation import byte_bits, score_stream, target_surprisals, text_surprisals
from hrm_esp.generation import window_start
from hrm_esp.tokenizer import BOS, EOS

SOME = "\n".join(TEXT.splitlines()[-9:]) + "\n  una\tniña   muy lejos \n\u00a1sí!\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SOME, encoding="utf-8")
    return path


def recomputed_bits(model: HRMModel, data: bytes) -> list[float]:
    """The bits of each byte: for each, the window that ends with it is computed anew."""
    max_len, found = model.config.max_len, []
    ids = [BOS if byte == 10 else byte for byte in data]
    for i, token in enumerate(ids):
        start = window_start(i + 1, max_len)
        stride = max_len - window_start(max_len + 1, max_len)
        first = start + stride if start else 0  # the first byte that this window predicts
        prompt = [BOS, *ids[max(0, first - max_len) : first]]
        before = [BOS, *ids][: start + 1]
        y_in = torch.tensor([[before[-1], *ids[start:i]]])
        preceding = torch.tensor([before[:-1][-model.config.preceding_len :]]).long()
        with torch.no_grad():
            plan, _ = model.encode_prompt(torch.tensor([prompt]), None)
            log_probs = model.executor(y_in, plan.plan, preceding_ids=preceding)
        target = EOS if token == BOS else token
        found.append(-float(log_probs[0, -1, target]) / math.log(2))
    return found


def test_bytes_equal_a_plain_recomputation(text: Path) -> None:
    model, stream = random_model(), load_stream([text])[-220:]
    assert len(stream) > 6 * model.config.max_len
    expected = recomputed_bits(model, bytes(stream))
    assert byte_bits(model, stream).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("by", ["word", "line", "byte"])
def test_parts_add_up_to_the_score(text: Path, by: str) -> None:
    model, lines = random_model(), LineNumbers()
    stream = load_stream([text], lines=lines)
    parts = list(text_surprisals(model, stream, lines, by))
    score = score_stream(model, stream)
    assert sum(part.n_bytes for part in parts) == score.n == len(stream)
    assert sum(part.bits for part in parts) / score.n == pytest.approx(
        score.bits_per_byte, abs=1e-6
    )
    assert [p.line for p in parts] == sorted(p.line for p in parts) and parts[-1].line == 11
    if by == "word":
        assert [part.text for part in parts] == SOME.split()
        assert [p[:3] for p in parts[-5:]] == [
            (10, 1, "una"), (10, 2, "niña"), (10, 3, "muy"), (10, 4, "lejos"), (11, 1, "¡sí!")
        ]  # fmt: skip
    if by == "byte":
        assert [part.text for part in parts[-3:]] == ["\\xad", "!", "\\x0a"]


GUTENBERG = """Título
*** START OF THE PROJECT GUTENBERG EBOOK X ***

Título
fin
*** END OF THE PROJECT GUTENBERG EBOOK X ***
The licence.
"""
# Text, how it is read, and its lines that are not blank or cut off, by their numbers in the file.
FILES = {
    "blank lines": ("\n \nuno dos\n\n\n  tres\n", "line", {3: "uno dos", 6: "tres"}),
    "wrapped lines": (
        "\nuno\n  dos nin\u0303o \n\n\ntres\r\ncuatro\n", "blank",
        {2: "uno", 3: "dos niño", 6: "tres", 7: "cuatro"},
    ),
    "verse": ("uno\ndos\n\n \ntres", "stanza", {1: "uno", 2: "dos", 5: "tres"}),
    "one document": ("\n\nuno \n\ndos\n\n", "file", {3: "uno", 4: "", 5: "dos"}),
    "a licence": (GUTENBERG, "line", {4: "Título", 5: "fin"}),
    "a wrapped licence": (GUTENBERG, "blank", {4: "Título", 5: "fin"}),
    "an old encoding": ("\n\nniño año\n\nmañana más\n", "line", {3: "niño año", 5: "mañana más"}),
}  # fmt: skip


@pytest.mark.parametrize("by", ["word", "line", "byte"])
@pytest.mark.parametrize("case", FILES)
def test_lines_are_those_of_the_file(tmp_path: Path, case: str, by: str) -> None:
    """Their numbers, and their bytes in the stream."""
    text, sep, expected = FILES[case]
    encoding = "latin-1" if case == "an old encoding" else "utf-8"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    lines = LineNumbers()
    stream = load_stream([tmp_path / "a.txt"], sep=sep, lines=lines)
    parts = list(text_surprisals(random_model(), stream, lines, by))
    assert sum(part.n_bytes for part in parts) == len(stream)
    n_bytes: dict[int, int] = {}
    for part in parts:
        n_bytes[part.line] = n_bytes.get(part.line, 0) + part.n_bytes
    ends = np.cumsum(list(n_bytes.values()))
    shown = [bytes(stream[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert dict(zip(n_bytes, (s.decode().strip() for s in shown), strict=True)) == expected
    assert all(line[-1:] in b" \n\r" for line in shown)
    assert next(p.number for p in parts if p.line == parts[-1].line) == 1


def test_lines_of_a_folder_are_counted_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("uno\n\n\n")
    (tmp_path / "b.txt").write_text("\ndos\n")
    lines = LineNumbers()
    load_stream([tmp_path], lines=lines)
    assert list(lines) == [(1, 4), (5, 4)]


def test_targets_given_their_prompts(tmp_path: Path) -> None:
    path, model = tmp_path / "pairs.tsv", random_model(cross_attention=True)
    path.write_text(PAIRS + "\nx\tuno dos\n", encoding="utf-8")
    data = dataset_tsv(path, model.config.max_len)
    parts = list(target_surprisals(model, data, "word"))
    assert [p.text for p in parts] == [w for pair in data for w in pair.target.decode().split()]
    assert parts[-1][:3] == (61, 2, "dos") and parts[-1].n_bytes == 4
    pair = data[len(data) - 1]
    with torch.no_grad():
        plan, encoded = model.encode_prompt(
            torch.tensor([prompt_tokens(pair.prompt)]), torch.tensor([True])
        )
        log_probs = model.executor(
            torch.tensor([[BOS, *pair.target]]), plan.plan, encoded,
            torch.tensor([list(pair.prompt)]),
        )  # fmt: skip
    targets = torch.tensor([*pair.target, EOS])
    expected = -log_probs[0].gather(1, targets[:, None]).sum() / math.log(2)
    assert sum(p.bits for p in parts[-2:]) == pytest.approx(float(expected), abs=1e-4)
    assert isinstance(data, TSVDataset)


def test_the_command(trained: Path, run: Run, text: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "pretrain_best.pt"
    command = ("evaluate", text, "--ckpt", checkpoint)
    score = run(*command).stdout.strip()
    out = run(*command, "--by", "word")
    header, *rows = (line.split("\t") for line in out.stdout.splitlines())
    assert header == ["line", "word_no", "word", "bits", "bytes"]
    assert [row[2] for row in rows] == SOME.split() and out.stderr.strip() == score
    total = sum(float(row[3]) for row in rows) / sum(int(row[4]) for row in rows)
    assert f"{total:.3f} bits per byte" in score
    lines = run(*command, "--by", "line", "--json").stdout.splitlines()
    assert len(lines) == 11
    assert json.loads(lines[10]).keys() == {"line", "text", "bits", "bytes"}
    (tmp_path / "wrapped.txt").write_text("\nUna línea\n\nUn párrafo de\ndos líneas.\n", "utf-8")
    command = ("evaluate", "wrapped.txt", "--sep", "blank", "--ckpt", checkpoint)
    lines = run(*command, "--by", "line", "--json").stdout.splitlines()
    assert [json.loads(line)["line"] for line in lines] == [2, 4, 5]
    run(*command, "--html", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    paragraphs = [re.sub("<.*?>", "", line) for line in page.splitlines() if "<p><span" in line]
    assert paragraphs == ["Una línea", "Un párrafo de dos líneas."]
    (tmp_path / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    out = run("evaluate", "pairs.tsv", "--ckpt", checkpoint, "--by", "word").stdout
    assert out.startswith("line\tword_no\tword\tbits\tbytes\n1\t1\tpar\t")
    finetuned = trained / "checkpoints" / "finetune_best.pt"
    out = run("evaluate", text, "--ckpt", finetuned, "--by", "line")
    assert "warning: a finetuned model" in out.stderr


class Page(html.parser.HTMLParser):
    """The words of a page, the level of each, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["span"] and len(self.words) < len(self.titles):
            self.words.append(data)


def test_the_page(trained: Path, run: Run, text: Path, tmp_path: Path) -> None:
    text.write_text(SOME + "<script>alert('no')</script> & más\n", encoding="utf-8")
    command = ("evaluate", text, "--ckpt", trained / "checkpoints" / "pretrain_best.pt")
    out = run(*command, "--html", "page.html")
    assert out.stdout == "page.html\n"
    page = Page()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert page.words == [*SOME.split(), "<script>alert('no')</script>", "&", "más"]
    rows = run(*command, "--by", "word").stdout.splitlines()[1:]
    bits = [f"{float(row.split(chr(9))[3]):.1f}".replace(".", ",") for row in rows]
    assert page.titles == [f"{value} bits" for value in bits]
    # All else is Spanish, too.
    score = run(*command).stdout.split()
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<p>{score[0].replace('.', ',')} bits por byte en {score[5]} bytes</p>" in content
    assert '<html lang="es">' in content and "desde 2" in content
    assert not re.search(r"\b(from|per|over|of|the)\b", re.sub("<style>.*?</style>", "", content,
                                                               flags=re.S))  # fmt: skip
    refused = run(*command, "--html", "nowhere/page.html")
    assert refused.returncode == 2 and "cannot write" in refused.stderr
