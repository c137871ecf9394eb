"""How many kernels a training step starts on a GPU, and how often the host waits for it.

    python tests/benchmarks/launches.py --size small base

Counted on a device that only pretends to be a GPU, see pretend_cuda.py, so that a change can be
judged without one. Starting a kernel takes 5 to 20 us: with 1,000 of them a step takes 5 to 20 ms,
however little there is to compute. Norms and gradients that PyTorch computes for all tensors of a
list at once are counted one by one. Needs g++.
"""

import tempfile

import pretend_cuda  # isort: skip  (before torch)

import numpy as np
import torch
from common import machine, new_model, new_parser, new_trainer
from gpu_common import SAMPLES, corrupted_batch

from hrm_esp import SIZES, HRMConfig, PretrainConfig, dataset_lm, dataset_tsv
from hrm_esp.data import LMDataset, TSVDataset

N_WINDOWS = 2  # the counts do not depend on it


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--size", nargs="+", default=["small"], choices=SIZES)
    parser.add_argument("--waits", action="store_true", help="also print where the host waits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, {machine()}")
    print("| size | batch | launches | waits |")
    print("| --- | --- | --- | --- |")
    for size in args.size:
        print_counts(size, args.waits)


def print_counts(size: str, with_waits: bool) -> None:
    """Prints the counts of a step on a batch of each kind."""
    config = HRMConfig(**SIZES[size], cross_attention=True)
    text = dataset_lm(SAMPLES / "cuentos.txt", config.max_len, preceding_len=config.preceding_len)
    assert isinstance(text, LMDataset)
    starts = np.arange(N_WINDOWS) * config.max_len
    rows = list(dataset_tsv(SAMPLES / "numeros.tsv", config.max_len))[:20]
    batches = {
        "text": text.windows(starts),
        "corrupted text": corrupted_batch(text, starts),
        "pairs": TSVDataset(rows, config.max_len).collate(rows),
    }
    model = new_model(config, text.stream)
    with tempfile.TemporaryDirectory() as folder, pretend_cuda.Device():
        options = PretrainConfig(
            steps=10**6, out_dir=folder, precision="bf16", batch_size=N_WINDOWS
        )
        trainer = new_trainer(model.to(pretend_cuda.CUDA), text.stream, options)
        for name, batch in batches.items():
            steps = [[batch], [batch]]
            trainer.train_step(*steps)
            pretend_cuda.LAUNCHES.clear()
            pretend_cuda.WAITS.clear()
            trainer.train_step(*reversed(steps))
            n_launches, n_waits = (
                counter.total() for counter in (pretend_cuda.LAUNCHES, pretend_cuda.WAITS)
            )
            print(f"| {size} | {name} | {n_launches} | {n_waits} |", flush=True)
            if with_waits:
                print(*pretend_cuda.WAITS, sep="\n")


if __name__ == "__main__":
    main()
