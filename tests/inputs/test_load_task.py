"""Task files: every format, every set of keys, and each way to get a row wrong."""

from __future__ import annotations

import json
import sys

import pytest

from tacq_export.errors import TacqError
from tacq_export.inputs.load_task import Example, Task, load_task
from tacq_export.inputs.task_files import PlainText


def write(tmp_path, content: str | bytes, name: str = "task.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


USER_AND_ASSISTANT = ({"role": "user", "content": "what is 2 and 3"}, {"role": "assistant", "content": "it is 5"})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "what is 2 and 3", "answer": "it is 5"}, Example(messages=USER_AND_ASSISTANT)),
        ({"prompt": "what is 2 and 3", "completion": "it is 5", "id": 7}, Example(messages=USER_AND_ASSISTANT)),
        ({"messages": [*USER_AND_ASSISTANT]}, Example(messages=USER_AND_ASSISTANT)),
        (
            {"messages": [{"role": "system", "content": "", "weight": 0}]},
            Example(messages=({"role": "system", "content": "", "weight": 0},)),
        ),
        (
            {"instruction": "add", "input": "2 and 3", "output": "5"},
            Example(messages=({"role": "user", "content": "add\n\n2 and 3"}, {"role": "assistant", "content": "5"})),
        ),
        (
            {"instruction": "add 2 and 3", "input": "", "output": "5", "history": [["hi", "hello"]], "text": "whole"},
            Example(
                messages=(
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": "add 2 and 3"},
                    {"role": "assistant", "content": "5"},
                )
            ),
        ),
        (
            {"conversations": [{"from": "human", "value": "what is 2 and 3"}, {"from": "gpt", "value": "it is 5"}]},
            Example(messages=USER_AND_ASSISTANT),
        ),
        ({"conversations": [*USER_AND_ASSISTANT]}, Example(messages=USER_AND_ASSISTANT)),
        ({"prompt": [USER_AND_ASSISTANT[0]], "completion": [USER_AND_ASSISTANT[1]]}, Example(USER_AND_ASSISTANT)),
        ({"prompt": "p", "prompt_id": 1, "messages": [*USER_AND_ASSISTANT]}, Example(messages=USER_AND_ASSISTANT)),
        (
            {"system": "Be short.", "question": "what is 2 and 3", "answer": "it is 5"},
            Example(messages=({"role": "system", "content": "Be short."}, *USER_AND_ASSISTANT)),
        ),
        ({"text": " as it is\n"}, Example(text=" as it is\n")),
    ],
)
def test_every_set_of_keys(tmp_path, row, expected):
    task = load_task(write(tmp_path, json.dumps(row)))
    assert task == Task("task", [expected])


def test_blank_lines_bom_windows_ends_and_line_separators_inside_strings(tmp_path):
    content = '\ufeff{"text": "one\u2028still one"}\r\n\r\n   \n{"text": "two"}'
    assert [e.text for e in load_task(write(tmp_path, content)).examples] == ["one\u2028still one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson"])
def test_endings_that_mean_json(tmp_path, name):
    assert load_task(write(tmp_path, '{"text": "t"}', name)) == Task("a", [Example(text="t")])


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes"])
def test_other_files_are_plain_text(tmp_path, name):
    path = write(tmp_path, "one\ntwo {", name)
    task = load_task(path)
    assert task == Task("notes", [], PlainText(path)) and task.packed and task.text.head(5) == "one\nt"


GOOD = '{"text": "good"}\n'
BAD_LINES = {
    "not JSON": (
        "{text: 1}",
        "not valid JSON (Expecting property name enclosed in double quotes at column 2); each line must be one JSON "
        "object",
    ),
    "cut off": ('{"text": "a', "not valid JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "not valid JSON"),
    "a list": ("[1, 2]", "a JSON list, expected an object with"),
    "a number": ("7", "a JSON int, expected an object with"),
    "null": ("null", "a JSON NoneType, expected an object with"),
    "no answer": ('{"question": "q"}', '"answer" is missing, empty or no string; question and answer go together'),
    "no question": ('{"answer": "a"}', '"question" is missing, empty or no string'),
    "empty answer": ('{"question": "q", "answer": " "}', '"answer" is missing, empty or no string'),
    "answer is a number": ('{"question": "q", "answer": 5}', '"answer" is missing, empty or no string'),
    "no db_id": (
        '{"question": "q", "query": "SELECT 1"}',
        'neither a "schema" nor a "db_id" says which database is asked',
    ),
    "empty query": (
        '{"question": "q", "query": "", "db_id": "d"}',
        '"query" is missing, empty or no string; question and query go together',
    ),
    "empty schema": (
        '{"question": "q", "query": "SELECT 1", "schema": " "}',
        '"schema" is empty or no string; give the CREATE TABLE text',
    ),
    "no completion": (
        '{"prompt": "q"}',
        '"completion" is missing, empty or no string; prompt and completion go together',
    ),
    "messages empty": ('{"messages": []}', '"messages" is no list, or empty'),
    "messages is a string": ('{"messages": "hello"}', '"messages" is no list, or empty'),
    "message is a string": ('{"messages": ["hello"]}', 'message 1 lacks a string "role" or "content"'),
    "message without role": (
        '{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}',
        'message 2 lacks a string "role" or "content"',
    ),
    "content is null": (
        '{"messages": [{"role": "user", "content": null}]}',
        'message 1 lacks a string "role" or "content"',
    ),
    "an image": (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}',
        "message 1 has a part of the type 'image_url', expected parts of text",
    ),
    "a part that is a string": (
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        "message 1 has a part of the type 'str', expected parts of text",
    ),
    "the old function_call": (
        '{"messages": [{"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}}]}',
        'message 1 has a "function_call", the old form that chat templates do not know; write tool_calls',
    ),
    "the old functions": (
        '{"messages": [{"role": "user", "content": "a"}], "functions": [{"name": "f"}]}',
        '"functions" is the old form of "tools"',
    ),
    "tool calls without a name": (
        '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"type": "function"}]}]}',
        'message 1 has "tool_calls" that are no list of',
    ),
    "tools that are none": (
        '{"messages": [{"role": "user", "content": "a"}], "tools": "search"}',
        '"tools" is no list of {"type": "function"',
    ),
    "nobody speaks": (
        '{"conversations": [{"from": "narrator", "value": "a"}]}',
        "turn 1 is from 'narrator', expected one of: human, user, gpt",
    ),
    "a turn without value": (
        '{"conversations": [{"from": "human", "text": "a"}]}',
        'turn 1 of "conversations" lacks a string "from" or "value"',
    ),
    "no output": ('{"instruction": "a", "input": ""}', '"output" is missing, empty or no string'),
    "tokens that were edited": (
        '{"messages": [{"role": "assistant", "content": "a"}], "tokens": {"vocabulary": "v", "answer": ["a"]}}',
        '"tokens" is not as tacq-export answer writes it',
    ),
    "other keys": ('{"input": "a", "label": 1}', 'has the keys input, label, expected "question" and "answer"'),
    "no keys": ("{}", "has the keys none, expected"),
    "empty text": ('{"text": "  "}', "has the keys text, expected"),
    "nested too deep": ("[" * 100000, "not valid JSON"),
    "a number too long": ('{"text": ' + "1" * 5000 + "}", "not valid JSON"),
    "half a surrogate pair": ('{"text": "\\ud800 alone"}', "not valid"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_malformed_line_is_named_by_its_number(tmp_path, what):
    line, message = BAD_LINES[what]
    path = write(tmp_path, GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(TacqError) as error:
        load_task(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and message in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_files_are_refused(tmp_path, content, name):
    with pytest.raises(TacqError, match="is empty; put at least one example into it."):
        load_task(write(tmp_path, content, name))


def test_missing_files_folders_and_other_encodings_are_refused(tmp_path):
    with pytest.raises(
        TacqError, match=r"gone.jsonl cannot be read \(No such file or directory\); give a JSONL or text file."
    ):
        load_task(tmp_path / "gone.jsonl")
    with pytest.raises(TacqError, match=r"cannot be read \(Is a directory\)"):
        load_task(tmp_path)
    with pytest.raises(TacqError, match=r"is not UTF-8 text \(byte 2\); save it as UTF-8."):
        load_task(write(tmp_path, b"ab\xe9cd", "latin1.txt"))
    with pytest.raises(TacqError, match="is not UTF-8 text"):
        load_task(write(tmp_path, '{"text": "a"}'.encode("utf-16"), "utf16.jsonl"))


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def test_tools_and_tool_calls_are_kept_as_they_are(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Paris?"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Sunny."},
    ]
    rows = [{"messages": messages, "tools": TOOLS}, {"messages": json.dumps(messages), "tools": json.dumps(TOOLS)}]
    first, second = load_task(write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))).examples
    assert first == second == Example(tuple(messages), tools=tuple(TOOLS)) and first.has_answer


def test_share_gpt_calls_become_tool_calls(tmp_path):
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "Paris?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Sunny."},
    ]
    (example,) = load_task(write(tmp_path, json.dumps({"conversations": turns}))).examples
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    ]


def test_a_json_array_is_read_and_its_rows_are_numbered(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    for name in ("a.json", "a.jsonl"):
        assert [e.text for e in load_task(write(tmp_path, json.dumps(rows, indent=1), name)).examples] == ["one", "two"]
    assert load_task(write(tmp_path, json.dumps(rows[0], indent=1), "one.json")).examples == [Example(text="one")]
    with pytest.raises(TacqError, match="a.json, example 2: a JSON int, expected an object with"):
        load_task(write(tmp_path, '[{"text": "one"},\n 7]', "a.json"))
    with pytest.raises(TacqError, match=r"a.json, line 2: not valid JSON \(Expecting value at column 1\)"):
        load_task(write(tmp_path, '[{"text": "one"},\n]', "a.json"))
    with pytest.raises(TacqError, match="a.jsonl, line 1: a JSON list, expected an object with"):
        load_task(write(tmp_path, '[1]\n{"text": "one"}\n', "a.jsonl"))


def test_tables_are_read_by_the_columns_that_are_named(tmp_path):
    content = 'Q,A,n\n"what is\n2, 3",it is 5,1\n"say ""no""",no,2\n'
    expected = [("what is\n2, 3", "it is 5"), ('say "no"', "no")]
    columns = {"prompt": "Q", "completion": "A"}
    tsv = "Q\tA\n" + "\n".join('"{}"\t{}'.format(q.replace('"', '""'), a) for q, a in expected)
    for path in (write(tmp_path, content, "t.csv"), write(tmp_path, tsv, "t.tsv")):
        found = [(e.messages[0]["content"], e.messages[1]["content"]) for e in load_task(path, columns).examples]
        assert found == expected
    assert load_task(write(tmp_path, '{"Q": "q", "A": "a"}'), columns).examples[0].messages[1]["content"] == "a"
    assert load_task(write(tmp_path, "question,answer,id\nq,a,7\n", "t.csv")).unused == ["id"]
    with pytest.raises(TacqError, match="t.csv, line 2: has no column 'Q', which --columns names; it has question, "):
        load_task(write(tmp_path, "question,answer\nq,a\n", "t.csv"), columns)
    with pytest.raises(TacqError, match="notes.txt is plain text and has no columns; leave --columns out"):
        load_task(write(tmp_path, "plain", "notes.txt"), columns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer\nq,a\nq,a,more\n", "t.csv, line 3: has 3 fields, and the header 2"),
        ("question,answer\nq\n", "t.csv, line 2: has 1 fields, and the header 2"),
        ("a,a\n1,2\n", "t.csv has two columns of the name 'a'"),
        ('question,answer\n"q,a\n', "t.csv, line 2: no row of a table"),
        ("question,answer\n", "t.csv is empty; put at least one example into it."),
        ("", "t.csv is empty"),
    ],
)
def test_a_malformed_table_is_named_by_its_line(tmp_path, content, message):
    with pytest.raises(TacqError, match=message):
        load_task(write(tmp_path, content, "t.csv"))


def test_parquet_is_read_with_pyarrow(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"Q": f"q{i}", "chat": [{"role": "user", "content": f"c{i}", "tool_calls": None}]} for i in range(200)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = load_task(tmp_path / "t.parquet", {"messages": "chat"}).examples
    assert len(found) == 200 and found[199].messages[0]["content"] == "c199"
    assert len(load_task(tmp_path / "t.parquet", {"messages": "chat"}, 3).examples) == 3
    with pytest.raises(TacqError, match="t.parquet, row 1: has no column 'A', which --columns names; it has Q, chat"):
        load_task(tmp_path / "t.parquet", {"prompt": "Q", "completion": "A"})
    with pytest.raises(TacqError, match="broken.parquet cannot be read as Parquet"):
        load_task(write(tmp_path, "PAR1 no", "broken.parquet"))


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TacqError, match="t.parquet needs pyarrow to be read, .*; run 'pip install pyarrow', or save"):
        load_task(write(tmp_path, "", "t.parquet"))


def test_only_the_rows_and_the_text_that_are_needed_are_read(tmp_path):
    rows = "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(5))
    assert [e.text for e in load_task(write(tmp_path, rows + "{broken"), limit=2).examples] == ["t0", "t1"]
    path = write(tmp_path, b"word " * 100_000 + b"\xff", "big.txt")
    assert load_task(path).text.head(9) == "word word"
    with pytest.raises(TacqError, match=r"big.txt is not UTF-8 text \(byte 500000\); save it as UTF-8."):
        load_task(path).text.head(None)
