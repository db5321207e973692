"""The examples in the docstrings of the public names: they are there, and they are right."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmsad_jax

NAMES = {
    "functools": functools,
    "jax": jax,
    "jnp": jnp,
    "np": np,
    **{name: getattr(cmsad_jax, name) for name in cmsad_jax.__all__},
}
"""What an example may use without importing it."""


def examples(name: str) -> list[doctest.DocTest]:
    """The examples of one public name."""
    value = getattr(cmsad_jax, name)
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs=dict(NAMES))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", cmsad_jax.__all__)
def test_example_of_the_docstring_is_right(name):
    tests = examples(name)
    assert tests, f"{name} has no example"
    said: list[str] = []
    for test in tests:
        failed, tried = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
            test, out=said.append
        )
        assert tried
        assert not failed, "".join(said)
