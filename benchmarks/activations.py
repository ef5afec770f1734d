"""Memory that a training pass keeps for backward, for models of Qwen2.5's shapes, measured on a CPU, random weights.

    python benchmarks/activations.py

In bfloat16 autocast, packed batches, the loop of SDPA. Two numbers a model, without and with gradient checkpointing:
bytes for each token, and bytes for the bfloat16 copies of the weights. Each layer is alike, so models of one and two
layers at two lengths give both: the growth with the length is the tokens', the rest the copies'.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import common

SHAPES = {  # layers, and Qwen2Config's
    "Qwen2.5-0.5B": (24, {"hidden_size": 896, "num_attention_heads": 14, "intermediate_size": 4864}),
    "Qwen2.5-1.5B": (28, {"hidden_size": 1536, "num_attention_heads": 12, "intermediate_size": 8960}),
}


def kept_bytes(shape: dict[str, int], layers: int, tokens: int, checkpointing: bool) -> int:
    """Storage that autograd keeps of one forward pass, the parameters themselves left out."""
    config = Qwen2Config(**shape, num_hidden_layers=layers, num_key_value_heads=2, vocab_size=1000)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    policy, kept = common.ChunkedLM(model, torch.bfloat16, attn="sdpa"), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    ids = torch.randint(1000, (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        common.token_logprobs(policy, ids, torch.ones_like(ids), torch.ones_like(ids))
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    for name, (layers, shape) in SHAPES.items():
        for checkpointing in (False, True):
            at = {(n, t): kept_bytes(shape, n, t, checkpointing) for n in (1, 2) for t in (256, 512)}
            per_token = {n: (at[n, 512] - at[n, 256]) / 256 for n in (1, 2)}
            tokens = per_token[1] + (layers - 1) * (per_token[2] - per_token[1])
            fixed = {n: at[n, 256] - 256 * per_token[n] for n in (1, 2)}
            copies = fixed[1] + (layers - 1) * (fixed[2] - fixed[1])
            words = f"{tokens / 1e6:.2f} MB a token, copies {copies / 1e9:.2f} GB"
            print(f"{name}, checkpointing {'on' if checkpointing else 'off'}: {words}")
