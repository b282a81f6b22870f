"""Which token went where: an optional record of every compression step, told in the numbers of the original
visual tokens."""

from dataclasses import dataclass, replace

import torch

from ..ops.spans import Spans
from ..step import Compressed

GONE, TARGET, MERGED, COMPENSATION, DROPPED = range(5)
FATES = ("gone", "target", "merged", "compensation", "dropped")


@dataclass(frozen=True)
class StageTrace:
    """What one compression layer did to one row's n original visual tokens. Everything is (n,), on the CPU.

    Attributes:
        layer: the compression layer.
        fate: int8: GONE (an earlier stage took it), TARGET, MERGED, COMPENSATION or DROPPED.
        slot: the number of the target token it went into, its own for a target; -1 where there is none.
        weight: float32, its share of the token it went into (a row of eq. 7's W); 0 where there is none.
        importance: float32, α of eq. 4; nan for tokens that were gone.
        similarity: float32, s^max of eq. 5, 1 for a target; nan for tokens that were gone, and where nobody
            asked for it.
    """

    layer: int
    fate: torch.Tensor
    slot: torch.Tensor
    weight: torch.Tensor
    importance: torch.Tensor
    similarity: torch.Tensor

    @property
    def mean_similarity(self) -> float:
        """Table 4's Sim: the mean s^max of the tokens that are no targets; nan where it is not known."""
        return float(self.similarity[self.fate > TARGET].mean())

    @property
    def compensation_share(self) -> float:
        """Share of the tokens that are no targets that went into the compensation token; nan where there are
        none."""
        rest = self.fate > TARGET
        return float((self.fate[rest] == COMPENSATION).float().mean())


@dataclass(frozen=True)
class RowTrace:
    """The fates of one row's visual tokens, numbered span after span; ``spans`` are the spans' lengths before
    compression."""

    spans: tuple[int, ...]
    stages: tuple[StageTrace, ...]

    def kept(self, stage: int) -> list[int]:
        """The target tokens of a stage (an index into ``stages``), ascending."""
        return (self.stages[stage].fate == TARGET).nonzero().flatten().tolist()

    def to_json(self) -> dict:
        """Plain JSON values, null for nan; :meth:`from_json` gives back an equal trace."""
        return {
            "spans": list(self.spans),
            "stages": [
                {"layer": stage.layer, **{name: _numbers(getattr(stage, name)) for name in _PER_TOKEN}}
                for stage in self.stages
            ],
        }

    @classmethod
    def from_json(cls, data: dict) -> "RowTrace":
        """Raises ValueError where the values are no trace: something is missing, or the lengths do not
        agree."""
        try:
            spans = tuple(int(n) for n in data["spans"])
            stages = tuple(
                StageTrace(
                    int(stage["layer"]), *(_tensor(stage[name], dtype) for name, dtype in _PER_TOKEN.items())
                )
                for stage in data["stages"]
            )
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"this is not a trace: {reason}") from None
        count = sum(spans)
        for stage in stages:
            where = f"this is not a trace: layer {stage.layer}"
            for name in _PER_TOKEN:
                if getattr(stage, name).shape != (count,):
                    raise ValueError(f"{where} has not one {name} for each of {count} tokens")
            if not bool(
                (
                    (0 <= stage.fate) & (stage.fate < len(FATES)) & (-1 <= stage.slot) & (stage.slot < count)
                ).all()
            ):
                raise ValueError(f"{where} has fates or slots that do not exist")
            is_target = stage.fate == TARGET
            if not bool(is_target[stage.slot[stage.fate == MERGED]].all()):
                raise ValueError(f"{where} merges tokens into one that is not a target")
            if not all(bool(part.any()) for part in is_target.split(spans)):
                raise ValueError(f"{where} has a span without a target")
        return cls(spans, stages)


def intervals(trace: RowTrace, stage: int) -> torch.Tensor:
    """The interval (§3.2) of each token at a stage, (n,), counted over all spans.

    An interval is a run of the tokens that were left; a token between them that was gone has the number of
    the one before it.
    """
    numbers, first = [], 0
    for fate in trace.stages[stage].fate.split(trace.spans):
        alive, targets = fate != GONE, int((fate == TARGET).sum())
        numbers.append(first + (alive.cumsum(0).clamp(min=1) * targets - 1) // int(alive.sum()))
        first += targets
    return torch.cat(numbers)


_PER_TOKEN = {
    "fate": torch.int8,
    "slot": torch.long,
    "weight": torch.float32,
    "importance": torch.float32,
    "similarity": torch.float32,
}


def _numbers(values: torch.Tensor) -> list:
    """As short as a float32 can be told exactly."""
    if not values.is_floating_point():
        return values.tolist()
    return [None if value != value else float(f"{value:.9g}") for value in values.tolist()]


def _tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=dtype)


class Recorder:
    """Collects the steps of one prefill; nothing is brought to the host before :meth:`rows` asks for it."""

    def __init__(self):
        self._steps: list[tuple[int, Compressed, list[list[int]]]] = []

    def add(self, layer: int, step: Compressed, spans: list[list[int]]) -> None:
        """``spans``: the lengths of each row's spans before the step, without a stand-in for rows that have
        none."""
        self._steps.append((layer, replace(step, tokens=step.tokens[:, :, :0].clone()), spans))

    def rows(self) -> list[RowTrace]:
        """One :class:`RowTrace` a row."""
        first = self._steps[0][2] if self._steps else []
        steps = [(layer, _OnHost.of(step), spans) for layer, step, spans in self._steps]
        return [
            RowTrace(tuple(spans), tuple(self._stages(steps, b, sum(spans)))) for b, spans in enumerate(first)
        ]

    @staticmethod
    def _stages(steps, b: int, tokens: int):
        alive = torch.arange(tokens)
        for layer, step, spans in steps:
            count = sum(spans[b])
            group, weight = step.groups[b, :count], step.token_weights[b, :count]
            targets = step.targets[b, : step.layout.target_counts[b] if count else 0]
            is_target = torch.zeros(count, dtype=torch.bool)
            is_target[targets] = True
            merged = (group >= 0) & (group < step.layout.targets)
            fate = torch.where(merged, MERGED, torch.where(group < 0, DROPPED, COMPENSATION))
            into = torch.full((count,), -1)
            into[merged] = alive[targets[group[merged]]]

            def over_all(values, nothing, alive=alive):
                whole = torch.full((tokens,), nothing, dtype=values.dtype)
                whole[alive] = values
                return whole

            similarity = (
                torch.full((count,), torch.nan) if step.similarity is None else step.similarity[b, :count]
            )
            yield StageTrace(
                layer,
                over_all(torch.where(is_target, TARGET, fate).to(torch.int8), GONE),
                over_all(into, -1),
                over_all(torch.where(group < 0, 0.0, weight), 0.0),
                over_all(step.importance[b, :count], torch.nan),
                over_all(similarity, torch.nan),
            )
            alive = alive[targets]


@dataclass(frozen=True)
class _OnHost:
    """What a trace keeps of a step, on the CPU."""

    layout: Spans
    targets: torch.Tensor
    groups: torch.Tensor
    token_weights: torch.Tensor
    importance: torch.Tensor
    similarity: torch.Tensor | None

    @classmethod
    def of(cls, step: Compressed) -> "_OnHost":
        similarity = None if step.similarity is None else step.similarity.cpu()
        targets, groups = step.targets.cpu(), step.groups.cpu()
        weights, importance = step.token_weights.cpu(), step.importance.cpu()
        return cls(step.layout, targets, groups, weights, importance, similarity)
