"""Chat templates: those that llama.cpp ships, and each way in which a template could leave something out.

test_tokenizer.py compares some of them with what llama-server makes of them."""

from __future__ import annotations

import pytest

from tacq_export.errors import TacqError
from tacq_export.inputs.chat_template import ChatTemplate
from tacq_export.runtime.source import source_tree

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be short."}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(arguments) -> dict:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


@pytest.fixture(scope="module")
def shipped(runtime):
    """shipped(name): one of the templates in the pinned llama.cpp."""
    folder = source_tree(print) / "models" / "templates"
    return lambda name: ChatTemplate((folder / f"{name}.jinja").read_text(), "<s>", "</s>")


def refused(message: str, template: ChatTemplate, *args, **options) -> None:
    with pytest.raises(TacqError, match=message) as error:
        template.render(*args, **options)
    assert "\n" not in str(error.value)


def test_a_clock_says_the_same_day_whenever_it_is_asked(shipped):
    text = shipped("meta-llama-Llama-3.2-3B-Instruct").render([USER])
    assert "Today Date: 26 Jul 2024" in text
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}").render([USER]) == "2024-07-26 Hi"
    assert (
        ChatTemplate("{{ date_string }}, {{ datetime }}{{ messages[0].content }}")
        .render([USER])
        .startswith("26 Jul 2024, Jul 26 2024")
    )


def test_transformers_keeps_its_own_clock():
    """Its environment for a template is shared by whoever renders with it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    assert ChatTemplate(source).render([USER]) == "2024Hi"
    assert render_jinja_template([[USER]], chat_template=source)[0] != ["2024Hi"]


def test_a_system_turn_that_is_refused_goes_before_the_first_user_turn(shipped):
    lines: list[str] = []
    gemma = shipped("google-gemma-2-2b-it")
    gemma._say = lines.append
    text = gemma.render([SYSTEM, USER, ASSISTANT])
    assert text.startswith("<s><start_of_turn>user\nBe short.\nHi<end_of_turn>\n<start_of_turn>model\nHello.")
    assert gemma.render([SYSTEM, USER, ASSISTANT], ask=True) and len(lines) == 1, "said once"
    refused("takes no system turn, and there is no user turn for its text", gemma, [SYSTEM])
    assert shipped("Qwen-Qwen2.5-7B-Instruct").render([SYSTEM, USER]).startswith("<|im_start|>system\nBe short.<|im_")


def test_a_system_turn_that_is_dropped_goes_there_too():
    dropping = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    assert ChatTemplate(dropping).render([SYSTEM, USER]) == "<user>Be short.\nHi"


def test_parts_of_text_are_given_as_the_template_takes_them():
    parts = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    assert ChatTemplate(CHAT).render([parts]) == "<user>one\ntwo\n", "no list as Python prints it"
    typed = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert ChatTemplate(typed).render([parts, USER]) == "[one][two][Hi]", "and a string as a part"
    both = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(both).render([parts, USER]) == "onetwoHi"


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("Qwen-Qwen3-0.6B", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'),
        ("meetkai-functionary-medium-v3.1", '<function=weather>{"city": "Paris"}</function>'),
        ("deepseek-ai-DeepSeek-V3.2", '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>'),
    ],
)
def test_tool_calls_are_written_as_the_model_knows_them(shipped, name, printed, arguments):
    """Arguments as an object or as JSON text give the same; content null is no word "None"."""
    answer = {"role": "tool", "content": "sunny", "tool_call_id": "call00001"}
    text = shipped(name).render([USER, call(arguments), answer], TOOLS, ask=True)
    assert printed in text and "None" not in text and "sunny" in text and "Of a city." in text


def test_arguments_go_as_text_into_a_template_that_only_prints_text():
    source = CHAT.replace(
        "\n", "{% for t in m.tool_calls or [] %}{{ t.function.name + ':' + t.function.arguments }}{% endfor %}\n"
    )
    source += "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    text = ChatTemplate(source).render([USER, call({"city": "Köln"})], TOOLS)
    assert 'weather:{"city": "Köln"}' in text and "None" not in text
    refused(
        "a tool call of message 2 has arguments that are no JSON .'Paris'.; correct them",
        ChatTemplate(source.replace("t.function.arguments", "t.function.arguments | tojson")),
        [USER, call("Paris")],
        TOOLS,
    )


def test_what_a_template_would_leave_out_is_refused(shipped):
    r1 = shipped("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B")
    refused("the model's chat template leaves out the tools", r1, [USER, ASSISTANT], TOOLS)
    refused("the model's chat template leaves out the tool calls", ChatTemplate(CHAT), [USER, call("{}"), USER])
    assert ChatTemplate(CHAT).render([USER, ASSISTANT | {"tool_calls": []}]) == "<user>Hi\n<assistant>Hello.\n"
    two = "{% for m in messages if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tool = {"role": "tool", "content": "sunny"}
    refused(
        r"leaves out message 2 \(role 'tool'\); use roles that it knows", ChatTemplate(two), [USER, tool, ASSISTANT]
    )


def test_thinking_in_old_turns_is_cut_by_the_template_alone(shipped):
    """Of a turn whose text changes what is printed, a part may go: the last turn's is said, not refused."""
    thought = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nHello."}
    r1, lines = shipped("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"), []
    r1._say = lines.append
    assert "Easy" not in r1.render([USER, thought, USER]) and not lines
    assert "Easy" not in r1.render([USER, thought]) and "cuts thinking out of it" in lines[0]


def test_reasoning_has_the_name_that_the_template_reads(shipped):
    for key in ("reasoning_content", "thinking", "reasoning"):
        thought = ASSISTANT | {key: "Easy."}
        assert "<think>\nEasy.\n</think>" in shipped("Qwen-Qwen3-0.6B").render([USER, thought])
        assert "<|channel|>analysis<|message|>Easy." in shipped("openai-gpt-oss-120b").render([USER, thought])


def test_other_keys_of_a_message_are_handed_to_the_template():
    source = "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
    assert ChatTemplate(source).render([USER | {"name": "Ann", "weight": None}]) == "Ann: Hi"


def test_developer_is_the_system_but_for_gpt_oss(shipped):
    turns = [{"role": "developer", "content": "Be short."}, USER]
    assert ChatTemplate(CHAT).render(turns) == "<system>Be short.\n<user>Hi\n"
    assert "# Instructions\n\nBe short." in shipped("openai-gpt-oss-120b").render(turns)


def test_a_template_that_raises_or_is_no_jinja_is_one_sentence():
    source = (
        "{% if messages|length > 1 %}{{ raise_exception('Roles\nmust alternate') }}{% endif %}{{ messages[0].content }}"
    )
    refused(
        r"the model's chat template refuses it \(Roles must alternate\); use roles and turns that it knows",
        ChatTemplate(source),
        [USER, ASSISTANT],
    )
    refused(r"The model's chat template cannot be read \(unexpected 'end of template'", ChatTemplate("{% if"), [USER])


def test_a_turn_without_text_is_not_the_word_none():
    assert ChatTemplate(CHAT).render([USER, ASSISTANT | {"content": None, "reasoning_content": "x"}]) == (
        "<user>Hi\n<assistant>\n"
    )
