"""The paper's equations 4 to 7 and the baselines, read word by word: plain Python loops in float64, one
function an equation.

Nothing here is meant to be fast. One sample at a time: ``tokens`` is a list of N visual tokens, each a list
of D numbers; ``alpha`` lists their N importances, ``score_rows`` the number of the attention row that scored
each of them (all the same, except in a chat that is prefilled with its earlier turns), ``spans`` the lengths
of the contiguous runs of visual tokens. A *slot* is a place in the output: 0 to N_t - 1 hold the targets in
order, N_t the compensation token; a dropped token has None.
"""

import math
from fractions import Fraction

Vector = list[float]
Matrix = list[list[float]]


def softmax(scores: Vector) -> Vector:
    """Softmax of a list; an entry of -inf gets weight 0."""
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    total = sum(powers)
    return [power / total for power in powers]


def mean(values: Vector) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def dot(a: Vector, b: Vector) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    """Cosine similarity; a token of length 0 has similarity 0 to everything."""
    lengths = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / lengths if lengths > 0 else 0.0


def attention_row(query: Matrix, keys: list[Matrix], scaling: float, visible: list[bool]) -> Vector:
    """Eq. 4: α = softmax(Q_output Kᵀ · scaling) over all keys, the mean over the heads (reading 1).

    query: one vector per head. keys: for each key-value head, one vector per token. visible: which tokens the
    query may see. With fewer key-value heads than heads, each of them serves a run of neighbouring heads
    (grouped-query attention).
    """
    heads_per_key_head = len(query) // len(keys)
    rows = []
    for head, q in enumerate(query):
        k = keys[head // heads_per_key_head]
        rows.append(softmax([dot(q, k[j]) * scaling if visible[j] else -math.inf for j in range(len(k))]))
    return [mean([row[j] for row in rows]) for j in range(len(visible))]


def kept(n: int, ratio: float) -> int:
    """§3.1 and reading 3: N_t = max(1, round((1 - R) · N)), of the fraction R that the float stands for."""
    simple = [
        Fraction(top, bottom)
        for bottom in range(1, 2 * n + 1)
        if (top := round(ratio * bottom)) / bottom == ratio
    ]
    exact = simple[0] if simple else Fraction(ratio)
    return max(1, round((1 - exact) * n))


def span_of_each(spans: list[int]) -> list[int]:
    """Reading 10: the number of the span that each token lies in."""
    return [number for number, length in enumerate(spans) for _ in range(length)]


def members(spans: list[int]) -> list[list[int]]:
    """Reading 10: the tokens of each span."""
    of = span_of_each(spans)
    return [[j for j in range(len(of)) if of[j] == number] for number in range(len(spans))]


def intervals(n: int, n_t: int) -> list[range]:
    """§3.2 (i) and reading 3: interval i covers [⌊i·N/N_t⌋, ⌊(i+1)·N/N_t⌋)."""
    return [range(i * n // n_t, (i + 1) * n // n_t) for i in range(n_t)]


def interval_targets(alpha: Vector, spans: list[int], ratio: float) -> list[int]:
    """§3.2 (ii): from each interval the token of highest α, the first where several have it (readings 3 and
    12)."""
    targets = []
    for span in members(spans):
        for interval in intervals(len(span), kept(len(span), ratio)):
            best = span[interval[0]]
            for place in interval:
                if alpha[span[place]] > alpha[best]:
                    best = span[place]
            targets.append(best)
    return targets


def lowest(values: Vector, span: list[int], count: int) -> list[int]:
    """The ``count`` tokens of a span with the lowest values, the first where values tie, in order of
    position."""
    chosen = set()
    for _ in range(count):
        best = None
        for j in span:
            if j not in chosen and (best is None or values[j] < values[best]):
                best = j
        chosen.add(best)
    return sorted(chosen)


def top_k_targets(alpha: Vector, spans: list[int], ratio: float) -> list[int]:
    """FastV, §3.1 and §4.1: the tokens of highest α."""
    negated = [-a for a in alpha]
    return [j for span in members(spans) for j in lowest(negated, span, kept(len(span), ratio))]


def information_degree(
    tokens: Matrix, alpha: Vector, spans: list[int], score_rows: list[int], weight: float
) -> Vector:
    """Turbo, as the paper adapts it: E = redundancy - λ · importance, with λ = ``weight``.

    Redundancy: the highest cosine similarity to another token of the span (reading 10). Importance: α /
        mean(α).
    """
    of = span_of_each(spans)
    average = temperatures(alpha, score_rows)
    degrees = []
    for j in range(len(tokens)):
        others = [cosine(tokens[j], tokens[k]) for k in range(len(tokens)) if k != j and of[k] == of[j]]
        redundancy = max(others) if others else 0.0
        degrees.append(redundancy - weight * alpha[j] / average[j])
    return degrees


def information_targets(degrees: Vector, spans: list[int], ratio: float) -> list[int]:
    """Turbo: the R% of highest information degree are merged away, so those of lowest degree are the
    targets."""
    return [j for span in members(spans) for j in lowest(degrees, span, kept(len(span), ratio))]


def similarity(tokens: Matrix, targets: list[int], spans: list[int]) -> Matrix:
    """S of eq. 5, N_t × N: cosine similarity of target i and token j; -inf across spans, which never match
    (reading 10)."""
    of = span_of_each(spans)
    n = len(tokens)
    return [
        [cosine(tokens[i], tokens[j]) if of[i] == of[j] else -math.inf for j in range(n)] for i in targets
    ]


def matching(s: Matrix, targets: list[int]) -> list[list[int]]:
    """Eq. 5: M_ij = 1 where target i has the highest similarity of column j, else 0: one 1 in each column.

    Ties go to the first target, and a target matches itself (readings 4 and 12).
    """
    m = [[0] * len(s[0]) for _ in targets]
    for j in range(len(s[0])):
        if j in targets:
            best = targets.index(j)
        else:
            best = 0
            for i in range(len(targets)):
                if s[i][j] > s[best][j]:
                    best = i
        m[best][j] = 1
    return m


def highest_similarity(s: Matrix, j: int) -> float:
    """s^max of token j."""
    return max(s[i][j] for i in range(len(s)))


def negative_set(s: Matrix, targets: list[int], tau: float) -> list[int]:
    """§3.3: the non-target tokens that do not satisfy s^max > τ."""
    return [j for j in range(len(s[0])) if j not in targets and not highest_similarity(s, j) > tau]


def least_similar(s: Matrix, targets: list[int]) -> int | None:
    """The first non-target of lowest s^max; None where all are targets."""
    rest = [j for j in range(len(s[0])) if j not in targets]
    return min(rest, key=lambda j: highest_similarity(s, j), default=None)


def slots_of_each(
    merge: str, s: Matrix, m: list[list[int]], targets: list[int], tau: float, reserved: bool = False
) -> list[int | None]:
    """Where each token goes: what §3.3, Table 4 (prune, average) and Table 5 (IGM-pos, IGM-neg) do with the
    non-targets. ``reserved``: the least similar one is in the negative set in any case."""
    negative = negative_set(s, targets, tau)
    if reserved:
        negative.append(least_similar(s, targets))
    slots = []
    for j in range(len(s[0])):
        matched = [m[i][j] for i in range(len(targets))].index(1)
        if j in targets:
            slots.append(matched)
        elif merge == "drop":
            slots.append(None)
        elif merge in ("average", "igm-pos"):
            slots.append(matched)
        elif merge == "igm-neg":
            slots.append(len(targets))
        elif merge == "igm":
            slots.append(len(targets) if j in negative else matched)
    return slots


def temperatures(alpha: Vector, score_rows: list[int]) -> Vector:
    """η of each token: the mean of α over the sample's visual tokens (reading 2) that share its score row
    (reading 10).

    1 where all of these are 0, so that weights are uniform (reading 11).
    """
    return [mean([alpha[k] for k in range(len(alpha)) if score_rows[k] == row]) or 1.0 for row in score_rows]


def masked_importance(slots: list[int | None], alpha: Vector, n_rows: int) -> Matrix:
    """Eq. 6: M'_ij = α_j where token j goes to row i, else -inf; the negative set is out of M by now (reading
    5)."""
    return [[alpha[j] if slots[j] == i else -math.inf for j in range(len(alpha))] for i in range(n_rows)]


def merging_matrix(merge: str, slots: list[int | None], alpha: Vector, eta: Vector, n_t: int) -> Matrix:
    """W = Softmax(M'_i / η) for each row i; unless the negative set is empty, the last row is the
    compensation token's.

    Average merging (Turbo, Table 4) weighs all members of a row alike; pruning (FastV) keeps each target as
    it is.
    """
    n_rows = n_t + 1 if n_t in slots else n_t
    if merge in ("average", "drop"):
        sizes = [slots.count(i) for i in range(n_rows)]
        return [[1 / sizes[i] if slots[j] == i else 0.0 for j in range(len(alpha))] for i in range(n_rows)]
    return [
        softmax([entry / eta[j] for j, entry in enumerate(row)])
        for row in masked_importance(slots, alpha, n_rows)
    ]


def merged(w: Matrix, tokens: Matrix) -> Matrix:
    """Eq. 7: V' = W × V."""
    width = len(tokens[0])
    return [
        [sum(row[j] * tokens[j][d] for j in range(len(tokens)) if row[j] != 0) for d in range(width)]
        for row in w
    ]
