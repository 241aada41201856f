"""tinybert_eager.py with its losses swapped: the same numbers, with no attention map stored and no padding computed.

`diff tinybert_eager.py tinybert_fused.py` shows the handful of lines. Teacher and student are small BERTs with random
weights and the sentences are random, so that it runs anywhere in seconds: put your own models and data in their place.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

from kdkernels.functional import attention_mse, hidden_mse, kd_loss


def bert(layers, hidden_size, heads=4):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=1000,
            num_hidden_layers=layers,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_attention_heads=heads,
        )
    )


def tap(model, name):
    """What the Linear `name` of each attention layer gives at a forward, as a list of [batch, heads, tokens, d]."""
    heads, outputs = model.config.num_attention_heads, [None] * model.config.num_hidden_layers
    for i, layer in enumerate(model.bert.encoder.layer):

        def keep(_, __, output, i=i):
            outputs[i] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

        getattr(layer.attention.self, name).register_forward_hook(keep)
    return outputs


def sentences(batch=8, tokens=64):
    """Endless batches of random token ids and their attention mask."""
    while True:
        mask = torch.arange(tokens) < torch.randint(4, tokens + 1, (batch, 1))
        yield torch.randint(1000, (batch, tokens)), mask


def train(steps=20, seed=0):
    """The loss of each step."""
    torch.manual_seed(seed)
    teacher, student = bert(layers=4, hidden_size=96).eval(), bert(layers=2, hidden_size=48)
    fit = torch.nn.Linear(48, 96)  # one projection for all hidden states
    optimizer = torch.optim.AdamW([*student.parameters(), *fit.parameters()], lr=1e-3, eps=1e-6)
    q_s, k_s, q_t, k_t = (tap(model, name) for model in (student, teacher) for name in ("query", "key"))
    losses = []
    for _, (input_ids, mask) in zip(range(steps), sentences(), strict=False):
        inputs = {"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True}
        with torch.no_grad():
            t = teacher(**inputs)
        s = student(**inputs)

        loss = kd_loss(s.logits, t.logits, kind="ce", scale_t2=False, reduction="mean")
        for i in range(2):  # student layer i learns from the last teacher layer of its block
            loss = loss + attention_mse(q_s[i], k_s[i], q_t[2 * i + 1], k_t[2 * i + 1], mask)
        states = s.hidden_states, t.hidden_states[::2]  # embeddings and every block
        loss = loss + hidden_mse(*states, mask, weight=fit.weight, bias=fit.bias)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        print(f"step {step:2}  loss {loss:.4f}")
