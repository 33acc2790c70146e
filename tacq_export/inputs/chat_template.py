"""A conversation as the text that the model sees: the GGUF's own chat template, filled in as llama.cpp does it.

The template is a jinja program of the model's author. It is run with the environment that transformers gives it, and
with the variables that llama.cpp's server and programs set: `bos_token`, `eos_token`, thinking on and kept in old turns
(where the template leaves that open), `date_string` and `datetime`. What the time is comes from TODAY, so that two
exports of one task give the same bytes.

Templates differ in what they take, so each is tried once with small conversations, as llama.cpp does
(common/jinja/caps.cpp), and what it does not take is put into a form that it does:

- content is a string or a list of text parts, whichever it prints; parts are joined by newlines;
- the arguments of a tool call are an object or JSON text, whichever it prints;
- a template that refuses or drops the system role gets the system's text before the first user turn;
- `content: null` becomes "" where the template would print "None" or fail.

Nothing is left out without a word: a template that drops a turn, the tools or the tool calls is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from ..errors import TacqError

# What `strftime_now` says: the day that Llama 3's templates have where they have no clock.
TODAY = datetime(2024, 7, 26)
Message = dict[str, Any]

# llama.cpp's defaults: common/chat.h, caps_apply_preserve_reasoning.
_THINKING = {
    "enable_thinking": True,
    "preserve_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
    "drop_thinking": False,
}
_TEXT, _OTHER = "STRING_MARKER", "OTHER_MARKER"
_TOOL = {
    "type": "function",
    "function": {
        "name": "tool1",
        "description": "Tool description",
        "parameters": {
            "type": "object",
            "properties": {"argument1": {"type": "string", "description": "Argument description"}},
            "required": ["argument1"],
        },
    },
}


class ChatTemplate:
    """One chat template, ready to be filled in.

    source: the jinja program. bos_token, eos_token: texts of those tokens, "" if the vocabulary has none. say: gets a
    line, once, when conversations are changed to suit the template.
    """

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "", say: Callable[[str], None] = lambda text: None
    ):
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._say = say
        self._said: set[str] = set()

    @cached_property
    def _template(self) -> Any:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            # transformers keeps the environment for others who fill in this template: theirs stays as it is.
            environment = _compile_jinja_template(self.source).environment.overlay()
            environment.globals = {**environment.globals, "strftime_now": TODAY.strftime}
            # There is no HTML here: text that is marked as safe would turn the quotes of what is added to it to &#34;.
            environment.filters = {**environment.filters, "safe": lambda text: text}
            return environment.from_string(self.source)
        except Exception as error:
            raise TacqError(
                f"The model's chat template cannot be read ({_one_line(error)}); use a text task."
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), ask: bool = False) -> str:
        """The text of a conversation. ask: followed by the beginning of the assistant's next turn.

        Raises TacqError, in one sentence, if the template refuses the conversation or leaves a part of it out.
        """
        suited = [self._suited(number, dict(message)) for number, message in enumerate(messages, 1)]
        if not self._takes_system:
            suited = self._system_before_user(suited)
        text, suited = self._filled(suited, tools, ask)
        self._check_complete(text, suited, tools, ask)
        return text

    def _fill(self, messages: Sequence[Message], tools: Sequence[Any] = (), ask: bool = False) -> str:
        variables = {
            "messages": [dict(message) for message in messages],
            "documents": None,
            "add_generation_prompt": ask,
            "date_string": TODAY.strftime("%d %b %Y"),
            "datetime": TODAY.strftime("%b %d %Y"),
            **_THINKING,
            **self._tokens,
        }
        if tools:
            return self._template.render(variables, tools=list(tools))
        try:
            return self._template.render(variables, tools=None)  # as transformers calls it
        except TypeError:  # it goes through the list without a look whether there is one
            return self._template.render(variables)

    def _attempt(self, *messages: Message, tools: Sequence[Any] = (), ask: bool = False) -> str | None:
        """What the template makes of a conversation, None if it refuses."""
        try:
            return self._fill(messages, tools, ask)
        except Exception:
            return None

    def _filled(self, messages: list[Message], tools: Sequence[Any], ask: bool) -> tuple[str, list[Message]]:
        """The text, and the messages that it is of: with "" for no content where that does better."""
        empty = [m | {"content": ""} if m.get("content") is None else m for m in messages]
        try:
            text = self._fill(messages, tools, ask)
        except TacqError:
            raise
        except Exception as error:  # a program of the model's author may raise anything
            if empty != messages and (other := self._attempt(*empty, tools=tools, ask=ask)) is not None:
                return other, empty
            raise TacqError(
                f"the model's chat template refuses it ({_one_line(error)}); use roles and turns that it knows"
            ) from None
        if empty != messages:
            other = self._attempt(*empty, tools=tools, ask=ask)
            if other is not None and other.count("None") < text.count("None"):
                return other, empty
        return text, messages

    # What the template takes

    @cached_property
    def _content_forms(self) -> tuple[bool, bool]:
        """(it prints a string, it prints a list of text parts)."""
        plain = self._attempt({"role": "user", "content": _TEXT})
        parts = self._attempt({"role": "user", "content": [{"type": "text", "text": _TEXT}]})
        string = plain is not None and _TEXT in plain
        typed = parts is not None and _TEXT in parts and (parts == plain or not string)
        return string or not typed, typed

    @cached_property
    def _takes_system(self) -> bool:
        user = {"role": "user", "content": self._content(_OTHER)}
        if self._attempt(user) is None:
            return True  # nothing can be told
        text = self._attempt({"role": "system", "content": self._content(_TEXT)}, user)
        return text is not None and _TEXT in text

    @cached_property
    def _arguments_form(self) -> type | None:
        """dict or str: how it prints the arguments of a tool call; None if it prints none."""
        for arguments in ({_TEXT: _OTHER}, json.dumps({_TEXT: _OTHER})):
            call = {"id": "call00001", "type": "function", "function": {"name": "tool1", "arguments": arguments}}
            text = self._attempt(
                {"role": "user", "content": self._content("User message")},
                {"role": "assistant", "content": self._content(""), "tool_calls": [call]},
                {"role": "tool", "content": self._content("Tool response"), "tool_call_id": "call00001"},
                {"role": "assistant", "content": self._content("The tool response was 'tool response'")},
                {"role": "user", "content": self._content("User message")},
                tools=[_TOOL],
            )
            # An object that is printed as Python writes it is no JSON, and nothing a model has seen.
            if text is not None and _OTHER in text and f"'{_TEXT}': '{_OTHER}'" not in text:
                return type(arguments)
        return None

    # Conversations put into its form

    def _content(self, content: Any) -> Any:
        string, typed = self._content_forms
        if isinstance(content, str) and not string:
            return [{"type": "text", "text": content}]
        if isinstance(content, list) and not typed:
            return "\n".join(part["text"] for part in content)
        return content

    def _suited(self, number: int, message: Message) -> Message:
        """A message as the template takes it."""
        # null is what a table has in a column that a row does not use.
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
        if "content" in message:
            message["content"] = self._content(message["content"])
        if message["role"] == "developer" and "<|channel|>" not in self.source:  # gpt-oss alone has that role
            message["role"] = "system"
        reasoning = next((message[k] for k in ("reasoning_content", "thinking", "reasoning") if k in message), None)
        if reasoning is not None:  # one thing, and each template has its own name for it
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        if message.get("tool_calls"):
            message["tool_calls"] = [self._call(number, call) for call in message["tool_calls"]]
        return message

    def _call(self, number: int, call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return call | {"function": self._call(number, call["function"])}
        arguments = call.get("arguments")
        if self._arguments_form is dict and isinstance(arguments, str):
            try:
                return call | {"arguments": json.loads(arguments) if arguments.strip() else {}}
            except ValueError:
                raise TacqError(
                    f"a tool call of message {number} has arguments that are no JSON ({arguments[:80]!r}); correct them"
                ) from None
        if self._arguments_form is str and arguments is not None and not isinstance(arguments, str):
            return call | {"arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    def _system_before_user(self, messages: list[Message]) -> list[Message]:
        """The system's text at the head of the first user turn, and a newline between, as llama.cpp does it."""
        system = [i for i, message in enumerate(messages) if message["role"] == "system"]
        if not system or system[0] != 0:
            return messages
        user = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if user is None:
            raise TacqError("the model's chat template takes no system turn, and there is no user turn for its text")
        self._say_once("The model's chat template takes no system turn: its text goes before the first user turn.")
        parts = [_parts(messages[i].get("content")) for i in (0, user)]
        text = "\n".join(part for part in parts[0] + parts[1] if part)
        merged = messages[user] | {"content": self._content(text)}
        return [*messages[1:user], merged, *messages[user + 1 :]]

    # Nothing may be left out

    def _check_complete(self, text: str, messages: list[Message], tools: Sequence[Any], ask: bool) -> None:
        if tools and self._attempt(*messages, ask=ask) == text:
            raise TacqError(
                "the model's chat template leaves out the tools; use a model whose template has them, or rows without "
                "tools"
            )
        bare = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        called = any(message.get("tool_calls") for message in messages)
        if called and self._attempt(*bare, tools=tools, ask=ask) == text:
            raise TacqError(
                "the model's chat template leaves out the tool calls; use a model whose template has them, or rows "
                "without"
            )
        for i, message in enumerate(messages):
            said = [part for part in _parts(message.get("content")) if part.strip()]
            if all(part.strip() in text for part in said):
                continue
            # It may have changed the text (trimmed lines, thinking cut out of it): that shows if another one changes
            # what is printed.
            other = message | {"content": self._content(_OTHER)}
            if self._attempt(*messages[:i], other, *messages[i + 1 :], tools=tools, ask=ask) == text:
                raise TacqError(
                    f"the model's chat template leaves out message {i + 1} (role '{message['role']}'); use roles that "
                    "it knows"
                )
            if i == len(messages) - 1 and message["role"] == "assistant":
                self._say_once(
                    "The model's chat template changes the assistant's last turn, or cuts thinking out of it; answers "
                    "that 'tacq-export answer' wrote are taken token by token instead."
                )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def _parts(content: Any) -> list[str]:
    """The texts of a message's content."""
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [content] if isinstance(content, str) else []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
