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
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from chat import cache_key, encode_chat, encode_prompt, ends_of_turns, find_turns, load_tokenizer, stop_token_ids
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
CLOSES_TWICE = "<|{{ m.role }}|>{% if m.role == 'assistant' %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
CLOSES_TWICE += "{% else %}{{ m.content }}{% endif %}<|END_OF_TURN|>"
OLMO = "<|im_start|>{{ m.role }}\n{{ m.content }}"
OLMO += "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}"
QWEN15 = "<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last or m.role == 'user' %}<|im_end|>\n{% endif %}"
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
    "llama2, a space before the stop token": Style(turns(LLAMA2), "<s> </s>", " </s>", trims=True, system=False),
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
        middle="<|end|>",
    ),
    "command, which closes the text and the turn": Style(
        turns(CLOSES_TWICE, "<|assistant|>"),
        "<|user|> <|assistant|> <|system|> <|START_RESPONSE|> <|END_RESPONSE|> <|END_OF_TURN|>",
        "<|END_RESPONSE|><|END_OF_TURN|>",
    ),
    "olmo, whose last turn has an end of its own": Style(
        turns(OLMO, "<|im_start|>assistant\n", BE_HELPFUL),
        "<|im_start|> <|im_end|> <|endoftext|>",
        "<|endoftext|>",
        middle="<|im_end|>",
    ),
    "qwen1.5, whose last turn has none": Style(
        turns(QWEN15, "<|im_start|>assistant\n"), "<|im_start|> <|im_end|>", "", middle="<|im_end|>"
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
        with pytest.raises(UserError, match=r"System role not supported|drops the system message of system, user"):
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
    mine.write_text("\ufeff{{ begin }}" + TURNS + "{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}")
    given = load_tokenizer("tiny", str(mine), template_args='{"begin": "!!"}')
    assert trained(given, chat("a", "b")) == ["b<|im_end|>"]
    ids, _ = encode_chat(given, chat("a", "b"))
    assert given.decode(ids).startswith("!!user>a")
    assert given.decode(encode_prompt(given, chat("a"))).startswith("!!user>a")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template: pass --chat-template FILE\.jinja"):
        load_tokenizer(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"cannot load --chat-template missing\.jinja"):
        load_tokenizer("tiny", "missing.jinja")


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


def test_thinking_that_generation_cannot_reach_trains_where_it_stands_verbatim_only(by_bytes):
    tokenizer = copy.deepcopy(by_bytes["qwen2.5"])
    tokenizer.chat_template = turns(CHATML, "<|im_start|>ai\n")
    for answer in ("Yes", "<think>hm</think>Yes"):
        assert trained(tokenizer, chat("Hi", answer)) == [answer + "<|im_end|>"]
    tokenizer = copy.deepcopy(by_bytes["qwen3"])
    prompt = "assistant\n' }}\n{%- if enable"
    tokenizer.chat_template = tokenizer.chat_template.replace(prompt, prompt.replace("assistant", "ai"))
    with pytest.raises(UserError, match="does not lead to the thinking of assistant turn 1"):
        trained(tokenizer, chat("Hi", "<think>hm</think>Yes"))


TAGS = [  # wherever the tags stand, a template that keeps a text as it is trains all of it
    "<think>\n\n</think>\n\n4",
    "It writes <think> before them and </think> after them.",
    "</think>4",
    "<think>a</think>b<think>c</think>d",
    "4 <think>",
]


@pytest.mark.parametrize("answer", TAGS)
def test_a_text_that_stands_verbatim_trains_whole_wherever_its_tags_are(by_bytes, answer):
    for name in ("qwen2.5", "glm4, without an end of turn", "gpt-oss, which ends earlier turns without stopping"):
        style = STYLES[name]
        messages = chat("Does <think> think hm?", answer, "hm </think>", answer)
        assert trained(by_bytes[name], messages) == expected(style, [answer, answer])


# ---- Refused

UNMASKABLE = {  # the text of a turn, and more -> the reason
    "{{ m.content | upper }}<|im_end|>{% endfor %}": "rewrites assistant turn 1",
    "{{ m.content }}{{ m.content | length }}<|im_end|>{% endfor %}": "rewrites assistant turn 1",
    "{{ 'x' * (loop.first and messages[-1].content | length > 4) }}:{{ m.content }}{% endfor %}": "rewrites assistant",
    "{{ m.content }}{% endfor %}{{ 'x' * (messages[-1].content | length - 3) }}": "something else",
    "{% if loop.last %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}": "each of 2 assistant turns",
    "{{ m.content }}{{ m.content }}{% endfor %}": "each of 2 assistant turns once",
    "{{ m.content }}{% endfor %}{{ raise_exception('no') }}": "refuses the conversation: no",
    "{{ m.content }}{% endfor %}{{ messages + 1 }}": "refuses the conversation: can only concatenate list",
    "{{ m.content }}": "refuses the conversation: ",
}


@pytest.mark.parametrize("template", UNMASKABLE)
def test_templates_that_cannot_be_masked_are_refused_with_the_reason(by_bytes, template):
    tokenizer = copy.deepcopy(by_bytes["qwen2.5"])
    tokenizer.chat_template = TURNS + "<|im_start|>" * ("loop" not in template) + template
    with pytest.raises(UserError, match=UNMASKABLE[template]):
        trained(tokenizer, chat("Hi", "Yes, yes", "Bye", "No more"))


def test_which_token_stops(by_bytes):
    """The last one of what closes a last turn; not one that also stands inside of a turn."""
    wanted = {name: style.stop.strip() for name, style in STYLES.items()}
    wanted["qwen1.5, whose last turn has none"] = "<|im_end|>"
    wanted["command, which closes the text and the turn"] = "<|END_OF_TURN|>"
    assert {name: ends_of_turns(*cache_key(by_bytes[name], {})).stop for name in STYLES} == wanted
    kimi = copy.deepcopy(by_bytes["qwen2.5"])
    kimi.add_tokens(["<|open|>", "<|close|>", "<|sep|>"], special_tokens=True)
    each = "<|open|>{{ m.role }}<|sep|>{% set parts = m.content.split('</think>') %}{% if parts | length > 1 %}"
    each += "<|open|>think<|sep|>{{ parts[0][7:] }}<|close|>{% endif %}{{ parts[-1] }}<|close|>"
    kimi.chat_template = turns(each, "<|open|>assistant<|sep|>")
    ends = ends_of_turns(*cache_key(kimi, {}))
    assert (ends.last, ends.stop) == ("<|close|>", "")
    assert stop_token_ids(GenerationConfig(), kimi) == [2]  # the tokenizer's own, and not <|close|>
    assert trained(kimi, chat("Hi", "<think>hm</think>Yes")) == ["<|open|>think<|sep|>hm<|close|>Yes<|close|>"]


def test_turns_with_weight_0_do_not_train_and_their_end_neither(by_bytes):
    for name, style in STYLES.items():
        messages = chat("Hi", "Yes", "Bye", "No")
        first, last = expected(style, ["Yes", "No"])
        messages[1]["weight"] = 0
        assert trained(by_bytes[name], messages) == [last]
        messages[1]["weight"], messages[3]["train"] = True, False
        assert trained(by_bytes[name], messages) == [first]
    parts = [{"type": "text", "text": "Ye", "loss": False}, {"type": "text", "text": "s"}]
    assert trained(by_bytes["qwen2.5"], chat("Hi", parts, "Bye", "No")) == ["No<|im_end|>"]
    with pytest.raises(UserError, match=r"must be 0, 1, false or true, for a whole turn, not \[0.5\]"):
        trained(by_bytes["qwen2.5"], [*chat("Hi"), {"role": "assistant", "content": "a", "weight": 0.5}])


DROPS = {  # a template that leaves a message out -> a conversation of that kind
    "{% if m.role != 'tool' %}" + CHATML + "{% endif %}": [*chat("a", "b"), {"role": "tool", "content": "a"}],
    "{% if m.role != 'developer' %}" + CHATML + "{% endif %}": [{"role": "developer", "content": "a"}, *chat("a", "b")],
    "{% if m.role != 'system' or messages[-1].role == 'user' %}" + CHATML + "{% endif %}": chat("a", "b", system="a"),
}


@pytest.mark.parametrize("each", DROPS)
def test_a_message_that_the_template_drops_is_told(by_bytes, each):
    tokenizer, messages = copy.deepcopy(by_bytes["qwen2.5"]), DROPS[each]
    tokenizer.chat_template = turns(each, "<|im_start|>assistant\n")
    with pytest.raises(UserError, match=r"drops the (tool|developer|system) message of"):
        encode_chat(tokenizer, messages)
    if messages[0]["role"] == "system":  # generation has it
        assert encode_prompt(tokenizer, messages[:-1])
    elif messages[0]["role"] == "developer":
        with pytest.raises(UserError, match="drops the developer message"):
            encode_prompt(tokenizer, messages[:-1])
    assert trained(tokenizer, chat("a", "b")) == ["b<|im_end|>"]


def test_contents_as_parts_where_the_template_takes_nothing_else(by_bytes):
    tokenizer = copy.deepcopy(by_bytes["qwen2.5"])
    each = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    tokenizer.chat_template = turns(each, "<|im_start|>assistant\n")
    assert trained(tokenizer, chat("Hi", "Yes", "Bye", "No")) == ["Yes<|im_end|>", "No<|im_end|>"]


def test_an_empty_text_for_which_the_template_writes_no_line(by_bytes):
    tokenizer = copy.deepcopy(by_bytes["qwen2.5"])
    text = "{% if m.content.strip() %}{{ '\n' + m.content }}{% endif %}"
    tokenizer.chat_template = turns(CHATML.replace("\n{{ m.content }}", text), "<|im_start|>assistant")
    assert trained(tokenizer, chat("Hi", "", "Bye", "No")) == ["<|im_end|>", "No<|im_end|>"]


# ---- Tokens that reach over borders


@pytest.mark.parametrize("name", [name for name in STYLES if not STYLES[name].strips_right])
def test_a_token_over_a_border_belongs_where_it_ends(by_merges, name):
    """Then a run may begin with the end of its header, and lose the beginning of a token that what follows ends."""
    style, tokenizer, across = STYLES[name], by_merges[name], 0
    for answers in itertools.product(("yes", "no", " maybe", "a.\n", ""), repeat=2):
        text, spans = find_turns(tokenizer, chat("why", answers[0], "no", answers[1]), {})
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
PARTS = [
    "<think>",
    "</think>",
    *"ab \n\t{%<|>:",
    "é",
    "🙂",
    "अ",
    "USER: ",
    "ASSISTANT: ",
    "<|im_end|>",
    "user\n",
    "\u29830\u2984",
]
TEXT = st.sampled_from(NASTY) | st.lists(st.sampled_from(PARTS), max_size=8).map("".join)


REWRITES = ["qwen3", "deepseek"]  # thinking
SETTINGS = settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(
    name=st.sampled_from([name for name in STYLES if name not in REWRITES]),
    texts=st.lists(TEXT, min_size=2, max_size=7),
    system=st.none() | TEXT,
)
def test_random_conversations_train_their_texts_and_stop_tokens(by_bytes, name, texts, system):
    style, tokenizer = STYLES[name], by_bytes[name]
    messages = chat(*texts, system=system if style.system else None)
    wanted = [run for run in expected(style, texts[1::2], ends_with_user=len(texts) % 2 == 1) if run]
    got = trained(tokenizer, messages)
    if style.strips_right:  # decoding loses the white space that its special tokens swallow
        got, wanted = ([run for run in map("".join, map(str.split, runs)) if run] for runs in (got, wanted))
    assert got == wanted


@SETTINGS
@given(name=st.sampled_from(REWRITES), texts=st.lists(TEXT, min_size=2, max_size=7))
def test_random_conversations_with_templates_that_rewrite_thinking(by_bytes, name, texts):
    """What follows the last `</think>` trains, whatever else the template keeps; never a word of the user."""
    style, tokenizer = STYLES[name], by_bytes[name]
    asked = ["§" + text if i % 2 == 0 else text.replace("§", "") for i, text in enumerate(texts)]
    runs = trained(tokenizer, chat(*asked))
    answers = [text.rpartition("</think>")[2].lstrip("\n") + style.stop for text in asked[1::2]]
    assert "§" not in "".join(runs)
    assert all(run.endswith(answer) for run, answer in zip(runs, answers, strict=True))
