"""A tool: arithmetic."""

import ast
import math
import operator
from collections.abc import Callable

LONGEST = 200  # characters of an expression
MOST_DIGITS = 100  # of a power
BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> float:
    """
    Computes an arithmetic expression.

    Args:
        expression: Numbers, the operators + - * / // % ** and brackets, as in "(2 + 3) * 4".

    Returns:
        The value of the expression.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"{len(expression)} characters: expected at most {LONGEST}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{expression} is no arithmetic expression") from error
    return value_of(tree.body)


def value_of(node: ast.AST) -> float:
    """The value of a part of an expression. Raises ValueError for what is no arithmetic, or too large."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = value_of(node.left), value_of(node.right)
        if isinstance(node.op, ast.Pow) and left and abs(right * math.log10(abs(left))) > MOST_DIGITS:
            raise ValueError("a power that is too large")
        return BINARY[type(node.op)](left, right)
    raise ValueError(f"{ast.unparse(node)} is no arithmetic; expected numbers, + - * / // % ** and brackets")
