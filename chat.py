"""Conversations as token ids: rendering by the model's own chat template, and which tokens the assistant wrote.

`encode_chat` reads that off two renderings, with no template-specific code; `encode_prompt` ends where the assistant
begins.
"""

import functools
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import numpy as np
from transformers import GenerationConfig

import envs
from envs import Message, UserError, shorten


@contextmanager
def loading(what: str) -> Generator[None]:
    """Turns the library's errors about what is missing or broken into one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, TypeError, jinja2.TemplateError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"cannot load {what}: {lines[0] if lines else type(error).__name__}") from error


def context_length(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def vocab_size(tokenizer: Any) -> int:
    """Tokens that exist. The rows of a model's head beyond them are padding, and differ between sizes of one family."""
    return max(tokenizer.get_vocab().values()) + 1


@functools.lru_cache(maxsize=4)  # `_size` is only part of the key: a tokenizer that got new tokens is read again
def added_tokens(tokenizer: Any, _size: int) -> tuple[frozenset[int], re.Pattern]:
    """Ids of the tokens beside the ordinary vocabulary, such as <|im_end|>; a pattern of white space and one."""
    names = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    pattern = "|".join(map(re.escape, sorted(names.values(), key=len, reverse=True)))
    return frozenset(names), re.compile(rf"\s*(?:{pattern or '(?!)'})")


def render(tokenizer: Any, messages: list[Message], template_args: dict[str, Any], prompt: bool = False) -> str:
    template_args = getattr(tokenizer, "template_args", {}) | template_args
    with loading("the conversation into the chat template"):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **template_args)


def encode_prompt(tokenizer: Any, messages: list[Message], **template_args: Any) -> list[int]:
    """Token ids of a conversation, up to where the assistant begins to write."""
    text = render(tokenizer, envs.with_text_content(messages), template_args, prompt=True)
    # A BOS token is the template's to write.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_prompts(tokenizer: Any, dataset: Any, rows: Sequence[int], longest: int) -> dict[int, list[int]]:
    """Row -> token ids of its prompt. Raises a UserError when one has more than `longest` tokens."""
    prompts = {row: encode_prompt(tokenizer, dataset[row].prompt) for row in rows}
    for row, ids in prompts.items():
        if len(ids) > longest:
            words = f"the prompt of row {row} has {len(ids)} tokens"
            raise UserError(f"{words}, and the context less --max-new-tokens leaves {longest}")
    return prompts


def find_turns(tokenizer: Any, messages: list[Message], template_args: dict[str, Any]) -> tuple[str, list, str]:
    """A rendered conversation, the characters [start, end) of each assistant turn in it, and the end-of-turn token.

    A second rendering has a sentinel in place of each assistant text; between them stands the template's own:
    "<user>2+2?<end><assistant>4<end>" has ["<user>2+2?<end><assistant>", "<end>"]. With the texts put back, trimmed or
    not, the first rendering must come out. Thinking, up to `</think>`, stays in the second, for templates rewrite it or
    drop it from earlier turns; where it is kept, the turn begins with what of it the generation prompt does not write.
    The end-of-turn token is what follows the last turn ("" if nothing does), with white space before it, and belongs to
    each turn it follows; another one heads the next message, or does not stop generation (gpt-oss).
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation without an assistant turn has nothing to train")
    text, hidden, sentinel = render(tokenizer, messages, template_args), list(messages), "\u2983\u2984"
    while sentinel in text:
        sentinel += "\u2984"
    for i in turns:
        thinking, mark, _ = messages[i]["content"].rpartition("</think>")
        hidden[i] = messages[i] | {"content": thinking + mark + sentinel}
    parts = render(tokenizer, hidden, template_args).split(sentinel)
    if len(parts) != len(turns) + 1 or "" in parts[:-1]:
        raise UserError(f"the chat template does not write each of {len(turns)} assistant turns once, after a header")
    after_last = render(tokenizer, hidden[: turns[-1] + 1], template_args).split(sentinel)[-1]
    match = added_tokens(tokenizer, len(tokenizer))[1].match(after_last)
    end_of_turn = match.group() if match else ""
    spans, position = [], 0
    for n, i in enumerate(turns):
        before, after = parts[n], parts[n + 1]
        thinking, _, answer = messages[i]["content"].rpartition("</think>")
        trimmed = (answer, answer.strip(), answer.lstrip(), answer.rstrip(), answer.strip("\n"), answer.lstrip("\n"))
        written = next((t for t in trimmed if text.startswith(before + t + after, position)), None)
        if written is None:
            what = shorten(before + answer + after)
            raise UserError(f"the chat template rewrites assistant turn {n + 1} or its own text around it: no {what!r}")
        start = position + len(before)
        position = start + len(written)
        thought = thinking.replace("<think>", "").strip()
        if thought and thought in before:  # kept, or the user's words are the same
            prompt = render(tokenizer, messages[:i], template_args, prompt=True)
            if not text.startswith(prompt):
                raise UserError(f"the generation prompt does not lead to the thinking of assistant turn {n + 1}")
            if thought in text[len(prompt) : start]:
                start = max(len(prompt), text.find("<think>", len(prompt), start))
        end = position + len(end_of_turn) if text.startswith(end_of_turn, position) else position
        spans.append((start, end))
    if text[position:] != parts[-1]:
        raise UserError(f"the chat template writes something else after the last assistant turn: {text[position:]!r}")
    return text, spans, end_of_turn


def encode_chat(tokenizer: Any, messages: list[Message], **template_args: Any) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation and its loss mask: 1 = written by the assistant, its stop token included.

    A token belongs to the turn that its last character does. Raises a UserError as `find_turns` does.
    """
    text, spans, _ = find_turns(tokenizer, envs.with_text_content(messages), template_args)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special = added_tokens(tokenizer, len(tokenizer))[0]
    ends = []  # of each token
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # The span of a special token may include the white space after it.
        ends.append(start + len(text[start:end].rstrip()) if token in special else end)
    begins, stops = np.array(spans).T
    turns = np.searchsorted(stops, ends)  # for each token the first turn that does not end before it
    trained = np.append(begins, len(text))[turns] < ends
    for n in set(np.flatnonzero(begins < stops)) - set(turns[trained]):
        raise UserError(f"assistant turn {n + 1} has no token of its own: {text[begins[n] : stops[n]]!r}")
    return encoded["input_ids"], trained.astype(int).tolist()


PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def stop_token_ids(generation_config: GenerationConfig, tokenizer: Any, **template_args: Any) -> list[int]:
    """Every token that ends a completion: of the generation config, the tokenizer, and the template's end of turn."""
    listed, end = generation_config.eos_token_id, find_turns(tokenizer, PROBE, template_args)[2].strip()
    ids = tokenizer.convert_tokens_to_ids([end] if end else []) + (listed if isinstance(listed, list) else [listed])
    return sorted({i for i in (tokenizer.eos_token_id, *ids) if i is not None})


def check_tokenizer(tokenizer: Any, config: Any, generation_config: GenerationConfig) -> list[str]:
    """Lines on what begins and ends a sequence. Raises a UserError when tokenizer and model contradict each other."""
    model, bos, rows = tokenizer.name_or_path, tokenizer.bos_token, config.get_text_config().vocab_size
    stop_ids = stop_token_ids(generation_config, tokenizer)
    text, ((start, _),), end_of_turn = find_turns(tokenizer, PROBE, {})
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
    if not end_of_turn:
        warnings.append("the chat template ends no turn with a special token: turns train without a stop token")
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
