"""What type checkers and readers get: stubs of the compiled part, annotations, docstrings with shapes and formula."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import holdfast
import pytest
from holdfast import _holdfast

PACKAGE = Path(holdfast.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def parsed(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text())


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    of = function.args
    return [*of.posonlyargs, *of.args, *of.kwonlyargs, *(x for x in (of.vararg, of.kwarg) if x)]


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Of a module and of its classes; of these also the special methods, whose self or cls is left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (method.name[0] != "_" or method.name.startswith("__")):
                    if not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in method.decorator_list):
                        del method.args.args[0]
                    yield f"{node.name}.{method.name}", method


def test_stubs_are_of_the_compiled_functions():
    """Names, numbers of arguments, and which return nothing, as pybind11 writes them into docstrings."""
    stubs = {
        node.name: node for node in parsed("_holdfast.pyi").body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    compiled = {name: x for name, x in vars(_holdfast).items() if not name.startswith("__")}
    assert stubs.keys() == compiled.keys()
    for name, stub in stubs.items():
        if isinstance(stub, ast.ClassDef):
            assert [ast.unparse(base) for base in stub.bases] == [base.__name__ for base in compiled[name].__bases__]
            continue
        signature = re.match(rf"{name}\((.*)\) -> (.*)\n", compiled[name].__doc__)
        assert signature, compiled[name].__doc__
        assert len(stub.args.posonlyargs) == len(re.findall(r"\barg\d+: ", signature[1])), name
        assert (stub.args.kwarg is not None) == ("**kwargs" in signature[1]), name
        assert not stub.args.args and not stub.args.kwonlyargs and not stub.args.vararg, name
        assert stub.returns and (ast.unparse(stub.returns) == "None") == (signature[2] == "None"), name
        assert all(argument.annotation for argument in arguments(stub)), name


@pytest.mark.parametrize("module", MODULES)
def test_all_arguments_are_annotated(module):
    """And what is returned."""
    for name, function in public_functions(parsed(module)):
        bare = [argument.arg for argument in arguments(function) if not argument.annotation]
        assert not bare and function.returns, f"{module}: {name}: {', '.join(bare) or 'what it returns'}"


def test_all_that_is_public_is_there():
    functions = dict(public_functions(parsed("__init__.py")))
    public = {name for name in holdfast.__all__ if not isinstance(getattr(holdfast, name), type)}
    assert functions.keys() >= public == {name for name in functions if "." not in name}
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("module", ["__init__.py", "torch.py"])
def test_docstrings_have_shapes_and_formulas(module):
    """Those of all functions that take arrays; and they name each of them."""
    checked = set()
    for name, function in public_functions(parsed(module)):
        annotated = {x.arg: ast.unparse(x.annotation) for x in arguments(function)}
        arrays = [name for name, type in annotated.items() if re.match(r"(Array|Tensor)\b", type)]
        if arrays and "." not in name:
            text = ast.get_docstring(function)
            assert re.search(r"^    .*\S (=|<-) \S", text, re.MULTILINE), f"{name} has no formula"
            assert len(re.findall(r"\[\w+'?(?:, \w+'?)*\]", text)) >= 2, f"{name} has no shapes"
            assert not [x for x in arrays if not re.search(rf"\b{x}\b", text)], f"{name} does not name all arguments"
            checked.add(name)
    assert {"retention", "power_retention", "retention_step", "rotate", "head_norm_gate", "convert_state"} <= checked
