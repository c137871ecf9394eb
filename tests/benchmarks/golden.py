"""Golden check: does a change that should not change results leave them equal, to the bit?

    python tests/benchmarks/golden.py > before.txt
    ...
    python tests/benchmarks/golden.py | diff before.txt -

Trains two small models on the bundled samples in float32 on one thread, with a fixed seed and a
fixed number of steps. Prints the loss of each step of pretraining and of finetuning, a checksum of
the weights (whatever their names and shapes), scores with all digits, and greedy and sampled text.
Compare runs on one machine only: another CPU may round differently.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import hrm_esp
from hrm_esp import FinetuneConfig, HRMConfig, PretrainConfig
from hrm_esp.training import metrics_log

STEPS = 30
SAMPLES = Path(hrm_esp.__file__).parent / "samples"
MODEL = {"d_model": 64, "n_heads": 2, "n_layers_enc": 1, "n_layers_dec": 2, "max_len": 128}
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "default": ({}, {}),
    "plain": (
        {"positions": "learned", "gumbel": False, "count_max": 0},
        {"optimizer": "adamw", "lr": 2e-3, "denoise": 0.0},
    ),
}
PROMPTS = ["Había una vez", "La niña abrió la puerta y", ""]


def losses(folder: Path, stage: str) -> list[float]:
    """The training loss of each logged step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [entry for line in lines if (entry := json.loads(line))["stage"] == stage]
    return [entry["train_bpb"] for entry in entries if "train_bpb" in entry]


def checksum(path: Path) -> str:
    """Of the values of all weights of a saved state, in any order and whatever their names."""
    weights = torch.load(path, weights_only=True)["weights"].values()
    digests = [hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in weights]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def show_training(folder: Path, stage: str, score: object) -> None:
    print(f"{stage} losses", *losses(folder, stage))
    print(f"{stage} weights", checksum(folder / f"{stage}_state.pt"))
    print(f"{stage} score", repr(score))


def show_texts(model: hrm_esp.HRMModel) -> None:
    """Text in both modes, drafted and not, alone and together, guided by a code or not."""
    length = {"max_new_tokens": 200, "min_new_tokens": 200, "precision": "fp32"}
    for mode in ("continue", "answer"):
        options: list[dict[str, object]] = [
            {"temperature": 0.0, "draft_len": 0},
            {"temperature": 0.0},
            {"temperature": 0.8, "seed": 1},
            {"temperature": 1.0, "seed": 2, "draft_len": 0, "top_k": 20, "top_p": 0.9},
        ]
        if model.config.gumbel:
            options.append({"temperature": 0.7, "seed": 3, "plan_code": 3, "guidance": 2.0})
        for chosen in options:
            text = hrm_esp.generate(model, PROMPTS[0], mode=mode, **length, **chosen)
            print("text", mode, chosen, repr(text))
        for done in hrm_esp.generate_batch(model, PROMPTS, mode=mode, seed=4, **length):
            print("text", mode, "together", repr(done.text))


def main() -> None:
    torch.set_num_threads(1)
    metrics_log.LOG_SECONDS = 0.0  # each step
    for name, (config, options) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            corpus, pairs = folder / "corpus.txt", folder / "pairs.tsv"
            stories = (SAMPLES / "cuentos.txt").read_text(encoding="utf-8")
            corpus.write_text("\n".join(stories.splitlines()[:120]), encoding="utf-8")
            rows = (SAMPLES / "numeros.tsv").read_text(encoding="utf-8").splitlines()[:300]
            pairs.write_text("\n".join([*rows, "solo texto, sin respuesta"]), encoding="utf-8")
            print(f"== {name}")
            shared = {"steps": STEPS, "out_dir": str(folder), "precision": "fp32", "seed": 5}
            result = hrm_esp.train_lm(
                corpus,
                HRMConfig(**MODEL | config),  # type: ignore[arg-type]
                PretrainConfig(batch_size=4, **shared | options),  # type: ignore[arg-type]
                device=torch.device("cpu"),
            )
            show_training(folder, "pretrain", result.score)
            model = hrm_esp.load_model(result.best)
            print("text score", hrm_esp.evaluate(model, corpus, precision="fp32"))
            show_texts(model)
            options.pop("denoise", None)
            tuned = hrm_esp.train_ft(
                pairs,
                result.last,
                FinetuneConfig(**shared | options),  # type: ignore[arg-type]
                device=torch.device("cpu"),
            )
            show_training(folder, "finetune", tuned.score)
            model = hrm_esp.load_model(tuned.best)
            print("pair score", hrm_esp.evaluate(model, pairs, precision="fp32"))
            show_texts(model)


if __name__ == "__main__":
    main()
