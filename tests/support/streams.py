"""The streams of the kinds of data, by name."""

import functools

from jaxrlhf.data import batches
from jaxrlhf.data.batch_kinds import COMPARISONS, DEMONSTRATIONS, PREFERENCES, PROMPTS, TRAJECTORIES, UNPAIRED

demonstration_stream = functools.partial(batches.stream, DEMONSTRATIONS)
comparison_stream = functools.partial(batches.stream, COMPARISONS)
preference_stream = functools.partial(batches.stream, PREFERENCES)
prompt_stream = functools.partial(batches.stream, PROMPTS)
unpaired_stream = functools.partial(batches.stream, UNPAIRED)
trajectory_stream = functools.partial(batches.stream, TRAJECTORIES)
