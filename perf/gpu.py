"""The campaign for a GPU: a correctness, b speed of pretraining, c end to end.

`python -m perf.gpu a|b|c`, each less than 10 minutes on an H100. Rows go to OUT/gpu.json as they
are measured, and the same command measures what is missing there; OUT/a.md is the table for
perf/RESULTS.md. `--device cpu --tiny` runs the same code on a tiny model.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common.files import write_text
from engine.vit import VIT_SIZES, VitSize
from perf import correctness, end_to_end, pretrain
from perf.campaign import TINY, Bench, Results, Table

PARTS: dict[str, Callable[[Bench, Path], list[Table]]] = {
    "a": correctness.tables, "b": pretrain.tables, "c": end_to_end.tables,
}  # fmt: skip


def main() -> None:
    """Parse, measure what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, a few steps")
    parser.add_argument("--out", type=Path, default=Path("output/gpu"), help="for rows and tables")
    parser.add_argument("--images", type=Path, help="folder with train/; default: generated images")
    parser.add_argument("--masks", type=Path, help="their segments; default: IMAGES/masks")
    parser.add_argument("--sam", nargs="*", default=[], help="checkpoints that make segments")
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
        tables = {part: PARTS[part](bench, out) for part in arguments.parts}
        results.measure([table for part in tables.values() for table in part], until=until)
    for part, found in tables.items():
        write_text(out / f"{part}.md", results.markdown(found))
        print(results.markdown(found))
    sys.exit(results.exit_code([table for part in tables.values() for table in part]))


if __name__ == "__main__":
    main()
