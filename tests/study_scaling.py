"""Study: data size and steps (LIONs, section 3: for each data size, quality rises with the steps,
saturates and falls; more data move the point of saturation up).

    python tests/study_scaling.py                             the demo's task
    python tests/study_scaling.py --model SMOLLM2 --data DIR --seeds 42      judged pairs

DPO from one model; every point is a run with its own schedule. Score: exact match of greedy
answers on held-out prompts; with --model the share of unseen judged pairs with r_w > r_l, the mean
over prompts: a reward accuracy, not a benchmark. The degree-2 fits over log steps and their maxima,
the points of saturation, are those of `evaluate.py curve`, over all seeds' runs together. One
seed's three points have no interval, and its other intervals hold for one sample of training pairs.
"""
import numpy as np

from studies import (arguments, difference, error_bars, evaluation, finish, interval,
                     mean_interval, run_main, seeds_of, task, verdict)

SIZES, STEPS, BETA = (250, 4000), (16, 64, 256), 0.1
JUDGED_SIZES, JUDGED_STEPS = (40, 160, 1581), (5, 20, 80)


def saturation(line):
    """Text of a fit's maximum in steps with its interval."""
    if not line.get("saturation"):
        return "no maximum"
    ends = [line["saturation_low"], line["saturation_high"]]
    if None in ends:
        return f"{line['saturation']:.0f} (interval open)"
    return "{:.0f} ({:.0f} .. {:.0f})".format(line["saturation"], *ends)


def curve_panel(result, study):
    series = {}
    for n, (size, of) in enumerate(result["sizes"].items()):
        steps = np.array(list(map(int, of["score"])))
        series[f"{int(size):,} pairs"] = error_bars(
            np.log(steps), list(of["score"].values()), f"C{n}o")
        grid = np.linspace(*np.log(steps[[0, -1]]), 100)
        fitted = np.polyval(of["fit"]["coefficients"][::-1], grid)
        at = "maximum at " * of["fit"]["maximum"] + of["saturation"]
        series[f"fit of {int(size):,}, {at}"] = (grid, fitted, f"C{n}:")
    return {"series": series, "xticks": np.log(steps), "xticklabels": steps,
            "xlabel": "optimiser steps of 8 pairs, log scale",
            "ylabel": f"{study.score.replace('-', ' ')} (%), 95% interval",
            "title": f"{study.name}, DPO, {seeds_of(result['seeds'])}"}


def saturates_later(few, many):
    """Whether the second fit's maximum lies above the first's, by their intervals."""
    ends = [of["fit"][end] for of in (few, many) for end in ("vertex_low", "vertex_high")]
    if None in ends or not (few["fit"]["maximum"] and many["fit"]["maximum"]):
        return "undecided, no interval"
    if ends[2] <= ends[1] and ends[0] <= ends[3]:
        return "undecided"
    return "agrees" if ends[2] > ends[1] else "disagrees"


def main(argv=None):
    args = arguments(__doc__, argv)
    sizes, steps = SIZES, STEPS
    if args.model:
        sizes, steps = JUDGED_SIZES, JUDGED_STEPS
    if args.quick:
        sizes, steps = (64,), (1, 2, 4)
    scores, runs, study = {}, [], task(args)
    for seed in args.seeds:
        for size in sizes:
            for n in steps:
                runs.append(study.dpo(args, study.start, seed, size, n, BETA))
                scores.setdefault((size, n), []).append(study.scores(args, runs[-1]))
    scores = {cell: np.array(of) for cell, of in scores.items()}                # (seeds, prompts)
    lines = evaluation(args, "curve", *runs, y=study.score,
                       output=args.work / f"curve{study.suffix}")["lines"]
    result = {"seeds": args.seeds, "beta": BETA, "sizes": {}}
    for size in sizes:
        line, last = lines[str(size)], scores[size, steps[-1]]
        result["sizes"][size] = {
            "score": {n: mean_interval(scores[size, n]) for n in steps},
            "fit": line["fit"], "saturation": saturation(line),
            "last_against_the_one_before": difference(last, scores[size, steps[-2]])}
    result["most_against_fewest_pairs"] = {
        n: difference(scores[sizes[-1], n], scores[sizes[0], n]) for n in steps}
    ends = {size: scores[size, steps[-1]] - scores[size, steps[-2]] for size in sizes}
    result["fall_of_most_against_fewest"] = difference(ends[sizes[-1]], ends[sizes[0]])
    result["verdict"] = {
        "the last step up in steps does more for more data": verdict(
            result["fall_of_most_against_fewest"]),
        "falls at the end": {size: verdict(of["last_against_the_one_before"], -1)
                             for size, of in result["sizes"].items()},
        "more data help at the most steps": verdict(
            result["most_against_fewest_pairs"][steps[-1]]),
        "more data saturate later": saturates_later(
            result["sizes"][sizes[0]], result["sizes"][sizes[-1]])}
    rows = [{"pairs": size} | {f"{n} steps": interval(x, ".1f") for n, x in of["score"].items()}
            | {"saturation (steps)": of["saturation"]} for size, of in result["sizes"].items()]
    return finish(args, f"scaling{study.suffix}", result, [curve_panel(result, study)], rows)


if __name__ == "__main__":
    run_main(main)
