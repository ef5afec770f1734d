"""A model's weights where they are not simply its tensors: adapted by LoRA, or split over the processes by FSDP2.

And whether training them will fit. A split model's tensors are DTensors: each layer gathers its own before it computes
and drops them after, and gradients are added up where a part of them lives.
"""

import importlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import chat
from chat import BUNDLED, UserError


def check_memory(run: Any, count: int) -> None:
    """Raises a UserError when gradients and moments of `count` weights and the activations of a pass will not fit."""
    text = run.model.config.get_text_config()
    wide = 5 if run.args.gradient_checkpointing else 80  # bytes a token, layer and hidden unit, as measured
    activations = run.micro_batch_tokens * text.num_hidden_layers * text.hidden_size * wide
    needed, what = count * 12, "gradients and moments"  # float32, two moments
    if run.args.shard:
        needed /= run.processes
        if run.load_device != run.device:  # a part of the weights is yet to come
            needed += sum(p.nbytes for p in run.model.parameters()) / run.processes
            what = "weights, gradients and moments"
    free = free_memory(run.device)
    if needed + activations > free:
        parts = f"{needed / 1e9:.1f} GB for {what}, {activations / 1e9:.1f} GB for a pass"
        advice = "--gradient-checkpointing, a lower --micro-batch-tokens, or --lora-rank 16"
        raise UserError(f"{run.source} needs {parts}, {free / 1e9:.1f} GB are free: try {advice}")


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU has left, or on a CPU this container or machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no such files, or no limit: "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # of files that were read, and can go
    return free


def add_adapter(run: Any) -> Any:
    """LoRA (https://arxiv.org/abs/2106.09685) on all linear layers but the head, in float32; what it adapts is frozen.

    A fresh adapter adds nothing: its second matrix is 0. Raises a UserError for a source of another rank.
    """
    peft: Any = importlib.import_module("peft")
    rank, alpha = run.args.lora_rank, run.args.lora_alpha
    with chat.loading(f"an adapter on {run.source}"):
        if chat.base_of(run.source) == BUNDLED.get(run.source, run.source):
            config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
            return peft.get_peft_model(run.model, config)
        adapter = peft.PeftModel.from_pretrained(run.model, run.source, is_trainable=True)
        config = adapter.peft_config["default"]
        if (config.r, config.lora_alpha) != (rank, alpha):
            words = f"--lora-rank {config.r} --lora-alpha {config.lora_alpha:g}"
            raise ValueError(f"go on with it by {words}, or train its merged weights by --lora-rank 0")
    return adapter


def merged_weights(model: nn.Module) -> Generator[tuple[str, Tensor]]:
    """Name and tensor of each of a model's weights, with what LoRA adds to it, in float32 and one after the other.

    The model stays as it is: merging in place, and taking out again, would change low-precision weights each time.
    """
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        layer, adapted, kind = name.partition(".base_layer.")
        if adapted and kind == "weight":
            adapted_layer: Any = model.get_submodule(layer)
            exact = torch.promote_types(tensor.dtype, torch.float32)
            tensor = tensor.to(exact) + adapted_layer.get_delta_weight("default").to(exact)
        yield name.replace(".base_layer.", "."), tensor


def split(lm: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Leaves a part of each weight with each process (https://arxiv.org/abs/2304.11277): by layer, and the rest as one.

    A frozen model's embedding and head stay whole: a head is used outside of a pass, as often as a process likes.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in reversed(layers):  # inner ones first
        fully_shard(layer, reshard_after_forward=True)
    if any(parameter.requires_grad for parameter in model.parameters()):
        fully_shard(lm, reshard_after_forward=True)
    model.to(device)


@contextmanager
def gathered(lm: nn.Module) -> Generator[None]:
    """All weights on every process, for a rollout. Of a model that is not split nothing changes."""
    parts = [module for module in lm.modules() if isinstance(module, FSDPModule)]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be split, gathered: for all processes together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, split as the parameter is if it is of its shape (a moment)."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def collect(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Whole tensors in the CPU's memory, gathered one after the other. Without `keep` a process only takes part."""
    kept = {}
    for name, tensor in tensors:
        full = whole(tensor)
        if keep:
            kept[name] = full.cpu()
    return kept


def own_tensors(model: nn.Module, part: str = "") -> Generator[tuple[str, Tensor]]:
    """What a checkpoint holds of a split model: the tensors with `part` in their names, tied ones once."""
    first_names = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if part in name and (name in first_names or not isinstance(tensor, DTensor)):
            yield name, tensor
