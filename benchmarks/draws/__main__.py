"""Ways of drawing from a teacher's tail, at equal bytes: noise of the gradient, and quality of students.

DEMO is the output folder of a finished `coldstill demo`. Two teachers: the demo's, which is flat, and the same
sharpened, as in `benchmarks.draws.quality`. Sides, for K = 0, 4, 8, 16:

* independent draws from the full softmax, as captures made them until systematic draws came;
* systematic draws from the tail (Madow 1949) in order of ids and in order of probability, D times the tail's mass,
  rounded at random or up, or a fixed number;
* Random Sampling Knowledge Distillation (arXiv 2503.16870): K = 0, independent draws of p to a power, with weights;
* systematic draws beside the ids of at least a floor, and with the loss's control variate.

Part 1 measures the squared error of forward KL's gradient against the dense one, by logits, by hidden states and by the
head's weights, and the bytes of our codec, on held-out rows. Other rows choose the control variate's constants. Part
2 trains students with TAID from real captures. Each finished figure or run is a line of OUTPUT/runs.jsonl; a second
start computes the missing ones only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.common.command import add_folders, is_quick, new_parser
from benchmarks.common.report import finish
from benchmarks.common.run_log import append, claim, lines_of
from benchmarks.draws.grid import LOG, Lines, key_of, shares_of, train_missing
from benchmarks.draws.plan import TEACHERS, Control, Rule, noise_jobs, runs
from benchmarks.draws.tables import print_noise, print_shares
from coldstill.demo.settings import Layout

if TYPE_CHECKING:
    from benchmarks.draws.noise import Scene

ROWS, QUICK_ROWS = 24, 4


def measure_noise(demo: Path, log: Path, *, quick: bool) -> None:
    """Append the missing figures of part 1."""
    from benchmarks.draws.noise import load_scene, noise_of

    done = [line["noise"] for line in lines_of(log) if "noise" in line]
    scenes: dict[tuple[str, str, str], Scene] = {}
    layout = Layout(demo)
    for job in tqdm([job for job in noise_jobs(quick) if job not in done], desc="noise"):
        key = (job["teacher"], job["student"], job["part"])
        if key not in scenes:
            scenes.clear()
            student = layout.student if job["student"] == "before" else layout.run("taid") / "student"
            count = QUICK_ROWS if quick else ROWS
            scenes[key] = load_scene(demo, student, divisor=TEACHERS[key[0]], part=key[2], count=count)
        control = None if job["control"] is None else Control(**job["control"])
        figures = noise_of(scenes[key], Rule(**job["rule"]), control)
        append(log, {"noise": job, **figures})


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute what is missing, print the tables, and store a full run."""
    parser = new_parser(
        "draws",
        __doc__,
        make="bench-draws DEMO=DIR OUTPUT=DIR, after `benchmarks.draws.bytes`",
        takes="an hour on one core for the runs of part 2, beside part 1",
        quick="a few rules, a few rows, no training",
        result="draws",
    )
    add_folders(parser, demo=True, report=True)
    options, quick = parser.parse_args(arguments), is_quick()
    claim(options.output, benchmark="draws", demo=str(options.demo.resolve()), quick=quick)
    log = options.output / LOG
    if not options.report:
        measure_noise(options.demo, log, quick=quick)
        if not quick:
            train_missing(runs(), demo=options.demo, output=options.output, quick=False)
    report(lines_of(log), quick=quick)


def is_complete(noise: Lines, trained: Lines, *, quick: bool) -> bool:
    """Whether all figures and runs are finished."""
    measured = [line["noise"] for line in noise]
    wanted = set() if quick else {run.key for run in runs()}
    return all(job in measured for job in noise_jobs(quick)) and wanted <= {key_of(line) for line in trained}


def report(lines: Lines, *, quick: bool) -> None:
    """Print the tables, and store a full run."""
    noise, trained = [line for line in lines if "noise" in line], [line for line in lines if "side" in line]
    flat = ({**line, **line["noise"]} for line in noise)
    shown = (line for line in flat if (line["control"], line["part"], line["student"]) == (None, "held_out", "before"))
    print_noise("held-out rows", shown, of="teacher")
    print_shares(trained)
    figures = {
        "complete": is_complete(noise, trained, quick=quick),
        "share_of_dense_gain": shares_of(trained),
        "noise": noise,
        "runs": trained,
    }
    finish("draws", figures, command="make bench-draws DEMO=DIR", quick=quick)


if __name__ == "__main__":
    main()
