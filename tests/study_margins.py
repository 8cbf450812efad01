"""Study: what DPO does to the margins of unseen pairs (LIONs' analysis figure: the change of log
pi(y_w|x) - log pi(y_l|x) over the margin before is a parabola for the best run, the same but
smaller for an undertrained one, and one-sided for an overtrained one).

    python tests/study_margins.py --model SMOLLM2 --data DIR      AlpacaEval's judged pairs
    python tests/study_margins.py                               the demo, with the runs of scaling

Three runs of one seed, by steps. The best one has the highest share of unseen pairs with r_w > r_l,
counted on the first half of the unseen pairs; the figure shows the second half. The fits and their
intervals are evaluate.py's margin_summary.
"""
import numpy as np

import study_scaling
from studies import (arguments, data, demo_dpo, demo_sft, evaluation, finish, json, judged_dpo,
                     judged_pairs, run_main, write_rows)

STEPS, TRAIN_PAIRS, HELD_PAIRS = (5, 20, 80), 160, 300


def runs_of(args):
    """(the model before, {steps: model after}, held-out pairs, flags of margins)."""
    seed = args.seeds[0]
    if not args.model:
        steps = (1, 2, 4) if args.quick else study_scaling.STEPS
        pairs = 64 if args.quick else study_scaling.SIZES[0]
        held = data.demo_pairs(40 if args.quick else 2 * HELD_PAIRS, 900, "test")
        sft = demo_sft(args)
        runs = {n: demo_dpo(args, sft, seed, pairs, n, study_scaling.BETA) for n in steps}
        return sft, runs, held, {}
    runs = {n: judged_dpo(args, args.model, seed, TRAIN_PAIRS, n, 0.1) for n in STEPS}
    held = judged_pairs(args, "test", 800)
    held = [held[i] for i in data.permutation(len(held), 0)[:2 * HELD_PAIRS]]
    return args.model, runs, held, dict(max_length=512, max_prompt_length=256, dtype="fp32")


def main(argv=None):
    args = arguments(__doc__, argv)
    before_model, runs, held, flags = runs_of(args)
    import evaluate
    result, rows, panels = {"verdict": {}, "model": "SmolLM2" if args.model else "demo"}, [], []
    chosen, found = {}, {}
    path = write_rows(args.work / "margins" / "held-out.jsonl", held)
    for n, model in runs.items():
        folder = args.work / "margins" / f"of-{n}"
        evaluation(args, "margins", before_model, model, data=path, output=folder, num_proc=1,
                   **flags)
        points = list(map(json.loads, (folder / "margins.jsonl").open()))
        before, after = (np.array([p[k] for p in points]) for k in ("before", "after"))
        half = len(points) // 2
        chosen[n] = float((after > before)[:half].mean())
        found[n] = before[half:], after[half:]
    best = max(chosen, key=chosen.get)
    for n, (before, after) in found.items():
        s = evaluate.margin_summary(before, after)
        name = "best" if n == best else "under" if n < best else "over"
        fit = s["fit"]
        result[f"{n} steps"] = {"name": name, "accuracy_first_half": chosen[n], **s}
        curved = "undecided"
        if fit["low"] is not None and fit["low"][2] * fit["high"][2] > 0:
            curved = "a parabola " + ("upwards" if fit["low"][2] > 0 else "downwards")
        result["verdict"][f"{n} steps ({name})"] = curved
        rows.append({"steps": n, "run": name, "r_w > r_l, first half": chosen[n],
                     "mean change (nats)": s["margin_after"] - s["margin_before"]} | {
            f"c{k}": "{:.3g} ({:.3g} .. {:.3g})".format(
                fit["coefficients"][k], fit["low"][k], fit["high"][k]) for k in (1, 2)})
        bins = s["bins"]
        x, y, e = ([b[k] for b in bins] for k in ("before", "change", "stderr"))
        grid = np.linspace(before.min(), before.max(), 100)
        panels.append({
            "series": {f"{len(before)} pairs": (before, after - before, "."),
                       "means of bins": (x, y, "ko", e),
                       "degree-2 fit": (grid, np.polyval(fit["coefficients"][::-1], grid), "r:")},
            "title": f"{n} steps, {name} trained", "xlabel": "margin before (nats)",
            "ylabel": "change (nats)"})
    return finish(args, "margins", result, panels, rows)


if __name__ == "__main__":
    run_main(main)
