"""The graph and the walks of the benchmark randomwalks, by brute force."""

import itertools
import json

import numpy as np
import pytest

from jaxrlhf.benchmarks.published import randomwalks
from jaxrlhf.benchmarks.published.randomwalks import CUT, FAR, GOAL, STEPS, Graph, occurs


@pytest.fixture(scope="module")
def graph():
    return Graph()


def by_powers(graph: Graph) -> dict[int, int]:
    """Steps to the goal: the first power of the edges in which it is reached."""
    edges, found = np.array(graph.edges, int), {GOAL: 0}
    for steps in range(1, STEPS + 1):
        for node in np.flatnonzero(np.linalg.matrix_power(edges, steps)[:, GOAL]):
            found.setdefault(int(node), steps)
    return found


def test_shortest_paths_are_those_of_powers_of_the_edges(graph):
    assert graph.shortest == by_powers(graph)
    for start in graph.starts:
        for path in graph.best_paths(start):
            assert path[-1] == GOAL and len(path) == 1 + graph.shortest[start]
            assert all(graph.edges[one][other] for one, other in itertools.pairwise(path))
    assert len(graph.far) >= 3


def test_no_walk_contains_a_shortest_path_from_a_far_node_and_its_pieces_are_there(graph):
    walks = graph.walks(1000, 1)
    for start in graph.far:
        assert graph.shortest[start] >= FAR > CUT
        assert not any(occurs(path, walks) for path in graph.best_paths(start))
        assert graph.in_two_pieces(start, walks)
    assert not graph.in_two_pieces(3, walks)  # one step from the goal


def test_where_a_walk_is_cut_depends_on_what_was_walked_alone(graph):
    for walk in graph.walks(300, 2):
        first = next((at for at, node in enumerate(walk) if node in graph.far), len(walk))
        ends = min(STEPS, first + CUT)
        assert len(walk) - 1 == ends or (walk[-1] == GOAL and len(walk) - 1 < ends)
        assert GOAL not in walk[:-1]


def test_optimality_by_hand(graph):
    start = graph.far[0]
    best = graph.best_paths(start)[0]
    assert graph.optimality(best) == 1.0 == graph.optimality((*best, GOAL, 5))  # what follows the goal does not count
    assert graph.optimality(best[:-1]) == 0.0 == graph.optimality((start, GOAL))  # no goal; no edge
    longer = next(walk for walk in graph.walks(300, 4) if graph.shortest[walk[0]] + 2 == len(walk) and walk[-1] == GOAL)
    least = graph.shortest[longer[0]]
    assert graph.optimality(longer) == pytest.approx((STEPS - least - 1) / (STEPS - least))


def test_a_walk_to_the_goal_earns_what_is_left_of_ten_steps(tmp_path):
    randomwalks.write_data(tmp_path, 3, count=200)
    rows = [json.loads(line) for line in (tmp_path / "walks.jsonl").read_text().splitlines()]
    for row in rows:
        steps = len(row["response"])
        assert len(row["rewards"]) == steps and row["truncated"] == (row["response"][-1] != "a")
        assert sum(row["rewards"]) == pytest.approx((STEPS * (not row["truncated"]) - steps) / STEPS)
    assert {row["truncated"] for row in rows} == {True, False}
    for name, sums in (("constant", {0.0}), ("random", {0.0, 1.0})):
        others = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [row["response"] for row in others] == [row["response"] for row in rows]
        assert {sum(row["rewards"]) for row in others} == sums
