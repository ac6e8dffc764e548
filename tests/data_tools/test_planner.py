"""The plan: exactly once, within budgets, blind to ranks, resumable from any state."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.stream.hashing import hash_key
from data_tools.stream.order import EpochOrder
from data_tools.stream.planner import (
    WINDOW,
    DataState,
    PlannedSample,
    Planner,
    Step,
    choose_pack,
    pack_cost,
)


@dataclass
class Lengths:
    """A source of nothing but lengths, in the real order of its epochs."""

    shard_sizes: list[int]
    tokens: np.ndarray
    patches: np.ndarray
    weight: float = 1.0
    parts: int = 1
    orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def num_draws(self, epochs: int) -> int:
        return epochs * len(self)

    def draws(self, source: int, number: int) -> tuple[PlannedSample, ...]:
        epoch, position = divmod(number, len(self))
        if (source, epoch) not in self.orders:
            order = EpochOrder(np.asarray(self.shard_sizes), hash_key(0, "order", source, epoch))
            self.orders[source, epoch] = order.sample_ids(0, len(self))
        row = int(self.orders[source, epoch][position])
        tokens, patches = int(self.tokens[row]), int(self.patches[row])
        windows = self.parts if row % 3 == 0 else 1
        return tuple(
            PlannedSample(source, number, row, epoch, 0, tokens, patches, 1000, window, windows)
            for window in range(windows)
        )


@st.composite
def datasets(draw: st.DrawFn) -> list[Lengths]:
    """One to three sources, of shards that may be empty."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(sum))
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        tokens = rng.integers(1, 101, sum(sizes))
        patches = 4 * rng.integers(0, tokens + 1)
        weight = draw(st.sampled_from([0.2, 1.0, 1.0, 3.0]))
        made.append(Lengths(sizes, tokens, patches, weight, draw(st.integers(1, 3))))
    return made


budgets = st.tuples(st.integers(100, 300), st.integers(400, 1200))


def first_state(sources: list[Lengths]) -> DataState:
    return DataState.first({"seed": "mark"}, ["shards"] * len(sources))


def steps_of(
    sources: list[Lengths],
    budget: tuple[int, int],
    packs: int,
    state: DataState | None = None,
    epochs: int = 1,
) -> list[Step]:
    planner = Planner(
        sources, [epochs] * len(sources), *budget, packs, state or first_state(sources)
    )
    return list(iter(planner.next_step, None))


def as_json_and_back(state: DataState) -> DataState:
    return DataState.from_json(json.loads(json.dumps(state.to_json())))


@given(datasets(), budgets, st.integers(1, 7), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_every_sample_once_an_epoch_within_both_budgets(
    sources: list[Lengths], budget: tuple[int, int], packs: int, epochs: int
) -> None:
    steps = steps_of(sources, budget, packs, epochs=epochs)
    samples = [sample for step in steps for pack in step.packs for sample in pack]
    seen = Counter((s.source, s.epoch, s.sample_id, s.window) for s in samples)
    expected = {
        (k, epoch, row, window)
        for k, s in enumerate(sources)
        for epoch in range(epochs)
        for row in range(len(s))
        for window in range(s.parts if row % 3 == 0 else 1)
    }
    assert set(seen) == expected and set(seen.values()) == {1}
    for pack in (pack for step in steps for pack in step.packs):
        assert pack and sum(s.tokens for s in pack) <= budget[0]
        assert sum(s.patches for s in pack) <= budget[1]
    assert [len(step.packs) for step in steps[:-1]] == [packs] * (len(steps) - 1)
    assert [step.number for step in steps] == list(range(len(steps)))
    assert steps_of(sources, budget, packs, steps[-1].state, epochs) == []


@given(datasets(), budgets, st.integers(1, 7), st.data())
@settings(max_examples=30, deadline=None)
def test_any_saved_state_goes_on_with_exactly_the_following_steps(
    sources: list[Lengths], budget: tuple[int, int], packs: int, data: st.DataObject
) -> None:
    steps = steps_of(sources, budget, packs, epochs=2)
    place = data.draw(st.integers(0, len(steps) - 1))
    state = as_json_and_back(steps[place].state)
    assert state == steps[place].state
    assert steps_of(sources, budget, packs, state, epochs=2) == steps[place + 1 :]


@given(datasets(), budgets, st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_any_world_size_gets_the_same_packs(
    sources: list[Lengths], budget: tuple[int, int], packs: int
) -> None:
    for step in steps_of(sources, budget, packs)[:3]:
        for world in (1, 2, 3, 4, 8):
            micro_steps = step.assign(world)
            assert len(micro_steps) == -(-len(step.packs) // world)
            assert all(len(micro_step) == world for micro_step in micro_steps)
            dealt = [pack for micro_step in micro_steps for pack in micro_step]
            assert sorted(pack for pack in dealt if pack is not None) == sorted(step.packs)
            assert None not in dealt[: len(step.packs)], "only the last micro-step is topped up"


@given(datasets(), budgets)
@settings(max_examples=30, deadline=None)
def test_the_oldest_candidate_is_always_taken(
    sources: list[Lengths], budget: tuple[int, int]
) -> None:
    state = first_state(sources)
    steps = steps_of(sources, budget, 1)
    draws: list[tuple[int, int, int]] = []  # in the order in which candidates came
    used = [0] * len(sources)
    while sum(used) < sum(len(s) for s in sources):
        live = [k for k, s in enumerate(sources) if used[k] < len(s)]
        k = min(live, key=lambda k: ((used[k] + 1) / sources[k].weight, k))
        draws += [(k, used[k], s.window) for s in sources[k].draws(k, used[k])]
        used[k] += 1
    assert not state.window
    for step in steps:
        pack = [(s.source, s.draw, s.window) for s in step.packs[0]]
        assert pack[0] == draws[0]
        assert pack == sorted(pack, key=draws.index)
        draws = [draw for draw in draws if draw not in pack]
    assert not draws


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(30, 70))
def test_tokens_are_the_largest_subset_sum(tokens: list[int], budget: int) -> None:
    chosen, is_patch_bound = choose_pack(tokens, [0] * len(tokens), budget, 0)
    assert not is_patch_bound
    best = max(
        total
        for size in range(len(tokens))
        for others in itertools.combinations(tokens[1:], size)
        if (total := tokens[0] + sum(others)) <= budget
    )
    assert sum(tokens[i] for i in chosen) == best
    assert chosen == sorted(set(chosen)) and chosen[0] == 0


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=8),
    st.integers(30, 70),
    st.integers(40, 100),
)
def test_tokens_are_the_largest_sum_that_the_patches_allow(
    items: list[tuple[int, int]], token_budget: int, patch_budget: int
) -> None:
    tokens, patches = [t for t, _ in items], [p for _, p in items]
    chosen, is_patch_bound = choose_pack(tokens, patches, token_budget, patch_budget)
    by_tokens, _ = choose_pack(tokens, [0] * len(tokens), token_budget, 0)
    assert is_patch_bound == (sum(patches[i] for i in by_tokens) > patch_budget)
    assert sum(patches[i] for i in chosen) <= patch_budget
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(items)), size) for size in range(len(items))
    )
    best = max(
        tokens[0] + sum(tokens[i] for i in subset)
        for subset in subsets
        if tokens[0] + sum(tokens[i] for i in subset) <= token_budget
        and patches[0] + sum(patches[i] for i in subset) <= patch_budget
    )
    assert sum(tokens[i] for i in chosen) == best


def test_the_older_of_two_equal_choices_is_taken() -> None:
    assert choose_pack([5, 3, 3, 5, 2], [0] * 5, 8, 0) == ([0, 1], False)
    assert choose_pack([5, 3, 3, 3], [4, 9, 4, 4], 8, 8) == ([0, 2], True)


def test_a_sample_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="fits no pack"):
        choose_pack([9, 1], [0, 0], 8, 8)
    with pytest.raises(ValueError, match="fits no pack"):
        choose_pack([1, 1], [9, 0], 8, 8)


def test_state_stays_small() -> None:
    rng = np.random.default_rng(0)
    sources = []
    for _ in range(8):
        tokens = rng.integers(10, 100, 1000)
        sources.append(Lengths([1000], tokens, 2 * tokens))
    settings = {f"data.setting_number_{number}": "f" * 12 for number in range(10)}
    start = DataState(settings, ("f" * 16,) * 8, (9_000_000,) * 8, 10**6)
    step = Planner(sources, [10**6] * 8, 1000, 4000, 4, start).next_step()
    assert step is not None and len(step.state.window) > WINDOW - 30
    full = replace(start, window=((7, 9_000_000, 0),) * WINDOW)
    for state in (step.state, full):
        assert len(json.dumps(state.to_json())) < 4096


def realistic_mix(count: int) -> Lengths:
    """Receipts, line crops, pages and forms; about 1,960 tokens each, longest about 6,900."""
    g = np.random.Generator(np.random.PCG64(20261123))
    kind, z = np.digitize(g.random(count), [0.5, 0.7, 0.9]), g.standard_normal(count)
    text = np.choose(
        kind,
        [
            260 * np.exp(0.45 * z),
            18 * np.exp(0.5 * z),
            1100 * np.exp(0.4 * z),
            450 * np.exp(0.45 * z),
        ],
    )
    visual = np.choose(
        kind,
        [
            g.integers(900, 3000, count),
            g.integers(8, 120, count),
            g.integers(1000, 2900, count),
            g.integers(1100, 3000, count),
        ],
    )
    text = text.clip(2, 4000).astype(np.int64)
    return Lengths([count], text + 30 + visual, 4 * visual)


def test_packs_of_a_realistic_mix_are_over_99_percent_full() -> None:
    source = realistic_mix(1500)
    steps = steps_of([source], (8192, 4 * 8192), 8)
    packs = [pack for step in steps[:-2] for pack in step.packs]
    fill = sum(s.tokens for pack in packs for s in pack) / (8192 * len(packs))
    assert fill > 0.99


def test_sources_are_mixed_by_weight() -> None:
    rng = np.random.default_rng(1)
    weights = (50.0, 20.0, 20.0, 10.0)
    sources = [
        Lengths([4000], rng.integers(1, 50, 4000), np.zeros(4000, np.int64), w) for w in weights
    ]
    planner = Planner(sources, [1] * 4, 200, 0, 4, first_state(sources))
    for _ in range(20):
        step = planner.next_step()
        assert step is not None
        drawn = np.asarray(step.state.cursors)
        assert np.abs(drawn - drawn.sum() * np.asarray(weights) / 100).max() <= 1.5


def test_a_finished_source_leaves_and_the_others_go_on() -> None:
    small = Lengths([3], np.full(3, 10), np.zeros(3, np.int64), weight=5.0)
    large = Lengths([30], np.full(30, 10), np.zeros(30, np.int64))
    steps = steps_of([small, large], (20, 0), 2)
    assert steps[-1].state.cursors == (3, 30)
    samples = [s for step in steps for pack in step.packs for s in pack]
    assert Counter(s.source for s in samples) == {0: 3, 1: 30}


def test_sources_have_their_own_number_of_epochs() -> None:
    sources = [Lengths([5], np.full(5, 10), np.zeros(5, np.int64)) for _ in range(2)]
    planner = Planner(sources, [3, 1], 20, 0, 2, first_state(sources))
    samples = [s for step in iter(planner.next_step, None) for pack in step.packs for s in pack]
    assert Counter(s.source for s in samples) == {0: 15, 1: 5}
    assert Counter((s.sample_id, s.epoch) for s in samples if s.source == 0) == {
        (row, epoch): 1 for row in range(5) for epoch in range(3)
    }


def test_micro_steps_take_neighbours_by_cost() -> None:
    source = realistic_mix(400)
    step = steps_of([source], (8192, 4 * 8192), 16)[0]
    costs = [[pack_cost(pack or ()) for pack in micro_step] for micro_step in step.assign(4)]
    flat = [cost for micro_step in costs for cost in micro_step]
    assert flat == sorted(flat, reverse=True)
    longest = sum(max(micro_step) for micro_step in costs)
    assert longest * 4 <= 1.1 * sum(flat)


def test_plan_hash_tells_plans_apart() -> None:
    source = realistic_mix(200)
    hashes = [step.plan_hash for step in steps_of([source], (8192, 4 * 8192), 4)]
    assert len(set(hashes)) == len(hashes)
    assert all(0 <= value < 2**63 for value in hashes)
    assert hashes == [step.plan_hash for step in steps_of([source], (8192, 4 * 8192), 4)]


def test_state_of_another_run_is_refused() -> None:
    source = realistic_mix(10)
    with pytest.raises(DataError, match="2 sources, the run has 1"):
        Planner([source], [1], 8192, 8192, 1, DataState.first({}, ["a", "b"]))
    with pytest.raises(DataError, match="version 9, expected 2"):
        DataState.from_json({"version": 9})
