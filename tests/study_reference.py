"""Study: DPO's reference and the sequence length (LIONs, section 3: SFT on the chosen answers or
one DPO before, as the reference, help slightly; a reference with another tokenizer serves as well;
longer rows help clearly).

    python tests/study_reference.py                              the references, on the demo's task
    python tests/study_reference.py --model SMOLLM2 --data DIR     also the length, judged pairs

Policy: the demo's SFT model of the seed, in every arm; only --ref differs. The foreign reference is
a small Llama with a byte-pair vocabulary of its own, SFT on the same conversations. Score: exact
match of greedy answers on held-out prompts; for the length, the share of unseen judged pairs of any
length with r_w > r_l, scored at 512 tokens.
"""
import numpy as np

from studies import (DEMO_DPO, arguments, data, demo_sft, difference, error_bars, evaluation,
                     exact_matches, finish, interval, json, judged_pairs, mean_interval, run_main,
                     stage, verdict, write_rows)

PAIRS, LENGTHS, LENGTH_PAIRS = 1000, (256, 512), 96


def foreign_base(args, seed):
    """A random small Llama with 600 byte-pair tokens, as a model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    folder = args.work / f"foreign-{seed}"
    if (folder / "config.json").exists():
        return folder
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    texts = [m["content"] for row in data.demo_conversations(2000, 7) for m in row["messages"]]
    bpe.train_from_iterator(texts + ["system user assistant"], trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": specials[2:]})
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def references(args, sft, seed, pairs, n_conversations):
    """{arm: reference folder}."""
    folder = args.work / f"demo-{seed}" / "study-reference"
    made = {"pi_sft": sft} | {arm: folder / arm for arm in ("sft-on-chosen", "dpo-once", "foreign")}
    stage(args, "sft", preset="demo", model=sft, data=pairs, seed=seed, lr=3e-4, num_proc=1,
          eval_data="demo:test=0.05", output=made["sft-on-chosen"])
    stage(args, "dpo", **demo_flags(seed, pairs), model=sft, output=made["dpo-once"])
    conversations = write_rows(folder / "conversations.jsonl",
                               data.demo_conversations(n_conversations))
    stage(args, "sft", preset="demo", model=foreign_base(args, seed), data=conversations, seed=seed,
          num_proc=1, eval_data="demo:test=0.05", output=made["foreign"])
    return made


def demo_flags(seed, pairs):
    return dict(DEMO_DPO, preset="demo", data=pairs, seed=seed, beta=0.1, num_proc=1,
                eval_data="demo-pairs:test=0.05")


def length_study(args):
    """{length: {"score", ..}} and the difference, on judged pairs of up to 2,400 characters."""
    rows, folder = judged_pairs(args, "train", 2400), args.work / "length"
    held = list({str(row["prompt"]): row for row in judged_pairs(args, "test", 2400)}.values())
    held, scores = write_rows(folder / "held-out.jsonl", held), {n: [] for n in LENGTHS}
    for seed in args.seeds:
        part = [rows[i] for i in data.permutation(len(rows), seed)[:LENGTH_PAIRS]]
        train = write_rows(folder / f"{seed}.jsonl", part)
        for n in LENGTHS:
            output = folder / f"{seed}-{n}"
            stage(args, "dpo", model=args.model, data=train, seed=seed, batch_size=8, lr=1e-5,
                  beta=0.1, max_length=n, max_prompt_length=128, num_proc=1, output=output)
            margins = folder / "margins" / output.name
            evaluation(args, "margins", args.model, output, data=held, max_length=512, dtype="fp32",
                       max_prompt_length=128, num_proc=1, output=margins)
            points = map(json.loads, (margins / "margins.jsonl").open())
            scores[n].append([float(p["after"] > p["before"]) for p in points])
    long, short = (np.array(scores[n]) for n in reversed(LENGTHS))
    return {"score": {n: mean_interval(np.array(of)) for n, of in scores.items()},
            "long_against_short": difference(long, short)}


def main(argv=None):
    args = arguments(__doc__, argv)
    n_pairs, n_conversations = (32, 100) if args.quick else (PAIRS, 20000)
    pairs, scores = write_rows(args.work / "reference.jsonl", data.demo_pairs(n_pairs, 300)), {}
    sft = demo_sft(args)
    for seed in args.seeds:
        for arm, ref in references(args, sft, seed, pairs, n_conversations).items():
            output = args.work / f"demo-{seed}" / "study-reference" / f"from-{arm}"
            stage(args, "dpo", **demo_flags(seed, pairs), model=sft, ref=ref,
                  output=output)
            scores.setdefault(arm, []).append(exact_matches(args, output))
    scores = {arm: np.array(of) for arm, of in scores.items()}                  # (seeds, prompts)
    result = {"seeds": args.seeds, "arms": {}, "verdict": {}}
    for arm, of in scores.items():
        against = difference(of, scores["pi_sft"])
        result["arms"][arm] = {"score": mean_interval(of), "against pi_sft": against}
        if arm != "pi_sft":
            result["verdict"][f"{arm} helps"] = verdict(against)
    if args.model and not args.quick:
        result["length"] = length_study(args)
        result["verdict"]["longer rows help"] = verdict(result["length"]["long_against_short"])
    rows = [{"reference": arm, "exact match %": interval(of["score"], ".1f"),
             "against pi_sft": interval(of["against pi_sft"])}
            for arm, of in result["arms"].items()]
    x = np.arange(len(scores))
    panels = [{"series": {"": error_bars(x, [of["score"] for of in result["arms"].values()], "o")},
               "xticks": x, "xticklabels": list(scores), "title": "the demo's task, by reference",
               "ylabel": "exact match (%), 95% interval"}]
    return finish(args, "reference", result, panels, rows)


if __name__ == "__main__":
    run_main(main)
