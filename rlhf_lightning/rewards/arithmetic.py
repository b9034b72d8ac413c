"""Sums as text, worked out exactly and without `eval`."""

import ast
from fractions import Fraction

MAX_LENGTH = 500
"""Characters of an expression; longer ones are refused unread."""
MAX_DIGITS = 40
"""Digits of a number, given or in between."""


class NotArithmetic(ValueError):
    """The text is no sum of whole numbers with + - * / and brackets, or has no value."""


def calculate(text: str) -> tuple[Fraction, list[int]]:
    """Value of an expression, and the numbers in it from left to right.

        expression = whole number | (expression) | -expression | expression (+ | - | * | /) expression

    Nothing is evaluated: the text is parsed to a tree, and any node that is not one of these is refused. So are powers.

    Args:
        text: `x` `×` `·` `÷` `−` are read as the usual signs.
    Raises:
        NotArithmetic: the text is anything else, divides by zero, or grows too long.

    >>> calculate("(3 + 4) / 2 - 1")
    (Fraction(5, 2), [3, 4, 2, 1])
    """
    if len(text) > MAX_LENGTH:
        raise NotArithmetic(f"an expression of {len(text)} characters")
    try:
        tree = ast.parse(text.strip().translate(_SIGNS), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotArithmetic(f"not an expression: {text!r}") from error
    numbers: list[int] = []
    return _value(tree.body, numbers), numbers


_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    # a parsed tree is never deeper than the parser's own limit, which is far below Python's
    match node:
        case ast.Constant(value=int() as number) if type(number) is int:
            numbers.append(number)
            return _held(Fraction(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, numbers), _value(right, numbers)
            match op:
                case ast.Add():
                    return _held(a + b)
                case ast.Sub():
                    return _held(a - b)
                case ast.Mult():
                    return _held(a * b)
                case ast.Div():
                    if b == 0:
                        raise NotArithmetic("division by zero")
                    return _held(a / b)
    raise NotArithmetic(f"{type(node).__name__} is not arithmetic of whole numbers")


def _held(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise NotArithmetic(f"a number of more than {MAX_DIGITS} digits")
    return value
