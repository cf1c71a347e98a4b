"""What makes good files bad: bytes, fields of JSON and YAML, headers of safetensors, members of archives."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Kind:
    """One kind of file: a good one, how it is read, what mutates it."""

    name: str
    original: Path
    read: Callable[[Path], str]
    mutate: Callable[[bytes, random.Random], bytes]
    refusals: tuple[type[Exception], ...]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped bits, overwritten, removed or repeated ranges; headers more often than their share."""
    out = bytearray(data)
    how = rng.choice(("cut", "flip", "flip", "overwrite", "remove", "repeat", "zeros"))
    if how == "cut":
        return bytes(out[: rng.randrange(len(out))])
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = max(2, len(out) // rng.choice((1, 1, 16)))
        at, length = rng.randrange(end), rng.choice((1, 4, 16, 256))
        if how == "flip":
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif how == "overwrite":
            out[at : at + length] = rng.randbytes(length)
        elif how == "remove" and len(out) > 2 * length:
            del out[at : at + length]
        elif how == "repeat":
            out[at:at] = out[at : at + length]
        else:
            out[at : at + length] = bytes(length)
    return bytes(out)


VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**63, -0.5, 0.0, 1e-300, 1e300, math.nan, math.inf),
    *("", "abc", "nan", "-1", "0", "1/0", "1e999999999", "9" * 5000, "../../x", [], [0], [1, 2, 3, 4], {}, {"a": 1}, [[]]),
)


def mutated_json(value: dict, rng: random.Random, depth: int = 2) -> dict:
    """One field, maybe one of a field's, is gone, of another name or has another value."""
    out = dict(value)
    key = rng.choice(sorted(out))
    if depth > 1 and isinstance(out[key], dict) and out[key] and rng.random() < 0.85:
        out[key] = mutated_json(out[key], rng, depth - 1)
    elif rng.random() < 0.15:
        moved = out.pop(key)
        if rng.random() < 0.5:
            out[key + "_"] = moved
    else:
        out[key] = rng.choice(VALUES)
    return out


def mutated_config(
    data: bytes, rng: random.Random, load: Callable[[bytes], dict] = json.loads, dump: Callable[[dict], str] = json.dumps
) -> bytes:
    """A field of a configuration, now and then its bytes."""
    if rng.random() < 0.1:
        return mutated_bytes(data, rng)
    return dump(mutated_json(load(data), rng)).encode()


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Half of the time the bytes, else a field of the header, metadata as text as safetensors has them, or numbers."""
    if rng.random() < 0.4:
        return mutated_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    if rng.random() < 0.2:
        at = rng.randrange(len(body) // 4) * 4
        body[at : at + 4] = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf, 3e38)))
    elif "__metadata__" in header and rng.random() < 0.7:
        metadata = mutated_json(header["__metadata__"], rng, 1)
        header["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    else:
        header = mutated_json(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)
