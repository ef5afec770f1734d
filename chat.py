"""Conversations as token ids: rendering by the model's own chat template, and which tokens the assistant wrote.

`encode_chat` reads that off two renderings, with no template-specific code; `encode_prompt` ends where the assistant
begins.
"""

import contextlib
import copy
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

BUNDLED = {name: str(Path(__file__).resolve().parent / "models" / name) for name in ("tiny", "tiny-teacher")}
# role and content, both text; where it is given `weight`: 0, and the turn does not train; an assistant's may have
# reasoning_content and tool_calls.
Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"function": "tool", "ipython": "tool"}  # what OpenAI and Llama have called it
FLAGS = ("weight", "train", "training", "trainable", "loss")  # what people call `weight`
THINKING = ("reasoning_content", "thinking", "reasoning")  # and what people and templates call that


class UserError(Exception):
    """The user's mistake: `common.run` prints it as one line and exits with code 2."""


def shorten(text: str, limit: int = 200) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


@contextlib.contextmanager
def loading(what: str) -> Generator[None]:
    """Turns the library's errors about what is missing or broken into one line."""
    try:
        yield
    except Exception as error:  # each library has types of its own
        if isinstance(error, (UserError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
            raise
        if type(error).__name__.startswith("DatasetGeneration"):  # which says nothing itself
            error = error.__cause__ or error
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"cannot load {what}: {lines[0] if lines else type(error).__name__}") from error


def from_json(value: Any) -> Any:
    """Tables keep objects as JSON text. What is no JSON stays as it is."""
    with contextlib.suppress(ValueError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def check_function(value: Any, fields: str, where: str) -> dict[str, Any]:
    """A tool, or a call of one, as {"type": "function", "function": {"name", ...}}; OpenAI's form is kept as it is."""
    value = from_json(value)
    if isinstance(value, dict) and "function" not in value:  # flat
        outer = {key: value[key] for key in ("id", "type") if key in value}
        value = {"type": "function", **outer, "function": without(value, *outer)}
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} must be a list of objects with {fields}, not {shorten(repr(value))}")
    return value


def check_tools(tools: Any, where: str = "") -> list[dict[str, Any]]:
    """The functions that a model may call. Raises a UserError, which begins with `where`."""
    tools = from_json(tools)
    if not isinstance(tools, list):
        raise UserError(f"{where}tools must be a list, not {shorten(repr(tools))}")
    return [check_function(tool, "name, description and parameters", f"{where}tools") for tool in tools]


def check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects."""
    checked = []
    for call in calls if isinstance(calls := from_json(calls), list) else [calls]:
        call = check_function(call, "name and arguments", f"{where}tool_calls")
        arguments = from_json(call["function"].get("arguments") or {})
        if not isinstance(arguments, dict):
            raise UserError(f"{where}the arguments of a tool call must be an object, not {shorten(repr(arguments))}")
        checked.append(call | {"function": call["function"] | {"arguments": arguments}})
    return checked


def check_messages(messages: Any, where: str = "") -> list[Message]:
    """Contents as text, also where they are lists of parts; `weight` as 0 or 1 where a message or part has a flag.

    An assistant's thinking and tool calls go by one name and form. Raises a UserError for anything else, which begins
    with `where`.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}messages must be a list with at least one message")
    checked = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        role = OTHER_ROLES.get(role, role) if isinstance(role, str) else None
        if role not in ROLES:
            raise UserError(f"{where}each message must be an object with content and a role of {', '.join(ROLES)}")
        # What is empty says nothing (a table fills its gaps with None), but templates may write something for it.
        message = {key: value for key, value in message.items() if value not in (None, [], {}, "") or key == "content"}
        message["role"] = role
        extra: dict[str, Any] = {}  # what an assistant writes beside its content
        if role == "assistant":
            thoughts = [message.pop(name) for name in THINKING if name in message]
            if not all(isinstance(thought, str) and thought == thoughts[0] for thought in thoughts):
                raise UserError(f"{where}{' and '.join(THINKING)} must be one text")
            calls = [message.pop(name) for name in ("tool_calls", "function_call") if name in message]
            extra = {"reasoning_content": thoughts[0]} if thoughts else {}
            extra |= {"tool_calls": check_calls(calls[0], where)} if calls else {}
            if more := [key for key in message if key not in ("role", "content", "name", *FLAGS)]:
                raise UserError(f"{where}an assistant message has {', '.join(more)}: write it into content, or drop it")
        parts: Any = message.get("content")
        if parts is None and extra:
            parts = ""
        parts = parts if isinstance(parts, list) else [{"text": parts}]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise UserError(f"{where}the content of each message must be text, or a list of text parts")
        flags: list[Any] = [item[flag] for item in (message, *parts) for flag in FLAGS if item.get(flag) is not None]
        if flags and not (flags[0] in (0, 1) and all(flag == flags[0] for flag in flags)):
            raise UserError(f"{where}{', '.join(FLAGS)} must be 0, 1, false or true, for a whole turn, not {flags}")
        if role != "assistant" and flags and flags[0]:
            raise UserError(f"{where}a message of the {role} is to train: only the assistant's do")
        content = "".join(part["text"] for part in parts)
        message |= {"content": content} | extra | ({"weight": int(flags[0])} if flags else {})
        if re.search("[\ud800-\udfff]", json.dumps(message, ensure_ascii=False, default=str)):
            raise UserError(f"{where}a text holds half of a surrogate pair: {shorten(ascii(message))}")
        checked.append(message)
    return checked


def load_tokenizer(
    model: str, chat_template: str | None = None, needs_template: bool = True, template_args: str = "{}"
) -> Any:
    """With --chat-template and --chat-template-args. Raises a UserError without a template or character offsets."""
    with loading(f"the tokenizer of {model}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED.get(model, model))
        if isinstance(tokenizer.chat_template, dict):  # several by name
            tokenizer.chat_template = tokenizer.get_chat_template()
        if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
            raise ValueError("it makes no tokens of a text: is tokenizer.json missing?")
    if chat_template is not None:
        with loading(f"--chat-template {chat_template}"):
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8-sig")
    if tokenizer.chat_template is None and needs_template:
        raise UserError(f"{model} has no chat template: pass --chat-template FILE.jinja, or use an instruct model")
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {model} gives no character offsets: a fast tokenizer is needed")
    tokenizer.template_args = json.loads(template_args)  # for `render`
    return tokenizer


def base_of(model: str) -> str:
    """The model that a folder with a LoRA adapter stands on; any other model is its own."""
    path = Path(BUNDLED.get(model, model))
    if not (path / "adapter_config.json").exists():
        return str(BUNDLED.get(model, model))
    with loading(f"{path}/adapter_config.json"):
        return json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]


def load_config(model: str) -> Any:
    """The configuration, with every dropout 0."""
    with loading(f"the model {model}"):
        config = AutoConfig.from_pretrained(base_of(model))
    for part in (config, config.get_text_config()):
        for name in [name for name, value in vars(part).items() if "drop" in name and type(value) is float]:
            setattr(part, name, 0.0)
    return config


def load_generation_config(model: str, config: Any) -> GenerationConfig:
    """What the author wrote for generation, its stop tokens first of all; without such a file, the model's own."""
    path = base_of(model)
    if (Path(path) / "generation_config.json").exists():
        with loading(f"{path}/generation_config.json"):
            return GenerationConfig.from_pretrained(path)
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(config)


def context_length(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def vocab_size(tokenizer: Any) -> int:
    """Tokens that exist. The rows of a model's head beyond them are padding, and differ between sizes of one family."""
    return max(tokenizer.get_vocab().values()) + 1


@functools.lru_cache(maxsize=4)  # `_size` is only part of the key: a tokenizer that got new tokens is read again
def added_tokens(tokenizer: Any, _size: int) -> tuple[frozenset[int], re.Pattern]:
    """Ids of the tokens beside the ordinary vocabulary, such as <|im_end|>; a pattern of white space and one."""
    names = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    pattern = "|".join(map(re.escape, sorted(names.values(), key=len, reverse=True)))
    return frozenset(names), re.compile(rf"\s*({pattern or '(?!)'})")


@functools.lru_cache(maxsize=16)
def wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether the template takes contents as lists of parts only, as those of vision models do."""

    def writes(content: Any) -> bool:
        with contextlib.suppress(Exception):
            return "\u2983" in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return False

    return "content" in template and not writes("\u2983") and writes([{"type": "text", "text": "\u2983"}])


def render(tokenizer: Any, messages: list[Message], template_args: dict[str, Any], prompt: bool = False) -> str:
    template_args = getattr(tokenizer, "template_args", {}) | template_args
    if wants_parts(tokenizer, tokenizer.chat_template):
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    messages = [m | {name: m[THINKING[0]] for name in THINKING if THINKING[0] in m} for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **template_args)
    except Exception as error:  # a template can fail in any way that Python can
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the chat template refuses the conversation: {reason}") from error


def cache_key(tokenizer: Any, template_args: dict[str, Any], but: str = "") -> tuple[Any, ...]:
    args = {name: value for name, value in template_args.items() if name != but}
    return tokenizer, tokenizer.chat_template, len(tokenizer), json.dumps(args, default=str)


def has_parts(message: Message) -> bool:
    """Whether it is more than a text: what an assistant thought, or called."""
    return "tool_calls" in message or THINKING[0] in message


def without(message: Message, *keys: str) -> Message:
    return {key: value for key, value in message.items() if key not in keys}


def add_argument(call: dict[str, Any], value: str) -> dict[str, Any]:
    """A tool call with one more argument, as object or JSON text, as it was."""
    given = call["function"]["arguments"]
    more: Any = from_json(given) | {"\u2983": value}
    if isinstance(given, str):
        more = json.dumps(more, ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": more}}


@functools.lru_cache(maxsize=1024)
def left_out(tokenizer: Any, _template: str, _size: int, template_args: str, shape: str, prompt: bool) -> list[str]:
    """What the template drops from a conversation of that shape, or garbles: messages, tools and their calls.

    Of the assistant's messages only texts with calls count. The mark in a call has quotes: JSON within JSON garbles it.
    """
    args, messages, marks = json.loads(template_args), json.loads(shape), {}
    for i, message in enumerate(messages):
        message.setdefault("content", f"\u2983{i}\u2984")
        if message["role"] != "assistant" or "tool_calls" in message:
            marks[message["content"]] = f"the {message['role']} message"
        for n, call in enumerate(message.get("tool_calls", [])):
            mark = f"\u2983{i}'\"{n}\u2984"
            marks[mark], message["tool_calls"][n] = f"a call of {call['function']['name']}", add_argument(call, mark)
    for tool in args.get("tools") or []:
        name = tool["function"]["name"]
        tool["function"]["name"] = f"\u2983{name}\u2984"
        marks[tool["function"]["name"]] = f"the tool {name}"
    text = render(tokenizer, messages, args, prompt)
    if "'\u2983': " in text:
        raise UserError("the chat template writes the arguments of a call as Python does")
    forms = {mark: (mark, repr(mark)[1:-1], json.dumps(mark, ensure_ascii=False)[1:-1]) for mark in marks}
    return [what for mark, what in marks.items() if not any(form in text for form in forms[mark])]


def check_context(tokenizer: Any, messages: list[Message], args: dict[str, Any], prompt: bool) -> None:
    """Raises a UserError when the template drops a message, a tool, or a tool call, or garbles one."""
    # All but the texts that there are.
    shape = [{key: value for key, value in m.items() if key != "content" or not value} for m in messages]
    if lost := left_out(*cache_key(tokenizer, args), json.dumps(shape, default=str), prompt):
        raise UserError(f"the chat template drops {lost[0]} of {', '.join(m['role'] for m in messages)}")


def in_either_form(messages: list[Message], encode: Callable[[list[Message]], Any]) -> Any:
    """What `encode` returns for the messages with arguments of tool calls as objects, or as JSON text.

    Templates want one of them. Raises its UserError when both fail.
    """
    ways, failed = [messages], []
    if any("tool_calls" in message for message in messages):
        ways.append(copy.deepcopy(messages))
        for call in [call for message in ways[1] for call in message.get("tool_calls", [])]:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    for way in ways:
        try:
            return encode(way)
        except UserError as error:
            failed.append(error)
    raise next((error for error in failed if "refuses" not in str(error)), failed[0])


def encode_prompt(tokenizer: Any, messages: list[Message], **template_args: Any) -> list[int]:
    """Token ids of a conversation, up to where the assistant begins to write."""

    def write(messages: list[Message]) -> str:
        check_context(tokenizer, messages, template_args, prompt=True)
        return render(tokenizer, messages, template_args, prompt=True)

    text = in_either_form(check_messages(messages), write)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # a BOS token is the template's


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """With how many tokens, or characters, both begin."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def template_parts(tokenizer: Any, messages: list[Message], texts: list[int], args: dict[str, Any]) -> list[str]:
    """What the template itself writes before, between and after the texts of some messages, `texts`.

    "<user>2+2?<end><assistant>4<end>" has the parts "<user>2+2?<end><assistant>" and "<end>" around the answer.
    """
    hidden, sentinel = list(messages), "\u2983\u2984"
    while sentinel in str(messages):
        sentinel += "\u2984"
    for i in texts:
        hidden[i] = messages[i] | {"content": sentinel}
    parts = render(tokenizer, hidden, args).split(sentinel)
    if len(parts) != len(texts) + 1 or "" in parts[:-1]:
        raise UserError(f"the chat template does not write each of {len(texts)} assistant turns once, after a header")
    return parts


def find_texts(
    tokenizer: Any, messages: list[Message], texts: list[int], args: dict[str, Any], text: str
) -> list[tuple[int, int]]:
    """Where texts, trimmed or not, stand in a rendering that must be the template's parts with the texts between."""
    parts, answers = template_parts(tokenizer, messages, texts, args), [messages[i]["content"] for i in texts]
    spans, position = [], 0
    for n, answer in enumerate(answers):
        before, after = parts[n], parts[n + 1]
        trimmed = (answer, answer.strip(), answer.lstrip(), answer.rstrip(), answer.strip("\n"), answer.lstrip("\n"))
        # For an empty text some templates write no line.
        befores = {before: None, before.rstrip() if not answer.strip() else before: None}
        afters = {after: None, after.rstrip() if n + 1 < len(answers) and not answers[n + 1].strip() else after: None}
        ways = itertools.product(befores, trimmed, afters)
        found = next((way for way in ways if text.startswith("".join(way), position)), None)
        if found is None:
            what = shorten(before + answer + after)
            raise UserError(f"the chat template rewrites assistant turn {n + 1} or its own text around it: no {what!r}")
        start = position + len(found[0])
        position = start + len(found[1])
        spans.append((start, position))
    if text[position:] != parts[-1]:
        raise UserError(f"the chat template writes something else after the last assistant turn: {text[position:]!r}")
    return spans


def find_prompt(text: str, prompt: str, context: str, differs: int) -> list[int]:
    """Where in a rendering, `text`, generation begins after the prompt, which is written after the context; or [].

    At `differs` the text becomes another one than without thinking and calls, which generation begins up to there.
    """
    # What came before may be rendered in another way, or the prompt write a block of thinking that is not this one.
    header, start = prompt[shared_prefix(prompt, context) :], len(prompt) if text.startswith(prompt) else 0
    for words in (header, header.partition("<think>")[0]):
        if words and not start:
            at = text.rfind(words, shared_prefix(text, context), differs + len(words) - 1)
            start = at + len(words) if at >= 0 else 0
    if not start:
        return []
    always = text[start:differs] if differs < len(text) else ""
    return [start + len(always) - len(always.lstrip("\n"))]  # lines that end there in any case are the template's


def find_turn(
    tokenizer: Any, messages: list[Message], i: int, args: dict[str, Any], text: str, ends: "Ends"
) -> tuple[int, int]:
    """Where in a rendering the assistant's turn `messages[i]` stands, which calls tools or thinks.

    Two other renderings can prove where it begins and ends: that of the messages up to there, with which the text must
    begin, and that with a plain text in its place, around which the text must be the same. Where templates move what
    comes before (Mistral's tools), a call must stand as it did at first, around what one more argument changes.
    """
    starts, stops, differs, message = [], [], len(text), messages[i]
    upto = render(tokenizer, messages[: i + 1], args)
    prompt, context = (render(tokenizer, messages[:i], args, prompt=prompt) for prompt in (True, False))
    closed = max((match.end() for match in ends.special.finditer(upto)), default=len(upto))
    if text.startswith(upto[:closed]) and not upto[closed:].strip():
        stops.append(closed)
    with contextlib.suppress(UserError):  # of a template that wants a call before a tool's result
        plain = [*messages[:i], without(message, "tool_calls", THINKING[0]), *messages[i + 1 :]]
        first, last = template_parts(tokenizer, plain, [i], args)
        differs, at = shared_prefix(text, first), len(text) - len(last)
        if differs == len(first):
            starts.append(differs)  # after an empty block of thinking, which the template writes
        # What it wrote stands there without the messages that follow, too: no result of a tool is in it.
        if text.endswith(last) and text[differs:at] in upto:
            stops.append(at + ends.find(text, at, is_last=i == len(messages) - 1))
    starts += find_prompt(text, prompt, context, differs)
    start, stop = max(starts, default=len(text)), stops[0] if len(set(stops)) == 1 else 0
    calls, alone = message.get("tool_calls", []), upto[len(prompt) : closed]
    if start >= stop and calls and upto.startswith(prompt):
        other = message | {"tool_calls": [add_argument(call, "") for call in calls]}
        inside = shared_prefix(text, render(tokenizer, [*messages[:i], other, *messages[i + 1 :]], args))
        at = text.rfind(alone, 0, inside + len(alone))
        if 0 <= at <= inside < at + len(alone):
            start, stop = at, at + len(alone)
    turn = sum(message["role"] == "assistant" for message in messages[: i + 1])
    if start == len(text):
        raise UserError(f"the generation prompt does not lead to the thinking of assistant turn {turn}, or its calls")
    if start >= stop:
        raise UserError(f"it is not certain where assistant turn {turn} begins and ends")
    needed = [message["content"].rpartition("</think>")[2].strip(), *(call["function"]["name"] for call in calls)]
    if missing := [words for words in needed if words not in text[start:stop]]:
        raise UserError(f"the chat template does not write {shorten(repr(missing[0]))} in assistant turn {turn}")
    return start, stop


def find_turns(tokenizer: Any, messages: list[Message], template_args: dict[str, Any]) -> tuple[str, list]:
    """A rendered conversation, and the characters [start, end) of each assistant turn in it, with what closes it.

    A second rendering has a sentinel in place of each assistant text. With the texts put back, the first must come out:
    that is the proof. Turns with thinking that fail it, and those with more than a text, get one of their own.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation without an assistant turn has nothing to train")
    text = render(tokenizer, messages, template_args)
    for i in [i for i in turns if THINKING[0] in messages[i]]:
        # Thinking that the template drops is no part of what comes before later turns.
        other = [*messages[:i], without(messages[i], THINKING[0]), *messages[i + 1 :]]
        messages = other if render(tokenizer, other, template_args) == text else messages
    texts = [i for i in turns if not has_parts(messages[i])]
    try:
        spans = find_texts(tokenizer, messages, texts, template_args, text)
    except UserError:
        if not any("</think>" in messages[i]["content"] for i in texts):
            raise
        texts = [i for i in texts if "</think>" not in messages[i]["content"]]
        spans = find_texts(tokenizer, messages, texts, template_args, text)
    ends, found = ends_of_turns(*cache_key(tokenizer, template_args, but="tools")), {}
    for i, (start, end) in zip(texts, spans, strict=True):
        found[i] = start, end + ends.find(text, end, is_last=i == len(messages) - 1)
    for i in set(turns) - set(texts):
        found[i] = find_turn(tokenizer, messages, i, template_args, text, ends)
    spans = [found[i] for i in turns]
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise UserError("it is not certain where one assistant turn ends and the next begins")
    return text, spans


@dataclass(frozen=True)
class Ends:
    """What closes assistant turns, with white space before it: the last one and earlier ones; "" where nothing does.

    `stop` ends generation, or is ""; `header` are the special tokens that begin messages; `special` finds any.
    """

    last: str
    earlier: str
    stop: str
    header: frozenset[str | None]
    special: re.Pattern

    def find(self, text: str, at: int, is_last: bool) -> int:
        """How many characters close the turn whose text ends at `at`. Raises a UserError when it is not known."""
        for closing in sorted({self.last, self.earlier} - {""}, key=len, reverse=True):
            if text.startswith(closing, at):
                return len(closing)
        other = run_of_tokens(self.special, text[at:], self.header)  # such as Llama 3.1's before a tool's message
        if not other and (self.last if is_last else self.earlier):
            raise UserError(f"an assistant turn ends in another way than the template's turns do: {text[at:][:30]!r}")
        return len(other) if self.last or self.earlier else 0


def run_of_tokens(special: re.Pattern, text: str, but: frozenset[str | None]) -> str:
    """The special tokens that a text begins with, and the white space before each, up to one of `but`."""
    end = 0
    while (match := special.match(text, end)) and match[1] not in but:
        end = match.end()
    return text[:end]


@functools.lru_cache(maxsize=16)
def ends_of_turns(tokenizer: Any, _template: str, _size: int, template_args: str) -> Ends:
    """What closes turns, from the rendering of two.

    A last turn is closed by what follows it, up to the last special token. An earlier one may have another end
    (gpt-oss, OLMo): the special tokens that follow it, up to one that belongs to a header. The last one's last token
    stops, unless it stands inside of turns as well.
    """
    args, special = json.loads(template_args), added_tokens(tokenizer, len(tokenizer))[1]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"\u2983{i}\u2984"} for i, role in enumerate(roles)]
    try:
        text = render(tokenizer, messages, args)
    except UserError:  # one turn only
        messages = messages[:2]
        text = render(tokenizer, messages, args)
    first, answer, *others = (message["content"] for message in messages)
    after_last = text.partition(messages[-1]["content"])[2]
    ends = [match.end() for match in special.finditer(after_last)]
    last = after_last[: ends[-1]] if ends else ""
    between = text.partition(answer)[2].partition(others[0])[0] if others else ""

    context, prompt = (render(tokenizer, messages[:-1], args, prompt=prompt) for prompt in (False, True))
    prompted = prompt[shared_prefix(prompt, context) :]  # the header of the assistant
    closes = (special.findall(between) or [None])[0]
    if closes and special.findall(prompted)[:1] == [closes] != special.findall(text)[:1]:
        prompted = prompted.partition(closes)[2]  # Qwen1.5 closes the last message of the user here only
    # The user's header is what stands before the first text, but for what closes a system prompt.
    before = text.partition(first)[0]
    header = {tokenizer.bos_token, *special.findall(prompted), *special.findall(before)[-1:]}
    header |= set(special.findall(before.rpartition(closes)[2] if closes else before))
    earlier = run_of_tokens(special, between, frozenset(header))

    stop = (special.findall(last or earlier) or [""])[-1]
    thinking = [*messages[:-1], messages[-1] | {"content": f"<think>{first}</think>{messages[-1]['content']}"}]
    turn = render(tokenizer, thinking, args).partition(messages[-1]["content"])[0]
    inside = prompted + turn.removeprefix(prompt) if turn.startswith(prompt) else prompted
    if stop in special.findall(inside) or last.count(stop) > 1:
        stop = ""
    return Ends(last, earlier, stop, frozenset(header), special)


def encode_chat(tokenizer: Any, messages: list[Message], **template_args: Any) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and its loss mask: 1 = written by the assistant, its stop token included.

    A turn whose message has `weight` 0 does not train. A token belongs to the turn that its last character does.
    Raises a UserError when it can't be proven what trains, or when the template drops a message.
    """

    def find(messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        found = find_turns(tokenizer, messages, template_args)
        check_context(tokenizer, messages, template_args, prompt=False)
        return found

    messages = check_messages(messages)
    text, spans = in_either_form(messages, find)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special = added_tokens(tokenizer, len(tokenizer))[0]
    ends = []  # of each token
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # The span of a special token may include the white space after it.
        ends.append(start + len(text[start:end].rstrip()) if token in special else end)
    begins, stops = np.array(spans).T
    weights = np.array([message.get("weight", 1) for message in messages if message["role"] == "assistant"])
    turns = np.searchsorted(stops, ends)  # for each token the first turn that does not end before it
    trained = np.append(begins, len(text))[turns] < ends
    for n in set(np.flatnonzero(begins < stops)) - set(turns[trained]):
        raise UserError(f"assistant turn {n + 1} has no token of its own: {text[begins[n] : stops[n]]!r}")
    return encoded["input_ids"], (trained * np.append(weights, 0)[turns]).astype(int).tolist()


PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def stop_token_ids(generation_config: GenerationConfig, tokenizer: Any, **template_args: Any) -> list[int]:
    """Every token that ends a completion: of the generation config, the tokenizer, and the template's end of turn."""
    stop = ends_of_turns(*cache_key(tokenizer, template_args)).stop
    listed = generation_config.eos_token_id
    ids = tokenizer.convert_tokens_to_ids([stop] if stop else []) + (listed if isinstance(listed, list) else [listed])
    return sorted({i for i in (tokenizer.eos_token_id, *ids) if i is not None})


def check_tokenizer(tokenizer: Any, config: Any, generation_config: GenerationConfig) -> list[str]:
    """Lines on what begins and ends a sequence. Raises a UserError when tokenizer and model contradict each other."""
    model, bos, rows = tokenizer.name_or_path, tokenizer.bos_token, config.get_text_config().vocab_size
    stop_ids, ends = stop_token_ids(generation_config, tokenizer), ends_of_turns(*cache_key(tokenizer, {}))
    text, ((start, end),) = find_turns(tokenizer, PROBE, {})
    prompt = render(tokenizer, PROBE[:1], {}, prompt=True)
    # A special token beyond the rows that the template does not write does no harm: Gemma 3 has one, for images.
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= rows]
    if any(token not in tokenizer.all_special_tokens or token in tokenizer.chat_template for token in beyond):
        raise UserError(f"{model}: the tokenizer has tokens beyond the model's {rows:,} rows: take the model's own")
    if not stop_ids or stop_ids[-1] >= min(vocab_size(tokenizer), rows):
        raise UserError(f"{model}: stop tokens {stop_ids}: correct eos_token_id in generation_config.json")
    if bos and prompt.startswith(bos + bos):
        raise UserError(f"{model}: the chat template writes {bos} twice: pass a --chat-template that writes it once")
    begins = f"BOS {bos}" if bos and prompt.startswith(bos) else "no BOS"
    stops, warnings = ", ".join(tokenizer.convert_ids_to_tokens(stop_ids)), []
    if begins == "no BOS" and bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        warnings.append(f"the chat template writes no {bos}, with which the tokenizer begins any other text")
    if end == start + len(PROBE[1]["content"]):
        which = "the last" if ends.earlier else "a"
        warnings.append(f"the chat template closes {which} turn with no special token: it trains without a stop token")
    if prompt != text[:start]:
        warnings.append(f"generation begins after {prompt[-30:]!r}, trained turns after {text[:start][-30:]!r}")
    tokens = f"tokens     {begins}, stop {stops}, context {context_length(config):,}"
    return [tokens, *(f"warning    {words}" for words in warnings)]


def check_same_tokens(student: Any, teacher: Any) -> None:
    """Raises a UserError that names the first token id at which two tokenizers differ."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            words = f"token {i} is {ours.get(i)!r} in the student's and {theirs.get(i)!r} in --teacher-model's"
            raise UserError(f"student and teacher have different tokenizers: {words}; choose models of one family")
