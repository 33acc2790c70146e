"""Text-to-SQL rows: the schema in the prompt, compact and with the same meaning."""

from __future__ import annotations

import json

import pytest

from tacq_export.errors import TacqError
from tacq_export.inputs.load_task import load_task
from tacq_export.inputs.sql_schema import compact_schema, tidy_query


def write(tmp_path, content: str, name: str = "task.jsonl"):
    path = tmp_path / name
    path.write_text(content)
    return path


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
