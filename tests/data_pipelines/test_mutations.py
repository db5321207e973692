"""Mutated files of every format: right, or refused in words, at once and within bounds."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.data_pipelines.mutations import KINDS, Mutation, check, mutations

FEW, MANY = 6, 223
"""Files of each kind: 54, and 2,007."""


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read_as_others_read_them(kind, tmp_path):
    assert check(Mutation(kind, ()), tmp_path) == "same"


def try_mutated(kind, number, root):
    """Try so many files of a kind; the same ones each time if they are few."""

    @settings(
        max_examples=number,
        deadline=None,
        derandomize=number == FEW,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(mutation=mutations(kind))
    def right_or_refused(mutation):
        assert check(mutation, root) in ("error", "same")

    right_or_refused()


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_files_are_right_or_refused(kind, tmp_path):
    try_mutated(kind, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files_are_right_or_refused(kind, tmp_path):
    try_mutated(kind, MANY, tmp_path)
