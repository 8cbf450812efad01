"""What the studies (tests/study_*.py) share: flags, stages run in this process, paired intervals,
the files that a study leaves.

A study runs the scripts' own main(argv), one arm and seed after the other. A finished stage only
returns its stored result, so that a killed study continues with the same command.
"""
import argparse
import gzip
import importlib
import json
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import pandas

import data
from bench_demo import paired_bootstrap
from sft import rounded, run_main


def arguments(description, argv, tune=None):
    """The flags of a study; tune: the help of --tune, for a study that has it."""
    p = argparse.ArgumentParser(description=description, formatter_class=data.HelpFormatter)
    p.add_argument("--work", default="runs/studies", help="folder of the runs, kept and continued")
    p.add_argument("--figures", help="folder of study-NAME.json and .png; None: tests/figures, or "
                   "--work with --quick")
    p.add_argument("--data", help="folder with alpaca_eval_pairs_*.jsonl.gz and gsm8k_*.jsonl.gz")
    p.add_argument("--model", help="folder of SmolLM2-135M-Instruct, where the study needs it")
    p.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    p.add_argument("--quick", action="store_true", help="a tiny made version of the study")
    if tune:
        p.add_argument("--tune", action="store_true", help=tune)
    args = p.parse_args(argv)
    if args.quick:
        args.seeds = args.seeds[:1]
    default = args.work if args.quick else ROOT / "tests/figures"
    args.figures, args.work = Path(args.figures or default), Path(args.work)
    return args


def argv_of(flags):
    """max_steps=5 as --max-steps 5."""
    argv = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return argv


def stage(args, script, *command, **flags):
    """The result of a script under these flags."""
    argv = [*command, *argv_of(flags), "--cache-dir", str(args.work / "cache")]
    result = importlib.import_module(script).main(argv)
    if result.get("stopped"):
        sys.exit(f"stopped in {result['output']}; the same command continues")
    return result


def evaluation(args, command, *models, **flags):
    """The result of an evaluate.py command on models."""
    import evaluate
    if command not in ("curve", "report"):
        flags["cache_dir"] = args.work / "cache"
    return evaluate.main([command, *map(str, models), *argv_of(flags)])


def demo_sft(args):
    """The folder of the demo's SFT model, which several studies start from. It has the first seed;
    the seeds of those studies are of what follows: DPO's order, prompts, samples."""
    folder, size = args.work / f"demo-{args.seeds[0]}" / "sft", {}
    if args.quick:
        rows = data.demo_conversations(1000)
        size = dict(data=write_rows(args.work / "made.jsonl", rows), eval_data="demo:test=0.05",
                    epochs=100, max_steps=60, max_length=128)
    stage(args, "sft", preset="demo", seed=args.seeds[0], output=folder, num_proc=1, **size)
    return folder


def exact_matches(args, model, prompts="demo:test"):
    """Whether a model's greedy answer to each demo prompt is right, (prompts,) of 0 and 1 in one
    order for all models. The numbers stay beside the model, for evaluate.py curve and report."""
    if args.quick:
        prompts = f"{prompts}=0.05"
    evaluation(args, "stages", model, data=prompts, pairs="demo-pairs:test=0.05", max_new_tokens=16,
               num_proc=1)
    lines = (model / "evaluate/exact-match/samples.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: json.dumps(row["prompt"]))
    return np.array([row["correct"] for row in rows], dtype=float)


DEMO_DPO = dict(lr=3e-5, batch_size=8)      # chosen by study_beta.py --tune


def demo_dpo(args, sft, seed, pairs, steps, beta):
    """The folder of a DPO run from the SFT model: the studies of beta, and of data size and
    steps, share these runs."""
    folder = args.work / f"demo-{seed}" / f"dpo-{pairs}-pairs-{steps}-steps-beta-{beta}"
    flags = dict(DEMO_DPO, seed=seed, max_pairs=pairs, max_steps=steps, eval_every=steps,
                 beta=beta)
    if args.quick:
        made = write_rows(args.work / "made-pairs.jsonl", data.demo_pairs(100))
        flags |= dict(data=made, eval_data="demo-pairs:test=0.05")
    stage(args, "dpo", preset="demo", model=sft, output=folder, num_proc=1, **flags)
    return folder


def judged_pairs(args, split, longest=1200):
    """AlpacaEval's judged pairs of at most so many characters, all texts together: preference rows
    in file order. --quick: made ones."""
    if args.quick:
        return data.demo_pairs({"train": 200, "test": 20}[split], split=split)
    if not args.data:
        raise ValueError("--data: needed, the folder with alpaca_eval_pairs_train.jsonl.gz")
    with gzip.open(Path(args.data) / f"alpaca_eval_pairs_{split}.jsonl.gz", "rt") as file:
        rows = list(map(json.loads, file))
    return [r for r in rows if sum(len(r[k]) for k in ("prompt", "chosen", "rejected")) <= longest]


JUDGED_DPO = dict(lr=1e-5, batch_size=8, max_length=512, max_prompt_length=256, micro_tokens=1024)


def dpo_on_judged(args, output, train, seed, **flags):
    """The result of DPO of --model on a file of judged pairs, by JUDGED_DPO and flags."""
    if args.quick:
        flags["eval_data"] = "demo-pairs:test=0.02"
    return stage(args, "dpo", model=args.model, data=train, seed=seed, num_proc=1, output=output,
                 **dict(JUDGED_DPO, beta=0.1) | flags)


def one_a_prompt(rows):
    """The last row of each prompt, in order."""
    return list({str(row["prompt"]): row for row in rows}.values())


def judged_dpo(args, _, seed, pairs, steps, beta):
    """The folder of a DPO run of --model on so many judged pairs of AlpacaEval, without equal ones:
    the studies of margins, of beta, and of data size and steps share these runs."""
    rows, folder = judged_pairs(args, "train", 800), args.work / f"judged-{seed}"
    distinct = {json.dumps(rows[i]): rows[i] for i in data.permutation(len(rows), seed)}
    train = write_rows(folder / f"{pairs}-pairs.jsonl", list(distinct.values())[:pairs])
    output = folder / f"dpo-{pairs}-pairs-{steps}-steps-beta-{beta}"
    result = dpo_on_judged(args, output, train, seed, max_steps=steps, beta=beta)
    assert result["pairs"] == pairs, (result["pairs"], pairs)       # what evaluate.py curve reads
    return output


def raised(args, run, held):
    """{row: 0 or 1} of a .jsonl file of unseen pairs, in the file's order from 1: whether training
    raised the better answer more, r_w > r_l. Equal rows count once."""
    folder = args.work / "raised" / held.stem / run.relative_to(args.work)
    evaluation(args, "margins", args.model, run, data=held, output=folder, num_proc=1,
               max_length=512, max_prompt_length=256, dtype="fp32")
    pairs = pandas.read_json(folder / "margins.jsonl", lines=True).set_index("row").sort_index()
    return (pairs.after > pairs.before).astype(float)


def judged_accuracies(args, run):
    """(prompts,) in one order for all runs of --model: the share of r_w > r_l of each unseen
    prompt's pairs. The mean stays beside the model, for evaluate.py curve."""
    rows = judged_pairs(args, "test", 800)
    right = raised(args, run, write_rows(args.work / "judged-held-out.jsonl", rows))
    prompts = [str(rows[row - 1]["prompt"]) for row in right.index]
    shares = right.groupby(prompts, sort=False).mean().to_numpy()
    data.write_json(run / "evaluate/judged-accuracy/result.json", {"score": 100 * shares.mean()})
    return shares


class Task(typing.NamedTuple):
    """What a study of DPO trains and how it scores a run."""
    start: Path
    dpo: typing.Callable                # (args, start, seed, pairs, steps, beta) -> run's folder
    scores: typing.Callable             # (args, run) -> (prompts,)
    name: str
    score: str                          # name of what is scored
    suffix: str                         # of the study's files


def task(args):
    """The demo's; with --model, that model on AlpacaEval's judged pairs."""
    if args.model:
        return Task(args.model, judged_dpo, judged_accuracies, "judged pairs", "judged-accuracy",
                    "-judged")
    return Task(demo_sft(args), demo_dpo, exact_matches, "demo", "exact-match", "")


def write_rows(path, rows):
    """Rows as a .jsonl file for --data; its name."""
    data.write_lines(path, map(json.dumps, rows))
    return path


def difference(after, before, scale=100):
    """The mean difference of (seeds, items) scores with its 95% interval, paired: seeds and items
    are drawn again together. {"mean", "low", "high"} in points."""
    values = paired_bootstrap(np.asarray(after) - np.asarray(before))
    return {k: scale * v for k, v in zip(("mean", "low", "high"), values)}


def interval(of, form="+.1f"):
    """'+3.1 (+1.0 .. +5.2)'"""
    return "{} ({} .. {})".format(*(format(of[k], form) for k in ("mean", "low", "high")))


def mean_interval(values, scale=100):
    """The mean of (seeds, items) scores with its 95% interval, as of `difference`."""
    return difference(values, np.zeros_like(values), scale)


def error_bars(x, intervals, style):
    """Means with intervals over x, a series of data.figure."""
    t = np.array([[of["mean"], of["low"], of["high"]] for of in intervals])
    return x, t[:, 0], style, np.abs(t[:, 1:] - t[:, :1]).T


def seeds_of(seeds):
    return f"{len(seeds)} seed" + "s" * (len(seeds) > 1)


def verdict(of, expected=1):
    """What an interval says of a difference whose sign the paper gives."""
    if of["low"] <= 0 <= of["high"]:
        return "undecided"
    return "agrees" if of["mean"] * expected > 0 else "disagrees"


def finish(args, name, result, panels, rows, columns=3):
    """The JSON file, the picture and the table of a study; returns the result."""
    result = rounded(json.loads(json.dumps(result)))
    data.write_json(args.figures / f"study-{name}.json", result)
    data.figure(args.figures / f"study-{name}.png", panels, columns)
    print(data.table(rows), file=sys.stderr)
    return result
