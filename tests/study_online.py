"""Study: offline against online DPO at equal pairs (LIONs, section 3: one iteration of online DPO
on 10k pairs matches offline DPO on 100k).

    python tests/study_online.py

The demo's task. Both arms start from the same DPO model, trained on 500 offline pairs, with it as
reference. Online: one iteration, K = 5, judged by the reference answer. Offline: as many new
offline pairs, and four times as many, for one epoch each; made pairs that occur twice (1%) are
refused, the steps are equal. Score: exact match on held-out prompts. All runs have the learning
rate and batch of study_beta.py.
"""
import numpy as np

from studies import (DEMO_DPO, arguments, data, demo_sft, difference, error_bars, exact_matches,
                     finish, interval, mean_interval, run_main, stage, verdict, write_rows)

START_PAIRS, PROMPTS = 500, 600
SETTINGS = dict(DEMO_DPO, preset="demo", beta=0.5, num_proc=1)


def sizes(args):
    return (64, 24) if args.quick else (START_PAIRS, PROMPTS)


def arms(args, sft, seed):
    """{arm: model folder} of a seed, and the number of online pairs."""
    folder = args.work / f"demo-{seed}" / "study-online"
    start_pairs, n_prompts = sizes(args)
    common = SETTINGS | dict(seed=seed, eval_data="demo-pairs:test=0.05")
    pairs = data.demo_pairs(start_pairs + 8 * n_prompts, 100 + seed)
    offline = common | dict(epochs=1)
    start = folder / "start"
    stage(args, "dpo", **offline, model=sft, output=start,
          data=write_rows(folder / "start.jsonl", pairs[:start_pairs]))
    prompts = write_rows(folder / "prompts.jsonl", data.demo_conversations(n_prompts, 500 + seed))
    online = stage(args, "online_dpo", **common, model=start, data=prompts, iterations=1,
                   epochs=1, max_new_tokens=16, output=folder / "online")
    models = {"start": start, "online": folder / "online/iteration-1"}
    for times in (1, 4):
        arm, end = f"offline x{times}", start_pairs + times * online["pairs"]
        models[arm] = folder / arm.replace(" ", "-")
        stage(args, "dpo", **offline, model=start, output=models[arm],
              data=write_rows(folder / f"{models[arm].name}.jsonl", pairs[start_pairs:end]))
    return models, online["pairs"]


def main(argv=None):
    args = arguments(__doc__, argv)
    scores, pairs, sft = {}, [], demo_sft(args)
    for seed in args.seeds:
        models, n = arms(args, sft, seed)
        pairs.append(n)
        for arm, model in {"sft": sft, **models}.items():
            scores.setdefault(arm, []).append(exact_matches(args, model))
    scores = {arm: np.array(of) for arm, of in scores.items()}                  # (seeds, prompts)
    others = [arm for arm in scores if arm != "online"]
    result = {"seeds": args.seeds, "pairs": pairs,
              "score": {arm: mean_interval(of) for arm, of in scores.items()},
              "online_against": {arm: difference(scores["online"], scores[arm]) for arm in others}}
    result["verdict"] = {f"online better than {arm}": verdict(result["online_against"][arm])
                         for arm in others}
    rows = [{"arm": arm, "exact match %": interval(of, ".1f"),
             "online against it": interval(result["online_against"].get(arm, dict.fromkeys(
                 ("mean", "low", "high"), 0.0)))} for arm, of in result["score"].items()]
    x, n = np.arange(len(scores)), len(others)
    gains = error_bars(x[:n], list(result["online_against"].values()), "o")
    panels = [
        {"series": {"": error_bars(x, list(result["score"].values()), "o")}, "xticks": x,
         "xticklabels": list(scores), "ylabel": "exact match (%), 95% interval",
         "title": f"demo, {np.mean(pairs):.0f} online pairs, {len(args.seeds)} seeds"},
        {"series": {"": gains, "no difference": (x[:n], np.zeros(n), "k:")}, "xticks": x[:n],
         "xticklabels": others, "ylabel": "points, 95% paired interval",
         "title": "exact match, online minus it"}]
    return finish(args, "online", result, panels, rows)


if __name__ == "__main__":
    run_main(main)
