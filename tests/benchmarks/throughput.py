"""Speed of training in bytes per second, and how much of it is matrix products.

    pip install '.[bench]'
    python tests/benchmarks/throughput.py corpus.txt --size small

Full batches of full windows of plain text, optimizer included, beside a Hugging Face Llama of the
same size, timed in turn. Utilization is the time that the matrix products of a step would take at
the speed at which this machine multiplies matrices of such shapes, divided by the time of the step;
the forward and backward pass and the optimizer are counted apart.
"""

import statistics
import tempfile

import torch
from common import count_flops, machine, new_model, new_parser, new_trainer, time_alternately
from llama import LlamaTrainer

from hrm_esp.config import SIZES, HRMConfig, PretrainConfig
from hrm_esp.data import load_stream
from hrm_esp.device import autocast, choose_device, keep_freed_memory
from hrm_esp.training import loss

N_PRODUCTS = 8  # timed together


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    # Step 1: both models, and a batch.
    stream, device = load_stream([args.corpus]), choose_device()
    config = HRMConfig(**SIZES[args.size])
    with tempfile.TemporaryDirectory() as folder:
        options = PretrainConfig(steps=10**6, denoise=0.0, out_dir=folder)
        trainer = new_trainer(new_model(config, stream).to(device), stream, options)
    llama = LlamaTrainer(config, 1e-3, device, trainer.dtype)
    keep_freed_memory()  # as training does: it makes both faster
    _, batch = next(trainer.data.batches(lambda: (args.batch_size, 1), 0, 0))
    n, d = batch.y_in.numel(), config.d_model
    x = torch.randn(n, d, dtype=trainer.dtype, device=device)
    weight = torch.randn(2 * config.ff_mult * d, d, dtype=trainer.dtype, device=device)

    # Step 2: what to time.
    def forward() -> torch.Tensor:
        with autocast(device, trainer.dtype):
            return loss(trainer.model, batch.to(device)).total

    def forward_backward() -> None:
        forward().backward()

    def optimizer_step() -> None:
        for optimizer in trainer.optimizers:
            optimizer.step()

    def products() -> None:
        for _ in range(N_PRODUCTS):
            torch.nn.functional.linear(x, weight)

    # Step 3: count operations, then time.
    model_flops = count_flops(forward_backward)
    optimizer_flops = count_flops(optimizer_step)
    timings = time_alternately(
        {
            "HRM-ESP": lambda _: trainer.train_step([batch]),
            "Llama": lambda _: llama.train_step(batch),
            "products": lambda _: products(),
            "forward": lambda _: forward().detach(),
        },
        args.steps,
        n_warmup=2,
    )
    median = {name: statistics.median(t.seconds for t in rows) for name, rows in timings.items()}
    # Step 4: print.
    speed = N_PRODUCTS * 2 * n * weight.numel() / median["products"]
    print(f"size {args.size}, {args.batch_size} windows of {config.max_len} bytes, {trainer.dtype}")
    print(f"{machine()}, {torch.get_num_threads()} threads, {device}\n")
    print("| model | bytes/s | seconds per step |\n| --- | --- | --- |")
    for name in ("HRM-ESP", "Llama"):
        print(f"| {name} | {n / median[name]:,.0f} | {median[name]:.3f} |")
    print(
        f"\nmatrix products alone: {speed / 1e9:,.0f} GFLOP/s; forward: {median['forward']:.3f} s"
    )
    print(
        f"utilization: {model_flops / speed / median['HRM-ESP']:.0%} in the model, "
        f"{optimizer_flops / speed / median['HRM-ESP']:.0%} in the optimizer"
    )


if __name__ == "__main__":
    main()
