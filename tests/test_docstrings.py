"""The examples in docstrings are true."""

import doctest
import importlib

import pytest

from common.files import ROOT

PACKAGES = ("benchmarks", "common", "evaluation", "finetuning", "generation", "scripts", "unlearning")
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(module):
    done = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.attempted and not done.failed
