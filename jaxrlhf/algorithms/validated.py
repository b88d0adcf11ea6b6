"""An algorithm from outside the package, whose answers are checked where they are given: a mistake is one line."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import jax

from jaxrlhf.algorithm import Algorithm, Normalization, Updates
from jaxrlhf.algorithms.grading import members_of
from jaxrlhf.errors import cut, nearest, one_line
from jaxrlhf.types import Batch, Experience, HeadSpec, Mean, Nets, Role, Sequences, TrainState
from jaxrlhf.user_code import describe

FIELDS = tuple(field.name for field in dataclasses.fields(Batch))


OUTPUTS = get_args(HeadSpec.__annotations__["outputs"])


class AlgorithmError(ValueError):
    """What is wrong with an algorithm from outside, in one line."""


PARTS = (
    "batch",
    "roles",
    "updates",
    "prepare",
    "loss",
    "rollout",
    "controls",
    "after_update",
    "after",
    "finish",
    "problems",
    "min_samples",
    "informative",
)
OPTIONAL = ("after_update", "informative")


def checked(name: str, record: Algorithm) -> Algorithm:
    """``record`` with every function checked; each raises AlgorithmError for what it raises, and for a wrong answer.

    Raises ValueError where its config is no frozen dataclass, or a function none."""
    config = record.config
    is_frozen = dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not isinstance(config, type) or not is_frozen:
        raise ValueError(f"its config is {show(config)}; expected a class under @dataclasses.dataclass(frozen=True)")
    for part in PARTS:
        function = getattr(record, part)
        if not (callable(function) or (function is None and part in OPTIONAL)):
            raise ValueError(f"its {part} is {show(function)}; expected a function")
    if not isinstance(record.online, bool):
        raise ValueError(f"its online is {show(record.online)}; expected True or False")
    return with_checks(name, record)


@functools.cache
def with_checks(name: str, record: Algorithm) -> Algorithm:
    """``checked`` of a record of functions: one for each, as programs are compiled once for each."""
    checks: dict[str, Callable[..., str | None]] = {
        "batch": lambda found, *_: wrong_fields(found, record.online),
        "roles": wrong_roles,
        "prepare": wrong_experience,
        "loss": lambda found, nets, *given: wrong_losses(found, trained_roles(nets, record.roles(given[-1])[0])),
        "rollout": lambda found, *_: wrong_type(found, Sequences),
        "controls": lambda found, *_: wrong_scalars(found),
        "updates": lambda found, *_: wrong_updates(found),
        "after_update": lambda found, state, *_: wrong_state(found, state),
        "after": lambda found, state, *_: wrong_state(found, state),
        "finish": lambda found, *_: None if found is None else wrong_type(found, Normalization),
        "problems": lambda found, *_: wrong_lines(found),
        "min_samples": lambda found, *_: wrong_count(found),
        "informative": lambda found, *_: wrong_flags(found),
    }
    parts = {part: function for part in PARTS if (function := getattr(record, part)) is not None}
    guarded = {part: guard(name, part, function, checks[part]) for part, function in parts.items()}
    return record._replace(**guarded | {"updates": with_guarded_stop(name, guarded["updates"])})


def with_guarded_stop(name: str, updates: Callable[..., Updates]) -> Callable[..., Updates]:
    """``updates`` whose ``stop`` is checked too."""

    @functools.wraps(updates)
    def call(*given: Any) -> Updates:
        found = updates(*given)
        if found.stop is None:
            return found
        one_bool = lambda stop, *_: None if shape(stop) == () else f"returned {show(stop)}; expected one bool"
        return found._replace(stop=guard(name, "stop", found.stop, one_bool))

    return call


def guard(name: str, part: str, function: Callable, check: Callable[..., str | None]) -> Callable:
    """``function``, with its errors in one line and its answers checked."""

    @functools.wraps(function)
    def call(*given: Any) -> Any:
        try:
            found = function(*given)
        except AlgorithmError:
            raise
        except Exception as error:
            raise AlgorithmError(f"{name}: {part} raised {describe(error)}") from error
        if problem := check(found, *given):
            raise AlgorithmError(f"{name}: {part} {problem}")
        return found

    return call


# ---- what may be wrong: None, or what to say ------------------------------------------------------------------------


def wrong_fields(found: Any, online: bool) -> str | None:
    if not isinstance(found, (tuple, list)) or not found or not all(isinstance(field, str) for field in found):
        return f"returned {show(found)}; expected a tuple of fields of Batch: {', '.join(FIELDS)}"
    unknown = [field for field in found if field not in FIELDS]
    if unknown:
        return f"returned the field {unknown[0]}, which data do not fill; {nearest(unknown[0], FIELDS)}"
    if online and "prompts" not in found:
        return f"returned {show(found)}; expected prompts among them, as it is online"
    return None


def wrong_roles(found: Any, *_: Any) -> str | None:
    expected = 'expected (trained, slow), as in ({"policy": "lm"}, {}); heads: lm, scalar, HeadSpec(...)'
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(heads, dict) for heads in found):
        return f"returned {show(found)}; {expected}"
    heads = [head for part in found for head in part.values()]
    known = lambda head: head in ("lm", "scalar") or (isinstance(head, HeadSpec) and head.outputs in OUTPUTS)
    return None if found[0] and all(map(known, heads)) else f"returned {show(found)}; {expected}"


def wrong_experience(found: Any, *_: Any) -> str | None:
    if not isinstance(found, tuple) or len(found) != 2:
        return f"returned {show(found)}; expected (Experience, dict of Means)"
    return wrong_type(found[0], Experience, "first") or wrong_means(found[1], "second")


def trained_roles(nets: Nets | None, asked: Iterable[Role]) -> list[Role]:
    """The roles that losses are given for: those that the algorithm trains, an ensemble's members in its place."""
    return sorted(one for role in asked for one in (members_of(nets, role) if nets else (role,)))


def wrong_losses(found: Any, trained: list[str]) -> str | None:
    if not isinstance(found, tuple) or len(found) != 2:
        return f"returned {show(found)}; expected (a Mean for each of {', '.join(trained)}; dict of Means)"
    if problem := wrong_means(found[0], "first") or wrong_means(found[1], "second"):
        return problem
    if sorted(found[0]) != trained:
        return f"returned losses of {', '.join(found[0]) or 'no role'}; expected {', '.join(trained)}: what it trains"
    return None


def wrong_means(found: Any, which: str) -> str | None:
    if not isinstance(found, Mapping):
        return f"returned {show(found)} as the {which}; expected a dict of Means"
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Mean):
            return f"returned {show(value)} as {show(key)}; expected a Mean(total, count) under a name"
        for field in ("total", "count"):
            if (size := shape(getattr(value, field))) != ():
                return f"returned {show(key)} with a {field} of shape {size}; expected one number, of all rows here"
    return None


def wrong_scalars(found: Any) -> str | None:
    if not isinstance(found, Mapping) or any(shape(value) != () for value in found.values()):
        return f"returned {show(found)}; expected a dict of f32[] by name"
    return None


def wrong_updates(found: Any) -> str | None:
    if not isinstance(found, Updates):
        return f"returned {show(found)}; expected Updates(epochs, minibatches, stop)"
    for field in ("epochs", "minibatches"):
        if not isinstance(number := getattr(found, field), int) or number < 1:
            return f"returned {field} {show(number)}; expected an integer of 1 or more"
    return None if found.stop is None or callable(found.stop) else f"returned the stop {show(found.stop)}"


def wrong_count(found: Any) -> str | None:
    return None if isinstance(found, int) and found > 0 else f"returned {show(found)}; expected an integer of 1 or more"


def wrong_flags(found: Any) -> str | None:
    if isinstance(found, tuple) and len(found) == 2 and [len(shape(part) or ()) for part in found] == [1, 1]:
        return None
    return f"returned {show(found)}; expected (bool[groups], scores f32[rows])"


def wrong_state(found: Any, given: Any) -> str | None:
    """A loop carries the state: what a leaf is may not change."""
    if problem := wrong_type(found, TrainState):
        return problem
    kind = lambda tree: {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    ours, theirs = kind(found), kind(given)
    for path in sorted({*ours, *theirs}):
        if ours.get(path) != theirs.get(path):
            was, now = theirs.get(path, "nothing"), ours.get(path, "nothing")
            return f"returned a state whose {path.lstrip('.')} is {now}; expected {was}, as it was"
    return None


def wrong_lines(found: Any) -> str | None:
    if isinstance(found, str) or not isinstance(found, Iterable):
        return f"returned {show(found)}; expected lines of text"
    return None


def wrong_type(found: Any, expected: type, which: str = "") -> str | None:
    where = f" as the {which}" if which else ""
    return None if isinstance(found, expected) else f"returned {show(found)}{where}; expected {expected.__name__}"


def shape(value: Any) -> Any:
    """() of a plain number too; None of what is no array."""
    return () if isinstance(value, (bool, int, float)) else getattr(value, "shape", None)


def show(value: Any) -> str:
    """A small plain value as it is, anything else by its type: arrays under a tracer are long."""
    if is_plain(value):
        return cut(one_line(repr(value)))
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{'an' if type(value).__name__[0] in 'AEIOUaeiou' else 'a'} {type(value).__name__}"


def is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, dict)):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (str, int, float))
