"""Properties of the model for any weights: all are random."""

import math

import pytest
import torch
from conftest import CONFIG, random_model, tokens
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.config import HRMConfig
from hrm_esp.errors import HRMError
from hrm_esp.model import FFN, MHA, ExecutorCache, HRMModel, RMSNorm
from hrm_esp.model.embeddings import Rotary, apply_rotary, character_positions
from hrm_esp.model.layers import CrossInputs, attention
from hrm_esp.tokenizer import BOS, PAD, PLAN, VOCAB_SIZE

KINDS = [
    {},
    {"positions": "learned", "d_model": 18},  # heads of an odd width
    {"count_max": 0},
    {"count_max": 5},
    {"recent_len": 20},
    {"gumbel": False},
    {"gumbel_hard": True},
    {"cross_attention": True},
    {"cross_attention": True, "positions": "learned"},
]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rms_norm_has_unit_rms_and_a_gain() -> None:
    norm = RMSNorm(8)
    x = 5 * torch.randn(3, 4, 8)
    close(norm(x).pow(2).mean(-1), torch.ones(3, 4))
    with torch.no_grad():
        norm.weight.mul_(3)
    close(norm(x), 3 * x / x.pow(2).mean(-1, keepdim=True).sqrt())


def test_ffn_is_geglu() -> None:
    model = random_model()
    ffn = model.executor.blocks[0].ffn
    assert isinstance(ffn, FFN)
    x = torch.randn(2, 3, 32)
    gate, up = ffn.gate_up.weight.chunk(2)
    gelu = torch.nn.functional.gelu(x @ gate.T)
    close(ffn(x), (gelu * (x @ up.T)) @ ffn.out.weight.T)


def test_rotation_keeps_length_and_depends_on_distance_only() -> None:
    rotary = Rotary(8, 64)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(i: int, j: int) -> torch.Tensor:
        return (apply_rotary(q, at(i)) * apply_rotary(k, at(j))).sum()

    def at(position: int) -> torch.Tensor:
        freqs_cis = rotary(slice(position, position + 1), torch.float32)
        close(freqs_cis, rotary.freqs_cis(torch.tensor([position])))
        return freqs_cis

    close(product(3, 7), product(40, 44))
    assert (product(3, 7) - product(3, 8)).abs() > 1e-3
    close(apply_rotary(q, at(9)).norm(), q.norm())


def plain_attention(
    attention: MHA, x: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention by the book (Vaswani et al. 2017, equation 1), head by head, QK-norm on."""
    d, n = attention.head_dim, attention.n_heads
    if attention.is_cross:
        wq, (wk, wv) = attention.wq.weight, attention.wkv.weight.chunk(2)
    else:
        wq, wk, wv = attention.wqkv.weight.chunk(3)
    heads = []
    for h in range(n):
        part = slice(h * d, (h + 1) * d)
        q, k, v = x @ wq[part].T, source @ wk[part].T, source @ wv[part].T
        q, k = (t / t.pow(2).mean(-1, keepdim=True).sqrt() for t in (q, k))
        scores = q @ k.transpose(-1, -2) / d**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ attention.out.weight.T


@given(st.text())
def test_characters_are_counted_as_in_the_text(text: str) -> None:
    data = text.encode(errors="ignore")
    ids = torch.tensor([[BOS, *data]])
    count = character_positions(ids)[0].tolist()
    assert count[-1] == len(data.decode())
    whole = [data[:n].decode(errors="ignore") for n in range(len(data) + 1)]
    assert count == [len(w) + (w.encode() != data[:n]) for n, w in enumerate(whole)]


def test_attention_is_that_of_the_paper() -> None:
    blocks = random_model(cross_attention=True)
    x, other = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    none = torch.zeros(2, 1, 1, 0)  # no rotation
    causal = blocks.executor.blocks[0].attn
    close(causal(x, none), plain_attention(causal, x, x, torch.ones(5, 5).tril().bool()))
    full = blocks.planner.blocks[0].attn
    close(full(x, none), plain_attention(full, x, x, None))
    cross = blocks.executor.blocks[0].cross
    close(
        cross.cross_attend(x, CrossInputs(other, None, none, none)),
        plain_attention(cross, x, other, None),
    )
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    masked = cross.cross_attend(x, CrossInputs(other, mask, none, none))
    close(masked[:1], plain_attention(cross, x[:1], other[:1, :4], None))
    assert (masked[1] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padding_changes_nothing(kind: dict[str, object]) -> None:
    model = random_model(**kind)
    prompt, y_in, reads = tokens(3, 9), tokens(3, 12, seed=1), torch.ones(3, dtype=torch.bool)
    logits, codes = model(prompt, y_in, reads)
    padded = torch.cat((prompt, torch.full((3, 6), PAD)), 1)
    y_padded = torch.cat((y_in, torch.full((3, 4), PAD)), 1)
    padded_logits, padded_codes = model(padded, y_padded, reads)
    close(padded_logits[:, :12], logits)
    if codes is not None:
        close(padded_codes, codes)
    # A short row beside a long one is as it is alone.
    mixed = prompt.clone()
    mixed[0, 5:] = PAD
    close(model(mixed, y_in, reads)[0][0], model(mixed[:1, :5], y_in[:1], reads[:1])[0][0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_logit_sees_a_later_byte(kind: dict[str, object]) -> None:
    model = random_model(**kind)
    prompt, y_in, reads = tokens(2, 9), tokens(2, 16, seed=1), torch.ones(2, dtype=torch.bool)
    before, _ = model(prompt, y_in, reads)
    for place in (3, 10, 15):
        changed = y_in.clone()
        changed[:, place:] = (changed[:, place:] + 1) % 256
        after, _ = model(prompt, changed, reads)
        close(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cached_equals_uncached_in_pieces_of_any_size(kind: dict[str, object]) -> None:
    model = random_model(**kind)
    y_in, chars = tokens(2, 24, seed=1), torch.arange(24).expand(2, 24)
    encoded = model.planner.encode(tokens(2, 9)) if model.config.cross_attention else None
    plan, _ = model.planner(tokens(2, 9))
    ngrams = model.executor.ngrams
    features = None
    if ngrams is not None:
        features = torch.rand(*y_in.shape, ngrams.n_features)
    with torch.inference_mode():
        whole = model.executor.hidden_states(y_in, plan, encoded, features)
        prompt_len = 0 if encoded is None else 9
        cache = ExecutorCache(model.config.n_layers_dec, 33, prompt_len)
        states: list[torch.Tensor] = []
        for end in (7, 8, 9, 14, 24):
            begin = sum(s.shape[1] for s in states)
            states.append(
                model.executor.hidden_states(
                    y_in[:, begin:end],
                    plan,
                    encoded,
                    None if features is None else features[:, begin:end],
                    cache,
                    chars[:, begin:end],
                )
            )
        close(torch.cat(states, 1), whole)


def test_counts_use_recent_bytes_only_and_no_padding() -> None:
    model = random_model(recent_len=20)
    prompt, y, others = tokens(2, 9), tokens(2, 13, seed=1), tokens(2, 20, seed=2)
    y_in, y_out = y[:, :-1], y[:, 1:]
    preceding = torch.cat((others[:, :10], y[:, 1:11], others[:, 10:]), 1)

    def both(preceding: torch.Tensor) -> torch.Tensor:
        plan, _ = model.planner(prompt)
        cost = model.nll(prompt, y_in, y_out, preceding_ids=preceding).mixture
        log_probs = model.executor(y_in, plan, preceding_ids=preceding)
        close(-log_probs.gather(2, y_out[..., None]).sum((1, 2)), cost)
        return cost

    cost = both(preceding[:, -20:])
    close(both(preceding), cost)
    close(both(torch.cat((torch.full((2, 5), PAD), preceding[:, -20:]), 1)), cost)
    assert (both(preceding[:, -10:]) - cost).abs().max() > 1e-3


@pytest.mark.parametrize("gumbel", [True, False])
def test_the_plan_reaches_every_logit(gumbel: bool) -> None:
    model = random_model(gumbel=gumbel)
    y_in = tokens(1, 5)
    one, other = (model(tokens(1, 9, seed=s), y_in)[0] for s in (1, 2))
    assert ((one - other).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_bag_of_words_loss_depends_on_the_plan_only(kind: dict[str, object]) -> None:
    model = random_model(**kind)
    prompt, y = tokens(3, 9), tokens(3, 13, seed=1)
    prompt[1, 6:] = PAD
    bow = model.nll(prompt, y[:, :-1], y[:, 1:]).plan_bow
    close(model.nll(prompt, y[:, :3], y[:, 1:4]).plan_bow, bow)
    executor = model.executor
    plan = executor.from_plan(model.planner(prompt)[0]) + executor.tok_emb.weight[PLAN]
    x, freqs_cis = executor.positions(plan[:, None], slice(0, 1))
    for block in executor.blocks:
        x = block(x, freqs_cis)
    log_p = executor.lm_head(executor.norm(x))[:, 0].log_softmax(-1)
    for row, n, cost in zip(range(3), (9, 6, 9), bow, strict=True):
        close(-log_p[row, prompt[row, :n]].mean(), cost)


def test_cross_attention_reads_only_where_allowed() -> None:
    model = random_model(cross_attention=True)
    prompt, y_in = tokens(2, 9), tokens(2, 5)
    reads = torch.tensor([True, False])
    some, none = model(prompt, y_in, reads)[0], model(prompt, y_in)[0]
    close(some[1], none[1])
    assert not torch.allclose(some[0], none[0], atol=1e-3)


@pytest.mark.parametrize("hard", [True, False])
def test_codebook(hard: bool) -> None:
    model = random_model(gumbel_hard=hard)
    prompt = tokens(4, 9)
    plan, logits = model.planner(prompt)
    assert plan.shape == (4, CONFIG.plan_dim) and logits.shape == (4, CONFIG.n_plan_codes)
    assert torch.equal(plan, model.planner(prompt)[0])  # the same prompt, the same plan
    codes = model.planner.codebook.codes
    if hard:  # one code, whole
        for row in plan:
            assert (codes == row).all(-1).any()
    model.train()
    plans = [model.planner(prompt)[0] for _ in range(20)]
    assert any(not torch.equal(plan, plans[0]) for plan in plans)  # Gumbel noise
    model(prompt, tokens(4, 5))[0].square().sum().backward()
    for p in (codes, model.planner.tok_emb.weight, model.planner.to_plan.weight):
        assert p.grad is not None and p.grad.abs().sum() > 0


def test_a_new_model_is_uniform() -> None:
    """Residual outputs and lm_head start at zero: the function starts at uniform."""
    logits, _ = HRMModel(CONFIG)(tokens(2, 9), tokens(2, 5))
    close(logits, torch.full_like(logits, -math.log(VOCAB_SIZE)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planners_blocks_learn_only_through_cross_attention(dtype: torch.dtype) -> None:
    model = random_model(cross_attention=True, gumbel=True)
    torch.nn.init.zeros_(model.executor.from_plan.weight)  # the plan has no effect
    blocks = list(model.planner.blocks.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in blocks)]
    for reads, learn in ((None, False), (torch.tensor([True, False, True]), True)):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            logits, _ = model(tokens(3, 9), tokens(3, 5), reads)
        logits.float().pow(2).sum().backward()
        assert all((p.grad is not None and bool(p.grad.any())) == learn for p in blocks)
        assert model.planner.to_plan.weight.grad is not None
        assert model.planner.codebook is not None and model.planner.codebook.codes.grad is not None
        assert any(p.grad is not None and p.grad.any() for p in rest)


def test_dropout_acts_in_training_only() -> None:
    model = random_model(dropout=0.5)
    prompt, y_in = tokens(1, 9), tokens(1, 5)
    assert torch.equal(model(prompt, y_in)[0], model(prompt, y_in)[0])
    model.train()
    assert not torch.equal(model(prompt, y_in)[0], model(prompt, y_in)[0])


def test_too_many_positions_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="positions"):
        model(tokens(1, 9), tokens(1, CONFIG.max_len + 1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"d_model": 30, "n_heads": 4},
        {"d_model": 0},
        {"n_heads": -2},
        {"d_model": 12, "n_heads": 4},
        {"dropout": 1.0},
        {"positions": "none"},
        {"n_plan_codes": 1},
        {"dropout": float("nan")},
    ],
    ids=str,
)
def test_invalid_configs_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(HRMError):
        HRMConfig(**wrong)  # type: ignore[arg-type]


def test_attention_by_products_equals_the_fused_kernel() -> None:
    """In training on a CPU attention is computed by plain products, without gradients by SDPA."""
    q, k, v = torch.randn(3, 2, 4, 300, 8)
    mask = torch.rand(2, 1, 1, 300) < 0.5
    for m, causal in ((None, True), (None, False), (mask, False)):
        plain = attention(q, k, v, m, causal)
        with torch.no_grad():
            close(plain, attention(q, k, v, m, causal))


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 1.4), ("small", 7.6), ("base", 51.0)], ids=str
)
def test_sizes(size: str, millions: float) -> None:
    from hrm_esp.config import SIZES

    with torch.device("meta"):
        n = HRMModel(HRMConfig(**SIZES[size], cross_attention=True)).n_parameters()  # type: ignore[arg-type]
    assert n == pytest.approx(1e6 * millions, rel=0.15)
