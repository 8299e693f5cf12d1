"""The slow twin of `token_blocks`, written from its description: number by number, no numpy."""

import base64
import json
import math
import zlib

from llm_dynamics.report.token_blocks import LEVELS, RESOLUTIONS


def unpack_json(text):
    return json.loads(zlib.decompress(base64.b64decode(text)))


def unpack_block(text, strings):
    """Return `{"resolution", "positions", "tokens", "logp", "rank", "greedy"}`; the last three by token, then step."""
    numbers = read_varints(zlib.decompress(base64.b64decode(text)))
    take = numbers.pop
    numbers.reverse()
    n_tokens, n_steps, unit, n_own, n_missed = (take() for _ in range(5))
    positions = running_sums([take() for _ in range(n_tokens)])
    tokens = [strings[take()] for _ in range(n_tokens)]
    own = [strings[take()] for _ in range(n_own)]
    logp_codes = table([take() for _ in range(n_tokens * n_steps)], n_tokens)
    rank_codes = table([take() for _ in range(n_tokens * n_steps)], n_tokens)
    missed = running_sums([take() for _ in range(n_missed)])
    named = {cell: own[take()] for cell in missed}
    assert not numbers
    rank = [[LEVELS[level] for level in running_sums(map(unzigzag, codes))] for codes in rank_codes]
    logp, greedy = [], []
    for codes in logp_codes:
        value, seen = 0, []
        for code in codes:
            value += unzigzag(code - 1) if code else 0
            seen.append(value * RESOLUTIONS[unit] if code else math.nan)
        logp.append(seen)
    for place, token in enumerate(tokens):
        other, seen = "", []
        for step in range(n_steps):
            seen.append(named.get(place * n_steps + step, token if rank[place][step] == 1 else other))
            other = other if seen[-1] == token else seen[-1]
        greedy.append(seen)
    return {
        "resolution": RESOLUTIONS[unit], "positions": positions, "tokens": tokens, "logp": logp, "rank": rank,
        "greedy": greedy,
    }  # fmt: skip


def read_varints(content):
    numbers, number, shift = [], 0, 0
    for byte in content:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number, shift = 0, 0
    assert shift == 0
    return numbers


def table(values, n_tokens):
    """First values of every token, then the later ones token by token: put together by token."""
    firsts, later = values[:n_tokens], values[n_tokens:]
    size = len(later) // n_tokens if n_tokens else 0
    return [[first, *later[place * size : (place + 1) * size]] for place, first in enumerate(firsts)]


def unzigzag(code):
    return code >> 1 if code % 2 == 0 else -(code + 1 >> 1)


def running_sums(values):
    sums, total = [], 0
    for value in values:
        total += value
        sums.append(total)
    return sums
