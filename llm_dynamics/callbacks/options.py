"""Names of arguments that are handed on, checked where the user gave them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a name that is none of the known ones.

    Args:
        given: Names of arguments, as the user wrote them.
        known: Names that there are.
        where: What they are arguments of, such as "watch()".

    Raises:
        TypeError: For the first that is not known; the message suggests the nearest, and names all.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{where} has no argument {name!r}{hint} There are: {', '.join(known)}")
