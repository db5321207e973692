"""Inputs of every kind through the commands; ``python -m tests.inputs`` prints the table."""

import pytest

from tests.inputs import INPUTS, results


@pytest.mark.slow
def test_every_input_gives_what_is_expected(tmp_path):
    rows = list(results(tmp_path))
    assert len(rows) == sum(len(each.steps) for each in INPUTS)
    assert [row for row in rows if row[1] != row[2]] == []
