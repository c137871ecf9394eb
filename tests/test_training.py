import json
import math
from dataclasses import fields, replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG, PAIRS, TEXT, random_model
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp import optim, progress, trainer
from hrm_esp.checkpoint import Checkpoint, load_checkpoint, load_model
from hrm_esp.cli import main
from hrm_esp.config import FinetuneConfig, HRMConfig, PretrainConfig
from hrm_esp.data import LMDataset, Pair, TSVDataset
from hrm_esp.errors import HRMError, PeerLost
from hrm_esp.evaluation import PairScore, evaluate
from hrm_esp.model import HRMModel, Nats
from hrm_esp.optim import (
    Parameters,
    build_optimizers,
    learning_rate,
)
from hrm_esp.progress import perplexity
from hrm_esp.trainer import (
    Interrupted,
    Score,
    Trainer,
    codebook_penalty,
    even_shares,
    is_worse,
)
from hrm_esp.training import begin_anew, model_to_finetune, train_ft, train_lm


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    return tmp_path / "corpus.txt"


def options(folder: Path, **changes: object) -> PretrainConfig:
    keywords = {"out_dir": str(folder), "batch_size": 4, "precision": "fp32"} | changes
    if not keywords.keys() & {"steps", "epochs", "minutes"}:
        keywords["steps"] = 6
    return PretrainConfig(**keywords)  # type: ignore[arg-type]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_learns_and_says_so_honestly(corpus: Path, tmp_path: Path) -> None:
    alone = replace(CONFIG, count_max=0)
    short = train_lm(corpus, alone, options(tmp_path / "a", steps=2))
    long = train_lm(corpus, alone, options(tmp_path / "b", steps=120))
    assert short.score and long.score
    assert long.score.bits_per_byte < 2.6 < short.score.bits_per_byte < 8.1
    with_counts = train_lm(corpus, CONFIG, options(tmp_path / "c", steps=2))
    assert with_counts.score
    assert with_counts.score.bits_per_byte < long.score.bits_per_byte
    assert long.bytes_seen > 10 * short.bytes_seen > 0


def test_the_files_of_a_run(corpus: Path, tmp_path: Path) -> None:
    result = train_lm(
        corpus,
        CONFIG,
        options(tmp_path / "run", epochs=5, keep=2, patience=0, grow=False, batch_size=16),
    )
    names = sorted(p.name for p in (tmp_path / "run").glob("*.pt"))
    kinds = ("best", "epoch4", "epoch5", "last", "state")
    assert names == [f"pretrain_{kind}.pt" for kind in kinds]
    last = load_checkpoint(result.last)
    assert (last.step, last.bytes_seen) == (result.steps, result.bytes_seen)
    assert same(weights(tmp_path / "run" / "pretrain_epoch5.pt"), last.weights)


def test_the_same_seed_is_the_same_run_and_another_is_not(corpus: Path, tmp_path: Path) -> None:
    a, b, c = (
        train_lm(corpus, CONFIG, options(tmp_path / str(i), seed=seed)).last
        for i, seed in enumerate((1, 1, 2))
    )
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_equals_uninterrupted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Stopped in the second epoch, by the signal a cluster sends; dropout and Gumbel noise on."""
    config = replace(CONFIG, dropout=0.2)
    keywords = {"steps": 20, "optimizer": optimizer, "grad_accum": 2, "batch_size": 2}
    whole = train_lm(corpus, config, options(tmp_path / "whole", **keywords))
    signals = chain([False] * 13, repeat(True))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "stop_signals", lambda: _Yielding(lambda: next(signals)))
        with pytest.raises(Interrupted):
            train_lm(corpus, config, options(tmp_path / "part", **keywords))
    assert load_checkpoint(tmp_path / "part" / "pretrain_last.pt").step == 14
    part = train_lm(corpus, config, options(tmp_path / "part", resume=True, **keywords))
    assert same(weights(whole.last), weights(part.last))
    assert whole.bytes_seen == part.bytes_seen
    assert same(weights(whole.best), weights(part.best))


def test_the_log_has_each_step_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run was stopped later than its state was saved, in the middle of a line."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    log = tmp_path / "run" / "metrics.jsonl"
    signals = chain([False] * 8, repeat(True))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "stop_signals", lambda: _Yielding(lambda: next(signals)))
        with pytest.raises(Interrupted):
            train_lm(corpus, CONFIG, options(tmp_path / "run", steps=16))
    with open(log, "a") as file:
        file.write('{"stage": "pretrain", "step": 10, "train_bpb": 9}\n{"stage": "pre')
    train_lm(corpus, CONFIG, options(tmp_path / "run", steps=16, resume=True))
    start = tmp_path / "run" / "pretrain_last.pt"
    train_ft(tmp_path / "pairs.tsv", start, FinetuneConfig(steps=4, out_dir=str(log.parent)))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    pretrain = [line for line in lines if line["stage"] == "pretrain"]
    steps = [line["step"] for line in pretrain if "lr" in line]
    assert steps == list(range(1, 17))
    assert [line["step"] for line in pretrain if "val_bpb" in line] == list(range(2, 17, 2))
    assert set().union(*pretrain) == {
        "stage", "step", "bytes_seen", "seconds", "train_bpb", "val_bpb", "lr", "grad_norm",
        "bytes_per_second", "codes", "skipped",
    }  # fmt: skip
    finetune = [line for line in lines if line["stage"] == "finetune"]
    assert any("val_exact_match" in line for line in finetune)
    train_lm(corpus, CONFIG, options(tmp_path / "run", steps=2, overwrite=True))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line for line in lines if line["stage"] == "finetune"] == finetune
    assert max(line["step"] for line in lines if line["stage"] == "pretrain") == 2


class _Yielding:
    def __init__(self, value: object) -> None:
        self.value = value

    def __enter__(self) -> object:
        return self.value

    def __exit__(self, *_: object) -> None: ...


def test_resuming_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    train_lm(corpus, CONFIG, options(tmp_path / "run"))
    for config, changes, word in (
        (CONFIG, {"lr": 1e-4}, "--lr"),
        (replace(CONFIG, d_model=16), {}, "model"),
    ):
        with pytest.raises(HRMError, match=word):
            train_lm(corpus, config, options(tmp_path / "run", resume=True, **changes))
    corpus.write_text("más\n" + TEXT, encoding="utf-8")
    with pytest.raises(HRMError, match="data"):
        train_lm(corpus, CONFIG, options(tmp_path / "run", resume=True))


def test_what_is_scored_is_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    """Also where the user names a file that is among the others."""
    (tmp_path / "val.txt").write_text("el perro y el gato\n" * 9, encoding="utf-8")
    for val in (tmp_path / "val.txt", None):
        train_lm([tmp_path], CONFIG, options(tmp_path / f"run{val is None}", steps=1), val=val)
    one, other = (tmp_path / f"run{x}" / "corpus.tokens" for x in (False, True))
    assert b"perro" not in one.read_bytes() and b"perro" in other.read_bytes()
    with pytest.raises(HRMError, match="--val"):
        train_lm(corpus, CONFIG, options(tmp_path / "no"), val=corpus)


def test_a_run_that_cannot_save_does_not_cost_the_one_it_replaces(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_lm(corpus, CONFIG, options(tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pt")}

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "step", no_memory)
    with pytest.raises(MemoryError):
        train_lm(corpus, CONFIG, options(tmp_path / "run", overwrite=True))
    assert {p.name: p.read_bytes() for p in first.last.parent.glob("*.pt")} == before


def test_a_run_is_not_overwritten_unasked(corpus: Path, tmp_path: Path) -> None:
    first = train_lm(corpus, CONFIG, options(tmp_path / "run", epochs=2))
    before = first.last.read_bytes()
    with pytest.raises(HRMError, match="--overwrite"):
        train_lm(corpus, CONFIG, options(tmp_path / "run"))
    # Not even then, if the new run cannot begin.
    with pytest.raises(HRMError):
        train_lm(tmp_path / "missing.txt", CONFIG, options(tmp_path / "run", overwrite=True))
    assert first.last.read_bytes() == before
    train_lm(corpus, CONFIG, options(tmp_path / "run", overwrite=True, steps=3))
    assert not (tmp_path / "run" / "pretrain_epoch2.pt").exists()


def test_finetuning_starts_from_the_same_function(corpus: Path) -> None:
    model = random_model()
    start = Checkpoint(model.config, model.state_dict(), "pretrain")
    tuned = model_to_finetune(start, FinetuneConfig()).eval()
    assert tuned.config.memory
    prompt, y_in = torch.randint(0, 256, (2, 3, 9))
    reads = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(tuned(prompt, y_in, reads)[0], model(prompt, y_in)[0])
    with_plan = model_to_finetune(start, FinetuneConfig(context="plan"))
    assert not with_plan.config.memory and with_plan.config.dropout == 0.2
    assert not model_to_finetune(start, FinetuneConfig(gumbel=False)).config.gumbel
    memory = Checkpoint(tuned.config, tuned.state_dict(), "finetune")
    assert model_to_finetune(memory, FinetuneConfig()).config.memory
    with pytest.raises(HRMError, match="--context memory"):
        model_to_finetune(memory, FinetuneConfig(context="plan"))
    restoring = random_model(memory=True)
    start = Checkpoint(restoring.config, restoring.state_dict(), "pretrain")
    with_plan = model_to_finetune(start, FinetuneConfig(context="plan")).eval()
    assert not with_plan.config.memory
    torch.testing.assert_close(with_plan(prompt, y_in)[0], restoring(prompt, y_in)[0])


def test_blocks_that_begin_anew() -> None:
    """Their output is nothing at first; what else was learned, cross attention too, stays."""
    model = random_model(memory=True)
    met = ("planner.codebook.last_pooled", "executor.counts.trust")
    for name in met:
        model.state_dict()[name].fill_(1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    begin_anew(model)
    for name, weight in model.state_dict().items():
        own = (".blocks." in name and "cross" not in name) or name in met
        assert weight.equal(before[name]) != own, name
        if own and ("out" in name or name in met):
            assert not weight.any(), name


def test_blocks_are_kept_for_text_and_begin_anew_for_answers_of_another_kind(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the command says; what it saves after a step tells whether it did."""
    monkeypatch.chdir(tmp_path)
    lines = TEXT.splitlines()
    pairs = {
        "restored": "\n".join(f"{line}\t{line}" for line in lines),
        "other": PAIRS,
        "text": TEXT,
    }
    start = trained / "checkpoints" / "pretrain_best.pt"
    for name, rows in pairs.items():
        (tmp_path / f"{name}.tsv").write_text(rows, encoding="utf-8")
    for i, (name, flags, anew) in enumerate(
        (
            ("restored", (), False),
            ("other", (), True),
            ("text", (), False),
            ("other", ("--blocks", "keep"), False),
            ("restored", ("--blocks", "new"), True),
            ("other", ("--context", "plan"), False),
            ("other", ("--no_gumbel",), True),
        )
    ):
        args = ["finetune", f"{name}.tsv", "--ckpt", start, "--steps", 1, "--lr", 1e-9]
        status = main([str(arg) for arg in (*args, "--out_dir", i, *flags)])
        said = capsys.readouterr().err
        assert status == 0, said
        assert ("begin anew" in said) == anew, (name, flags)
        learned = weights(tmp_path / str(i) / "finetune_last.pt")[
            "executor.blocks.0.ffn.out.weight"
        ]
        assert (learned.norm() < 1e-3) == anew, (name, flags)
        if anew:
            assert weights(start)["executor.blocks.0.ffn.out.weight"].norm() > 0.1


@pytest.mark.parametrize("context", ["memory", "plan"])
def test_finetuning_learns_from_the_prompt(corpus: Path, tmp_path: Path, context: str) -> None:
    start = train_lm(corpus, CONFIG, options(tmp_path / "run", steps=30))
    tuning = FinetuneConfig(
        steps=150, batch_size=16, context=context, out_dir=str(tmp_path / "run"), dropout=0.0
    )
    result = train_ft(tmp_path / "pairs.tsv", start.last, tuning)
    score = evaluate(load_model(result.last), tmp_path / "pairs.tsv")
    assert isinstance(score, PairScore) and score.exact_match
    assert score.exact_match > 0.85  # by chance: 0.5
    assert load_checkpoint(result.best).config.memory == (context == "memory")
    assert load_checkpoint(result.best).stage == "finetune"


def test_the_loss_is_on_the_target_alone() -> None:
    """A prompt byte is never a target: y_out holds the target and its end."""
    data = TSVDataset([Pair(b"preg", b"resp"), Pair(b"solo", b"solo", lm=True)], 32)
    batch = data.collate(data.pairs)
    assert bytes(batch.y_out[0, :4].tolist()) == b"resp" and batch.y_out[0, 4] == 258
    assert batch.reads_memory is not None and batch.reads_memory.tolist() == [True, False]
    assert (
        batch.prompt_ids[1, 1:] == 256
    ).all()  # a row without a target shows the Planner nothing


def test_which_optimizer_has_which_parameters() -> None:
    model = random_model(memory=True)
    parameters = Parameters.of(model)
    names = {id(p): n for n, p in model.named_parameters()}
    for p in parameters.blocks:
        assert "blocks" in names[id(p)] and p.ndim == 2
    assert all(p.ndim < 2 or "blocks" not in names[id(p)] for p in parameters.rest)
    for config, by_muon in (
        (PretrainConfig(), parameters.blocks),
        (PretrainConfig(optimizer="adamw"), []),
        (FinetuneConfig(), parameters.blocks),
        (FinetuneConfig(optimizer="adamw"), []),
    ):
        built = {type(o).__name__: o for o in build_optimizers(parameters, config)}
        assert list(built) == [*(["Muon"] if by_muon else []), "AdamW", "SparseAdam"]
        given = {k: [p for g in o.param_groups for p in g["params"]] for k, o in built.items()}
        assert list(map(id, given.get("Muon", []))) == list(map(id, by_muon))
        assert sorted(id(p) for ps in given.values() for p in ps) == sorted(
            map(id, model.parameters())
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_that_of_pytorch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With its polynomials: in bfloat16 to the bit; in float32 but for the rounding."""
    monkeypatch.setattr(optim, "choose_precision", lambda _: dtype)
    monkeypatch.setattr(optim, "POLAR_EXPRESS", [(3.4445, -4.775, 2.0315)] * 5)
    monkeypatch.setattr(optim, "MARGIN", 1.0)
    weights = [torch.randn(6, 24), torch.randn(24, 6)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    one = optim.Muon([{"params": ours, "lr": 0.1, "weight_decay": 0.2}])
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    rounding = 0.0 if dtype is torch.bfloat16 else 0.02
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=rounding)


def test_orthogonalized_keeps_directions_and_evens_out_their_lengths() -> None:
    u, _ = torch.linalg.qr(torch.randn(24, 8))
    v, _ = torch.linalg.qr(torch.randn(8, 8))
    x = u @ torch.diag(torch.logspace(0, -1.3, 8)) @ v.T
    for matrix, left, right in ((x, u, v), (x.T, v, u)):
        lengths = torch.diag(left.T @ optim.orthogonalized(matrix).float() @ right)
        assert lengths.min() > 0.15 and lengths.max() < 2.1
        rest = left.T @ optim.orthogonalized(matrix).float() @ right - torch.diag(lengths)
        assert rest.abs().max() < 0.1


def test_warm_up_stable_decay() -> None:
    run = PretrainConfig(lr=1.0, warmup=10, decay=0.5)
    assert learning_rate(run, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(run, 9, 0.1) == learning_rate(run, 500, 0.5) == 1.0
    assert learning_rate(run, 500, 0.75) == pytest.approx(0.5)
    assert learning_rate(run, 500, 1.0) == 0.0


def test_the_penalty_wants_even_use_and_sure_choices() -> None:
    sure_and_even = 50.0 * torch.eye(4).repeat(2, 1)
    sure_and_same = 50.0 * torch.eye(4)[:1].repeat(8, 1)
    blurred = torch.zeros(8, 4)
    assert codebook_penalty(sure_and_even) == pytest.approx(0, abs=1e-4)
    assert codebook_penalty(blurred) == pytest.approx(math.log(4), abs=1e-4)
    assert codebook_penalty(sure_and_same) > 5


@given(st.integers(2, 9), st.integers(0, 99))
def test_rows_that_all_like_one_code_are_dealt_out_evenly(n: int, seed: int) -> None:
    logits = 0.5 * torch.randn(64, n, generator=torch.Generator().manual_seed(seed))
    logits[..., 0] += 5
    shares = even_shares(logits)
    torch.testing.assert_close(shares.sum(-1), torch.ones(64))
    torch.testing.assert_close(shares.mean(0), torch.full((n,), 1 / n), rtol=0.05, atol=0)


def test_a_plan_that_all_texts_share_is_told_apart_by_all_codes() -> None:
    """From nearly equal pooled states, all in a few directions, to even use of every code."""
    chance = torch.Generator().manual_seed(0)
    model = HRMModel(replace(CONFIG, gumbel=True, n_plan_codes=8))
    codebook = model.planner.codebook
    assert codebook is not None
    d = CONFIG.d_model
    pooled = torch.randn(256, 4, generator=chance) @ torch.randn(4, d, generator=chance)
    codebook.met.append(100 + pooled)
    codebook.remember()

    def in_use() -> float:
        logits = model.planner.last_logits()
        assert logits is not None
        return perplexity(F.one_hot(logits.argmax(-1), 8).sum(0).float())

    optimizer = torch.optim.Adam([model.planner.to_plan.weight, codebook.codes], lr=6e-3)
    for _ in range(100):
        optimizer.zero_grad()
        logits = model.planner.last_logits()
        assert logits is not None
        codebook_penalty(logits).backward()
        optimizer.step()
    assert in_use() > 7.5
    assert logits.softmax(-1).amax(-1).mean() > 0.5


def test_a_plan_comes_to_say_which_bytes_were_read(tmp_path: Path) -> None:
    """Of lines of eight letters or of eight digits: a token costs 3 bits, or 4 if it is not known
    which. What is written next tells the plan little of it."""
    chance = np.random.default_rng(0)
    kinds = chance.choice(("abcdefgh", "01234567"), 400)
    lines = ["".join(chance.choice(list(kind), 63)) for kind in kinds]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    config = replace(CONFIG, gumbel=True, max_len=64)
    how = options(tmp_path / "run", steps=60, planner_view="previous")
    done = train_lm(tmp_path / "corpus.txt", config, how)
    ids = torch.tensor([list(line.encode()) for line in lines[:40]])
    bag = load_model(done.last).nats(ids, ids[:, :1], ids[:, 1:2]).bag / math.log(2)
    assert bag.mean() < 3.4


@pytest.mark.parametrize("gumbel", [True, False])
def test_a_step_that_a_lost_process_cut_short_leaves_nothing_behind(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gumbel: bool
) -> None:
    config, clip, calls = replace(CONFIG, gumbel=gumbel), Trainer.clip_gradient, iter(range(99))

    def lost_once(self: Trainer) -> float:
        if next(calls) == 3:
            raise PeerLost
        return clip(self)

    whole = train_lm(corpus, config, options(tmp_path / "a"))
    with monkeypatch.context() as patch, pytest.raises(PeerLost):
        patch.setattr(Trainer, "clip_gradient", lost_once)
        train_lm(corpus, config, options(tmp_path / "b"))
    part = train_lm(corpus, config, options(tmp_path / "b", resume=True))
    assert same(weights(whole.last), weights(part.last))


def test_accumulated_batches_are_one_batch(corpus: Path, tmp_path: Path) -> None:
    """Without noise, two batches of 2 windows make the step of one of 4."""
    config = replace(CONFIG, gumbel=False, ngram_dropout=0.0)
    keywords = {"steps": 3, "optimizer": "adamw", "grow": False, "denoise": 0.0}
    one = train_lm(corpus, config, options(tmp_path / "a", **keywords))
    two = train_lm(corpus, config, options(tmp_path / "b", batch_size=2, grad_accum=2, **keywords))
    for name, value in weights(one.last).items():
        torch.testing.assert_close(weights(two.last)[name], value, rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = HRMModel.nats, iter(range(1000))

    def sometimes_nan(*args: object, **keywords: object) -> Nats:
        cost = true(*args, **keywords)  # type: ignore[arg-type]
        return cost._replace(alone=cost.alone * (math.nan if next(calls) % 2 else 1.0))

    def infinite(*args: object, **keywords: object) -> Nats:
        cost = true(*args, **keywords)  # type: ignore[arg-type]
        return cost._replace(mixed=cost.mixed * math.inf)

    monkeypatch.setattr(HRMModel, "nats", sometimes_nan)
    result = train_lm(corpus, CONFIG, options(tmp_path / "a"))
    assert all(w.isfinite().all() for w in weights(result.last).values())
    monkeypatch.setattr(HRMModel, "nats", infinite)
    with pytest.raises(HRMError, match="--lr"):
        train_lm(corpus, CONFIG, options(tmp_path / "b", steps=500))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_as_float32_does(
    corpus: Path, tmp_path: Path, precision: str
) -> None:
    """fp16 through GradScaler: the code of CUDA, on the CPU."""
    config = replace(CONFIG, gumbel=False, ngram_dropout=0.0)
    full, mixed = (
        train_lm(corpus, config, options(tmp_path / p, steps=40, precision=p))
        for p in ("fp32", precision)
    )
    assert full.score and mixed.score
    assert mixed.score.bits_per_byte == pytest.approx(full.score.bits_per_byte, abs=0.15)


MODEL_FLAGS = {
    "d_model": 16, "n_heads": 4, "n_layers_enc": 2, "n_layers_dec": 1, "ff_mult": 2, "max_len": 16,
    "plan_dim": 8, "gumbel": False, "n_plan_codes": 5, "gumbel_hard": True,
    "ngram_max": 2, "ngram_bits": 5, "ngram_dropout": 0.0, "count_max": 5,
    "recent_len": 7, "dropout": 0.3, "positions": "learned",
}  # fmt: skip
TRAIN_FLAGS = {
    "steps": 3, "batch_size": 2, "grad_accum": 2, "lr": 1e-3, "optimizer": "adamw",
    "weight_decay": 0.9, "warmup": 1, "decay": 1.0, "grad_clip": 1e-3, "codebook_penalty": 3.0,
    "precision": "bf16", "val_fraction": 0.5, "seed": 9, "planner_view": "previous", "grow": False,
    "denoise": 0.99,
}  # fmt: skip
ELSEWHERE = {"patience", "epochs", "minutes", "compile", "encoding", "out_dir", "keep", "sep",
             "save_every", "resume", "overwrite", "memory", "sample_prompt"}  # fmt: skip


def test_no_field_is_forgotten_below() -> None:
    names = {f.name for config in (HRMConfig, PretrainConfig) for f in fields(config)}
    assert names == MODEL_FLAGS.keys() | TRAIN_FLAGS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", [*MODEL_FLAGS, *TRAIN_FLAGS])
def test_every_setting_changes_what_is_trained(corpus: Path, tmp_path: Path, name: str) -> None:
    model, train = {}, {"steps": 2}
    if name in MODEL_FLAGS:
        model[name] = MODEL_FLAGS[name]
    else:
        train[name] = TRAIN_FLAGS[name]
    base = train_lm(corpus, CONFIG, options(tmp_path / "base", steps=2))
    other = train_lm(corpus, replace(CONFIG, **model), options(tmp_path / "other", **train))
    if model:
        assert load_checkpoint(other.last).config == replace(CONFIG, memory=True, **model)
    a, b = weights(base.last), weights(other.last)
    if {n: w.shape for n, w in a.items()} == {n: w.shape for n, w in b.items()}:
        assert not same(a, b)


def test_a_run_past_its_best_ends_early_and_keeps_it(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learning 30 lines by heart does not help with others."""
    (tmp_path / "val.txt").write_text("Érase que se era un rey sin corona.\n" * 9, encoding="utf-8")
    runs = {}
    for patience in (0, 1):
        given = options(
            tmp_path / f"run{patience}", steps=160, patience=patience, keep=9, denoise=0.0
        )
        runs[patience] = train_lm(corpus, CONFIG, given, val=tmp_path / "val.txt")
        assert ("ending early" in capsys.readouterr().err) == (patience > 0)
    assert runs[0].steps == 160 > runs[1].steps
    best = load_checkpoint(runs[1].best)
    assert best.step <= runs[1].steps
    last = load_checkpoint(runs[1].last)
    assert best.val_bpb is not None and last.val_bpb is not None
    assert best.val_bpb <= last.val_bpb


@pytest.mark.parametrize(
    ("last", "step"),
    [(Score(0.9, 0.1, 20), 12), (Score(0.6, 0.1, 20), 32), (Score(0.6, 0.1, 2000), 12)],
    ids=["clearly worse", "worse by chance", "worse by more"],
)
def test_the_best_has_the_most_right_answers_or_is_the_last(
    tmp_path: Path, last: Score, step: int
) -> None:
    """The last, unless it is worse by more than chance."""
    scores = [Score(0.5, 1.0), Score(0.5, 2.0), Score(0.5, 0.9), Score(0.6, 0.5), Score(0.5, 0.95)]
    given = iter([*scores, Score(0.9, 0.1), Score(0.9, 0.1), last])
    run = Trainer(
        random_model(),
        LMDataset(np.frombuffer(TEXT.encode(), dtype=np.uint8), CONFIG.max_len),
        options(tmp_path / "run", steps=32, patience=0),
        stage="pretrain",
        data_id="",
        score=lambda _: next(given),
    )
    run.run()
    assert load_checkpoint(run.path("best")).step == step


@pytest.mark.parametrize(
    ("score", "worse"),
    [
        (Score(None, 1.52), True),
        (Score(None, 1.505), False),
        (Score(0.14, 0.08, 200), True),
        (Score(0.12, 0.08, 200), False),  # so many more of 200 are right or not by chance
        (Score(0.12, 0.08, 2000), True),
        (Score(0.20, 0.05, 200), False),
    ],
)
def test_worse_is_more_than_chance(score: Score, worse: bool) -> None:
    best = (None, 1.5) if score.errors is None else (0.11, 0.06)
    assert is_worse(score, *best) == worse


def test_a_codebook_alone_is_warned_about(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for gumbel in (True, False):
        given = FinetuneConfig(steps=1, out_dir=str(tmp_path / str(gumbel)), context="plan",
                               gumbel=gumbel)  # fmt: skip
        train_ft(tmp_path / "pairs.tsv", CONFIG, given)
        said = capsys.readouterr().err
        assert ("--no_gumbel" in said) == gumbel and ("3 bits" in said) == gumbel


def test_minutes_are_kept(corpus: Path, tmp_path: Path) -> None:
    result = train_lm(corpus, CONFIG, options(tmp_path / "run", minutes=0.05))
    assert 3 <= result.seconds < 6 and result.steps > 1


def test_compiled_training_equals_eager(corpus: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, gumbel=False, n_layers_dec=1, ngram_dropout=0.0)
    eager, compiled = (
        train_lm(
            corpus,
            config,
            options(tmp_path / str(c), steps=4, compile=c, grow=False, val_fraction=0),
        )
        for c in (False, True)
    )
    assert weights(eager.last).keys() == weights(compiled.last).keys()
    for name, value in weights(eager.last).items():
        torch.testing.assert_close(weights(compiled.last)[name], value, rtol=1e-2, atol=1e-3)


def test_pretraining_teaches_the_planner_to_read_only_if_asked(
    corpus: Path, tmp_path: Path
) -> None:
    for denoise in (0.0, 0.5):
        given = options(tmp_path / str(denoise), steps=8, denoise=denoise)
        torch.manual_seed(given.seed)
        start = HRMModel(replace(CONFIG, memory=denoise > 0)).state_dict()
        path = train_lm(corpus, CONFIG, given).last
        trained = load_checkpoint(path)
        assert trained.config.memory == (denoise > 0)
        moved = {n for n, w in trained.weights.items() if n in start and not w.equal(start[n])}
        for part in ("planner.blocks", "cross"):
            assert any(part in name for name in moved) == (denoise > 0)
        tuning = FinetuneConfig(steps=1, out_dir=str(tmp_path / str(denoise)))
        assert train_ft(tmp_path / "pairs.tsv", path, tuning).steps == 1


def test_windows_of_a_corpus_smaller_than_one() -> None:
    batch = LMDataset(np.frombuffer(b"ab\n", dtype=np.uint8), 8).windows(np.array([0]))
    assert batch.y_out.tolist() == [[97, 98, 258, 97, 98, 258, 97, 98]]
