"""The command line of the dataset tools: words in, a call of one tool, its result on the terminal.

Each tool is imported when its command runs: `--help` and what needs no extra packages stay quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from coldstill.common.packages import require_packages

from .output import show_result

LOOK = "Look at a dataset"
SHARE = "Share a dataset"
DERIVE = "Make datasets of datasets"

dataset_commands = typer.Typer(no_args_is_help=True)
imports = typer.Typer(no_args_is_help=True, help="Take over a dataset that another tool captured.")
exports = typer.Typer(no_args_is_help=True, help="Write a dataset in a layout that other tools read.")
dataset_commands.add_typer(imports, name="import", rich_help_panel=DERIVE)
dataset_commands.add_typer(exports, name="export", rich_help_panel=SHARE)

Root = Annotated[str, typer.Argument(metavar="ROOT", help="The dataset's directory, or a URL that fsspec reaches.")]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="The new dataset: a folder, s3:// or gs://.")]
Tokenizer = Annotated[Path, typer.Option(help="Folder with the teacher's tokenizer.json.")]
Teacher = Annotated[str, typer.Option(help="The teacher's name, for the header.")]
Revision = Annotated[str | None, typer.Option(help="The teacher's revision, for the header.")]
VocabSize = Annotated[int | None, typer.Option(help="Logit columns of the teacher; by default the tokenizer's ids.")]
Fidelity = Annotated[Literal["fine", "coarse", "exact"], typer.Option(help="What storage may cost; see FORMAT.md.")]
Licence = Annotated[str | None, typer.Option(help="Under which terms the dataset may be used.")]
BadRows = Annotated[
    Literal["fail", "reject"], typer.Option(help="A row that cannot be used ends the import, or goes to the rejects.")
]
RowsPerUnit = Annotated[int, typer.Option(help="Rows of a shard: what a kill can cost at the most.")]


@dataset_commands.command(rich_help_panel=LOOK)
def verify(
    root: Root,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every row and check every value too.")] = False,
) -> None:
    """Check that a dataset holds what its manifest says.

    Where it does not: one line per finding, and exit code 1.
    """
    from coldstill.storage_schema.dataset import open_dataset
    from coldstill.tools.verify import verify as run_verify

    findings = run_verify(root, deep=deep)
    for finding in findings:
        typer.echo(finding.line)
    if findings:
        raise typer.Exit(1)
    dataset = open_dataset(root)
    show_result(
        {
            "dataset_id": dataset.dataset_id,
            "shards": len(dataset.shards),
            "rows": len(dataset),
            "targets": dataset.manifest.targets,
            "checked": "files, digests and every value" if deep else "files and digests",
        },
        title="verified",
    )


@dataset_commands.command(rich_help_panel=LOOK)
def inspect(
    root: Root,
    row: Annotated[int | None, typer.Argument(metavar="[ROW]", help="Number of a row, from 0 on.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Write the row as a page that needs no net.")
    ] = None,
) -> None:
    """Show what a dataset is, or one row of it: token by token, with what the teacher expected there."""
    require_packages("share", "tokenizers")
    if html is not None:
        from coldstill.tools.inspect.page import write_page

        write_page(root, row or 0, html)
        typer.echo(str(html))
        return
    from coldstill.tools.inspect.terminal import show_dataset, show_row

    if row is None:
        show_dataset(root, console=Console())
    else:
        show_row(root, row, console=Console())


@dataset_commands.command(rich_help_panel=LOOK)
def stats(
    root: Root,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the histograms.")] = None,
) -> None:
    """Measure a dataset: bytes by stream, entropy, tail mass, label ranks, lengths."""
    from coldstill.tools.stats.measure import measure_stats
    from coldstill.tools.stats.table import show_stats

    if png is not None:
        require_packages("share", "matplotlib")
    measured = measure_stats(root)
    show_stats(measured, console=Console())
    if json is not None:
        json.write_text(measured.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if png is not None:
        from coldstill.tools.stats.plot import write_plot

        write_plot(measured, png)


@dataset_commands.command(rich_help_panel=SHARE)
def card(
    root: Root, replace: Annotated[bool, typer.Option("--replace", help="Write over the card that is there.")] = False
) -> None:
    """Write the dataset's card, README.md: what it holds, what storage cost, how to load it."""
    require_packages("share", "matplotlib")
    from coldstill.tools.card.card import write_card

    typer.echo(write_card(root, replace=replace))


@dataset_commands.command(rich_help_panel=SHARE)
def push(
    root: Root,
    destination: Annotated[str, typer.Argument(help="hf://datasets/ORG/NAME[@REVISION], s3://, gs:// or a folder.")],
    public: Annotated[bool, typer.Option("--public", help="On the Hub: make a new repository public.")] = False,
) -> None:
    """Publish a sealed dataset, after verifying it. Interrupted, it goes on where it was."""
    if destination.startswith("hf://"):
        require_packages("share", "huggingface_hub")
    from coldstill.tools.hub.transfer import push as run_push

    show_result(run_push(root, destination, private=not public)._asdict(), title="pushed")


@dataset_commands.command(rich_help_panel=SHARE)
def pull(
    source: Annotated[str, typer.Argument(help="hf://datasets/ORG/NAME[@REVISION], s3://, gs://, https:// or a path.")],
    folder: Annotated[str, typer.Argument(help="A local folder.")],
) -> None:
    """Mirror a dataset into a local folder and verify it. Interrupted, it goes on where it was."""
    if source.startswith("hf://"):
        require_packages("share", "huggingface_hub")
    from coldstill.tools.hub.transfer import pull as run_pull

    show_result(run_pull(source, folder)._asdict(), title="pulled")


@dataset_commands.command(rich_help_panel=DERIVE)
def merge(
    roots: Annotated[list[str], typer.Argument(metavar="ROOT...", help="Two datasets or more, of one teacher.")],
    output: Annotated[str, typer.Option(help="The new dataset: a folder, s3:// or gs://.")],
) -> None:
    """Make one dataset of several. Nothing is encoded again; headers that disagree are refused."""
    from coldstill.tools.derive.merge import merge as run_merge

    _show_dataset(run_merge(roots, output), title="merged")


@dataset_commands.command(rich_help_panel=DERIVE)
def split(
    root: Root,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder of the parts.")],
    part: Annotated[list[str], typer.Option(metavar="NAME=SHARE", help="A part, as train=0.95; all add up to 1.")],
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
) -> None:
    """Split a dataset by sample id: equal ids stay together, and a row stays in its part when the dataset grows."""
    from coldstill.tools.derive.split import parse_parts
    from coldstill.tools.derive.split import split as run_split

    for name, dataset in run_split(root, output, parts=parse_parts(part), seed=seed).items():
        _show_dataset(dataset, title=name)


@dataset_commands.command(rich_help_panel=DERIVE)
def subset(
    root: Root,
    output: Output,
    filter: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="'KEY OP VALUE'",
            help="sample_id, tokens, targets or metadata.a.b; == != < <= > >= ~ (matches). All of several must hold.",
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="START:STOP", help="Only these rows, by number.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows, the first ones.")] = None,
) -> None:
    """Make a dataset of some rows of another, as `coldstill subset ROOT OUTPUT --filter "tokens <= 512"`."""
    from coldstill.tools.derive.subset import subset as run_subset

    _show_dataset(run_subset(root, output, filters=filter or (), rows=rows, limit=limit), title="subset")


@imports.command("distillkit")
def import_distillkit(
    source: Annotated[str, typer.Argument(help="Folder or file of an arcee-ai DistillKit capture.")],
    output: Output,
    tokenizer: Tokenizer,
    teacher: Teacher,
    revision: Revision = None,
    config: Annotated[Path | None, typer.Option(help="Its compression settings, where they are elsewhere.")] = None,
    vocab_size: VocabSize = None,
    pad_id: Annotated[int | None, typer.Option(help="Padding token: one at a document's end is cut off.")] = None,
    fidelity: Fidelity = "fine",
    rows_per_unit: RowsPerUnit = 64,
    licence: Licence = None,
    bad_rows: BadRows = "fail",
) -> None:
    """Import an arcee-ai DistillKit capture, of either compressor. It has no tail: it is derived, and no draws."""
    from coldstill.tools.exchange.distillkit import import_distillkit as run_import

    manifest = run_import(
        source,
        output,
        tokenizer=tokenizer,
        teacher=teacher,
        revision=revision,
        config=config,
        vocab_size=vocab_size,
        pad_id=pad_id,
        fidelity=fidelity,
        rows_per_unit=rows_per_unit,
        licence=licence,
        bad_rows=bad_rows,
    )
    show_result({"rows": manifest.rows, "targets": manifest.targets, "rejected": manifest.rejected}, title="imported")


@imports.command("axolotl")
def import_axolotl(
    source: Annotated[str, typer.Argument(help="Folder, .parquet or .jsonl file in axolotl's KD layout.")],
    output: Output,
    tokenizer: Tokenizer,
    teacher: Teacher,
    revision: Revision = None,
    predicts: Annotated[
        Literal["next", "same"] | None,
        typer.Option(help="Which token the log-probs at a position are about; by default the layout's own way."),
    ] = None,
    logprobs_field: Annotated[str, typer.Option(help="Column of the log-probs.")] = "logprobs",
    temperature: Annotated[float, typer.Option(help="At which they were taken; only 1 can be imported.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Entries of a position; by default those of the first.")] = None,
    vocab_size: VocabSize = None,
    fidelity: Fidelity = "fine",
    rows_per_unit: RowsPerUnit = 64,
    licence: Licence = None,
    bad_rows: BadRows = "fail",
) -> None:
    """Import ids and log-probs in axolotl's KD layout. It has no tail: it is derived, and no draws."""
    from coldstill.tools.exchange.axolotl import import_axolotl as run_import

    manifest = run_import(
        source,
        output,
        tokenizer=tokenizer,
        teacher=teacher,
        revision=revision,
        predicts=predicts,
        logprobs_field=logprobs_field,
        temperature=temperature,
        top_k=top_k,
        vocab_size=vocab_size,
        fidelity=fidelity,
        rows_per_unit=rows_per_unit,
        licence=licence,
        bad_rows=bad_rows,
    )
    show_result({"rows": manifest.rows, "targets": manifest.targets, "rejected": manifest.rejected}, title="imported")


@exports.command("axolotl")
def export_axolotl(root: Root, output: Output) -> None:
    """Write axolotl's KD layout: token ids, and ids and log-probs of each position as lists."""
    from coldstill.tools.exchange.axolotl_export import export_axolotl as run_export

    show_result({"files": len(run_export(root, output))}, title="exported")


@exports.command("plain")
def export_plain(root: Root, output: Output) -> None:
    """Write everything decoded, as lists that any Parquet reader understands. About eight times the size."""
    from coldstill.tools.exchange.plain import export_plain as run_export

    show_result({"files": len(run_export(root, output))}, title="exported")


def _show_dataset(dataset: object, *, title: str) -> None:
    from coldstill.storage_schema.dataset import Dataset

    assert isinstance(dataset, Dataset)
    figures = {"dataset_id": dataset.dataset_id, "rows": len(dataset), "targets": dataset.manifest.targets}
    show_result({"at": dataset.store.url, **figures}, title=title)
