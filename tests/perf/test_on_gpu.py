"""`pytest -m gpu`: what the campaign's verdicts ask of a card, as tests."""

from pathlib import Path

import pytest
import torch

from perf.campaign import Bench
from perf.correctness import tables

NOWHERE = Path("/nowhere")
WORK = [
    (table.title, row.work)
    for table in tables(Bench(wanted="cuda", tiny=False, scratch=NOWHERE), NOWHERE)
    for row in table.rows
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("bench")
    found = tables(Bench(wanted="cuda", tiny=False, scratch=scratch), scratch)
    return {(table.title, row.work): row for table in found for row in table.rows}


@pytest.mark.parametrize(("title", "work"), WORK)
def test_the_card_does_what_is_promised(rows, title, work):
    figures = rows[title, work].measure()
    assert figures["passes"], figures
