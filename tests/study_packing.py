"""Study: packing and the loss mask in SFT (LIONs, section 3: packing with the mask is best at both
sizes, and the mask matters more with more data; a reason offered is that padding overfits the chat
template, whose tokens begin every row).

    python tests/study_packing.py --data DIR

A small Llama with byte tokens, from scratch, on GSM8K's questions and answers. Arms: {packing, one
document a row} x {loss on answers, on all tokens}; equal epochs, so that padding takes more and
smaller steps, as in the paper. The last arm has as many documents a step as packing. Score: bits
per byte of held-out answers, under the template of training (ChatML) and under one that no run has
seen (question / answer lines).
"""
import gzip
import math
from pathlib import Path

import numpy as np

from studies import (arguments, data, difference, error_bars, finish, interval, json, mean_interval,
                     run_main, stage, verdict, write_rows)

ARMS = {"packing, mask": ("bfd", "assistant", 8), "packing, no mask": ("bfd", "all", 8),
        "padding, mask": ("none", "assistant", 8), "padding, no mask": ("none", "all", 8),
        "padding, mask, fewer steps": ("none", "assistant", 14)}
SIZES, HELD = (150, 600), 100
PLAIN = ("{% for m in messages %}{{ {'user': 'Question', 'assistant': 'Answer', 'system': 'Note'}"
         "[m['role']] + ': ' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}")


def conversations(args, split, n):
    """The first n GSM8K rows of a seeded order, as messages. --quick: the demo's."""
    if args.quick:
        return [{"messages": row["messages"]} for row in data.demo_conversations(n, 0, split)]
    with gzip.open(Path(args.data) / f"gsm8k_{split}.jsonl.gz", "rt") as file:
        rows = list(map(json.loads, file))
    rows = [rows[i] for i in data.permutation(len(rows), 0)[:n]]
    return [{"messages": data.ask(row["question"], row["answer"])} for row in rows]


def bits_per_byte(args, model, held, template):
    """(documents,) bits per byte of the held-out answers under a chat template."""
    import torch
    from transformers import AutoModelForCausalLM
    tokenizer = data.load_tokenizer(str(model))
    template = data.set_template(tokenizer, template)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    bits = []
    for row in held:
        encoded = data.encode(data.Conversation(row["messages"], True), tokenizer, template)
        ids, mask = torch.tensor([encoded.input_ids]), torch.tensor(encoded.targets)
        with torch.no_grad():
            logps = network(ids).logits[0, :-1].log_softmax(-1)                  # (T - 1, V)
        nats = -logps.gather(1, ids[0, 1:, None])[:, 0][mask[1:]].sum()
        bits.append(float(nats) / math.log(2) / len(row["messages"][-1]["content"].encode()))
    return np.array(bits)


def main(argv=None):
    args = arguments(__doc__, argv)
    sizes, n_held, epochs = SIZES, HELD, 3
    if args.quick:
        sizes, n_held, epochs = (16,), 4, 1
    held = conversations(args, "test", n_held)
    plain = args.work / "plain.jinja"
    data.write_lines(plain, [PLAIN])
    templates, bits = {"training template": "chatml", "unseen template": str(plain)}, {}
    for size in sizes:
        path = write_rows(args.work / f"packing-{size}.jsonl", conversations(args, "train", size))
        for seed in args.seeds:
            for arm, (packing, loss_on, batch) in ARMS.items():
                output = args.work / f"packing-{seed}" / f"{size}-{packing}-{loss_on}-{batch}"
                stage(args, "sft", model="demo", data=path, epochs=epochs, lr=3e-3, seed=seed,
                      batch_size=batch, max_length=1024, packing=packing, loss_on=loss_on,
                      num_proc=1, output=output)
                for name, template in templates.items():
                    bits.setdefault((size, arm, name), []).append(
                        bits_per_byte(args, output, held, template))
    bits = {cell: np.array(of) for cell, of in bits.items()}                    # (seeds, documents)
    best, result, rows = "packing, mask", {"seeds": args.seeds, "cells": {}, "verdict": {}}, []
    for size in sizes:
        for name in templates:
            for arm in ARMS:
                of = bits[size, arm, name]
                against = difference(of, bits[size, best, name], 1)
                key = f"{size}, {arm}, {name}"
                result["cells"][key] = {"bits": mean_interval(of, 1), "above_best": against}
                rows.append({"documents": size, "template": name, "arm": arm, "bits per byte":
                             interval(result["cells"][key]["bits"], ".3f"),
                             f"above {best}": interval(against, "+.3f")})
                if arm != best:
                    result["verdict"][key] = verdict(against)
    panels = []
    for name in templates:
        x, series = np.arange(len(ARMS)), {}
        for i, size in enumerate(sizes):
            of = [result["cells"][f"{size}, {arm}, {name}"]["bits"] for arm in ARMS]
            series[f"{size} documents"] = error_bars(x + 0.1 * i, of, f"C{i}o")
        panels.append({"series": series, "title": name, "ylabel": "bits per byte, 95% interval",
                       "xticks": x, "xticklabels": [arm.replace(", ", "\n") for arm in ARMS]})
    return finish(args, "packing", result, panels, rows, 2)


if __name__ == "__main__":
    run_main(main)
