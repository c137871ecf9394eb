"""A Hugging Face Llama of the same size, to compare with."""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hrm_esp import HRMConfig
from hrm_esp.data import Batch
from hrm_esp.device import autocast
from hrm_esp.tokenizer import PAD, VOCAB_SIZE


def new_llama(config: HRMConfig, **changes: object) -> LlamaForCausalLM:
    """Builds a Llama with as many layers as Planner and Executor together, so with as many weights
    in its matrices, cross-attention aside.

    Args:
        changes: fields of `LlamaConfig`.
    """
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_mult * config.d_model,
        "num_hidden_layers": config.n_layers_enc + config.n_layers_dec,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "max_position_embeddings": config.max_len,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | changes))


class LlamaTrainer:
    """A Llama, its loss and its optimizer."""

    def __init__(
        self, config: HRMConfig, lr: float, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.dtype = device, dtype
        self.model = new_llama(config, use_cache=False).to(device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def nll(self, batch: Batch) -> torch.Tensor:
        """Returns the negative log-likelihood of all targets, in nats."""
        batch = batch.to(self.device)
        ids = batch.y_in.masked_fill(batch.y_in == PAD, 0)  # on the right: changes nothing
        with autocast(self.device, self.dtype):
            logits = self.model(ids).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.y_out.flatten(), ignore_index=PAD, reduction="sum"
        )

    def train_step(self, batch: Batch) -> None:
        (self.nll(batch) / batch.y_out.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
