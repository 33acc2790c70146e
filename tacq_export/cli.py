"""The command line. Only this module and console.py print; everything else raises TacqError and reports through a
Reporter."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .cli_options import (
    answer_parser,
    compare_parser,
    dequantize_parser,
    export_parser,
    inspect_parser,
    run_parser,
    runtime_parser,
    verify_parser,
)
from .config import ExportConfig, parse_columns
from .console import ConsoleReporter, guarded, wait_passively
from .errors import TacqError, check_system
from .reporting import Reporter


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


def run_export(argv: list[str], prog: str) -> None:
    args = vars(export_parser(prog).parse_args(argv))
    if args["outfile"] is None:
        stem = Path(args["model"].rstrip("/")).name.removesuffix(".gguf")
        args["outfile"] = f"{stem}-{Path(args['task']).stem}-{args['base_type'] or 'tacq'}.gguf"
    args["tensor_types"] = tuple(args["tensor_types"])
    config = ExportConfig(**args)
    config.validate()  # before torch and transformers take their seconds to import
    from .pipeline import export

    result = export(config, ConsoleReporter())
    if result is not None:
        print(
            f"{result.outfile}: {result.file_bytes / 1e6:.1f} MB, {result.bpw_file:.3f} bits per weight of the file; "
            "linear matrices "
            f"{result.bpw_linear:.3f} (scales and indices counted), {result.kept} weights kept; "
            f"{result.seconds:.0f} s, peak memory {result.peak_rss_bytes / 1e9:.1f} GB"
        )


def run_answer(argv: list[str], prog: str) -> None:
    args = answer_parser(prog).parse_args(argv)
    from .inputs.answer_task import answer_task

    outfile, columns = checked_outfile(args), parse_columns(args.columns)
    written, cut = answer_task(
        args.model,
        Path(args.task),
        outfile,
        args.n_samples,
        args.n_predict,
        args.threads,
        ConsoleReporter(),
        columns=columns,
    )
    print(
        f"{outfile}: {written} answers"
        + (f"; {cut} were longer than {args.n_predict} tokens and are left out" if cut else "")
    )


def run_inspect(argv: list[str], prog: str) -> None:
    args = inspect_parser(prog).parse_args(argv)
    from .format.inspect_gguf import density_picture, inspect_gguf

    facts = inspect_gguf(args.file)
    if args.json:
        tensors = [
            {"name": t.name, "shape": t.shape, "type": t.type, "bytes": t.nbytes, "kept": t.kept} for t in facts.tensors
        ]
        print(
            json.dumps(
                {
                    "file_bytes": facts.file_bytes,
                    "bpw_file": facts.bpw_file,
                    "bpw_linear": facts.bpw_linear,
                    "metadata": facts.metadata,
                    "tensors": tensors,
                }
            )
        )
        return
    for key, value in facts.metadata.items():
        print(f"{key:<22} {value}")
    print(f"\n{'tensor':<32} {'shape':>16} {'type':<11} {'bits/weight':>11} {'kept':>9} {'share':>8}")
    for t in facts.tensors:
        kept = f"{t.kept:>9} {100 * t.kept / t.n_weights:>6.2f} %" if t.kept else ""
        print(
            f"{t.name:<32} {' x '.join(map(str, t.shape)):>16} {t.type:<11} {t.bits_per_weight:>11.3f} {kept}".rstrip()
        )
    picture = density_picture(facts)
    print("\n" + "\n".join(picture) if picture else "\nno weights are kept at 16 bits")
    print(
        f"\n{facts.file_bytes} bytes, {facts.bpw_file:.3f} bits per weight of the file; linear matrices "
        f"{facts.bpw_linear:.3f}"
    )


def run_verify(argv: list[str], prog: str) -> None:
    args = verify_parser(prog).parse_args(argv)
    if bool(args.against) != bool(args.task or args.text):
        raise TacqError(
            "KL and perplexity need both a reference and examples: give --against REF with --task FILE or --text FILE."
        )
    if args.text and args.loss == "answer":
        raise TacqError("A plain text has no answers; use --loss answer with --task FILE.")
    columns = parse_columns(args.columns)
    if columns and not args.task:
        raise TacqError("--columns is about the task file; give it with --task FILE.")
    from .runtime.decode_in_c import check_decoding

    reporter = ConsoleReporter()
    count = check_decoding(args.file, reporter)
    result: dict = {"tensors_decoded_alike": count}
    if args.against:
        from .evaluation.verify import compare_models, compare_on_text

        shown = lambda done, total: reporter.progress(done, total, "measuring")  # noqa: E731
        if args.task:
            from .inputs.load_task import load_task
            from .inputs.tokenize_task import tokenize_for_loss
            from .inputs.tokenizer import ModelTokenizer

            task = load_task(Path(args.task), columns, args.n_samples)
            tokenizer = ModelTokenizer(args.against, reporter.say)
            texts, begins = tokenize_for_loss(args.loss, task, tokenizer, args.n_samples, 2048)
            quality = compare_models(args.against, args.file, texts, args.threads, shown, begins=begins)
        else:
            from .inputs.task_files import read_text

            quality = compare_on_text(
                args.against, args.file, read_text(Path(args.text)), 512, args.n_samples, args.threads, shown
            )
        result |= quality.as_dict()
    if args.json:
        print(json.dumps(result))
        return
    print(f"{count} tensors of {args.file} decode alike in Python and in C")
    if args.against:
        print(f"on {quality.n_tokens} tokens against {args.against}:")
        print(f"  KL divergence     {quality.kl:.4f} +- {quality.kl_stderr:.4f} nats a token")
        print(
            f"  perplexity        {quality.ppl:.3f} (reference {quality.ref_ppl:.3f}, ratio {quality.ppl_ratio:.4f} "
            f"+- {quality.ppl_ratio_stderr:.4f})"
        )
        print(f"  top-1 agreement   {100 * quality.top1:.2f} +- {100 * quality.top1_stderr:.2f} %")


def run_compare(argv: list[str], prog: str) -> None:
    args = compare_parser(prog).parse_args(argv)
    from .evaluation.compare_rows import json_line, table, write_json
    from .evaluation.compare_stock import CompareConfig, Scoring, compare_stock
    from .evaluation.plot_compare import check_picture, plot_compare
    from .files import claimed

    for outfile in filter(None, (args.outfile_json, args.png)):
        if not Path(outfile).parent.is_dir():
            raise TacqError(f"There is no folder {Path(outfile).parent} for the output; make it, or give another.")
    if args.png:
        check_picture()
    held_out = Path(args.eval)
    scoring = [] if args.score == "none" else [Scoring(args.score, held_out, args.n_score)]
    config = CompareConfig(
        args.model,
        Path(args.task),
        held_out,
        Path(args.workdir),
        args.file and [Path(file) for file in args.file],
        args.types and args.types.split(","),
        args.emulate.split(",") if args.emulate else (),
        args.n_samples,
        args.n_eval,
        args.loss,
        args.text and Path(args.text),
        args.n_windows,
        scoring,
        args.embedding_type,
        args.embedding_type,
        args.threads,
        parse_columns(args.columns),
    )
    with claimed(config.workdir, f"compares files of {args.model}"):
        rows = compare_stock(config, ConsoleReporter())
    if args.outfile_json:
        write_json(rows, Path(args.outfile_json))
    if args.png:
        plot_compare(
            rows,
            Path(args.png),
            Path(args.model.rstrip("/")).name.removesuffix(".gguf"),
            f"{rows[0].n_tokens} tokens of {held_out.name}",
        )
    print("\n".join(table(rows)))
    print(json_line(rows))


def run_prompt(argv: list[str], prog: str) -> None:
    args, more = run_parser(prog).parse_known_args(argv)
    from .runtime.run_model import run

    run(args.file, args.prompt, args.n_predict, args.threads, args.ctx_size, args.temp, extra=more)
    print()


def run_dequantize(argv: list[str], prog: str) -> None:
    args = dequantize_parser(prog).parse_args(argv)
    from .format.write_gguf import dequantize_gguf

    outfile = checked_outfile(args)
    dequantize_gguf(args.file, outfile, args.outtype, ConsoleReporter())
    print(f"{outfile}: {outfile.stat().st_size / 1e6:.1f} MB")


def run_runtime(argv: list[str], prog: str) -> None:
    from .runtime.build import BACKEND_OPTIONS, runtime_build, runtime_path

    args = runtime_parser(prog, list(BACKEND_OPTIONS)).parse_args(argv)
    if args.action == "build":
        reporter = ConsoleReporter()
        runtime_build(args.backend, args.jobs, build_progress(reporter), reporter.say)
    print(runtime_path(args.backend))


RUN = {
    "export": run_export,
    "answer": run_answer,
    "inspect": run_inspect,
    "verify": run_verify,
    "compare": run_compare,
    "run": run_prompt,
    "dequantize": run_dequantize,
    "runtime": run_runtime,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 after a TacqError, 2 for wrong usage, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    named = (
        bool(argv) and argv[0] in RUN and not (argv[0] != "runtime" and os.path.exists(argv[0]) and "--task" in argv)
    )
    command = argv[0] if named else "export"
    prog = f"tacq-export {command}" if named else "tacq-export"
    if command != "run":  # llama.cpp's own programs keep their setting
        wait_passively()

    def run() -> None:
        check_system()
        RUN[command](argv[1:] if named else argv, prog)

    return guarded(
        run,
        "interrupted; the same command with --resume goes on with an export",
    )
