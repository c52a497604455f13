"""The campaign for a GPU: what it computes, how fast, and a whole run, by what decides most.

`python -m perf.gpu --rows REGEX --minutes M`; REGEX is looked for in "table: work". Rows go to
OUT/gpu.json as they are measured, and the same command measures what is missing there; OUT/gpu.md
is the table for perf/RESULTS.md. `--device cpu --tiny` runs the same code on a tiny model.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

from common.files import write_text
from engine.vit import VIT_SIZES, VitSize
from perf import ceilings, correctness, end_to_end, pretrain
from perf.campaign import TINY, Bench, Results, Table

PARTS = (correctness, ceilings, pretrain, end_to_end)


def all_tables(bench: Bench, out: Path) -> list[Table]:
    """In the order in which they are measured."""
    return sorted((t for part in PARTS for t in part.tables(bench, out)), key=lambda table: table.turn)


def main() -> None:
    """Parse, measure what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__)
    parser.add_argument("--rows", default="", help="only those; a regular expression")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, a few steps")
    parser.add_argument("--out", type=Path, default=Path("output/gpu"), help="for rows and tables")
    parser.add_argument("--images", type=Path, help="folder with train/; default: generated images")
    parser.add_argument("--masks", type=Path, help="their segments; default: IMAGES/masks")
    parser.add_argument("--sam", nargs="*", default=[], help="checkpoints that make segments")
    parser.add_argument("--keep-errors", action="store_true", help="rows that failed are not tried again")
    parser.add_argument(
        "--minutes", type=float, default=9.0,
        help="no row begins after so many; 0: only the table of what is there",
    )  # fmt: skip
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    if arguments.tiny:
        VIT_SIZES[TINY["model"]] = VitSize(width=96, depth=2, heads=3)
    out = arguments.out.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            wanted=arguments.device, tiny=arguments.tiny, scratch=Path(scratch),
            images=arguments.images, masks=arguments.masks, sam=tuple(arguments.sam),
        )  # fmt: skip
        results = Results(out / "gpu.json", bench.machine)
        tables = all_tables(bench, out)
        gc.freeze()  # rows clear up after each other, but what was imported stays
        has_card = results.measure(
            tables, until=until, wanted=arguments.rows, again=not arguments.keep_errors
        )
    if not has_card:  # to this process: a new one goes on
        left = max(0.0, (until - time.monotonic()) / 60)
        more = ["--minutes", str(left), "--keep-errors"]
        os.execv(sys.executable, [sys.executable, "-m", "perf.gpu", *sys.argv[1:], *more])
    write_text(out / "gpu.md", results.markdown(tables))
    print(results.markdown(tables))
    sys.exit(results.exit_code(tables))


if __name__ == "__main__":
    main()
