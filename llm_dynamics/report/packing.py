"""Write numbers and text small, in characters that mean nothing in HTML: varints, zlib, base64.

A browser reads them back with atob and `DecompressionStream("deflate")`.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np


def packed_bytes(content: bytes) -> str:
    """Compress bytes (zlib) and write them as base64."""
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")


def packed_numbers(*parts: np.ndarray) -> str:
    """Write parts of numbers, 0 and above, one after the other as varints, compressed (zlib), base64."""
    # filtered: the numbers are noise rather than repeated strings; the flush gives each part a code of its own
    stream = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
    written = [stream.compress(varints(part)) + stream.flush(zlib.Z_BLOCK) for part in parts]
    return base64.b64encode(b"".join(written) + stream.flush()).decode("ascii")


def varints(numbers: np.ndarray) -> bytes:
    """Write unsigned LEB128: seven bits a byte, the lowest first, the top bit set where more follow."""
    numbers = numbers.astype(np.uint64)
    sizes = np.ones(numbers.shape, np.int64)
    for more in range(1, 10):
        sizes += numbers >= 1 << 7 * more
    starts = np.cumsum(sizes) - sizes
    written = np.empty(int(sizes.sum()), np.uint8)
    for place in range(int(sizes.max(initial=1))):
        reaches = sizes > place
        seven = (numbers[reaches] >> np.uint64(7 * place)) & np.uint64(127)
        written[starts[reaches] + place] = seven | np.where(sizes[reaches] > place + 1, 128, 0).astype(np.uint64)
    return written.tobytes()


def zigzag(values: np.ndarray) -> np.ndarray:
    """Fold signed numbers into unsigned ones: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    values = values.astype(np.int64)
    return values << 1 ^ values >> 63
