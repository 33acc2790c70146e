"""What is right for each input that used to go wrong (tools/check_cases.py): {name: function(folder) -> what it gets}.

Each raises Wrong where tacq-export does not do what a user must get.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import case_inputs as inputs
import jinja2
import numpy as np
import torch
from case_runs import ROOT, Done, Wrong, expect, export, exported, finish, kl, line, near, refused, run, start, types
from check_architectures import TASK_ROWS, token_texts
from test_split_gguf import split, tensors_of
from test_text_model import write_wrapper
from test_tokenizer import llama_tokenize
from tiny_architectures import write_architecture
from tiny_hf import odd_width_llama, scaled_llama, write_model_folder

from tacq_export.format.gguf_file import open_gguf, tensor_values
from tacq_export.inputs.load_gguf import load_gguf_model
from tacq_export.inputs.tokenizer import ModelTokenizer

__all__ = ["CASES", "Wrong"]


# -- MODEL


def three_parts(folder: Path) -> str:
    whole = inputs.float_gguf(inputs.llama_folder(folder / "model"), folder / "whole.gguf")
    parts = split(whole, folder / "parts", 3)
    _, ours = exported(folder, parts[0], "--target-bpw", 3.5, name="of_parts")
    aside = parts[1].rename(folder / "aside")
    lacking = refused(export(folder, parts[0], name="of_two")[0], parts[1].name, "not beside it")
    aside.rename(parts[1])
    _, expected = exported(folder, whole, "--target-bpw", 3.5, name="of_whole")
    found, wanted = tensors_of(ours), tensors_of(expected)
    expect(found == wanted, f"{len(found)} tensors, of the whole {len(wanted)}, or other bytes")
    return f"all {len(found)} tensors are those of the whole, byte for byte; without the second part {lacking}"


def no_head(folder: Path) -> str:
    return refused(export(folder, inputs.without_head(folder / "model"))[0], "'lm_head.weight'", "missing")


def gguf_of_sharp(**settings: object) -> Callable[[Path], str]:
    """Torch's model of the GGUF is the folder's, and llama.cpp runs the same."""

    def check(folder: Path) -> str:
        original, path = inputs.sharp_gguf(folder / "sharp", **settings)
        read = load_gguf_model(path).eval()
        tokens = torch.tensor([token_texts(path)[0]])
        with torch.no_grad():
            p, q = (torch.log_softmax(m(input_ids=tokens).logits[0].float(), -1) for m in (original, read))
        apart = float((p.exp() * (p - q)).sum(-1).mean())
        expect(apart < 1e-4, f"the folder's model and what torch makes of the GGUF are apart: KL {apart:.2g}")
        done, outfile = exported(folder, path, "--target-bpw", 4.25, "-w", folder / "work")
        agreed = re.search(r"KL (\S+) on", line(done, "torch and llama.cpp agree"))
        expect(agreed is not None and float(agreed[1]) < 1e-4, "torch and llama.cpp are apart")
        return f"put right: KL to the folder's model {max(apart, 0):.0e}, torch to llama.cpp {agreed[1]}; " + near(
            path, outfile
        )

    return check


def same_workdir(folder: Path) -> str:
    """Either of the two writes what it writes alone, or says who works there."""
    model = inputs.float_gguf(inputs.llama_folder(folder / "model"), folder / "model.gguf")
    task, sizes = inputs.write_task(folder), (3.5, 2.45)
    alone = [exported(folder, model, "--target-bpw", bpw, name=f"alone{bpw}")[1].read_bytes() for bpw in sizes]
    said = []
    for apart in (1.0, 0.3):
        processes = []
        for bpw in sizes:
            outfile = folder / f"{apart}-{bpw}.gguf"
            options = ("--outfile", outfile, "-t", 1, "--target-bpw", bpw, "-w", folder / f"work{apart}")
            processes.append(start(model, "--task", task, *options))
            time.sleep(apart if len(processes) == 1 else 0)
        results = [finish(process) for process in processes]
        for done, bpw, expected in zip(results, sizes, alone, strict=True):
            outfile = folder / f"{apart}-{bpw}.gguf"
            expect((done.code == 0) == outfile.exists(), "an exit status that its output does not agree with")
            if done.code == 0:
                expect(outfile.read_bytes() == expected, f"{apart} s apart, the file of {bpw} bpw is another")
            else:
                refused(done, "is in use by process", "wait until that has ended")
        expect(any(done.code == 0 for done in results), "neither of them wrote its file")
        wrote = sum(done.code == 0 for done in results)
        said.append(f"{apart} s apart: {wrote} wrote the file that it writes alone, {2 - wrote} said who works there")
    return "; ".join(said)


def date_in_template(folder: Path) -> str:
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }} {{ messages[0].content }} {{ messages[1].content }}"
    model = inputs.llama_folder(folder / "model", template)
    files = []
    for name, options in (("one", ()), ("two", ()), ("kept", ("-w", folder / "w")), ("again", ("-w", folder / "w"))):
        files.append(exported(folder, model, *options, name=name)[1].read_bytes())
    expect(all(file == files[0] for file in files), "other bytes at another second")
    return "the same bytes, with and without `--workdir`: the template gets a fixed date"


def scaled(scale: float) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        names = ["blk.0.attn_v.weight", "blk.0.attn_output.weight"]
        errors, said = [], []
        for part, by in (("plain", 1.0), ("scaled", scale)):
            model = scaled_llama(by)
            (folder / part).mkdir()
            write_model_folder(folder / part / "model", "", model=model)
            work = folder / part / "work"
            done, outfile = exported(
                folder / part, folder / part / "model", "--base-type", "tacq4", "--no-kept", "-w", work
            )
            ours, full = ({t.name: t for t in open_gguf(f).tensors} for f in (outfile, work / "reference-f16.gguf"))
            exact = [tensor_values(full[name]) for name in names]
            differences = [tensor_values(ours[name]) - w for name, w in zip(names, exact, strict=True)]
            errors += [np.linalg.norm(d) / np.linalg.norm(w) for d, w in zip(differences, exact, strict=True)]
            kinds = types(outfile)
            said = [text for text in done.err.splitlines() if "outside the range of our scales" in text]
            wider = [name for name in names if kinds[name] != "TACQ4"]
            expect(len(said) == len(wider), f"{len(wider)} matrices are kept wider, and {len(said)} lines say it")
            off = kl(work / "reference-f16.gguf", outfile)
            expect(off < 0.1, f"KL of the file {off:.2g}")
        expect(max(errors[2:]) < 1.1 * max(errors[:2]) < 0.15, f"relative errors {errors}")
        which = f"{len(said)} kept wider and said" if said else "held at TACQ4"
        pairs = [f"{a:.3f} and {b:.3f}" for a, b in (errors[2:], errors[:2])]
        return f"{which}: relative error {pairs[0]} (unscaled: {pairs[1]})"

    return check


# -- the task and its tokens


def n_tokens(done: Done) -> int:
    found = re.search(r"examples, (\d+) tokens", done.err)
    expect(found is not None, "it does not say how many tokens it calibrates on")
    return int(found[1])


def tool_calls(folder: Path) -> str:
    """Tools and calls are in the text that is calibrated on, or the template that has no place for them is named."""
    task = inputs.write_task(folder, [inputs.TOOL_ROW])
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(inputs.TOOL_TEMPLATE)
    model = inputs.llama_folder(folder / "model", inputs.TOOL_TEMPLATE)
    done, _ = exported(folder, model, "-w", folder / "work", task=task)
    expected = llama_tokenize(folder / "work" / "reference-f16.gguf", template.render(**inputs.TOOL_ROW))
    found = n_tokens(done)
    expect(found == len(expected), f"{found} tokens, with the tools and the call it is {len(expected)}")
    plain = inputs.llama_folder(folder / "plain")
    sentence = refused(export(folder, plain, name="plain", task=task)[0], "tool", "template")
    return f"through the template: {found} tokens, tools and call among them; a template without tools is {sentence}"


def full_width_tokens(folder: Path) -> str:
    path = inputs.deepseek_gguf(folder)
    row = {"messages": [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "10 words"}]}
    done, outfile = exported(folder, path, task=inputs.write_task(folder, [row]))
    parts = [llama_tokenize(path, text, "--no-bos") for text in ("hello world", "10 words")]
    expected = 3 + sum(map(len, parts))
    expect(n_tokens(done) == expected, f"{n_tokens(done)} tokens, where it is {expected} with each mark as one")
    return f"one token each: {expected} tokens, of which 3 are the marks; " + near(path, outfile)


def other_commands(name: str) -> Callable[[Path], str]:
    """`answer`, `verify --task` and `compare` of a model whose tokenizer transformers does not read."""

    def check(folder: Path) -> str:
        rows = [row | {"question": f"{i}. {row['question']}"} for i in range(10) for row in TASK_ROWS]
        model, task = folder / "model", inputs.write_task(folder, rows)
        write_architecture(model, name)
        options = ("--target-bpw", 4.25, "--n-samples", 6)
        _, ours = exported(folder, model, "-w", folder / "work", *options, task=task)
        reference = folder / "work" / "reference-f16.gguf"
        answered = run(
            "answer", model, "--task", task, "--outfile", folder / "answers.jsonl", "-t", 1, "--n-samples", 4,
            "--n-predict", 8,
        )  # fmt: skip
        if answered.code:  # a random model may end none of its answers, and then that is what is said
            refused(answered, "answers ended within 8 tokens")
        for command in (
            ("verify", ours, "--against", reference, "--task", task),
            ("compare", reference, "--task", task, "--eval", task, "--file", ours, "--types", "Q8_0"),
        ):
            more = ("-w", folder / "compare") if command[0] == "compare" else ()
            done = run(*command, "-t", 1, *more)
            expect(done.code == 0, f"{command[0]}: {done.sentence}")
        return "`answer`, `verify --task` and `compare` run; " + near(reference, ours)

    return check


def larger_vocabulary(folder: Path) -> str:
    model = inputs.deepseek_gguf(folder, n_more=1)
    rows = [{"text": "how many apples"}, {"text": "<|unused48|> apples are left"}]
    return refused(export(folder, model, task=inputs.write_task(folder, rows))[0], "<|unused48|>", "rows")


def beyond_the_embedding(folder: Path) -> str:
    """Token ids in the task, as `answer` writes them."""
    model = inputs.float_gguf(inputs.llama_folder(folder / "model"), folder / "model.gguf")
    tokens = {"vocabulary": ModelTokenizer(model).vocabulary, "answer": [70, 5000, 2]}
    rows = [{"question": "how many", "answer": "five"}, {"question": "how many", "answer": "nine", "tokens": tokens}]
    return refused(export(folder, model, task=inputs.write_task(folder, rows))[0], "Example 2", "5000")


# -- memory


def large_vocabulary(folder: Path) -> str:
    small = exported(folder, inputs.llama_folder(folder / "small"), name="small")[0]
    model = inputs.large_vocabulary(folder / "model", 262144)
    text = inputs.plain_text(folder / "text.txt", 20000)
    done, _ = exported(folder, model, "--n-samples", 1, "--seq-len", 2048, task=text)
    expect(n_tokens(done) == 2048, f"{n_tokens(done)} tokens")
    said = f"{done.peak / 1e9:.2f} GB of memory in {done.seconds:.0f} s ({small.peak / 1e9:.2f} GB for the tiny llama)"
    expect(done.peak < small.peak + (model / "model.safetensors").stat().st_size + 0.8e9, said)
    return said


def large_text(folder: Path) -> str:
    model = inputs.llama_folder(folder / "model")
    results = []
    for size in (20_000, 20_000_000):
        text = inputs.plain_text(folder / f"{size}.txt", size)
        results.append(exported(folder, model, "--n-samples", 1, "--seq-len", 128, name=f"{size}", task=text)[0])
    few, many = results
    expect(n_tokens(few) == n_tokens(many) == 128, f"{n_tokens(few)} and {n_tokens(many)} tokens")
    expect(many.peak < few.peak + 1e8, f"{(many.peak - few.peak) / 1e6:.0f} MB more than with 20 kB of text")
    expect(many.seconds < few.seconds + 5, f"{many.seconds - few.seconds:.0f} s longer than with 20 kB of text")
    more, longer = max(0.0, (many.peak - few.peak) / 1e6), max(0.0, many.seconds - few.seconds)
    return f"reads what it needs: {more:.0f} MB and {longer:.1f} s more than with 20 kB of text"


# -- machines and matrices


def for_arm(folder: Path) -> str:
    tools = ("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"not tried here: there is no {' and no '.join(missing)}"
    test = ROOT / "tests" / "quantization" / "test_group_descent.py"
    command = [sys.executable, "-m", "pytest", str(test), "-q", "-k", "arm_processor", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    expect(done.returncode == 0, f"its test fails: {done.stdout.strip()[-200:]}")
    return "compiles with the flags that it takes, and gives the same bytes in the emulator"


def odd_width(hidden: int, inner: int) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        write_model_folder(folder / "model", "", model=odd_width_llama(hidden, inner))
        done, outfile = exported(folder, folder / "model", "-w", folder / "work")
        odd = [name for name, kind in types(outfile).items() if name.startswith("blk") and kind == "Q8_0"]
        said = [name for name in odd if re.search(rf"\b{re.escape(name)} has rows of \d+ weights, no mul", done.err)]
        expect(len(said) == len(odd) == (2 if hidden % 64 == 0 else 12), f"{len(odd)} at Q8_0, {len(said)} named")
        return f"{len(odd)} matrices at Q8_0, each named; " + near(folder / "work" / "reference-f16.gguf", outfile)

    return check


def whole_model(name: str) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        write_architecture(folder / "model", name)
        task = inputs.write_task(folder, TASK_ROWS)
        work = folder / "work"
        _, outfile = exported(folder, folder / "model", "-w", work, "--target-bpw", 4.25, task=task)
        kinds = types(outfile)
        ours = [n for n, kind in kinds.items() if kind.startswith("TACQ") and n.startswith("blk")]
        experts = sum("_exps" in n for n in ours)
        of_experts = f", {experts} of them of experts" if experts else ""
        return f"{len(ours)} tensors quantized{of_experts}; " + near(work / "reference-f16.gguf", outfile)

    return check


def gemma_3_wrapper(folder: Path) -> str:
    write_wrapper(folder / "model", "gemma3")
    work = folder / "work"
    done, outfile = exported(folder, folder / "model", "-w", work, "--target-bpw", 4.25)
    expect("not in the file" in line(done, "is a language model and more"), "it does not say what is left out")
    expect(not any(name.startswith(("v.", "mm.")) for name in types(outfile)), "vision tensors in the file")
    return "the language model is exported, a line says that vision is not; " + near(
        work / "reference-f16.gguf", outfile
    )


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, Callable[[Path], str]] = {
    "a GGUF in three parts, the first given as MODEL": three_parts,
    "`tie_word_embeddings: false` and no `lm_head.weight`": no_head,
    "the F16 GGUF of a Llama folder with llama3 rope scaling": gguf_of_sharp(rope_parameters=LLAMA3),
    "the F16 GGUF of a Llama folder with attention biases": gguf_of_sharp(attention_bias=True),
    "the F16 GGUF of a Llama folder with mlp biases": gguf_of_sharp(mlp_bias=True),
    "two exports of other `--target-bpw` with the same `--workdir`": same_workdir,
    "a chat template that prints `strftime_now(...)`, exported four times": date_in_template,
    "a matrix 30 times larger, its successor as much smaller": scaled(30.0),
    "a matrix 300 times larger, its successor as much smaller": scaled(300.0),
    "messages with `tool_calls` and `tools`": tool_calls,
    "GGUF of a Qwen2 model with `<｜begin▁of▁sentence｜>` and `<｜User｜>`": full_width_tokens,
    "a SmolLM3 folder: `answer`, `verify --task`, `compare`": other_commands("SmolLM3ForCausalLM"),
    "a Granite folder: `answer`, `verify --task`, `compare`": other_commands("GraniteForCausalLM"),
    "a Gemma 3 wrapper folder": gemma_3_wrapper,
    "a GGUF with more tokens than rows of the embedding": larger_vocabulary,
    "a token in the task beyond the embedding's rows": beyond_the_embedding,
    "a vocabulary of 262,144, one text of 2,048 tokens": large_vocabulary,
    "20 MB of plain text, `--n-samples 1`": large_text,
    "the quantizer's C with `aarch64-linux-gnu-gcc`": for_arm,
    "a feed-forward width of 352": odd_width(64, 352),
    "a hidden size of 96": odd_width(96, 128),
    "LFM2 (`shortconv.conv.weight`)": whole_model("Lfm2ForCausalLM"),
    "Mamba (`ssm_a`)": whole_model("MambaForCausalLM"),
    "GPT-2 (`Conv1D`)": whole_model("GPT2LMHeadModel"),
    "Mixtral (`*_exps.weight`)": whole_model("MixtralForCausalLM"),
}
