"""Choosing devices: what a GPU would change, with the answers of CUDA replaced."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model

from hrm_esp import FinetuneConfig, HRMConfig, PretrainConfig
from hrm_esp.cli import common
from hrm_esp.cli.main import describe_system_error
from hrm_esp.cli.parser import build_parser
from hrm_esp.data import Batch
from hrm_esp.device import choose_device, choose_precision
from hrm_esp.errors import HRMError
from hrm_esp.model import HRMModel
from hrm_esp.training import memory
from hrm_esp.training.loss import Loss
from hrm_esp.training.memory import fit_batch_size
from hrm_esp.training.schedule import batch_shape, choose_batch_size


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two GPUs of compute capability 8.6; creating a tensor on them does nothing."""
    for name, value in {
        "is_available": True,
        "device_count": 2,
        "get_device_capability": (8, 6),
        "get_device_name": "NVIDIA Test",
        "get_arch_list": ["sm_75", "sm_80", "sm_90a", "compute_120"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    return monkeypatch


def start_processes(gpus: pytest.MonkeyPatch, rank: int, n: int) -> None:
    """Sets what torchrun sets for a process."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    for name, value in {**variables, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        gpus.setenv(name, str(value))


def test_bf16_is_not_emulated(gpus: pytest.MonkeyPatch) -> None:
    """PyTorch says that a T4 can compute in bfloat16: it emulates it, slower than float16."""
    gpus.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert choose_precision(torch.device("cuda")) is torch.float16
    gpus.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision(torch.device("cuda")) is torch.bfloat16


@pytest.mark.parametrize("name", [None, "cuda"])
def test_each_process_takes_its_own_gpu(gpus: pytest.MonkeyPatch, name: str | None) -> None:
    assert choose_device(name) == torch.device("cuda")
    for rank in range(2):
        start_processes(gpus, rank, 2)
        assert choose_device(name) == torch.device("cuda", rank)


def test_processes_cannot_name_one_gpu(gpus: pytest.MonkeyPatch) -> None:
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    start_processes(gpus, 0, 2)
    with pytest.raises(HRMError, match="without a number"):
        choose_device("cuda:1")


@pytest.mark.parametrize(
    "capability, is_supported",
    [((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((10, 0), False),
     ((12, 0), True), ((12, 1), True)],
)  # fmt: skip
def test_a_gpu_that_the_build_has_no_kernels_for(
    gpus: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    is_supported: bool,
) -> None:
    """Named, it is refused in one line; by default the CPU is used instead."""
    gpus.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if is_supported:
        assert choose_device() == choose_device("cuda") == torch.device("cuda")
        return
    with pytest.raises(HRMError, match="does not support NVIDIA Test"):
        choose_device("cuda")
    assert choose_device() == torch.device("cpu")
    assert "warning: using the CPU: " in capsys.readouterr().err


def test_the_size_of_a_batch_follows_from_the_device(gpus: pytest.MonkeyPatch) -> None:
    sizes = [
        choose_batch_size(options, HRMConfig(d_model=d_model), torch.device(device))
        for options in (PretrainConfig(), FinetuneConfig(), PretrainConfig(batch_size=3))
        for device in ("cpu", "cuda")
        for d_model in (256, 512)
    ]
    assert sizes == [8, 8, 64, 32, 2, 2, 8, 8, 3, 3, 3, 3]


@pytest.mark.parametrize("limit", [0, 1, 5, 16])
def test_a_batch_is_halved_until_it_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    """On a device with memory for so many windows."""
    model, compute_loss = random_model(cross_attention=True).train(), memory.loss

    def limited_loss(model: HRMModel, batch: Batch) -> Loss:
        if len(batch.y_out) > limit:
            raise torch.OutOfMemoryError
        return compute_loss(model, batch)

    monkeypatch.setattr(memory, "loss", limited_loss)
    if limit == 0:
        with pytest.raises(HRMError, match="--size or --max_len"):
            fit_batch_size(model, 16, torch.float32)
        return
    fitting = fit_batch_size(model, 16, torch.float32)
    assert fitting <= limit < 2 * fitting
    assert ("batch size" in capsys.readouterr().err) == (fitting < 16)
    assert all(p.grad is None for p in model.parameters())


def test_texts_are_written_on_the_cpu_unless_a_device_is_named(gpus: pytest.MonkeyPatch) -> None:
    parser = build_parser()
    for flags, device in ((), "cpu"), (("--device", "cuda"), "cuda"), (("--cpu",), "cpu"):
        args = parser.parse_args(["generate", *flags])
        assert common.choose_device(args, "cpu") == torch.device(device)
    assert common.choose_device(parser.parse_args(["pretrain"])) == torch.device("cuda")


def test_windows_grow_in_length_only_on_a_gpu() -> None:
    """As many bytes a step: a small batch would take it hardly less time."""
    options = PretrainConfig(batch_size=64)
    for progress, on_cpu, on_gpu in (
        (0, (16, 4), (64, 4)),
        (0.5, (32, 2), (64, 2)),
        (1, (64, 1), (64, 1)),
    ):
        assert batch_shape(options, 512, progress) == on_cpu
        assert batch_shape(options, 512, progress, device=torch.device("cuda")) == on_gpu


def test_triton_without_a_compiler() -> None:
    error = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    assert "compiler: install one" in (describe_system_error(error) or "")
