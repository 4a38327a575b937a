"""The commands `capture` and `status`: what each takes, and the function that it calls."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from coldstill import api
from coldstill.common.config_file import load_config
from coldstill.common.packages import require_packages

from .output import show_result, stdout_console, word
from .settings_file import MAKE, NOTHING_DONE, Config, Overrides, Summary, command_with_keys

capture_commands = typer.Typer()


@capture_commands.command(rich_help_panel=MAKE, cls=command_with_keys("coldstill.pipeline.config", "CaptureConfig"))
def capture(
    config: Config,
    overrides: Overrides = None,
    summary: Summary = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the source, print what the capture would cost, write nothing.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: score for a minute on one worker, to estimate hours and cost."),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Read all files of the dataset, and make units with changed bytes again."),
    ] = False,
) -> None:
    """Run a teacher over a source and write a dataset of its distributions.

    Re-run the same command to resume after an interruption: committed units are kept.

    On a finished dataset it makes only those units again whose files are gone or cut.
    """
    require_packages("capture", "ray", "torch", "transformers")
    from coldstill.pipeline.config import CaptureConfig
    from coldstill.storage_schema.manifest import MANIFEST_NAME
    from coldstill.storage_schema.store.retrying import RetryingStore

    settings = load_config(config, model=CaptureConfig, overrides=overrides or ())
    if probe and not dry_run:
        raise typer.BadParameter("--probe needs --dry-run")
    if repair and dry_run:
        raise typer.BadParameter("--repair writes, and --dry-run writes nothing")
    if dry_run:
        from coldstill.pipeline.dry_run import dry_run as run_dry

        then = (
            ""
            if probe
            else "Of a sharp and a flat teacher; --probe measures yours. Bytes most are a bound: none takes more."
        )
        show_result(run_dry(settings, probe=probe).lines(), title="dry run", summary=summary, then=then)
        return
    store = RetryingStore(settings.output, retry_for_s=settings.cluster.store_retry_s, is_first=True)
    was_finished = store.exists(MANIFEST_NAME)
    result = api.capture(settings, repair=repair).model_dump(exclude_none=True)
    show_result(
        _captured(result, settings.output),
        title="capture",
        summary=summary,
        places={"dataset": settings.output},
        then=(NOTHING_DONE if was_finished and "repaired" not in result else "")
        + f"Next: coldstill verify --deep {word(settings.output)}, and `dataset: {settings.output}` in the settings of "
        "coldstill train.",
    )


def _captured(result: dict[str, Any], output: str) -> dict[str, Any]:
    """The summary of a capture with the rejects of each reason in a line of its own, and where they are listed."""
    reasons, layouts = result.pop("reject_reasons"), result.pop("read_as")
    rejected = {f"rejected: {reason}": count for reason, count in reasons.items()}
    if rejected:
        rejected["rejects are listed in"] = f"{output.rstrip('/')}/rejects"
    return {**({"read as": "; ".join(layouts)} if layouts else {}), **result, **rejected}


@capture_commands.command(rich_help_panel=MAKE)
def status(
    root: Annotated[
        str,
        typer.Argument(metavar="ROOT", help="Output of a capture (a folder, s3:// or gs://) or of rounds."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; with --watch, one per line.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until it ends or its driver dies.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two refreshes of --watch.")] = 10.0,
) -> None:
    """Show the progress of a capture: units done and failed, speed, end, cost; or of rounds, and of their part.

    Reads only the output directory, so it works from any machine, during the capture, after a crash and after the end.
    """
    from coldstill.pipeline.driver.status import read_status
    from coldstill.rounds.status import holds_rounds, read_rounds_status

    from .status_table import AnyStatus, show_status, watch_status

    def read() -> AnyStatus:
        return read_rounds_status(root) if holds_rounds(root) else read_status(root)

    if watch and not as_json:
        watch_status(read, every_s=every, console=stdout_console())
        return
    found = read()
    while watch and not found.is_over:
        typer.echo(found.model_dump_json())
        time.sleep(every)
        found = read()
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        show_status(found, console=stdout_console())
