"""Study: the losses of dpo.py beside the paper's (not in the paper; open-instruct trains per token,
Llama 3 and RPO add the chosen answer's NLL, because DPO lowers its log-prob).

    python tests/study_losses.py --model SMOLLM2 --data DIR

The demo's task, from one SFT model, and, with --model, SmolLM2 on AlpacaEval's judged pairs (first
seed). Score: exact match; accuracy of held-out pairs (r_w > r_l); by how much the chosen answers'
log pi(y_w|x) changed, in nats. Each loss's beta is from its source, none was tuned.
"""
import numpy as np

from studies import (DEMO_DPO, arguments, data, demo_sft, difference, exact_matches, finish,
                     interval, judged_pairs, mean_interval, run_main, stage, verdict, write_rows)

PER_TOKEN = dict(length_normalise=[])            # a flag without a value
ARMS = {"sigmoid": {}, "cDPO 0.1": dict(label_smoothing=0.1), "NLL 1": dict(nll_weight=1.0),
        "per token": PER_TOKEN | dict(beta=5.0), "IPO": dict(loss="ipo", beta=0.1),
        "IPO per token": PER_TOKEN | dict(loss="ipo", beta=0.5)}
NUMBERS = {"accuracy": 100, "ratio_w": 1, "ratio_l": 1, "nll_w": 1}


def demo_runs(args, sizes):
    """Each arm's results and exact matches, a list over seeds."""
    sft, found = demo_sft(args), {}
    flags = dict(DEMO_DPO, preset="demo", model=sft, num_proc=1, max_pairs=2000, max_steps=128)
    flags |= sizes
    for seed in args.seeds:
        for arm, loss in ARMS.items():
            output = args.work / f"losses-{seed}" / arm.replace(" ", "-")
            result = stage(args, "dpo", **(flags | loss), seed=seed, output=output)
            found.setdefault(arm, []).append((result, exact_matches(args, output)))
    return found


def smollm2_runs(args):
    """Each arm's result on judged pairs, one seed."""
    train = write_rows(args.work / "losses-train.jsonl", judged_pairs(args, "train", 800)[:96])
    held = write_rows(args.work / "losses-held.jsonl", judged_pairs(args, "test", 800)[:60])
    return {arm: [stage(args, "dpo", **(dict(
        model=args.model, data=train, eval_data=held, batch_size=8, lr=1e-5, max_length=512,
        max_prompt_length=256, micro_tokens=1024, eval_every=100, num_proc=1, seed=args.seeds[0],
        output=args.work / "losses-smollm2" / arm.replace(" ", "-")) | loss))]
        for arm, loss in ARMS.items()}


def held_out(results):
    """Means over seeds of the held-out numbers."""
    return {name: scale * np.mean([r[f"eval_{name}"] for r in results])
            for name, scale in NUMBERS.items()}


def main(argv=None):
    args = arguments(__doc__, argv)
    sizes = {}
    if args.quick:
        made = write_rows(args.work / "made-pairs.jsonl", data.demo_pairs(100))
        sizes = dict(data=made, eval_data="demo-pairs:test=0.05", max_pairs=16, max_steps=2)
    demo = demo_runs(args, sizes)
    matches = {arm: np.array([m for _, m in of]) for arm, of in demo.items()}
    ratios = {arm: np.array([[r["eval_ratio_w"]] for r, _ in of]) for arm, of in demo.items()}
    result = {"seeds": args.seeds, "arms": ARMS, "demo": {}, "verdict": {}}
    for arm, of in demo.items():
        result["demo"][arm] = held_out([r for r, _ in of]) | {
            "exact_match": mean_interval(matches[arm]),
            "against_sigmoid": difference(matches[arm], matches["sigmoid"])}
    if args.model:
        result["smollm2"] = {arm: held_out(of) for arm, of in smollm2_runs(args).items()}
    kept = difference(ratios["NLL 1"], ratios["sigmoid"], 1)
    result |= {"nll_keeps_log_prob": kept}
    result["verdict"]["NLL keeps the chosen log-prob up"] = verdict(kept)
    result["verdict"]["another loss beats sigmoid's exact match"] = {
        arm: verdict(of["against_sigmoid"]) for arm, of in result["demo"].items()}
    rows = []
    for task in ("demo", "smollm2"):
        for arm, of in result.get(task, {}).items():
            row = {"task": task, "loss": arm} | {name: of[name] for name in NUMBERS}
            if task == "demo":
                row |= {"exact match": interval(of["exact_match"], ".1f"),
                        "against sigmoid": interval(of["against_sigmoid"])}
            rows.append(row)
    x = np.arange(len(ARMS))
    ticks = dict(yticks=-x, yticklabels=list(ARMS))
    panels = [{"series": {task: ([of[name] for of in result[task].values()], -x, style)
                          for task, style in (("demo", "C0o"), ("smollm2", "C1s"))
                          if task in result}, "title": title, **ticks}
              for name, title in (("accuracy", "held-out pairs with r_w > r_l (%)"),
                                  ("ratio_w", "change of log pi(y_w|x) (nats)"))]
    return finish(args, "losses", result, panels, rows, 2)


if __name__ == "__main__":
    run_main(main)
