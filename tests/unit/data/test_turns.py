"""What is learned of conversations under ten chat templates, written in the manner of those of public models.

The parts that are learned are spelled out by hand; the tokens are those that the tokenizer itself makes.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletrain.data import turns
from scaletrain.data.formats import Chats, language_format
from scaletrain.data.turns import Learn
from scaletrain.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen25": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": [
        "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]", "</s>",
    ],
    "phi3": ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
    "deepseek": [
        "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>",
        "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>", "<｜end▁of▁sentence｜>",
    ],
    "zephyr": ["<s>", "</s>"],
    "glm": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
    "marked": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}  # fmt: skip
"""Of each template, the beginning first; the last one is the end of text."""


def tokenizer_of(template: str, special: list[str], padded: bool = True) -> Any:
    """A tokenizer of bytes with special tokens, whose padding is its end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    own = {"bos_token": special[0], "eos_token": special[-1], "additional_special_tokens": special[1:-1]}
    if padded:
        own["pad_token"] = special[-1]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **own)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_like(name: str) -> Any:
    return tokenizer_of((TEMPLATES / f"{name}.jinja").read_text(), SPECIAL[name])


def learned(fmt: Chats, **row: Any) -> list[str]:
    """Return the texts that are learned of a row, after the tokens are found to be the official ones."""
    values = [[row.get(column)] for column in fmt.columns]
    done = fmt.encode(values, ["row 0"])
    assert [list(ids) for ids in done.ids] == fmt.official(values, ["row 0"])
    assert done.marks is not None
    ids, marks = np.array(done.ids[0]), np.array(done.marks[0])
    cuts = np.flatnonzero(np.diff(marks, prepend=0, append=0)).reshape(-1, 2)
    return [fmt.tokenizer.decode(ids[a:b]) for a, b in cuts]


def chats(name: str, learn: Learn = "assistant", tools: bool = False, **options: Any) -> Chats:
    columns = ("messages", "tools") if tools else ("messages",)
    return Chats(tokenizer_like(name), learn, "chat", columns, options)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be <b>brief</b>."}
TWO = [user("One?"), said("First."), user("Two?"), said("<i>Second.</i>")]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "zwei – 2"}'}}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "3"}
CALLED = [user("Sum?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, said("It is 3.")]
ARGUMENTS = '{"a": 1, "b": "zwei – 2"}'


@pytest.mark.parametrize(
    ("name", "end", "system"),
    [
        ("llama3", "<|eot_id|>", True),
        ("qwen25", "<|im_end|>", True),
        ("gemma", "<end_of_turn>", False),
        ("phi3", "<|end|>", True),
        ("deepseek", "<｜end▁of▁sentence｜>", True),
        ("zephyr", "</s>", True),
        ("marked", "<|im_end|>", True),
    ],
)
def test_turns_of_plain_text(name: str, end: str, system: bool) -> None:
    messages = [SYSTEM, *TWO] if system else TWO
    first, second = f"First.{end}", f"<i>Second.</i>{end}"
    assert learned(chats(name), messages=messages) == [first, second]
    assert learned(chats(name, "last"), messages=messages) == [second]
    assert learned(chats(name), messages=[*messages, user("Three?")]) == [first, second]
    (whole,) = learned(chats(name, "all"), messages=messages)
    assert whole == chats(name).template.write(messages)
    assert learned(chats(name), messages=[*messages[:-1], said("")]) == [first]
    assert learned(chats(name), messages=[user("One?")]) == []


def test_mistral_writes_the_space_before_an_answer_itself_and_the_system_turn_only_to_ask() -> None:
    assert learned(chats("mistral"), messages=TWO) == [" First.</s>", " <i>Second.</i></s>"]
    assert learned(chats("mistral"), messages=[SYSTEM, *TWO]) == [" First.</s>", " <i>Second.</i></s>"]
    assert learned(chats("mistral", "last"), messages=[SYSTEM, *TWO[:2]]) == [" First.</s>"]


def test_glm_ends_a_turn_by_who_speaks_next() -> None:
    assert learned(chats("glm"), messages=[SYSTEM, *TWO]) == ["\nFirst.<|user|>", "\n<i>Second.</i>"]


def test_qwen3_thinks_in_the_last_turn_only() -> None:
    messages = [SYSTEM, user("One?"), said("First.", reasoning_content="Hm."), user("Two?"), said("Second.")]
    first = "First.<|im_end|>"
    assert learned(chats("qwen3"), messages=messages) == [first, "<think>\n\n</think>\n\nSecond.<|im_end|>"]
    assert learned(chats("qwen3", enable_thinking=False), messages=messages) == [first, "Second.<|im_end|>"]
    thought = [*messages[:4], said("Second.", reasoning_content="Well <then>.")]
    second = "<think>\nWell <then>.\n</think>\n\nSecond.<|im_end|>"
    assert learned(chats("qwen3"), messages=thought) == [first, second]
    inside = [user("One?"), said("<think>\nHm.\n</think>\n\nFirst."), user("Two?")]
    inside.append(said("<think>\nWell <then>.\n</think>\n\nSecond."))
    assert learned(chats("qwen3"), messages=inside) == [first, second]
    assert learned(chats("qwen3", "last"), messages=inside) == [second]


def test_deepseek_is_asked_for_thoughts_that_its_turns_do_not_keep() -> None:
    end = "<｜end▁of▁sentence｜>"
    messages = [user("One?"), said("<think>\nHm.\n</think>First."), user("Two?"), said("< Second")]
    assert learned(chats("deepseek"), messages=messages) == [f"First.{end}", f"< Second{end}"]


@pytest.mark.parametrize(
    ("name", "call", "answer"),
    [
        ("llama3", '{"name": "add", "parameters": ARGUMENTS}<|eot_id|>', "It is 3.<|eot_id|>"),
        (
            "qwen3",
            '<tool_call>\n{"name": "add", "arguments": ARGUMENTS}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nIt is 3.<|im_end|>",
        ),
        (
            "qwen25",
            '<tool_call>\n{"name": "add", "arguments": ARGUMENTS}\n</tool_call><|im_end|>',
            "It is 3.<|im_end|>",
        ),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "add", "arguments": ARGUMENTS, "id": "abcdefghi"}]</s>',
            " It is 3.</s>",
        ),
        (
            "deepseek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\nARGUMENTS\n```"
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
            "It is 3.<｜end▁of▁sentence｜>",
        ),
        ("glm", "\n\n<tool_call>add\nARGUMENTS\n</tool_call><|observation|>", "\nIt is 3."),
    ],
)
def test_calls_are_learned_and_their_results_are_not(name: str, call: str, answer: str) -> None:
    wanted = [call.replace("ARGUMENTS", ARGUMENTS), answer]
    fmt = chats(name, tools=True)
    assert learned(fmt, messages=CALLED, tools=TOOLS) == wanted
    assert learned(fmt, messages=CALLED) == wanted
    assert learned(chats(name, "last", tools=True), messages=CALLED, tools=TOOLS) == wanted[1:]
    assert learned(fmt, messages=[*CALLED, user("And?"), said("No.")])[-1].startswith(
        ("No.", " No.", "\nNo.", "<think>")
    )


def test_the_completion_of_a_conversation() -> None:
    columns = ("prompt", "completion")
    for name in ("qwen25", "marked"):
        row = {"prompt": [SYSTEM, *TWO, user("Three?")], "completion": [said("Third.")]}
        fmt = Chats(tokenizer_like(name), "completion", "chat_completion", columns)
        assert learned(fmt, **row) == ["Third.<|im_end|>"]
        fmt = Chats(tokenizer_like(name), "assistant", "chat_completion", columns)
        assert learned(fmt, **row) == ["First.<|im_end|>", "<i>Second.</i><|im_end|>", "Third.<|im_end|>"]


def test_a_conversation_that_the_assistant_begins() -> None:
    for name, end in (("qwen25", "<|im_end|>"), ("zephyr", "</s>"), ("phi3", "<|end|>")):
        assert learned(chats(name), messages=[said("Hello."), *TWO[:2]]) == [f"Hello.{end}", f"First.{end}"]


def test_a_template_that_counts_the_messages() -> None:
    fmt = chats("phi3")
    fmt.tokenizer.chat_template = "{{ messages | length }}" + fmt.tokenizer.chat_template
    assert learned(fmt, messages=TWO) == ["First.<|end|>", "<i>Second.</i><|end|>"]


def test_marks_that_leave_the_end_out_get_it() -> None:
    fmt = chats("marked")
    moved = "{% endgeneration %}{{ '<|im_end|>\\n' }}"
    template = fmt.tokenizer.chat_template.replace("+ '<|im_end|>\\n' }}{% endgeneration %}", "}}" + moved)
    assert template != fmt.tokenizer.chat_template
    fmt.tokenizer.chat_template = template
    assert learned(fmt, messages=TWO) == ["First.<|im_end|>", "<i>Second.</i><|im_end|>"]


def test_a_turn_that_cannot_be_told_apart() -> None:
    twice = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ messages[-1].content }}"
    fmt = Chats(tokenizer_of(twice, ["<s>", "</s>"]))
    with pytest.raises(UserError, match=r"row 0: what the assistant says in message 2 cannot be told apart"):
        fmt.encode([[TWO[:2]]], ["row 0"])


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma", [SYSTEM, *TWO], "System role not supported"),
        ("gemma", [user("One?"), user("Two?")], "Conversation roles must alternate"),
        ("mistral", [*CALLED[:1], said("", tool_calls=[{**CALL, "id": "1"}]), *CALLED[2:]], "Tool call IDs should be"),
        ("llama3", [user("Sum?"), said("", tool_calls=[CALL, CALL])], "only supports single tool-calls"),
    ],
)
def test_the_template_s_own_reason_is_shown(name: str, messages: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^x.jsonl line 7: the chat template refuses these messages: .*{reason}"):
        chats(name).encode([[messages]], ["x.jsonl line 7"])


def test_a_tokenizer_without_padding_or_a_template() -> None:
    tokenizer = tokenizer_of("", ["<s>", "</s>"], padded=False)
    tokenizer.chat_template = None
    fmt = language_format("chat", tokenizer)
    assert isinstance(fmt, Chats)
    assert learned(fmt, messages=TWO) == ["First.</s>", "<i>Second.</i></s>"]
    assert tokenizer.decode(fmt.prompt("One?")) == "<|im_start|>user\nOne?</s>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("marked", [False, True])
def test_the_date_is_the_same_on_every_day(marked: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Ours, and what the tokenizer itself makes of rows; who asks the tokenizer beside us is told today's."""
    written = (TEMPLATES / ("marked.jinja" if marked else "qwen25.jinja")).read_text()
    template = "{{ strftime_now('%d %b %Y') }}\n" + written
    own = language_format("chat", tokenizer_of(template, SPECIAL["qwen25"]))
    assert isinstance(own, Chats)
    row = {"messages": [user("Hi"), {"role": "assistant", "content": "Hello"}]}
    caplog.set_level("INFO")
    turns._say.cache_clear()
    for _ in range(2):
        assert learned(own, **row) == ["Hello<|im_end|>"]
    for options, day in [({}, "26 Jul 2024"), ({"strftime_now": "2031-12-01"}, "01 Dec 2031")]:
        fmt = Chats(own.tokenizer, "assistant", "chat", ("messages",), options)
        assert own.tokenizer.decode(fmt.encode([[row["messages"]]], ["row 0"]).ids[0]).startswith(day)
        assert own.tokenizer.decode(fmt.prompt("Hi")).startswith(day)
    assert caplog.text.count("it is always 2024-07-26") == 1
    today = datetime.now()
    assert own.tokenizer.apply_chat_template(row["messages"], tokenize=False)[:11] == today.strftime("%d %b %Y")


def test_a_day_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective.template_options.strftime_now: .*'soon'.* give a date"):
        language_format("chat", tokenizer_like("qwen25"), None, {"strftime_now": "soon"})


def test_a_template_of_its_own_for_tools_is_looked_at() -> None:
    """What is marked is told by the template that is written with."""
    marked = (TEMPLATES / "marked.jinja").read_text()
    plain = (TEMPLATES / "qwen25.jinja").read_text().replace("<|im_start|>user", "<|im_start|> user")
    row = {"messages": [user("Hi"), {"role": "assistant", "content": "Hello"}]}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    for default, tool_use in [(plain, marked), (marked, plain)]:
        fmt = Chats(tokenizer_of("", SPECIAL["marked"]), "assistant", "chat", ("messages", "tools"))
        fmt.tokenizer.chat_template = {"default": default, "tool_use": tool_use}
        assert learned(fmt, **row) == ["Hello<|im_end|>"]
        assert learned(fmt, **row, tools=tools) == ["Hello<|im_end|>"]


def test_several_templates_need_one_for_all_conversations() -> None:
    tokenizer = tokenizer_like("qwen25")
    tokenizer.chat_template = {"tool_use": tokenizer.chat_template, "rag": tokenizer.chat_template}
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\), and none is its `default`"):
        language_format("chat", tokenizer)
