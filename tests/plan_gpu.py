"""The paper's studies at Gemma-2b: the commands, their tokens, and hours from a measured rate.

    python tests/plan_gpu.py                              # commands and tokens
    python tests/bench_gpu.py > bench.json
    python tests/plan_gpu.py --bench bench.json           # hours on one such GPU

Tokens are estimates: rows x epochs x tokens a row. A row of deita-10k has 2,000 tokens (they are
cut at 2,048), one of lion-sft-1.6m and lion-sft 375: the paper's 600M over 1.6M rows, read as one
epoch. A pair with its shared prompt, and an answer, have what the flags say; `data.py stats` counts
a source. The reference's forward counts as a quarter of an epoch, that of an 8B model as 0.8.
Hours are at least so many: PairRM, rewards and benchmarks are not counted, and the bench samples
with a small vocabulary. Every model is scored as runs/dpo-10k is (the online one is
runs/online/iteration-1). REWARD_MODEL, URL: yours. The last line is JSON.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data

SFT = "deepspeed sft.py --preset gemma-2b --max-length 2048"
DPO = "deepspeed dpo.py --preset gemma-2b --beta 0.1"
SELECT = ("python data.py select --pairs --data runs/annotate/rows.jsonl --model google/gemma-2b "
          "--method")
SELECTIONS = ("longest", "alpagasus", "argilla", "a2", "deita")
N = 10_000


def dpo(name, data="random", pairs=N, epochs=6, reference=0.25, flags=""):
    """A DPO run of the plan on runs/select/DATA-PAIRS."""
    return (f"{DPO} --data runs/select/{data}-{pairs}/rows.jsonl --epochs {epochs} {flags}"
            f"--output runs/{name}", pairs * (epochs + reference))


def plan(args):
    """Rows {"study", "command", "zero" its stage, "tokens" to train, "sampled" tokens}."""
    rows = []

    def add(study, command, tokens=0.0, sampled=0.0):
        zero = 3 if " dpo.py " in command else 1                        # as in the presets
        rows.append(dict(study=study, command=command, zero=zero, tokens=tokens, sampled=sampled))
    for mix, tokens in (("deita-10k", 10_000 * 2000), ("lion-sft-1.6m", 1_600_000 * 375)):
        for packing in ("bfd", "none"):
            for loss in ("assistant", "all"):
                add("packing", f"{SFT} --data {mix} --packing {packing} --loss-on {loss} "
                    f"--output runs/{mix}-{packing}-{loss}", 3 * tokens)
    add("policy", "deepspeed sft.py --preset gemma-2b", 3 * 1_950_000 * 375)
    add("selection", "python data.py annotate --rm REWARD_MODEL --data lion-dpo-study")
    for method, n in [("random", N // 10), ("random", N), ("random", 10 * N)] + [
            (method, N) for method in SELECTIONS]:
        add("selection", f"{SELECT} {method} --budget {n} --output runs/select/{method}-{n}")
    add("reference", f"{SFT} --model runs/gemma-2b-sft --data runs/select/random-{N}/rows.jsonl "
        "--epochs 1 --output runs/sft-on-chosen", N * args.tokens_per_pair / 2)
    runs = [("reference", dpo("dpo-10k")), ("length", dpo("at-1024", flags="--max-length 1024 "))]
    runs += [("reference", dpo(f"from-{ref.rpartition('/')[2]}", reference=cost,
                               flags=f"--ref {ref} "))
             for ref, cost in (("runs/sft-on-chosen", 0.25), ("runs/dpo-10k", 0.25),
                               ("meta-llama/Meta-Llama-3-8B-Instruct", 0.8))]
    runs += [("beta", dpo(f"beta-{b}-of-{n}", pairs=n, flags=f"--beta {b} "))
             for n in (N // 10, N) for b in (0.01, 0.05, 0.1, 0.5) if (n, b) != (N, 0.1)]
    runs += [("scaling", dpo(f"{n}-x{e}", pairs=n, epochs=e)) for n in (N, 10 * N)
             for e in (1, 2, 4, 8)]
    runs += [("selection", dpo(method, method)) for method in SELECTIONS]
    runs += [("selection", dpo("random-100k", pairs=10 * N))]
    for study, (command, pairs) in runs:
        add(study, command, pairs * args.tokens_per_pair)
    add("online", f"deepspeed online_dpo.py --preset gemma-2b --beta 0.1 --model runs/dpo-10k "
        f"--max-prompts {N} --output runs/online", 1.25 * N * args.tokens_per_pair,
        5 * N * args.tokens_per_answer)
    for command in (
            "arena-hard runs/dpo-10k --version star --templates judge_config.yaml --judge-url URL",
            "curve runs/10000-x* runs/100000-x* --y arena-hard-version-star",
            "margins runs/gemma-2b-sft runs/dpo-10k --max-length 2048 "
            "--data HuggingFaceH4/ultrafeedback_binarized:test_prefs"):
        add("scores", f"python evaluate.py {command}")
    return rows


def rates(bench):
    """Tokens a second of bench_gpu.py's JSON: {1 and 3: trained at that ZeRO stage}, sampled."""
    for part in ("engine", "sampling"):
        if not bench.get(part, {}).get("ok"):
            raise ValueError(f"--bench: its part {part} is missing or failed; run bench_gpu.py "
                             "again")
    trained = {zero: max(of["tokens_per_s"] for name, of in bench["engine"].items()
                         if name.startswith(f"ZeRO {zero},")) for zero in (1, 3)}
    sampled = bench["sampling"]["tokens_per_s_at_most"]
    return trained, sampled.get("continuous, 256 rows") or max(sampled.values())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", type=Path, help="file of what bench_gpu.py printed")
    p.add_argument("--tokens-per-pair", type=int, default=1000, help="(default: %(default)s)")
    p.add_argument("--tokens-per-answer", type=int, default=300, help="(default: %(default)s)")
    args = p.parse_args(argv)
    rows, total = plan(args), {}
    if args.bench:
        bench = json.loads(args.bench.read_text().splitlines()[-1])
        trained, sampled = rates(bench)
        for row in rows:
            row["hours"] = (row["tokens"] / trained[row["zero"]] + row["sampled"] / sampled) / 3600
        total = {"device": bench["device"], "hours": sum(row["hours"] for row in rows)}
    shown = [{k: f"{v / 1e6:,.0f}M" if k in ("tokens", "sampled") else v for k, v in row.items()}
             for row in rows]
    print(data.table(shown))
    return {"commands": len(rows), "tokens": sum(row["tokens"] for row in rows)} | total


if __name__ == "__main__":
    print(json.dumps(main()))
