"""Study: DPO's beta at two data sizes (LIONs, section 3: a high beta hurts, and the best beta
hardly moves with the data size, so that a small subset serves to tune it).

    python tests/study_beta.py                                the demo's task
    python tests/study_beta.py --model SMOLLM2 --data DIR --seeds 42         judged pairs

DPO from one model on the demo's or AlpacaEval's pairs, equal steps at both sizes. Score: exact
match of greedy answers on held-out prompts; with --model the share of unseen judged pairs with r_w
> r_l, the mean over prompts, and the steps of one epoch of the larger size. That is a reward
accuracy, not a benchmark. --tune compares learning rates on prompts of the training split, which no
table reports.
"""
import sys

import numpy as np

from studies import (arguments, data, demo_sft, difference, error_bars, exact_matches, finish,
                     interval, mean_interval, run_main, seeds_of, stage, task, verdict, write_rows)

BETAS, SIZES, STEPS = (0.02, 0.1, 0.5, 2.5, 12.5), (250, 4000), 64
JUDGED_BETAS, JUDGED_SIZES, JUDGED_STEPS = (0.1, 0.5, 2.5), (40, 160), 20
HIGH, LOW = 2.5, 0.1                             # the two that the first verdict compares


def tune(args):
    """Exact match on training prompts after DPO, a learning rate each."""
    prompts = write_rows(args.work / "tune-prompts.jsonl", data.demo_conversations(400, 99))
    rows = []
    for lr in (1e-5, 3e-5, 1e-4):
        output = args.work / "tune-demo" / f"lr-{lr}"
        stage(args, "dpo", preset="demo", model=demo_sft(args), seed=7, lr=lr,
              max_pairs=2000, batch_size=8, max_steps=128, output=output, num_proc=1)
        rows.append({"lr": lr, "exact match": exact_matches(args, output, prompts).mean()})
    print(data.table(rows), file=sys.stderr)
    return {"tuning": rows}


def summary(scores, seeds):
    """scores {size: {beta: (seeds, prompts)}} -> the numbers of the study."""
    result = {"seeds": seeds, "steps": STEPS, "sizes": {}}
    for size, by_beta in scores.items():
        best = max(by_beta, key=lambda beta: by_beta[beta].mean())
        result["sizes"][size] = {
            "score": {beta: mean_interval(of) for beta, of in by_beta.items()}, "best": best,
            "high_against_low": difference(by_beta[HIGH], by_beta[LOW]),
            "highest_against_next": difference(*(by_beta[b] for b in list(by_beta)[:-3:-1]))}
    small, large = scores
    bests = [result["sizes"][size]["best"] for size in (small, large)]
    result["cost_of_tuning_small"] = difference(scores[large][bests[0]], scores[large][bests[1]])
    result["verdict"] = {
        f"beta {HIGH} hurts against {LOW}": {size: verdict(of["high_against_low"], -1)
                                             for size, of in result["sizes"].items()},
        "the highest beta hurts against the one before": {
            size: verdict(of["highest_against_next"], -1)
            for size, of in result["sizes"].items()},
        "the best beta hardly moves": moves(bests, list(by_beta), result["cost_of_tuning_small"])}
    return result


def moves(bests, betas, cost):
    """What the two best betas say; nothing if they are the same end of the grid."""
    if bests[0] != bests[1]:
        return verdict(cost)
    if bests[0] in (betas[0], betas[-1]):
        return "undecided, both at the same end of the grid"
    return "agrees"


def main(argv=None):
    args = arguments(__doc__, argv, "compare learning rates on training prompts")
    if args.tune:
        return tune(args)
    sizes, betas, steps = SIZES, BETAS, STEPS
    if args.model:
        sizes, betas, steps = JUDGED_SIZES, JUDGED_BETAS, JUDGED_STEPS
    if args.quick:
        sizes, betas, steps = (16, 64), (LOW, HIGH), 2
    study = task(args)
    scores = {size: {beta: [] for beta in betas} for size in sizes}
    for seed in args.seeds:
        for size in sizes:
            for beta in betas:
                run = study.dpo(args, study.start, seed, size, steps, beta)
                scores[size][beta].append(study.scores(args, run))
    scores = {size: {beta: np.array(of) for beta, of in by_beta.items()}
              for size, by_beta in scores.items()}
    result = summary(scores, args.seeds) | {"steps": steps}
    series = {f"{size:,} pairs": error_bars(betas, list(of["score"].values()), "o-")
              for size, of in result["sizes"].items()}
    rows = []
    for size, of in result["sizes"].items():
        row = {f"beta {beta}": interval(x, ".1f") for beta, x in of["score"].items()}
        rows.append({"pairs": size, **row,
                     f"{HIGH} against {LOW}": interval(of["high_against_low"]),
                     "highest against the next": interval(of["highest_against_next"])})
    panels = [{"series": series, "xscale": "log", "xlabel": "beta",
               "ylabel": f"{study.score.replace('-', ' ')} (%), 95% interval",
               "title": f"{study.name}, {steps} steps, {seeds_of(args.seeds)}"}]
    return finish(args, f"beta{study.suffix}", result, panels, rows)


if __name__ == "__main__":
    run_main(main)
