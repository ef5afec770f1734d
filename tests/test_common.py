"""Masks, log-probs, batches, the sampler and the optimizer step are exact."""

import copy
import json
import math
import subprocess
import sys
import types
from fractions import Fraction

import pytest
import torch
import transformers
from accelerate import Accelerator
from capture import in_float64
from conftest import ROOT
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

import common
from common import ChunkedLM, HFEngine, UserError, completion_seed, encode_chat, encode_prompt, token_logprobs

CPU = torch.device("cpu")


def chat(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def trained_text(tokenizer, messages, **template_args):
    """Each run of trained tokens, as text with special tokens."""
    ids, mask = encode_chat(tokenizer, messages, **template_args)
    assert len(ids) == len(mask)
    runs, before = [], 0
    for token, keep in zip(ids, mask, strict=True):
        if keep:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = keep
    return [tokenizer.decode(run) for run in runs]


# ---- Masks


def test_only_assistant_tokens_and_their_stop_tokens_train(tokenizer):
    assert trained_text(tokenizer, chat("a b", "c d")) == ["c d<|im_end|>"]
    assert trained_text(tokenizer, chat("a", "b", "c", "d e")) == ["b<|im_end|>", "d e<|im_end|>"]
    system = [{"role": "system", "content": "assistant\nb"}]
    assert trained_text(tokenizer, system + chat("a", "b", "a", "b")) == ["b<|im_end|>"] * 2


def test_masks_of_awkward_turns(tokenizer):
    assert trained_text(tokenizer, chat("a", "", "a", "b")) == ["<|im_end|>", "b<|im_end|>"]  # an empty turn still ends
    assert trained_text(tokenizer, chat("a", " b\n\n")) == [" b\n\n<|im_end|>"]
    assert trained_text(tokenizer, chat("a", "b", "c")) == ["b<|im_end|>"]  # ends with the user
    twice = [*chat("a", "b"), {"role": "assistant", "content": "c"}]
    assert trained_text(tokenizer, twice) == ["b<|im_end|>", "c<|im_end|>"]
    assert trained_text(tokenizer, chat("user", "assistant\nuser")) == ["assistant\nuser<|im_end|>"]


def test_prompt_is_the_beginning_of_the_conversation(tokenizer):
    ids, mask = encode_chat(tokenizer, chat("a", "b", "c", "d"))
    prompt = encode_prompt(tokenizer, chat("a", "b", "c"))
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_template_arguments_reach_the_template(tokenizer, monkeypatch):
    template = tokenizer.chat_template + "{{ ending }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids, _ = encode_chat(tokenizer, chat("a", "b"), ending="!!")
    assert tokenizer.decode(ids).endswith("!!")
    assert tokenizer.decode(encode_prompt(tokenizer, chat("a"), ending="!!")).endswith("!!")


def test_a_conversation_without_an_assistant_is_refused(tokenizer):
    with pytest.raises(UserError, match="nothing to train"):
        encode_chat(tokenizer, chat("a"))


# ---- Tokenizers against their models


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder with all that is known of a model before its weights are loaded."""
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((ROOT / "models" / "tiny" / name).read_text())
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def rewrite(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def check(folder, change=lambda tokenizer: None):
    tokenizer = common.load_tokenizer(str(folder))
    change(tokenizer)
    return common.check_tokenizer(tokenizer, str(folder), {})


def test_start_up_says_what_begins_ends_and_pads(folder):
    assert check(folder) == (
        "tokens     no BOS, stop <|im_end|>, pad <|endoftext|>, 299 tokens in 299 rows, context 512"
    )
    rewrite(folder / "generation_config.json", eos_token_id=[0, 2])
    assert "stop <|endoftext|>, <|im_end|>," in check(folder)  # united
    (folder / "generation_config.json").unlink()
    assert "stop <|im_end|>," in check(folder)  # the tokenizer and the template know it


def test_a_tokenizer_of_another_model_is_refused(folder):
    with pytest.raises(UserError, match="has 300 tokens, the model 299 rows"):
        check(folder, lambda tokenizer: tokenizer.add_tokens("<more>"))
    placeholder = {"additional_special_tokens": ["<image>"]}
    assert "300 tokens in 299 rows" in check(folder, lambda tokenizer: tokenizer.add_special_tokens(placeholder))

    def use_it(tokenizer):
        tokenizer.add_special_tokens(placeholder)
        tokenizer.chat_template = "<image>" + tokenizer.chat_template

    with pytest.raises(UserError, match="has 300 tokens, the model 299 rows"):
        check(folder, use_it)
    rewrite(folder / "generation_config.json", eos_token_id=[2, 50256])
    with pytest.raises(UserError, match=r"stop tokens \[2, 50256\] of 299: correct eos_token_id"):
        check(folder)


def test_a_model_that_cannot_stop_is_refused(folder):
    rewrite(folder / "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink()

    def nothing_ends(tokenizer):
        tokenizer.eos_token = None
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    with pytest.raises(UserError, match=r"stop tokens \[\]"):
        check(folder, nothing_ends)


def test_one_bos_is_said_and_two_are_refused(folder):
    def with_bos(times):
        def change(tokenizer):
            tokenizer.bos_token = "<|endoftext|>"
            tokenizer.chat_template = "{{ bos_token }}" * times + tokenizer.chat_template

        return change

    assert "BOS <|endoftext|>, stop" in check(folder, with_bos(1))
    with pytest.raises(UserError, match=r"writes <\|endoftext\|> twice: pass a --chat-template"):
        check(folder, with_bos(2))
    assert check(folder, with_bos(0)).count("\n") == 0

    def begins_plain_text(tokenizer):
        with_bos(0)(tokenizer)
        only = [("<|endoftext|>", 0)]
        processor = TemplateProcessing(single="<|endoftext|> $A", pair="$A $B", special_tokens=only)
        tokenizer.backend_tokenizer.post_processor = processor

    assert "warning    the chat template writes no <|endoftext|>, with which" in check(folder, begins_plain_text)


def test_templates_that_train_other_than_they_generate_are_told(folder):
    def set_template(template):
        return lambda tokenizer: setattr(tokenizer, "chat_template", template)

    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    told = check(folder, set_template(text + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"))
    assert "turns train without a stop token" in told
    assert "generation begins" not in told
    told = check(folder, set_template(text))
    assert "generation begins after '<|im_start|>user\\na', trained turns after" in told


def test_a_chat_template_can_be_given_and_is_needed(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template: pass --chat-template FILE\.jinja"):
        common.load_tokenizer(str(folder))
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer = common.load_tokenizer(str(folder), str(mine))
    assert trained_text(tokenizer, chat("a", "b")) == ["b<|im_end|>"]
    with pytest.raises(UserError, match=r"cannot load --chat-template missing\.jinja"):
        common.load_tokenizer(str(folder), "missing.jinja")


def test_a_stop_token_that_is_not_special_is_no_text_of_the_completion(folder):
    rewrite(folder / "tokenizer_config.json", eos_token=None, extra_special_tokens=[])
    tokens = json.loads((folder / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    tokenizer = common.load_tokenizer(str(folder))
    assert tokenizer.decode([65, 2], skip_special_tokens=True).endswith("<|im_end|>")  # it lies
    assert trained_text(tokenizer, chat("a", "b")) == ["b<|im_end|>"]
    assert common.stop_token_ids(GenerationConfig(), tokenizer) == [2]
    assert common.Completion([65, 2], [0.0, 0.0], "stop").text(tokenizer) == tokenizer.decode([65])
    assert common.Completion([65, 66], [0.0, 0.0], "length").text(tokenizer) == tokenizer.decode([65, 66])


# ---- Log-probs


@pytest.fixture
def batch():
    """Three sequences of unequal length with holes in their masks, as lists."""
    torch.manual_seed(0)
    ids = [torch.randint(4, 90, (n,)).tolist() for n in (9, 6, 4)]
    return ids, [[0, 0, 1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1], [0, 0, 0, 1]]


def pad(rows, side, value=0, width=11):
    return torch.tensor(
        [r + [value] * (width - len(r)) if side == "right" else [value] * (width - len(r)) + r for r in rows]
    )


def naive_logprobs(model, ids, mask, temperature):
    """One sequence at a time, the whole logits, one token at a time."""
    logits = model(input_ids=torch.tensor([ids])).logits[0] / temperature
    rows = [logits[t - 1].log_softmax(-1) for t in range(1, len(ids))]
    values = [rows[t - 1][ids[t]] if mask[t] else torch.zeros((), dtype=logits.dtype) for t in range(1, len(ids))]
    entropies = [-(row.exp() * row).sum().item() * keep for row, keep in zip(rows, mask[1:], strict=True)]
    return torch.stack([torch.zeros((), dtype=logits.dtype), *values]), torch.tensor([0.0, *entropies])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunked_logprobs_equal_naive_ones_in_value_and_gradient(tiny, batch, monkeypatch, side, chunk, checkpointing):
    monkeypatch.setattr(common, "HEAD_LOGITS", chunk * tiny.config.vocab_size)
    monkeypatch.setattr(common, "HEAD_ROWS", 40)  # of 299
    model = common.load_model("tiny", CPU, "sdpa").double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ids, masks = batch
    weights = torch.linspace(-1, 1, 11, dtype=torch.float64)
    attention = pad([[1] * len(i) for i in ids], side)
    logprobs, entropy = token_logprobs(model, pad(ids, side, 7), attention, pad(masks, side), 0.7)
    assert logprobs.shape == entropy.shape == (3, 11)
    assert logprobs.dtype == torch.float64
    assert not entropy.requires_grad
    (logprobs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for b, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        expected, expected_entropy = naive_logprobs(model, row, mask, 0.7)
        place = slice(0, len(row)) if side == "right" else slice(11 - len(row), 11)
        torch.testing.assert_close(logprobs[b, place], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(entropy[b, place].float(), expected_entropy, rtol=1e-5, atol=1e-5)
        (expected * weights[place]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-9)


def test_nothing_predicts_the_first_token_and_no_token_may_train(tiny):
    ids = torch.tensor([[5, 6, 7]])
    logprobs, _ = token_logprobs(tiny, ids, torch.ones_like(ids), torch.tensor([[1, 0, 0]]))
    assert logprobs.tolist() == [[0, 0, 0]]
    model = common.load_model("tiny", CPU, "sdpa")
    token_logprobs(model, ids, torch.ones_like(ids), torch.zeros_like(ids))[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())  # a dummy takes part, and adds 0


def test_full_logits_of_a_batch_never_exist(tiny, batch, monkeypatch):
    sizes, function = [], common.logprob_and_entropy

    def recorded(logits, *args, **options):
        sizes.append(tuple(logits.shape))
        return function(logits, *args, **options)

    monkeypatch.setattr(common, "logprob_and_entropy", recorded)
    monkeypatch.setattr(common, "HEAD_LOGITS", 4 * tiny.config.vocab_size + 7)
    ids, masks = batch
    logprobs, _ = token_logprobs(tiny, *(pad(x, "right") for x in (ids, [[1] * len(i) for i in ids], masks)))
    logprobs.sum().backward()
    tiny.zero_grad()
    assert sizes == 2 * [(4, 299), (4, 299), (3, 299)]  # 11 trained tokens of 33; backward computes them again


# ---- Packed sequences

PACKED = [  # with a prefix of the one before, all of it, none of it, and beyond its end
    ([5, 6, 7, 8, 9, 10, 11], [0, 0, 0, 1, 0, 1, 0]),
    ([5, 6, 7, 8, 12], [0, 0, 0, 1, 1]),
    ([5, 6, 7, 8, 12], [0, 0, 1, 0, 1]),
    ([5, 6, 7, 8, 12, 13, 14], [0, 1, 1, 0, 1, 0, 1]),
    ([9], [0]),
    ([9, 6, 7], [0, 0, 1]),
]


def packed_batch():
    ids, masks = zip(*PACKED, strict=True)
    return pad(ids, "right"), pad([[1] * len(row) for row in ids], "right"), pad(masks, "right")


ARCHITECTURES = {  # small and random; packs: whether its layers keep neighbours apart
    "qwen2": (transformers.Qwen2Config, {}, True),
    "llama": (transformers.LlamaConfig, {}, True),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}, True),
    "mistral": (transformers.MistralConfig, {"sliding_window": 3}, True),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 3, "sliding_window_pattern": 2}, True),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, None),
    "lfm2": (transformers.Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, False),
}


def small_model(folder, config_class, attn="sdpa", **options):
    torch.manual_seed(0)
    config = config_class(vocab_size=32, bos_token_id=0, eos_token_id=1, pad_token_id=2, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return common.load_model(str(folder), CPU, attn)


def endless_engine(model, tokenizer):
    engine = HFEngine(model, tokenizer, 512)
    engine.stop_ids, engine.pad_id, engine.vocab_size = [], 2, 32
    return engine


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_and_generation_agree_with_each_sequence_alone_whatever_the_architecture(tmp_path, tokenizer, name):
    config_class, options, packs = ARCHITECTURES[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {} if name == "gpt2" else sizes | {"intermediate_size": 64}
    model = small_model(tmp_path, config_class, **sizes, **options)
    assert packs is None or model.batches == ("packed" if packs else "padded")
    prompts = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9]]  # groups, and one token padded
    completions = endless_engine(model, tokenizer).generate(prompts, [*range(5)], max_new_tokens=40, temperature=1.0)
    for prompt, completion in zip(prompts, completions, strict=True):
        mask = [0] * len(prompt) + [1] * 40
        expected, _ = naive_logprobs(model, prompt + completion.token_ids, mask, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected[len(prompt) :], rtol=1e-4, atol=1e-4)
    logprobs, _ = token_logprobs(model, *packed_batch())
    assert logprobs.any()
    for row, (ids, mask) in enumerate(PACKED):
        expected, _ = naive_logprobs(model, ids, mask, 1.0)
        torch.testing.assert_close(logprobs[row, : len(ids)], expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_recurrent_layers_alone_is_refused(tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    engine = endless_engine(small_model(tmp_path, transformers.MambaConfig, "eager", **sizes), tokenizer)
    with pytest.raises(UserError, match="recurrent"):
        engine.generate([[5, 6, 7, 8]], [1], max_new_tokens=4, temperature=1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sequences_have_the_gradient_of_padded_ones(checkpointing):
    model = in_float64(common.load_model("tiny", CPU, "sdpa"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = packed_batch()
    weights = torch.linspace(-1, 1, batch[0].numel(), dtype=torch.float64).view_as(batch[0])
    results = []
    for packs in (True, False):
        lm = ChunkedLM(model)
        lm.packs = packs
        logprobs, _ = token_logprobs(lm, *batch)
        (logprobs * weights).sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert results[0][0].any()
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-11)


def test_a_pass_computes_no_padding_no_prefix_twice_and_nothing_after_the_last_trained_token():
    inputs, where = common.pack(packed_batch()[0], packed_batch()[2])
    # 5 6 7 8 9, then 12 is the last of the second and predicts nothing; the third is the second, whose last token
    # stands in for none of its own; the fourth adds 12 13; the fifth has nothing trained; the sixth begins with it.
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 8, 8, 12, 13, 9, 6]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1]]
    assert inputs["packed_rows"] == [[0, 5], [3, 1], [3, 1], [4, 2], [0, 1], [1, 1]]
    assert where[1, :4].tolist() == [0, 1, 2, 5]
    group = [([7] * 50 + [i, 9, 9], [0] * 50 + [1] * 3) for i in range(8)]
    ids, masks = (torch.tensor([row[n] for row in group]) for n in (0, 1))
    assert common.pack(ids, masks)[0]["input_ids"].shape == (1, 50 + 8 * 2)


def test_a_model_that_mixes_packed_sequences_gets_padded_ones(tiny, monkeypatch):
    assert common.can_pack(tiny)
    attend = common.attend

    def drops(*args, packed_rows=None, **options):
        return attend(*args, **options)

    def refuses(*args, **options):
        if "packed_rows" in options:
            raise TypeError("unexpected keyword argument")
        return attend(*args, **options)

    for broken in (drops, refuses):
        monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", broken)
        assert not common.can_pack(tiny)


# ---- Batches and order


def test_groups_by_prefix_count_a_shared_one_once_and_keep_the_budget():
    sequences = [[1, 2, 3, 4], [7], [1, 2, 3, 5], [1, 2, 3, 4, 6], [7, 8], [1] * 30]
    groups = common.group_by_prefix(sequences, 7)
    assert groups == [[5], [0, 3, 2, 1], [4]]  # 30 alone; 4 + 1 + 1 + 1; 2
    assert common.group_by_prefix([], 8) == []


def test_groups_cover_every_sequence_once_within_the_budget():
    lengths = [5, 9, 1, 7, 7, 3, 30, 2]
    groups = common.group_by_length(lengths, 16)
    assert sorted(i for group in groups for i in group) == list(range(8))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) * longest <= 16 or len(group) == 1
    assert common.group_by_length([], 16) == []


def test_micro_batches_keep_ids_masks_and_values_in_place(tiny):
    sequences = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 0]), ([1, 2, 3, 4], [0, 0, 0, 1])]
    values, seen = [[0.1, 0.2], [], [0.3]], set()
    model = ChunkedLM(tiny)
    for batch in common.micro_batches(Accelerator(cpu=True), model, sequences, 8):
        placed = batch.take_tokens(values)  # (B, T)
        advantages = batch.take(torch.tensor([1.0, 2.0, 3.0]))
        for r, row in enumerate(batch.rows):
            seen.add(row)
            ids, mask = sequences[row]
            assert batch.input_ids[r][batch.attention_mask[r].bool()].tolist() == ids
            assert batch.loss_mask[r].tolist() == mask + [0] * (batch.loss_mask.shape[1] - len(mask))
            assert placed[r][batch.loss_mask[r].bool()].tolist() == pytest.approx(values[row])
            assert not placed[r][~batch.loss_mask[r].bool()].any()
            assert advantages[r] == row + 1
    assert seen == {0, 1, 2}
    some = common.micro_batches(Accelerator(cpu=True), model, sequences, 100, rows=[2, 0])
    assert [batch.rows for batch in some] == [[2, 0]]


def test_data_order_is_a_permutation_an_epoch_and_a_function_of_the_position():
    whole = common.data_order(7, 1, 0, 21)
    assert all(sorted(whole[e : e + 7]) == list(range(7)) for e in (0, 7, 14))
    assert whole[:7] != whole[7:14]
    assert common.data_order(7, 1, 5, 6) == whole[5:11]  # across the end of an epoch
    assert common.data_order(7, 2, 0, 21) != whole


def test_schedules():
    def lr(step, schedule):
        return common.scheduled_lr(step, 2.0, 4, 14, schedule)

    assert [lr(s, "constant") for s in (1, 2, 4, 5, 14)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert lr(5, "linear") == lr(5, "cosine") == 2.0
    assert lr(10, "linear") == pytest.approx(1.0)
    assert lr(10, "cosine") == pytest.approx(1.0)
    assert 0 < lr(14, "cosine") < lr(14, "linear") < 0.21


# ---- The optimizer step


def test_optimizer_step_clips_and_reports_the_norm_before():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert common.optimizer_step(Accelerator(cpu=True), model, optimizer, 0.1, 1.0, step=1, loss=0.0) == pytest.approx(
        5.0
    )
    torch.testing.assert_close(before - model.weight, 0.1 * torch.tensor([[0.6, 0.8]]))
    assert model.weight.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_stops_before_any_weight_changes(bad):
    model = torch.nn.Linear(2, 1)
    optimizer = common.make_optimizer(model, 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.bias.grad[0] = bad
    with pytest.raises(FloatingPointError, match=r"step 7: gradient norm (nan|inf): the loss is finite"):
        common.optimizer_step(Accelerator(cpu=True), model, optimizer, 0.1, math.inf, step=7, loss=0.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_only_matrices_decay():
    groups = common.make_optimizer(torch.nn.Linear(2, 3), 0.1).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.1, [2]), (0.0, [1])]


# ---- Generation


@pytest.fixture(scope="module")
def engine(tiny, tokenizer):
    return HFEngine(tiny, tokenizer, 100_000)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["What is 3 + 4? Put the final answer in \\boxed{}.", "12 + 5?", "Say something long, please."]
    return [encode_prompt(tokenizer, chat(text)) for text in texts]


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws over 12 outcomes, temperature included; the draws never take probability 0."""
    torch.manual_seed(0)
    scores = torch.randn(12) * 2
    scores[3] = -torch.inf
    count, temperature = 20_000, 1.5
    uniforms = torch.rand(count, 1, dtype=torch.float64)
    sampler = common.InverseCDFSampler(uniforms, temperature)
    picked = sampler(torch.zeros(count, 1, dtype=torch.long), scores.expand(count, 12)).argmax(-1)
    p = (scores / temperature).softmax(-1)
    observed, live = torch.bincount(picked, minlength=12), p > 0
    assert observed[3] == 0
    chi_square = ((observed - count * p)[live] ** 2 / (count * p)[live]).sum()
    assert chi_square < 29.6  # 0.1% point of 10 degrees of freedom
    torch.testing.assert_close(sampler.logprobs[0], p.log()[picked])


def test_the_largest_and_smallest_uniforms_pick_real_tokens():
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (0.4999, 1), (0.5001, 2), (1 - 2**-53, 2)):
        sampler = common.InverseCDFSampler(torch.tensor([[u]], dtype=torch.float64), 1.0)
        assert sampler(torch.zeros(1, 1, dtype=torch.long), scores).argmax() == token


@pytest.mark.parametrize("size", [5, 256, 700])  # a part of a block, one, some
def test_draws_in_two_levels_are_those_of_one_cumulative_sum(size):
    torch.manual_seed(0)
    probabilities = (3 * torch.randn(400, size)).softmax(-1)
    probabilities[:, torch.rand(size) < 0.3] = 0
    probabilities[:, 256:512] = 0  # a whole block
    uniforms = torch.rand(400, 1, dtype=torch.float64)
    uniforms[:100], uniforms[100:200] = 0, 1 - 2**-53
    cdf = probabilities.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(cdf, (uniforms * cdf[:, -1:]).minimum(cdf[:, -1:] * (1 - 1e-15)), right=True)
    drawn = common.draw(probabilities, uniforms)
    assert (probabilities.gather(1, drawn) > 0).all()
    assert (drawn == expected).all()


def test_a_cache_with_room_holds_what_the_librarys_does():
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 2, length, 4) for length in (5, 1, 1, 40, 1)]  # keys and values
    plain, roomy = DynamicLayer(), common.RoomyLayer(*states[0])
    plain.update(*states[0])
    for order, new in zip(([2, 0, 1], [1, 2, 0], [1, 0], [0, 1]), states[1:], strict=True):  # also of all rows
        for layer in (plain, roomy):
            layer.reorder_cache(torch.tensor(order))
        for _ in range(2):
            expected, found = (layer.update(*new[:, : len(order)]) for layer in (plain, roomy))
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    before = roomy.keys.data_ptr()
    roomy.update(*states[1][:, :2])
    assert roomy.keys.data_ptr() == before  # nothing was copied
    assert roomy.get_seq_length() == 5 + 2 * 43 + 1


def test_a_groups_prompt_is_computed_once(tiny, engine, prompts, monkeypatch):
    sizes, forward = [], tiny.base_model.forward

    def recorded(*args, **inputs):
        sizes.append(tuple(inputs["input_ids"].shape))
        return forward(*args, **inputs)

    monkeypatch.setattr(tiny.base_model, "forward", recorded)
    group = [prompts[0]] * 3 + [prompts[1]] * 3 + [prompts[0]]
    seeds = [completion_seed(1, 2, i) for i in range(len(group))]
    together = engine.generate(group, seeds, max_new_tokens=4, temperature=1.0)
    assert sizes[0] == (2, max(map(len, prompts[:2])) - 1)
    assert {shape for shape in sizes[1:]} == {(len(group), 1)}
    alone = [engine.generate([p], [s], max_new_tokens=4, temperature=1.0)[0] for p, s in zip(group, seeds, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_a_prompt_of_one_token_is_no_special_case(tiny, engine):
    completion = engine.generate([[5]], [1], max_new_tokens=3, temperature=1.0)[0]
    ids = torch.tensor([[5, *completion.token_ids]])
    logprobs, _ = token_logprobs(tiny, ids, torch.ones_like(ids), torch.tensor([[0] + [1] * (ids.shape[1] - 1)]))
    torch.testing.assert_close(logprobs[0, 1:].tolist(), completion.logprobs, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
def test_products_by_onednn_are_products():
    """In a process of its own, for what is registered stays. Each product that a linear layer's gradient has."""
    code = """
import torch, common
common.onednn_is_faster = lambda: True
common.tune_cpu()
torch.manual_seed(0)
large, small = (3, 200, 192), (2, 3, 4)
cases = ((torch.float32, large, 1e-4), (torch.float64, large, 1e-12), (torch.float32, small, 1e-4))
for dtype, shape, tolerance in cases:
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    w = torch.randn(160, shape[-1], dtype=dtype, requires_grad=True)
    g = torch.randn(*shape[:-1], 160, dtype=dtype)
    with torch.profiler.profile() as profile:
        y = torch.nn.functional.linear(x, w)
        y.backward(g)
    flat, grad = x.detach().double().flatten(0, 1), g.double().flatten(0, 1)
    expected = (flat @ w.double().T, grad @ w.double(), grad.T @ flat)
    for found, expected in zip((y.flatten(0, 1), x.grad.flatten(0, 1), w.grad), expected):
        assert found.dtype == dtype and (found - expected).abs().max() < tolerance, (dtype, shape)
    count = sum(e.count for e in profile.key_averages() if e.key == "mkldnn::_linear_pointwise")
    assert count == 3 * (dtype == torch.float32 and shape == large), count
print("right")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_engine_logprobs_equal_a_full_forward_pass(tiny, engine, prompts, temperature):
    seeds = [completion_seed(1, 2, i) for i in range(3)]
    for prompt, c in zip(
        prompts, engine.generate(prompts, seeds, max_new_tokens=30, temperature=temperature), strict=True
    ):
        ids = torch.tensor([prompt + c.token_ids])
        mask = torch.tensor([[0] * len(prompt) + [1] * len(c.token_ids)])
        logprobs, _ = token_logprobs(tiny, ids, torch.ones_like(ids), mask, temperature)
        torch.testing.assert_close(logprobs[0, len(prompt) :], torch.tensor(c.logprobs), rtol=1e-4, atol=1e-4)


def test_a_completion_depends_on_its_seed_alone(engine, prompts):
    seeds = [11, 12, 13]
    together = engine.generate(prompts, seeds, max_new_tokens=20, temperature=1.0)
    alone = [
        engine.generate([p], [s], max_new_tokens=20, temperature=1.0)[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    turned = engine.generate(prompts[::-1], seeds[::-1], max_new_tokens=20, temperature=1.0)[::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone] == [c.token_ids for c in turned]
    other = engine.generate([prompts[2]] * 8, list(range(8)), max_new_tokens=20, temperature=1.0)
    assert len({tuple(c.token_ids) for c in other}) > 1
    assert engine.generate([], [], max_new_tokens=20, temperature=1.0) == []


def test_completions_that_stop_leave_the_batch_and_the_others_go_on_unchanged(tiny, engine, prompts, monkeypatch):
    sizes = []
    hook = tiny.register_forward_hook(lambda _m, _i, output: sizes.append(len(output.logits)))
    drawn = {}
    for segment in (5, 1000):
        monkeypatch.setattr(common, "SEGMENT", segment)
        drawn[segment] = engine.generate(prompts * 4, list(range(12)), max_new_tokens=48, temperature=2.5)
        sizes.append(0)
    hook.remove()
    first, whole = sizes[: sizes.index(0)], sizes[sizes.index(0) + 1 : -1]
    assert set(whole) == {12}
    assert len(first) == len(whole) == 48  # one of them runs to the end
    alive = [sum(len(c.token_ids) > t // 5 * 5 for c in drawn[1000]) for t in range(48)]
    assert first == alive
    assert 0 < alive[-1] < alive[20] < 12
    for one, other in zip(drawn[5], drawn[1000], strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


def test_seeds_differ_by_run_step_and_index_and_fit_63_bits():
    seeds = {completion_seed(s, t, i) for s in range(4) for t in range(4) for i in range(64)}
    assert len(seeds) == 4 * 4 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_completions_hold_their_stop_token_and_say_why_they_ended(engine, prompts, tokenizer):
    (stopped,) = engine.generate(prompts[:1], [0], max_new_tokens=60, temperature=0.0)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in stopped.token_ids[:-1]
    assert len(stopped.logprobs) == len(stopped.token_ids)
    text = tokenizer.decode(stopped.token_ids, skip_special_tokens=True)
    assert text.endswith("}")
    assert "im_end" not in text
    (cut,) = engine.generate(prompts[:1], [0], max_new_tokens=3, temperature=0.0)
    assert (cut.finish_reason, cut.token_ids) == ("length", stopped.token_ids[:3])


def test_greedy_equals_the_library_and_its_settings_cannot_sneak_in(tiny, tokenizer, prompts, tmp_path):
    common.save_model(tmp_path, tiny, tokenizer, torch.float32)
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "min_new_tokens": 15}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    sneaky = HFEngine(common.load_model(str(tmp_path), CPU, "sdpa"), tokenizer, 10_000)
    plain = HFEngine(tiny, tokenizer, 10_000)
    for temperature in (0.0, 1.0):
        one, two = (e.generate(prompts, [1, 2, 3], max_new_tokens=20, temperature=temperature) for e in (sneaky, plain))
        assert [c.token_ids for c in one] == [c.token_ids for c in two]
    config = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    output = tiny.generate(torch.tensor([prompts[0]]), generation_config=config)
    (greedy,) = plain.generate(prompts[:1], [0], max_new_tokens=20, temperature=0.0)
    assert output[0, len(prompts[0]) :].tolist() == greedy.token_ids


def test_every_way_to_end_a_turn_stops_generation(tokenizer):
    config = GenerationConfig(eos_token_id=[9, 3])
    assert common.stop_token_ids(config, tokenizer) == sorted({9, 3, tokenizer.eos_token_id})


# ---- Models and flags


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path, tokenizer):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4, "vocab_size": 100}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=0.01)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="soft-capping"):
        common.load_model(str(tmp_path), CPU, "eager")


def test_choices_come_with_their_reason(monkeypatch):
    float32, bf16 = torch.float32, torch.bfloat16
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(common, "onednn_is_faster", lambda: False)
    words = "compute    torch.float32, attention sdpa (cpu without bf16, flash-attn not installed"
    assert common.pick_compute("auto", "auto", CPU) == (float32, "sdpa", words + ")")
    monkeypatch.setattr(common, "onednn_is_faster", lambda: True)
    assert common.pick_compute("auto", "auto", CPU) == (float32, "sdpa", words + ", products by oneDNN)")
    assert common.pick_compute("bf16", "eager", CPU)[:2] == (bf16, "eager")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert common.pick_compute("auto", "auto", cuda)[:2] == (bf16, "sdpa")
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: name)
    words = "compute    torch.bfloat16, attention flash_attention_2 (cuda with bf16, flash-attn installed)"
    assert common.pick_compute("auto", "auto", cuda) == (bf16, "flash_attention_2", words)
    assert common.pick_compute("fp32", "auto", cuda)[:2] == (float32, "sdpa")
    assert common.pick_compute("auto", "auto", CPU)[:2] == (float32, "sdpa")


def test_bf16_autocast_keeps_float32_weights_and_logprobs(tiny, batch):
    ids, masks = batch
    inputs = [pad(ids, "right"), pad([[1] * len(i) for i in ids], "right"), pad(masks, "right")]
    exact, _ = token_logprobs(ChunkedLM(tiny), *inputs)
    rounded, _ = token_logprobs(ChunkedLM(tiny, torch.bfloat16), *inputs)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.5
    assert next(tiny.parameters()).dtype == torch.float32


IMPOSSIBLE = {
    "group_size": [1],
    "temperature": [0.0, math.nan],
    "num_steps": [-1, 0],
    "learning_rate": [math.nan, -1e-5, math.inf],
    "clip_eps": [1.0],
    "kl_penalty": [-0.1],
    "max_grad_norm": [0.0, math.nan],
    "chat_template_args": ["[1]", "{"],
    **{"eval_steps": [-1], "saving_steps": [0], "max_new_tokens": [0], "seed": [-1], "ppo_steps": [0]},
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in IMPOSSIBLE.items() for value in values])
def test_impossible_flags_are_refused_by_name(flag, value):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} is"):
        common.check_args(types.SimpleNamespace(**{flag: value}))


def test_dropout_is_off_and_the_context_known_where_the_settings_are_nested(tmp_path):
    transformers.Gemma3Config(text_config={"attention_dropout": 0.1, "max_position_embeddings": 77}).save_pretrained(
        tmp_path / "gemma"
    )
    transformers.BioGptConfig(hidden_dropout_prob=0.2, layerdrop=0.1).save_pretrained(tmp_path / "biogpt")
    config = common.load_config(str(tmp_path / "gemma"))
    assert (config.text_config.attention_dropout, common.context_length(config)) == (0.0, 77)
    config = common.load_config(str(tmp_path / "biogpt"))
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.layerdrop) == (0.0, 0.0, 0.0)


def test_the_engine_stops_where_the_template_ends_turns_with_these_arguments(tiny, tokenizer):
    mine = copy.deepcopy(tokenizer)
    end = "{{ '<|endoftext|>' if other else '<|im_end|>' }}"
    mine.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + "{% endfor %}assistant:"
    mine.eos_token = "<|im_end|>"
    known = mine.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    stops = [common.HFEngine(tiny, mine, 512, template_args=args).stop_ids for args in ({}, {"other": True})]
    assert (known[1] in stops[0], known[1] in stops[1]) == (False, True)


def test_possible_flags_pass():
    common.check_args(types.SimpleNamespace(learning_rate=None, eval_steps=0, max_grad_norm=math.inf, temperature=2.0))
    common.check_args(types.SimpleNamespace(temperature=0.0), temperature=common.FINITE)


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        *((math.nan, "nan"), (math.inf, "inf"), (None, "None"), ("1.0", "'1.0'"), ([1.0], r"\[1.0\]")),
        *(({"score": 1}, "{'score': 1}"), ((1.0,), r"\(1.0,\)"), (1j, "1j")),
    ],
)
def test_a_reward_that_is_no_number_stops_with_the_completion(reward, reason):
    class Broken(common.EnvBase):
        def get_reward(self, completion):
            return reward

    with pytest.raises(ValueError, match=rf"Broken.get_reward gave {reason} for the completion 'hello'"):
        common.score(Broken([]), "hello")


def test_a_reward_that_raises_stops_with_the_completion_and_the_cause():
    class Broken(common.EnvBase):
        def get_reward(self, completion):
            return float(completion)

    with pytest.raises(
        RuntimeError, match=r"Broken.get_reward raised ValueError: .* for the completion 'hello'"
    ) as error:
        common.score(Broken([]), "hello")
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("reward", [1, True, 0.5, torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_any_kind_are_rewards(reward):
    class Any(common.EnvBase):
        def get_reward(self, completion):
            return reward

    assert common.score(Any([]), "hello") == float(reward)


def test_a_signal_ends_an_evaluation_between_its_parts(engine, tokenizer, monkeypatch):
    scored = []

    class Interrupting(common.EnvBase):
        def get_reward(self, completion):
            scored.append(completion)
            common.received_signal = 15
            return 1.0

    monkeypatch.setattr(common, "received_signal", 0)
    dataset = [Interrupting(chat("1 + 1?")) for _ in range(300)]
    assert common.Evaluator(engine, tokenizer, dataset, 8).evaluate() == ({}, [])
    assert len(scored) == 128
