"""Study: DPO's reference (LIONs, section 3: SFT on the chosen answers or one DPO before, as the
reference, help slightly; a reference with another tokenizer serves as well).

    python tests/study_reference.py

Policy: the demo's SFT model, in every arm; only --ref differs. The foreign reference is a small
Llama with a byte-pair vocabulary of its own, SFT on the same conversations. The demo's answers have
five tokens, log-ratios of one nat, and at the paper's beta, 0.1, a reference hardly moves the
loss's weight sigmoid(r_l - r_w) from 1/2. So a second beta makes r of order one, as it is for long
answers. Score: exact match of greedy answers on held-out prompts.
"""
import numpy as np

from studies import (DEMO_DPO, arguments, data, demo_sft, difference, error_bars, exact_matches,
                     finish, interval, mean_interval, run_main, stage, verdict, write_rows)

PAIRS, BETAS = 1000, (0.1, 2.5)


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
    """{arm: reference folder} of the references that no DPO run is."""
    folder = args.work / f"demo-{seed}" / "study-reference"
    flags = dict(preset="demo", seed=seed, num_proc=1, eval_data="demo:test=0.05")
    conversations = write_rows(folder / "conversations.jsonl",
                               data.demo_conversations(n_conversations))
    made = {arm: folder / arm for arm in ("sft-on-chosen", "foreign")}
    stage(args, "sft", model=sft, data=pairs, lr=3e-4, output=made["sft-on-chosen"], **flags)
    stage(args, "sft", model=foreign_base(args, seed), data=conversations, output=made["foreign"],
          **flags)
    return {"pi_sft": sft} | made


def arm_scores(args, sft, seed, pairs, refs, beta):
    """{arm: (prompts,)} of the policies that DPO trains with each reference. The first arm's policy
    is the reference of the last arm, dpo-once."""
    folder, scores = args.work / f"demo-{seed}" / "study-reference", {}
    for arm, ref in [*refs.items(), ("dpo-once", folder / f"from-pi_sft-beta-{beta}")]:
        output = folder / f"from-{arm}-beta-{beta}"
        stage(args, "dpo", preset="demo", model=sft, ref=ref, data=pairs, seed=seed, beta=beta,
              num_proc=1, eval_data="demo-pairs:test=0.05", output=output, **DEMO_DPO)
        scores[arm] = exact_matches(args, output)
    return scores


def main(argv=None):
    args = arguments(__doc__, argv)
    n_pairs, n_conversations = (32, 100) if args.quick else (PAIRS, 20000)
    pairs = write_rows(args.work / "reference.jsonl", data.demo_pairs(n_pairs, 300))
    sft, scores = demo_sft(args), {}
    for seed in args.seeds:
        refs = references(args, sft, seed, pairs, n_conversations)
        for beta in BETAS:
            for arm, of in arm_scores(args, sft, seed, pairs, refs, beta).items():
                scores.setdefault((beta, arm), []).append(of)
    scores = {cell: np.array(of) for cell, of in scores.items()}                # (seeds, prompts)
    result, rows = {"seeds": args.seeds, "arms": {}, "verdict": {}}, []
    for (beta, arm), of in scores.items():
        against, name = difference(of, scores[beta, "pi_sft"]), f"{arm}, beta {beta}"
        result["arms"][name] = {"score": mean_interval(of), "against pi_sft": against}
        rows.append({"reference": arm, "beta": beta, "against pi_sft": interval(against),
                     "exact match %": interval(result["arms"][name]["score"], ".1f")})
        if arm == "foreign":
            known = verdict(against) != "undecided"
            result["verdict"][f"{name}, serves as well"] = "disagrees" if known else "undecided"
        elif arm != "pi_sft":
            result["verdict"][f"{name}, helps"] = verdict(against)
    arms = [arm for beta, arm in scores if beta == BETAS[0]]
    x, series = np.arange(len(arms)), {}
    for n, beta in enumerate(BETAS):
        of = [result["arms"][f"{arm}, beta {beta}"]["score"] for arm in arms]
        series[f"beta {beta}"] = error_bars(x + 0.1 * n, of, f"C{n}o")
    panels = [{"series": series, "xticks": x, "xticklabels": arms,
               "title": "the demo's task, by reference",
               "ylabel": "exact match (%), 95% interval"}]
    return finish(args, "reference", result, panels, rows)


if __name__ == "__main__":
    run_main(main)
