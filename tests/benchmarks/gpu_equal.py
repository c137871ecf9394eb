"""Parts of gpu_check.py: whether the GPU gives the results of the CPU, and DistributedDataParallel
those of a single process."""

import copy
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpu_common import (
    Check,
    example_batches,
    gradients,
    randomize,
    relative_error,
    small_config,
)

from hrm_esp import HRMModel, distributed, generate, generate_batch, load_model
from hrm_esp.data import Batch
from hrm_esp.device import autocast
from hrm_esp.model import Codebook
from hrm_esp.training import Checkpoint, loss, save_checkpoint
from hrm_esp.training.loss import BatchSizes, LossModule
from hrm_esp.training.optim import orthogonalize

SUM = BatchSizes(1, 1, 1)  # sums instead of means
PROMPTS = ["La niña", "El"]
MAX_OUTPUT_ERROR, MAX_GRADIENT_ERROR = 1e-4, 2e-3  # float32, CPU and GPU
MAX_DDP_ERROR = 0.02  # of gradients in bfloat16
MIN_COSINE = 0.9  # of gradients in lower precision and in float32
FP16_SCALE = 256  # of the loss, so that float16 gradients do not underflow


def same(check: Check) -> None:
    """Compares the model on the CPU and on the GPU: losses, gradients, counts, texts and
    checkpoints."""
    config = small_config()
    cpu = randomize(check.new_model(config), 0.2)
    gpu = copy.deepcopy(cpu).to(check.device)
    tensors = (*gpu.parameters(), *gpu.buffers())
    check.verdict(all(x.device == gpu.device for x in tensors), "the model is on one device")
    with patch.object(Codebook, "code_weights", lambda self, logits: logits.softmax(-1)):
        for name, batch in example_batches(check, config, 4 if check.quick else 8).items():
            compare_training(check, name, batch, cpu, gpu)
            compare_counts(check, name, batch, cpu, gpu)
            if check.is_cuda:
                compare_precisions(check, name, batch, gpu)
    matrix = torch.randn(128, 512)
    for device in ("cpu", check.device):
        values = torch.linalg.svdvals(orthogonalize(matrix.to(device)).float().cpu())
        low, high = values.min().item(), values.max().item()
        print(f"singular values after Muon's polynomials on {device}: {low:.4f} to {high:.4f}")
    cpu.eval()
    gpu.eval()
    compare_texts(check, cpu, gpu)
    weights = gpu.state_dict()
    loaded = []
    for number, content in enumerate((weights, {name: w.cpu() for name, w in weights.items()})):
        path = check.work / f"checkpoint{number}.pt"
        save_checkpoint(Checkpoint(config, content, "pretrain"), path)
        loaded.append(load_model(path).state_dict())
    is_equal = all(torch.equal(loaded[0][name], loaded[1][name]) for name in weights)
    check.verdict(is_equal, "a checkpoint written on the GPU loads on the CPU")


def compare_training(check: Check, name: str, batch: Batch, cpu: HRMModel, gpu: HRMModel) -> None:
    """Compares the losses and gradients of a batch in float32."""
    results = []
    for model in (cpu, gpu):
        model.train()
        model.zero_grad()
        total, terms = loss(model, batch.to(model.device), sizes=SUM)
        total.backward()
        model.update_code_queue([terms.pooled])
        results.append((terms, gradients(model)))
    (cpu_terms, cpu_grads), (gpu_terms, gpu_grads) = results
    error = max(
        relative_error(getattr(gpu_terms, field), getattr(cpu_terms, field))
        for field in ("mixture", "network", "plan_bow", "code_logits")
    )
    check.verdict(error < MAX_OUTPUT_ERROR, f"fp32, {name}: losses differ by {error:.1e}")
    error, parameter = max(
        (relative_error(grad, cpu_grads[n]), n)
        for n, grad in gpu_grads.items()
        if cpu_grads[n].norm() > 1e-6
    )
    is_ok = error < MAX_GRADIENT_ERROR and cpu_grads.keys() == gpu_grads.keys()
    check.verdict(is_ok, f"fp32, {name}: gradients differ by {error:.1e} ({parameter})")


def compare_counts(check: Check, name: str, batch: Batch, cpu: HRMModel, gpu: HRMModel) -> None:
    """Compares the n-gram counts at all positions of a batch."""
    results = []
    for model in (cpu, gpu):
        ngrams = model.executor.ngrams
        on_device = batch.to(model.device)
        window = on_device.y_in, on_device.y_out, on_device.preceding_ids
        assert ngrams is not None
        found, target_count = ngrams.lookup(*window, leave_one_out=True)
        stats = found.context_count, found.context_index, found.token_index, found.frequency
        results.append([values.double().cpu() for values in (*stats, target_count)])
    is_equal = all(map(torch.equal, *results))
    check.verdict(is_equal, f"{name}: n-gram counts are equal")


def compare_precisions(check: Check, name: str, batch: Batch, model: HRMModel) -> None:
    """Compares the loss and the gradients of a batch in each precision with those in float32."""
    losses: list[torch.Tensor] = []
    grads: list[dict[str, torch.Tensor]] = []
    for dtype, max_error in ((torch.float32, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 0.01)):
        model.zero_grad()
        with autocast(check.device, dtype):
            total, terms = loss(model, batch.to(check.device), sizes=SUM)
        scale = FP16_SCALE if dtype is torch.float16 else 1
        (total * scale).backward()
        losses.append(terms.mixture.detach())
        grads.append({n: g.flatten().double() / scale for n, g in gradients(model).items()})
        cosine, parameter = min(
            (float(F.cosine_similarity(grad, grads[0][n], dim=0)), n)
            for n, grad in grads[-1].items()
            if grads[0][n].norm() > 1e-3
        )
        error = relative_error(losses[-1], losses[0])
        check.verdict(
            error < max_error and cosine > MIN_COSINE,
            f"{dtype}, {name}: loss differs by {error:.1e}, "
            f"smallest cosine of gradients {cosine:.4f} ({parameter})",
        )


def compare_texts(check: Check, cpu: HRMModel, gpu: HRMModel) -> None:
    """Compares greedy texts, with and without drafts, alone and together."""
    texts = []
    for model in (cpu, gpu):
        of_model = [
            generate(
                model, prompt, temperature=0, max_new_tokens=150, precision="fp32", draft_len=n
            )
            for prompt in PROMPTS
            for n in (0, 24)
        ]
        together = generate_batch(
            model, [*PROMPTS, "Un día de verano que"], temperature=0, max_new_tokens=150,
            precision="fp32", mode="answer",
        )  # fmt: skip
        texts.append(of_model + [completion.text for completion in together])
    n_equal = sum(a == b for a, b in zip(*texts, strict=True))
    check.verdict(
        texts[0] == texts[1], f"{n_equal} of {len(texts[0])} greedy texts in fp32 are equal"
    )


def nccl(check: Check) -> None:
    """Compares gradients with and without DistributedDataParallel, in one process with NCCL and
    gloo."""
    backend = "cpu:gloo,cuda:nccl" if check.is_cuda else "gloo"
    store = f"file://{check.work}/process_group"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        config = small_config(n_layers_enc=1, recent_len=64)
        model = randomize(check.new_model(config), 0.1).to(check.device).train()
        plain = LossModule(model, codebook_penalty=0.1)
        with patch.object(distributed, "world_size", return_value=2):  # one is not wrapped
            wrapped = distributed.data_parallel(
                plain, find_unused=True, synced_buffers=("pooled_queue",)
            )
        for name, batch in example_batches(check, config).items():
            grads = []
            for module in (plain, wrapped):
                model.zero_grad()
                torch.manual_seed(0)  # of the codebook's noise
                with autocast(check.device, torch.bfloat16):
                    total, _ = module(batch.to(check.device), SUM)
                total.backward()
                grads.append(gradients(model))
            error = max(
                relative_error(g, grads[0][n]) for n, g in grads[1].items() if n in grads[0]
            )
            check.verdict(
                error < MAX_DDP_ERROR,
                f"DistributedDataParallel with {backend}, {name}: gradients differ by {error:.1e}",
            )
    finally:
        dist.destroy_process_group()
