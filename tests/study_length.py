"""Study: the sequence length of DPO (LIONs, section 3: rows of 2,048 tokens against 1,024 help
clearly).

    python tests/study_length.py --model SMOLLM2 --data DIR --seeds 42

One epoch of AlpacaEval's judged pairs, at most 2,400 characters each, cut at 256 or at 512 tokens:
a fifth of the answers with their prompts are longer than 256, one in 300 longer than 512. Score:
share of unseen judged pairs, one a prompt, with r_w > r_l, at 512 tokens.
"""
import numpy as np

from studies import (arguments, data, demo_sft, difference, dpo_on_judged, error_bars, finish,
                     interval, judged_pairs, mean_interval, one_a_prompt, raised, run_main, verdict,
                     write_rows)

LENGTHS, PAIRS, LONGEST = (256, 512), 160, 2400


def main(argv=None):
    args = arguments(__doc__, argv)
    if args.quick:
        args.model = demo_sft(args)
    rows = judged_pairs(args, "train", LONGEST)
    held = write_rows(args.work / "length-held-out.jsonl",
                      one_a_prompt(judged_pairs(args, "test", LONGEST)))
    scores = {}
    for seed in args.seeds:
        part = [rows[i] for i in data.permutation(len(rows), seed)[:PAIRS]]
        folder = args.work / f"judged-{seed}"
        train = write_rows(folder / "length.jsonl", part)
        for n in LENGTHS:
            output = folder / f"length-{n}"
            dpo_on_judged(args, output, train, seed, max_length=n, max_prompt_length=128)
            scores.setdefault(n, []).append(raised(args, output, held))
    scores = {n: np.array(of) for n, of in scores.items()}                      # (seeds, pairs)
    short, long = scores.values()
    result = {"seeds": args.seeds, "score": {n: mean_interval(of) for n, of in scores.items()},
              "long_against_short": difference(long, short)}
    result["verdict"] = {"longer rows help": verdict(result["long_against_short"])}
    table = [{"tokens": n, "r_w > r_l, %": interval(of, ".1f")}
             for n, of in result["score"].items()]
    table[-1]["against the shorter"] = interval(result["long_against_short"])
    x = np.arange(len(LENGTHS))
    panels = [{"series": {"": error_bars(x, list(result["score"].values()), "o")}, "xticks": x,
               "xticklabels": [f"{n} tokens" for n in LENGTHS],
               "ylabel": "unseen pairs with r_w > r_l (%)"}]
    return finish(args, "length", result, panels, table)


if __name__ == "__main__":
    run_main(main)
