"""Healing: the cut model learns from the dense one, and keeps its form."""

import json
import shutil
import sys
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import heal_tools
import sleb
import zoo
from cli_tools import refused, run, tree
from conftest import byte_tokenizer, save_tiny
from heal_tools import CPU, SMALL, Stopping, cut_model, healed, scripted
from sleb import pipeline
from sleb.acceptance import Gate
from sleb.calibration.answers import (
    ANSWERS,
    Answers,
    AnswerSplit,
    answer_windows,
    prompt_hashes,
    prompts_of,
)
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.config import HealConfig
from sleb.core.errors import InputError, UnsupportedModel, VerificationFailed
from sleb.core.finding import finding
from sleb.core.plan import Plan
from sleb.core.progress import silent
from sleb.distillation import heal, training
from sleb.distillation.loss import Batch
from sleb.distillation.mix import TEXTS, Material, by_file, evenly, heal_windows, rows_of
from sleb.distillation.state import LOWER, LOWERED, Schedule, TrainingState
from sleb.distillation.student import Student, dithered
from sleb.evaluation.agreement import measure_answers
from sleb.evaluation.perplexity import evaluate
from sleb.repairs import answering
from sleb.repairs.answering import OWN_ANSWERS
from sleb.repairs.self_generated import write_prompts
from sleb.views.results import items
from sleb.views.terminal import markdown

home = heal_tools.home


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_healed_checkpoint_is_nearer_and_of_the_same_form(tmp_path, tied, dtype):
    home = cut_model(tmp_path, dtype, tie_word_embeddings=tied, shard="60KB")
    done = healed(home, tmp_path / "H")
    assert done.overall.healed_divergence.value < 0.6 * done.overall.cut_divergence.value
    assert set(done.texts) == {"mail", "code"}
    for text in done.texts.values():
        assert text.healed_divergence.value < text.cut_divergence.value

    before, after = Checkpoint.open(home / "OUT"), Checkpoint.open(tmp_path / "H")
    forms = [{n: (i.dtype, i.shape) for n, i in c.tensors.items()} for c in (before, after)]
    assert forms[0] == forms[1]
    assert len(before.metadata) == len(after.metadata)
    same = {n for n in after.tensors if after.digest(n) == before.digest(n)}
    ends = {"model.embed_tokens.weight", "model.norm.weight"}
    ends |= set() if tied else {"lm_head.weight"}
    assert same == ends, "all of the blocks was trained, and nothing else"

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "H")
    assert stock.dtype == dtype
    assert stock.config.num_hidden_layers == 4
    plans = [sleb.Plan.load(folder / "plan.json") for folder in (home / "OUT", tmp_path / "H")]
    assert plans[1].model_copy(update={"repair": None}) == plans[0]
    assert plans[1].repair.removed == done.removed
    assert len(plans[1].repair.tensors) == len(after.tensors) - len(ends)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "H" / name).read_bytes() == (home / "OUT" / name).read_bytes()
    config = [json.loads((p / "config.json").read_text()) for p in (home / "OUT", tmp_path / "H")]
    assert config[0] == config[1]


def test_what_was_done_is_recorded(home, tmp_path):
    done = healed(home, tmp_path / "H", tokens=8 * 32 * 150)
    found = json.loads((tmp_path / "H/heal.json").read_text())
    assert found["steps"] == done.steps == 150
    assert found["tokens"] == 8 * 32 * 150
    assert done.passes["texts"] > 1, "more tokens than text: it is gone through again"
    windows = found["calibration"]["texts"]["windows"]
    assert done.passes["texts"] == pytest.approx(1200 / windows, abs=1e-3)
    assert [step for step, _ in done.checks] == list(range(0, 151, 15))
    assert found["settings"]["lr"] == 3e-3
    for name, folder in (("cut", home / "OUT"), ("healed", tmp_path / "H")):
        digest = sleb.checkpoints.checkpoint.fingerprint(Checkpoint.open(folder), 4).weights_sha256
        assert found[f"{name}_sha256"] == digest
    assert not (tmp_path / "H.heal").exists()


def test_the_figures_are_those_of_eval(home, tmp_path):
    """Before and after, measured by the rest of the library too."""
    done = healed(home, tmp_path / "H")
    dense = sleb.load(home / "MODEL", **CPU)
    texts = [str(home / "mail.txt"), str(home / "code.txt")]
    config = HealConfig(text=texts, batch=8, heldout=8)
    _, held = heal_windows(dense.tokenizer, config, wanted=96, length=32)
    assert len(held.ids) == 8
    wanted = evaluate(dense, held, removed=done.removed)
    assert done.overall.perplexity.value == pytest.approx(wanted.perplexity.value, rel=1e-5)
    assert done.overall.cut_ratio.value == pytest.approx(wanted.perplexity_ratio.value, rel=1e-5)
    assert done.overall.cut_divergence.low == pytest.approx(wanted.divergence.low, rel=1e-4)
    own = evaluate(sleb.load(tmp_path / "H", **CPU), held)
    ratio = own.perplexity.value / wanted.perplexity.value
    assert done.overall.healed_ratio.value == pytest.approx(ratio, rel=1e-5)


def test_adapters_are_merged(home, tmp_path):
    done = healed(home, tmp_path / "H", lora=4, lr=1e-2)
    assert done.overall.healed_divergence.value < 0.8 * done.overall.cut_divergence.value
    assert done.trained_parameters == 4 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    before, after = Checkpoint.open(home / "OUT"), Checkpoint.open(tmp_path / "H")
    changed = {n for n in after.tensors if after.digest(n) != before.digest(n)}
    assert changed == {n for n in before.tensors if n.endswith("_proj.weight")}


def test_a_run_that_gets_worse_goes_back_to_its_best_weights_with_a_lower_rate(
    home, tmp_path, monkeypatch
):
    rates, steps = [], training.Training._step

    def noted(self, mix, step, rate, stopped, tick):
        rates.append(rate)
        return steps(self, mix, step, rate, stopped, tick)

    monkeypatch.setattr(training.Training, "_step", noted)
    # the start; worse than that; the best; worse twice; and on from the best
    seen = scripted(
        monkeypatch, [0.1, 0.2, 0.05, 0.06, 0.07, 0.055, 0.04, 0.05, 0.041, 0.05, 0.045]
    )
    done = healed(home, tmp_path / "H", tokens=10 * 256)
    assert (done.steps, done.best_step, done.stopped) == (10, 6, "steps")
    assert done.lr == pytest.approx(3e-3 / 81), "lowered at checks 1, 4, 8 and 10"
    shares = [Schedule(steps=10).share(step, 0) for step in range(10)]
    lowered = [0, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    wanted = [3e-3 * share / 3**n for share, n in zip(shares, lowered, strict=True)]
    assert rates == pytest.approx(wanted)
    found = load_file(tmp_path / "H/model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, seen[5][name]), name
    # where a run has gone back, it starts as any that has seen nothing
    first = {n: seen[4][n] - seen[1][n] for n in found if ".layers." in n}
    step = max(float(d.abs().max()) for d in first.values())
    assert step == pytest.approx(rates[4], rel=0.01), "a first step of AdamW is of the rate"


def test_no_kind_of_window_gets_worse_than_it_was(home, tmp_path, monkeypatch):
    scripted(monkeypatch, [(0.1, 0.1), (0.01, 0.11), (0.09, 0.1)] + [(0.01, 0.2)] * 10)
    done = healed(home, tmp_path / "H", tokens=10 * 256)
    assert done.best_step == 2


def test_a_run_that_makes_nothing_better_writes_nothing(home, tmp_path, monkeypatch):
    scripted(monkeypatch, [1.0] + [9.0] * 10)
    with pytest.raises(VerificationFailed, match=r"H was not written, and .*OUT stays"):
        healed(home, tmp_path / "H")
    assert tree(tmp_path) == {}


def test_no_rate_is_too_high_and_none_has_to_be_given(home, tmp_path):
    """A rate a thousand times too high is lowered until it helps; one that makes NaN is, too."""
    high = healed(home, tmp_path / "H", lr=1.0, tokens=30 * 256)
    assert high.overall.healed_divergence.value < 0.9 * high.overall.cut_divergence.value
    assert high.lr < 0.1
    none = healed(home, tmp_path / "N", lr=None)
    assert none.overall.healed_divergence.value < 0.7 * none.overall.cut_divergence.value
    assert [rate for rate, _ in none.rates][:3] == [0, *training.RATES[:2]]
    assert none.lr == min(none.rates, key=lambda pair: pair[1])[0]

    # the test leaves no trace: the same run with the rate that it found
    given = healed(home, tmp_path / "G", lr=none.lr)
    assert given.checks == none.checks
    wild = Schedule(steps=9).over(TrainingState(step=3, lowered=LOWERED + 1))
    assert wild == "no-gain"


def test_no_kernel_is_planned_for_each_length_while_it_trains(home, tmp_path, monkeypatch):
    seen, run = [], training.Training.run

    def noted(self, *args):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return run(self, *args)

    monkeypatch.setattr(training.Training, "run", noted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    healed(home, tmp_path / "out", tokens=4 * 256)
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("amount", [{"tokens": 24 * 8 * 32}, {"tokens": None, "minutes": 0.2}])
def test_short_runs_go_on_from_the_range_test_to_the_highest_rate_that_trains(
    home, tmp_path, monkeypatch, amount
):
    """Where a run has steps for them, the rate is the highest of those short runs that gain about
    as much as the best; and what these trained is undone."""
    monkeypatch.setattr(training, "FIRST", 6)  # two thirds of the run, so that it may be small
    begun, steps = [], training.Training._steps

    def noted(self, *args):
        weights = self.student.trained
        begun.append(all(torch.equal(weights[name], self.best[name]) for name in weights))
        begun.append(self.where.lr)
        return steps(self, *args)

    monkeypatch.setattr(training.Training, "_steps", noted)
    done = healed(home, tmp_path / "out", lr=None, **amount)
    found = dict(done.trials)
    assert begun[0]
    assert 2 <= len(found) <= training.TRIALS
    best, start = min(found.values()), done.rates[0][1]
    assert next(iter(found)) == pytest.approx(LOWER * min(done.rates[1:], key=itemgetter(1))[0])
    gaining = [r for r, one in found.items() if start - one >= training.GAINING * (start - best)]
    assert begun[1:] == [max(gaining)]


def test_steps_too_small_for_bfloat16_still_move_the_weights():
    """The mean of many weights moves as far as they do in float32, up and down; a weight that is
    already a bfloat16 stays, and no other is more than one number away."""
    drawn = torch.Generator().manual_seed(0)
    stored = (0.02 * torch.randn(512, 384, generator=drawn)).bfloat16()
    weights = stored.float()
    assert torch.equal(dithered(weights, torch.bfloat16), stored)
    for step in (1e-6, -1e-6, 1e-5, -1e-5):
        wanted = weights + step
        found = dithered(wanted, torch.bfloat16).float()
        assert (found - weights).mean().item() == pytest.approx(step, rel=0.05)
        assert abs((wanted.bfloat16().float() - weights).mean().item()) < 0.3 * abs(step)
        spacing = 2.0 ** (wanted.abs().log2().floor() - 7)
        assert bool(((found - wanted).abs() < spacing).all())
    assert dithered(weights, torch.float32) is weights
    assert dithered(weights.double() + 1e-9, torch.bfloat16).dtype == torch.bfloat16


def test_answers_are_learned_beside_texts_and_never_those_that_measure(home, tmp_path):
    starts = ["the block", "and nothing", "of a model", "its input", "def f", "return x", "lost"]
    rows = [json.dumps({"prompt": f"{start} {i}"}) for i in range(5) for start in starts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    asked = {"prompts": [str(tmp_path / "prompts.jsonl")], "new_tokens": 9}
    done = healed(home, tmp_path / "H", **asked, tokens=20 * 256)
    assert [*done.texts] == ["mail", "code", ANSWERS]
    for text in done.texts.values():
        assert text.healed_divergence.value < text.cut_divergence.value
    assert all(len(found) == 2 for _, found in done.checks)

    config = HealConfig(**SMALL, **asked, text=[str(home / "mail.txt")])
    dense = sleb.load(home / "MODEL", **CPU)
    found = Material.of(dense, config, 3072, 32, silent)
    measured = set(map(tuple, found.measured.windows.ids.tolist()))
    assert len(measured) == 35 // 3
    parts = [found.train[ANSWERS], found.validation[ANSWERS]]
    others = [set(map(tuple, part.ids.tolist())) for part in parts]
    assert not measured & others[0]
    assert not measured & others[1]
    assert not others[0] & others[1]
    assert len(measured | others[0] | others[1]) == 35

    # a step is half texts and half answers, and only what is answered counts
    mix = found.mix(config, 3072, 32)
    passes = [*mix.step(3, 4 * 32)]
    batches = [
        Batch.of(mix.windows, rows, torch.device("cpu"), weights) for rows, weights in passes
    ]
    for kind in (TEXTS, ANSWERS):
        rows = {*mix.windows.but(ANSWERS)} if kind == TEXTS else {*mix.windows.of(ANSWERS)}
        taken = [i for picked, _ in passes for i in picked if i in rows]
        assert sum(mix.lengths[i] for i in taken) == pytest.approx(128, rel=0.3)
        counted = sum(
            float(weight)
            for batch in batches
            for owner, weight in zip(batch.owner.tolist(), batch.weights, strict=True)
            if owner in rows
        )
        assert counted == pytest.approx(1 / 2), "the mean of the kinds' means"
    assert max(len(rows) * max(mix.lengths[i] for i in rows) for rows, _ in passes) <= 4 * 32


def test_of_answers_as_many_are_learned_to_the_prompts_of_each_file(home, tmp_path):
    for name, n in (("few", 6), ("some", 30), ("many", 90)):
        rows = [json.dumps({"id": f"{i}", "prompt": f"{name} {i} of it"}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("many", "few", "some")]
    text = [str(home / "mail.txt")]
    config = HealConfig(**SMALL, prompts=files, new_tokens=9, max_prompts=126, text=text)
    dense = sleb.load(home / "MODEL", **CPU)
    found = Material.of(dense, config, 3072, 32, silent)
    many, few, some = (f"{ANSWERS}: {Path(file).name}" for file in files)
    assert found.train.keys() == {TEXTS, many, few, some}
    assert [*found.validation] == [TEXTS, ANSWERS]
    for kind, name in {many: "many", few: "few", some: "some"}.items():
        asked = dense.tokenizer.batch_decode(found.train[kind].ids)
        assert all(text.startswith(name) for text in asked)
    mix = found.mix(config, 3072, 32)
    tokens = {kind: w.tokens for kind, w in found.train.items()}
    shares = mix.shares
    assert shares[TEXTS] == pytest.approx(1 / 2)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[few] * 3072 == pytest.approx(4 * tokens[few]), "no more than four times"
    assert shares[some] == pytest.approx(shares[many])
    more = evenly({"a": 10, "b": 30}, 1000)
    assert more == {"a": 250, "b": 750}, "where all are gone through more often: by what there is"


CHAT = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"  # noqa: E501


def test_where_it_writes_fast_a_model_of_chats_asks_itself(home, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "QUICK", ("cpu",))
    monkeypatch.setattr(answering, "OWN_PROMPTS", 120)
    dense = sleb.load(home / "MODEL", **CPU)
    dense.tokenizer.chat_template = CHAT
    texts = write_prompts(dense, 120, 3, silent)
    assert texts == write_prompts(dense, 120, 3, silent) != write_prompts(dense, 120, 4, silent)
    assert 40 < len(texts) == len(set(texts)) < 120, "that which does not end is no prompt"
    assert not any("<s>" in text or "</s>" in text or text != text.strip() for text in texts)

    (tmp_path / "prompts.jsonl").write_text("\n".join(f'"ask {i}"' for i in range(20)))
    config = HealConfig(
        **SMALL,
        text=[str(home / "mail.txt")],
        prompts=[str(tmp_path / "prompts.jsonl")],
        new_tokens=9,
    )
    found = Material.of(dense, config, 3072, 32, silent)
    assert [*found.train] == [*found.validation] == [TEXTS, ANSWERS, OWN_ANSWERS]
    parts = (found.train[OWN_ANSWERS], found.validation[OWN_ANSWERS])
    train, held = (set(map(tuple, windows.ids.tolist())) for windows in parts)
    assert len(held) == 32
    assert not train & held
    given = found.train[ANSWERS]
    n = [*given.source].count(0)
    assert len(given.ids) == (1 + answering.SAMPLED) * n, "each prompt has so many answers more"
    rows = [tuple(row[row != 0].tolist()) for row in given.ids]
    assert len({*rows}) > 3 * n, "which differ"
    starts = given.scored.int().argmax(1).tolist()
    prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
    assert {*prompts[:n]} == {*prompts[n:]}, "and none is to a prompt that judges"
    asked = dense.tokenizer.batch_decode([[t for t in row if t] for row in train | held])
    assert {text[3:].partition("</s>")[0] for text in asked} <= {
        *write_prompts(dense, 120, 0, silent)
    }
    monkeypatch.setattr(answering, "OWN_PROMPTS", 1)  # too few to learn from and to validate on
    assert [*Material.of(dense, config, 3072, 32, silent).train] == [TEXTS, ANSWERS]
    few, many = (found.mix(config, tokens, 32) for tokens in (300, 10**6))
    assert few.rows.keys() == many.rows.keys() == found.train.keys()
    assert [*few.shares.values()] == pytest.approx([1 / 3] * 3)
    passes = many.shares[OWN_ANSWERS] * 10**6 / found.train[OWN_ANSWERS].tokens
    assert passes == pytest.approx(4)
    assert many.shares[TEXTS] == many.shares[ANSWERS]
    assert sum(many.shares.values()) == pytest.approx(1)


def test_answers_are_kinds_by_the_file_of_their_prompt(tmp_path):
    """Also where files have rows in common."""
    rows = {"a.txt": range(12), "b.txt": [*range(6), *range(12, 24)]}
    for name, asked in rows.items():
        (tmp_path / name).write_text("\n".join(f"ask {i}" for i in asked))
    prompts = prompts_of([str(tmp_path / name) for name in rows])
    said = [[5]] * 12 + [[7]] * 18
    windows = answer_windows([[3]] * 30, said, specs=[*rows], seed=0)
    split = AnswerSplit.of(
        Answers(prompts=prompts, windows=windows, new_tokens=1, source="a, b"), seed=0
    )
    found = by_file(split)
    answered = {kind: {*windows.ids[:, 1].tolist()} for kind, windows in found.items()}
    assert answered == {f"{ANSWERS}: a.txt": {5}, f"{ANSWERS}: b.txt": {7}}
    assert sum(len(windows.ids) for windows in found.values()) == len(split.files)


@pytest.mark.parametrize("repaired", [True, False])
def test_a_healed_folder_is_measured_verified_and_read_as_any_other(
    learned, tmp_path, monkeypatch, repaired
):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    starts = ["the block", "and nothing", "of a model", "its input", "for ever", "lost", "a"]
    rows = [
        {"prompt": f"{start} {i}", "regex": "block|nothing"} for i in range(5) for start in starts
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"prompts": [str(tmp_path / "prompts.jsonl")], "new_tokens": 9}
    text = [str(learned / "text.txt")]
    model, cut, out = learned / "model", tmp_path / "CUT", tmp_path / "H"
    shared = {**CPU, **asked, "text": text}
    before = sleb.prune(
        model, cut, remove=2, windows=4, length=16, repair=repaired, **shared
    ).record
    done = sleb.heal(cut, model, out, **shared, tokens=4000, length=32)

    record = sleb.RunRecord.load(out)
    assert record == done.record
    assert record.healed.checks[0][1] > record.healed.checks[-1][1]
    kept = record.prompts
    assert kept.prompts == 35 // 3 == before.prompts.prompts, "the prompts that prune measured on"
    assert kept.unhealed == before.prompts.agreement
    assert kept.divergence.value < before.prompts.divergence.value
    assert kept.right.judged == 35 // 3
    assert record.evaluation.loss_increase.value < record.evaluation.unrepaired.loss_increase.value
    assert all(check.passed for check in record.verification.checks)
    assert {"CUT", str(out)} & {record.verification.checkpoint}
    assert sleb.verify(out, model=model).passed

    # the prompts that it learned from measure nothing later, also where the cut was made without
    seen = Plan.load(out / "plan.json").seen
    plan = Plan.load(cut / "plan.json").model_copy(update={"prompts_seen": ""})
    plan.save(cut / "plan.json")
    sleb.heal(cut, model, tmp_path / "I", **shared, tokens=400, length=32, lr=1e-3)
    assert len(seen) == 35 - 35 // 3
    assert Plan.load(tmp_path / "I" / "plan.json").seen == seen

    # what eval finds with the plan is what the checkpoint does
    windows, _ = sleb.load_windows(
        sleb.load(model, **CPU).tokenizer, text, windows=4, length=24, seed=3
    )
    bypassed = sleb.evaluate(
        model, plan=out / "plan.json", text=text, windows=4, length=24, seed=3, **CPU
    )
    alone = evaluate(sleb.load(out, **CPU), windows)
    assert bypassed.pruned_loss.value == pytest.approx(alone.loss.value, rel=1e-5)
    assert "heal.json" in (out / "README.md").read_text()
    page = sleb.report(out, tmp_path / "page.html").read_text()
    assert "parameters trained" in page
    gate = Gate.parse({"answers": {"min_agreement": 0.0}}, "gate")
    assert gate.check(record).passed

    # cutting again by its plan gives it again
    again = sleb.apply(out / "plan.json", model, tmp_path / "again")
    digests = [{n: c.digest(n) for n in c.tensors} for c in map(Checkpoint.open, (out, again))]
    assert digests[0] == digests[1]


def test_where_no_prompt_is_left_unseen_it_is_said(learned, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.jsonl").write_text("\n".join(f'"ask {i}"' for i in range(12)))
    model, cut, out = learned / "model", tmp_path / "CUT", tmp_path / "H"
    asked = {"prompts": [str(tmp_path / "prompts.jsonl")], "new_tokens": 9}
    shared = {**CPU, **asked, "text": [str(learned / "text.txt")]}
    measured: list[str] = []

    def noted(dense, answers, *more):
        measured.extend(prompt_hashes(answers.windows))
        return measure_answers(dense, answers, *more)

    monkeypatch.setattr("sleb.pipeline.measure_answers", noted)
    small = {"remove": 2, "windows": 4, "length": 16, "repair": False}
    before = sleb.prune(model, cut, **small, **shared).record
    Plan.load(cut / "plan.json").seeing(measured).save(cut / "plan.json")
    found = sleb.heal(cut, model, out, **shared, tokens=400, length=32, lr=1e-3).record

    assert found.prompts is None
    assert found.unasked == finding("all-seen", prompts=12 // 3)
    told = "by all 4 prompts that were set aside"
    assert told in "\n".join(markdown(items(found)))
    assert told in sleb.report(out, tmp_path / "page.html").read_text()
    assert told in (out / "README.md").read_text()
    later = replace(found, prompts=before.prompts)  # as by sleb eval --record
    assert told not in "\n".join(markdown(items(later)))


WHOLE = HealConfig()


def test_a_cut_that_is_healed_is_chosen_by_answers(learned, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.jsonl").write_text("\n".join(f'"ask {i}"' for i in range(14)))
    asked = {"prompts": [str(tmp_path / "prompts.jsonl")], "new_tokens": 4, "repair": False}
    given = {**CPU, **asked, "text": [str(learned / "text.txt")], "windows": 4, "length": 16}

    def metric(name, to_heal=WHOLE, **more):
        target = {} if "max_loss_increase" in more else {"remove": 1}
        options = {**given, **target, **more}
        plan = pipeline.prune(learned / "model", tmp_path / name, to_heal=to_heal, **options).plan
        return plan.metric

    assert metric("A") == "answers"
    assert metric("B", to_heal=None) == "loss"
    assert metric("C", metric="kl") == "kl"
    assert metric("D", prompts=["none"]) == "loss"
    assert metric("E", max_loss_increase=9.0, heldout=2) == "loss"

    foretold = []

    def noted(model, speed, split, goal, config, *more):
        foretold.append(config.metric)
        return estimate(model, speed, split, goal, config, *more)

    estimate = pipeline.estimates.estimate
    monkeypatch.setattr(pipeline.estimates, "estimate", noted)
    for heal_config in (HealConfig(), None):
        pipeline.estimate(learned / "model", tmp_path / "G", heal=heal_config, remove=1, **given)
    assert foretold == ["answers", None]

    class Stop(Exception):
        pass

    def stopped(*_, **__):
        raise Stop

    monkeypatch.setattr(pipeline.distill, "heal", stopped)
    with pytest.raises(Stop):
        sleb.prune(learned / "model", tmp_path / "F", heal=True, remove=1, **given)
    assert Plan.load(tmp_path / "F-cut/plan.json").metric == "answers"


def test_one_command_cuts_and_heals_and_goes_on_where_it_was_stopped(
    learned, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text((learned / "text.txt").read_text())
    (tmp_path / "sleb.toml").write_text(
        f"""model = "{learned / "model"}"
out = "OUT"
device = "cpu"
[text]
own = "text.txt"
[search]
remove = 1
windows = 4
length = 16
heldout = 4
[heal]
tokens = 4000
length = 32
[measure]
bench = false
[gate.perplexity]
max_ratio = 2.0
"""
    )
    toml = tmp_path / "sleb.toml"
    with pytest.raises(KeyboardInterrupt):
        sleb.run(toml, progress=Stopping(3))
    there = {"OUT-cut", "OUT.heal"}
    assert there <= {path.name for path in tmp_path.iterdir()}
    cut = (tmp_path / "OUT-cut/run.json").read_bytes()
    record = sleb.run(toml)
    assert (tmp_path / "OUT-cut/run.json").read_bytes() == cut, "it is not made again"
    assert record == sleb.RunRecord.load(tmp_path / "OUT")
    assert record.healed.cut == str(tmp_path / "OUT-cut")
    assert record.gate.passed
    assert (tmp_path / "OUT/report.en.html").is_file()
    assert not (tmp_path / "OUT.heal").exists()
    assert sleb.run(toml) == record, "all is done"

    with pytest.raises(InputError, match="one device"):
        sleb.prune(learned / "model", tmp_path / "N", heal=True, remove=1, stream=True)
    toml.write_text(toml.read_text().replace("tokens = 4000", 'text = "x"'))
    with pytest.raises(InputError, match=r"\[heal\] text"):
        sleb.run(toml)


def test_time_is_kept_and_the_rate_falls_to_zero_with_it(home, tmp_path):
    for name, tokens in {"H": 10**9, "N": None}.items():  # without tokens, time alone ends it
        told = Stopping()
        done = healed(home, tmp_path / name, tokens=tokens, minutes=0.03, progress=told)
        assert done.stopped == "time"
        assert 1.8 <= done.seconds < 10
        assert done.overall.healed_divergence.value < done.overall.cut_divergence.value
        assert told.passes > 1
        assert (told.total <= 2) == (tokens is None), "seconds left, or tokens"

    plain = Schedule(steps=100)
    rates = [plain.share(step, 0.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(1, abs=0.01)
    assert max(rates) == rates[4]
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    timed = Schedule(steps=100, seconds=10)
    assert timed.share(5, 5.0) == pytest.approx(0.5)
    assert timed.share(5, 12.0) == 0
    assert timed.over(TrainingState(step=5, seconds=10)) == "time"
    alone = Schedule(seconds=10)
    assert 0 < alone.share(10**6, 0.1) < 0.25
    assert alone.share(0, 5.0) == pytest.approx(0.5)
    assert alone.over(TrainingState(step=10**9, seconds=9)) is None
    assert plain.over(TrainingState(step=99)) is None
    assert plain.over(TrainingState(step=100)) == "steps"


def test_where_time_is_short_the_search_for_a_rate_leaves_half_of_it(home, tmp_path, monkeypatch):
    """By a clock that goes on by a second with each step."""
    now, step = [0.0], training.Training._step

    def slow(self, *args):
        now[0] += 1
        return step(self, *args)

    monkeypatch.setattr(training.Training, "_step", slow)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def within(seconds):
        out = tmp_path / str(seconds)
        return healed(home, out, lr=None, tokens=None, length=32, minutes=seconds / 60)

    done = within(10)
    assert [rate for rate, _ in done.rates[1:4]] == [1e-6, 1e-5, 1e-4], "spread over all"
    assert done.steps >= 5
    assert (done.stopped, done.seconds, done.trials) == ("time", 10, ())
    assert done.overall.healed_divergence.value < done.overall.cut_divergence.value
    assert (one := within(2)).steps == 1
    assert one.lr == 3e-6, "the lowest rate helped, so the next may"
    with pytest.raises(InputError, match=r"minutes 0\.01 .*OUT stays: give about 0\.1 or more"):
        within(0.6)
    assert {path.name for path in tmp_path.iterdir()} == {"10", "2"}
    assert within(6).steps >= 3


def test_a_long_search_for_a_rate_leaves_out_none():
    assert training._stride(8, 8.9) == 1
    assert training._stride(8, 3) == 3
    assert training._stride(8, 1) == 4, "not from the lowest to the highest"
    assert training._stride(8, 0.5) == 4


def test_every_window_is_taken_once_before_any_is_taken_again():
    steps = [rows_of(step, 4, 10, seed=1) for step in range(5)]
    taken = [row for rows in steps for row in rows]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert taken != [row for step in range(5) for row in rows_of(step, 4, 10, seed=2)]


def test_windows_that_judge_are_of_every_text_and_never_trained_on(tmp_path):
    from text_tools import letters, tokenizer

    (tmp_path / "long.txt").write_text(letters(3000))
    (tmp_path / "short.txt").write_text(letters(100, start=9000))
    specs = (str(tmp_path / "long.txt"), str(tmp_path / "short.txt"))

    def windows(wanted, text=specs, length=10):
        config = HealConfig(text=text, batch=4, heldout=20)
        return heal_windows(tokenizer(), config, wanted=wanted, length=length)

    trained, held = windows(10_000)
    assert [held.source.count(i) for i in (0, 1)] == [10, 2]
    rows = [set(map(tuple, w.ids.tolist())) for w in (trained, held)]
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 310, "nothing is left out"
    few, same = windows(40)
    assert 30 <= len(few.ids) <= 40
    assert set(few.source) == {0, 1}
    assert not set(map(tuple, few.ids.tolist())) & set(map(tuple, same.ids.tolist()))
    with pytest.raises(InputError, match="left to train on"):
        windows(40, specs[:1], 2500)


def test_mistakes_are_refused_before_anything_is_written(home, tmp_path, monkeypatch):
    other = save_tiny(tmp_path / "other", seed=1)
    bare, done, deep = (
        Path(shutil.copytree(home / "OUT", tmp_path / name)) for name in ("bare", "done", "deep")
    )
    (bare / "plan.json").unlink()
    (tmp_path / "short.txt").write_text("too short to heal on " * 9)
    (done / "heal.json").write_text("{}")
    plan = json.loads((deep / "plan.json").read_text())
    plan["removed"] = plan["order"] = plan["order"][:1]
    (deep / "plan.json").write_text(json.dumps(plan))
    before = tree(tmp_path)
    text = {"text": [str(home / "mail.txt")]}
    out, model, cut = tmp_path / "H", home / "MODEL", home / "OUT"
    for arguments, options, message in [
        ((cut, other, out), {}, "another model: weights_sha256"),
        ((tmp_path / "none", model, out), {}, "no checkpoint folder"),
        ((bare, model, out), {}, "no plan.json"),
        ((done, model, out), {}, "healed already"),
        ((deep, model, out), {}, "4 blocks"),
        ((cut, model, bare), {}, "exists"),
        ((cut, model, cut), {"force": True}, "itself"),
        ((cut, model, out), {"text": [str(tmp_path / "short.txt")], "length": 150}, "to train on"),
        ((cut, model, out), {"text": ["gone.txt"]}, "gone.txt"),
        ((cut, model, out), {"lr": 0.0}, "--lr"),
        ((cut, model, out), {"at_once": 0}, "--at-once"),
        ((cut, model, out), {"heldout": 0}, "--heldout"),
        ((cut, model, out), {"lora": 0}, "--lora"),
        ((cut, model, out), {"minutes": -1}, "--minutes"),
        ((cut, model, out), {"length": 300}, "300 tokens .* 256"),
    ]:
        with pytest.raises(InputError, match=message):
            heal(*arguments, **{**SMALL, **text, **options})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="peft"):
        healed(home, out, lora=2)
    assert tree(tmp_path) == before


STRUCTURES = ["mixtral", "qwen3_moe", "gemma2", "gpt2", "gpt_neox", "granitemoe", "olmo2"]
STRUCTURES += ["stablelm", "falcon", "phi3"]


@pytest.mark.parametrize(
    "family",
    [f if f in STRUCTURES[:2] else pytest.param(f, marks=pytest.mark.slow) for f in STRUCTURES],
)
def test_all_structures_heal_to_a_checkpoint_of_their_own_form(home, tmp_path, family):
    """Experts that transformers stacks are stored one by one again."""
    model, _ = zoo.tiny(family, vocab_size=259)
    model.save_pretrained(tmp_path / "MODEL")
    byte_tokenizer().save_pretrained(tmp_path / "MODEL")
    plan = sleb.search(tmp_path / "MODEL", remove=1, windows=4, length=16, **CPU)
    sleb.apply(plan, tmp_path / "MODEL", tmp_path / "OUT")
    texts = [str(home / "mail.txt"), str(home / "code.txt")]
    folders = (tmp_path / name for name in ("OUT", "MODEL", "H"))
    done = heal(*folders, text=texts, **{**SMALL, "lr": None})
    assert done.overall.healed_divergence.value < done.overall.cut_divergence.value
    assert sleb.verify(tmp_path / "H", model=tmp_path / "MODEL").passed
    old, new = (Checkpoint.open(tmp_path / name).tensors for name in ("OUT", "H"))
    assert old.keys() == new.keys()


def test_weights_that_are_not_stored_as_such_are_refused(home):
    model = AutoModelForCausalLM.from_pretrained(home / "OUT")
    checkpoint = Checkpoint.open(home / "OUT")
    name = "model.layers.1.mlp.up_proj.weight"
    info = checkpoint.tensors[name]
    checkpoint.tensors[name] = type(info)(**{**vars(info), "dtype": "F8_E4M3"})
    with pytest.raises(UnsupportedModel, match=f"{name} .*F8_E4M3"):
        Student(model, checkpoint, rank=None, seed=0)
    del checkpoint.tensors[name]
    with pytest.raises(UnsupportedModel, match=f"{name} has another name"):
        Student(model, checkpoint, rank=None, seed=0)


def test_the_verb_shows_dense_cut_and_healed_apart(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    command = ["heal", "OUT", "--model", "MODEL", "--text", "mail.txt", "--text", "code.txt"]
    command += ["--tokens", "3072", "--length", "32", "--lr", "3e-3", "--heldout", "8"]
    command += ["--device", "cpu", "--dtype", "float32", "-o", tmp_path / "H"]
    ran = run(capsys, *command)
    assert ran.code == 0, ran.err
    rows = {line.split()[0]: line for line in ran.out.splitlines() if line.count(" to ") == 3}
    assert rows.keys() >= {"mail", "code"}, "two ratios with intervals, and the divergence"
    assert f"checkpoint written to {tmp_path / 'H'}" in ran.out

    assert "exists" in refused(capsys, 2, *command)
    found = run(capsys, *command, "--force", "--json").json
    assert found["healed"]["overall"]["healed_divergence"]["value"] < 1
    assert found["healed"]["heldout"]["texts"]["windows"] == 8
    assert run(capsys, "verify", tmp_path / "H", "--model", "MODEL").code == 0

    monkeypatch.setattr("sleb.core.showing.terminal_progress", lambda **how: Stopping(3))
    message = refused(capsys, 130, *command[:-1], tmp_path / "N")
    assert f"{tmp_path / 'N.heal'}: repeat" in message
