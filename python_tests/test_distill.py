"""Taps, matches, sources, schedules, surgery and recipes, each against a computation by hand."""

import dataclasses

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, mse_loss, normalize
from transformers import (
    AlbertConfig,
    AlbertModel,
    DistilBertConfig,
    DistilBertModel,
    MobileBertConfig,
    MobileBertModel,
    RobertaConfig,
    RobertaModel,
    TrainingArguments,
)

from kdkernels.distill import (
    Cached,
    Cosine,
    DistillError,
    DistillTrainer,
    Frozen,
    Group,
    Linear,
    Match,
    Mean,
    Peers,
    Piecewise,
    SelfBranch,
    Snapshot,
    Stage,
    fresh,
    set_dropout,
    take_layers,
)
from kdkernels.distill.data import collator, encode, order, read
from kdkernels.distill.matches import UNITS, count
from kdkernels.distill.taps import collect, mean_pool
from kdkernels.distill.trainer import Distillation
from kdkernels.recipes import RECIPES, hinton, minilm, tinybert

from . import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": 65, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def other_architectures():
    return {
        "roberta": RobertaModel(RobertaConfig(**SMALL)),
        "distilbert": DistilBertModel(DistilBertConfig(vocab_size=65, dim=24, n_layers=3, n_heads=4, hidden_dim=48)),
        "albert": AlbertModel(AlbertConfig(embedding_size=16, **SMALL)),
        "mobilebert": MobileBertModel(MobileBertConfig(embedding_size=16, intra_bottleneck_size=16, **SMALL)),
    }


# --- taps


def test_taps_equal_a_forward_by_hand():
    model, batch = tiny.bert(head=True), tiny.batch()
    taps = collect(model, batch, ["hidden.0", "hidden.2", "hidden.-1", "cls.3", "q.1", "qkv.-1", "logits", "embedding"])
    plain = model(**batch, output_hidden_states=True)
    for name, expected in (("hidden.0", 0), ("hidden.2", 2), ("hidden.-1", 4)):
        assert torch.equal(taps[name], plain.hidden_states[expected])
    assert torch.equal(taps["cls.3"], plain.hidden_states[3][:, 0])
    assert torch.equal(taps["logits"], plain.logits)
    for name, tap, layer, linear in (("q", taps["q.1"], 1, "query"), ("v", taps["qkv.-1"][2], 3, "value")):
        by_hand = getattr(model.bert.encoder.layer[layer].attention.self, linear)(plain.hidden_states[layer])
        assert torch.equal(tap.transpose(1, 2).flatten(2), by_hand), name
        assert tap.shape == (3, 4, batch["input_ids"].shape[1], 6)
    rows = [
        normalize(state[:length].mean(0), dim=0)
        for state, length in zip(plain.hidden_states[-1], batch["attention_mask"].sum(1), strict=True)
    ]
    torch.testing.assert_close(taps["embedding"], torch.stack(rows))
    assert model.config._attn_implementation == "sdpa"


def test_only_what_was_asked_for_is_kept():
    assert set(collect(tiny.bert(), tiny.batch(), ["k.2"])) == {"k.2"}


@pytest.mark.parametrize("name", ["roberta", "distilbert", "albert", "mobilebert"])
def test_other_architectures(name):
    model, batch = other_architectures()[name].eval(), tiny.batch()
    taps = collect(model, batch, ["hidden.1", "hidden.-1", "qkv.0", "qkv.-1"])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    plain = model(**inputs, output_hidden_states=True)
    assert torch.equal(taps["hidden.1"], plain.hidden_states[1])
    assert torch.equal(taps["hidden.-1"], plain.last_hidden_state)
    assert all(part.shape[:3] == (3, 4, batch["input_ids"].shape[1]) for part in taps["qkv.-1"])
    assert not torch.equal(taps["qkv.0"][0], taps["qkv.-1"][0])
    taken = take_layers(model, 1)
    assert collect(taken, batch, ["qkv.-1"])["qkv.-1"][0].shape == taps["qkv.0"][0].shape
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("hidden.9", "layers -5 to 4"),
        ("q.4", "layers -4 to 3"),
        ("hiden.1", "unknown tap 'hiden.1'"),
        ("hidden", "layer number"),
        ("logits", "needs a model with a head"),
    ],
)
def test_bad_taps(tap, message):
    with pytest.raises(DistillError, match=message):
        collect(tiny.bert(), tiny.batch(), [tap])


# --- matches and recipes: the loss equals the formula written out


def loss_of(stage, student, teacher, batch):
    torch.manual_seed(0)
    module = Distillation(student, dataclasses.replace(stage, source=Frozen(teacher)))
    return module, module(**batch)["loss"]


def test_hinton_is_its_formula():
    teacher, student, batch = tiny.bert(0, head=True), tiny.bert(1, head=True), tiny.batch(labels=True)
    (stage,) = hinton(teacher.config, temperature=3.0, alpha=0.7).stages
    _, loss = loss_of(stage, student, teacher, batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    s, t = student(**inputs).logits, teacher(**inputs).logits
    soft = 9 * kl_div(log_softmax(s / 3, -1), log_softmax(t / 3, -1), reduction="batchmean", log_target=True)
    hard = torch.nn.functional.cross_entropy(s, batch["labels"])
    torch.testing.assert_close(loss, 0.7 * soft + 0.3 * hard)


def test_minilm_is_its_formula():
    teacher, student, batch = tiny.bert(0), tiny.bert(1, hidden_size=12, num_hidden_layers=2), tiny.batch()
    (stage,) = minilm(teacher.config, relation_heads=3).stages
    _, loss = loss_of(stage, student, teacher, batch)
    expected, rows = 0.0, 0
    names = ["q.-1", "k.-1", "v.-1"]
    s, t = collect(student, batch, names), collect(teacher, batch, names)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        rows += length * 3
        for name in names:
            maps = []
            for tap in (s[name], t[name]):
                x = tap[row].transpose(0, 1).flatten(1)[:length]  # [n, width], padding cropped
                x = x.view(length, 3, -1).transpose(0, 1)
                maps.append(log_softmax(x @ x.transpose(1, 2) / x.shape[-1] ** 0.5, -1))
            expected = expected + kl_div(maps[0], maps[1], reduction="sum", log_target=True)
    torch.testing.assert_close(loss, expected / rows)


def test_tinybert_is_its_formula():
    teacher, batch = tiny.bert(0, head=True), tiny.batch()
    recipe = tinybert(teacher.config, layers=2, hidden_size=16, intermediate_size=32)
    torch.manual_seed(3)
    student = recipe.student(teacher).eval()
    assert [stage.name for stage in recipe.stages] == ["general", "task", "predict"]
    module, loss = loss_of(recipe.stages[0], student, teacher, batch)
    hidden = [f"hidden.{i}" for i in range(5)]
    s = collect(student, batch, [*hidden[:3], "qk.0", "qk.1"])
    t = collect(teacher, batch, [*hidden, "qk.1", "qk.3"])
    real = batch["attention_mask"].bool()
    expected = 0.0
    for i in range(3):
        expected = expected + mse_loss(module.projections["fit"](s[f"hidden.{i}"])[real], t[f"hidden.{2 * i}"][real])
    pairs = (real[:, :, None] & real[:, None, :])[:, None].expand(-1, 4, -1, -1)
    for m, g in ((0, 1), (1, 3)):
        (q_s, k_s), (q_t, k_t) = s[f"qk.{m}"], t[f"qk.{g}"]
        scores = [q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 for q, k in ((q_s, k_s), (q_t, k_t))]
        expected = expected + mse_loss(scores[0][pairs], scores[1][pairs])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    _, loss = loss_of(recipe.stages[2], student, teacher, batch)
    by_hand = -(teacher(**batch).logits.softmax(-1) * log_softmax(student(**batch).logits, -1)).sum(-1).mean()
    torch.testing.assert_close(loss, by_hand)


def test_embedding_match_is_one_minus_cosine():
    teacher, student, batch = tiny.bert(0), tiny.bert(1), tiny.batch()
    stage = Stage("s", [Match("hidden_mse", "embedding", weight=12.0, options={"normalize": "l2"})])
    _, loss = loss_of(stage, student, teacher, batch)
    s, t = (mean_pool(m(**batch).last_hidden_state, batch["attention_mask"]) for m in (student, teacher))
    torch.testing.assert_close(loss, (1 - (s * t).sum(-1)).mean())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_parts_of_a_batch_sum_to_the_whole(name):
    """The loss of a batch is the sum over its unequal parts, each with the whole's totals: DDP and accumulation rely
    on it.
    """
    teacher = tiny.bert(0, head=True)
    options = {"tinybert": {"layers": 2, "hidden_size": 16, "intermediate_size": 32}, "minilm": {"relation_heads": 6}}
    recipe = RECIPES[name](teacher.config, **options.get(name, {}))
    student = recipe.student(teacher).eval()
    tokenizer, rows = tiny.tokenizer(), tiny.texts(7)
    batches = [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in (rows, rows[:2], rows[2:])]
    for batch, labels in zip(batches, ([0, 1, 2, 0, -100, 1, 2], [0, 1], [2, 0, -100, 1, 2]), strict=True):
        batch["labels"] = torch.tensor(labels)
    totals = count(batches[0])
    assert dict(zip(UNITS, totals.tolist(), strict=True))["labels"] == 6
    for stage in recipe.stages:
        module, whole = loss_of(stage, student, teacher, batches[0])
        parts = [module(totals=totals, **batch)["loss"] for batch in batches[1:]]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
        naive = sum(module(**batch)["loss"] for batch in batches[1:]) / 2
        assert abs(naive - whole) > 1e-4 * whole


def test_objectives_are_printed_in_full():
    text = tinybert(tiny.config(), layers=2).objective()
    for piece in (
        "3 stages",
        "stage 3 predict",
        "attention_mse([qk.0, qk.1], [qk.1, qk.3], on=scores)",
        "weight=fit",
        "kind=ce",
    ):
        assert piece in text


@pytest.mark.parametrize(
    ("match", "student", "teacher", "message"),
    [
        (Match("kd_loss", "logits"), {"num_labels": 3}, {"num_labels": 5}, r"vocabularies differ.*\[3, 3\].*\[3, 5\]"),
        (
            Match("attention_kl", "qk.-1"),
            {"num_attention_heads": 4},
            {"num_attention_heads": 6},
            r"heads differ.*\[3, 4, .*\[3, 6, ",
        ),
        (Match("hidden_mse", "hidden.1"), {"hidden_size": 16}, {}, r"widths differ.*, 16\].*, 24\]"),
    ],
)
def test_mismatches_name_both_shapes(match, student, teacher, message):
    student, teacher = tiny.bert(1, head=True, **student), tiny.bert(0, head=True, **teacher)
    with pytest.raises(DistillError, match=message):
        loss_of(Stage("s", [match]), student, teacher, tiny.batch())


def test_length_mismatch_names_both_shapes():
    match = Match("hidden_mse", "hidden.0")
    with pytest.raises(DistillError, match=r"lengths differ.*\[2, 5, 4\].*\[2, 6, 4\]"):
        match.loss({"hidden.0": torch.zeros(2, 5, 4)}, {"hidden.0": torch.zeros(2, 6, 4)}, tiny.batch(2), {}, 0)


def test_vocabularies_of_the_models_must_agree(tmp_path):
    stage = Stage("s", [Match("hidden_mse", "hidden.1")], source=Frozen(tiny.bert(vocab_size=70)))
    with pytest.raises(DistillError, match=r"student \[65\], teacher \[70\]"):
        DistillTrainer(tiny.bert(), stage, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


# --- schedules


def test_schedules():
    assert [Linear(1, 0, 10, begin=5)(step) for step in (0, 5, 10, 99)] == [1, 1, 0.5, 0]
    assert [round(Cosine(1, 0, 10)(step), 6) for step in (0, 5, 10)] == [1, 0.5, 0]
    assert [Piecewise((3, 6), (1, 0, 2))(step) for step in (0, 2, 3, 6)] == [1, 1, 0, 2]


def test_schedules_as_weight_option_and_gate():
    teacher, student, batch = tiny.bert(0, head=True), tiny.bert(1, head=True), tiny.batch()
    ramp = Match("kd_loss", "logits", weight=Linear(0, 2, 4), options={"temperature": Linear(1, 4, 3)})
    gated = Match("hidden_mse", "hidden.1", gate=Piecewise((2,), (0, 1)))
    module, _ = loss_of(Stage("s", [ramp, gated]), student, teacher, batch)
    early, late = (module(step=step, **batch)["parts"] for step in (1, 3))
    s, t = student(**batch).logits, teacher(**batch).logits
    by_hand = [w * T**2 * kl_div(log_softmax(s / T, -1), log_softmax(t / T, -1), reduction="batchmean", log_target=True)
               for w, T in ((0.5, 2.0), (1.5, 4.0))]  # fmt: skip
    torch.testing.assert_close(torch.stack([early[0], late[0]]), torch.stack(by_hand))
    assert early[1] == 0 and late[1] > 0


# --- sources


def test_mean_of_models():
    a, b, batch = tiny.bert(0, head=True), tiny.bert(1, head=True), tiny.batch()
    values = Mean([a, b]).taps(["logits", "qk.0"], batch, [], 0, 0)
    torch.testing.assert_close(values["logits"], (a(**batch).logits + b(**batch).logits) / 2)
    torch.testing.assert_close(
        values["qk.0"][1], (collect(a, batch, ["k.0"])["k.0"] + collect(b, batch, ["k.0"])["k.0"]) / 2
    )
    probs = Mean([a, b], of="probs").taps(["logits"], batch, [], 0, 0)["logits"].softmax(-1)
    torch.testing.assert_close(probs, (a(**batch).logits.softmax(-1) + b(**batch).logits.softmax(-1)) / 2)


def test_cached_teacher_gives_the_frozen_teachers_loss(tmp_path):
    teacher, tokenizer = tiny.bert(0, head=True), tiny.tokenizer()
    rows, pad = encode([{"text": text} for text in tiny.texts(10)], tokenizer, 24), collator(tiny.tokenizer())
    names = ["hidden.2", "qkv.-1", "logits", "embedding"]
    cached = Cached.write(tmp_path / "c.safetensors", Frozen(teacher), names, [pad(rows[:6]), pad(rows[6:])])
    batch = pad([rows[i] for i in (7, 2, 9)])
    expected, got = (source.taps(names, batch, [], 0, 0) for source in (Frozen(teacher), cached))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got["hidden.2"][real], expected["hidden.2"][real])
    for a, b in zip(got["qkv.-1"], expected["qkv.-1"], strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real])
    for name in ("logits", "embedding"):
        torch.testing.assert_close(got[name], expected[name])
    with pytest.raises(DistillError, match="holds .*not 'hidden.1'"):
        cached.taps(["hidden.1"], batch, [], 0, 0)
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    with pytest.raises(DistillError, match="corrupt"):
        Cached(tmp_path / "bad.safetensors")


def test_self_branch_teaches_from_the_students_own_detached_taps():
    student, batch = tiny.bert(1), tiny.batch()
    module = Distillation(student, Stage("s", [Match("hidden_mse", "hidden.2", "hidden.-1")], source=SelfBranch()))
    loss = module(**batch)["loss"]
    states = student(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(loss, mse_loss(states[2][real], states[4][real]))
    loss.backward()
    assert all(p.grad is None for p in student.encoder.layer[3].parameters())
    assert student.encoder.layer[1].output.dense.weight.grad is not None


def test_snapshot_is_the_student_of_the_last_cycle():
    student, batch = tiny.bert(1), tiny.batch()
    module = Distillation(student, Stage("s", [Match("hidden_mse", "hidden.-1")], source=Snapshot(cycle=3)))
    before = student(**batch).last_hidden_state.detach()
    assert module(step=0, **batch)["loss"] == 0
    with torch.no_grad():
        student.encoder.layer[3].output.dense.weight.mul_(1.5)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        module(step=2, **batch)["loss"], mse_loss(student(**batch).last_hidden_state[real], before[real])
    )
    assert module(step=3, **batch)["loss"] == 0
    assert any(name.startswith("companions.") for name in module.state_dict())


def test_peers_learn_from_the_mean_of_the_others():
    student, peers, batch = tiny.bert(0, head=True), [tiny.bert(1, head=True), tiny.bert(2, head=True)], tiny.batch()
    module = Distillation(student, Stage("s", [Match("kd_loss", "logits")], source=Peers(peers)))
    loss = module(**batch)["loss"]
    logits = [model(**batch).logits for model in (student, *peers)]
    by_hand = 0.0
    for i, own in enumerate(logits):
        others = torch.stack([x.detach() for j, x in enumerate(logits) if j != i]).mean(0)
        by_hand = by_hand + kl_div(
            log_softmax(own, -1), log_softmax(others, -1), reduction="batchmean", log_target=True
        )
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(model.classifier.weight.grad is not None for model in (student, *peers))


# --- surgery


def test_take_layers_is_pure_and_keeps_the_chosen_layers():
    model = tiny.bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take_layers(model, [3, 1])
    assert taken.config.num_hidden_layers == 2 and len(taken.encoder.layer) == 2
    for new, old in ((0, 3), (1, 1)):
        source = model.encoder.layer[old].state_dict()
        assert all(torch.equal(value, source[name]) for name, value in taken.encoder.layer[new].state_dict().items())
    taken.encoder.layer[0].output.dense.weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [take_layers(model, k).config.num_hidden_layers for k in (1, 2, 4)] == [1, 2, 4]
    half = take_layers(model, 2)  # evenly spaced, the last included
    assert torch.equal(half.encoder.layer[0].output.dense.weight, model.encoder.layer[1].output.dense.weight)
    for bad in (0, 5, [4], []):
        with pytest.raises(DistillError, match="layers"):
            take_layers(model, bad)


def test_fresh_and_set_dropout():
    model = tiny.bert(head=True, hidden_dropout_prob=0.5)
    small = fresh(model, hidden_size=8, num_hidden_layers=1)
    assert small.bert.embeddings.word_embeddings.weight.shape == (65, 8) and small.config.num_labels == 3
    with pytest.raises(DistillError, match="no setting 'hiden_size'"):
        fresh(model, hiden_size=8)
    with pytest.raises(DistillError, match="not a multiple"):
        fresh(model, hidden_size=10)
    quiet, batch = set_dropout(model, 0.0).train(), tiny.batch()
    assert torch.equal(quiet(**batch).logits, model(**batch).logits)
    assert quiet.config.hidden_dropout_prob == 0 and model.config.hidden_dropout_prob == 0.5


# --- trainer pieces


def test_optimizer_groups(tmp_path):
    stage = Stage(
        "s", [Match("hidden_mse", "hidden.1", projection="fit")], source=Frozen(tiny.bert()),
        groups=[Group(r"embeddings\.", freeze=True), Group(r"^projections\.", lr=0.5, weight_decay=0.25)],
    )  # fmt: skip
    trainer = DistillTrainer(
        tiny.bert(1), stage, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=0.1)
    )
    groups = trainer.create_optimizer().param_groups
    lrs = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    module = trainer.model
    assert lrs[id(module.projections["fit"].weight)] == (0.5, 0.25)
    assert lrs[id(module.student.encoder.layer[0].output.dense.weight)] == (0.1, 0.0)
    assert id(module.student.embeddings.word_embeddings.weight) not in lrs
    assert not module.student.embeddings.word_embeddings.weight.requires_grad


# --- data


def test_order_is_a_function_of_seed_and_global_batch():
    lengths = [len(text.split()) for text in tiny.texts(43)]
    plan = order(lengths, 8, 2, seed=1)
    assert plan == order(lengths, 8, 2, seed=1) != order(lengths, 8, 2, seed=2)
    assert len(plan) == 2 * 5 * 8
    for epoch in (plan[:40], plan[40:]):
        assert len(set(epoch)) == 40
    spread = [max(x) - min(x) for x in ([lengths[i] for i in plan[b : b + 8]] for b in range(0, 40, 8))]
    assert max(spread) < max(lengths) - min(lengths)
    assert order(lengths, 8, 0.5, seed=1) == plan[:16]
    with pytest.raises(DistillError, match="batch_size 44 is larger than the 43"):
        order(lengths, 44, 1, 0)


def test_read(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("1 one two\n\n0 three\n")
    assert read(str(path), "leading") == [{"text": "one two", "label": 1}, {"text": "three", "label": 0}]
    assert read(str(path))[0] == {"text": "1 one two"}
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "a", "text_pair": "b", "label": 2}\n')
    assert read(str(lines)) == [{"text": "a", "text_pair": "b", "label": 2}]
    path.write_text("1 one\ntwo\n")
    with pytest.raises(DistillError, match="line 2: 'two' is not an integer label"):
        read(str(path), "leading")
    lines.write_text('{"txt": "a"}\n')
    with pytest.raises(DistillError, match="line 1.*'text'"):
        read(str(lines))
