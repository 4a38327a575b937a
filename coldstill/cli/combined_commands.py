"""The commands that both capture and train, `rounds` and `demo`: what each takes, and the function that it calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coldstill.common.config_file import load_config
from coldstill.common.packages import require_packages

from .output import show_result
from .settings_file import MAKE, Config, Overrides, Summary, command_with_keys

combined_commands = typer.Typer()


@combined_commands.command(rich_help_panel=MAKE, cls=command_with_keys("coldstill.rounds.config", "RoundsConfig"))
def rounds(
    config: Config,
    overrides: Overrides = None,
    summary: Summary = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the prompts, print the parts and what a round costs, write nothing.")
    ] = False,
) -> None:
    """Let the student answer prompts, the teacher score them and the student train on the scores, several times.

    Re-run the same command to resume after an interruption: finished parts are kept.
    """
    require_packages("capture,train", "accelerate", "ray", "torch", "transformers")
    from coldstill.rounds.config import RoundsConfig

    settings = load_config(config, model=RoundsConfig, overrides=overrides or ())
    if dry_run:
        from coldstill.rounds.estimate import estimate_rounds

        show_result(estimate_rounds(settings), title="dry run", summary=summary)
        return
    from coldstill.rounds.run import run_rounds

    show_result(run_rounds(settings).model_dump(), title="rounds", summary=summary)


@combined_commands.command(rich_help_panel=MAKE)
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for models, dataset and results; a second run resumes there. By default demo_output, or "
            "demo_vision_output with --vision."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A fifth of the size or less, in under four minutes: the same order of results, but with --vision the "
            "models learn too little to compare them.",
        ),
    ] = False,
    vision: Annotated[
        bool, typer.Option("--vision", help="Teacher and students answer questions about images, in about 12 minutes.")
    ] = False,
) -> None:
    """Run everything on this machine in 10 minutes: a teacher under vLLM and Ray, its dataset, three students."""
    from coldstill.demo.settings import has_vllm_wheel

    # Where vLLM has no wheel, the transformers engine captures; only images need vLLM.
    vllm = ("vllm",) if vision or has_vllm_wheel() else ()
    require_packages(
        "capture-cpu,train,share", "accelerate", "matplotlib", "ray", "tokenizers", "torch", "transformers", *vllm
    )
    if vision:
        from coldstill.demo.vision.run import run_vision_demo

        run_vision_demo(output or Path("demo_vision_output"), quick=quick)
        return
    from coldstill.demo.run import run_demo

    run_demo(output or Path("demo_output"), quick=quick)
