"""Study: which held-out figure tells the best model (LIONs, section 3: loss, reward margin and
reward accuracy on held-out pairs do not track the benchmarks)?

    python tests/study_report.py        after study_beta.py and study_scaling.py, on their runs

Spearman's rank correlation of each figure with exact match, over all runs of the two studies, and
over those of one beta alone: loss and margin contain beta. The interval draws runs again, 500
times.
"""
import numpy as np
import pandas

import study_beta
import study_scaling
from studies import arguments, demo_dpo, demo_sft, evaluation, exact_matches, finish, run_main

FIGURES = {"eval_loss": -1, "eval_margin": 1, "eval_accuracy": 1}      # the sign of a useful one


def rank_correlation(x, y):
    """Spearman's; None if one is constant. (1, 2, 3) with (3, 1, 2): -0.5."""
    rho = pandas.DataFrame({"x": x, "y": y}).rank().corr().iloc[0, 1]
    return None if np.isnan(rho) else float(rho)


def correlation(x, y, draws=500):
    """Rank correlation of (runs,) with its interval. {"mean", "low", "high"}, None if constant."""
    rng = np.random.default_rng(0)
    drawn = [rank_correlation(x[i], y[i]) for i in rng.integers(len(x), size=(draws, len(x)))]
    known = [rho for rho in drawn if rho is not None]
    ends = np.percentile(known, [2.5, 97.5]).tolist() if known else [None, None]
    return {"mean": rank_correlation(x, y), "low": ends[0], "high": ends[1]}


def study(score, figures):
    """Of runs: each figure's correlation with the score, and the score of the run that it picks."""
    result = {"runs": len(score), "best_score": score.max(), "mean_score": score.mean()}
    for name, sign in FIGURES.items():
        result[name] = {"correlation": correlation(figures[name], score),
                        "score_of_its_best_run": score[(sign * figures[name]).argmax()]}
    return result


def verdict(of):
    """The paper finds no correlation. An interval with 0 leaves that open."""
    if of["mean"] is None:
        return "undecided: constant"
    word = "undecided" if of["low"] <= 0 <= of["high"] else "disagrees"
    return "{}: {:+.2f} ({:+.2f} .. {:+.2f})".format(word, of["mean"], of["low"], of["high"])


def main(argv=None):
    args = arguments(__doc__, argv)
    betas = [(n, study_beta.STEPS, b) for n in study_beta.SIZES for b in study_beta.BETAS]
    cells = betas + [(n, steps, study_scaling.BETA) for n in study_scaling.SIZES
                     for steps in study_scaling.STEPS]
    if args.quick:
        cells = [(16, 2, 0.1), (64, 2, 0.1), (16, 2, 2.5), (64, 2, 2.5)]
    cells = list(dict.fromkeys(cells))
    sft = demo_sft(args)
    runs = [(demo_dpo(args, sft, seed, *cell), cell) for seed in args.seeds for cell in cells]
    for run, _ in runs:
        exact_matches(args, run)
    found = evaluation(args, "report", *(run for run, _ in runs), score="exact-match",
                       output=args.work / "report")["scores"]
    score = np.array([row["exact-match"] for row in found])
    figures = {name: np.array([row[name] for row in found]) for name in FIGURES}
    one = np.array([beta == study_scaling.BETA for _, (_, _, beta) in runs])
    result = {"seeds": args.seeds, "all runs": study(score, figures),
              f"beta {study_scaling.BETA} alone": study(
                  score[one], {name: x[one] for name, x in figures.items()})}
    rows, result["verdict"] = [], {}
    for group in list(result)[1:3]:
        for name in FIGURES:
            of = result[group][name]
            result["verdict"][f"{group}, {name}"] = text = verdict(of["correlation"])
            rows.append({"runs": f"{group} ({result[group]['runs']})", "figure": name,
                         "rank correlation": text, "score of the run it picks":
                         of["score_of_its_best_run"], "best": result[group]["best_score"]})
    panels = [{"series": {"other betas": (x[~one], score[~one], "C1."),
                          f"beta {study_scaling.BETA}": (x[one], score[one], "C0.")},
               "xlabel": name.replace("eval_", "held-out "), "ylabel": "exact match (%)",
               **({"xscale": "log"} if name == "eval_loss" else {})}
              for name, x in figures.items()]
    return finish(args, "report", result, panels, rows)


if __name__ == "__main__":
    run_main(main)
