"""Attention or MLP of a block alone: what is skipped, scored, searched and written into a plan."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import sleb
import zoo
from conftest import tiny_llama
from plan_tools import minimal, plan_of
from reference import blocks_of
from search_tools import split_of
from sleb.calibration.prompts import Prompt
from sleb.checkpoints.cut import Cut
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import Plan, Saving
from sleb.core.units import Unit, block_of, canonical, overlap, parse_unit, part_of, parts_in, whole
from sleb.models.stack import BlockStack
from sleb.record import RunRecord
from sleb.repairs import stored_repair
from sleb.repairs.regression import Gap, Regression, gaps
from sleb.selection import savings
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.request import Goal, candidates_for
from sleb.selection.sweep import Sweep, block_forwards

ATTENTION = {b: Unit.of(b, "attention") for b in range(8)}
MLP = {b: Unit.of(b, "mlp") for b in range(8)}
STRUCTURES = ("llama", "qwen2", "gpt2", "gpt_neox", "cohere", "mixtral", "gemma2", "granite")
"""Pre-norm, biases, fused and learned positions, parallel, one norm for both, experts, norms
behind, scaled residuals."""
SETS = [
    *map(BlockSet, ([ATTENTION[2]], [MLP[2]], [2])),
    *map(BlockSet, ([ATTENTION[2], MLP[4]], [ATTENTION[2], 4, ATTENTION[6]])),
]


def zeroed(model: nn.Module, units, names: dict[str, str]) -> nn.Module:
    """The model with hooks that make these parts return zeros: the plain meaning of a removal."""
    handles = []
    for unit in units:
        block = blocks_of(model)[block_of(unit)]
        kinds = [part_of(unit)] if part_of(unit) else ["attention", "mlp"]
        for kind in kinds:
            child = block.get_submodule(names[kind])
            handles.append(
                child.register_forward_hook(
                    lambda _, args, out: (
                        out * 0 if isinstance(out, torch.Tensor) else (out[0] * 0, *out[1:])
                    )
                )
            )
    return handles


@pytest.mark.parametrize("family", STRUCTURES)
def test_a_part_that_is_left_out_adds_nothing(family):
    model, _ = zoo.tiny(family)
    stack, ids = BlockStack(model), zoo.probe()
    names = {kind: part.name for kind, part in stack.parts(2).items()}
    before = model(input_ids=ids, use_cache=False).logits
    for units in SETS:
        handles = zeroed(model, units, names)
        wanted = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        with stack.bypassed(units):
            found = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, wanted)
        assert not torch.equal(found, before)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize("family", STRUCTURES)
def test_both_parts_of_a_block_are_the_block(family):
    model, _ = zoo.tiny(family)
    stack, ids = BlockStack(model), zoo.probe()
    with stack.bypassed([3]):
        wanted = model(input_ids=ids, use_cache=False).logits
    for part, name in ((ATTENTION[3], "attention"), (MLP[3], "mlp")):
        other = {"attention": MLP, "mlp": ATTENTION}[name][3]
        with stack.bypassed([part]), stack.bypassed([other]):  # apart, so that neither knows
            found = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", STRUCTURES)
def test_a_sweep_scores_parts_as_separate_passes_do(family):
    model, _ = zoo.tiny(family)
    stack = BlockStack(model)
    ids = torch.cat([zoo.probe(20), zoo.probe(20).flip(1)])
    sets = [*SETS, DENSE, BlockSet([MLP[2], ATTENTION[2]])]
    found = Sweep(stack, ids, NLL, batch=2).values(sets, 0, 2)
    for blocks, row in zip(sets, found, strict=True):
        with stack.bypassed(blocks), torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        np.testing.assert_allclose(row, loss.mean(1).numpy(), rtol=0, atol=2e-5)


def test_a_prefix_is_run_once_for_each_thing_that_is_left_of_a_block():
    model, _ = zoo.tiny("llama")
    sets = [BlockSet([unit]) for unit in (3, ATTENTION[3], MLP[3])] + [DENSE]
    sweep = Sweep(BlockStack(model), zoo.probe(), NLL)
    sweep.values(sets, 0, 1)
    # blocks 0 to 2 once; block 3 without either part, and whole; then four streams
    assert sweep.forwards == block_forwards(sets, 8) == 3 + 3 + 4 * 4


@pytest.mark.parametrize("family", ["bloom", "opt", "mamba", "nemotron_h"])
def test_a_block_of_another_structure_is_refused_by_name(family):
    model, config = zoo.tiny(family)

    def asked():
        candidates_for(Goal(remove=1), "", 8, config, "attention")
        BlockStack(model).parts(2)

    with pytest.raises(UnsupportedModel, match="--unit block"):
        asked()


def test_blocks_that_give_positions_keep_their_attention():
    config = zoo.tiny_config("gemma2")  # sliding, sliding, full, ...
    found = candidates_for(Goal(remove=1), "", 8, config, "any")
    kept = {*ATTENTION.values()} - {*found}
    assert kept == {ATTENTION[0], ATTENTION[2]}
    assert {*range(8), *MLP.values()} <= {*found}
    with pytest.raises(InputError, match="cannot remove 7 of 6"):
        candidates_for(Goal(remove=7), "", 8, config, "attention")


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_generating_with_a_cache_is_as_without(family):
    model, _ = zoo.tiny(family)
    ids, how = zoo.probe(), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with sleb.bypassed(model, ["3.attention", "4.attention", "5.mlp"]):
        cached = model.generate(ids, use_cache=True, return_dict_in_generate=True, **how)
        assert torch.equal(cached.sequences, model.generate(ids, use_cache=False, **how))
        lengths = [layer.get_seq_length() for layer in cached.past_key_values.layers]
        assert [i for i, length in enumerate(lengths) if not length] == [3, 4]
    with sleb.bypassed(model, ["0.attention"]), pytest.raises(InputError, match="block 0"):
        model.generate(ids, use_cache=True, **how)


def test_names_of_units():
    assert [str(parse_unit(t)) for t in ("12", "12.attention", "0.mlp")] == [
        "12",
        "12.attention",
        "0.mlp",
    ]
    assert canonical([ATTENTION[3], 1, MLP[3], ATTENTION[5], 5]) == (1, 3, 5)
    assert whole([ATTENTION[3], MLP[3]], 3)
    assert overlap(ATTENTION[3], 3)
    assert not overlap(ATTENTION[3], MLP[3])
    for wrong in ("12.head", "x", "12.", "1_0", "99999"):
        with pytest.raises(InputError):
            parse_unit(wrong)


@pytest.mark.parametrize("unit", ["attention", "mlp", "any"])
def test_a_plan_names_units_and_reads_them_again(unit, tiny_dir, tmp_path):
    model = sleb.load(tiny_dir)
    (tmp_path / "t.txt").write_text("a block, its attention and its MLP. " * 60)
    split = split_of(model.tokenizer, [str(tmp_path / "t.txt")], windows=4)
    options = {"unit": unit, "remove": 3, "split": split, "exact": True}
    plan = sleb.search(model, **options)
    assert len(plan.order) == 3
    assert unit == "any" or {*map(part_of, plan.order)} == {unit}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert raw["order"] == [str(u) if part_of(u) else u for u in plan.order]
    if unit == "any":  # weighed, see below
        return
    # greedy: each removal is the best of its round, as separate sweeps score them
    sweep = Sweep(model.stack, split.search.ids, NLL)
    for turn, unit in enumerate(plan.order):
        before = plan.order[:turn]
        live = [s.block for s in plan.rounds[turn].scores]
        scores = sweep.values([BlockSet([*before, u]) for u in live], 0, 4).mean(1)
        assert live[int(scores.argmin())] == unit


def test_a_plan_of_the_schema_before_is_read_as_it_was_meant(tmp_path):
    old = minimal(schema_version=2)
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert Plan.load(tmp_path / "plan.json") == Plan.model_validate(minimal())


@pytest.mark.parametrize(
    "changes",
    [
        {"order": ["1.attention"], "removed": [10001]},
        {"order": [10001], "removed": [10001]},
        {"order": ["9.attention"], "removed": ["9.attention"]},
        {"order": ["1.attention", "1.mlp"], "removed": ["1.attention", "1.mlp"]},
        {"order": ["1.head"], "removed": ["1.head"]},
    ],
)
def test_an_impossible_unit_is_no_plan(changes, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(minimal(**changes)))
    with pytest.raises(InputError, match="not a valid plan"):
        Plan.load(tmp_path / "plan.json")


def test_what_cuts_whole_blocks_refuses_parts(tiny_dir, tmp_path):
    plan = plan_of(tiny_dir, ATTENTION[2])
    plan.save(tmp_path / "plan.json")
    for attempt in (
        lambda: Cut.of(plan),
        lambda: sleb.apply(tmp_path / "plan.json", tiny_dir, tmp_path / "out"),
        lambda: sleb.export(tmp_path / "plan.json", "mergekit", model=str(tiny_dir)),
    ):
        with pytest.raises(UnsupportedModel, match=r"2\.attention"):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"strategy": "beam"}, {"min_similarity": 0.5}, {"compile": True}]
)
def test_what_goes_with_whole_blocks_alone_is_refused_early(options, tmp_path):
    with pytest.raises(InputError, match="--unit"):
        sleb.search(tmp_path / "none", unit="attention", remove=1, **options)


def saved(family: str, folder):
    """A tiny model of the family as a checkpoint."""
    model, _ = zoo.tiny(family)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    vocabulary = WordLevel({str(i): i for i in range(zoo.VOCAB)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", STRUCTURES)
def test_a_plan_of_parts_is_applied_while_the_model_is_loaded(family, tmp_path):
    folder = saved(family, tmp_path)
    units = (ATTENTION[2], 3, MLP[5], ATTENTION[6])
    plan = plan_of(folder, *units)
    dense, cut = sleb.load(folder), sleb.load(folder, plan=plan)
    assert (len(cut.stack), cut.removed) == (7, canonical(units))
    ids, how = zoo.probe(), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with sleb.bypassed(dense, units):
        wanted = dense.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(cut.model(input_ids=ids, use_cache=False).logits, wanted)
    out = cut.model.generate(ids, use_cache=True, return_dict_in_generate=True, **how)
    assert torch.equal(out.sequences, cut.model.generate(ids, use_cache=False, **how))
    held = [layer.get_seq_length() > 0 for layer in out.past_key_values.layers]
    assert held == [True, True, False, True, True, False, True]
    gone = [dense.stack.blocks[3]]
    for unit in parts_in(units):
        block = dense.stack.blocks[block_of(unit)]
        gone.append(block.get_submodule(dense.stack.parts(block_of(unit))[part_of(unit)].name))
    less = sum(p.numel() for module in gone for p in module.parameters())
    assert cut.model.num_parameters() == dense.model.num_parameters() - less


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ([ATTENTION[3]], [((ATTENTION[3],), (3, 4, 5))]),
        ([ATTENTION[3], 4], [((ATTENTION[3], 4), (3, 5, 6))]),
        ([ATTENTION[3], ATTENTION[4]], [((ATTENTION[3],), (3,)), ((ATTENTION[4],), (4, 5, 6))]),
        ([ATTENTION[3], MLP[4]], [((ATTENTION[3],), (3,)), ((MLP[4],), (4, 5, 6))]),
        ([ATTENTION[3], MLP[3]], [((3,), (2, 4, 5))]),
        ([2, ATTENTION[5]], [((2,), (1, 3, 4)), ((ATTENTION[5],), (5, 6, 7))]),
    ],
)
def test_a_missing_part_is_a_gap_of_its_own(removed, expected):
    assert [(gap.removed, gap.blocks) for gap in gaps(removed, 8)] == expected


def distance(stack: BlockStack, units, ids) -> float:
    """How far the logits are without these units."""
    dense = stack.model(input_ids=ids, use_cache=False).logits
    with stack.bypassed(units):
        cut = stack.model(input_ids=ids, use_cache=False).logits
    return float((dense - cut).norm() / dense.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "cohere"])
@pytest.mark.parametrize("units", [(ATTENTION[2], ATTENTION[3], ATTENTION[6]), (MLP[2], 5)])
def test_a_repair_of_parts_brings_the_model_nearer_on_new_text(family, units):
    model, _ = zoo.tiny(family)
    stack = BlockStack(model)
    ids = torch.randint(3, 90, (96, 24), generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        plain = distance(stack, units, ids[80:])
        fitter = Regression(stack, units, ids[:80], 8)
        for gap in gaps(units, len(stack)):
            fitter.fit(gap, (0.1,))
        changed = {block for block, _ in fitter.changes.values}
        assert changed == {b for gap in gaps(units, len(stack)) for b in gap.blocks}
        assert distance(stack, units, ids[80:]) < 0.98 * plain
        fitter.restore()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_mlp_of_a_block_without_attention_is_fitted_by_weighted_ridge_regression():
    """Against the normal equations written out by hand."""
    model, _ = zoo.tiny("llama")
    stack, ridge = BlockStack(model), 0.05
    ids = torch.randint(3, 90, (12, 20), generator=torch.Generator().manual_seed(2))
    down, seen = stack.blocks[2].mlp.down_proj, []
    old = down.weight.detach().double().clone()
    with torch.inference_mode():
        hidden, calls = stack.enter(ids)
        for i in (0, 1):
            hidden = stack.run(i, hidden, calls[i])
        target = stack.run(2, hidden, calls[2]).flatten(0, 1).double()
        handle = down.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with stack.bypassed([ATTENTION[2]]):
            out = stack.run(2, hidden, calls[2]).flatten(0, 1).double()
        handle.remove()
    Regression(stack, [ATTENTION[2]], ids, 5).fit(Gap(removed=(), blocks=(2,)), (ridge,))
    x = seen[-1].flatten(0, 1).double()
    x, w = torch.cat((x, torch.ones(len(x), 1)), 1), 1 / target.square().mean(-1)
    gram = (x * w[:, None]).T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram, (x * w[:, None]).T @ (target - out)).T
    torch.testing.assert_close(down.weight.double(), old + change[:, :-1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pruned(learned, tmp_path_factory):
    """What `sleb prune --unit attention` leaves."""
    folder = tmp_path_factory.mktemp("pruned")
    shutil.copy(learned / "text.txt", folder / "t.txt")
    options = {"text": (str(folder / "t.txt"),), "windows": 4, "length": 32, "prompts": ("none",)}
    done = sleb.prune(learned / "model", folder / "out", unit="attention", remove=2, **options)
    assert done.record.verification.passed
    return done


def test_parts_are_chosen_by_answers_where_there_are_prompts(learned, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    shutil.copy(learned / "text.txt", tmp_path / "t.txt")
    (tmp_path / "p.jsonl").write_text("\n".join(f'"the block {i}"' for i in range(14)))
    given = {"prompts": (str(tmp_path / "p.jsonl"),), "new_tokens": 4, "repair": False}
    given |= {"text": (str(tmp_path / "t.txt"),), "windows": 4, "length": 32, "remove": 1}
    by = {
        unit: sleb.prune(learned / "model", tmp_path / unit, unit=unit, **given).plan.metric
        for unit in ("attention", "block")
    }
    assert by == {"attention": "answers", "block": "loss"}
    given.pop("repair")
    attention = sleb.search(learned / "model", unit="attention", **given)
    assert attention.metric == "answers"
    assert sleb.search(learned / "model", unit="attention", metric="kl", **given).metric == "kl"


def test_pruning_parts_leaves_a_plan_and_its_repair(pruned, learned):
    out, plan = pruned.path, Plan.load(pruned.path / "plan.json")
    assert {path.name for path in out.iterdir()} == {
        "plan.json",
        "repaired.safetensors",
        "run.json",
    }
    assert plan == pruned.plan
    assert len(plan.parts) == 2
    assert RunRecord.load(out).removed == plan.removed
    assert "repaired-tensors" in {check.key for check in pruned.record.verification.checks}
    dense, cut = sleb.load(learned / "model"), sleb.load(learned / "model", plan=out / "plan.json")
    fixed = stored_repair(plan, out, dense)
    ids = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    with fixed.patch(dense.stack), dense.stack.bypassed(plan.removed):
        wanted = dense.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(cut.model(input_ids=ids, use_cache=False).logits, wanted)
    assert sum(p.numel() for p in cut.model.parameters()) == pruned.record.parameters[1]


def test_a_pruned_plan_is_verified_evaluated_and_reported(pruned, learned, tmp_path):
    assert sleb.verify(pruned.path, model=learned / "model").passed
    text = str(pruned.path.parent / "t.txt")
    found = sleb.evaluate(
        learned / "model", plan=str(pruned.path / "plan.json"), text=(text,), windows=4, length=32
    )
    assert found.unrepaired is not None
    assert found.removed == pruned.plan.removed
    page = sleb.report(pruned.path, tmp_path / "report.html").read_text()
    assert all(str(unit) in page for unit in pruned.plan.removed)
    assert not any(f"{unit:,d}" in page or f"{unit:d}" in page for unit in pruned.plan.parts)


def test_answers_of_a_pruned_plan_are_compared(pruned, learned):
    asked = [Prompt(id="a", text="the block of a model", messages=None)]
    found = sleb.compare(learned / "model", pruned.path, asked, new_tokens=8)
    cut = sleb.load(learned / "model", plan=pruned.path / "plan.json")
    ids = torch.tensor([cut.tokenizer("the block of a model")["input_ids"]])
    out = cut.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert found.pairs[0].pruned.text == cut.tokenizer.decode(out, skip_special_tokens=True)


def test_a_damaged_repair_of_a_plan_is_seen(pruned, learned, tmp_path):
    folder = shutil.copytree(pruned.path, tmp_path / "out")
    raw = bytearray((folder / "repaired.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "repaired.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="repaired"):
        sleb.load(learned / "model", plan=folder / "plan.json")
    assert not sleb.verify(folder, model=learned / "model").passed
    (folder / "repaired.safetensors").unlink()
    with pytest.raises(InputError, match="repaired"):
        sleb.load(learned / "model", plan=folder / "plan.json")


def test_what_takes_a_checkpoint_says_what_the_folder_is(pruned, learned, tmp_path):
    for attempt in (
        lambda: sleb.load(pruned.path),
        lambda: sleb.describe(pruned.path),
        lambda: sleb.quantize(pruned.path, tmp_path / "int8", scheme="int8"),
        lambda: sleb.restore(pruned.path, tmp_path / "restored"),
        lambda: sleb.push(pruned.path, "me/cut", dry_run=True),
    ):
        with pytest.raises(InputError, match="holds a plan and no checkpoint") as refused:
            attempt()
        assert "nemotron-nas" in str(refused.value)
    with pytest.raises(InputError, match="--unit"):
        sleb.prune(learned / "model", tmp_path / "x", unit="mlp", remove=1, quantize="int8")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("of", ["memory", "kv"])
def test_units_are_weighed_by_what_they_save(of, loaded, tmp_path):
    (tmp_path / "t.txt").write_text("a block, its attention and its MLP. " * 60)
    split = split_of(loaded.tokenizer, [str(tmp_path / "t.txt")], windows=4)
    options = {"unit": "any", "save": of, "prompt_length": 64, "remove": 3, "split": split}
    plan = sleb.search(loaded, exact=True, **options)
    shares = plan.saving.shares
    sweep = Sweep(loaded.stack, split.search.ids, NLL)
    for turn, unit in enumerate(plan.order):
        before = BlockSet(plan.order[:turn])
        scores = {s.block: s.mean for s in plan.rounds[turn].scores}
        sets = [before, *(before | {u} for u in scores)]
        above, *losses = sweep.values(sets, 0, 4).mean(1)
        for (u, score), value in zip(scores.items(), losses, strict=True):
            assert score == pytest.approx((value - above) / (100 * shares[str(u)]), abs=1e-5)
        assert min(scores, key=scores.get) == unit
        assert not any(overlap(u, gone) for u in scores for gone in before)
    raced = sleb.search(loaded, **options)
    assert raced.order == plan.order
    assert Plan.model_validate_json(plan.to_json()) == plan
    parts = [u for u in shares if u.endswith(".mlp")]
    assert all((shares[u] == 0) == (of == "kv") for u in parts)
    if of == "memory":
        block = loaded.stack.blocks[2]
        mlp = sum(p.numel() for p in block.mlp.parameters())
        every = sum(p.numel() for p in block.parameters())
        assert shares["2.mlp"] / shares["2"] == pytest.approx(mlp / every, rel=1e-3)
    else:
        assert shares["2"] == shares["2.attention"] == pytest.approx(1 / 6, abs=1e-5)


def test_time_is_measured_and_makes_the_speed_up_a_measured_one(loaded, tmp_path, monkeypatch):
    def told(variants, saving, progress):
        assert (saving.context, saving.sequences) == (32, 2)
        kinds = [{part_of(unit) for unit in units} for _, units in variants]
        assert [*map(set, kinds)] == [set(), {""}, {"attention"}, {"mlp"}]
        return [[1.0, 1.0, 9.0], [0.6] * 3, [0.8] * 3, [0.9] * 3]

    monkeypatch.setattr(savings, "step_seconds", told)
    (tmp_path / "t.txt").write_text("a block, its attention and its MLP. " * 60)
    options = {"text": (str(tmp_path / "t.txt"),), "windows": 4, "length": 16, "unit": "any"}
    plan = sleb.search(loaded, prompt_length=32, sequences=2, speedup=1.2, **options)
    shares = plan.saving.shares
    assert [shares[u] for u in ("2", "2.attention", "2.mlp")] == [0.1, 0.05, 0.025]
    reached = 1 / (1 - sum(shares[str(u)] for u in plan.removed))
    assert plan.target.reached == pytest.approx(reached, abs=1e-6)
    assert reached >= 1.2


def test_a_step_is_timed_for_each_variant(loaded):
    asked = Saving(of="time", context=16, sequences=2)
    variants = [(loaded.stack, units) for units in ((), (2, 3), (ATTENTION[2],))]
    found = savings.step_seconds(variants, asked)
    assert [len(each) for each in found] == [savings.ROUNDS] * 3
    assert all(second > 0 for each in found for second in each)
    with pytest.raises(InputError, match="--prompt-length"):
        sleb.search(loaded, unit="any", prompt_length=250, remove=1, windows=4, length=16)


def test_what_is_saved_is_of_parts_alone(tmp_path):
    with pytest.raises(InputError, match="--unit"):
        sleb.search(tmp_path / "none", save="time", remove=1)
    with pytest.raises(InputError, match="--metric"):
        sleb.search(tmp_path / "none", unit="any", metric="repaired-loss", remove=1)


def test_no_model_of_transformers_leaves_out_a_part_that_its_config_skips():
    """Once this fails, a checkpoint of such a plan can be stock: write it, in docs/units.md too."""
    config = tiny_llama(blocks=3).config
    try:
        config.per_layer_config = {1: {"skip": ["attention"]}}
    except (AttributeError, TypeError, ValueError):
        return
    try:
        model = LlamaForCausalLM(config)
    except (AttributeError, TypeError, ValueError):
        return
    assert [*model.model.layers[1].self_attn.parameters()]


def test_as_many_rounds_as_a_measured_target_may_take(monkeypatch, loaded, tmp_path):
    """Parts with few bytes are not those that save little time."""

    def told(variants, saving, progress):
        dense, block, attention, mlp = [1.0], [0.8], [0.84], [0.96]
        return [dense, block, attention, mlp]

    monkeypatch.setattr(savings, "step_seconds", told)
    (tmp_path / "t.txt").write_text("a block, its attention and its MLP. " * 60)
    options = {"text": (str(tmp_path / "t.txt"),), "windows": 4, "length": 16, "unit": "any"}
    plan = sleb.search(loaded, prompt_length=32, speedup=1.15, protect="0", **options)
    assert plan.target.reached >= 1.15


def test_a_pruned_plan_is_timed_beside_the_model(pruned, learned):
    found = sleb.bench(learned / "model", [pruned.path], quick=True, runs=6)
    dense, cut = (one for one in found.models if one.runtime == "transformers")
    assert (dense.parameters, cut.parameters) == pruned.record.parameters
    assert (dense.file_bytes, cut.file_bytes) == pruned.record.nbytes
    assert cut.blocks == dense.blocks
    timed = [ratio for ratio in found.ratios if ratio.runtime == "transformers"]
    assert len(timed) == len(found.cases)
    assert {(ratio.ideal, ratio.possible) for ratio in timed} == {(None, None)}
    RunRecord.update(pruned.path, speed=found)
    assert RunRecord.load(pruned.path).speed == found


def test_limits_are_held_against_a_pruned_plan(pruned, learned, tmp_path):
    (tmp_path / "gate.toml").write_text("size.max_mb = 100\nperplexity.max_ratio = 50\n")
    found = sleb.verify(pruned.path, model=learned / "model", gate=str(tmp_path / "gate.toml"))
    assert found.gate.passed
    (tmp_path / "gate.toml").write_text("size.max_mb = 0.001\n")
    found = sleb.verify(pruned.path, model=learned / "model", gate=str(tmp_path / "gate.toml"))
    assert not found.gate.passed


def test_a_project_removes_parts(learned, tmp_path):
    shutil.copy(learned / "text.txt", tmp_path / "t.txt")
    (tmp_path / "p.jsonl").write_text('"the block of a model"')
    settings = f"""
model = "{learned / "model"}"
out = "out"
[text]
mine = "t.txt"
[search]
unit = "attention"
remove = 2
windows = 4
length = 32
heldout = 3
prompts = ["none"]
[measure]
prompts = "p.jsonl"
new_tokens = 6
bench_quick = true
"""
    (tmp_path / "sleb.toml").write_text(settings)
    record = sleb.run(tmp_path / "sleb.toml")
    assert [part_of(unit) for unit in record.removed] == ["attention"] * 2
    assert record.verification.passed
    assert {*record.stages} == {"prune", "similarity", "answers", "speed"}
    assert {"searching", "measuring similarity"} <= {*record.seconds}, "all is accounted for"
    page = (tmp_path / "out" / "report.en.html").read_text()
    assert all(str(unit) in page for unit in record.removed)
    other = settings.replace("[measure]", "[measure]\ntransfer = true")
    (tmp_path / "other.toml").write_text(other.replace('"t.txt"', '"t.txt"\nmore = "p.jsonl"'))
    with pytest.raises(InputError, match="whole blocks"):
        sleb.run(tmp_path / "other.toml")


HEALS = {"tokens": 2048, "length": 32, "lr": 3e-3, "heldout": 4, "batch": 8, "device": "cpu"}


@pytest.mark.parametrize("more", [(), (4,)], ids=["attention", "a block as well"])
def test_a_plan_of_parts_is_healed(learned, tmp_path, more):
    """The result is the dense model with the trained tensors and without the units, however it is
    looked at."""
    shutil.copy(learned / "text.txt", tmp_path / "t.txt")
    model, text = learned / "model", [str(tmp_path / "t.txt")]
    found = sleb.search(model, remove=1, text=text, windows=4, length=32, prompts=["none"])
    units = (ATTENTION[2], *more)
    plan = found.model_copy(update={"removed": canonical(units), "order": units, "rounds": ()})
    (tmp_path / "cut").mkdir()
    plan.save(tmp_path / "cut/plan.json")
    out = tmp_path / "healed"
    done = sleb.heal(tmp_path / "cut", model, out, text=text, prompts=["none"], **HEALS)
    healed = done.record.healed
    assert healed.overall.healed_divergence.value < healed.overall.cut_divergence.value
    assert done.record.verification.passed
    assert RunRecord.load(out) == done.record
    assert {*(file.name for file in out.iterdir())} == {
        "SHA256SUMS", "heal.json", "plan.json", "repaired.safetensors", "run.json"
    }  # fmt: skip
    dense, ids = sleb.load(model, device="cpu"), torch.arange(1, 20)[None]
    assert done.record.nbytes == (before := nbytes(dense.model), before - gone(dense, units))
    fixed = stored_repair(done.plan, out, dense)
    assert not any(f".{block}." in name for block in more for name in fixed.tensors)
    gone_with_it = ("self_attn", "input_layernorm")
    assert not any(f".2.{part}" in name for name in fixed.tensors for part in gone_with_it)
    with fixed.patch(dense.stack), dense.stack.bypassed(units):
        wanted = dense.model(input_ids=ids, use_cache=False).logits
    cut = sleb.load(model, plan=out / "plan.json", device="cpu")
    assert torch.equal(cut.model(input_ids=ids, use_cache=False).logits, wanted)
    assert sleb.verify(out, model=model).passed
    with pytest.raises(InputError, match="healed already"):
        sleb.heal(out, model, tmp_path / "again", text=text, **HEALS)


def nbytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def gone(model, units) -> int:
    """Bytes of the weights of units."""
    blocks = model.stack.blocks
    parts = (
        blocks[block_of(u)].get_submodule(model.stack.parts(block_of(u))[part_of(u)].name)
        if part_of(u)
        else blocks[u]
        for u in units
    )
    return sum(map(nbytes, parts))


def test_parts_are_pruned_and_healed_in_one_command(learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(learned / "text.txt", tmp_path / "t.txt")
    given = {"text": ("t.txt",), "windows": 4, "length": 32, "prompts": ("none",), "device": "cpu"}
    monkeypatch.setattr("sleb.distillation.distill.HEAL_TOKENS", {"cpu": 2048})
    done = sleb.prune(
        learned / "model", tmp_path / "out", unit="attention", remove=1, heal=True, **given
    )
    assert done.record.healed is not None
    assert Plan.load(tmp_path / "out-cut/plan.json").removed == done.plan.removed
    options = {"text": ("t.txt",), "stages": 2}
    with pytest.raises(InputError, match="--stages"):
        sleb.heal(tmp_path / "out-cut", learned / "model", tmp_path / "x", **options)


def test_answers_kept_of_a_pruned_plan_are_measured(pruned, learned, tmp_path):
    rows = [{"prompt": f"the block of a model {i}", "answer": "passes"} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = str(pruned.path / "plan.json")
    asked = {"prompts": (str(tmp_path / "p.jsonl"),), "new_tokens": 6}
    found = sleb.evaluate(learned / "model", plan=plan, **asked)
    assert (found.prompts, found.right.judged) == (4, 4)
    assert 0 < found.agreement.value <= 1
    assert found.unrepaired is not None
