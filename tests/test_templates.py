"""What trains of a conversation is what the assistant wrote and its stop tokens, in every family of chat templates.

tests/templates/ holds small ones in the styles of the families; what should train of them is written out by hand.
"""

import copy
import itertools
import json
from dataclasses import dataclass

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

from chat import cache_key, encode_chat, encode_prompt, ends_of_turns, find_turns, load_tokenizer, stop_token_ids
from envs import UserError


@dataclass
class Style:
    """An entry of tests/templates/styles.json."""

    special: str  # tokens; the first is the BOS token, if the template writes one
    stop: str  # what trains after the last turn
    middle: str | None = None  # after an earlier one; None: the same
    trims: bool = False  # the template strips the texts
    system: bool = True
    strips_right: bool = False  # its special tokens swallow the white space that follows
    rewrites: bool = False  # the template drops some thinking


TEMPLATES = ROOT / "tests" / "templates"
STYLES = {name: Style(**style) for name, style in json.loads((TEMPLATES / "styles.json").read_text()).items()}


def turns(each, prompt="<|im_start|>assistant\n"):
    """A template that writes each message alike."""
    return "{% for m in messages %}" + each + "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"


CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def styled(tokenizer, template, style):
    tokenizer = with_template(tokenizer, template)
    options = {"special": True, "rstrip": style.strips_right, "normalized": False}
    tokenizer.add_tokens([AddedToken(token, **options) for token in style.special.split()], special_tokens=True)
    tokenizer.bos_token = style.special.split()[0]
    tokenizer.eos_token = style.stop.strip() or style.special.split()[-1]
    return tokenizer


def in_every_style(tokenizer):
    return {name: styled(tokenizer, (TEMPLATES / f"{name}.jinja").read_text(), style) for name, style in STYLES.items()}


@pytest.fixture(scope="module")
def by_bytes(tokenizer):
    """A token a byte: what trains can be compared to the character."""
    return in_every_style(tokenizer)


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
    return in_every_style(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


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
    return in_every_style(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


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


def test_a_chat_template_and_its_arguments_can_be_given(tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text("\ufeff{{ begin }}" + turns("{{ m.role }}>{{ m.content }}<|im_end|>", ""))
    given = load_tokenizer("tiny", str(mine), template_args='{"begin": "!!"}')
    assert given.decode(encode_chat(given, chat("a", "b"))[0]) == "!!user>a<|im_end|>assistant>b<|im_end|>"
    assert given.decode(encode_prompt(given, chat("a"))) == "!!user>a<|im_end|>"


@pytest.mark.parametrize("case", json.loads((TEMPLATES / "masks.json").read_text()), ids=lambda case: case["why"])
def test_what_trains_of_tools_thinking_and_odd_templates(by_bytes, case):
    template = (TEMPLATES / f"{case['template']}.jinja").read_text()
    tokenizer = with_template(by_bytes[case.get("tokens_of", case["template"])], template)
    messages = chat(*case["texts"])
    for message, role in zip(messages, case.get("roles", []), strict=False):
        message["role"] = role
    if "refused" in case:
        with pytest.raises(UserError, match=case["refused"]):
            trained(tokenizer, messages)
    else:
        assert trained(tokenizer, messages, **case.get("arguments", {})) == case["trains"]


@pytest.mark.parametrize("case", (TEMPLATES / "unmaskable.txt").read_text().splitlines())
def test_templates_that_cannot_be_masked_are_refused_with_the_reason(by_bytes, case):
    template, _, reason = case.rpartition(" -> ")
    with pytest.raises(UserError, match=reason):
        trained(with_template(by_bytes["qwen2.5"], template), chat("Hi", "Yes, yes", "Bye", "No more"))


def test_which_token_stops(by_bytes):
    """The last one of what closes a last turn; not one that also stands inside of a turn."""
    wanted = {name: style.stop.strip() for name, style in STYLES.items()}
    wanted |= {"qwen1.5": "<|im_end|>", "command": "<|END_OF_TURN|>"}
    assert {name: ends_of_turns(*cache_key(by_bytes[name], {})).stop for name in STYLES} == wanted
    kimi = with_template(by_bytes["qwen2.5"], (TEMPLATES / "kimi.jinja").read_text())
    kimi.add_tokens(["<|open|>", "<|close|>", "<|sep|>"], special_tokens=True)
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


@pytest.mark.parametrize("role", ["tool", "developer", "system"])
def test_a_message_that_the_template_drops_is_told(by_bytes, role):
    """The system message only of a whole conversation: generation has it."""
    keeps = f"m.role != '{role}'" + " or messages[-1].role == 'user'" * (role == "system")
    tokenizer = with_template(by_bytes["qwen2.5"], turns("{% if " + keeps + " %}" + CHATML + "{% endif %}"))
    dropped, others = {"role": role, "content": "a"}, chat("a", "b")
    messages = [*others, dropped] if role == "tool" else [dropped, *others]
    with pytest.raises(UserError, match=f"drops the {role} message of"):
        encode_chat(tokenizer, messages)
    if role == "system":
        assert encode_prompt(tokenizer, messages[:-1])
    elif role == "developer":
        with pytest.raises(UserError, match="drops the developer message"):
            encode_prompt(tokenizer, messages[:-1])
    assert trained(tokenizer, others) == ["b<|im_end|>"]


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
    assert across > 0 or name != "vicuna"  # whose header ends in a space


@pytest.mark.parametrize("name", ["llama2", "gemma", "vicuna"])
def test_pieces_with_spaces_of_their_own(by_pieces, name):
    style, tokenizer = STYLES[name], by_pieces[name]
    for answers in (("yes", "no no"), ("perhaps, oh yes!", "🙂 no"), ("Да", "yes\nno")):
        runs = trained(tokenizer, chat("Say yes.", answers[0], "Say no.", answers[1]))
        assert [run.lstrip(" ") for run in runs] == expected(style, answers)


# A header, whole turns, the user's texts, sentinels, white space, nothing, stop tokens, Jinja; and parts of such texts.
NASTY = json.loads((TEMPLATES / "nasty.json").read_text())
TEXT = st.sampled_from(NASTY["texts"]) | st.lists(
    st.sampled_from([*NASTY["parts"], *"ab \n\t{%<|>:é🙂अ"]), max_size=8
).map("".join)
SETTINGS = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(
    name=st.sampled_from([name for name in STYLES if not STYLES[name].rewrites]),
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
@given(
    name=st.sampled_from([name for name in STYLES if STYLES[name].rewrites]),
    texts=st.lists(TEXT, min_size=2, max_size=7),
)
def test_random_conversations_with_templates_that_rewrite_thinking(by_bytes, name, texts):
    """What follows the last `</think>` trains, whatever else the template keeps; never a word of the user."""
    style, tokenizer = STYLES[name], by_bytes[name]
    asked = ["§" + text if i % 2 == 0 else text.replace("§", "") for i, text in enumerate(texts)]
    try:
        runs = trained(tokenizer, chat(*asked))
    except UserError:  # an answer that begins as the prompt's thinking does can't be told from it
        assert any("</think>" in text and "<think>" in text.rpartition("</think>")[2] for text in asked[1::2])
        return
    answers = [text.rpartition("</think>")[2].lstrip("\n") + style.stop for text in asked[1::2]]
    assert "§" not in "".join(runs)
    assert all(run.endswith(answer) for run, answer in zip(runs, answers, strict=True))
