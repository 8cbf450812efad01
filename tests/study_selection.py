"""Study: selecting preference pairs (LIONs, section 3: random pairs at ten times the budget beat
every selection; at equal budget the paper's own A2 alone competes with random on both benchmarks).

    python tests/study_selection.py --model SMOLLM2 --data DIR

AlpacaEval's judged pairs, selected by `data.py select`, DPO from SmolLM2 for one epoch. DEITA's two
scorers and its embeddings are SmolLM2 itself, far too small for them: its row says what that costs.
Score: share of unseen judged pairs, one a prompt, with r_w > r_l after training.
"""
import numpy as np

from studies import (arguments, data, demo_sft, difference, dpo_on_judged, error_bars, finish,
                     interval, judged_pairs, mean_interval, one_a_prompt, raised, run_main, stage,
                     verdict, write_rows)

METHODS = ("random", "longest", "alpagasus", "argilla", "a2", "deita")
CANDIDATES, BUDGET, TIMES, HELD = 500, 48, 8, 150


def rated_pairs(args):
    """The first CANDIDATES. --quick: the demo's pairs with drawn ratings."""
    rows = judged_pairs(args, "train", 800)[:CANDIDATES]
    if args.quick:
        for i, row in enumerate(rows):
            row |= {"score_chosen": 6 + data.draw(f"w{i}", 5), "score_rejected":
                    1 + data.draw(f"l{i}", 5)}
    return rows


def main(argv=None):
    args = arguments(__doc__, argv)
    budget, methods = BUDGET, METHODS
    if args.quick:
        args.model, budget, methods = demo_sft(args), 4, ("random", "a2", "deita")
    folder, candidates = args.work / "selection", rated_pairs(args)
    candidates = write_rows(folder / "candidates.jsonl", candidates)
    held = write_rows(args.work / "selection-held-out.jsonl",
                      one_a_prompt(judged_pairs(args, "test", 800))[:HELD])
    arms = [(method, budget) for method in methods] + [("random", TIMES * budget)]
    scores = {}
    for seed in args.seeds:
        for method, n in arms:
            output = folder / f"{seed}-{method}-{n}"
            selected = folder / "selected" / output.name
            scorers = {}
            if method == "deita":
                scorers = dict.fromkeys(("complexity_model", "quality_model", "embedding_model"),
                                        args.model)
            stage(args, "data", "select", "--pairs", method=method, budget=n, data=candidates,
                  seed=seed, model=args.model, num_proc=1, output=selected, **scorers)
            dpo_on_judged(args, output, selected / "rows.jsonl", seed)
            scores.setdefault(f"{method} {n}", []).append(raised(args, output, held))
    scores = {arm: np.array(of) for arm, of in scores.items()}                  # (seeds, pairs)
    base, most = (scores[f"random {n}"] for n in (budget, TIMES * budget))
    result = {"seeds": args.seeds, "arms": {}, "verdict": {}}
    for arm, of in scores.items():
        result["arms"][arm] = {"score": mean_interval(of), "against random": difference(of, base),
                               "most random against it": difference(most, of)}
        result["verdict"][f"random {TIMES * budget} beats {arm}"] = verdict(
            result["arms"][arm]["most random against it"])
    rows = [{"pairs": arm} | {k: interval(v, ".1f" if k == "score" else "+.1f")
                              for k, v in of.items()} for arm, of in result["arms"].items()]
    x = np.arange(len(scores))
    panels = [{"series": {"": error_bars(x, [of["score"] for of in result["arms"].values()], "o")},
               "xticks": x, "xticklabels": [arm.replace(" ", "\n") for arm in scores],
               "ylabel": "unseen pairs with r_w > r_l (%)"}]
    return finish(args, "selection", result, panels, rows)


if __name__ == "__main__":
    run_main(main)
