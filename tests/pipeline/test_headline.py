"""What the first sentence of the answer claims."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.plan.layout import RunId
from pipeline.report.answer import answers
from pipeline.report.scores import make_lines
from tests.pipeline.finished_run import write_evaluation, write_probe, write_run

THREE = (0, 1, 2)
# Differences of three seeds: shown, not shown, shown.
CERTAIN, CHANCE, GAINED = (-5.0, -5.1, -4.9), (-9.0, 6.0, -1.0), (5.0, 5.1, 4.9)


@pytest.mark.parametrize(
    ("patches", "others", "finetuned", "probed"),  # a hint is all that the second measure gives
    [
        (CERTAIN, CERTAIN, "all lie below scratch.", "all lie below scratch (a hint)."),
        (CERTAIN, CHANCE,
         "all lie below scratch (shown for patches; not shown for segments 15% and four_channels 15%).",
         "all lie below scratch (a hint for patches; not shown for segments 15% and four_channels 15%)."),
        (CHANCE, GAINED, *["patches lies below scratch (not shown)."] * 2),
        (CERTAIN[:1], CERTAIN[:1], *["all lie below scratch (no verdict)."] * 2),
    ],
)  # fmt: skip
def test_below_scratch_is_called_shown_where_it_is(
    tmp_path: Path, patches: tuple[float, ...], others: tuple[float, ...], finetuned: str, probed: str
) -> None:
    seeds, methods = THREE[: len(patches)], ("patches", "segments", "four_channels")
    paths = write_run(tmp_path / "run", methods, seeds=seeds, epochs=(10,), spread=0, probes=True)
    of = {"scratch": (0, 0, 0), "patches": patches, "segments": others, "four_channels": others}
    for seed in seeds:
        for method, gains in of.items():
            run, epochs = RunId(method=method, seed=seed), 0 if method == "scratch" else 10
            shutil.rmtree(paths.eval_dir(run.name, epochs))
            shutil.rmtree(paths.probe_dir(run.name, epochs))
            write_evaluation(paths, run, epochs, 30 + gains[seed])
            write_probe(paths, run, epochs, 20 + gains[seed])
    first, second, *_ = answers(make_lines([paths]))
    assert first.sentences[0].endswith(f"; {finetuned}")
    assert second.sentences[0].endswith(f"; {probed}")
