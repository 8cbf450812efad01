"""A million conversations through convert, dedup, encode and pack: time and peak memory of each step.

    python tests/bench_data.py --rows 250000
    python tests/bench_data.py --rows 1000000 --kill

Rows of 80 to 160 words in two public schemas (ShareGPT, messages), one half each, in which 5% are exact copies of an
earlier row (white space at the ends and schema may differ), 5% near ones (word 5-grams' Jaccard >= 0.85, measured) and
5% decoys (<= 0.6, measured). Each step is a process of its own; its memory is the sum of its processes' Pss (a page that several
share counts once; pages of mapped files, which the kernel may drop, count, too), its peak sampled every half second.
`--kill` kills convert, dedup and encode once each with SIGKILL when a third is done, and starts them again: their time
is that of both. The last line is JSON.
"""
import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data                                                  # noqa: E402

STEPS = ("convert", "dedup", "encode", "pack")
SCHEMAS = ("sharegpt.jsonl", "messages.jsonl")


def make_words(rng: random.Random, n: int = 30000) -> list[str]:
    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "an", "or", "is")]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(n)})


def raw(words: list[str], cut: int, schema: int, spaces: bool) -> dict:
    """A row of one question (`cut` words) and its answer; `spaces` at the ends are not what makes a row another."""
    said = ["\n " * spaces + " ".join(part) + " \n" * spaces for part in (words[:cut], words[cut:])]
    if schema == 0:
        return {"conversations": [{"from": w, "value": t} for w, t in zip(("human", "gpt"), said)]}
    return {"messages": [{"role": w, "content": t} for w, t in zip(("user", "assistant"), said)]}


def likeness(a: list[str], b: list[str]) -> float:
    """Word 5-grams' Jaccard, written out here and not taken from data.py."""
    x, y = ({tuple(w[i:i + 5]) for i in range(len(w) - 4)} for w in (a, b))
    return len(x & y) / len(x | y)


def changed(words: list[str], rng: random.Random, vocabulary: list[str], near: bool) -> list[str]:
    """A copy with one or two words replaced (Jaccard >= 0.85), or with every eighth to twelfth (<= 0.6)."""
    while True:
        out, n = list(words), len(words)
        at = [rng.randrange(n)] if near else range(rng.randrange(5), n, rng.randint(8, 12))
        for i in at:
            out[i] = rng.choice(vocabulary)
        j = likeness(words, out)
        if j >= 0.85 if near else 0.3 <= j <= 0.6:
            return out


def generate(n: int, folder: Path) -> None:
    """The two files, and truth.npy: what each row is, 0 other, 1 exact, 2 near, 3 decoy, in the order of the files."""
    rng, truth, pool = random.Random(0), np.zeros(n, dtype=np.int8), []
    vocabulary = make_words(rng)
    for schema, name in enumerate(SCHEMAS):
        with open(folder / name, "w") as f:
            for i in range(schema * n // 2, (schema + 1) * n // 2):
                draw = rng.random()
                truth[i] = kind = 0 if not pool or draw >= 0.15 else 1 + int(draw / 0.05)
                if kind:
                    words, cut = pool[rng.randrange(len(pool))]
                    words = words if kind == 1 else changed(words, rng, vocabulary, kind == 2)
                else:
                    words, cut = rng.choices(vocabulary, k=rng.randint(80, 160)), rng.randint(10, 40)
                    if len(pool) < 100_000:
                        pool.append((words, cut))
                    elif rng.random() < 0.1:                # later rows have copies, too
                        pool[rng.randrange(len(pool))] = (words, cut)
                f.write(json.dumps(raw(words, cut, schema, kind == 1 and rng.random() < 0.5)) + "\n")
    np.save(folder / "truth.npy", truth)


def make_tokenizer(folder: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([" ".join(make_words(random.Random(0)))], trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "tokenizer")


def step(name: str, folder: Path) -> dict:
    """One step, in a process of its own."""
    parsed, work = data.parse_sources([str(folder / n) for n in SCHEMAS]), folder / "work"
    work.mkdir(exist_ok=True)
    if name == "convert":
        return {"rows": len(data.convert(parsed, False, 42, work).index)}
    if name == "dedup":
        (folder / "out").mkdir(exist_ok=True)
        store = data.convert(parsed, False, 42, work)
        return data.dedup(store, work, folder / "out", argparse.Namespace(near=True, num_proc=2, examples=3))
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    made = data.prepare([str(folder / "out/rows.jsonl")], tokenizer, data.set_template(tokenizer), max_length=2048,
                        num_proc=2, cache_dir=str(folder / "cache"))
    if name == "encode":
        return made.stats["total"]
    rows = data.pack(made.dataset["length"], 2048)
    n = len(rows.offsets) - 1
    return {"rows": n, "fill": float((rows.end - rows.start).sum() / (2048 * n))}


def tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid] + [p for child in children for p in tree(int(child))]


def memory(pid: int) -> tuple[float, float]:
    """GiB of a process and its children: Pss, and the part of it that is no file."""
    total = {"Pss": 0, "Pss_Anon": 0}
    for p in tree(pid):
        try:
            for line in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in total:
                    total[name] += int(rest.split()[0])
        except OSError:
            pass
    return total["Pss"] / 2 ** 20, total["Pss_Anon"] / 2 ** 20


def share_done(name: str, folder: Path, n: int) -> float:
    if name == "convert":
        file = folder / "work/index.bin"
        return file.stat().st_size / data.INDEX.itemsize / n if file.exists() else 0
    found = folder.glob("work/minhash-*") if name == "dedup" else folder.glob("cache/*.writing/encode-*")
    return sum(1 for f in found if f.name.count("-") < 4 and "." not in f.name) * data.CHUNK / n


def cpu_seconds() -> float:
    """Of all processes that ended, user and system: what other people's work on the machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, folder: Path, n: int, kill: bool) -> dict:
    started, cpu, peak, killed = time.perf_counter(), cpu_seconds(), (0.0, 0.0), None
    while True:
        p = subprocess.Popen([sys.executable, __file__, "--step", name, str(folder)], stdout=subprocess.PIPE, text=True)
        while p.poll() is None:
            peak = tuple(map(max, peak, memory(p.pid)))
            if kill and killed is None and share_done(name, folder, n) > 1 / 3:
                p.send_signal(signal.SIGKILL)
                killed = share_done(name, folder, n)
            time.sleep(0.5)
        out = p.stdout.read()
        if p.returncode == 0:
            break
        if p.returncode != -signal.SIGKILL or killed is None:
            sys.exit(f"{name} failed with {p.returncode}")
        kill = False
    return json.loads(out.splitlines()[-1]) | {"seconds": time.perf_counter() - started,
                                               "cpu": cpu_seconds() - cpu, "peak_gib": peak[0],
                                               "anonymous_gib": peak[1], "killed_at": killed}


def found(folder: Path) -> dict:
    """What of each kind was dropped, by the row numbers of clusters.jsonl."""
    truth, lost = np.load(folder / "truth.npy"), np.zeros(len(np.load(folder / "truth.npy")), dtype=bool)
    offset = {str(folder / name): i * len(truth) // 2 for i, name in enumerate(SCHEMAS)}
    for _, line in data.read_lines(str(folder / "out/clusters.jsonl")):
        for one in line["dropped"]:
            name, _, row = one["row"].rpartition(":")
            lost[offset[name] + int(row) - 1] = True
    return {name: float(lost[truth == k].mean()) for k, name in enumerate(("others", "exact", "near", "decoys"))} | {
        "others_and_decoys": float(lost[(truth == 0) | (truth == 3)].mean())}


def main() -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=250_000)
    p.add_argument("--kill", action="store_true", help="kill convert, dedup and encode once each, and go on")
    p.add_argument("--work", help="folder for the data, some 8 GB a million rows; None: a temporary one")
    p.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="only the first so many")
    p.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.step:
        return step(args.step[0], Path(args.step[1]))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        folder = Path(folder)
        started = time.perf_counter()
        generate(args.rows, folder)
        make_tokenizer(folder)
        print(f"{args.rows:,} rows generated in {time.perf_counter() - started:.0f} s", flush=True)
        results = {}
        for name in args.steps:
            r = results[name] = measure(name, folder, args.rows, args.kill and name != "pack")
            print(f"{name:8} {r['seconds']:8.1f} s {r['cpu']:8.1f} CPU s {1e6 * r['cpu'] / args.rows:6.0f} us/row "
                  f"{r['peak_gib']:6.2f} GiB ({r['anonymous_gib']:.2f} without files)"
                  + (f", killed at {r['killed_at']:.0%}" if r["killed_at"] else ""), flush=True)
        table = {key: {name: round(r[field], 2) for name, r in results.items()} for key, field in (
            ("seconds", "seconds"), ("cpu_seconds", "cpu"), ("peak_gib",) * 2, ("anonymous_gib",) * 2)}
        if "dedup" in results:
            table |= {"dropped": found(folder), "kept": results["dedup"]["kept"]}
        if "pack" in results:
            table |= {"encoded": results["encode"]["examples"], "packed_rows": results["pack"]["rows"],
                      "fill": results["pack"]["fill"]}
        return {"rows": args.rows} | table


if __name__ == "__main__":
    print(json.dumps(main()))
