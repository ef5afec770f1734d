"""Of conversations with tools trains what the assistant wrote, thinking and calls too; never what a tool gave back.

The templates are small ones in the shapes of the families, in `tools/`; what should train of them stands by hand in
`tools.json`, or why a shape refuses. Their `generation` blocks mark the same: random conversations are held to it.
"""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_templates import TEXT, Style, styled, trained
from transformers.utils.chat_template_utils import render_jinja_template

from chat import UserError, check_messages, encode_chat, encode_prompt, in_either_form

FOLDER = Path(__file__).parent / "tools"
SHAPES, CHANGES = (json.loads((FOLDER / name).read_text(encoding="utf-8")) for name in ("tools.json", "changes.json"))
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "§", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def by_bytes(tokenizer):
    """A token a byte: what trains can be compared to the character."""
    templates = {name: (FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in SHAPES}
    return {name: styled(tokenizer, templates[name], Style(SHAPES[name]["special"], "")) for name in SHAPES}


def turn(content="", thinking="", calls=()):
    calls = [{"id": i, "type": "function", "function": {"name": "weather", "arguments": args}} for i, args in calls]
    extra = {"reasoning_content": thinking, "tool_calls": calls}
    return {"role": "assistant", "content": content} | {key: value for key, value in extra.items() if value}


def said(role, content, call=None):
    return {"role": role, "content": "§" + content, "tool_call_id": call}  # the § never trains


def conversations(name):
    user, (first, second) = said("user", "Weather?"), SHAPES[name]["ids"]
    warm, cold = said("tool", "20 degrees", first), said("tool", "2 degrees", second)
    rome, oslo = (first, {"city": "Rome"}), (second, {"city": "Oslo"})
    thinking = [user, turn("", "hm", [rome]), warm, turn("Sunny", "so")]
    return {
        "call": [user, turn("", "", [rome]), warm, turn("Sunny")],
        "text and call": [user, turn("Look", "", [rome]), warm, turn("Sunny")],
        "thinking": thinking,
        "a later user": [*thinking, user, turn("", "aha", [oslo]), cold, turn("Rainy", "well")],
        "two calls": [user, turn("", "", [rome, oslo]), warm, cold, turn("Sunny")],
        "ends with a call": [user, turn("", "", [rome])],
    }


def marked(tokenizer, messages):
    """What the template itself marks, with no help of ours but the form of the arguments that it takes."""

    def render(way):
        way = [m | {"thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in way]
        options = {"return_assistant_tokens_mask": True, "tools": TOOLS, **tokenizer.special_tokens_map}
        try:
            return render_jinja_template([way], chat_template=tokenizer.chat_template, **options)
        except TypeError as error:  # of what adds JSON text
            raise UserError(str(error)) from error

    (text,), (spans,) = in_either_form(check_messages(messages), render)
    return [text[start:end] for start, end in spans if start < end]


@pytest.mark.parametrize("what", conversations("hermes"))
@pytest.mark.parametrize("name", SHAPES)
def test_what_trains_of_each_shape(by_bytes, name, what):
    wanted, messages = SHAPES[name]["trains"][what], conversations(name)[what]
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            encode_chat(by_bytes[name], messages, tools=TOOLS)
    else:
        assert trained(by_bytes[name], messages, tools=TOOLS) == trained(by_bytes[name], messages) == wanted
        assert marked(by_bytes[name], messages) == wanted


def test_calls_of_builtin_tools_and_calls_for_which_a_shape_has_no_place(by_bytes):
    messages = conversations("hermes")["call"]
    call, _ = trained(by_bytes["llama3.1"], messages, builtin_tools=["weather"])
    assert call == '<|python_tag|>weather.call(city="Rome")<|eom_id|>'
    short = json.loads(json.dumps(messages).replace("call00001", "1"))
    twice = [messages[0], messages[1] | {"tool_calls": messages[1]["tool_calls"] * 2}, *messages[2:]]
    for name, refused, reason in (
        ("gpt-oss", [messages[0], *messages[2:]], "a tool message, but no call before it"),
        ("gpt-oss", twice, "drops a call of weather"),
        ("mistral", short, "Tool call IDs should be alphanumeric strings with length 9"),
        ("kimi-k2", messages, "does not write 'weather' in assistant turn 1"),  # its ids have the names in them
    ):
        with pytest.raises(UserError, match=reason):
            encode_chat(by_bytes[name], refused)


@pytest.mark.parametrize("name", SHAPES)
def test_other_forms_of_a_conversation_train_the_same(by_bytes, name):
    for what, messages in conversations(name).items():
        if isinstance(SHAPES[name]["trains"][what], str):
            continue
        others = [json.loads(json.dumps(messages).replace(*words)) for words in CHANGES["forms"]]
        flat = [{"id": call["id"], **call["function"]} for call in messages[1]["tool_calls"]]
        others.append([messages[0], messages[1] | {"tool_calls": json.dumps(flat)}, *messages[2:]])
        if len(flat) == 1 and name not in ("mistral", "kimi-k2", "command"):  # which write its id
            others.append([messages[0], messages[1] | {"tool_calls": None, "function_call": flat[0]}, *messages[2:]])
        wanted = encode_chat(by_bytes[name], messages, tools=TOOLS)
        assert all(encode_chat(by_bytes[name], other, tools=TOOLS) == wanted for other in others)


@pytest.mark.parametrize("name", SHAPES)
def test_weight_0_takes_out_one_turn_and_a_prompt_is_a_beginning(by_bytes, name):
    messages = conversations(name)["call" if name == "gpt-oss" else "thinking"]  # whose final answers drop thinking
    runs = trained(by_bytes[name], messages, tools=TOOLS)
    for i, left in ((1, runs[1:]), (3, runs[:1])):
        weighted = [m | {"weight": 0} if m is messages[i] else m for m in messages]
        assert trained(by_bytes[name], weighted, tools=TOOLS) == left
        prompt = encode_prompt(by_bytes[name], messages[:i], tools=TOOLS)
        ids, mask = encode_chat(by_bytes[name], messages, tools=TOOLS)
        assert ids[: len(prompt)] == prompt
        assert any(mask[: len(prompt)]) == (i == 3)


@pytest.mark.parametrize("lie", CHANGES["lies"], ids=lambda lie: lie["has"])
def test_a_template_that_loses_or_garbles_tools_and_calls_is_refused(by_bytes, lie):
    tokenizer, messages = copy.deepcopy(by_bytes["hermes"]), conversations("hermes")["two calls"]
    assert lie["in"] in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(lie["in"], lie["has"])
    for text in ("", "The weather of the city Rome, twice: weather city Oslo"):  # a text that says it all hides nothing
        messages[1]["content"] = text
        if lie["refused"] is None:
            assert trained(tokenizer, messages, tools=TOOLS) == trained(by_bytes["hermes"], messages, tools=TOOLS)
            continue
        for encode in (encode_chat, encode_prompt):
            with pytest.raises(UserError, match=lie["refused"]):
                encode(tokenizer, messages, tools=TOOLS)


TURNS = [run for shape in SHAPES.values() for runs in shape["trains"].values() for run in runs if len(run) > 1]
ANY = TEXT | st.sampled_from(["Rome", "weather", "</tool_call>", "null", '"', "\\", *TURNS])
CONTENT = ANY.filter(lambda text: not text.strip().startswith("<think>"))  # which a prompt may have written already
LEAF = ANY | st.none() | st.booleans() | st.integers() | st.floats(-9, 9)
VALUE = LEAF | st.lists(LEAF | st.dictionaries(ANY, LEAF, max_size=2), max_size=2) | st.dictionaries(ANY, LEAF)


@st.composite
def agentic(draw):
    """A shape, a conversation, and whether that may have something for which the shape has no place."""
    name = draw(st.sampled_from(list(SHAPES)))
    text, two = (isinstance(SHAPES[name]["trains"][what], list) for what in ("text and call", "two calls"))
    bold = not text and draw(st.booleans())
    messages = [said("system", draw(ANY))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(said("user", draw(ANY)))
        for _ in range(draw(st.integers(0, 2))):
            ids = SHAPES[name]["ids"][: draw(st.integers(1, 1 + (two or bold)))]
            calls = [(i, draw(st.dictionaries(ANY, VALUE, max_size=2))) for i in ids]
            messages.append(turn(draw(CONTENT) if text or bold else "", draw(ANY), calls))
            messages += [said("tool", draw(ANY), i) for i in ids]
        messages.append(turn(draw(CONTENT), draw(ANY)))
    ends = [n for n, message in enumerate(messages, 1) if message["role"] == "assistant"]
    return name, messages[: draw(st.sampled_from(ends))], bold


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(agentic())
def test_random_conversations_train_what_the_template_marks(by_bytes, drawn):
    name, messages, bold = drawn
    try:
        runs = trained(by_bytes[name], messages, tools=TOOLS)
    except UserError:
        assert bold
        return
    assert "§" not in "".join(runs)
    assert all(m["content"].strip() in "".join(runs) for m in messages if "tool_calls" in m)
    # A token may begin with the space before its turn.
    assert [run.lstrip(" ") for run in runs] == [run.lstrip(" ") for run in marked(by_bytes[name], messages)]
