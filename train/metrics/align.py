"""Edit distance and a deterministic alignment of two sequences of symbols."""

from collections.abc import Hashable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

EPSILON = ""  # stands for "nothing" in an insertion or deletion; shown as ε

_FAR = 1 << 29  # cost of a cell outside the band; sums of a few stay within int32


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """Return the least number of insertions, deletions and substitutions (cost 1 each)."""
    first, second = _as_numbers(reference, hypothesis)
    return int(Levenshtein.distance(first, second))


def edits(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[str, str]]:
    """Return the differing pairs (reference, hypothesis) of one shortest edit path, left to right.

    A deletion is (symbol, EPSILON), an insertion (EPSILON, symbol). Of several shortest paths the
    one is taken that, read from the left, keeps or substitutes before it deletes before it inserts.
    """
    first, second = _as_numbers(reference, hypothesis)
    distance = int(Levenshtein.distance(first, second))
    if distance == 0:
        return []
    deletions = (distance + len(first) - len(second)) // 2  # at most, on any shortest path
    insertions = (distance - len(first) + len(second)) // 2
    cost = _suffix_costs(np.array(first), np.array(second), deletions, insertions)
    pairs = []
    i = j = 0
    while i < len(first) or j < len(second):
        offset = j - i + deletions
        left = cost[i, offset]
        both = i < len(first) and j < len(second)
        step = int(both and first[i] != second[j])
        if both and cost[i + 1, offset] + step == left:
            if step:
                pairs.append((reference[i], hypothesis[j]))
            i, j = i + 1, j + 1
        elif i < len(first) and offset > 0 and cost[i + 1, offset - 1] + 1 == left:
            pairs.append((reference[i], EPSILON))
            i += 1
        else:
            pairs.append((EPSILON, hypothesis[j]))
            j += 1
    return pairs


def _suffix_costs(first: np.ndarray, second: np.ndarray, before: int, after: int) -> np.ndarray:
    """Return (n + 1, before + after + 1) int32: cost[i, j - i + before] = distance of the suffixes.

    That is of first[i:] and second[j:]. `before` and `after` bound the deletions and insertions of
    a shortest path, so it never leaves this band, and costs of its cells are exact; other cells may
    be too high, which no path then takes.
    """
    n, m = len(first), len(second)
    offsets = np.arange(before + after + 1)
    cost = np.full((n + 1, len(offsets)), _FAR, dtype=np.int32)
    for i in range(n, -1, -1):
        columns = i - before + offsets  # j of each cell of this row
        row = np.where(columns == m, n - i, _FAR)  # at the end of second: delete the rest
        if i < n:
            inside = (columns >= 0) & (columns < m)
            same = np.zeros(len(offsets), dtype=bool)
            same[inside] = second[columns[inside]] == first[i]
            row[inside] = (cost[i + 1] + ~same)[inside]  # keep or substitute
            row[1:] = np.minimum(row[1:], cost[i + 1, :-1] + 1)  # delete first[i]
        # Insertions chain along the row: cost[k] = min over k' >= k of row[k'] + (k' - k).
        row = np.minimum.accumulate((row + offsets)[::-1])[::-1] - offsets
        cost[i] = np.where((columns >= 0) & (columns <= m), np.minimum(row, _FAR), _FAR)
    return cost


def _as_numbers(
    first: Sequence[Hashable], second: Sequence[Hashable]
) -> tuple[list[int], list[int]]:
    """Number the symbols, so that equality is exact (rapidfuzz compares hashes of longer ones)."""
    table: dict[Hashable, int] = {}
    return (
        [table.setdefault(symbol, len(table)) for symbol in first],
        [table.setdefault(symbol, len(table)) for symbol in second],
    )
