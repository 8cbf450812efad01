"""A million conversations through convert, dedup --near, encode and pack: time and peak memory.

    python tests/bench_data.py --rows 250000

Rows of 80 to 160 words in two public schemas (ShareGPT, messages), one half each. 5% are exact
copies of an earlier row (white space at the ends and schema may differ), 5% near ones (Jaccard of
word 5-grams >= 0.85, measured) and 5% decoys (<= 0.6, measured). Each step is a process of its own.
Its memory is the sum of its processes' Pss, sampled every half second: a page that several share
counts once. Pages of mapped files count, though the kernel may drop them. The last line is JSON.
"""
import argparse
import json
import random
import resource
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
FILES = ("sharegpt.jsonl", "messages.jsonl")
KINDS = ("others", "exact", "near", "decoys")
PROCESSES = 2


# ------------------------------------------------------------------------------------ made-up rows
def make_vocabulary(rng, n=30000):
    vowels = ("a", "e", "i", "o", "u", "an", "or", "is")
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in vowels]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(n)})


def make_row(words, cut, file, with_spaces):
    """A question of `cut` words and its answer, in the schema of its file."""
    texts = [" ".join(part) for part in (words[:cut], words[cut:])]
    if with_spaces:
        texts = [f"\n {text} \n" for text in texts]
    if file == FILES[0]:
        turns = zip(("human", "gpt"), texts)
        return {"conversations": [{"from": who, "value": text} for who, text in turns]}
    return {"messages": data.ask(*texts)}


def likeness(a, b):
    """Jaccard of word 5-grams, written out here and not taken from data.py."""
    x, y = ({tuple(words[i:i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(x & y) / len(x | y)


def make_copy(words, rng, vocabulary, kind):
    """exact: the same; near: one word replaced; decoys: every eighth to twelfth word replaced."""
    if kind == "exact":
        return words
    least, most = (0.85, 1) if kind == "near" else (0.3, 0.6)
    while True:
        copy = list(words)
        positions = [rng.randrange(len(words))]
        if kind == "decoys":
            positions = range(rng.randrange(5), len(words), rng.randint(8, 12))
        for i in positions:
            copy[i] = rng.choice(vocabulary)
        if least <= likeness(words, copy) <= most:
            return copy


def write_files(n, folder):
    """FILES, and truth.npy: the index in KINDS of every row, in the order of the files."""
    rng, pool = random.Random(0), []
    vocabulary, truth = make_vocabulary(rng), np.zeros(n, dtype=np.int8)
    for part, name in enumerate(FILES):
        with open(folder / name, "w") as f:
            for i in range(part * n // 2, (part + 1) * n // 2):
                draw = rng.random()
                if pool and draw < 0.15:
                    truth[i] = 1 + int(draw / 0.05)
                kind = KINDS[truth[i]]
                if kind == "others":
                    words = rng.choices(vocabulary, k=rng.randint(80, 160))
                    cut = rng.randint(10, 40)
                    if len(pool) < 100_000:
                        pool.append((words, cut))
                    elif rng.random() < 0.1:                # later rows have copies, too
                        pool[rng.randrange(len(pool))] = (words, cut)
                else:
                    words, cut = rng.choice(pool)
                    words = make_copy(words, rng, vocabulary, kind)
                row = make_row(words, cut, name, kind == "exact" and rng.random() < 0.5)
                f.write(json.dumps(row) + "\n")
    np.save(folder / "truth.npy", truth)


def write_tokenizer(folder):
    """A byte-level BPE of 8,000 tokens, trained on the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, show_progress=False,
        special_tokens=["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([" ".join(make_vocabulary(random.Random(0)))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "tokenizer")


# ------------------------------------------------------------------------------- steps and measures
def run_step(step, folder):
    """One step, in a process of its own. Each finds the results of the one before in the cache."""
    cache, out = str(folder / "cache"), str(folder / "out")
    names = [str(folder / name) for name in FILES]
    if step == "convert":
        rows, _ = data.convert(data.parse_sources(names), False, 42, Path(cache), PROCESSES)
        return {"rows": len(rows)}
    if step == "dedup":
        return data.main(["dedup", "--near", "--data", *names, "--output", out,
                          "--cache-dir", cache, "--num-proc", str(PROCESSES)])
    tokenizer = data.load_tokenizer(folder / "tokenizer")
    template = data.set_template(tokenizer)
    prepared = data.prepare([f"{out}/rows.jsonl"], tokenizer, template, max_length=2048,
                            num_proc=PROCESSES, cache_dir=cache)
    if step == "encode":
        return prepared.stats["total"]
    lengths = np.asarray(prepared.dataset["length"])
    n_rows = len(data.pack(lengths, 2048).offsets) - 1
    return {"rows": n_rows, "fill": float(lengths.sum() / (2048 * n_rows))}


def process_tree(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:                                         # it has ended
        return []
    return [pid] + [p for child in children for p in process_tree(child)]


def memory(pid):
    """GiB of a process and its children: Pss, and the part of it that is no file."""
    total = {"Pss": 0, "Pss_Anon": 0}
    for p in process_tree(pid):
        try:
            lines = Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name in total:
                total[name] += int(rest.split()[0])
    return np.array(list(total.values())) / 2 ** 20


def cpu_seconds():
    """Of all processes that ended. Other people's work on the machine hardly changes it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(step, folder):
    """A step's own result, seconds, CPU seconds and peak memory in GiB."""
    started, cpu_before, peak = time.perf_counter(), cpu_seconds(), np.zeros(2)
    command = [sys.executable, __file__, "--step", step, "--work", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = np.maximum(peak, memory(process.pid))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"{step} failed with {process.returncode}")
    result = json.loads(process.stdout.read().splitlines()[-1])
    return result | {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(cpu_seconds() - cpu_before, 1),
        "peak_gib": round(peak[0], 2), "anonymous_gib": round(peak[1], 2)}


def dropped_shares(folder):
    """The share of each kind that dedup dropped, by the row numbers in duplicates.jsonl."""
    truth = np.load(folder / "truth.npy")
    first = {str(folder / name): part * len(truth) // 2 for part, name in enumerate(FILES)}
    dropped = np.zeros(len(truth), dtype=bool)
    with open(folder / "out/duplicates.jsonl") as f:
        for line in f:
            name, _, number = json.loads(line)["row"].rpartition(":")
            dropped[first[name] + int(number) - 1] = True
    shares = {kind: float(dropped[truth == k].mean()) for k, kind in enumerate(KINDS)}
    return shares | {"others_and_decoys": float(dropped[(truth == 0) | (truth == 3)].mean())}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=250_000)
    p.add_argument("--work", help="folder for the data, some 8 GB a million rows; None: temporary")
    p.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.step:
        return run_step(args.step, Path(args.work))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        folder, started = Path(folder), time.perf_counter()
        write_files(args.rows, folder)
        write_tokenizer(folder)
        seconds = time.perf_counter() - started
        print(f"{args.rows:,} rows generated in {seconds:.0f} s", flush=True)
        steps = {}
        for step in STEPS:
            steps[step] = r = measure(step, folder)
            print(f"{step:8} {r['seconds']:8} s {r['cpu_seconds']:8} CPU s "
                  f"{1e6 * r['cpu_seconds'] / args.rows:6.0f} us/row {r['peak_gib']:6} GiB "
                  f"({r['anonymous_gib']} without files)", flush=True)
        table = {key: {step: of[key] for step, of in steps.items()}
                 for key in ("seconds", "cpu_seconds", "peak_gib", "anonymous_gib")}
        return {"rows": args.rows} | table | {
            "dropped": dropped_shares(folder), "kept": steps["dedup"]["kept"],
            "encoded": steps["encode"]["examples"], "packed_rows": steps["pack"]["rows"],
            "fill": steps["pack"]["fill"]}


if __name__ == "__main__":
    print(json.dumps(main()))
