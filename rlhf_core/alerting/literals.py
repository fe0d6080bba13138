"""Numbers and dictionaries as Python prints them, numpy's scalars and what is not finite among them; nothing is run."""

import ast
import math
from typing import Any

_NOT_FINITE = {"nan": math.nan, "inf": math.inf}
_NUMPY = ("np", "numpy")


def read_literal(text: str) -> Any:
    """Return the value of a Python literal; ``np.float64(0.5)`` in it is 0.5, and ``nan`` and ``inf`` are floats.

    Raises:
        ValueError: it is something else, such as a call of another function, or nested too deeply.
    """
    try:
        return ast.literal_eval(_Plain().visit(ast.parse(text, mode="eval")))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no Python literal ({type(error).__name__})") from None


class _Plain(ast.NodeTransformer):
    """Puts plain constants in place of what numpy 2 prints its scalars as, and of the names of what is not finite."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Take the number out of ``np.float64(0.5)``."""
        if _name_in_numpy(node.func) and len(node.args) == 1 and not node.keywords:
            return self.visit(node.args[0])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Take ``np.True_`` and ``np.False_`` for what they say."""
        known = {"True_": True, "False_": False}
        name = _name_in_numpy(node)
        return ast.Constant(known[name]) if name in known else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Take ``nan`` and ``inf`` for what they say."""
        return ast.Constant(_NOT_FINITE[node.id]) if node.id in _NOT_FINITE else node


def _name_in_numpy(node: ast.AST) -> str:
    """Return ``float64`` of ``np.float64``, and nothing for what is not of numpy."""
    inside = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in _NUMPY
    return node.attr if inside and isinstance(node, ast.Attribute) else ""
