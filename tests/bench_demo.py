"""The demo's chain sft.py -> dpo.py -> online_dpo.py for several seeds: time, exact match on the same held-out prompts, and
whether each stage is better than the one before.

    python tests/bench_demo.py --output runs/demo-seeds

A paired bootstrap: seeds and prompts are drawn again with replacement 10,000 times, the same ones for both stages, and the
2.5 and 97.5 percentiles of the mean difference are the interval. Finished stages are kept. The last line is JSON.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"sft": "sft", "dpo": "dpo", "online-dpo": "online-dpo/iteration-3"}


def paired_bootstrap(difference: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """difference (seeds, prompts) -> mean, 2.5 and 97.5 percentile over resampled seeds and prompts."""
    rng = np.random.default_rng(0)
    s, p = difference.shape
    means = [difference[rng.integers(s, size=s)][:, rng.integers(p, size=p)].mean() for _ in range(draws)]
    return float(difference.mean()), *map(float, np.percentile(means, [2.5, 97.5]))


def main() -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", default="runs/demo-seeds")
    p.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    args = p.parse_args()
    right, seconds = {stage: [] for stage in STAGES}, {}
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        last, seconds[seed] = None, 0.0
        for stage, folder in STAGES.items():
            out = Path(args.output) / str(seed) / stage
            run = out / "run.json"
            if not (run.exists() and json.loads(run.read_text()).get("result")):
                script = ROOT / f"{stage.replace('-', '_')}.py"
                model = ["--model", str(last)] if last else []
                subprocess.run([sys.executable, str(script), "--preset", "demo", "--seed", str(seed), "--output", str(out),
                                *model], check=True, stdout=subprocess.DEVNULL, stderr=open(f"{args.output}/log.txt", "a"))
            seconds[seed] += json.loads(run.read_text())["result"]["seconds"]
            last = Path(args.output) / str(seed) / folder
            rows = [json.loads(x) for x in (last / "samples.jsonl").read_text().splitlines()]
            right[stage].append({json.dumps(r["prompt"]): r["correct"] for r in rows})
            print(f"seed {seed} {stage:11} {np.mean(list(right[stage][-1].values())):.4f} of {len(rows)}  "
                  f"{seconds[seed]:5.0f} s in all", flush=True)
    prompts = sorted(right["sft"][0])
    table = {s: np.array([[float(r[x]) for x in prompts] for r in runs]) for s, runs in right.items()}
    result = {"exact_match": {s: t.mean(1).tolist() for s, t in table.items()}, "seconds": seconds, "gain": {}}
    names = list(STAGES)
    for a, b in zip(names, names[1:]):
        mean, low, high = paired_bootstrap(table[b] - table[a])
        result["gain"][f"{a} -> {b}"] = {"mean": mean, "low": low, "high": high, "significant": low > 0}
        print(f"{a} -> {b}: {100 * mean:+.1f} points, 95% interval {100 * low:+.1f} .. {100 * high:+.1f}")
    return result


if __name__ == "__main__":
    print(json.dumps(main()))
