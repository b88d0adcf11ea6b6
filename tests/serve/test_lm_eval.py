"""lm-eval's `local-completions` asks the server: its log-likelihoods are those of a forward pass."""

import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.serve import writer
from jaxrlhf.sharding import MeshConfig, make_mesh

QUESTIONS = [("the film is", [" warm", " dull"]), ("the plot is lovely and its", [" script", " cat", " ending"])] * 2
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.mark.nightly  # lm-eval takes 20 s to start; by day: test_logprobs_of_an_echoed_prompt
def test_a_small_task(folder, address, tmp_path):
    program = shutil.which("lm_eval") or pytest.skip("lm_eval is not installed: pip install 'lm-eval[api]'")
    rows = [json.dumps({"question": question, "choices": choices}) for question, choices in QUESTIONS]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.replace("FILE", str(tmp_path / "test.jsonl")))
    model = f"model=tiny,base_url={address}/completions,tokenizer={folder},max_length=256"
    command = [program, "--model", "local-completions", "--model_args", model, "--tasks", "tiny_choice"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("samples_tiny_choice_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert len(samples) == len(QUESTIONS)
    for sample, (question, choices) in zip(samples, QUESTIONS):
        found = [float(likelihood) for ((likelihood, _),) in sample["resps"]]
        np.testing.assert_allclose(found, [likelihood(folder, question, choice) for choice in choices], atol=1e-3)


def likelihood(folder, question: str, choice: str) -> float:
    """log p(choice | question), of a forward pass over both."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = writer.read_model(str(folder), mesh)
        ids = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # lm-eval adds none
        whole, before = ids(question + choice), ids(question)
        row = jnp.array([whole])
        hidden = forward(model.params, model.config, row, jnp.ones_like(row), Runtime())
        logprobs = np.asarray(jax.nn.log_softmax(lm_logits(model.params, model.config, hidden)))[0]
    return float(sum(logprobs[at - 1, whole[at]] for at in range(len(before), len(whole))))
