"""Renders the templates in golden/chat/*.jinja with transformers' apply_chat_template.

Every template is rendered over the same conversations; what a template refuses is recorded as such.
Writes golden/chat/NAME.json beside each. Needs transformers 5 and jinja2.

    python tests/make_chat_golden.py [DIRECTORY]
"""

import json
import pathlib
import sys

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather <b>& more</b> for a \"place\"",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Město, 市 or cité"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "days": {"type": ["integer", "null"], "minimum": 1, "maximum": 1e20},
            },
            "required": ["place"],
        },
        "return": {"type": "number"},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def system(content):
    return {"role": "system", "content": content}


def call(name, arguments, **fields):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


TURN = [user("What is 2+2?"), assistant(" 4. \n"), user("  And <3 'times' \"it\"? \n")]
DOCUMENTS = [
    {"title": "Cats", "text": "Cats purr.\nLoudly.", "doc_id": 7},
    {"title": "Kočky", "text": "Kočky \"předou\".", "metadata": {"a": None, "b": [1, 2.5, True]}},
]
ARGUMENTS = {"place": "Brno & okolí", "days": 3, "exact": True, "ratio": 0.5, "list": ["a", 1], "none": None}
ANSWERED = [
    user("Weather in Brno?"),
    assistant("", tool_calls=[call("weather", ARGUMENTS, id="call_1"), call("clock", {}, id="call_2")]),
    {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": '{"t": 21.5}'},
    {"role": "tool", "name": "clock", "tool_call_id": "call_2", "content": "12:00"},
]

CHATS = {
    "one turn": {"messages": [user("Hi!")]},
    "prompted": {"messages": [user("Hi!")], "add_generation_prompt": True},
    "system": {"messages": [system("You are <terse>."), *TURN], "add_generation_prompt": True},
    "turns": {"messages": TURN, "add_generation_prompt": True},
    "ends with the assistant": {"messages": TURN[:2]},
    "null content": {"messages": [user("Hi"), assistant(None, tool_calls=[call("clock", {})])]},
    "parts": {"messages": [user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])], "add_generation_prompt": True},
    "tools": {"messages": [user("Weather?")], "tools": [WEATHER, CLOCK], "add_generation_prompt": True},
    "tools and system": {"messages": [system("Be brief."), user("Weather?")], "tools": [WEATHER], "add_generation_prompt": True},
    "no tools": {"messages": [user("Hi")], "tools": [], "add_generation_prompt": True},
    "calls": {"messages": ANSWERED, "tools": [WEATHER, CLOCK], "add_generation_prompt": True},
    "answered calls": {
        "messages": [*ANSWERED, assistant("21.5 °C at noon."), user("Thanks!")],
        "tools": [WEATHER, CLOCK],
        "add_generation_prompt": True,
    },
    "calls as text": {
        "messages": [user("Now?"), assistant("Wait.", tool_calls=[call("clock", '{"zone": "CET"}')])],
        "tools": [CLOCK],
    },
    "documents": {"messages": TURN, "documents": DOCUMENTS, "add_generation_prompt": True},
    "documents, tools and system": {
        "messages": [system("Cite."), *TURN],
        "documents": DOCUMENTS,
        "tools": [CLOCK],
        "add_generation_prompt": True,
    },
    "thinking inline": {
        "messages": [user("2+2?"), assistant("<think>\nSum.\n</think>\n\n4"), user("3+3?")],
        "add_generation_prompt": True,
    },
    "thinking apart": {
        "messages": [user("2+2?"), assistant("4", reasoning_content="Sum."), user("3+3?"), assistant("6", thinking="Again.")],
    },
    "thinking off": {"messages": [user("2+2?")], "add_generation_prompt": True, "extra": {"enable_thinking": False}},
    "thinking on": {"messages": [system("/think"), user("2+2?")], "add_generation_prompt": True, "extra": {"enable_thinking": True}},
    "thinking by word": {"messages": [user("2+2? /no_think")], "add_generation_prompt": True, "extra": {"thinking": True, "reasoning_effort": "low"}},
    "two users": {"messages": [user("a"), user("b")], "add_generation_prompt": True},
    "unknown role": {"messages": [{"role": "critic", "content": "Hm."}]},
    "no content": {"messages": [{"role": "user"}]},
    "extra fields": {"messages": [{"role": "user", "content": "Hi", "name": "Eva", "score": 1e-7}], "extra": {"note": "x", "controls": {"length": "short"}}},
}

tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")),
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    pad_token="</s>",
)


def render(template, chat):
    chat = dict(chat)
    messages, extra = chat.pop("messages"), chat.pop("extra", {})
    try:
        return {"text": tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **chat, **extra)}
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
        return {"error": str(error)}


def main():
    directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "golden/chat")
    for path in sorted(directory.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        cases = {name: {**chat, **render(template, chat)} for name, chat in CHATS.items()}
        golden = json.dumps({"special_tokens": tokenizer.special_tokens_map, "cases": cases}, ensure_ascii=False, indent=1)
        path.with_suffix(".json").write_text(golden + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
