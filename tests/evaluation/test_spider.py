"""Execution match on generated databases: gold queries say something on them, wrong queries are caught, SQL is found in
text."""

from __future__ import annotations

import json
import re
import sqlite3
from itertools import product
from pathlib import Path

import pytest

from tacq_export.errors import TacqError
from tacq_export.evaluation import score_task
from tacq_export.evaluation.score_spider import (
    choose_fillings,
    expected_result,
    extract_sql,
    matches,
    run_query,
    score_spider,
)
from tacq_export.evaluation.spider_databases import Literal, fill_database, literals_of, read_tables
from tacq_export.inputs.tokenizer import ModelTokenizer

# Two databases and some queries of Spider's development set (Yu et al. 2018, arXiv 1809.08887; CC BY-SA 4.0).
PETS = """
CREATE TABLE "Student" ("StuID" NUMERIC, "LName" TEXT, "Fname" TEXT, "Age" NUMERIC, "Sex" TEXT, "Major" NUMERIC,
"Advisor" NUMERIC,
  "city_code" TEXT, PRIMARY KEY ("StuID"));
CREATE TABLE "Has_Pet" ("StuID" NUMERIC, "PetID" NUMERIC, FOREIGN KEY ("StuID") REFERENCES "Student" ("StuID"),
  FOREIGN KEY ("PetID") REFERENCES "Pets" ("PetID"));
CREATE TABLE "Pets" ("PetID" NUMERIC, "PetType" TEXT, "pet_age" NUMERIC, "weight" NUMERIC, PRIMARY KEY ("PetID"));
"""
BATTLES = """
CREATE TABLE "battle" ("id" NUMERIC, "name" TEXT, "date" TEXT, "bulgarian_commander" TEXT, "latin_commander" TEXT,
"result" TEXT,
  PRIMARY KEY ("id"));
CREATE TABLE "ship" ("lost_in_battle" NUMERIC, "id" NUMERIC, "name" TEXT, "tonnage" TEXT, "ship_type" TEXT, "location"
TEXT,
  "disposition_of_ship" TEXT, PRIMARY KEY ("id"), FOREIGN KEY ("lost_in_battle") REFERENCES "battle" ("id"));
CREATE TABLE "death" ("caused_by_ship_id" NUMERIC, "id" NUMERIC, "note" TEXT, "killed" NUMERIC, "injured" NUMERIC,
PRIMARY KEY ("id"),
  FOREIGN KEY ("caused_by_ship_id") REFERENCES "ship" ("id"));
"""
JOIN = "student AS T1 JOIN has_pet AS T2 ON T1.stuid  =  T2.stuid JOIN pets AS T3 ON T3.petid  =  T2.petid"
QUERIES = {
    PETS: [
        "SELECT count(*) FROM pets WHERE weight  >  10",
        "SELECT weight FROM pets ORDER BY pet_age LIMIT 1",
        "SELECT max(weight) ,  petType FROM pets GROUP BY petType",
        "SELECT count(DISTINCT pettype) FROM pets",
        f"SELECT DISTINCT T1.Fname FROM {JOIN} WHERE T3.pettype  =  'cat' OR T3.pettype  =  'dog'",
        f"SELECT T1.Fname FROM {JOIN} WHERE T3.pettype  =  'cat' INTERSECT SELECT T1.Fname FROM {JOIN} WHERE "
        "T3.pettype  =  'dog'",
        f"SELECT stuid FROM student EXCEPT SELECT T1.stuid FROM {JOIN} WHERE T3.pettype  =  'cat'",
        "SELECT T1.fname ,  T1.sex FROM student AS T1 JOIN has_pet AS T2 ON T1.stuid  =  T2.stuid GROUP BY T1.stuid "
        "HAVING count(*)  >  1",
        "select avg(age) from student where stuid not in (select stuid from has_pet)",
    ],
    BATTLES: [
        "SELECT name ,  tonnage FROM ship ORDER BY name DESC",
        "SELECT name ,  RESULT FROM battle WHERE bulgarian_commander != 'Boril'",
        "SELECT T1.id ,  T1.name FROM battle AS T1 JOIN ship AS T2 ON T1.id  =  T2.lost_in_battle JOIN death AS T3 "
        "ON T2.id  =  T3.caused_by_ship_id "
        "GROUP BY T1.id HAVING sum(T3.killed)  >  10",
        "SELECT T2.id ,  T2.name FROM death AS T1 JOIN ship AS t2 ON T1.caused_by_ship_id  =  T2.id GROUP BY T2.id "
        "ORDER BY count(*) DESC LIMIT 1",
        "SELECT name FROM battle WHERE bulgarian_commander  =  'Kaloyan' AND latin_commander  =  'Baldwin I'",
        "SELECT count(*) FROM battle WHERE id NOT IN ( SELECT lost_in_battle FROM ship WHERE tonnage  =  '225' );",
        "SELECT note FROM death WHERE note LIKE '%East%'",
    ],
}
REAL = [(schema, query) for schema, queries in QUERIES.items() for query in queries]


def mutations(query: str) -> dict[str, str]:
    """{what was changed: wrong query}: one small error each, such as a model makes. A few happen to be equivalent to
    the query."""
    clause = r"(?=\s+(?:group|order|limit|union|intersect|except|having)\b|\s*\)|\s*;?\s*$)"

    def sub(pattern: str, replacement) -> str:
        return re.sub(pattern, replacement, query, count=1, flags=re.I | re.S)

    swap = {
        "max": "min",
        "min": "max",
        "avg": "sum",
        "sum": "avg",
        ">": ">=",
        ">=": ">",
        "<": "<=",
        "<=": "<",
        "=": "!=",
        "!=": "=",
    }
    found = {
        "no WHERE": sub(r"\s+where\b.*?" + clause, ""),
        "no HAVING": sub(r"\s+having\b.*?" + clause, ""),
        "no GROUP BY": sub(r"\s+group\s+by\s+[\w.]+", ""),
        "no DISTINCT": sub(r"\bdistinct\b", ""),
        "other direction": sub(r"\b(asc|desc)\b", lambda m: {"asc": "DESC", "desc": "ASC"}[m[1].lower()]),
        "DESC for no direction": sub(
            r"(order\s+by\s+[\w.]+(?:\([\w.*]*\))?)(?!\s+(?:asc|desc))(?=\s+limit|\s*;?\s*$)", r"\1 DESC"
        ),
        "no ORDER BY": sub(r"\s+order\s+by\b.*?(?=\s+limit\b|\s*\)|\s*;?\s*$)", ""),
        "no LIMIT": sub(r"\s+limit\s+\d+", ""),
        "other aggregate": sub(r"\b(max|min|avg|sum)(?=\s*\()", lambda m: swap[m[1].lower()]),
        "other comparison": sub(r"(?<=\s)(>=|<=|!=|>|<)(?=\s)", lambda m: swap[m[1]]),
        "negated equality": sub(r"(?<=\s)=(?=\s+['\"\d])", "!="),
        "other number": sub(r"((?:[<>=]|between)\s*)(\d+)", lambda m: m[1] + str(int(m[2]) + 1)),
        "other string": sub(r"([=]\s*)(['\"])(.*?)\2", r"\1\2\3x\2"),
        "LIKE a part": sub(r"=\s*(['\"])(.*?)\1", r"LIKE \1%\2%\1"),
        "LIKE the beginning": sub(r"(like\s+['\"])%(?=\w)", r"\1"),
        "LIKE the end": sub(r"(?<=\w)%(?=['\"])", ""),
        "AND for OR": sub(r"\bor\b", "AND"),
        "OR for AND": sub(r"\band\b", "OR"),
        "UNION": sub(r"\b(intersect|except)\b", "UNION"),
        "INTERSECT": sub(r"\b(union|except)\b", "INTERSECT"),
        "IN for NOT IN": sub(r"\bnot\s+in\b", "IN"),
        "without the rest": sub(r"\s+(intersect|except|union)\b.*", ""),
        "count of one more": sub(r"count\s*\(\s*\*\s*\)(?=\s*(?:,|from\b))", "count(*) + 1"),
    }
    return {what: wrong for what, wrong in found.items() if wrong != query}


@pytest.mark.parametrize(("schema", "query"), REAL)
def test_gold_queries_say_something_and_wrong_ones_are_caught(schema, query):
    fillings = choose_fillings(schema, query)
    assert len(fillings) == 5 and all(filling.telling and not filling.ambiguous for filling in fillings)
    assert matches(fillings, query)
    passed = [what for what, wrong in mutations(query).items() if matches(fillings, wrong)]
    assert not passed
    others = [other for other in QUERIES[schema] if other != query]
    assert not any(matches(fillings, other) for other in others)


EQUIVALENT = [
    (
        PETS,
        "SELECT count(*) FROM pets WHERE weight  >  10",
        "SELECT COUNT(PetID) AS n FROM Pets p WHERE p.weight > 10.0 -- all of them",
    ),
    (
        PETS,
        "SELECT max(weight) ,  petType FROM pets GROUP BY petType",
        "SELECT PetType, MAX(weight) FROM Pets GROUP BY PetType ORDER BY 1",
    ),
    (
        PETS,
        "SELECT weight FROM pets ORDER BY pet_age LIMIT 1",
        "SELECT weight FROM Pets WHERE pet_age = (SELECT MIN(pet_age) FROM Pets)",
    ),
    (
        PETS,
        "select avg(age) from student where stuid not in (select stuid from has_pet)",
        "WITH owners AS (SELECT DISTINCT StuID FROM Has_Pet) SELECT SUM(Age) * 1.0 / COUNT(*) FROM Student s LEFT "
        "JOIN owners o ON s.StuID = o.StuID WHERE o.StuID IS NULL",
    ),
    (
        BATTLES,
        "SELECT name ,  tonnage FROM ship ORDER BY name DESC",
        "SELECT name, tonnage FROM ship ORDER BY name DESC, id",
    ),
    (
        BATTLES,
        "SELECT name ,  tonnage FROM ship ORDER BY name DESC",
        "SELECT CAST(tonnage AS REAL), name FROM ship ORDER BY name DESC, tonnage",
    ),
]


@pytest.mark.parametrize(("schema", "query", "other"), EQUIVALENT)
def test_equivalent_queries_match(schema, query, other):
    assert matches(choose_fillings(schema, query), other)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "SELECT",
        "SELECT nothing FROM pets",
        "SELECT count(*), 1 FROM pets WHERE weight > 10",
        "SELECT count(*) FROM pets WHERE weight > 10 UNION ALL SELECT 1",
        "SELECT count(*) FROM pets WHERE weight > 10; SELECT 1",
        "DELETE FROM pets",
        "PRAGMA writable_schema = ON",
        "ATTACH '/tmp/other.db' AS other",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "SELECT a.PetID FROM Pets a, Pets b, Pets c, Pets d, Pets e, Pets f",
        "SELECT length(replace(hex(zeroblob(100000000)), '00', 'xx'))",
        "SELECT '\x00'",
        "SELECT '\ud800'",
    ],
)
def test_queries_that_fail_write_or_run_on_are_wrong_and_do_no_harm(wrong):
    query = "SELECT count(*) FROM pets WHERE weight  >  10"
    fillings = choose_fillings(PETS, query)
    assert not matches(fillings, wrong)
    assert matches(fillings, query)


def test_rows_that_tie_may_come_in_any_order_and_others_not():
    database = sqlite3.connect(":memory:")
    database.executescript(
        "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x'), (1, 'y'), (2, 'z'), (3, 'u'), (3, 'v');"
    )

    def groups(query: str):
        result = expected_result(database, query)
        return [sorted(group) for group in result.groups], result.last, result.ambiguous

    assert groups("SELECT b FROM t ORDER BY a") == ([[("x",), ("y",)], [("z",)], [("u",), ("v",)]], 2, False)
    assert groups("SELECT b FROM t ORDER BY a LIMIT 3")[:2] == ([[("x",), ("y",)], [("z",)]], 1)
    assert groups("SELECT b FROM t ORDER BY a LIMIT 1 OFFSET 2") == ([[("z",)]], 1, False)
    cut = groups("SELECT b FROM t ORDER BY a DESC LIMIT 1")
    assert cut == ([[("u",), ("v",)]], 1, True)
    ordered = [expected_result(database, "SELECT b FROM t ORDER BY a")]
    assert matches(ordered, "SELECT b FROM t ORDER BY a, b DESC") and not matches(
        ordered, "SELECT b FROM t ORDER BY a DESC"
    )
    first = [expected_result(database, "SELECT b FROM t ORDER BY a DESC LIMIT 1")]
    assert matches(first, "SELECT 'v'") and matches(first, "SELECT 'u'") and not matches(first, "SELECT 'z'")


def test_columns_are_permuted_alike_on_all_fillings():
    one, two = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    one.executescript("CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 2);")
    two.executescript("CREATE TABLE t (a, b); INSERT INTO t VALUES (2, 1);")
    fillings = [expected_result(database, "SELECT a, b FROM t") for database in (one, two)]
    assert (
        matches(fillings, "SELECT b, a FROM t")
        and not matches(fillings, "SELECT 1, 2")
        and not matches(fillings, "SELECT min(a, b), max(a, b) FROM t")
    )


@pytest.mark.parametrize("schema", [PETS, BATTLES])
def test_keys_hold_and_rows_are_reproducible(schema):
    tables = read_tables(schema)
    for seed, query in product(range(6), QUERIES[schema]):
        database, again = (fill_database(tables, query, seed) for _ in range(2))
        assert list(database.iterdump()) == list(again.iterdump())
        assert not list(database.execute("PRAGMA foreign_key_check"))
        counts = [database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables]
        assert min(counts) > 1 and len(set(counts)) == len(counts)


def test_cycles_repeated_keys_and_odd_names_are_filled():
    schema = """
    CREATE TABLE "a b" ("the id" INTEGER PRIMARY KEY, "boss" INTEGER REFERENCES "a b"("the id"), c INT REFERENCES d,
    "order" VARCHAR(9) UNIQUE); CREATE TABLE d (id INTEGER PRIMARY KEY, best INT REFERENCES "a b", born DATE);
    CREATE TABLE friend (student INT PRIMARY KEY REFERENCES d(id), other INT REFERENCES d(id));
    """
    query = "SELECT student FROM friend GROUP BY student HAVING count(*) >= 3"
    fillings = choose_fillings(schema, query)
    assert all(filling.telling for filling in fillings)  # although the schema says that `student` is a key of its own
    assert not matches(fillings, query.replace("3", "4")) and not matches(fillings, query.replace("3", "2"))
    assert choose_fillings(schema, 'SELECT "order", born FROM "a b" JOIN d ON c = id')[0].telling
    with pytest.raises(
        TacqError,
        match=r"The gold query does not run \(no such column: nowhere\): SELECT nowhere FROM d; correct it, or the "
        r"schema.",
    ):
        choose_fillings(schema, "SELECT nowhere FROM d")
    with pytest.raises(TacqError, match="SQLite refuses the schema"):
        choose_fillings("CREATE TABLE oops", query)
    with pytest.raises(TacqError, match="The schema creates no table"):
        choose_fillings("SELECT 1", query)


def test_the_literals_of_a_query():
    query = """SELECT "name" FROM t AS T1 WHERE T1.age >= 20 AND "size" = "it's" OR b NOT LIKE '%o''x%' AND c BETWEEN -1
    AND 2.5
               AND d IN ('u', 7) AND e = f GROUP BY g HAVING count(*) > 3 AND sum(T1.cost) < 10"""
    assert literals_of(query, {"t", "name", "size"}) == [
        Literal("age", "", ">=", 20),
        Literal("size", "", "=", "it's"),
        Literal("b", "", "like", "%o'x%"),
        Literal("c", "", "<=", -1),
        Literal("c", "", "<=", 2.5),
        Literal("d", "", "=", "u"),
        Literal("d", "", "=", 7),
        Literal("*", "count", ">", 3),
        Literal("cost", "sum", "<", 10),
    ]


ANSWERS = {
    "```sql\nSELECT a FROM t;\n```\nThis query ...": "SELECT a FROM t",
    "Here it is:\n```\nselect a\nfrom t\n```": "select a\nfrom t",
    "```sql\nSELECT a FROM t": "SELECT a FROM t",
    "First the tables:\n```sql\nCREATE TABLE t (a);\n```\nthen\n```sql\nSELECT a FROM t\n```": "SELECT a FROM t",
    "SELECT a FROM t WHERE b = 'x;y'; SELECT 2": "SELECT a FROM t WHERE b = 'x;y'",
    "With this you get it: SELECT a FROM t\n\nIt works because": "SELECT a FROM t",
    "WITH u AS (SELECT a FROM t) SELECT a FROM u": "WITH u AS (SELECT a FROM t) SELECT a FROM u",
    "`` ```sqlite\nSELECT 1``` ``": "SELECT 1",
    "I cannot answer.": "",
    "": "",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_sql_in_an_answer(answer):
    assert extract_sql(answer) == ANSWERS[answer]


@pytest.fixture
def eval_file(tmp_path) -> Path:
    (tmp_path / "schemas.json").write_text(json.dumps({"pets": PETS}))
    rows = [{"db_id": "pets", "question": f"question {i}", "query": query} for i, query in enumerate(QUERIES[PETS][:3])]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "eval.jsonl"


def test_answers_are_judged_in_order(monkeypatch, eval_file):
    replies = ["```sql\nSELECT count(*) FROM Pets WHERE weight > 10;\n```", "SELECT weight FROM Pets", "none"]
    monkeypatch.setattr(score_task, "prompt_tokens", lambda example, tokenizer: [example.messages[0]["content"]])
    asked = []

    def answer(file, prompts, *_):
        asked.extend(prompts)
        return [([1], text) for text in replies]

    monkeypatch.setattr(score_task, "generate", answer)
    assert score_spider("none.gguf", eval_file, None, 9, None).hits == (True, False, False)
    assert (
        "CREATE TABLE Pets (PetID NUMERIC, PetType TEXT, pet_age NUMERIC, weight NUMERIC, PRIMARY KEY "
        "(PetID));\n\nQuestion: question 0\n" in asked[0][0]
    )


def test_a_row_without_a_query_is_named(eval_file):
    eval_file.write_text(eval_file.read_text() + '\n{"question": "q", "db_id": "pets"}')
    with pytest.raises(
        TacqError, match=r'eval.jsonl, line 4: "query" is missing, empty or no string; question and query go together.'
    ):
        score_spider("none.gguf", eval_file, None, 9, None)


def test_spider_with_the_real_model(model, eval_file):
    score = score_spider(
        model, eval_file, eval_file.parent / "schemas.json", 2, ModelTokenizer(model), 1, n_predict=12, parallel=2
    )
    assert score.n == 2 and all(score.answers)


def test_reading_leaves_the_database_usable():
    database = fill_database(read_tables(PETS), "SELECT 1", 0)
    with pytest.raises(sqlite3.Error):
        run_query(database, "DROP TABLE Pets")
    assert run_query(database, "SELECT 2.0, '2', 1 / 3.0, 'x', NULL") == [(2, 2, 0.333333333, "x", None)]
    database.execute("DELETE FROM Pets")
