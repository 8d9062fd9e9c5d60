"""`import gpt_xp`: the public names, and that they are loaded when they are asked for."""

import ast
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
from commands import in_a_new_process

import gpt_xp

SOURCE = Path(str(gpt_xp.__file__)).read_text(encoding="utf-8")


def names_for_type_checkers() -> dict[str, str]:
    """Return each name that `__init__.py` imports for type checkers alone, with its module."""
    found = {}
    body = ast.parse(SOURCE).body
    [block] = [node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in block.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gpt_xp."):
            found |= {alias.name: str(node.module) for alias in node.names}
    return found


def test_importing_gpt_xp_imports_no_array_library() -> None:
    code = "import gpt_xp, gpt_xp.cli, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = {name.partition(".")[0] for name in in_a_new_process(code)}
    assert not loaded & {"numpy", "click", "jax", "cupy", "torch", "array_api_strict", "array_api_compat", "requests"}


def test_type_checkers_see_the_names_that_are_there() -> None:
    modules = names_for_type_checkers()
    assert sorted(modules) == sorted(gpt_xp.__all__)
    for name, module in modules.items():
        assert getattr(gpt_xp, name) is getattr(import_module(module), name), name


def test_each_name_can_be_the_first_that_is_asked_for() -> None:
    code = """
import json, sys
def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpt_xp"]:
        del sys.modules[name]
import gpt_xp
missing = []
for name in gpt_xp.__all__:
    forget()
    exec(f"from gpt_xp import {name}")
    if name not in dir(sys.modules["gpt_xp"]):
        missing.append(name)
print(json.dumps(missing))
"""
    assert in_a_new_process(code) == []


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from gpt_xp import *", names)
    assert {*gpt_xp.__all__} <= {*names}


def test_a_submodule_is_an_attribute_and_a_misspelt_name_an_error() -> None:
    code = "import gpt_xp, json; print(json.dumps(gpt_xp.errors.PromptError.__name__))"
    assert in_a_new_process(code) == "PromptError"
    for name in ("laod", "_errors", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"'gpt_xp' has no attribute '{name}'"):
            getattr(gpt_xp, name)


def test_no_submodule_hides_a_public_name() -> None:
    submodules = {module.name for module in pkgutil.iter_modules(gpt_xp.__path__)}
    assert not submodules & {*gpt_xp.__all__}
