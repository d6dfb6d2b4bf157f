"""Every public name has a docstring with an example that runs (`pytest` runs them), and stands in the reference page."""

import doctest
import inspect
from importlib import import_module

import pytest

import rrepa_lab as rl
from rrepa_lab.paths import assets
from rrepa_lab.studies.reference import GROUPS, page


@pytest.mark.parametrize("name", rl.__all__)
def test_a_public_name_has_an_example(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(rl, name)) or "")
    assert examples, f"rl.{name} has no example"
    if name != "import_tarflow":  # it needs a checkpoint of the public code
        assert any(example.want for example in examples), f"the example of rl.{name} states no result"
        assert not any(doctest.SKIP in example.options for example in examples)


def test_the_page_holds_every_public_name_once():
    assert sorted(" ".join(GROUPS.values()).split()) == sorted(rl.__all__)


def test_the_page_is_up_to_date():
    assert (assets() / "reference.md").read_text("utf-8") == page(), "run python -m rrepa_lab.studies.reference"


def test_public_names_are_at_home_where_the_package_says():
    for name, home in rl._HOMES.items():
        assert getattr(import_module(f"rrepa_lab.{home}"), name).__module__ == f"rrepa_lab.{home}", name
