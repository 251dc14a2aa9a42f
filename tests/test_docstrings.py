"""What `help()` and an editor show: each public class says what its parameters are, its own and the
inherited ones."""
import inspect
import re

import pytest

import autotimm

CLASSES = [name for name in autotimm.__all__ if inspect.isclass(getattr(autotimm, name))]


def documented(docstring: str) -> list[str]:
    "Names in the numpy-style `Parameters` section of a docstring."
    found = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", inspect.cleandoc(docstring),
                      re.M | re.S)
    if not found: return []
    return [name.strip("* ") for names in re.findall(r"^(\*{0,2}\w[\w, *]*?)\s*:", found[1], re.M)
            for name in names.split(",")]


def accepted(cls: type) -> list[str]:
    "Parameters of the constructor by name."
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, o in inspect.signature(cls).parameters.items() if o.kind not in kinds]


def test_reading_a_section():
    text = """Summary.

    Parameters
    ----------
    a : int
        One.
    b, c : str, default "x: y"
        Two.
    **kwargs : Any
        More.

    Returns
    -------
    d : int
    """
    assert documented(text) == ["a", "b", "c", "kwargs"]


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_those_of_the_signature(name):
    cls = getattr(autotimm, name)
    # Made by us; values of an enumeration
    if issubclass(cls, Exception) or cls is autotimm.ModelSource: return
    found = [o for o in documented(cls.__doc__ or "") if o != "kwargs"]
    assert sorted(found) == sorted(accepted(cls))
