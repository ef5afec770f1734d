"""Every causal architecture of transformers, tiny, random and scaled up: right, or refused in one line; never wrong.

Right: log-probs and gradients, packed or padded, equal those of whole logits, one sequence at a time; and so do the
log-probs that completions were drawn with, in a batch with a group, with padding and with rows that stop.
"""

import json

import pytest
import torch
import transformers
from conftest import ROOT
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import common
from common import ChunkedLM, HFEngine, UserError, token_logprobs

LISTED = json.loads((ROOT / "tests" / "architectures.json").read_text())
OUTCOMES = {kind: outcome for outcome, kinds in LISTED["outcomes"].items() for kind in kinds}
IS_LISTED = transformers.__version__.startswith(LISTED["transformers"])  # in others nothing may be wrong either
SEQUENCES = LISTED["sequences"]  # token ids, and how many of the last ones train: two share a prefix


def tiny_config(kind, left_out):
    config_class = CONFIG_MAPPING[kind]
    text = config_class().get_text_config()
    known = set(text.to_dict()) | set(text.attribute_map)
    sizes = {name: size for name, size in LISTED["sizes"].items() if name in known and name not in left_out}
    if "num_key_value_heads" in left_out:
        sizes["num_key_value_heads"] = 4
    if "num_hidden_layers" in known and ("num_hidden_layers" in left_out or "layer_types" in known):
        sizes["num_hidden_layers"] = 4  # enough for a layer of each kind
    if type(text) is config_class:
        return config_class(**sizes)
    part = next(name for name in config_class.sub_configs if type(getattr(config_class(), name)) is type(text))
    return config_class(**{part: type(text)(**sizes).to_dict()})


def tiny_model(kind, scale):
    """None where no combination of small sizes gives a small model that runs."""
    for left_out in LISTED["left_out"]:  # of the sizes
        torch.manual_seed(0)
        try:
            config = tiny_config(kind, left_out)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            if model.num_parameters() > 5e6:
                continue
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        except Exception:  # of a configuration that does not like these sizes: any
            continue
        for parameter in model.parameters():
            parameter.data.mul_(scale if parameter.ndim >= 2 else 1)
        return model
    return None


def plain_logprobs(model, ids, trained):
    every = model(input_ids=torch.tensor([ids]), use_cache=False).logits.float().log_softmax(-1)[0]
    return torch.stack([every[t - 1, ids[t]] for t in range(len(ids) - trained, len(ids))])


def gradient_of(model, logprobs):
    model.zero_grad()
    logprobs.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_an_architecture_is_right_or_refused(tmp_path, tokenizer, kind):
    outcome = OUTCOMES.get(kind, "right")
    model = None if IS_LISTED and outcome.startswith("not small") else tiny_model(kind, scale=4.0)
    if model is None:
        assert outcome.startswith("not small") or not IS_LISTED
        pytest.skip("not small with these sizes")
    model.save_pretrained(tmp_path)
    try:
        try:
            model, attn = common.load_model(str(tmp_path), torch.device("cpu")), "auto"
        except UserError:
            model, attn = common.load_model(str(tmp_path), torch.device("cpu"), "eager"), "eager"
    except UserError:
        assert outcome.startswith("refused") or not IS_LISTED
        return
    assert not outcome.startswith("refused")
    expected = [plain_logprobs(model, ids, trained) for ids, trained in SEQUENCES]
    wanted = gradient_of(model, torch.cat(expected))

    lm = ChunkedLM(model, attn=attn)
    assert kind not in LISTED["packed"] or lm.kernel is not None
    rows = [(ids, [0] * (len(ids) - trained) + [1] * trained) for ids, trained in SEQUENCES]
    logprobs = token_logprobs(lm, *common.collate(rows, torch.device("cpu"))[:3])
    for row, (ids, trained), alone in zip(logprobs, SEQUENCES, expected, strict=True):
        torch.testing.assert_close(row[len(ids) - trained : len(ids)], alone, rtol=1e-4, atol=1e-4)
    gradient = gradient_of(model, logprobs)
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()

    try:
        engine = HFEngine(lm, tokenizer, 512)
    except UserError:
        assert outcome == "trained, but without rollouts" or not IS_LISTED
        return
    engine.stop_ids = range(5, 64, 3)
    prompts = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [3, 4, 5, 6, 7, 8, 9]]
    completions = engine.generate(prompts, [*range(4)], max_new_tokens=12, temperature=1.0)
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            alone = plain_logprobs(model, prompt + completion.token_ids, len(completion.token_ids))
        torch.testing.assert_close(torch.tensor(completion.logprobs), alone, rtol=1e-3, atol=1e-3)


def test_a_cap_on_logits_is_seen_however_small_they_are(tmp_path):
    model = tiny_model("gemma2", scale=1.0)
    assert model(input_ids=torch.tensor([[1, 2]])).logits.abs().max() < 1
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="caps or scales its logits"):
        common.load_model(str(tmp_path), torch.device("cpu"), "eager")
