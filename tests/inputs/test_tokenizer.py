"""Text to tokens, beside what we did not write: llama-tokenize, llama-server, llama.cpp's own test vectors, and
transformers."""

from __future__ import annotations

import ast
import json
import random
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from tiny_vocab import write_vocab

from tacq_export.errors import TacqError
from tacq_export.inputs.chat_template import ChatTemplate
from tacq_export.inputs.load_task import load_task
from tacq_export.inputs.tokenize_task import tokenize_for_loss, tokenize_task
from tacq_export.inputs.tokenizer import MARGIN, ModelTokenizer
from tacq_export.runtime.build import tool
from tacq_export.runtime.llama_vocab import LlamaVocab
from tacq_export.runtime.source import source_tree

DATA = Path(__file__).resolve().parent.parent.parent / "tools" / "data"
BEGIN, END, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CONTROL = [BEGIN, END, USER, ASSISTANT]
WITHOUT_BOS = "{% for m in messages %}<｜{{ m.role | capitalize }}｜>{{ m.content }}{% endfor %}"
WITH_BOS = "{{ bos_token }}" + WITHOUT_BOS
ASKED = [{"role": "user", "content": "hello world"}]


def llama_tokenize(file: Path, text: str, *flags: str) -> list[int]:
    command = [str(tool("llama-tokenize")), "-m", str(file), "--ids", "--log-disable", "--stdin", *flags]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def vocabularies(runtime) -> Path:
    """Folder of the vocabularies that llama.cpp is tested with."""
    return source_tree(print) / "models"


@pytest.fixture
def make(tmp_path, runtime):
    return lambda **options: ModelTokenizer(write_vocab(tmp_path / "v.gguf", CONTROL, **options))


@pytest.mark.parametrize("template", [WITH_BOS, WITHOUT_BOS])
@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_there_once_if_the_vocabulary_wants_it(make, template, add_bos):
    tokenizer = make(template=template, bos=BEGIN, eos=END, add_bos=add_bos)
    begin, _, user, _ = (tokenizer.encode(text)[-1] for text in CONTROL)
    tokens = tokenizer.encode_chat(ASKED)
    wanted = add_bos or template == WITH_BOS
    assert tokens[: wanted + 1] == [begin] * wanted + [user] and tokens.count(begin) == wanted
    assert tokenizer.text(tokens) == "hello world"
    if add_bos:
        assert tokenizer.encode(BEGIN * 3 + "hello") == tokenizer.encode("hello")
    assert tokens == llama_tokenize(tokenizer.path, tokenizer.render(ASKED).removeprefix(BEGIN * add_bos))


def test_control_tokens_are_one_token_each(make):
    tokenizer = make(bos=BEGIN, eos=END, add_bos=True)
    tokens = tokenizer.encode(f"{USER}hello{ASSISTANT}")
    assert len(tokens) == 4 and [tokenizer.text([token], special=True) for token in tokens] == [
        BEGIN,
        USER,
        "hello",
        ASSISTANT,
    ]
    assert tokenizer.text(tokens) == "hello"


@pytest.mark.parametrize("text", ["hello", f"hello{END}"])
def test_eos_is_not_added_twice(make, text):
    tokenizer = make(bos=BEGIN, eos=END, add_eos=True)
    end = tokenizer.encode("")[-1]
    assert tokenizer.encode(text) == [*tokenizer.encode("hello")[:-1], end] and tokenizer.ends(end)
    with LlamaVocab(tokenizer.path) as vocab:
        assert tokenizer.encode("hello") == vocab.tokenize("hello", special=True, add_special=True)
    assert tokenizer.encode("hello world", 1) == tokenizer.encode("hello")[:1]


def test_a_template_for_tools_is_taken_where_there_are_tools(make):
    tools = [{"type": "function", "function": {"name": "f"}}]
    tokenizer = make(template=WITHOUT_BOS, tool_template="{{ tools[0].function.name }}:" + WITHOUT_BOS)
    assert tokenizer.render(ASKED) == f"{USER}hello world" and tokenizer.render(ASKED, tools) == f"f:{USER}hello world"


def test_without_a_template_turns_are_joined_by_newlines(make):
    tokenizer = make(bos=BEGIN, add_bos=True)
    turns = [*ASKED, {"role": "assistant", "content": "hello"}]
    assert tokenizer.render(turns) == "hello world\nhello" and tokenizer.render(ASKED, ask=True) == "hello world\n"
    with pytest.raises(TacqError, match="the model has no chat template to write tools and tool calls with"):
        tokenizer.render(ASKED, [{"name": "f"}])


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "phi-3", "gpt-2", "falcon", "deepseek-llm"])
def test_llama_cpp_s_own_vectors(vocabularies, name):
    """Texts and ids that llama.cpp's tests have; the ids are those that the models' authors' tokenizers gave."""
    tokenizer = ModelTokenizer(vocabularies / f"ggml-vocab-{name}.gguf")
    inputs = (vocabularies / f"ggml-vocab-{name}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = (vocabularies / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    assert len(inputs) >= len(outputs) > 20
    head = tokenizer.encode("")
    for text, ids in zip(inputs, outputs, strict=False):
        assert tokenizer.encode(text) == head + [int(i) for i in ids.split()], repr(text)


@pytest.fixture(scope="module")
def long_text() -> str:
    """100,000 words, numbers, runs of spaces and newlines, and characters of several bytes."""
    chance = random.Random(0)
    pieces = ["word", "Éclair", "10", "2026", "    ", "\n", "\n\n\n", "don't", "漢字。", "🙂", "...", "</s>", "\t"]
    return "".join(chance.choice(pieces) + " " * chance.choice((0, 1, 1, 1, 5)) for _ in range(100_000))


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "gpt-2", "falcon"])
def test_the_first_tokens_of_a_long_text_are_those_of_all_of_it(vocabularies, long_text, name):
    tokenizer = ModelTokenizer(vocabularies / f"ggml-vocab-{name}.gguf")
    everything, asked = tokenizer.encode(long_text), []

    def head(n: int) -> str:
        asked.append(n)
        return long_text[:n]

    for limit in (1, 100, 5000, 60_000, len(everything), len(everything) + 1):
        assert tokenizer.encode_head(head, limit) == everything[:limit]
    assert asked[0] <= 6 + 2 * MARGIN < len(long_text), "more is read than is needed"


def test_a_long_word_is_cut_where_its_tokens_do_not_change(make):
    tokenizer, text = make(), "helloworld" * 20_000
    assert tokenizer.encode(text, 3000) == tokenizer.encode(text)[:3000]


def test_the_ids_of_the_135m_are_those_of_transformers(model):
    """But for example 45 of the training set, where llama.cpp keeps ten spaces before a number together."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    ours = ModelTokenizer(model)
    for name, n in (("gsm8k-train-128.jsonl", 40), ("gsm8k-test-24.jsonl", 24)):
        task = load_task(DATA / name, limit=n)
        texts, begins = tokenize_for_loss("answer", task, ours, n, 2048)
        assert len(texts) == n and tokenize_task(task, ours, n, 2048) == texts
        for example, tokens, begin in zip(task.examples, texts, begins, strict=True):
            whole = theirs.apply_chat_template(list(example.messages), tokenize=False)
            asked = theirs.apply_chat_template(list(example.messages[:-1]), tokenize=False, add_generation_prompt=True)
            assert tokens == theirs(whole, add_special_tokens=False)["input_ids"]
            assert tokens[:begin] == theirs(asked, add_special_tokens=False)["input_ids"]


def test_the_ids_of_the_tiny_llama_are_those_of_transformers(load_tiny):
    from transformers import AutoTokenizer

    loaded = load_tiny("llama")
    theirs = AutoTokenizer.from_pretrained(loaded.reference_path.parent.parent / "model")
    for text in ("the quick fox, 9 apples", "how many apples\nare left?", "Ünïcode inside"):
        assert loaded.tokenizer.encode(text) == theirs(text)["input_ids"]
        assert loaded.tokenizer.encode(text) == llama_tokenize(loaded.reference_path, text)


def ask(port: int, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


SERVED = [
    None,
    "google-gemma-2-2b-it",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "Qwen3-Coder",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "microsoft-Phi-3.5-mini-instruct",
]


@pytest.mark.parametrize("name", SERVED)
def test_a_conversation_has_the_ids_that_llama_server_makes(tiny_gguf, vocabularies, tmp_path, name):
    """Its /apply-template and /tokenize. The template of the tiny model writes no BOS, and the vocabulary wants one;
    others are llama.cpp's copies of well-known ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "how many apples"},
        {"role": "assistant", "content": "two  apples\n"},
        {"role": "user", "content": "<s>and now?</s>"},
    ]
    template = vocabularies / "templates" / f"{name}.jinja"
    command = [str(tool("llama-server")), "-m", str(tiny_gguf), "--port", str(port), "-t", "1", "-c", "128", "-np", "1"]
    command += ["--chat-template-file", str(template)] if name else []
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()[-500:]
                    time.sleep(0.1)
            text = ask(port, "/apply-template", {"messages": messages})["prompt"]
            wanted = ask(port, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        finally:
            server.kill()
    tokenizer = ModelTokenizer(tiny_gguf)
    if name:
        tokenizer.chat_template = ChatTemplate(template.read_text(), "<s>", "</s>")
    assert tokenizer.render(messages, ask=True).removeprefix("<s>") == text
    assert tokenizer.encode_chat(messages, ask=True) == wanted and wanted[0] == 1 and wanted.count(1) == 2


def test_a_token_beyond_the_embedding_is_named(tmp_path, runtime):
    n = len(CONTROL)
    path = write_vocab(tmp_path / "v.gguf", CONTROL, bos=BEGIN, n_rows=256 + 13 + n - 1)
    tokenizer, task = ModelTokenizer(path), tmp_path / "t.jsonl"
    task.write_text('{"text": "hello"}\n{"text": "hello <｜Assistant｜>"}\n')
    with pytest.raises(TacqError) as error:
        tokenize_task(load_task(task), tokenizer, 5, 100)
    assert str(error.value).startswith("Example 2 of the task 't' has the token 272 ('<｜Assistant｜>'), and the ")
    assert "embedding of v.gguf has 272 rows" in str(error.value)


def test_vocabularies_are_named_by_what_their_ids_mean(tmp_path, runtime):
    one = ModelTokenizer(write_vocab(tmp_path / "a.gguf", CONTROL)).vocabulary
    assert ModelTokenizer(write_vocab(tmp_path / "b.gguf", CONTROL, template=WITH_BOS)).vocabulary == one
    assert ModelTokenizer(write_vocab(tmp_path / "c.gguf", CONTROL[::-1])).vocabulary != one


def test_files_without_a_vocabulary_that_makes_tokens_are_one_sentence(tmp_path, runtime):
    import gguf

    def fails(message: str, path: Path) -> None:
        with pytest.raises(TacqError, match=message) as error:
            ModelTokenizer(path)
        assert "\n" not in str(error.value)

    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fails(
        "none.gguf has no tokenizer .no key tokenizer.ggml.tokens.; give a GGUF of a language", tmp_path / "none.gguf"
    )
    twice = write_vocab(tmp_path / "twice.gguf", ["<a>", "<b>", "<a>"])
    fails("twice.gguf has the token '<a>' twice .ids 269 and 271., which llama.cpp does not load", twice)
    no_bos = write_vocab(tmp_path / "nobos.gguf", CONTROL, add_eos=True, tokens=["a", "b", "ab"])
    fails("nobos.gguf says tokenizer.ggml.add_eos_token and names no EOS token; correct", no_bos)
