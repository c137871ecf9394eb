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

from hrm_esp.cli import main
from hrm_esp.config import FinetuneConfig, HRMConfig, PretrainConfig, TrainConfig
from hrm_esp.data import Batch, LMDataset, Pair, TSVDataset
from hrm_esp.errors import HRMError, Interrupted, PeerLost
from hrm_esp.evaluation import PairScore, evaluate, perplexity
from hrm_esp.model import HRMModel, LossTerms
from hrm_esp.training import Trainer, metrics_log, optim, train_ft, train_lm, trainer
from hrm_esp.training.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from hrm_esp.training.early_stopping import Score, is_worse
from hrm_esp.training.finetune import model_to_finetune, reinitialize_blocks
from hrm_esp.training.loader import LoadedBatch, Loader
from hrm_esp.training.loss import code_balance_loss, sinkhorn_assignment
from hrm_esp.training.optim import build_optimizers
from hrm_esp.training.schedule import learning_rate


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


def test_training_learns_and_scores_honestly(corpus: Path, tmp_path: Path) -> None:
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


def test_the_seed_determines_the_run(corpus: Path, tmp_path: Path) -> None:
    a, b, c = (
        train_lm(corpus, CONFIG, options(tmp_path / str(i), seed=seed)).last
        for i, seed in enumerate((1, 1, 2))
    )
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_equals_uninterrupted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Stopped in the second epoch by SIGTERM; dropout and Gumbel noise are on."""
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


@pytest.mark.parametrize(
    "length, grad_accum", [({"epochs": 2, "patience": 0}, 1), ({"steps": 20}, 2)]
)
def test_loading_a_step_ahead_changes_nothing(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    length: dict[str, object],
    grad_accum: int,
) -> None:
    """As with CUDA: nor does it if the run is resumed, and no batch is loaded in vain."""
    keywords = {**length, "batch_size": 16, "grad_accum": grad_accum}
    plain = train_lm(corpus, CONFIG, options(tmp_path / "plain", **keywords))
    new_loader, load, loaded = Loader.__init__, Loader._load, []

    def loads_ahead(self: Loader, model: HRMModel) -> None:
        new_loader(self, model)
        self.is_ahead = True

    def load_and_record(self: Loader, batch: Batch) -> LoadedBatch:
        loaded.append(self)
        return load(self, batch)

    monkeypatch.setattr(Loader, "__init__", loads_ahead)
    monkeypatch.setattr(Loader, "_load", load_and_record)
    signals = chain([False] * 13, repeat(True))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "stop_signals", lambda: _Yielding(lambda: next(signals)))
        with pytest.raises(Interrupted):
            train_lm(corpus, CONFIG, options(tmp_path / "ahead", **keywords))
    assert loaded[-1].started is not None  # the first batch of the step after the last
    ahead = train_lm(corpus, CONFIG, options(tmp_path / "ahead", resume=True, **keywords))
    assert loaded[-1].started is None
    assert (ahead.steps, ahead.bytes_seen) == (plain.steps, plain.bytes_seen)
    assert same(weights(ahead.last), weights(plain.last))
    assert len(loaded) == plain.steps * grad_accum + 1  # one of them in vain


def test_training_on_the_cpu_asks_no_gpu(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entering a CUDA stream, even none, asks MPS and CUDA for their devices."""
    monkeypatch.setattr(torch.cuda, "stream", None)
    train_lm(corpus, CONFIG, options(tmp_path / "run", steps=2))


def test_a_resumed_run_keeps_the_size_of_its_batches(corpus: Path, tmp_path: Path) -> None:
    """By default it follows from the device, and a run may go on on another one."""
    train_lm(corpus, CONFIG, options(tmp_path, steps=4, batch_size=3))
    train_lm(corpus, CONFIG, options(tmp_path, steps=4, batch_size=None, resume=True))
    with pytest.raises(HRMError, match="--batch_size changed"):
        train_lm(corpus, CONFIG, options(tmp_path, steps=4, batch_size=5, resume=True))


def test_the_log_has_each_step_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run was stopped in the middle of a line, after its state was saved: half a line
    stays where it is."""
    monkeypatch.setattr(metrics_log, "LOG_SECONDS", 0.0)
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
    lines = read_log(log)
    pretrain = [line for line in lines if line["stage"] == "pretrain"]
    steps = [line["step"] for line in pretrain if "lr" in line]
    assert steps == list(range(1, 17))
    assert [line["step"] for line in pretrain if "val_bpb" in line] == list(range(2, 17, 2))
    assert set().union(*pretrain) == {
        "stage", "step", "bytes_seen", "seconds", "train_bpb", "val_bpb", "lr", "grad_norm",
        "bytes_per_second", "code_perplexity", "skipped_steps",
    }  # fmt: skip
    finetune = [line for line in lines if line["stage"] == "finetune"]
    assert any("val_exact_match" in line for line in finetune)
    train_lm(corpus, CONFIG, options(tmp_path / "run", steps=2, overwrite=True))
    lines = read_log(log)
    assert [line for line in lines if line["stage"] == "finetune"] == finetune
    assert max(line["step"] for line in lines if line["stage"] == "pretrain") == 2


def read_log(path: Path) -> list[dict[str, object]]:
    """The entries of a log, without the line that was cut short."""
    lines = path.read_text().splitlines()
    assert lines.count('{"stage": "pre') == 1
    return [json.loads(line) for line in lines if line != '{"stage": "pre']


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


def test_held_out_files_are_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    """Also if --val names one of the files of the corpus."""
    (tmp_path / "val.txt").write_text("el perro y el gato\n" * 9, encoding="utf-8")
    for val in (tmp_path / "val.txt", None):
        train_lm([tmp_path], CONFIG, options(tmp_path / f"run{val is None}", steps=1), val=val)
    one, other = (tmp_path / f"run{x}" / "corpus.tokens" for x in (False, True))
    assert b"perro" not in one.read_bytes() and b"perro" in other.read_bytes()
    with pytest.raises(HRMError, match="--val"):
        train_lm(corpus, CONFIG, options(tmp_path / "no"), val=corpus)


def test_a_run_that_cannot_save_keeps_the_files_of_the_overwritten_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_lm(corpus, CONFIG, options(tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pt")}

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "train_step", no_memory)
    with pytest.raises(MemoryError):
        train_lm(corpus, CONFIG, options(tmp_path / "run", overwrite=True))
    assert {p.name: p.read_bytes() for p in first.last.parent.glob("*.pt")} == before


def test_a_run_is_overwritten_only_if_asked(corpus: Path, tmp_path: Path) -> None:
    first = train_lm(corpus, CONFIG, options(tmp_path / "run", epochs=1, batch_size=32))
    epoch_file = tmp_path / "run" / "pretrain_epoch1.pt"
    assert epoch_file.exists()
    before = first.last.read_bytes()
    with pytest.raises(HRMError, match="--overwrite"):
        train_lm(corpus, CONFIG, options(tmp_path / "run"))
    # With --overwrite too, if the new run cannot begin.
    with pytest.raises(HRMError):
        train_lm(tmp_path / "missing.txt", CONFIG, options(tmp_path / "run", overwrite=True))
    assert first.last.read_bytes() == before
    train_lm(corpus, CONFIG, options(tmp_path / "run", overwrite=True, steps=3))
    assert not epoch_file.exists()


def test_finetuning_starts_from_the_same_function(corpus: Path) -> None:
    model = random_model()
    start = Checkpoint(model.config, model.state_dict(), "pretrain")
    tuned = model_to_finetune(start, FinetuneConfig()).eval()
    assert tuned.config.cross_attention
    prompt, y_in = torch.randint(0, 256, (2, 3, 9))
    reads = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(tuned(prompt, y_in, reads)[0], model(prompt, y_in)[0])
    with_plan = model_to_finetune(start, FinetuneConfig(context="plan"))
    assert not with_plan.config.cross_attention and with_plan.config.dropout == 0.2
    assert not model_to_finetune(start, FinetuneConfig(gumbel=False)).config.gumbel
    memory = Checkpoint(tuned.config, tuned.state_dict(), "finetune")
    assert model_to_finetune(memory, FinetuneConfig()).config.cross_attention
    with pytest.raises(HRMError, match="--context cross_attention"):
        model_to_finetune(memory, FinetuneConfig(context="plan"))
    restoring = random_model(cross_attention=True)
    start = Checkpoint(restoring.config, restoring.state_dict(), "pretrain")
    with_plan = model_to_finetune(start, FinetuneConfig(context="plan")).eval()
    assert not with_plan.config.cross_attention
    torch.testing.assert_close(with_plan(prompt, y_in)[0], restoring(prompt, y_in)[0])


def test_reinitialized_blocks() -> None:
    """Their output is zero; all other weights, cross-attention too, stay."""
    model = random_model(cross_attention=True)
    queue = "planner.codebook.pooled_queue"
    model.state_dict()[queue].fill_(1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    reinitialize_blocks(model)
    for name, weight in model.state_dict().items():
        own = (".blocks." in name and "cross" not in name) or name == queue
        assert weight.equal(before[name]) != own, name
        if own and ("out" in name or name == queue):
            assert not weight.any(), name


def test_blocks_are_kept_for_text_and_reinitialized_for_other_targets(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the command says; the checkpoint after a step tells whether it did."""
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
    for i, (name, flags, reinitialized) in enumerate(
        (
            ("restored", (), False),
            ("other", (), True),
            ("text", ("--lm",), False),
            ("other", ("--reinit_blocks", "never"), False),
            ("restored", ("--reinit_blocks", "always"), True),
            ("other", ("--context", "plan"), False),
            ("other", ("--no_gumbel",), True),
        )
    ):
        args = ["finetune", f"{name}.tsv", "--ckpt", start, "--steps", 1, "--lr", 1e-9]
        status = main([str(arg) for arg in (*args, "--out_dir", i, *flags)])
        said = capsys.readouterr().err
        assert status == 0, said
        assert ("reinitializing" in said) == reinitialized, (name, flags)
        learned = weights(tmp_path / str(i) / "finetune_last.pt")[
            "executor.blocks.0.ffn.out.weight"
        ]
        assert (learned.norm() < 1e-3) == reinitialized, (name, flags)
        if reinitialized:
            assert weights(start)["executor.blocks.0.ffn.out.weight"].norm() > 0.1


@pytest.mark.parametrize("context", ["cross_attention", "plan"])
def test_finetuning_learns_from_the_prompt(corpus: Path, tmp_path: Path, context: str) -> None:
    start = train_lm(corpus, CONFIG, options(tmp_path / "run", steps=30))
    tuning = FinetuneConfig(
        steps=90, batch_size=16, context=context, out_dir=str(tmp_path / "run"), dropout=0.0
    )
    result = train_ft(tmp_path / "pairs.tsv", start.last, tuning)
    score = evaluate(load_model(result.last), tmp_path / "pairs.tsv")
    assert isinstance(score, PairScore) and score.exact_match
    assert score.exact_match > 0.85  # by chance: 0.5
    assert load_checkpoint(result.best).config.cross_attention == (context == "cross_attention")
    assert load_checkpoint(result.best).stage == "finetune"


def test_the_loss_is_on_the_target_alone() -> None:
    """A prompt byte is never a target: y_out holds the target and its end."""
    data = TSVDataset([Pair(b"preg", b"resp"), Pair(b"solo", b"solo", lm=True)], 32)
    batch = data.collate(data.pairs)
    assert bytes(batch.y_out[0, :4].tolist()) == b"resp" and batch.y_out[0, 4] == 258
    assert batch.cross_attends is not None and batch.cross_attends.tolist() == [True, False]
    assert (
        batch.prompt_ids[1, 1:] == 256
    ).all()  # a row without a target shows the Planner nothing


@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig])
def test_each_parameter_has_one_optimizer(config: type[TrainConfig]) -> None:
    """Muon and weight decay are for the matrices in the blocks."""
    model = random_model(cross_attention=True)
    names = {id(p): n for n, p in model.named_parameters()}
    is_matrix = {n: "blocks" in n and p.ndim == 2 for n, p in model.named_parameters()}
    for optimizer in ("muon", "adamw"):
        built = build_optimizers(model, config(optimizer=optimizer))
        groups = [(o, g) for o in built for g in o.param_groups]
        assert sorted(names[id(p)] for _, g in groups for p in g["params"]) == sorted(
            names.values()
        )
        for built_optimizer, group in groups:
            kinds = {is_matrix[names[id(p)]] for p in group["params"]}
            assert kinds == {group["weight_decay"] > 0}
            is_muon = type(built_optimizer).__name__ == "Muon"
            assert is_muon == (optimizer == "muon" and kinds == {True})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_equals_pytorchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With PyTorch's polynomials: to the bit in bfloat16, up to rounding in float32."""
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
        lengths = torch.diag(left.T @ optim.orthogonalize(matrix).float() @ right)
        assert lengths.min() > 0.15 and lengths.max() < 2.1
        rest = left.T @ optim.orthogonalize(matrix).float() @ right - torch.diag(lengths)
        assert rest.abs().max() < 0.1


def test_warm_up_stable_decay() -> None:
    run = PretrainConfig(lr=1.0, warmup=10, decay=0.5)
    assert learning_rate(run, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(run, 9, 0.1) == learning_rate(run, 500, 0.5) == 1.0
    assert learning_rate(run, 500, 0.75) == pytest.approx(0.5)
    assert learning_rate(run, 500, 1.0) == 0.0


def test_the_balance_loss_wants_even_use_and_sure_choices() -> None:
    sure_and_even = 50.0 * torch.eye(4).repeat(2, 1)
    sure_and_same = 50.0 * torch.eye(4)[:1].repeat(8, 1)
    blurred = torch.zeros(8, 4)
    assert code_balance_loss(sure_and_even) == pytest.approx(0, abs=1e-4)
    assert code_balance_loss(blurred) == pytest.approx(math.log(4), abs=1e-4)
    assert code_balance_loss(sure_and_same) > 5


@given(st.integers(2, 9), st.integers(0, 99))
def test_sinkhorn_assigns_rows_evenly(n: int, seed: int) -> None:
    logits = 0.5 * torch.randn(64, n, generator=torch.Generator().manual_seed(seed))
    logits[..., 0] += 5
    shares = sinkhorn_assignment(logits)
    torch.testing.assert_close(shares.sum(-1), torch.ones(64))
    torch.testing.assert_close(shares.mean(0), torch.full((n,), 1 / n), rtol=0.05, atol=0)


def test_similar_plans_come_to_use_all_codes() -> None:
    """Pooled states that are nearly equal, and vary in a few directions only."""
    chance = torch.Generator().manual_seed(0)
    model = HRMModel(replace(CONFIG, gumbel=True, n_plan_codes=8))
    codebook = model.planner.codebook
    assert codebook is not None
    d = CONFIG.d_model
    pooled = torch.randn(256, 4, generator=chance) @ torch.randn(4, d, generator=chance)
    codebook.update_queue([100 + pooled])

    def n_used() -> float:
        logits = model.planner.queue_logits()
        assert logits is not None
        return perplexity(F.one_hot(logits.argmax(-1), 8).sum(0).float())

    optimizer = torch.optim.Adam([model.planner.to_plan.weight, codebook.codes], lr=6e-3)
    for _ in range(100):
        optimizer.zero_grad()
        logits = model.planner.queue_logits()
        assert logits is not None
        code_balance_loss(logits).backward()
        optimizer.step()
    assert n_used() > 7.5
    assert logits.softmax(-1).amax(-1).mean() > 0.5


def test_a_plan_learns_to_predict_the_bytes_of_its_text(tmp_path: Path) -> None:
    """Lines of eight letters or of eight digits: a token costs 3 bits, or 4 if the kind of line is
    unknown."""
    chance = np.random.default_rng(0)
    kinds = chance.choice(("abcdefgh", "01234567"), 400)
    lines = ["".join(chance.choice(list(kind), 63)) for kind in kinds]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    config = replace(CONFIG, gumbel=True, max_len=64)
    params = options(tmp_path / "run", steps=60, planner_input="previous")
    done = train_lm(tmp_path / "corpus.txt", config, params)
    ids = torch.tensor([list(line.encode()) for line in lines[:40]])
    bow = load_model(done.last).nll(ids, ids[:, :1], ids[:, 1:2]).plan_bow / math.log(2)
    assert bow.mean() < 3.4


@pytest.mark.parametrize("gumbel", [True, False])
def test_a_step_cut_short_by_a_lost_process_changes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gumbel: bool
) -> None:
    config, step, calls = replace(CONFIG, gumbel=gumbel), Trainer.optimizer_step, iter(range(99))

    def lost_once(self: Trainer, norm: float) -> None:
        if next(calls) == 3:
            raise PeerLost
        step(self, norm)

    whole = train_lm(corpus, config, options(tmp_path / "a"))
    with monkeypatch.context() as patch, pytest.raises(PeerLost):
        patch.setattr(Trainer, "optimizer_step", lost_once)
        train_lm(corpus, config, options(tmp_path / "b"))
    part = train_lm(corpus, config, options(tmp_path / "b", resume=True))
    assert same(weights(whole.last), weights(part.last))


def test_accumulated_batches_are_one_batch(corpus: Path, tmp_path: Path) -> None:
    """Without noise, two batches of 2 windows make the step of one of 4."""
    config = replace(CONFIG, gumbel=False)
    keywords = {"steps": 3, "optimizer": "adamw", "grow": False, "denoise": 0.0}
    one = train_lm(corpus, config, options(tmp_path / "a", **keywords))
    two = train_lm(corpus, config, options(tmp_path / "b", batch_size=2, grad_accum=2, **keywords))
    for name, value in weights(one.last).items():
        torch.testing.assert_close(weights(two.last)[name], value, rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = HRMModel.nll, iter(range(1000))

    def sometimes_nan(*args: object, **keywords: object) -> LossTerms:
        terms = true(*args, **keywords)  # type: ignore[arg-type]
        return terms._replace(network=terms.network * (math.nan if next(calls) % 2 else 1.0))

    def infinite(*args: object, **keywords: object) -> LossTerms:
        terms = true(*args, **keywords)  # type: ignore[arg-type]
        return terms._replace(mixture=terms.mixture * math.inf)

    monkeypatch.setattr(HRMModel, "nll", sometimes_nan)
    result = train_lm(corpus, CONFIG, options(tmp_path / "a"))
    assert all(w.isfinite().all() for w in weights(result.last).values())
    monkeypatch.setattr(HRMModel, "nll", infinite)
    with pytest.raises(HRMError, match="--lr"):
        train_lm(corpus, CONFIG, options(tmp_path / "b", steps=500))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_as_float32_does(
    corpus: Path, tmp_path: Path, precision: str
) -> None:
    """fp16 through GradScaler: the code of CUDA, on the CPU."""
    config = replace(CONFIG, gumbel=False)
    full, mixed = (
        train_lm(corpus, config, options(tmp_path / p, steps=40, precision=p))
        for p in ("fp32", precision)
    )
    assert full.score and mixed.score
    assert mixed.score.bits_per_byte == pytest.approx(full.score.bits_per_byte, abs=0.15)


MODEL_OPTIONS = {
    "d_model": 16, "n_heads": 4, "n_layers_enc": 2, "n_layers_dec": 1, "ff_mult": 2, "max_len": 16,
    "plan_dim": 8, "gumbel": False, "n_plan_codes": 5, "gumbel_hard": True,
    "count_max": 5, "recent_len": 7, "dropout": 0.3, "positions": "learned",
}  # fmt: skip
TRAIN_OPTIONS = {
    "steps": 3, "batch_size": 2, "grad_accum": 2, "lr": 1e-3, "optimizer": "adamw",
    "weight_decay": 0.9, "warmup": 1, "decay": 1.0, "grad_clip": 1e-3, "codebook_penalty": 3.0,
    "precision": "bf16", "val_fraction": 0.5, "seed": 9, "planner_input": "previous", "grow": False,
    "denoise": 0.99, "count_memory": 0.01,
}  # fmt: skip
ELSEWHERE = {"patience", "epochs", "minutes", "compile", "encoding", "out_dir", "keep", "sep",
             "save_every", "resume", "overwrite", "cross_attention", "sample_prompt",
             "keep_licence", "line_breaks"}  # fmt: skip


def test_all_fields_are_listed_here() -> None:
    names = {f.name for config in (HRMConfig, PretrainConfig) for f in fields(config)}
    assert names == MODEL_OPTIONS.keys() | TRAIN_OPTIONS.keys() | ELSEWHERE


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after two steps of the default training."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    return weights(train_lm(folder / "corpus.txt", CONFIG, options(folder, steps=2)).last)


@pytest.mark.parametrize("name", [*MODEL_OPTIONS, *TRAIN_OPTIONS])
def test_every_hyperparameter_changes_the_training(
    two_steps: dict[str, torch.Tensor], corpus: Path, tmp_path: Path, name: str
) -> None:
    model, train = {}, {"steps": 2}
    if name in MODEL_OPTIONS:
        model[name] = MODEL_OPTIONS[name]
    else:
        train[name] = TRAIN_OPTIONS[name]
    other = train_lm(corpus, replace(CONFIG, **model), options(tmp_path / "other", **train))
    if model:
        assert load_checkpoint(other.last).config == replace(CONFIG, cross_attention=True, **model)
    a, b = two_steps, weights(other.last)
    if {n: w.shape for n, w in a.items()} == {n: w.shape for n, w in b.items()}:
        assert not same(a, b)


def test_a_run_past_its_best_ends_early_and_keeps_the_best(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memorizing 30 lines does not help with others."""
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
def test_the_best_checkpoint_has_the_most_right_answers_or_is_the_last(
    tmp_path: Path, last: Score, step: int
) -> None:
    """The last one, unless it is worse by more than chance."""
    scores = [Score(0.5, 1.0), Score(0.5, 2.0), Score(0.5, 0.9), Score(0.6, 0.5), Score(0.5, 0.95)]
    given = iter([*scores, Score(0.9, 0.1), Score(0.9, 0.1), last])
    run = Trainer(
        random_model(),
        LMDataset(np.frombuffer(TEXT.encode(), dtype=np.uint8), CONFIG.max_len),
        options(tmp_path / "run", steps=32, patience=0),
        stage="pretrain",
        data_id="",
        validate=lambda *_: next(given),
    )
    run.run()
    assert load_checkpoint(run.folder.checkpoint("best")).step == step


@pytest.mark.parametrize(
    ("score", "worse"),
    [
        (Score(None, 1.52), True),
        (Score(None, 1.505), False),
        (Score(0.14, 0.08, 200), True),
        (Score(0.12, 0.08, 200), False),  # within chance for 200 rows
        (Score(0.12, 0.08, 2000), True),
        (Score(0.20, 0.05, 200), False),
    ],
)
def test_worse_means_more_than_chance(score: Score, worse: bool) -> None:
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


def test_a_timed_run_takes_its_minutes(corpus: Path, tmp_path: Path) -> None:
    result = train_lm(corpus, CONFIG, options(tmp_path / "run", minutes=0.05))
    assert 3 <= result.seconds < 6 and result.steps > 1


def test_compiled_training_equals_eager(corpus: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, gumbel=False, n_layers_dec=1)
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


def test_pretraining_trains_the_planner_only_with_denoising(corpus: Path, tmp_path: Path) -> None:
    for denoise in (0.0, 0.5):
        given = options(tmp_path / str(denoise), steps=8, denoise=denoise)
        torch.manual_seed(given.seed)
        model = HRMModel(replace(CONFIG, cross_attention=denoise > 0))
        save_checkpoint(Checkpoint(model.config, model.state_dict(), "pretrain"), tmp_path / "0.pt")
        start = load_checkpoint(tmp_path / "0.pt").weights
        path = train_lm(corpus, CONFIG, given).last
        trained = load_checkpoint(path)
        assert trained.config.cross_attention == (denoise > 0)
        moved = {n for n, w in trained.weights.items() if n in start and not w.equal(start[n])}
        for part in ("planner.blocks", "cross"):
            assert any(part in name for name in moved) == (denoise > 0)
        tuning = FinetuneConfig(steps=1, out_dir=str(tmp_path / str(denoise)))
        assert train_ft(tmp_path / "pairs.tsv", path, tuning).steps == 1


def test_a_window_of_a_corpus_that_is_smaller() -> None:
    batch = LMDataset(np.frombuffer(b"ab\n", dtype=np.uint8), 8).windows(np.array([0]))
    assert batch.y_out.tolist() == [[97, 98, 258, 97, 98, 258, 97, 98]]
