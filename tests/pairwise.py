"""Samples of a product of options that still hold every pair of values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any


def pairwise(
    options: Mapping[str, Sequence[Any]], forbidden: Iterable[Mapping[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Cases such that every two values of two different options occur together in at least one of them.

    Greedy, as AETG does (Cohen et al., "The AETG system", IEEE Transactions on Software Engineering 23, 1997), and
    the same each time: a case starts from a pair not seen yet and takes for each other option the value that makes
    the most new pairs, drawing among equals so that options vary independently.

    Args:
        options: name -> its values, all hashable.
        forbidden: pairs of values that no case may contain, as ``{name: value, other_name: value}``.
    """
    banned = {frozenset(pair.items()) for pair in forbidden}
    # A dict is a set that keeps its order.
    missing = {
        frozenset({(a, u), (b, v)}): None for a, b in combinations(options, 2) for u in options[a] for v in options[b]
    }
    for pair in banned:
        missing.pop(pair, None)
    draw = Random(0).random
    while missing:
        case = dict(sorted(next(iter(missing)), key=lambda item: list(options).index(item[0])))
        for name in options:
            if name not in case:
                allowed = [
                    value
                    for value in options[name]
                    if not any(frozenset({(name, value), item}) in banned for item in case.items())
                ]
                new = {v: sum(frozenset({(name, v), item}) in missing for item in case.items()) for v in allowed}
                case[name] = max(allowed, key=lambda value: (new[value], draw()))
        for pair in combinations(case.items(), 2):
            missing.pop(frozenset(pair), None)
        yield {name: case[name] for name in options}
