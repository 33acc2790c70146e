"""Task files: every set of keys, how they become tokens, and each way to get a line wrong."""

from __future__ import annotations

import json

import pytest

from tacq_export.errors import TacqError
from tacq_export.inputs.load_task import (
    Example,
    Task,
    compact_schema,
    gguf_tokenizer,
    load_task,
    prompt_tokens,
    render_example,
    tidy_query,
    tokenize_answers,
    tokenize_task,
)


class Words:
    """A tokenizer that can be followed by hand: a token is a word, BOS is 1."""

    def __init__(self, template: str | None = "yes"):
        self.chat_template = template
        self.ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        return {
            "input_ids": [1] * add_special_tokens
            + [self.ids.setdefault(word, 10 + len(self.ids)) for word in text.split()]
        }

    def words(self, tokens: list[int]) -> list[str]:
        names = {i: w for w, i in self.ids.items()} | {1: "BOS"}
        return [names[t] for t in tokens]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        assert tokenize is False
        if any(m["role"] == "nobody" for m in messages):
            raise ValueError("Conversation roles must alternate")
        return (
            "BOS-of-template "
            + " ".join(f"<{m['role']}> {m['content']}" for m in messages)
            + " <assistant>" * add_generation_prompt
        )


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
            Example(messages=({"role": "system", "content": ""},)),
        ),
        ({"text": " as it is\n"}, Example(text=" as it is\n")),
    ],
)
def test_every_set_of_keys(tmp_path, row, expected):
    task = load_task(write(tmp_path, json.dumps(row)))
    assert task == Task("task", [expected], packed=False)


def test_blank_lines_bom_windows_ends_and_line_separators_inside_strings(tmp_path):
    content = '\ufeff{"text": "one\u2028still one"}\r\n\r\n   \n{"text": "two"}'
    assert [e.text for e in load_task(write(tmp_path, content)).examples] == ["one\u2028still one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.ndjson"])
def test_endings_that_mean_json(tmp_path, name):
    assert load_task(write(tmp_path, '{"text": "t"}', name)) == Task("a", [Example(text="t")], packed=False)


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes"])
def test_other_files_are_plain_text(tmp_path, name):
    assert load_task(write(tmp_path, "one\ntwo {", name)) == Task("notes", [Example(text="one\ntwo {")], packed=True)


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


def test_conversations_go_through_the_template_and_get_no_second_bos():
    words = Words()
    task = Task("t", [Example(messages=USER_AND_ASSISTANT)], packed=False)
    assert words.words(tokenize_task(task, words, 5, 100)[0]) == [
        "BOS-of-template",
        "<user>",
        "what",
        "is",
        "2",
        "and",
        "3",
        "<assistant>",
        "it",
        "is",
        "5",
    ]


def test_without_a_template_turns_are_joined_by_newlines_and_bos_is_added():
    words = Words(template=None)
    example = Example(messages=USER_AND_ASSISTANT)
    assert render_example(example, words) == "what is 2 and 3\nit is 5"
    assert words.words(tokenize_task(Task("t", [example], False), words, 5, 100)[0]) == [
        "BOS",
        "what",
        "is",
        "2",
        "and",
        "3",
        "it",
        "is",
        "5",
    ]


def test_text_examples_are_taken_as_they_are_also_with_a_template():
    words = Words()
    assert words.words(tokenize_task(Task("t", [Example(text="a b c")], False), words, 5, 100)[0]) == [
        "BOS",
        "a",
        "b",
        "c",
    ]


def test_a_template_that_raises_is_one_sentence():
    task = Task("t", [Example(messages=({"role": "nobody", "content": "x"},))], False)
    with pytest.raises(
        TacqError,
        match=r"The model's chat template refuses an example \(Conversation roles must alternate\); use roles it knows",
    ):
        tokenize_task(task, Words(), 5, 100)


def test_the_first_n_examples_are_taken_and_cut():
    words = Words()
    task = Task("t", [Example(text=f"{i} b c d e f") for i in range(6)], False)
    found = tokenize_task(task, words, 3, 4)
    assert [words.words(t) for t in found] == [["BOS", str(i), "b", "c"] for i in range(3)]


def test_examples_of_one_token_are_left_out_and_none_at_all_is_refused():
    words = Words(template=None)
    short, long = Example(messages=({"role": "user", "content": ""},)), Example(text="a b")
    assert len(tokenize_task(Task("t", [short, long], False), words, 5, 100)) == 1
    with pytest.raises(TacqError, match="The task 't' has no example of at least two tokens; give longer ones."):
        tokenize_task(Task("t", [short, short], False), words, 5, 100)


@pytest.mark.parametrize(
    ("template", "asked"),
    [("yes", "BOS-of-template <user> what is 2 and 3 <assistant>"), (None, "BOS what is 2 and 3")],
)
def test_an_answer_begins_behind_what_the_model_is_asked(template, asked):
    words = Words(template)
    task = Task("t", [Example(messages=USER_AND_ASSISTANT)] * 2, packed=False)
    texts, begins = tokenize_answers(task, words, 5, 100)
    assert texts == tokenize_task(task, words, 5, 100) and len(begins) == 2
    assert words.words(texts[0][: begins[0]]) == asked.split() and words.words(texts[0][begins[0] :]) == [
        "it",
        "is",
        "5",
    ]


def test_an_answer_that_seq_len_cuts_off_is_left_out():
    words = Words()
    short = Example(messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "it is 5"}))
    task = Task("t", [Example(messages=USER_AND_ASSISTANT), short], packed=False)
    texts, begins = tokenize_answers(task, words, 5, 6)
    assert [words.words(t) for t in texts] == [
        ["BOS-of-template", "<user>", "hi", "<assistant>", "it", "is"]
    ] and begins == [4]
    with pytest.raises(TacqError, match="No answer of the task 't' begins within 4 tokens; give a larger --seq-len."):
        tokenize_answers(task, words, 5, 4)


@pytest.mark.parametrize(
    "task",
    [
        Task("t", [Example(text="a b c")], False),
        Task("t", [Example(text="a b c")], True),
        Task("t", [Example(messages=USER_AND_ASSISTANT[:1])], False),
    ],
    ids=["text", "plain text", "no answer"],
)
def test_examples_without_an_answer_are_named(task):
    with pytest.raises(
        TacqError, match="Example 1 of the task 't' has no assistant's turn at its end; use --loss text."
    ):
        tokenize_answers(task, Words(), 5, 100)


def test_plain_text_is_cut_into_consecutive_windows():
    words = Words()
    task = Task("t", [Example(text=" ".join(f"w{i}" for i in range(22)))], packed=True)
    windows = [words.words(t) for t in tokenize_task(task, words, 100, 8)]
    everything = ["BOS"] + [f"w{i}" for i in range(22)]
    assert windows == [everything[0:8], everything[8:16], everything[16:23]]
    assert len(tokenize_task(task, words, 2, 8)) == 2
    exact = Task(
        "t", [Example(text=" ".join("w" for _ in range(16)))], packed=True
    )  # 17 tokens: the last window has one only
    assert [len(t) for t in tokenize_task(exact, words, 100, 8)] == [8, 8]


SCHEMA = (
    'CREATE TABLE "pet shop" (\n  "ID" NUMERIC,\n  "name" TEXT,\n  PRIMARY KEY ("ID")\n);\nCREATE TABLE "pet" '
    '(\n  "order" TEXT\n);\n'
)


def test_text_to_sql_rows_bring_their_schema_into_the_prompt(tmp_path):
    (tmp_path / "schemas.json").write_text(
        json.dumps({"shop": 'CREATE TABLE "pet" (\n  "ID" NUMERIC,\n  "name" TEXT\n);\n'})
    )
    row = {"db_id": "shop", "question": "Which pets are there? ", "query": "SELECT name ,  ID FROM pet"}
    own = {"question": "How many?", "query": "SELECT count(*) FROM t", "schema": "CREATE TABLE t (a)"}
    first, second = load_task(write(tmp_path, json.dumps(row) + "\n" + json.dumps(own))).examples
    assert [m["role"] for m in first.messages] == ["user", "assistant"]
    assert first.messages[0]["content"] == (
        "CREATE TABLE pet (ID NUMERIC, name TEXT);\n\nQuestion: Which pets are there?\nAnswer with one SQLite query "
        "in a ```sql block, nothing else."
    )
    assert first.messages[1]["content"] == "```sql\nSELECT name, ID FROM pet\n```"
    assert second.messages[0]["content"].startswith("CREATE TABLE t (a)\n\nQuestion: How many?\n")


def test_a_database_without_a_schema_is_one_sentence(tmp_path):
    path = write(tmp_path, '{"db_id": "shop", "question": "q", "query": "SELECT 1"}')
    with pytest.raises(
        TacqError,
        match=r'There is no .*schemas.json; put the CREATE TABLE texts there as .*, or into each row as "schema".',
    ):
        load_task(path)
    for content, message in [
        (
            '{"other": "CREATE TABLE t (a)"}',
            "task.jsonl, line 1: .*schemas.json has no database 'shop'; add its CREATE TABLE text there",
        ),
        ("[", "schemas.json is not valid JSON"),
        ('{"shop": 3}', "schemas.json is no JSON object of db_id and CREATE TABLE text"),
        ('["shop"]', "schemas.json is no JSON object"),
    ]:
        write(tmp_path, content, "schemas.json")
        with pytest.raises(TacqError, match=message):
            load_task(path)


def test_a_schema_is_compact_and_means_the_same():
    """Names that need their quotes keep them, here because one is a keyword and one has a space."""
    assert (
        compact_schema(SCHEMA)
        == 'CREATE TABLE "pet shop" ("ID" NUMERIC, "name" TEXT, PRIMARY KEY ("ID"));\nCREATE TABLE "pet" ("order" '
        "TEXT);"
    )
    assert compact_schema(SCHEMA.replace('"order"', '"kind"')) == (
        'CREATE TABLE "pet shop" (ID NUMERIC, name TEXT, PRIMARY KEY (ID));\nCREATE TABLE pet (kind TEXT);'
    )
    assert compact_schema("  no SQL\n at all ") == "no SQL\n at all"


def test_a_query_is_tidied_outside_its_quotes():
    assert (
        tidy_query(""" SELECT a ,  count( * )\nFROM t WHERE b  =  'x ,  y' AND c = "d  e" """)
        == """SELECT a, count(*) FROM t WHERE b = 'x ,  y' AND c = "d  e\""""
    )


def test_the_prompt_of_an_example_ends_where_the_assistant_begins():
    words = Words()
    example = Example(messages=USER_AND_ASSISTANT)
    assert words.words(prompt_tokens(example, words)) == [
        "BOS-of-template",
        "<user>",
        "what",
        "is",
        "2",
        "and",
        "3",
        "<assistant>",
    ]
    plain = Words(template=None)
    assert plain.words(prompt_tokens(example, plain)) == ["BOS", "what", "is", "2", "and", "3"]
    for other in (Example(text="a b"), Example(messages=USER_AND_ASSISTANT[:1])):
        with pytest.raises(TacqError, match="has no assistant's turn at its end"):
            prompt_tokens(other, words)
    with pytest.raises(TacqError, match="The model's chat template refuses an example"):
        prompt_tokens(Example(messages=({"role": "nobody", "content": "x"}, USER_AND_ASSISTANT[1])), words)


def test_the_tokenizer_of_a_gguf_gives_the_tokens_of_the_folder(load_tiny, tiny_gguf, tiny_task):
    task = load_task(tiny_task)
    expected = tokenize_task(task, load_tiny("llama").tokenizer, 3, 2048)
    assert tokenize_task(task, gguf_tokenizer(tiny_gguf), 3, 2048) == expected and len(expected) == 3


def test_a_gguf_without_a_tokenizer_is_one_sentence(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        TacqError, match="transformers cannot read the tokenizer of .*none.gguf .*; compare on plain text with --text."
    ):
        gguf_tokenizer(tmp_path / "none.gguf")
