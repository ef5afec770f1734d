"""LoRA: gradients are those of the merged model, projected; nothing drifts; runs resume and end as others do."""

import json
import shutil

import pytest
import torch
from capture import in_float64, with_random_adapter
from conftest import FAST, fine, mistake, read_metrics, run_main
from test_architectures import tiny_model
from test_common import BATCH, padded
from transformers import AutoModelForCausalLM

import common
import sft
import weights

LORA = ["--lora-rank", 4]


@pytest.fixture
def run(tmp_path):
    """With a fresh adapter on `tiny`, ready to train."""
    args = sft.Args(output_dir=str(tmp_path / "run"), eval_steps=0, num_samples=4, lora_rank=4)
    run = common.Run(args, "sft.py", None, None, bundled_lr=1.0, real_lr=1.0)
    common.load_policy(run)
    return run


def test_gradient_is_that_of_the_merged_model_projected_onto_the_adapters(run):
    """Of weight W + s B A: dA is s B'dW, dB is s dW A'."""
    with_random_adapter(run.adapter)
    lm, factors = common.ChunkedLM(in_float64(run.model)), torch.linspace(-1, 1, 11, dtype=torch.float64)
    (common.token_logprobs(lm, *padded(*BATCH)) * factors).sum().backward()
    merged = in_float64(common.load_model("tiny", torch.device("cpu")))
    merged.load_state_dict(dict(weights.merged_weights(run.model)))
    (common.token_logprobs(common.ChunkedLM(merged), *padded(*BATCH)) * factors).sum().backward()
    seen = 0
    for name, layer in run.model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            whole = merged.get_parameter(f"{name}.weight").grad
            torch.testing.assert_close(a.grad, scale * b.T @ whole, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b.grad, scale * whole @ a.T, rtol=1e-9, atol=1e-12)
            seen += 1
    assert seen == 7 * merged.config.num_hidden_layers  # all linear layers but the head
    assert run.model.get_output_embeddings().weight.grad is None


def test_a_fresh_adapter_changes_nothing_and_off_it_is_the_reference(run, tiny):
    plain = common.token_logprobs(common.ChunkedLM(tiny), *padded(*BATCH))
    assert torch.equal(common.token_logprobs(run.lm, *padded(*BATCH)), plain)
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    trainable = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert not torch.allclose(common.token_logprobs(run.lm, *padded(*BATCH)), plain)
    reference = common.load_reference(run)
    assert torch.equal(common.token_logprobs(reference, *padded(*BATCH)), plain)
    assert [name for name, p in run.model.named_parameters() if p.requires_grad] == trainable


def test_merged_weights_are_those_of_peft_and_leave_the_model_as_it_is(run):
    with_random_adapter(run.adapter)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    ours = dict(weights.merged_weights(run.model))
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    theirs = run.adapter.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].double(), theirs[name].double(), rtol=1e-6, atol=1e-7)


def test_the_folders_of_a_run_are_models(tmp_path):
    flags = [*FAST, *LORA, "--eval-steps", 2, "--eval-samples", 8, "--output-dir"]
    fine(run_main("grpo.py", *flags, tmp_path / "run"))
    ids, load = torch.tensor([[5, 6, 7, 8]]), AutoModelForCausalLM.from_pretrained
    final, step = load(tmp_path / "run" / "final"), load(tmp_path / "run" / "step_2", dtype=torch.float32)
    assert final.dtype == torch.float32
    torch.testing.assert_close(step(ids).logits, final(ids).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors").exists()
    accuracy = read_metrics(tmp_path / "run")[-1]["eval/accuracy"]
    for name in ("step_2", "final"):
        model = ["--model", tmp_path / "run" / name, "--num-samples", 8, "--max-new-tokens", 24]
        fine(run_main("evaluate.py", *model, "--output-dir", tmp_path / f"of-{name}"))
        assert json.loads((tmp_path / f"of-{name}" / "metrics.json").read_text())["eval/accuracy"] == accuracy


def test_an_adapter_trains_on_or_merged_but_not_at_another_rank_or_on_another_base(tmp_path):
    fine(run_main("sft.py", *FAST[:6], *LORA, "--output-dir", tmp_path / "run"))
    adapter, other = tmp_path / "run" / "step_2", tmp_path / "other"
    for name, flags in {"on": LORA, "merged": []}.items():
        fine(run_main("sft.py", *FAST[:6], "--model", adapter, *flags, "--output-dir", tmp_path / name))
        assert (tmp_path / name / "step_2" / "adapter_model.safetensors").exists() == (name == "on")
    shutil.copytree(adapter, other)
    settings = json.loads((other / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tmp_path)}
    (other / "adapter_config.json").write_text(json.dumps(settings))
    mistakes = {"go on with it by --lora-rank 4 --lora-alpha 32": ["--model", adapter, "--lora-rank", 8]}
    mistakes["cannot load"] = ["--model", other, *LORA]
    mistakes["take one of them"] = ["--from-scratch", *LORA]
    for reason, flags in mistakes.items():
        assert reason in mistake(run_main("sft.py", *FAST[:6], *flags, "--output-dir", tmp_path / "x"))


def test_what_will_not_fit_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "free_memory", lambda device: 10e6)
    assert "GB for gradients and moments" in mistake(run_main("grpo.py", *FAST, "--output-dir", tmp_path / "run"))


def test_layers_within_layers_are_split():
    model = tiny_model("mbart", scale=4.0)
    whole = common.token_logprobs(model, *padded(*BATCH))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        lm = common.ChunkedLM(model, split_on=torch.device("cpu"))
        assert torch.equal(common.token_logprobs(lm, *padded(*BATCH)), whole)
    finally:
        torch.distributed.destroy_process_group()


def test_a_pass_in_bf16_keeps_no_copy_of_all_layers(tiny):
    kept = []
    hook = tiny.model.norm.register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    common.token_logprobs(common.ChunkedLM(tiny, torch.bfloat16), *padded(*BATCH))
    hook.remove()
    assert set(kept) == {False}
