"""Packed equals alone: the promise on which every stage rests."""
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kernels import Group, LogProbs, layout, token_logps, use_varlen


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager"))


def test_packed_documents_equal_each_alone():
    model = llama()
    docs = [torch.randint(97, (n,)).tolist() for n in (5, 9, 9, 2)]
    alone = torch.cat([torch.log_softmax(model(torch.tensor([d])).logits[0, :-1], -1)
                       .gather(1, torch.tensor(d)[1:, None])[:, 0] for d in docs])
    use_varlen(model, 64)
    packed = LogProbs(model)(layout([Group([], [d], [[False] + [True] * (len(d) - 1)]) for d in docs]))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_shared_prompt_equals_unshared():
    model = llama()
    use_varlen(model, 64)
    pair = [Group([1, 2, 3], [[4, 5], [6], [4, 7, 8]], [[True] * 2, [True], [True] * 3])]
    logps = LogProbs(model)
    torch.testing.assert_close(logps(layout(pair)), logps(layout(pair, share=False)), atol=1e-5, rtol=0)


def test_token_logps_gradcheck():
    torch.manual_seed(0)
    h, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    t = torch.randint(11, (7,))
    for softcap in (None, 2.0):
        assert torch.autograd.gradcheck(
            lambda h, w: token_logps(h, w, t, scale=1.7, softcap=softcap, chunk_bytes=3 * 44), (h, w))
