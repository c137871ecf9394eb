"""A user's own training loop on `loss`, as the guide shows it."""

import gc
import os
from itertools import chain, islice
from pathlib import Path

import torch
from conftest import CONFIG, TEXT

import hrm_esp
from hrm_esp.training import loss

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def test_a_users_loop_learns_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """200 steps: the loss falls, and neither tensors nor lists nor memory grow after the first."""
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    data = hrm_esp.dataset_lm(tmp_path / "corpus.txt", max_len=CONFIG.max_len, preceding_len=200)
    model = hrm_esp.HRMModel(CONFIG)
    assert model.executor.ngrams is not None
    model.executor.ngrams.build(data.stream)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    epochs = (data.batches(lambda: (8, 1), seed=0, epoch=epoch) for epoch in range(1000))
    losses, counts, memory = [], [], []
    for step, (_, batch) in enumerate(islice(chain.from_iterable(epochs), 200)):
        total, terms = loss(model, batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_code_queue([terms.pooled])
        losses.append(total.item())
        if step in (50, 199):
            gc.collect()
            objects = gc.get_objects()
            counts.append(sum(type(o) is torch.Tensor for o in objects))
            memory.append(resident_bytes())
            for module in model.modules():  # a list that grows would be in a module
                sizes = [len(v) for v in vars(module).values() if isinstance(v, list)]
                assert all(size < 40 for size in sizes), module
            del objects
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert counts[1] <= counts[0]
    assert memory[1] - memory[0] < 20e6
    assert hrm_esp.generate(model, "La niña", seed=1, max_new_tokens=9) and model.training


def test_loss_before_and_after_an_evaluation_is_the_same(tmp_path: Path) -> None:
    """A function of model and batch: nothing else is read or changed."""
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    data = hrm_esp.dataset_lm(tmp_path / "corpus.txt", max_len=CONFIG.max_len)
    model = hrm_esp.HRMModel(CONFIG).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    first = loss(model, data[0]).total
    with torch.no_grad():
        loss(model, data[1])
    torch.manual_seed(1)
    assert torch.equal(loss(model, data[0]).total, first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
