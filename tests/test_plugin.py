"""A masking method of one's own is one class in one file, from the command line to the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.programs import run_benchmark
from tests.pipeline.whole_run import scores, write_inputs

STRIPES = '''
import numpy as np

from mae.masking import MaskingMethod
from tests import toy


class Stripes(MaskingMethod):
    """Every other column of patches is set to the mean colour."""

    name = "stripes"
    uses_segments = False
    settings = ()

    def pattern(self, rng, segment):
        columns = np.arange(self.image_size) // self.patch_size % 2
        return np.tile(columns.astype(np.uint8), (self.image_size, 1))
'''


@pytest.mark.slow
def test_a_fifth_method_is_one_class(tmp_path: Path) -> None:
    config = write_inputs(tmp_path / "data")
    plugin, out = tmp_path / "stripes.py", tmp_path / "out"
    plugin.write_text(STRIPES)
    call = ("--config", config, "--output-dir", out, "--pretrain-epochs", "1")
    call = (*call, "--mask-method", "stripes,patches")
    refused = run_benchmark(*call)
    assert refused.returncode == 2
    assert "--mask-method is 'stripes'; choose one of patches, segments" in refused.stderr
    done = run_benchmark(*call, "--plugin", plugin)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = scores(out)
    assert [(row["method"], row["coverage_ratio"]) for row in rows] == [*(("stripes", ""), ("patches", ""))]
    page = (out / "report.html").read_text()
    assert "No verdict against patches: stripes" in page
    again = run_benchmark(*call, "--plugin", plugin, "--coverage-ratio", "30")
    assert again.returncode == 0, "no setting of a method without a ratio"
    assert scores(out) == rows
