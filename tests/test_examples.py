"""Each public name works as the example of its docstring shows, and every function has one."""

import doctest
import importlib
import inspect
import io
from pathlib import Path
from unittest import mock

import pytest

from raykd.losses.terms import TERMS
from raykd.models.build import MODELS

FACES = ["raykd", "raykd.recipe", "raykd.data", "raykd.models", "raykd.losses", "raykd.deploy"]
PUBLIC = [(face, name) for face in FACES for name in importlib.import_module(face).__all__]
VERBS = {"export", "report", "run", "score", "train", "tune"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The current folder of all examples, so that a verb finds what another has done."""
    return tmp_path_factory.mktemp("examples")


def run_examples(face: str, name: str) -> None:
    """Run what a name's docstring shows. What an example registers is forgotten after it."""
    thing = getattr(importlib.import_module(face), name)
    finder = doctest.DocTestFinder(recurse=False)
    tests = [test for test in finder.find(thing, name) if test.examples]
    if inspect.isfunction(thing):
        assert "Example:" in (thing.__doc__ or "")
        assert tests
    printed = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with mock.patch.dict(TERMS), mock.patch.dict(MODELS):
        for test in tests:
            assert not any(doctest.SKIP in example.options for example in test.examples)
            runner.run(test, out=printed.write)
    assert runner.failures == 0, printed.getvalue()


@pytest.mark.parametrize(("face", "name"), [pair for pair in PUBLIC if pair[1] not in VERBS])
def test_the_example_of_a_public_name_runs(face, name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_examples(face, name)


@pytest.mark.ray
@pytest.mark.parametrize("verb", sorted(VERBS))
def test_the_example_of_a_verb_runs(verb, cluster, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_examples("raykd", verb)
