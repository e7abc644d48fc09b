"""The command line: parse, call, print. Exit status 0 done, 1 a fault, 2 the user's mistake, 3 stopped but saved."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from scaletrain.errors import Interrupted, UserError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""One trainer for every model family: a run is a recipe, which is a YAML file of values.

    \b
    Examples:
      scaletrain run quickstart                        train on an embedded data set, in minutes
      scaletrain ls                                    what else there is
      scaletrain run vision/cnn train.duration='3 epochs' data.train=photos/
      scaletrain cp lm/pretrain mine.yaml              a recipe of your own, to edit and run
      accelerate launch --config_file launch/cpu_2.yaml -m scaletrain run quickstart
    """,
)


def main() -> None:
    """Run the command line."""
    _quieten()
    app(prog_name="scaletrain")


def _quieten() -> None:
    """Keep out what libraries print and the user can do nothing about; let the package itself be heard."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    libraries = r"(transformers|peft|accelerate|torch|bitsandbytes)"
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    own = logging.getLogger("scaletrain")
    own.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        own.addHandler(handler)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, with the exit statuses of this program."""

    @app.command()
    @functools.wraps(function)
    def command(**options: Any) -> None:
        try:
            function(**options)
        except (UserError, Interrupted) as error:
            # What every process raises alike is told once; what one meets alone, it tells itself.
            if os.environ.get("RANK", "0") == "0" or getattr(error, "agreed", None) is False:
                if options.get("verbose"):
                    traceback.print_exc()
                print(f"{'error' if isinstance(error, UserError) else 'interrupted'}: {error}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, UserError) else 3) from None

    return command


def _complete(incomplete: str) -> list[str]:
    from scaletrain.catalog import names

    return [name for name in names() if name.startswith(incomplete)]


Name = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A recipe's name, or a YAML file.", autocompletion=_complete)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as `train.global_batch=64`."),
]
Code = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Python file with an objective of your own, typed by its stem.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of every error.")]
Root = Annotated[Path, typer.Option(metavar="DIR", help="Where run folders stand.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name in --root.")]


@_command
def ls(
    json: Annotated[bool, typer.Option("--json", help="Print everything the headers say, for programs.")] = False,
) -> None:
    """List the recipes: name, family, one line, and what each needs."""
    from scaletrain.catalog import list_recipes

    recipes = list_recipes()
    if json:
        _print_json([{"name": r.name, "family": r.family, "summary": r.summary, **r.facts} for r in recipes])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, wrap in (("name", False), ("family", False), ("", True), ("needs", True)):
        table.add_column(column, no_wrap=not wrap, overflow="fold")
    for r in recipes:
        table.add_row(r.name, r.family, r.summary, r.needs)
    Console(markup=False, highlight=False).print(table)


@_command
def show(name: Name) -> None:
    """Print a recipe as it is written."""
    from scaletrain.catalog import find

    print(find(name).read_text(encoding="utf-8"), end="")


@_command
def cp(name: Name, file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; must not exist.")]) -> None:
    """Copy a recipe, to edit and run it."""
    from scaletrain.catalog import copy

    copy(name, file)
    print(f"{file}: edit it, then `scaletrain run {file}`")


@_command
def validate(
    name: Name,
    overrides: Overrides = None,
    data: Annotated[int, typer.Option(min=0, metavar="N", help="Print so many rows, and what is learned of them.")] = 0,
    code: Code = None,
    verbose: Verbose = False,
) -> None:
    """Check a recipe and its data: all that can be known before a device is touched.

    Where the family can tell, it says what is learned of the data: lengths, what is cut, duplicates, padding.

    \b
    Examples:
      scaletrain validate mine.yaml
      scaletrain validate mine.yaml --data 3
      scaletrain validate lm/lora networks.model.path=models/llama data.train=chats.jsonl
    """
    recipe = _load(name, overrides, code)
    from scaletrain.recipe import stages
    from scaletrain.runs import validate as check

    found, inspections = check(recipe)
    for label, inspection in inspections:
        for line in (*inspection.lines, *inspection.more):
            print(f"{label}: {line}")
        if data and inspection.rows:
            _print_rows(inspection.rows(data))
    for _, inspection in inspections:
        if inspection.wrong:
            raise UserError("\n".join(inspection.wrong))
    parts = ", ".join(stage.name for stage in stages(recipe))
    print(f"{name} is valid: {found}")
    if recipe.stages:
        print(f"stages: {parts}")


@_command
def plan(
    name: Name,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many, on all machines together.")] = 1,
    engine: Annotated[str, typer.Option(help="ddp, fsdp2, hsdp, zero1, zero2 or zero3.")] = "ddp",
    offload: Annotated[bool, typer.Option("--offload", help="Weights and optimiser are kept in host memory.")] = False,
    device: Annotated[str, typer.Option(help="gpu or cpu.")] = "gpu",
    device_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of one device: 80GB, 24GiB.")] = None,
    throughput: Annotated[float | None, typer.Option(min=0.0, help="Tokens (or samples) in a second, of all.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything, in bytes, for programs.")] = False,
    code: Code = None,
    verbose: Verbose = False,
) -> None:
    """Tell what a run will need, without a GPU and without weights: memory by kind, the largest micro-batch, hours.

    \b
    Examples:
      scaletrain plan lm/pretrain data.train=corpus.txt --processes 8 --engine zero3 --device-memory 80GB
      scaletrain plan mine.yaml --processes 8 --engine fsdp2 --device-memory 24GiB --throughput 12000
    """
    recipe = _load(name, overrides, code)
    from scaletrain.planning.plan import plan as needs_of
    from scaletrain.planning.plan import read_memory
    from scaletrain.planning.report import as_text, as_values
    from scaletrain.planning.share import Way

    if device not in ("gpu", "cpu"):
        raise UserError(f"--device: {device} is neither gpu nor cpu.")
    memory = read_memory(device_memory) if device_memory else None
    found = []
    for needs in needs_of(recipe, Way(engine, processes, offload, device == "gpu"), memory, throughput):
        found.append(as_values(needs))
        if not json:
            print(as_text(needs))
    if json:
        _print_json(found)


@_command
def run(
    name: Name,
    overrides: Overrides = None,
    run: Annotated[
        str | None,
        typer.Option("--run", "--name", metavar="NAME", help="The run folder's name; the recipe's by default."),
    ] = None,
    root: Root = Path("checkpoints"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to reuse a folder, instead of resuming.")] = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Go on with a run that is finished, or whose data, duration or batch changed."),
    ] = False,
    code: Code = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch", metavar="FILE", help="Start the processes that a configuration of accelerate asks for."
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Train a recipe, or resume where its run folder has a checkpoint.

    \b
    Examples:
      scaletrain run quickstart
      scaletrain run gan/dcgan data.train=photos/ --run photos
      scaletrain run quickstart stages.teacher.train.duration='500 steps'
      scaletrain run lm/lora ... train.duration='6 epochs' --extend
      scaletrain run mine.yaml --code my_objective.py
      scaletrain run quickstart --launch cpu_2         as launch/cpu_2.yaml says; also a file of your own
      scaletrain run quickstart --launch 'two_nodes --machine_rank 0 --main_process_ip 10.0.0.1'
    """
    recipe = _load(name, overrides, code)
    if launch is not None:
        from scaletrain.launching import start, without_launch

        raise typer.Exit(start(launch, without_launch(sys.argv[1:]), verbose))
    from scaletrain.catalog import run_name
    from scaletrain.runs import train

    train(recipe, run_name(name) if run is None else run, root, fresh, extend=extend)


@_command
def sample(
    run: RunFolder,
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The family's options.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 16,
    prompt: Annotated[list[str] | None, typer.Option(help="For families that take text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The recipe's by default.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="STEM", help="By default RUN/samples/drawn.")] = None,
    root: Root = Path("checkpoints"),
    code: Code = None,
    verbose: Verbose = False,
) -> None:
    """Draw samples from the newest verified checkpoint.

    \b
    Examples:
      scaletrain sample quickstart --count 64 steps=4
      scaletrain sample checkpoints/lm-pretrain --prompt 'Once upon a time'
    """
    from scaletrain.catalog import find_run
    from scaletrain.overrides import options_of

    folder, given = find_run(run, root), options_of(options or [])
    _load_code(code)
    from scaletrain import finished
    from scaletrain.callbacks.pictures import write_samples

    samples = finished.sample(folder, count, tuple(prompt or ()), seed, **given)
    for text in samples.texts or ():
        print(text)
    for path in write_samples(out or folder / "samples" / "drawn", samples):
        print(path, file=sys.stderr)


@_command
def chat(
    run: RunFolder,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="How answers are drawn, such as temperature=0.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system turn before the first.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The recipe's by default.")] = None,
    root: Root = Path("checkpoints"),
    code: Code = None,
    verbose: Verbose = False,
) -> None:
    """Talk with the newest verified checkpoint; each line is a turn. /system TEXT, /undo and /reset are commands.

    \b
    Examples:
      scaletrain chat lm-lora --system 'Answer in one word.' temperature=0
      echo 'Who wrote Faust?' | scaletrain chat lm-lora --max-new-tokens 20
    """
    from scaletrain.catalog import find_run
    from scaletrain.overrides import options_of

    folder, given = find_run(run, root), options_of(options or [])
    _load_code(code)
    from scaletrain.chat import chat as talk

    talk(folder, system, seed, given | ({"max_new_tokens": max_new_tokens} if max_new_tokens else {}))


@_command
def evaluate(
    run: RunFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Other data than the recipe's, with the same columns; or {path: ..., columns: ...}."),
    ] = None,
    generate: Annotated[
        int | None, typer.Option(min=1, metavar="ROWS", help="Compare generated answers, to so many rows of each file.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of EleutherAI's harness, or YAML files; by commas."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics for programs.")] = False,
    root: Root = Path("checkpoints"),
    code: Code = None,
    verbose: Verbose = False,
) -> None:
    """Evaluate the newest verified checkpoint.

    \b
    Examples:
      scaletrain evaluate text-classify
      scaletrain evaluate checkpoints/text-classify --data test.parquet --json
      scaletrain evaluate lm-lora --data a.jsonl --data b.jsonl --generate 200
      scaletrain evaluate lm-lora --lm-eval hellaswag,arc_easy
    """
    from scaletrain.catalog import find_run

    folder = find_run(run, root)
    _load_code(code)
    from scaletrain import finished
    from scaletrain.callbacks.progress import table

    sources: tuple[str, ...] = ()
    if lm_eval and not (data or generate):
        metrics, report = finished.evaluate_tasks(folder, lm_eval.split(",")), None
    elif lm_eval:
        raise UserError("--lm-eval has data of its own: leave out --data and --generate.")
    else:
        metrics, sources, report = finished.evaluate(folder, data or [], generate)
    if os.environ.get("RANK", "0") != "0":
        return
    if json:
        _print_json(metrics)
        return
    if metrics:
        print(table(metrics, sources) or "\n".join(f"{name:24} {value:.6g}" for name, value in metrics.items()))
    if report:
        print(report.text)


@_command
def verify(run: RunFolder, root: Root = Path("checkpoints"), verbose: Verbose = False) -> None:
    """Check every checkpoint of a run; exit status 1 if one is damaged."""
    from scaletrain.catalog import find_run
    from scaletrain.checkpoint import layout
    from scaletrain.checkpoint.integrity import verify as faults_of

    folder = find_run(run, root)
    found = layout.checkpoints(folder)
    if not found:
        raise UserError(f"{folder} has no checkpoints.")
    faults = {checkpoint: faults_of(checkpoint) for checkpoint in found}
    for checkpoint, wrong in faults.items():
        print(f"{checkpoint}: {'ok' if not wrong else 'DAMAGED'}")
        for line in wrong:
            print(f"  {line}")
    if any(faults.values()):
        raise typer.Exit(1)


@_command
def inspect(
    run: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder or its name, or a checkpoint.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything, for programs.")] = False,
    root: Root = Path("checkpoints"),
    verbose: Verbose = False,
) -> None:
    """Tell what a checkpoint holds, or a run's newest one: step, networks, players, position, bytes."""
    from scaletrain.catalog import find_run
    from scaletrain.checkpoint.describe import as_text, describe
    from scaletrain.checkpoint.layout import MANIFEST

    found = describe(Path(run) if (Path(run) / MANIFEST).is_file() else find_run(run, root))
    if json:
        _print_json(found)
    else:
        print(as_text(found))


NewFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")]
Group = Annotated[int | None, typer.Option(min=8, help="int4: weights that share a scale; 32 by default.")]


def _print_written(written: list[Any]) -> None:
    for part in written:
        print(part.path)
        for note in part.notes:
            print(f"  {note}")


@_command
def export(
    run: RunFolder,
    folder: NewFolder,
    merge: Annotated[bool, typer.Option("--merge", help="Fold adapters into the weights that they go over.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    quantize: Annotated[str | None, typer.Option(metavar="METHOD", help="As `scaletrain quantize --method`.")] = None,
    group: Group = None,
    root: Root = Path("checkpoints"),
    code: Code = None,
    verbose: Verbose = False,
) -> None:
    """Write the trained weights in their library's layout, and prove that it loads them as they were trained.

    transformers, diffusers and peft load the folders as they are.

    \b
    Examples:
      scaletrain export text-classify out/
      scaletrain export lm-lora out/ --merge --dtype bfloat16
    """
    from scaletrain.catalog import find_run

    source = find_run(run, root)
    _load_code(code)
    from scaletrain.export.run import Form, export_run

    _print_written(export_run(source, folder, Form(merge, dtype, quantize, group)))  # type: ignore[arg-type]


@_command
def quantize(
    run: RunFolder,
    folder: NewFolder,
    method: Annotated[str, typer.Option(help="int8, int8-dynamic, int4, bnb-int8 or bnb-nf4.")],
    group: Group = None,
    data: Annotated[list[str] | None, typer.Option(help="Other data than the recipe's to evaluate on.")] = None,
    root: Root = Path("checkpoints"),
    code: Code = None,
    verbose: Verbose = False,
) -> None:
    """Export the trained weights quantised; print loss, size and speed before and after.

    \b
    Examples:
      scaletrain quantize lm-pretrain out/ --method int4 --group 32
      scaletrain quantize text-classify out/ --method bnb-nf4 --data test.jsonl
    """
    from scaletrain.catalog import find_run

    source = find_run(run, root)
    _load_code(code)
    from scaletrain.export.run import Form
    from scaletrain.quantize import quantize_run

    written, table = quantize_run(source, folder, Form(quantize=method, group=group), data)  # type: ignore[arg-type]
    _print_written(written)
    print(table)


@_command
def encode(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run with an autoencoder, or a pipeline.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="As data.train; or {path: ..., columns: ...}.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a new file ending in .parquet.")],
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Encode prompts too, by a pipeline.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of a square that pictures are brought to.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows encoded at a time.")] = 32,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of each file of a folder; 10,000.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    root: Root = Path("checkpoints"),
    verbose: Verbose = False,
) -> None:
    """Write the latents of pictures, and what texts say, to Parquet, to train denoisers on.

    \b
    Examples:
      scaletrain encode diffusion-latent photos/ latents/
      scaletrain encode models/sd15 captioned.parquet latents/ --text caption --size 512
    """
    from scaletrain.catalog import is_run
    from scaletrain.encode import Options
    from scaletrain.encode import encode as write
    from scaletrain.finished import source_of

    if dtype not in ("float32", "float16"):
        raise UserError(f"--dtype {dtype}: it is float32 or float16.")
    options = Options(text, size, batch, rows, dtype)  # type: ignore[arg-type]
    count = write(source, is_run(source, root), source_of(data), out, options)
    print(f"{out}: {count:,} rows")


@_command
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from scaletrain.recipe import json_schema

    _print_json(json_schema())


def _load(name: str, overrides: list[str] | None, code: Path | None) -> Any:
    from scaletrain.recipe import load

    recipe = load(name, overrides or [])
    _load_code(code)
    return recipe


def _load_code(code: Path | None) -> None:
    if code is not None:
        from scaletrain.recipe import load_code

        load_code(code)


def _print_rows(rows: list[tuple[str, list[tuple[str, bool]]]]) -> None:
    """Print rows with what is learned of them in colour; between ⟦ and ⟧ where there is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for name, pieces in rows:
        line = Text(f"\n{name}\n", "bold")
        for text, learned in pieces:
            plain = learned and not console.is_terminal
            line.append(f"⟦{text}⟧" if plain else text, "bold green" if learned else "dim")
        console.print(line)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))
