"""What trains of a conversation is what the assistant wrote and its stop tokens, in every family of chat templates.

The templates are small ones in the styles of the families; what should train of them is written out by hand.
"""

import copy
import itertools
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

import common
from chat import encode_chat, encode_prompt, find_turns
from envs import UserError


@dataclass
class Style:
    template: str
    special: str  # tokens; the first is the BOS token, if the template writes one
    stop: str  # what trains after the last turn
    middle: str | None = None  # after an earlier one; None: the same
    trims: bool = False  # the template strips the texts
    system: bool = True
    strips_right: bool = False  # its special tokens swallow the white space that follows


TURNS = "{% for m in messages %}"


def turns(each, prompt="", before=""):
    """A template that writes each message alike."""
    return before + TURNS + each + "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"


CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
QWEN3 = """{% set ns = namespace(last_user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
  {%- set thought = '' %}{% set answer = m.content %}
  {%- if '</think>' in answer %}
    {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}
    {%- set answer = answer.split('</think>')[-1].lstrip('\n') %}
  {%- endif %}
  {{- '<|im_start|>assistant\n' }}
  {%- if loop.index0 > ns.last_user and (loop.last or thought) %}
    {{- '<think>\n' + thought + '\n</think>\n\n' + answer.lstrip('\n') }}
  {%- else %}{{ answer }}{% endif %}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
LLAMA3 = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
GEMMA = "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
BE_HELPFUL = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
LLAMA2 = "{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
LLAMA2 += "{% elif m.role == 'assistant' %} {{ m.content.strip() }} </s>{% endif %}"
DEEPSEEK = "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>"
DEEPSEEK += "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% else %}{{ m.content }}{% endif %}"
VICUNA = "{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>"
GPT_OSS = "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{ m.content }}"
GPT_OSS += "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
STYLES = {
    "qwen2.5": Style(
        turns(CHATML, "<|im_start|>assistant\n", BE_HELPFUL), "<|im_start|> <|im_end|> <|endoftext|>", "<|im_end|>"
    ),
    "qwen3": Style(QWEN3, "<|im_start|> <|im_end|> <think> </think>", "<|im_end|>"),
    "llama3": Style(
        turns(LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "{{ bos_token }}"),
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|eot_id|>",
        trims=True,
    ),
    "gemma": Style(
        turns(GEMMA, "<start_of_turn>model\n", "{{ bos_token }}" + NO_SYSTEM),
        "<bos> <start_of_turn> <end_of_turn>",
        "<end_of_turn>",
        trims=True,
        system=False,
    ),
    "llama2, a space before the stop token": Style(turns(LLAMA2), "<s> </s>", " </s>", trims=True),
    "phi3, tokens that swallow the line's end": Style(
        turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n"),
        "<|user|> <|assistant|> <|system|> <|end|> <|endoftext|>",
        "<|end|>",
        strips_right=True,
    ),
    "deepseek": Style(
        turns(DEEPSEEK, "<｜Assistant｜><think>\n", "{{ bos_token }}"),
        "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "vicuna, headers that are text": Style(
        turns(VICUNA + "{% else %}{{ m.content }} {% endif %}", "ASSISTANT: "), "<s> </s>", "</s>"
    ),
    "glm4, without an end of turn": Style(
        turns("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n", "[gMASK]<sop>"),
        "[gMASK] <sop> <|user|> <|assistant|> <|system|>",
        "",
    ),
    "gpt-oss, which ends earlier turns without stopping": Style(
        turns(GPT_OSS, "<|start|>assistant"),
        "<|start|> <|channel|> <|message|> <|end|> <|return|>",
        "<|return|>",
        middle="",
    ),
}


def with_template(tokenizer, style):
    tokenizer = copy.deepcopy(tokenizer)
    extra = [AddedToken(t, special=True, rstrip=style.strips_right, normalized=False) for t in style.special.split()]
    tokenizer.add_tokens(extra, special_tokens=True)
    tokenizer.bos_token = style.special.split()[0]
    tokenizer.eos_token = style.stop.strip() or style.special.split()[-1]
    tokenizer.chat_template = style.template
    return tokenizer


@pytest.fixture(scope="module")
def by_bytes(tokenizer):
    """A token a byte: what trains can be compared to the character."""
    return {name: with_template(tokenizer, style) for name, style in STYLES.items()}


@pytest.fixture(scope="module")
def by_merges():
    """Tokens of several characters that reach across the borders of texts and headers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ("yes", "no", " maybe", "\n\nwhy", "a")
    text = "".join(f"user\n{w} assistant\n{w} |>\n{w} ASSISTANT: {w}\n\n{w}.\n" for w in words) * 9
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=600, **options))
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return {name: with_template(plain, style) for name, style in STYLES.items()}


@pytest.fixture(scope="module")
def by_pieces():
    """As SentencePiece does it: spaces become a character, with one more before the text and after a special token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = ("yes", "no", "perhaps")
    text = "".join(f"{w} {w}\n[INST] Say {w}. [/INST] {w}ish, oh {w}! USER: {w} ASSISTANT: {w}" for w in words)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text * 9], trainer)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    return {name: with_template(plain, style) for name, style in STYLES.items()}


def chat(*texts, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


def trained(tokenizer, messages, **template_args):
    """Each run of trained tokens, as text."""
    ids, mask = encode_chat(tokenizer, messages, **template_args)
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    kept = [[token for token, _ in run] for keep, run in runs if keep]
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in kept]


def expected(style, answers, ends_with_user=False):
    """By hand: the texts, trimmed where the style says so, each with what ends it."""
    middle = style.stop if style.middle is None else style.middle
    stops = [middle] * (len(answers) - 1) + [middle if ends_with_user else style.stop]
    return [(a.strip() if style.trims else a) + stop for a, stop in zip(answers, stops, strict=True)]


@pytest.mark.parametrize("name", STYLES)
def test_every_family_trains_texts_and_stop_tokens(by_bytes, name):
    style, tokenizer = STYLES[name], by_bytes[name]
    assert trained(tokenizer, chat("Hi", "Yes")) == ["Yes" + style.stop]
    first, no = expected(style, ["Yes", "No"])
    assert trained(tokenizer, chat("Hi", "Yes", "Bye", "No")) == [first, no]
    assert trained(tokenizer, chat("Hi", "Yes", "Bye")) == [first]  # ends with the user
    assert trained(tokenizer, chat("Hi", "No", "Hi", "No", "Hi", "No"))[-1] == no  # identical turns
    assert trained(tokenizer, chat("Hi", "Да 🙂 ≠ नहीं", "Bye", "No")) == [first.replace("Yes", "Да 🙂 ≠ नहीं"), no]
    if style.system:
        assert trained(tokenizer, chat("Hi", "No", system="Yes or No?")) == [no]
    else:
        with pytest.raises(UserError, match="System role not supported"):
            trained(tokenizer, chat("Hi", "No", system="Yes or No?"))


def test_a_prompt_is_the_beginning_of_its_conversation_also_in_parts(tokenizer):
    parts = [[{"type": "text", "text": part} for part in text.split()] for text in ("a a", "b", "c c", "d d")]
    ids, mask = encode_chat(tokenizer, chat(*parts))
    assert (ids, mask) == encode_chat(tokenizer, chat("aa", "b", "cc", "dd"))
    prompt = encode_prompt(tokenizer, chat(*parts[:3]))
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    with pytest.raises(UserError, match="nothing to train"):
        encode_chat(tokenizer, chat("a"))


def test_a_chat_template_and_its_arguments_can_be_given_and_one_is_needed(tokenizer, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ begin }}" + TURNS + "{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}")
    given = common.load_tokenizer("tiny", str(mine), template_args='{"begin": "!!"}')
    assert trained(given, chat("a", "b")) == ["b<|im_end|>"]
    ids, _ = encode_chat(given, chat("a", "b"))
    assert given.decode(ids).startswith("!!user>a")
    assert given.decode(encode_prompt(given, chat("a"))).startswith("!!user>a")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template: pass --chat-template FILE\.jinja"):
        common.load_tokenizer(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"cannot load --chat-template missing\.jinja"):
        common.load_tokenizer("tiny", "missing.jinja")


def test_tool_messages_and_consecutive_turns(by_bytes):
    tool, yes = {"role": "tool", "content": "call() gave Yes"}, {"role": "assistant", "content": "Yes"}
    assert trained(by_bytes["qwen2.5"], [*chat("Hi", "call()"), tool, yes]) == ["call()<|im_end|>", "Yes<|im_end|>"]
    twice = [*chat("Hi", "Yes"), {"role": "assistant", "content": "No"}]
    assert trained(by_bytes["qwen2.5"], twice) == ["Yes<|im_end|>", "No<|im_end|>"]
    headless = copy.deepcopy(by_bytes["qwen2.5"])
    headless.chat_template = TURNS + "{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="once, after a header"):
        trained(headless, twice)


def test_thinking_trains_where_the_template_keeps_it(by_bytes):
    qwen3, deepseek = by_bytes["qwen3"], by_bytes["deepseek"]
    thought = "<think>\nhm\n</think>\n\nYes"
    assert trained(qwen3, chat("Hi", thought)) == [thought + "<|im_end|>"]  # the generation prompt does not begin it
    # An earlier turn loses its thinking; a last one without any gets an empty one, which the template wrote.
    assert trained(qwen3, chat("Hi", thought, "Bye", "No")) == ["Yes<|im_end|>", "No<|im_end|>"]
    assert trained(qwen3, chat("Hi", "No", "Bye", thought)) == ["No<|im_end|>", thought + "<|im_end|>"]
    assert trained(qwen3, chat("Hi", "Yes"), enable_thinking=False) == ["Yes<|im_end|>"]
    more = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": thought}]
    assert trained(qwen3, chat("Hi", "<think>a</think>call()") + more) == [
        "<think>\na\n</think>\n\ncall()<|im_end|>",
        thought + "<|im_end|>",
    ]
    assert trained(by_bytes["qwen2.5"], chat("Hi", thought, "Bye", "No")) == [thought + "<|im_end|>", "No<|im_end|>"]
    assert trained(deepseek, chat("Hi", thought)) == ["\n\nYes<｜end▁of▁sentence｜>"]  # dropped everywhere


def test_thinking_among_what_the_template_writes(by_bytes):
    """A header before it and tags that the template always writes do not train; nor do words that are the user's."""
    glm = copy.deepcopy(by_bytes["glm4, without an end of turn"])
    keeps = "{% set parts = m.content.split('</think>') %}<|assistant|>\n<think>"
    keeps += "{{ parts[0][7:].strip() if loop.last and parts | length > 1 }}</think>\n{{ parts[-1].strip() }}"
    user = "<|user|>\n{{ m.content }}"
    glm.chat_template = TURNS + "{% if m.role == 'user' %}" + user + "{% else %}" + keeps + "{% endif %}{% endfor %}"
    glm.chat_template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    hm = "<think>hm</think>Yes"
    assert trained(glm, chat("Hi", hm)) == ["<think>hm</think>\nYes"]
    assert trained(glm, chat("Hi", "Yes")) == ["Yes"]
    assert trained(glm, chat("Hi", hm, "Bye", "No")) == ["Yes", "No"]
    assert trained(glm, chat("hm", hm, "hm", hm)) == ["Yes", "<think>hm</think>\nYes"]
    glm.chat_template = glm.chat_template.replace("<|assistant|>{% endif %}", "<|assistant|>\n<think>{% endif %}")
    assert trained(glm, chat("hm", hm, "hm", hm)) == ["Yes", "hm</think>\nYes"]  # the prompt writes the tag


def test_thinking_that_generation_cannot_reach_is_refused(by_bytes):
    tokenizer = copy.deepcopy(by_bytes["qwen2.5"])
    tokenizer.chat_template = turns(CHATML, "<|im_start|>ai\n")
    assert trained(tokenizer, chat("Hi", "Yes")) == ["Yes<|im_end|>"]
    with pytest.raises(UserError, match="does not lead to the thinking of assistant turn 1"):
        trained(tokenizer, chat("Hi", "<think>hm</think>Yes"))


# ---- Refused

UNMASKABLE = {  # the text of a turn, and more -> the reason
    "{{ m.content | upper }}<|im_end|>{% endfor %}": "rewrites assistant turn 1",
    "{{ m.content }}{{ m.content | length }}<|im_end|>{% endfor %}": "rewrites assistant turn 1",
    "{{ 'x' * (loop.first and messages[-1].content | length > 4) }}:{{ m.content }}{% endfor %}": "rewrites assistant",
    "{{ m.content }}{% endfor %}{{ 'x' * (messages[-1].content | length - 3) }}": "something else",
    "{% if loop.last %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}": "each of 2 assistant turns",
    "{{ m.content }}{{ m.content }}{% endfor %}": "each of 2 assistant turns once",
    "{{ m.content }}{% endfor %}{{ raise_exception('no') }}": "into the chat template: no",
    "{{ m.content }}": "into the chat template",
}


@pytest.mark.parametrize("template", UNMASKABLE)
def test_templates_that_cannot_be_masked_are_refused_with_the_reason(by_bytes, template):
    tokenizer = copy.deepcopy(by_bytes["qwen2.5"])
    tokenizer.chat_template = TURNS + "<|im_start|>" * ("loop" not in template) + template
    with pytest.raises(UserError, match=UNMASKABLE[template]):
        trained(tokenizer, chat("Hi", "Yes, yes", "Bye", "No more"))


# ---- Tokens that reach over borders


@pytest.mark.parametrize("name", [name for name in STYLES if not STYLES[name].strips_right])
def test_a_token_over_a_border_belongs_where_it_ends(by_merges, name):
    """Then a run may begin with the end of its header, and lose the beginning of a token that what follows ends."""
    style, tokenizer, across = STYLES[name], by_merges[name], 0
    for answers in itertools.product(("yes", "no", " maybe", "a.\n", ""), repeat=2):
        text, spans, _ = find_turns(tokenizer, chat("why", answers[0], "no", answers[1]), {})
        assert [text[a:b] for a, b in spans] == expected(style, answers)
        ids, mask = encode_chat(tokenizer, chat("why", answers[0], "no", answers[1]))
        ends = list(itertools.accumulate(len(tokenizer.decode([i])) for i in ids))
        for start, end, keep in zip([0, *ends], ends, mask, strict=False):
            assert keep == any(a < end <= b for a, b in spans)
            across += any(start < a < end for a, _ in spans)
    assert across > 0 or not name.startswith("vicuna")  # whose header ends in a space


@pytest.mark.parametrize("name", ["llama2, a space before the stop token", "gemma", "vicuna, headers that are text"])
def test_pieces_with_spaces_of_their_own(by_pieces, name):
    style, tokenizer = STYLES[name], by_pieces[name]
    for answers in (("yes", "no no"), ("perhaps, oh yes!", "🙂 no"), ("Да", "yes\nno")):
        runs = trained(tokenizer, chat("Say yes.", answers[0], "Say no.", answers[1]))
        assert [run.lstrip(" ") for run in runs] == expected(style, answers)


# ---- At random

NASTY = [  # a header, whole turns, the user's texts, sentinels, white space, nothing, stop tokens, Jinja
    "<|im_start|>assistant\nassistant\nASSISTANT: <|assistant|>\n",
    "x<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\ny",
    *("Hi", "Bye", "\u29830\u2984 \u29831\u2984", " \n\t Yes \n\n", "", "\n \n", "Yes</s> and <|end|> and <|return|>"),
    "{{ messages }}{% endfor %}",
]
PARTS = [*"ab \n\t{%<|>:", "é", "🙂", "अ", "USER: ", "ASSISTANT: ", "<|im_end|>", "user\n", "\u29830\u2984"]
TEXT = st.sampled_from(NASTY) | st.lists(st.sampled_from(PARTS), max_size=8).map("".join)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(STYLES)), texts=st.lists(TEXT, min_size=2, max_size=7), system=st.none() | TEXT)
def test_random_conversations_train_their_texts_and_stop_tokens(by_bytes, name, texts, system):
    style, tokenizer = STYLES[name], by_bytes[name]
    messages = chat(*texts, system=system if style.system else None)
    wanted = [run for run in expected(style, texts[1::2], ends_with_user=len(texts) % 2 == 1) if run]
    got = trained(tokenizer, messages)
    if style.strips_right:  # decoding loses the white space that its special tokens swallow
        got, wanted = ([run for run in map("".join, map(str.split, runs)) if run] for runs in (got, wanted))
    if name == "qwen3":  # it trims line ends before the last answer
        got, wanted = ([run.lstrip("\n") for run in runs] for runs in (got, wanted))
    assert got == wanted
