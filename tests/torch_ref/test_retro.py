"""The reference against its equations written out, one position and one head at a time."""

import math

import pytest
import torch

from tests.common import randomised_torch
from tests.jaxmodels.retro.common import L, M, N, neighbors, twin
from torch_ref.retro import ChunkedCrossAttention, CrossAttention, SelfAttention
from torch_ref.rope import RotaryPositionalEmbeddings

B, D, H, DK = 2, 10, 3, 4


def made(cls, *args):
    torch.manual_seed(0)
    return randomised_torch(cls(D, H, DK, *args).double(), 0.3)


def attended(module, query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """One query [D], normed already, over memory [n, D] -> [D]."""
    q, k, v = module.query(query).view(H, DK), module.key(memory).view(-1, H, DK), module.value(memory).view(-1, H, DK)
    heads = [((k[:, h] @ q[h]) / math.sqrt(DK)).softmax(dim=0) @ v[:, h] for h in range(H)]
    return module.output(torch.cat(heads))


@torch.no_grad()
@pytest.mark.parametrize("s", [L, 2 * L + 3, 3 * L - 1])
def test_a_position_reads_the_neighbours_of_the_last_chunk_that_has_ended(s):
    module, h, e = (
        made(ChunkedCrossAttention, L),
        torch.randn(B, s, D).double(),
        torch.randn(B, s // L, N, M, D).double(),
    )
    out = module(h, e)
    for b in range(B):
        for i in range(s):
            u = (i + 1) // L - 1
            expected = h[b, i]
            if u >= 0:
                expected = expected + attended(module, module.norm(h[b, i]), e[b, u].reshape(N * M, D))
            torch.testing.assert_close(out[b, i], expected)


@torch.no_grad()
def test_a_neighbours_token_reads_the_whole_chunk_it_was_retrieved_for():
    module, e, h = made(CrossAttention), torch.randn(B, 3, N, M, D).double(), torch.randn(B, 3, L, D).double()
    out = module(e, h)
    for b, c, n, m in [(0, 0, 0, 0), (1, 2, 1, 5), (1, 0, 1, 3)]:
        expected = e[b, c, n, m] + attended(module, module.norm(e[b, c, n, m]), h[b, c])
        torch.testing.assert_close(out[b, c, n, m], expected)


@torch.no_grad()
@pytest.mark.parametrize("is_causal", [True, False])
def test_self_attention_turns_all_of_a_head_and_sees_what_it_may(is_causal):
    module, h = made(SelfAttention, is_causal), torch.randn(B, 7, D).double()
    z, turned = module.norm(h), RotaryPositionalEmbeddings(DK)
    q, k = (turned(linear(z).view(B, 7, H, DK).transpose(0, 1)) for linear in (module.query, module.key))
    v = module.value(z).view(B, 7, H, DK)
    for i in range(7):
        seen = i + 1 if is_causal else 7
        scores = torch.einsum("bhd,jbhd->bhj", q[i], k[:seen]) / math.sqrt(DK)
        x = torch.einsum("bhj,bjhd->bhd", scores.softmax(dim=-1), v[:, :seen])
        torch.testing.assert_close(module(h)[:, i], h[:, i] + module.output(x.flatten(1)))


@torch.no_grad()
def test_the_encoder_comes_once_after_the_first_layers_self_attention():
    model = twin(ca_layers=(1, 2))
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.zeros(B, 9, dtype=int), torch.as_tensor(neighbors(0, B, 2).tolist()))
    top = [name for name in calls if name.split(".")[0] in ("emb", "attn", "encoder", "norm_e", "cca", "ffw", "read")]
    top = [name for name in top if name.count(".") == (name.split(".")[0] in ("attn", "cca", "ffw"))]
    expected = "emb emb attn.0 ffw.0 attn.1 encoder norm_e cca.0 ffw.1 attn.2 cca.1 ffw.2 read"
    assert top == expected.split()
