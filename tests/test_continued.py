"""Training a pretrained checkpoint further, on another text."""

import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, Run
from hypothesis import given
from hypothesis import strategies as st
from test_cli import one_line_error
from test_training import _Yielding, same, weights

from hrm_esp.config import HRMConfig, PretrainConfig
from hrm_esp.continue_config import ContinueConfig
from hrm_esp.errors import HRMError, Interrupted
from hrm_esp.ngrams.counting import count_ngrams, drop_rare
from hrm_esp.ngrams.entries import COUNT_BITS, COUNTS, MAX_CODE, Entries
from hrm_esp.training import ContinueResult, load_checkpoint, train_lm, trainer
from hrm_esp.training.weights import ENTRIES, without_counts

NEW = "\n".join(
    f"El barco {verb} {noun} sin viento, capitán{end}"
    for verb in ("cruzó", "perdió", "halló", "dejó", "rodeó")
    for noun in ("la bahía", "el puerto", "un islote", "las rocas")
    for end in (".", " y volvió.", ", al alba.")
)
OLD_VAL = "La niña pintó una canción en el jardín.\nEl sombrero durmió otra vez.\n" * 3
ORDERS = [2, 3, 4, 5]


@pytest.fixture
def texts(trained: Path, tmp_path: Path) -> Path:
    """A folder with a new text, a held-out old one, and a pretrained checkpoint in ``old``."""
    (tmp_path / "new.txt").write_text(NEW, encoding="utf-8")
    (tmp_path / "old_val.txt").write_text(OLD_VAL, encoding="utf-8")
    (tmp_path / "old").mkdir()
    shutil.copy(trained / "checkpoints" / "pretrain_best.pt", tmp_path / "old")
    return tmp_path


def further(folder: Path, out_dir: str = "new", **changes: object) -> ContinueConfig:
    keywords = {"precision": "fp32", "batch_size": 4, "steps": 6} | changes
    return ContinueConfig(
        ckpt=str(folder / "old"), out_dir=str(folder / out_dir), **keywords  # type: ignore[arg-type]
    )  # fmt: skip


def as_counter(entries: Entries) -> Counter[int]:
    """Counts by context and token."""
    keys, counts = entries >> COUNT_BITS, COUNTS[entries & MAX_CODE]
    return Counter(dict(zip(keys.tolist(), counts.tolist(), strict=True)))


def count(text: str) -> Counter[int]:
    return as_counter(count_ngrams(np.frombuffer(text.encode(), np.uint8), ORDERS, 10**6)[0])


def score_lines(out: "subprocess.CompletedProcess[str]") -> dict[str, list[float]]:
    """The scores before and after of each text that the command printed."""
    lines = [line.split() for line in out.stdout.splitlines() if " text: " in line]
    return {words[0]: [float(words[2]), float(words[4])] for words in lines}


def test_a_checkpoint_is_trained_further(texts: Path, run: Run) -> None:
    """From a folder; the scores before are those of the old checkpoint, and those after those of
    the new one."""
    flags = ("--steps", "60", "--lr", "6e-3", "--val_old", "old_val.txt", "--set", "precision=fp32")
    out = run("pretrain", "new.txt", "--ckpt", "old", "--out_dir", "new", *flags)
    assert out.returncode == 0, out.stderr
    scores = score_lines(out)
    assert scores.keys() == {"new", "old"}
    assert scores["new"][1] < scores["new"][0] - 0.5
    for folder, score in zip(("old", "new"), scores["old"], strict=True):
        printed = run("evaluate", "old_val.txt", "--ckpt", folder, "--precision", "fp32").stdout
        assert float(printed.split()[0]) == pytest.approx(score, abs=0.005), printed
    old, new = (load_checkpoint(texts / name / "pretrain_best.pt") for name in ("old", "new"))
    assert new.config == old.config
    assert run("generate", "--ckpt", "new", "--prompt", "El barco").stdout.startswith("El barco")


def test_a_checkpoint_says_all_that_it_was_trained_on(texts: Path, run: Run) -> None:
    """Also after the third text, and after finetuning."""
    (texts / "third.txt").write_text(TEXT.replace("niña", "bruja"), encoding="utf-8")
    (texts / "pairs.tsv").write_text("a\tb\n" * 20, encoding="utf-8")
    for args in (
        ("pretrain", "new.txt", "--ckpt", "old", "--out_dir", "new"),
        ("pretrain", "third.txt", "--ckpt", "new", "--out_dir", "third"),
        ("finetune", "pairs.tsv", "--ckpt", "third", "--out_dir", "third"),
    ):
        assert run(*args, "--steps", "1").returncode == 0
    (line,) = (x for x in run("info", "third").stdout.splitlines() if x.startswith("trained on"))
    parts = line.removeprefix("trained on").split("), ")
    expected = ["corpus.txt", "new.txt", "third.txt", "pairs.tsv"]
    assert [part.split()[0] for part in parts] == expected
    assert "5,775 bytes" in parts[0]
    card = run("info", "third/pretrain_best.pt", "--card", "en").stdout
    assert card.index("corpus.txt") < card.index("new.txt") < card.index("third.txt")


@pytest.mark.parametrize("counts", ["add", "new"])
def test_weights_are_kept_and_counts_are_added_up(texts: Path, counts: str) -> None:
    """After a step too small to change anything else."""
    result = train_lm(texts / "new.txt", options=further(texts, counts=counts, steps=1, lr=1e-30))
    old, new = (weights(p) for p in (texts / "old" / "pretrain_best.pt", result.last))
    kept = without_counts(old)
    for name in ("executor.ngrams.table.min_count", "planner.codebook.pooled_queue"):
        kept.pop(name)
    assert len(kept) > 20
    for name, weight in kept.items():
        torch.testing.assert_close(new[name], weight, rtol=0, atol=1e-20)
    tables = [as_counter(w[ENTRIES].numpy()) for w in (old, new)]
    is_there = [key in tables[1] for key in tables[0]]
    assert all(is_there) if counts == "add" else not all(is_there)
    sums = [sum(table.values()) for table in tables]
    assert (sums[1] > 1.2 * sums[0]) == (counts == "add")


@given(*[st.text(alphabet="ab \n", min_size=2, max_size=60)] * 2)
def test_counts_of_two_texts_are_those_of_both(old: str, new: str) -> None:
    earlier = count_ngrams(np.frombuffer(old.encode(), np.uint8), ORDERS, 10**6)
    stream = np.frombuffer(new.encode(), np.uint8)
    both, min_count = count_ngrams(stream, ORDERS, 10**6, earlier=earlier)
    assert as_counter(both) == count(old) + count(new) and min_count == 1
    max_entries = len(both) // 2
    pruned, min_count = count_ngrams(stream, ORDERS, max_entries, earlier=earlier)
    assert len(pruned) <= max_entries and (min_count > 1 or not len(both))
    np.testing.assert_array_equal(pruned, drop_rare(pruned, min_count))
    # Contexts that were dropped from the earlier counts stay dropped.
    rare = (drop_rare(earlier[0], 3), 3)
    left, min_count = count_ngrams(stream, ORDERS, 10**6, earlier=rare)
    assert min_count == 3
    np.testing.assert_array_equal(left, drop_rare(left, 3))


REFUSED = {
    "a dimension": (("--ckpt", "old", "--d_model", "32"), "d_model is for a new model"),
    "another hyperparameter": (("--ckpt", "old", "--set", "ff_mult=2"), "ff_mult is for a new"),
    "a size": (("--ckpt", "old", "--size", "tiny"), "size is for a new model"),
    "a finetuned checkpoint": (("--ckpt", "finetune_best.pt"), "finetuned"),
    "a folder without pretraining": (("--ckpt", "tuned"), "no pretrained checkpoint in tuned"),
    "a saved state": (("--ckpt", "pretrain_state.pt"), "_last.pt"),
    "counts of no checkpoint": (("--set", "counts=new"), "--ckpt"),
    "an old text of no checkpoint": (("--val_old", "old_val.txt"), "--ckpt"),
    "other counts": (("--ckpt", "old", "--counts", "both"), "counts must be one of add, new"),
    "a missing checkpoint": (("--ckpt", "nowhere.pt"), "no checkpoint nowhere.pt"),
    "a missing old text": (("--ckpt", "old", "--val_old", "nowhere.txt"), "nowhere.txt"),
    "its own folder": (("--ckpt", "old", "--out_dir", "old"), "--overwrite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(texts: Path, trained: Path, run: Run, case: str) -> None:
    flags, reason = REFUSED[case]
    for name in ("finetune_best.pt", "pretrain_state.pt"):
        shutil.copy(trained / "checkpoints" / name, texts)
    (texts / "tuned").mkdir()
    shutil.copy(trained / "checkpoints" / "finetune_best.pt", texts / "tuned")
    before = sorted(texts.rglob("*"))
    assert reason in one_line_error(run("pretrain", "new.txt", "--steps", "1", *flags))
    assert sorted(texts.rglob("*")) == before


def test_a_config_of_a_new_model_is_refused(texts: Path) -> None:
    with pytest.raises(HRMError, match="for a new model"):
        train_lm(texts / "new.txt", HRMConfig(), further(texts))


def test_a_folder_with_both_stages_gives_its_pretrained_checkpoint(
    texts: Path, trained: Path, run: Run
) -> None:
    shutil.copy(trained / "checkpoints" / "finetune_best.pt", texts / "old")
    out = run("pretrain", "new.txt", "--ckpt", "old", "--out_dir", "new", "--steps", "1")
    assert out.returncode == 0, out.stderr


def interrupted(texts: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> ContinueConfig:
    """Stops a run in ``part`` after 8 steps, and returns the options to resume it with."""
    signals = chain([False] * 7, repeat(True))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer, "stop_signals", lambda: _Yielding(lambda: next(signals)))
        train_lm(texts / "new.txt", options=further(texts, "part", steps=16, **changes))
    assert load_checkpoint(texts / "part" / "pretrain_last.pt").step == 8
    return further(texts, "part", steps=16, resume=True, **changes)


@pytest.mark.parametrize("gone", ["the checkpoint", "the counts"])
def test_resumed_equals_uninterrupted(
    texts: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """To the bit, without the old checkpoint, or without the cached counts."""
    old_val = str(texts / "old_val.txt")
    whole = train_lm(texts / "new.txt", options=further(texts, steps=16, val_old=old_val))
    options = interrupted(texts, monkeypatch, val_old=old_val)
    if gone == "the checkpoint":
        shutil.rmtree(texts / "old")
        moved = (texts / "old_val.txt").rename(texts / "moved.txt")
        options = replace(options, ckpt="gone.pt", val_old=str(moved))
    else:
        (texts / "part" / "ngrams.counts").unlink()
    part = train_lm(texts / "new.txt", options=options)
    for a, b in ((whole.last, part.last), (whole.best, part.best)):
        assert same(weights(a), weights(b))
        one, other = (load_checkpoint(p).origin for p in (a, b))
        assert one["earlier"] == other["earlier"] and one["pretrain"] == other["pretrain"]
    assert isinstance(whole, ContinueResult) and isinstance(part, ContinueResult)
    assert whole.new and whole.old and whole.old.before
    assert (part.new, part.old) == (whole.new, whole.old)


def test_a_run_is_resumed_as_it_was_started(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = interrupted(texts, monkeypatch)
    corpus, folder = texts / "new.txt", str(texts / "part")
    with pytest.raises(HRMError, match="started from a checkpoint: give --ckpt"):
        train_lm(corpus, options=PretrainConfig(out_dir=folder, steps=16, resume=True))
    with pytest.raises(HRMError, match="--set counts,"):
        train_lm(corpus, options=further(texts, "part", steps=16, resume=True, counts="new",
                                         lr=options.lr))  # fmt: skip
    # The counts have to be made again, and the checkpoint is another one, or gone.
    (texts / "part" / "ngrams.counts").unlink()
    shutil.copy(texts / "part" / "pretrain_last.pt", texts / "old" / "pretrain_best.pt")
    with pytest.raises(HRMError, match="not what the run started from"):
        train_lm(corpus, options=options)
    shutil.rmtree(texts / "old")
    with pytest.raises(HRMError, match=r"ngrams\.counts is missing"):
        train_lm(corpus, options=options)
    train_lm(corpus, HRMConfig(d_model=8), PretrainConfig(out_dir=str(texts / "own"), steps=1))
    with pytest.raises(HRMError, match="started without --ckpt"):
        train_lm(corpus, options=further(texts, "own", resume=True))


def test_the_command_that_resumes_a_run_is_named(texts: Path, run: Run) -> None:
    """And it works, to the end of a run that has ended already."""
    args = ("new.txt", "--ckpt", "old", "--out_dir", "part", "--steps", "2", "--set", "lr=1e-3")
    assert run("pretrain", *args).returncode == 0
    for words in (("--out_dir", "part"), ("--ckpt", "old", *args[3:5])):  # the text is missing
        line = one_line_error_of(run("pretrain", *words, "--resume"))
        named = line.partition("continue it with hrm-esp ")[2]
        assert named == " ".join(("pretrain", *args, "--resume"))
    assert run(*named.split()).returncode == 0
    # The command of the resumed run is that of the run.
    assert line.endswith(named) and line == one_line_error_of(run("pretrain", *words, "--resume"))


def one_line_error_of(out: "subprocess.CompletedProcess[str]") -> str:
    """The error at the end of what a run says before."""
    assert out.returncode == 2 and "Traceback" not in out.stderr, out.stderr
    (line,) = (x for x in out.stderr.splitlines() if x.startswith("hrm-esp: error: "))
    return line


def test_what_is_scored_is_not_trained_on(texts: Path) -> None:
    """Of the old text and of the new one."""
    scored, copied = "Una línea vieja que se evalúa aparte.", "Otra línea nueva que se evalúa."
    (texts / "old_val.txt").write_text(f"{scored}\n" * 2, encoding="utf-8")
    (texts / "val.txt").write_text(f"{copied}\n" * 2, encoding="utf-8")
    (texts / "new.txt").write_text(f"{scored}\n{copied}\n{NEW}", encoding="utf-8")
    options = further(texts, val_old=str(texts / "old_val.txt"), steps=1)
    train_lm(texts / "new.txt", options=options, val=texts / "val.txt")
    tokens = (texts / "new" / "corpus.tokens").read_bytes()
    assert b"barco" in tokens
    assert scored.encode() not in tokens and copied.encode() not in tokens
    other = further(texts, "other", val_old=str(texts / "old_val.txt"), steps=1)
    train_lm(texts / "new.txt", options=other)
    tokens = (texts / "other" / "corpus.tokens").read_bytes()
    assert scored.encode() not in tokens and copied.encode() in tokens


def test_a_checkpoint_without_counts_or_cross_attention(texts: Path) -> None:
    first = PretrainConfig(out_dir=str(texts / "plain"), steps=2, denoise=0.0, precision="fp32")
    small = HRMConfig(d_model=16, n_heads=2, n_layers_dec=1, max_len=32, count_max=0)
    train_lm(texts / "new.txt", small, first)
    shutil.rmtree(texts / "old")
    (texts / "plain").rename(texts / "old")
    result = train_lm(texts / "new.txt", options=further(texts))
    new = load_checkpoint(result.best)
    assert new.config.cross_attention and ENTRIES not in new.weights
    assert isinstance(result, ContinueResult) and result.old is None and result.new is not None


@pytest.mark.parametrize("earlier", [{}, [1], [{"data": "a"}], [{"new_bpb_before": "1"}]])
def test_a_strange_list_of_earlier_texts_is_refused(texts: Path, run: Run, earlier: object) -> None:
    path = texts / "old" / "pretrain_best.pt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"origin": {"earlier": earlier}}, path)
    one_line_error(run("info", "old"))
