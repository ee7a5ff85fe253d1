"""Lay a copying circuit into the fresh weights, so that training need not find it by chance.

Names, JSON values and repeated words are copied by two heads in a row: one that looks at the previous token, and one
that looks for the place where the present token was seen before and passes on what followed it (an induction head:
Olsson et al., 2022). From random weights this pair appears only after many millions of tokens, more than an
hour on two cores can show. So the first two layers start with a rough copy of it (structured initial weights:
Trockman and Kolter, 2023), everything else writes nothing at first, and training goes on from there.
"""

import torch
from transformers import LlamaForCausalLM

SIZE = 0.1  # standard deviation of an embedding entry
CONSTANT = 4.0  # entry 0 of every embedding, in units of SIZE: what a head may read when it only cares for positions
MATCH = 32  # dimensions in which the present token and the earlier token are compared


def wire_copying(model: LlamaForCausalLM, seed: int) -> None:
    """Set the embeddings and the first key-value head of layers 0 and 1. Changes the model in place."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    hidden, head_dim = config.hidden_size, config.head_dim
    free = hidden - MATCH  # entries from here on hold no embedding, but what the first head writes
    half = head_dim // 2

    def projection(rows: int) -> torch.Tensor:
        """Orthonormal rows that read the embedding: float32 [rows, hidden]."""
        square, _ = torch.linalg.qr(torch.randn(free - 1, rows, generator=generator))
        return torch.cat([torch.zeros(rows, 1), square.T, torch.zeros(rows, MATCH)], dim=1)

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = model.model.embed_tokens.weight
        table.copy_(torch.randn(table.shape, generator=generator) * SIZE)
        table[:, 0] = CONSTANT * SIZE
        table[:, free:] = 0

        # Layer 0: the rotary angles of query and key differ by one step, so the head looks one token back.
        attention, pairs = model.model.layers[0].self_attn, torch.arange(12)
        angles = 10000.0 ** (-pairs / half)
        strength = 7.0 / (CONSTANT * SIZE / table[0].square().mean().sqrt())
        for matrix in (attention.q_proj.weight, attention.k_proj.weight):
            matrix[:head_dim] = 0
        attention.q_proj.weight[pairs, 0] = strength * angles.cos()
        attention.q_proj.weight[pairs + half, 0] = -strength * angles.sin()
        attention.k_proj.weight[pairs, 0] = strength
        compare = projection(MATCH)
        attention.v_proj.weight[:MATCH] = compare
        attention.o_proj.weight[free:, :MATCH] = SIZE * torch.eye(MATCH)

        # Layer 1: compare the present token with the one before each earlier place, in the slow rotary dimensions.
        attention = model.model.layers[1].self_attn
        slow = torch.cat([torch.arange(half - MATCH // 2, half), torch.arange(head_dim - MATCH // 2, head_dim)])
        for matrix in (attention.q_proj.weight, attention.k_proj.weight):
            matrix[:head_dim] = 0
        attention.q_proj.weight[slow] = 1.9 * compare
        attention.k_proj.weight[slow, torch.arange(free, hidden)] = 1.9
        passed = projection(head_dim)
        attention.v_proj.weight[:head_dim] = passed
        attention.o_proj.weight[:, :head_dim] = 6 * SIZE * passed.T
