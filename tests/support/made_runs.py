"""Run directories that nobody trained: every metric of the table, samples, histograms, a config."""

import json
import math
import re
from pathlib import Path
from typing import Any

from jaxrlhf.log.metric_names import METRICS

HOSTILE = "</script><script>document.title='taken'</script><b>bold</b> & \u2028 \ud83d half"
CONFIG = (
    "run_dir: {name}\niterations: {iterations}\nalgorithm:\n  name: ppo\n  kl_coef: {kl_coef}\nmodels: {{}}\nseed: 0\n"
)


def make_run(folder: Path, steps: int = 12, iterations: int = 12, kl_coef: float = 0.1, names: Any = None) -> Path:
    """A run of ``steps`` iterations that is evaluated at 0 and at every fourth. ``names``: its metrics, else all."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=folder, iterations=iterations, kl_coef=kl_coef))
    names = names or [re.sub("<.*?>", "policy", row.name) for row in METRICS]
    metrics, samples, histograms = [], [], []
    for step in range(steps + 1):
        numbers = {name: round(math.sin(step / 3 + at) + step * kl_coef, 4) for at, name in enumerate(names)}
        if step:
            metrics.append({"step": step, "time": 1.75e9 + step, **numbers})
        if step % 4 == 0:
            metrics.append({"step": step, "time": 1.75e9 + step, **{f"eval/{name}": x for name, x in numbers.items()}})
            samples += [sample(step, at) for at in range(8)]
            histograms.append({"step": step, "name": "score", "edges": [-1.0, 0.0, 1.0 + step], "counts": [3, step]})
    phases = [{"step": 0, "phase": "compiling", "seconds": 4.0}, {"step": steps, "phase": "saving", "seconds": 0.5}]
    written = {"metrics": metrics, "samples": samples, "histograms": histograms, "phases": phases}
    for name, rows in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluations").mkdir()
    for at, step in enumerate(range(4, steps + 1, 4)):
        kept = evaluation(folder, step, at)
        (folder / "evaluations" / f"{step:06d}-20261129-1200{at:02d}.json").write_text(json.dumps(kept))
    return folder


def evaluation(folder: Path, step: int, at: int) -> dict[str, Any]:
    """What `jaxrlhf evaluate` keeps, of a policy that gets better; every second by a language model too."""
    rate = 0.5 + 0.1 * at
    wins: dict[str, Any] = {"prompts": 64, "rate": rate, "low": rate - 0.12, "high": rate + 0.1}
    wins["length_controlled"] = rate - 0.03
    found = {"reward": wins}
    if at % 2:
        bias = {"first_position": 0.62, "agreement": 0.8, "unscorable": 0.016}
        cost = {"requests": 128, "prompt_tokens": 4096, "completion_tokens": 900}
        found["llm"] = {"model": "org/<b>judge</b>", "against": "chosen", **wins, "rate": rate - 0.05, **bias, **cost}
    pairs: dict[str, Any] = {"pairs": 128, "accuracy": 0.6 + 0.05 * at, "calibration_error": 0.08, "brier": 0.21}
    pairs["reliability"] = [[0.55, 0.5, 60], [0.72, 0.65 + at / 20, 48], [0.93, 0.9, 20]]
    bench = {"Chat": 0.9, "Chat Hard": 0.5, "Safety": 0.7, "Reasoning": 0.6}
    found_bench = {
        "file": "filtered.parquet",
        "version": 1,
        "rows": 8,
        "sections": bench,
        "score": 0.675,
        "subsets": {},
    }
    options = {"sampling": ["temperature=0.6", "top_p=0.95"]} if at % 2 else {}
    told = {"run": str(folder), "algorithm": "ppo", "step": step, "win_rates": found, "reward_model": pairs}
    told |= {"rewardbench": found_bench} if at == 2 else {}
    return {"written": f"2026-11-29T12:00:{at:02d}", "options": options, **told}


def sample(step: int, at: int) -> dict[str, Any]:
    words = ["plain", "good", "great", "gorgeous"][min(step // 4, 3)]
    response = HOSTILE if at == 0 else f"a {words} film number {at}"
    return {"step": step, "prompt": f"prompt {at}", "response": response, "score": at - step / 2, "split": "eval"}
