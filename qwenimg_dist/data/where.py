"""`where` expressions over index columns: `aspect < 2 and aesthetic > 5.5` -> a boolean mask.

Place in the flow: `data.where`, a phase's `where` and `data.weights` select what is trained on; thresholds are config,
scores are data. The text is parsed with Python's `ast` and walked over an allow-list; nothing is evaluated by Python,
so a config cannot run code. A comparison with a missing score (NaN) is false, also `!=` and `not in`: what was not
measured is not selected (write `a >= 2`, not `not a < 2`).

`top(0.5, aesthetic, category)` holds for the best half of every category by that score: a number below 1 is a share
(rounded up), 1 and more a count, the group may be left out. Rows compete with all kept rows of the catalog, whatever
else the expression says; of equal scores the earlier row wins; a row without a score or a group is neither selected
nor counted.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qwenimg_dist.schema import LABEL_PREFIX, SCORE_PREFIX

Mask = npt.NDArray[np.bool_]
# A column, a constant, or the members of `in (...)`.
_Value = Any

_COMPARE: Final[dict[type[ast.cmpop], Callable[[Any, Any], Any]]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
_ARITHMETIC: Final[dict[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.true_divide,
}


class WhereError(ValueError):
    """The expression is not one, or names a column that is not there. Meant for the user."""


def compile_where(expression: str) -> Where:
    """Parse and check an expression. Raises `WhereError` with the offending piece."""
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise WhereError(f"where={expression!r} is not an expression: {error.msg} at column {error.offset}") from error
    names: list[str] = []
    _check(tree.body, expression, names)
    return Where(expression, tree.body, tuple(dict.fromkeys(names)))


class Where:
    """A checked expression; `mask` applies it to columns."""

    def __init__(self, expression: str, tree: ast.expr, names: tuple[str, ...]) -> None:
        self.expression = expression
        self.names = names
        self._tree = tree

    def mask(self, columns: Mapping[str, npt.NDArray[Any]], num_rows: int) -> Mask:
        """(num_rows,) True where the expression holds. Raises `WhereError` for unknown columns or types that differ.

        A score or label may be named with or without its prefix `score_` or `label_`.
        """
        taken = {name: columns[self._resolve(name, columns)] for name in self.names}
        try:
            with np.errstate(divide="ignore", invalid="ignore"):
                value = _evaluate(self._tree, taken, num_rows)
        except (TypeError, np.exceptions.DTypePromotionError) as error:
            raise WhereError(f"where={self.expression!r} compares text with numbers ({error})") from error
        if np.asarray(value).dtype != np.bool_:
            raise WhereError(f"where={self.expression!r} gives numbers, not true or false: compare them with something")
        return np.array(np.broadcast_to(value, (num_rows,)))

    def _resolve(self, name: str, columns: Mapping[str, npt.NDArray[Any]]) -> str:
        for candidate in (name, f"{SCORE_PREFIX}{name}", f"{LABEL_PREFIX}{name}"):
            if candidate in columns:
                return candidate
        known = sorted(columns)
        short = {column.removeprefix(SCORE_PREFIX).removeprefix(LABEL_PREFIX): column for column in known}
        close = difflib.get_close_matches(name, [*known, *short], n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise WhereError(
            f"where={self.expression!r}: no column {name!r}{hint}; there are: {', '.join(known) or 'none'}. A score is "
            "there when its filter was on (`text_level`: filters.ocr.enabled=true): run `produce` again with it"
        )


def _check(node: ast.expr, expression: str, names: list[str]) -> None:
    """Refuse every node that is not on the list, and collect the names."""
    match node:
        case ast.BoolOp(values=values):
            for value in values:
                _check(value, expression, names)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd(), operand=operand):
            _check(operand, expression, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            _check(left, expression, names)
            _check(right, expression, names)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            _check(left, expression, names)
            for comparison, right in zip(ops, comparators, strict=True):
                if isinstance(comparison, ast.In | ast.NotIn):
                    _check_members(right, expression)
                elif type(comparison) in _COMPARE:
                    _check(right, expression, names)
                else:
                    raise _refused(node, expression)
        case ast.Call(func=ast.Name(id="top"), args=[best, *columns], keywords=[]) if 1 <= len(columns) <= 2:
            if not isinstance(best, ast.Constant) or not _is_amount(best.value):
                raise WhereError(
                    f"where={expression!r}: top(...) begins with a share below 1 or a whole number of rows, "
                    "such as top(0.5, aesthetic, category)"
                )
            for column in columns:
                _check(column, expression, names)
        case ast.Name(id=name):
            names.append(name)
        case ast.Constant(value=bool() | int() | float() | str()):
            pass
        case _:
            raise _refused(node, expression)


def _check_members(node: ast.expr, expression: str) -> None:
    members = node.elts if isinstance(node, ast.List | ast.Tuple | ast.Set) else None
    if members is None or not all(
        isinstance(m, ast.Constant) and isinstance(m.value, int | float | str) for m in members
    ):
        raise WhereError(f"where={expression!r}: `in` needs a list of numbers or strings, such as ('JPEG', 'PNG')")


def _refused(node: ast.expr, expression: str) -> WhereError:
    return WhereError(
        f"where={expression!r}: {ast.unparse(node)!r} is not allowed; there are column names, numbers, strings, "
        "comparisons, `in`, and / or / not, + - * /, and top(share or count, score[, group])"
    )


def _evaluate(node: ast.expr, columns: Mapping[str, npt.NDArray[Any]], num_rows: int) -> _Value:
    match node:
        case ast.BoolOp(op=op, values=values):
            combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
            result = _truth(_evaluate(values[0], columns, num_rows))
            for value in values[1:]:
                result = combine(result, _truth(_evaluate(value, columns, num_rows)))
            return result
        case ast.UnaryOp(op=op, operand=operand):
            value = _evaluate(operand, columns, num_rows)
            if isinstance(op, ast.Not):
                return np.logical_not(_truth(value))
            return np.negative(value) if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            given = [_evaluate(one, columns, num_rows) for one in (left, right)]
            if any(map(_is_text, given)):  # Python would join and repeat it
                raise TypeError(ast.unparse(node))
            return _ARITHMETIC[type(op)](*given)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            return _compare(_evaluate(left, columns, num_rows), ops, comparators, columns, num_rows)
        case ast.Call(args=[ast.Constant(value=best), *given]):
            assert isinstance(best, int | float)  # checked
            return _top(best, [np.broadcast_to(_evaluate(one, columns, num_rows), num_rows) for one in given])
        case ast.Name(id=name):
            return columns[name]
        case ast.Constant(value=value):
            return value
    raise AssertionError(f"unchecked node {ast.dump(node)}")


def _compare(
    left: _Value,
    ops: list[ast.cmpop],
    comparators: list[ast.expr],
    columns: Mapping[str, npt.NDArray[Any]],
    num_rows: int,
) -> _Value:
    """Chained comparisons: `1 < aspect < 2`."""
    result: _Value = np.True_
    for op, node in zip(ops, comparators, strict=True):
        if isinstance(op, ast.In | ast.NotIn):
            assert isinstance(node, ast.List | ast.Tuple | ast.Set)
            right: _Value = left
            members = [m.value for m in node.elts if isinstance(m, ast.Constant)]
            if any(isinstance(m, str) != _is_text(left) for m in members):
                raise TypeError(f"members of {ast.unparse(node)}")
            held = np.isin(left, np.array(members)) if members else np.zeros(np.shape(left), dtype=np.bool_)
            held = np.logical_not(held) & _measured(left) if isinstance(op, ast.NotIn) else held
        else:
            right = _evaluate(node, columns, num_rows)
            if _is_text(left) != _is_text(right):
                raise TypeError(ast.unparse(node))
            held = _COMPARE[type(op)](left, right)
            if isinstance(op, ast.NotEq):
                held = held & _measured(left) & _measured(right)
        result = np.logical_and(result, held)
        left = right
    return result


def _is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (0 < value < 1 or (value >= 1 and value == int(value)))


def _top(best: float, given: Sequence[npt.NDArray[Any]]) -> Mask:
    """True for the rows with the highest scores of their group; what has no score or no group is not among them."""
    score, group = given[0], given[1] if len(given) == 2 else np.zeros(len(given[0]), dtype=np.int8)
    if score.dtype.kind not in "iuf":
        raise TypeError("top(...) needs a number to compare by")
    grouped = group != "" if _is_text(group) else _measured(group)
    # Whole numbers are all measured, which is one True for the column.
    known = np.flatnonzero(np.broadcast_to(_measured(score) & grouped, len(score)))
    code = pa.array(group[known]).dictionary_encode().indices.to_numpy()  # many times faster than np.unique on text
    sizes = np.bincount(code) if len(known) else np.zeros(0, dtype=np.int64)
    # Numbers of up to 2^53 rows are exact; the small step keeps 0.07 * 100 from being rounded up to 8.
    wanted = np.ceil(best * sizes - 1e-9).astype(np.int64) if best < 1 else np.full(len(sizes), int(best))
    order = np.lexsort((known, -score[known].astype(np.float64), code))
    place = np.arange(len(known)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    mask = np.zeros(len(score), dtype=np.bool_)
    mask[known[order[place < wanted[code[order]]]]] = True
    return mask


def _truth(value: _Value) -> _Value:
    if np.asarray(value).dtype != np.bool_:
        raise TypeError("and / or / not need comparisons")
    return value


def _is_text(value: _Value) -> bool:
    return np.asarray(value).dtype.kind in "SUO"  # O: spelt out by `Columns`


def _measured(value: _Value) -> _Value:
    array = np.asarray(value)
    return ~np.isnan(array) if array.dtype.kind == "f" else np.True_
