"""The command line. Only this module and console.py print; everything else raises TacqError and reports through a Reporter."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .console import ConsoleReporter, guarded, positive
from .errors import TacqError
from .reporting import Reporter

COMMANDS = {
    "export": "compress a model for a task (the word may be left out: tacq-export MODEL --task FILE)",
    "answer": "let a model write the answers of a task file itself, to calibrate on",
    "inspect": "tensors, types, true bits per weight, and where the kept weights sit",
    "verify": "decode in Python and in C; KL, perplexity and top-1 agreement with a reference",
    "compare": "our file beside stock types of the same model",
    "run": "answer a prompt with a GGUF",
    "dequantize": "write a GGUF that stock llama.cpp reads",
    "runtime": "build llama.cpp with our types, or say where the build is",
}


def checked_outfile(args: argparse.Namespace) -> Path:
    """--outfile. Raises TacqError if it exists and there is no --force, or if its folder does not."""
    outfile = Path(args.outfile)
    if outfile.exists() and not args.force:
        raise TacqError(f"{outfile} exists; give another --outfile, or --force to replace it.")
    if not outfile.parent.is_dir():
        raise TacqError(f"There is no folder {outfile.parent} for the output; make it, or give another --outfile.")
    return outfile


def build_progress(reporter: Reporter):
    """Adapter for `runtime_build`, whose steps are numbered [n/m]."""
    return lambda done, total, what: reporter.progress(done, total, "building llama.cpp")


def export_parser(prog: str) -> argparse.ArgumentParser:
    """Flags of an export; each default is ExportConfig's."""
    from .config import BASE_TYPES, DEFAULT_BPW, DEFAULT_EMBEDDING_TYPE, EMBEDDING_TYPES, HESSIAN_INPUTS, HESSIANS, LOSSES, PRECISIONS, REFERENCES, SCORES, ExportConfig

    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compress MODEL for a task and write a GGUF: the weights that matter to the task stay at 16 bits, the rest gets 2 to 4.",
        epilog="other commands:\n" + "\n".join(f"  tacq-export {name:<12}{text}" for name, text in COMMANDS.items() if name != "export"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = {f: ExportConfig.__dataclass_fields__[f].default for f in ExportConfig.__dataclass_fields__}
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or hub id, or GGUF file")
    parser.add_argument("--task", required=True, metavar="FILE", help="examples of the task: JSONL (question/answer, prompt/completion, messages or text), or plain text")
    parser.add_argument("--outfile", metavar="OUT.gguf", help="default: MODEL's name with the task's and the base type's")
    parser.add_argument("--score", default=default["score"], metavar="S", help=f"saliency: {', '.join(SCORES)} (default {default['score']})")
    parser.add_argument("--reference", default=default["reference"], metavar="R", help=f"how Q(W) of the saliency is made, for scores that have one (tacq, tacq-no-magnitude, fisher): {', '.join(REFERENCES)} (default {default['reference']})")
    parser.add_argument("--target-bpw", type=float, metavar="B", help=f"bits per weight of the linear matrices, scales and indices counted, not to be exceeded: each matrix gets the type of least predicted loss (default {DEFAULT_BPW})")
    parser.add_argument("--target-size", metavar="S", help="the same for the whole file, embedding and head included: 350M, 1.2G (thousands), 512MiB, or bytes")
    parser.add_argument("--base-type", metavar="T", help=f"one width for all matrices instead, --target-bpw filled up with kept weights: {', '.join(BASE_TYPES)}")
    parser.add_argument("--no-kept", action="store_true", help="keep no weights at 16 bits: base types only")
    parser.add_argument("--ratio", type=float, metavar="R", help="one width for all matrices (tacq2, or --base-type), and this share of the weights kept at 16 bits, such as 0.0035, at whatever size that takes")
    parser.add_argument("--tensor-type", action="append", default=[], metavar="REGEX=T", dest="tensor_types", help="type of the matrices whose GGUF name matches, such as 'ffn_down=tacq3' or 'blk.0.=q8_0'; may be given again, the first that matches counts")
    parser.add_argument("--token-embedding-type", metavar="T", help=f"{', '.join(EMBEDDING_TYPES)} (default {DEFAULT_EMBEDDING_TYPE}; with --target-size chosen with the others)")
    parser.add_argument("--output-tensor-type", metavar="T", help="the same for the head, where it is no copy of the embedding")
    parser.add_argument("--n-samples", type=int, default=default["n_samples"], metavar="N", help=f"the first N examples of the task are used (default {default['n_samples']})")
    parser.add_argument("--seq-len", type=int, default=default["seq_len"], metavar="N", help=f"each cut to N tokens (default {default['seq_len']})")
    parser.add_argument("--refine-sweeps", type=int, default=default["refine_sweeps"], metavar="N", help=f"passes of coordinate descent over codes and scales after GPTQ (default {default['refine_sweeps']}; 0 for none)")
    parser.add_argument("--damping", type=float, default=default["damping"], metavar="D", help=f"GPTQ's, as a share of the Hessian's mean diagonal (default {default['damping']})")
    parser.add_argument("--shrinkage", type=float, default=default["shrinkage"], metavar="S", help=f"the fewer tokens for each column, the less the Hessian is believed: its diagonal grows by S * columns / tokens times itself (default {default['shrinkage']})")
    parser.add_argument("--compensation", type=float, default=default["compensation"], metavar="A", help=f"how much each matrix makes up for what those before it did wrong, 0 to 1; only with --hessian-inputs quantized (default {default['compensation']})")
    parser.add_argument("--loss", default=default["loss"], metavar="L", help=f"whose gradients: {', '.join(LOSSES)}; answer counts the assistant's last turn alone (default {default['loss']})")
    parser.add_argument("--hessian", default=default["hessian"], metavar="H", help=f"how tokens count in GPTQ's Hessian: {', '.join(HESSIANS)}; gradient weighs each by how much the loss depends on it (default {default['hessian']})")
    parser.add_argument(
        "--hessian-inputs", default=default["hessian_inputs"], metavar="I",
        help=f"whose inputs: {', '.join(HESSIAN_INPUTS)}; quantized lets each matrix make up for those before it, at the price of some passes more (default {default['hessian_inputs']})",
    )  # fmt: skip
    parser.add_argument("--precision", default=default["precision"], metavar="P", help=f"of the calibration's matrix products: {', '.join(PRECISIONS)} (default {default['precision']}); bf16 is 2 to 3 times faster on CPUs that have it")
    parser.add_argument("--tune", action="store_true", help="fine-tune norms and biases against the full model at the end, which costs no bytes: one pass over up to N more examples, those behind the first --n-samples N")
    parser.add_argument("--device", default=default["device"], metavar="D", help="auto, cpu, cuda, cuda:N (default auto)")
    parser.add_argument("--seed", type=int, default=default["seed"], metavar="N", help="of the random score and of the order of --tune (default 0)")
    parser.add_argument("--threads", "-t", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("-w", "--workdir", metavar="DIR", help="work goes here and stays; the next export of the same model and task into it need not calibrate again (default: OUT.gguf.work, removed at the end)")
    parser.add_argument("--resume", action="store_true", help="go on with an export that was interrupted")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, write nothing")
    return parser


def run_export(argv: list[str], prog: str) -> None:
    args = vars(export_parser(prog).parse_args(argv))
    from .config import ExportConfig

    if args["outfile"] is None:
        args["outfile"] = f"{Path(args['model'].rstrip('/')).name.removesuffix('.gguf')}-{Path(args['task']).stem}-{args['base_type'] or 'tacq'}.gguf"
    args["tensor_types"] = tuple(args["tensor_types"])
    config = ExportConfig(**args)
    config.validate()  # before torch and transformers take their seconds to import
    from .pipeline import export

    result = export(config, ConsoleReporter())
    if result is not None:
        print(
            f"{result.outfile}: {result.file_bytes / 1e6:.1f} MB, {result.bpw_file:.3f} bits per weight of the file; linear matrices "
            f"{result.bpw_linear:.3f} (scales and indices counted), {result.kept} weights kept; "
            f"{result.seconds:.0f} s, peak memory {result.peak_rss_bytes / 1e9:.1f} GB"
        )


def run_answer(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description="Write FILE's conversations again with MODEL's own greedy answers in place of the last turns. Calibrate on them where the model answers in a style of its own.")
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or hub id, or GGUF file")
    parser.add_argument("--task", required=True, metavar="FILE", help="examples of the task: JSONL with questions and answers, as for the export")
    parser.add_argument("--outfile", required=True, metavar="OUT.jsonl")
    parser.add_argument("--n-samples", type=positive, default=128, metavar="N", help="the first N examples are answered (default 128)")
    parser.add_argument("--n-predict", type=positive, default=512, metavar="N", help="tokens at most; a longer answer is left out (default 512)")
    parser.add_argument("--threads", "-t", type=positive, metavar="N")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    args = parser.parse_args(argv)
    from .answer_task import answer_task

    outfile = checked_outfile(args)
    written, cut = answer_task(args.model, Path(args.task), outfile, args.n_samples, args.n_predict, args.threads, ConsoleReporter())
    print(f"{outfile}: {written} answers" + (f"; {cut} were longer than {args.n_predict} tokens and are left out" if cut else ""))


def run_inspect(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["inspect"])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    args = parser.parse_args(argv)
    from .inspect_gguf import density_picture, inspect_gguf

    facts = inspect_gguf(args.file)
    if args.json:
        tensors = [{"name": t.name, "shape": t.shape, "type": t.type, "bytes": t.nbytes, "kept": t.kept} for t in facts.tensors]
        print(json.dumps({"file_bytes": facts.file_bytes, "bpw_file": facts.bpw_file, "bpw_linear": facts.bpw_linear, "metadata": facts.metadata, "tensors": tensors}))
        return
    for key, value in facts.metadata.items():
        print(f"{key:<22} {value}")
    print(f"\n{'tensor':<32} {'shape':>16} {'type':<11} {'bits/weight':>11} {'kept':>9} {'share':>8}")
    for t in facts.tensors:
        kept = f"{t.kept:>9} {100 * t.kept / t.n_weights:>6.2f} %" if t.kept else ""
        print(f"{t.name:<32} {' x '.join(map(str, t.shape)):>16} {t.type:<11} {t.bits_per_weight:>11.3f} {kept}".rstrip())
    picture = density_picture(facts)
    print("\n" + "\n".join(picture) if picture else "\nno weights are kept at 16 bits")
    print(f"\n{facts.file_bytes} bytes, {facts.bpw_file:.3f} bits per weight of the file; linear matrices {facts.bpw_linear:.3f}")


def run_verify(argv: list[str], prog: str) -> None:
    from .config import LOSSES

    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["verify"])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--against", metavar="REF", help="GGUF of the same model to compare with, such as the F16 original")
    parser.add_argument("--task", metavar="FILE", help="examples to compare on (not those of the calibration), as for the export")
    parser.add_argument("--loss", choices=LOSSES, default="text", help="which tokens of the examples count: all, or those of the assistant's last turn alone (default text)")
    parser.add_argument("--text", metavar="FILE", help="plain text to compare on, in windows of 512 tokens")
    parser.add_argument("--n-samples", type=positive, default=24, metavar="N", help="examples or windows (default 24)")
    parser.add_argument("--threads", "-t", type=positive, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args(argv)
    if bool(args.against) != bool(args.task or args.text):
        raise TacqError("KL and perplexity need both a reference and examples: give --against REF with --task FILE or --text FILE.")
    if args.text and args.loss == "answer":
        raise TacqError("A plain text has no answers; use --loss answer with --task FILE.")
    from .decode_in_c import check_decoding

    reporter = ConsoleReporter()
    count = check_decoding(args.file, reporter)
    result: dict = {"tensors_decoded_alike": count}
    if args.against:
        from .verify_gguf import compare_models, compare_on_text

        shown = lambda done, total: reporter.progress(done, total, "measuring")  # noqa: E731
        if args.task:
            from .load_task import gguf_tokenizer, load_task, tokenize_for_loss

            texts, begins = tokenize_for_loss(args.loss, load_task(Path(args.task)), gguf_tokenizer(args.against), args.n_samples, 2048)
            quality = compare_models(args.against, args.file, texts, args.threads, shown, begins=begins)
        else:
            from .load_task import read_text

            quality = compare_on_text(args.against, args.file, read_text(Path(args.text)), 512, args.n_samples, args.threads, shown)
        result |= quality.as_dict()
    if args.json:
        print(json.dumps(result))
        return
    print(f"{count} tensors of {args.file} decode alike in Python and in C")
    if args.against:
        print(f"on {quality.n_tokens} tokens against {args.against}:")
        print(f"  KL divergence     {quality.kl:.4f} +- {quality.kl_stderr:.4f} nats a token")
        print(f"  perplexity        {quality.ppl:.3f} (reference {quality.ref_ppl:.3f}, ratio {quality.ppl_ratio:.4f} +- {quality.ppl_ratio_stderr:.4f})")
        print(f"  top-1 agreement   {100 * quality.top1:.2f} +- {100 * quality.top1_stderr:.2f} %")


def run_compare(argv: list[str], prog: str) -> None:
    from .config import LOSSES

    parser = argparse.ArgumentParser(
        prog=prog,
        description="Our files beside stock ones of the same size: llama-quantize with llama-imatrix on the same examples, embedding and head in the same types. "
        "Prints a table and, as the last line, a JSON list of rows. A comparison that was interrupted goes on with the same command.",
    )
    parser.add_argument("model", metavar="MODEL", help="what is compressed: Hugging Face folder, hub id or GGUF; at F16 it is the reference")
    parser.add_argument("--task", required=True, metavar="FILE", help="the examples of the calibration; the stock types get their imatrix from them")
    parser.add_argument("--eval", required=True, metavar="FILE", help="other examples, to measure KL, perplexity and top-1 on")
    parser.add_argument("--file", action="append", metavar="OURS.gguf", help="our file; may be given several times (default: one is exported with default options into the work folder)")
    parser.add_argument("--types", metavar="T,T", help="stock types (default: for each of our files the nearest in file size, one below and one at or above)")
    parser.add_argument("--emulate", metavar="T,T", help="stock types, such as Q2_K,Q3_K_M, also measured as if they could hold every width, at their nominal bits per weight")
    parser.add_argument("--n-samples", type=positive, default=128, metavar="N", help="examples of --task (default 128)")
    parser.add_argument("--n-eval", type=positive, default=24, metavar="N", help="examples of --eval (default 24)")
    parser.add_argument("--loss", choices=LOSSES, default="text", help="which of their tokens count: all, or those of the assistant's last turn alone (default text)")
    parser.add_argument("--text", metavar="FILE", help="general text, such as wikitext2: the perplexity on it is the price of the task")
    parser.add_argument("--n-windows", type=positive, default=40, metavar="N", help="windows of 512 tokens of --text (default 40)")
    parser.add_argument("--score", choices=["gsm8k", "spider", "none"], default="none", help="let each file answer examples of --eval and count what is right (default none)")
    parser.add_argument("--n-score", type=positive, default=100, metavar="N", help="how many examples are answered (default 100)")
    parser.add_argument("--embedding-type", metavar="T", help="of embedding and head in the stock files, such as Q6_K (default: what our file has)")
    parser.add_argument("--outfile-json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--png", metavar="FILE", help="draw KL and score against file size (needs matplotlib)")
    parser.add_argument("--threads", "-t", type=positive, metavar="N")
    parser.add_argument("-w", "--workdir", default="compare.work", metavar="DIR", help="stock files and results stay here and are used again (default compare.work)")
    args = parser.parse_args(argv)
    from .compare_rows import json_line, table, write_json
    from .compare_stock import CompareConfig, Scoring, compare_stock
    from .plot_compare import check_picture, plot_compare

    for outfile in filter(None, (args.outfile_json, args.png)):
        if not Path(outfile).parent.is_dir():
            raise TacqError(f"There is no folder {Path(outfile).parent} for the output; make it, or give another.")
    if args.png:
        check_picture()
    held_out = Path(args.eval)
    scoring = [] if args.score == "none" else [Scoring(args.score, held_out, args.n_score)]
    config = CompareConfig(
        args.model, Path(args.task), held_out, Path(args.workdir), args.file and [Path(file) for file in args.file], args.types and args.types.split(","),
        args.emulate.split(",") if args.emulate else (), args.n_samples, args.n_eval, args.loss, args.text and Path(args.text), args.n_windows, scoring,
        args.embedding_type, args.embedding_type, args.threads,
    )  # fmt: skip
    rows = compare_stock(config, ConsoleReporter())
    if args.outfile_json:
        write_json(rows, Path(args.outfile_json))
    if args.png:
        plot_compare(rows, Path(args.png), Path(args.model.rstrip("/")).name.removesuffix(".gguf"), f"{rows[0].n_tokens} tokens of {held_out.name}")
    print("\n".join(table(rows)))
    print(json_line(rows))


def run_prompt(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["run"])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("-p", "--prompt", required=True)
    parser.add_argument("-n", "--n-predict", type=int, default=256, metavar="N", help="tokens at most (default 256)")
    parser.add_argument("-c", "--ctx-size", type=positive, default=4096, metavar="N")
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default 0)")
    parser.add_argument("--threads", "-t", type=positive, metavar="N")
    args, more = parser.parse_known_args(argv)
    from .run_model import run

    run(args.file, args.prompt, args.n_predict, args.threads, args.ctx_size, args.temp, extra=more)
    print()


def run_dequantize(argv: list[str], prog: str) -> None:
    from .config import BASE_TYPES, EMBEDDING_TYPES

    types = [t for t in EMBEDDING_TYPES if t not in BASE_TYPES]
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["dequantize"])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--outfile", required=True, metavar="OUT.gguf")
    parser.add_argument("--outtype", default="f16", choices=types, help="type of the matrices (default f16)")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    args = parser.parse_args(argv)
    from .write_gguf import dequantize_gguf

    outfile = checked_outfile(args)
    dequantize_gguf(args.file, outfile, args.outtype, ConsoleReporter())
    print(f"{outfile}: {outfile.stat().st_size / 1e6:.1f} MB")


def run_runtime(argv: list[str], prog: str) -> None:
    from .runtime import BACKEND_OPTIONS, runtime_build, runtime_path

    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["runtime"])
    parser.add_argument("action", choices=["build", "path"])
    parser.add_argument("--backend", default="cpu", metavar="B", help=f"one of: {', '.join(BACKEND_OPTIONS)} (default cpu)")
    parser.add_argument("--jobs", "-j", type=positive, metavar="N", help="compilers at once (default: all cores)")
    args = parser.parse_args(argv)
    if args.action == "build":
        reporter = ConsoleReporter()
        runtime_build(args.backend, args.jobs, build_progress(reporter), reporter.say)
    print(runtime_path(args.backend))


RUN = {
    "export": run_export, "answer": run_answer, "inspect": run_inspect, "verify": run_verify, "compare": run_compare, "run": run_prompt,
    "dequantize": run_dequantize, "runtime": run_runtime,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 after a TacqError, 2 for wrong usage, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    named = bool(argv) and argv[0] in RUN and not (argv[0] != "runtime" and os.path.exists(argv[0]) and "--task" in argv)
    command = argv[0] if named else "export"
    prog = f"tacq-export {command}" if named else "tacq-export"
    return guarded(lambda: RUN[command](argv[1:] if named else argv, prog), "interrupted; the same command with --resume goes on with an export")
