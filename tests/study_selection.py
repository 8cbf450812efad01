"""Study: selecting preference pairs (LIONs, section 3: random pairs at ten times the budget beat
every selection; at equal budget the paper's own A2 alone competes with random on both benchmarks).

    python tests/study_selection.py --model SMOLLM2 --data DIR

AlpacaEval's judged pairs, selected by `data.py select`, DPO from SmolLM2 for one epoch. DEITA's two
scorers and its embeddings are SmolLM2 itself, far too small for them: its row says what that costs.
Score: share of unseen judged pairs, one a prompt, with r_w > r_l after training.
"""
import numpy as np

from studies import (JUDGED_DPO, arguments, data, demo_sft, difference, error_bars, finish,
                     interval, judged_pairs, mean_interval, raised, run_main, stage, verdict,
                     write_rows)

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
    budget, methods, held_out = BUDGET, METHODS, {}
    if args.quick:
        args.model, budget, methods = demo_sft(args), 4, ("random", "a2", "deita")
        held_out = dict(eval_data="demo-pairs:test=0.02")
    folder, candidates = args.work / "selection", rated_pairs(args)
    candidates = write_rows(folder / "candidates.jsonl", candidates)
    one_a_prompt = {str(row["prompt"]): row for row in judged_pairs(args, "test", 800)}
    held = write_rows(args.work / "selection-held-out.jsonl", list(one_a_prompt.values())[:HELD])
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
            stage_data(args, method=method, budget=n, data=candidates, seed=seed, model=args.model,
                       output=selected, **scorers)
            stage(args, "dpo", model=args.model, data=selected / "rows.jsonl", seed=seed, beta=0.1,
                  num_proc=1, output=output, **JUDGED_DPO, **held_out)
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


def stage_data(args, **flags):
    """data.py select under these flags."""
    argv = ["select", "--pairs", "--num-proc", "1", "--cache-dir", str(args.work / "cache")]
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return data.main(argv)


if __name__ == "__main__":
    run_main(main)
