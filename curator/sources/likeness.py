"""Near-duplicates: texts that share most of their words in the same order.

Likeness is the Jaccard index of two texts' shingles. MinHash finds the few candidates (Broder 1997, "On the resemblance
and containment of documents"; banding after Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3.4), and
the index itself, counted out, decides: what is reported is no estimate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from curator.sources.records import NOT_CONTENT, SHAPES, shape_of

BANDS: Final = 20
ROWS: Final = 6
"""A pair of likeness s is a candidate with probability 1 - (1 - s^6)^20: .998 at .8, .27 at .5."""

SEED: Final = 1
SHINGLE_WORDS: Final = 3
WORDS_MOST: Final = 20_000
"""Words of a record that are looked at: a record of megabytes is told by its front."""

# A word, or one character of a script that writes no spaces.
_WORD: Final = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W\u2e80-\u9fff\uac00-\ud7af\u0e00-\u0e7f]+")


def shingles(record: Mapping[str, Any]) -> frozenset[str]:
    """Every three words in a row of what the record says, in lower case; of a shorter one, what there is."""
    said = words(record)
    if not said:
        return frozenset()
    last = max(1, len(said) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(said[at : at + SHINGLE_WORDS]) for at in range(last))


def words(record: Mapping[str, Any]) -> list[str]:
    """What a record says, word by word, in lower case."""
    return _WORD.findall("\n".join(_said(record)).lower())[:WORDS_MOST]


def bands(said: frozenset[str]) -> list[int]:
    """A sketch of the shingles: 20 numbers, of which two like texts share some. Of nothing, nothing."""
    from rensa import RMinHash

    if not said:
        return []
    sketch = RMinHash(num_perm=BANDS * ROWS, seed=SEED)
    sketch.update(sorted(said))
    digest = np.asarray(sketch.digest(), np.uint64).reshape(BANDS, ROWS)
    mixed = np.arange(1, BANDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for column in range(ROWS):  # FNV-1a over the rows of each band; wrapping is meant
        mixed = (mixed ^ digest[:, column]) * np.uint64(0x100000001B3)
    return [int(number) for number in mixed.view(np.int64)]


def likeness(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard: what both have over what either has; 0 where neither has anything."""
    return len(a & b) / len(a | b) if a or b else 0.0


def _said(record: Mapping[str, Any]) -> Iterator[str]:
    content = {key: value for key, value in record.items() if key not in NOT_CONTENT}
    shape = shape_of(content)
    return SHAPES[shape].texts(content) if shape else _strings(content)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
