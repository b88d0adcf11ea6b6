"""No change makes an iteration costlier unnoticed: its programs are held to what tests/golden/costs.json says of them.

FLOPs of the traced programs (within 1 %), temporaries of one CPU device (within 5 %), and collectives of eight, loop by
loop (exactly): counts, so that they are the same on every machine. Cheaper fails too, so that a gain is kept. Who means
it writes the file anew, by ``python -m tests.support.costs``, and shows by how much it changed.

How many programs an iteration dispatches and whether one is compiled again is counted in tests/test_step.py and
tests/test_train.py, and on meshes in tests/test_mesh.py.
"""

import json
import math
import warnings
from importlib.metadata import version

import pytest

from jaxrlhf.config.batch import minibatch_rows
from jaxrlhf.ops.logprobs import STORED_LOGITS
from jaxrlhf.plan import hlo
from tests.support import costs
from tests.support.costs import CASES, NEW, VOCAB

GOLDEN = json.loads(costs.GOLDEN.read_text())
WIDE = 2**17  # a vocabulary whose logits are computed in chunks
ROW_SHARDS = 4  # of the eight devices: data 2 x fsdp 2


def hold(what: str, found: int, expected: int, tolerance: float) -> None:
    """Fails where ``found`` is off by more than that share."""
    change = found / expected - 1
    if abs(change) > tolerance:
        consequence = "costlier; if that is meant" if change > 0 else "cheaper; to keep the gain"
        pytest.fail(
            f"{what}: {found:,}, expected {expected:,} ({change:+.1%}): {consequence}: python -m tests.support.costs"
        )


def skip_other_jaxlib() -> None:
    if (here := version("jaxlib")) != GOLDEN["jaxlib"]:
        why = f"not compared: what XLA makes of it was counted with jaxlib {GOLDEN['jaxlib']}, and this is {here}"
        warnings.warn(why, stacklevel=2)  # the summary shows it, where a skip is a letter
        pytest.skip(why)


@pytest.mark.parametrize("name", CASES)
def test_flops_of_the_traced_programs(name):
    """Beside them stands what no program could do without."""
    found, expected = costs.count_flops(name), dict(GOLDEN["flops"][name])
    assert expected.pop("ratio") == round(costs.ratio(expected), 3)
    assert found.keys() == expected.keys()
    assert costs.ratio(found) >= 1, "less than the work: one of the two is counted wrongly"
    for program in found:
        hold(f"{name}, {program}: FLOPs", found[program], expected[program], 0.01)


def cases(*often: str) -> list:
    """All cases, of which some are for every change and the others nightly."""
    return [pytest.param(name, marks=[] if name in often else pytest.mark.nightly) for name in CASES]


@pytest.mark.parametrize("name", cases("sft", "dpo"))
def test_memory_of_one_device(name):
    made, expected = costs.compiled(name, 1), GOLDEN["memory"][name]
    check_donated(made)
    skip_other_jaxlib()
    for program, compiled in made.programs.items():
        found = costs.count_memory(compiled)
        assert found["aliased"] == expected[program]["aliased"], f"{name}, {program}: bytes that are donated"
        hold(f"{name}, {program}: bytes of temporaries", found["temporaries"], expected[program]["temporaries"], 0.05)


def check_donated(made: costs.Made) -> None:
    """The whole state is donated to the program that updates it."""
    *_, last = made.programs.values()
    aliased = costs.count_memory(last)["aliased"]
    assert aliased >= made.state_bytes > 0, f"{made.state_bytes - aliased:,} bytes of the state are not donated"


@pytest.mark.nightly  # by day: what gathers, in test_mesh.py and models/test_linear.py
@pytest.mark.parametrize("name", CASES)
def test_collectives_of_eight_devices(name):
    made, expected = costs.compiled(name, 8), GOLDEN["collectives"][name]
    check_donated(made)
    check_decoding(made)
    skip_other_jaxlib()
    for program, compiled in made.programs.items():
        found = costs.count_collectives(compiled)
        assert found == expected[program], f"{name}, {program}: {differences(found, expected[program])}"


def check_decoding(made: costs.Made) -> None:
    """What is gathered for every token is the token, and logits are traded; weights are gathered before the loop."""
    if not made.case.drawn.algorithm.online:
        return
    first, *_ = made.programs.values()
    inside = [sent for sent in costs.collectives(first.as_text() or "") if str(NEW) in sent.loop.split(" x ")]
    shapes = lambda kind: [shape for sent in inside if sent.kind == kind for shape in sent.gives]
    batch = made.case.drawn.cfg.batch
    rows = batch.prompts_per_step * batch.samples_per_prompt // ROW_SHARDS
    traded = sum(map(math.prod, shapes("all-to-all")))
    assert 0 < traded <= rows * VOCAB // 2, f"numbers traded for every token: {traded}; was the loop found?"
    others = [shape for shape in shapes("all-gather") if math.prod(shape) > rows]
    assert not others, f"gathered for every token, and no tokens: {others}"


def differences(found: dict, expected: dict) -> str:
    """Loop by loop, what one trip sends and was to send."""
    kinds = {(loop, kind) for counts in (found, expected) for loop in counts for kind in counts[loop]}
    count = lambda counts, loop, kind: counts.get(loop, {}).get(kind, 0)
    both = [(*key, count(found, *key), count(expected, *key)) for key in sorted(kinds)]
    lines = [f"loop {loop}: {now} {kind}, expected {then}" for loop, kind, now, then in both if now != then]
    return f"a trip sends {'; '.join(lines)}; if that is meant: python -m tests.support.costs"


def test_logits_of_a_wide_vocabulary_are_never_stored_whole():
    made = costs.compiled("sft", 1, WIDE)
    columns = made.case.shapes.sequences.tokens.shape[1] - 1
    drawn = made.case.drawn
    rows = minibatch_rows(drawn.resolved) // drawn.recipe.num_micro
    assert rows * columns * WIDE > STORED_LOGITS, "too few to be computed in chunks"
    _, program = hlo.parse(made.programs["iteration"].as_text() or "")
    shapes = {shape for lines in program.values() for line in lines for shape in costs.arrays(line) if WIDE in shape}
    largest = max(shapes, key=math.prod)
    assert STORED_LOGITS / 2 < math.prod(largest) <= STORED_LOGITS, f"logits of shape {largest}"
