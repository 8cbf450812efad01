"""Study: one iteration of online DPO on a real model, SmolLM2-135M-Instruct, on a laptop's CPU.

    python tests/study_real_model.py --model SMOLLM2 --data DIR

Prompts are AlpacaEval's instructions with one of four constraints that plain Python can check
(KINDS). The judge is `satisfied` below: 1 if the answer obeys the prompt's constraint, else 0. K =
5 samples, best against worst, one iteration (online_dpo.py). The contrast is offline DPO (dpo.py)
on as many of AlpacaEval's judged pairs, with the same settings. It has nothing to say about the
constraints.

Reported: share of held-out prompts whose greedy answer obeys, before and after, by kind; answer
length; share of held-out judged pairs of which training raised the better answer (r_w > r_l).
Held-out prompts and pairs are those of the test file; the file is split by prompt. --tune compares
learning rates on prompts of the training file that no run trains on, with a seed that no run uses:
45% of the answers obeyed before, 72% after 1e-5 and 80% after 3e-5, where the mean answer shrank
from 59 to 15 tokens ("Sure."). The study takes 1e-5, which leaves 29.
"""
import re
import sys

import numpy as np

from studies import (arguments, data, difference, finish, interval, json, judged_pairs,
                     one_a_prompt, raised, run_main, stage, verdict, write_rows)

KINDS = {
    "short": "Answer in at most 30 words.",
    "sentence": "Answer in exactly one sentence.",
    "sure": 'Start your answer with the word "Sure".',
    "commas": "Do not use any commas in your answer."}
LR, TUNE_LRS, TUNE_SEED, TUNE_PROMPTS = 1e-5, (1e-5, 3e-5), 7, 64


# -------------------------------------------------------------------------------------- constraints
def obeys(kind, answer):
    """Whether an answer obeys a constraint. "Sure. It is." is no single sentence."""
    answer = answer.strip()
    if kind == "short":
        return 0 < len(answer.split()) <= 30
    if kind == "sentence":
        return bool(re.fullmatch(r"[^.!?\n]+[.!?]+", re.sub(r"(?<=\w)\.(?=\w)", "", answer)))
    if kind == "sure":
        return answer.startswith("Sure")
    return bool(answer) and "," not in answer


def kind_of(prompt):
    """The kind of a prompt's constraint, by its last sentence."""
    return next(kind for kind, text in KINDS.items() if prompt[-1]["content"].endswith(text))


def satisfied(prompt, answers, reference):
    """The judge, for --judge python:tests/study_real_model.py:satisfied."""
    return [float(obeys(kind_of(prompt), answer)) for answer in answers]


# --------------------------------------------------------------------------------------------- data
def instructions(args, split, longest=200):
    """Distinct instructions of the judged pairs, without long ones, in file order."""
    rows = judged_pairs(args, split, longest=10 ** 9)
    if args.quick:
        rows = [{"prompt": row["prompt"][-1]["content"]} for row in rows]
    texts = dict.fromkeys(row["prompt"].strip() for row in rows)
    return [text for text in texts if len(text) <= longest]


def constrained(texts):
    """Prompts for --data, the kinds in turn. The last turn is what the sampled answer replaces."""
    kinds = list(KINDS.values())
    return [{"messages": data.ask(f"{text}\n{kinds[i % len(kinds)]}", "(sampled)")}
            for i, text in enumerate(texts)]


def shuffled(things, seed):
    return [things[i] for i in data.permutation(len(things), seed)]


def prepare(args):
    """Files: held-out prompts and pairs, tuning prompts; and the instructions that are left."""
    size = 8 if args.quick else None
    train = shuffled(instructions(args, "train"), 0)
    tuning, train = train[:TUNE_PROMPTS], train[TUNE_PROMPTS:]
    held = write_rows(args.work / "held-out.jsonl",
                      constrained(shuffled(instructions(args, "test"), 0)[:size]))
    pairs = write_rows(args.work / "held-out-pairs.jsonl",
                       one_a_prompt(judged_pairs(args, "test", 800)))
    return held, pairs, write_rows(args.work / "tuning.jsonl", constrained(tuning)), train


# --------------------------------------------------------------------------------------------- runs
def settings(args, seed):
    """Flags of every training run."""
    flags = dict(model=args.model, seed=seed, batch_size=8, lr=LR, beta=0.1, epochs=2,
                 max_length=512, max_prompt_length=256, micro_tokens=1024, num_proc=1)
    if args.quick:
        flags |= dict(max_steps=2, eval_data="demo-pairs:test=0.02")
    return flags


def tiny_model(args):
    """--quick: a demo model that gives one of three short answers to any prompt."""
    rows, replies = constrained(instructions(args, "train")), ("a", "b, c", "Sure. d")
    for i, row in enumerate(rows):
        row["messages"][-1]["content"] = replies[data.draw(str(i), 3)]
    stage(args, "sft", preset="demo", data=write_rows(args.work / "tiny.jsonl", rows), epochs=100,
          eval_data="demo:test=0.02", max_steps=40, max_length=128, num_proc=1, output=args.model)


def sampling(args):
    if args.quick:
        return dict(max_new_tokens=24)
    return dict(max_new_tokens=96)


def online(args, flags, prompts, folder):
    return stage(args, "online_dpo", **flags | sampling(args) | dict(
        data=prompts, samples=5, temperature=0.8, iterations=1, output=folder,
        judge=f"python:{__file__}:satisfied"))


def answers(args, model, prompts, folder):
    """Greedy answers to prompts, as evaluate.py samples them, in the file's order."""
    import evaluate
    flags = evaluate.parser().parse_args([
        "judge", str(model), "--data", str(prompts), "--max-new-tokens",
        str(sampling(args)["max_new_tokens"]), "--dtype", "fp32", "--num-proc", "1",
        "--cache-dir", str(args.work / "cache")])
    evaluate.init_distributed()
    rows, found, _ = evaluate.prompt_answers(flags, str(model), folder)
    both = {row["prompt"][-1]["content"]: (row["prompt"], answer)
            for row, answer in zip(rows, found)}
    order = [json.loads(line)["messages"][0]["content"] for line in prompts.open()]
    return [both[text] for text in order]


def scores(answered):
    """(prompts,) 1 if the answer obeys. An answer that the limit cut counts as it is."""
    return np.array([satisfied(prompt, [a["text"]], None)[0] for prompt, a in answered])


def one_seed(args, seed, held, pairs, train, n_prompts):
    """Both arms of a seed: {arm: what was measured}."""
    folder = args.work / f"real-{seed}"
    prompts = write_rows(folder / "prompts.jsonl", constrained(shuffled(train, seed)[:n_prompts]))
    result = online(args, settings(args, seed), prompts, folder / "online")
    judged = shuffled(judged_pairs(args, "train", 800), seed)[:result["pairs"]]
    offline = stage(args, "dpo", **settings(args, seed) | dict(
        data=write_rows(folder / "pairs.jsonl", judged), output=folder / "offline"))
    models = {"online": folder / "online/iteration-1", "offline": folder / "offline"}
    found = {arm: {"answers": answers(args, model, held, folder / f"answers-{arm}"),
                   "raised": raised(args, model, pairs)}
             for arm, model in models.items()}
    keys = ("pairs", "yield", "distinct", "score_all", "length_all", "sample_seconds",
            "train_seconds", "seconds")
    found["online"]["run"] = {k: result[k] for k in keys}
    found["offline"]["run"] = {k: offline[k] for k in ("pairs", "seconds")}
    return found


def tune(args, tuning, train):
    """Obedience on the tuning prompts after training on other prompts, a learning rate each."""
    folder, flags = args.work / "tune", settings(args, TUNE_SEED) | dict(lr=TUNE_LRS[0])
    prompts = write_rows(folder / "prompts.jsonl",
                         constrained(shuffled(train, TUNE_SEED)[:TUNE_PROMPTS]))
    sampled, models = online(args, flags, prompts, folder / "online"), {0.0: args.model}
    models[TUNE_LRS[0]] = first = folder / "online/iteration-1"
    for lr in TUNE_LRS[1:]:
        models[lr] = folder / f"lr-{lr}"
        stage(args, "dpo", **flags | dict(data=first / "pairs.jsonl", output=models[lr], lr=lr))
    rows = []
    for lr, model in models.items():
        found = answers(args, model, tuning, folder / f"answers-{lr}")
        rows.append({"lr": lr, "obeyed": scores(found).mean(), "pairs": sampled["pairs"],
                     "tokens": np.mean([a["tokens"] for _, a in found])})
    print(data.table(rows), file=sys.stderr)
    return {"tuning": rows}


# ------------------------------------------------------------------------------------------- report
def lengths(answered):
    """Mean tokens; shares of answers of at most three words, and of those that the limit cut."""
    texts = [a["text"].split() for _, a in answered]
    return {"tokens": np.mean([a["tokens"] for _, a in answered]),
            "tiny": np.mean([len(words) <= 3 for words in texts]),
            "cut": np.mean([not a["finished"] for _, a in answered])}


def summary(before, by_seed, arms=("online", "offline")):
    """Numbers of the study: means over seeds and prompts with paired intervals."""
    base = scores(before)
    kinds = np.array([kind_of(prompt) for prompt, _ in before])
    result = {"held_out_prompts": len(base), "seeds": list(by_seed), "before": 100 * base.mean(),
              "before_by_kind": {k: 100 * base[kinds == k].mean() for k in KINDS},
              "length_before": lengths(before)}
    for arm in arms:
        found = [seed[arm] for seed in by_seed.values()]
        obeyed = np.array([scores(of["answers"]) for of in found])              # (seeds, prompts)
        rose = np.array([of["raised"] for of in found])                         # (seeds, pairs)
        gain = difference(obeyed, base[None])
        result[arm] = {
            "after": 100 * obeyed.mean(), "after_by_seed": (100 * obeyed.mean(1)).tolist(),
            "gain": gain, "held_out_pairs": rose.shape[1],
            "gain_by_kind": {k: difference(obeyed[:, kinds == k], base[None, kinds == k])
                             for k in KINDS},
            "length": lengths([one for of in found for one in of["answers"]]),
            "raised_better": difference(rose, np.full(rose.shape, 0.5)),
            "runs": [of["run"] for of in found]}
    result["verdict"] = {
        "online DPO raises the constraints obeyed": verdict(result["online"]["gain"]),
        "offline DPO raises them": verdict(result["offline"]["gain"]),
        "offline DPO raises the better of judged pairs": verdict(
            result["offline"]["raised_better"])}
    return result


def examples(before, by_seed, n=6):
    """A few answers side by side, the first prompts of each kind."""
    seed, rows, count = next(iter(by_seed)), [], dict.fromkeys(KINDS, 0)
    both = zip(before, by_seed[seed]["online"]["answers"], by_seed[seed]["offline"]["answers"])
    for (prompt, old), (_, new), (_, off) in both:
        kind = kind_of(prompt)
        count[kind] += 1
        if count[kind] <= 2 and len(rows) < n:
            rows.append({"prompt": prompt[-1]["content"]} | {
                name: f"[{'yes' if obeys(kind, a['text']) else 'no'}] {a['text'][:240]}"
                for name, a in (("before", old), ("online", new), ("offline", off))})
    return rows


def panels(result):
    x, names = np.arange(len(KINDS) + 1), ["all", *KINDS]
    obeyed, marks = {}, {"online": ("C0o", 0.08), "offline": ("C1s", -0.08)}
    base = [result["before"], *result["before_by_kind"].values()]
    obeyed["before"] = (base, -x, "kx")
    gains, change = {}, ("online", "offline")
    for arm in change:
        style, shift = marks[arm]
        of = [result[arm]["gain"], *result[arm]["gain_by_kind"].values()]
        after = [b + g["mean"] for b, g in zip(base, of)]
        obeyed[arm] = (after, shift - x, style)
        gains[arm] = points(of, shift - x, style)
    ticks = dict(yticks=-x, yticklabels=names)
    better = {arm: points([result[arm]["raised_better"]], np.array([-i]), marks[arm][0])
              for i, arm in enumerate(change)}
    n = f"{result['held_out_prompts']} prompts, {len(result['seeds'])} seed(s)"
    return [
        {"series": obeyed, "title": f"held-out constraints obeyed, {n}", "xlabel": "%", **ticks},
        {"series": gains, "title": "change, 95% paired interval", "xlabel": "points", **ticks},
        {"series": better, "title": "judged pairs: r_w > r_l, above chance", "xlabel": "points",
         "yticks": [0, -1], "yticklabels": change, "ylim": (-1.5, 0.5)}]


def points(intervals, y, style):
    """Horizontal intervals as a series of data.figure."""
    t = np.array([[of["mean"], of["low"], of["high"]] for of in intervals])
    return t[:, 0], y, style, None, np.abs(t[:, 1:] - t[:, :1]).T


def main(argv=None):
    args = arguments(__doc__, argv, "compare learning rates on prompts of the training file")
    n_prompts = 96
    if args.quick:
        n_prompts, args.model = 8, args.work / "tiny"
        tiny_model(args)
    held, pairs, tuning, train = prepare(args)
    if args.tune:
        return tune(args, tuning, train)
    before = answers(args, args.model, held, args.work / "real-before")
    by_seed = {seed: one_seed(args, seed, held, pairs, train, n_prompts) for seed in args.seeds}
    result = summary(before, by_seed) | {"examples": examples(before, by_seed), "lr": LR}
    rows = [{"model": "before", "obeyed %": result["before"], **result["length_before"]}]
    rows += [{"model": arm, "obeyed %": result[arm]["after"], **result[arm]["length"],
              "change": interval(result[arm]["gain"]),
              "judged pairs above chance": interval(result[arm]["raised_better"])}
             for arm in ("online", "offline")]
    return finish(args, "real-model", result, panels(result), rows)


if __name__ == "__main__":
    run_main(main)
