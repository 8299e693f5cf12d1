"""Options: what each may be is declared once, in the type of its field, and checked in one place.

class Settings:
    every: Annotated[int, Limit(least=1)] = 25
    share: Annotated[float | None, Limit(above=0)] = None
"""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Limit:
    """What a value may be, beyond its type.

    Attributes:
        least: The smallest number.
        above: A number that it must exceed.
        most: The largest number.
        infinite: Whether it may be infinite; NaN it may never be.
        choices: The texts that it may be; None: any.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    infinite: bool = False
    choices: tuple[str, ...] | None = None


LARGEST = 1e6
"""Most that a factor may be on what is computed in float32: beyond, products overflow."""

Count = Annotated[int, Limit(least=1)]
Seed = Annotated[int, Limit(least=0)]
Share = Annotated[float | None, Limit(above=0)]
Amount = Annotated[float, Limit(least=0)]

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def check_options(options: Any, own: type | None = None) -> None:
    """Check every field of a dataclass against its type, and turn numbers of other libraries into Python's own.

    Args:
        options: An instance, also of a frozen dataclass; called in `__post_init__`.
        own: Only the fields that this class declares itself; None: all.

    Raises:
        ValueError: For the first value that is not allowed; the message names the field, the value and what is.
    """
    declared: Any = type(options)
    for name, hint in _hints(declared).items():
        if (own is None or name in own.__annotations__) and _limit(hint) is not None:
            object.__setattr__(options, name, checked(name, hint, getattr(options, name)))


def checked(name: str, hint: Any, value: Any) -> Any:
    """Check one value against a type.

    Args:
        name: What the user calls it.
        hint: bool, int, float, str, Path, a sequence of texts, a union of these, each `Annotated` by a `Limit` or not.
            What else a union has (None, classes, mappings, functions) is told by `isinstance` alone.
        value: What was given.

    Returns:
        The value; an integer, number or truth value of NumPy as Python's own.

    Raises:
        ValueError: Where it is not allowed; the message names it, what was seen and what is allowed.
    """
    kinds, limit = _kinds(hint), _limit(hint) or Limit()
    for kind in kinds:
        found = _as_kind(kind, limit, value)
        if found is not _REFUSED:
            return found
    allowed = " or ".join(_words(kind, limit) for kind in kinds)
    raise ValueError(f"{name} is {shown(value)}; allowed: {allowed}")


def shown(value: Any) -> str:
    """Return how a value is shown in a message: its repr, cut where it is long, and never an error."""
    return _REPR.repr(value)


def like(options: type, name: str) -> Any:
    """Return a dataclass field with the default and the help of another dataclass's field `name`."""
    source = next(item for item in fields(options) if item.name == name)
    return field(default=source.default, metadata=dict(source.metadata))


def refuse_unknown(given: Iterable[Any], known: Collection[str], where: str) -> None:
    """Refuse a name that is none of the known ones.

    Args:
        given: Names of arguments, as the user wrote them.
        known: Names that there are.
        where: What they are arguments of, such as "watch()".

    Raises:
        TypeError: For the first that is not known; the message suggests the nearest, and names all.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{where} has no argument {name!r}{hint} There are: {', '.join(known)}")


_REFUSED = object()


@cache
def _hints(options: Any) -> dict[str, Any]:
    hints = get_type_hints(options, include_extras=True)
    return {item.name: hints[item.name] for item in fields(options)}


def _limit(hint: Any) -> Limit | None:
    """Return the limit of a type; None where it is annotated otherwise, and checked elsewhere."""
    if get_origin(hint) is not Annotated:
        return Limit()
    return next((item for item in get_args(hint)[1:] if isinstance(item, Limit)), None)


def _kinds(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    return [*get_args(hint)] if get_origin(hint) in (Union, types.UnionType) else [hint]


def _as_kind(kind: Any, limit: Limit, value: Any) -> Any:
    """Return the value as one of a kind, `_REFUSED` where it is none."""
    base = get_origin(kind) or kind
    if base is bool:
        return bool(value) if type(value).__name__ in ("bool", "bool_") else _REFUSED
    if base in (int, float):
        abstract = numbers.Integral if base is int else numbers.Real
        return (
            _in_limit(base, limit, value) if isinstance(value, abstract) and not isinstance(value, bool) else _REFUSED
        )
    if base is str:
        return value if isinstance(value, str) and value in (limit.choices or (value,)) else _REFUSED
    if base in (list, Sequence):
        fits = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return value if fits and all(isinstance(item, str) for item in value) else _REFUSED
    return value if isinstance(value, base) else _REFUSED


def _in_limit(kind: type, limit: Limit, value: Any) -> Any:
    try:
        number = kind(value)
    except (OverflowError, ValueError):
        return _REFUSED
    finite = kind is int or math.isfinite(number) or (limit.infinite and not math.isnan(number))
    within = (
        (limit.least is None or number >= limit.least)
        and (limit.above is None or number > limit.above)
        and (limit.most is None or number <= limit.most)
    )
    return number if finite and within else _REFUSED


def _words(kind: Any, limit: Limit) -> str:
    base = get_origin(kind) or kind
    if base is int:
        return "a whole number" if limit.least is None else f"{limit.least:.0f}, {limit.least + 1:.0f}, ..."
    if base is float:
        bound = "" if limit.above is None else f" above {limit.above:g}"
        bound = bound if limit.least is None else f" from {limit.least:g}"
        bound += "" if limit.most is None else f" up to {limit.most:g}"
        return f"a number{bound}, -inf, inf" if limit.infinite else f"a finite number{bound}"
    if base is str:
        return "a text" if limit.choices is None else ", ".join(map(repr, limit.choices))
    known = {
        bool: "True, False",
        list: "a list of texts",
        Sequence: "a list of texts",
        Path: "a path",
        types.NoneType: "None",
        Mapping: "a mapping",
        Callable: "a function",
    }
    return known.get(base, f"a {getattr(base, '__name__', base)}")
