"""The commands of the dataset tools: what each takes, and the tool that it calls.

A tool is imported when its command runs, so that `--help` stays quick.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel

from coldstill.common.config_file import check_config
from coldstill.common.packages import require_packages
from coldstill.tools.exchange.settings import AxolotlSettings, DistillKitSettings

from .output import show_result, stdout_console, writable

if TYPE_CHECKING:
    from coldstill.storage_schema.dataset import Dataset
    from coldstill.storage_schema.manifest import Manifest

LOOK = "Examine a dataset"
SHARE = "Share a dataset"
DERIVE = "Derive a dataset"

dataset_commands = typer.Typer(no_args_is_help=True)
imports = typer.Typer(no_args_is_help=True, help="Import a dataset that another tool captured.")
exports = typer.Typer(no_args_is_help=True, help="Export a dataset to a layout that other tools read.")
dataset_commands.add_typer(imports, name="import", rich_help_panel=DERIVE)
dataset_commands.add_typer(exports, name="export", rich_help_panel=SHARE)

Root = Annotated[str, typer.Argument(metavar="ROOT", help="The dataset's directory, or a URL that fsspec opens.")]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="The new dataset: a folder, s3:// or gs://.")]


def takes_settings(model: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command so that its parameter `settings` is given as one option per field of `model`.

    Names, types, defaults and help texts of the options are those of the fields. Raises `ConfigInvalid` for a value
    that the model does not accept.
    """
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=Annotated[field.annotation, typer.Option(help=field.description)],
        )
        for name, field in model.model_fields.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        arguments = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "settings"
        ]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            given = {name: values.pop(name) for name in model.model_fields}
            command(**values, settings=check_config(given, model=model, where="options"))

        parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in arguments), *options]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


@dataset_commands.command(rich_help_panel=LOOK)
def verify(
    root: Root,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every row and check every value.")] = False,
) -> None:
    """Check that a dataset holds what its manifest lists.

    Prints one line per finding, and exits with code 1 if there is any.
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


@dataset_commands.command("inspect", rich_help_panel=LOOK)
def inspect_(
    root: Root,
    row: Annotated[int | None, typer.Argument(metavar="ROW", help="Row number, starting at 0.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE", callback=writable, help="Write the row to this file as an HTML page that works offline."
        ),
    ] = None,
) -> None:
    """Print what a dataset holds, or one of its rows token by token with the teacher's predictions."""
    if html is not None:
        from coldstill.tools.inspect.page import write_page

        write_page(root, row or 0, html)
        typer.echo(str(html))
        return
    from coldstill.tools.inspect.terminal import show_dataset, show_row

    if row is None:
        show_dataset(root, console=stdout_console())
    else:
        show_row(root, row, console=stdout_console())


@dataset_commands.command(rich_help_panel=LOOK)
def stats(
    root: Root,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=writable, help="Also write all figures to this file, as JSON."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=writable, help="Also draw the histograms into this file.")
    ] = None,
) -> None:
    """Measure a dataset: bytes by stream, entropy, tail mass, label ranks, lengths."""
    from coldstill.tools.stats.measure import measure_stats
    from coldstill.tools.stats.table import show_stats

    if png is not None:
        require_packages("share", "matplotlib")
    measured = measure_stats(root)
    show_stats(measured, console=stdout_console())
    if json is not None:
        from coldstill.tools.inspect.page import put_page

        put_page(json, f"{measured.model_dump_json(indent=2)}\n".encode())
    if png is not None:
        from coldstill.tools.stats.plot import write_plot

        write_plot(measured, png)


@dataset_commands.command(rich_help_panel=SHARE)
def card(
    root: Root,
    replace: Annotated[bool, typer.Option("--replace", "--force", help="Overwrite a card that was edited.")] = False,
) -> None:
    """Write the dataset card, README.md, and a preview for the Hub's viewer."""
    require_packages("share", "matplotlib")
    from coldstill.tools.card.card import write_card

    typer.echo(write_card(root, replace=replace))


@dataset_commands.command(rich_help_panel=SHARE)
def push(
    root: Root,
    destination: Annotated[str, typer.Argument(help="hf://datasets/ORG/NAME[@REVISION], s3://, gs:// or a folder.")],
    public: Annotated[
        bool, typer.Option("--public", help="On the Hub: create the repository as a public one.")
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            "--force",
            help="Overwrite a card that was edited there. On the Hub, also remove what else the branch holds.",
        ),
    ] = False,
) -> None:
    """Verify a sealed dataset and upload it. Re-run the same command to resume."""
    if destination.startswith("hf://"):
        require_packages("share", "huggingface_hub")
    from coldstill.tools.push import push as run_push

    show_result(run_push(root, destination, private=not public, replace=replace)._asdict(), title="pushed")


@dataset_commands.command(rich_help_panel=SHARE)
def pull(
    source: Annotated[str, typer.Argument(help="hf://datasets/ORG/NAME[@REVISION], s3://, gs://, https:// or a path.")],
    folder: Annotated[str, typer.Argument(help="A local folder.")],
) -> None:
    """Download a dataset into a local folder and verify it. Re-run the same command to resume."""
    if source.startswith("hf://"):
        require_packages("share", "huggingface_hub")
    from coldstill.tools.pull import pull as run_pull

    show_result(run_pull(source, folder)._asdict(), title="pulled")


@dataset_commands.command(rich_help_panel=DERIVE)
def merge(
    roots: Annotated[list[str], typer.Argument(metavar="ROOT", help="At least two datasets of one teacher.")],
    output: Annotated[str, typer.Option(help="The new dataset: a folder, s3:// or gs://.")],
) -> None:
    """Merge datasets into one, without encoding anything again. Datasets whose headers conflict are refused."""
    from coldstill.tools.derive.merge import merge as run_merge

    _show_dataset(run_merge(roots, output), title="merged")


@dataset_commands.command(rich_help_panel=DERIVE)
def split(
    root: Root,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder for the parts.")],
    part: Annotated[
        list[str],
        typer.Option(metavar="NAME=SHARE", help="A part and its share, such as train=0.95; the shares add up to 1."),
    ],
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
) -> None:
    """Split a dataset by sample id. Rows with equal ids stay together; a row keeps its part when the dataset grows."""
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
            help="KEY: sample_id, tokens, targets, media (images) or metadata.a.b. OP: == != < <= > >= or ~ (regular "
            "expression). A row must pass every filter.",
        ),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="START:STOP", help="Take only these row numbers, STOP excluded.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take at most this many rows, the first ones.")] = None,
) -> None:
    """Copy selected rows to a new dataset, as in `coldstill subset ROOT OUTPUT --filter "tokens <= 512"`."""
    from coldstill.tools.derive.subset import subset as run_subset

    _show_dataset(run_subset(root, output, filters=filter or (), rows=rows, limit=limit), title="subset")


@dataset_commands.command(rich_help_panel=DERIVE)
def upgrade(root: Root) -> None:
    """Give a dataset of an earlier format a header of the newest one, in place. Its shards stay; it gets a new id."""
    from coldstill.tools.upgrade import upgrade as run_upgrade

    dataset = run_upgrade(root)
    _show_dataset(dataset, title=f"format {dataset.header.format_version}")


@imports.command("distillkit")
@takes_settings(DistillKitSettings)
def import_distillkit(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or file of an arcee-ai DistillKit capture.")],
    output: Output,
    settings: DistillKitSettings,
) -> None:
    """Import an arcee-ai DistillKit capture of either compressor. It has no draws, and its tail mass is derived."""
    from coldstill.tools.exchange.distillkit_import import import_distillkit as run_import

    _show_imported(run_import(source, output, settings))


@imports.command("axolotl")
@takes_settings(AxolotlSettings)
def import_axolotl(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, .parquet or .jsonl file in axolotl's KD layout.")
    ],
    output: Output,
    settings: AxolotlSettings,
) -> None:
    """Import ids and log-probs in axolotl's KD layout. It has no draws, and its tail mass is derived."""
    from coldstill.tools.exchange.axolotl_import import import_axolotl as run_import

    _show_imported(run_import(source, output, settings))


@exports.command("axolotl")
def export_axolotl(root: Root, output: Output) -> None:
    """Write axolotl's KD layout: token ids, and the ids and log-probs of each position as lists."""
    from coldstill.tools.exchange.export import export_axolotl as run_export

    show_result({"files": len(run_export(root, output))}, title="exported")


@exports.command("plain")
def export_plain(root: Root, output: Output) -> None:
    """Write all values decoded, as Parquet lists that need no code of ours. About eight times the size."""
    from coldstill.tools.exchange.export import export_plain as run_export

    show_result({"files": len(run_export(root, output))}, title="exported")


def _show_imported(manifest: Manifest) -> None:
    show_result({"rows": manifest.rows, "targets": manifest.targets, "rejected": manifest.rejected}, title="imported")


def _show_dataset(dataset: Dataset, *, title: str) -> None:
    figures = {"dataset_id": dataset.dataset_id, "rows": len(dataset), "targets": dataset.manifest.targets}
    show_result({"at": dataset.store.url, **figures}, title=title)
