"""TinyBERT (arXiv 1909.10351) as a plain PyTorch training loop: attention scores, hidden states and logits.

tinybert_fused.py beside it is this loop with its losses swapped. Teacher and student are small BERTs with random
weights and the sentences are random, so that it runs anywhere in seconds: put your own models and data in their place.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification


def scores_mse(q_s, k_s, q_t, k_t, mask):
    """Mean squared difference of the attention scores over pairs of real tokens."""
    student = q_s @ k_s.transpose(-1, -2) / q_s.shape[-1] ** 0.5
    teacher = q_t @ k_t.transpose(-1, -2) / q_t.shape[-1] ** 0.5
    pairs = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(student)
    return ((student - teacher).square() * pairs).sum() / pairs.sum()


def states_mse(student, teacher, mask):
    """Mean squared difference over real tokens."""
    return ((student - teacher).square() * mask.unsqueeze(-1)).sum() / (mask.sum() * teacher.shape[-1])


def soft_cross_entropy(student, teacher):
    """Over rows x classes, as TinyBERT's script reduces it."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).mean()


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

        loss = soft_cross_entropy(s.logits, t.logits)
        for i in range(2):  # student layer i learns from the last teacher layer of its block
            loss = loss + scores_mse(q_s[i], k_s[i], q_t[2 * i + 1], k_t[2 * i + 1], mask)
        for h_s, h_t in zip(s.hidden_states, t.hidden_states[::2], strict=True):  # embeddings and every block
            loss = loss + states_mse(fit(h_s), h_t, mask)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        print(f"step {step:2}  loss {loss:.4f}")
