"""The demo's chain sft.py -> dpo.py -> online_dpo.py for several seeds: time, exact match on the
same held-out prompts, and whether each stage is better than the one before.

    python tests/bench_demo.py --output runs/demo-seeds

A paired bootstrap: seeds and prompts are drawn again with replacement 10,000 times, the same ones
for both stages. The 2.5 and 97.5 percentiles of the mean difference are the interval. Finished
stages are kept. The last line is JSON.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"sft": "sft", "dpo": "dpo", "online-dpo": "online-dpo/iteration-3"}   # its last model


def paired_bootstrap(difference, draws=10_000):
    """difference (seeds, prompts) -> mean, 2.5 and 97.5 percentile over resampled seeds and
    prompts."""
    rng = np.random.default_rng(0)
    s, p = difference.shape
    means = []
    for _ in range(draws):
        seeds, prompts = rng.integers(s, size=s), rng.integers(p, size=p)
        means.append(difference[seeds][:, prompts].mean())
    return float(difference.mean()), *map(float, np.percentile(means, [2.5, 97.5]))


def run(script, *flags, log):
    """A script of this project, its output into a log. The same command on a finished run only
    prints its stored result."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    with open(log, "a") as file:
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed; see {log}")
    return json.loads(process.stdout.splitlines()[-1])


def chain(seed, folder):
    """One seed's stages: {stage: {prompt: whether its answer is right}}, and their seconds."""
    log, seconds, models, start = folder / "log.txt", {}, {}, []
    for stage, last in STAGES.items():
        result = run(f"{stage.replace('-', '_')}.py", "--preset", "demo", "--seed", seed,
                     "--output", folder / stage, *start, log=log)
        seconds[stage], models[stage] = result["seconds"], folder / last
        start = ["--model", models[stage]]
    run("evaluate.py", "stages", *models.values(), "--output", folder / "evaluate", log=log)
    correct = {stage: correct_answers(model) for stage, model in models.items()}
    for stage, answers in correct.items():
        print(f"seed {seed} {stage:11} {np.mean(list(answers.values())):.4f} of {len(answers)}  "
              f"{seconds[stage]:5.0f} s", flush=True)
    return correct, sum(seconds.values())


def correct_answers(model):
    """{prompt: whether the model's answer equals the reference}, as evaluate.py left it."""
    lines = (model / "evaluate/exact-match/samples.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return {json.dumps(row["prompt"]): row["correct"] for row in rows}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", default="runs/demo-seeds")
    p.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    args = p.parse_args()
    correct, seconds = {}, {}
    for seed in args.seeds:
        folder = Path(args.output) / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        correct[seed], seconds[seed] = chain(seed, folder)
    prompts = sorted(correct[args.seeds[0]]["sft"])
    right = {stage: np.array([[of[stage][prompt] for prompt in prompts]
                              for of in correct.values()], dtype=float) for stage in STAGES}
    gain, names = {}, list(STAGES)
    for a, b in zip(names, names[1:]):
        mean, low, high = paired_bootstrap(right[b] - right[a])
        gain[f"{a} -> {b}"] = {"mean": mean, "low": low, "high": high, "significant": low > 0}
        print(f"{a} -> {b}: {100 * mean:+.1f} points, 95% interval {100 * low:+.1f} .. "
              f"{100 * high:+.1f}")
    exact = {stage: values.mean(1).tolist() for stage, values in right.items()}
    return {"exact_match": exact, "seconds": seconds, "gain": gain}


if __name__ == "__main__":
    print(json.dumps(main()))
