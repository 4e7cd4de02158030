"""`sleb verify --runtime`: what is loaded is compared, what is not is judged by rules, and the two
are told apart. vLLM and llama.cpp are played by modules that answer from a file."""

import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import TypeAdapter

import sleb
from cli_tools import refused, run
from conftest import byte_tokenizer
from plan_tools import plan_of
from runtime_tools import InProcess, pretending
from sleb.checkpoints.checkpoint import tensor_bytes
from sleb.config import VerifyConfig
from sleb.core.errors import InputError, VerificationFailed
from sleb.runtimes import compatibility as module
from sleb.runtimes import worker
from sleb.runtimes.compatibility import RuntimeReport, check_runtimes, parse_runtimes
from sleb.runtimes.worker import Child
from zoo import tiny

pytestmark = pytest.mark.slow  # processes of their own

REMOVED = (1, 3)


def oracle(path: Path) -> dict:
    """What a right runtime would answer: ids of the probe, and their log-probabilities in the
    model at ``path``, loaded as it is."""
    loaded = sleb.load(path, dtype="float32", device="cpu")
    windows, _ = sleb.load_windows(loaded.tokenizer, (), windows=1, length=255, seed=0)
    ids = windows.ids
    with torch.inference_mode():
        chances = loaded.model(input_ids=ids).logits[0, :-1].double().softmax(-1)
    values = [float(chances[i, t].log()) for i, t in enumerate(ids[0, 1:])]
    return {"ids": ids[0].tolist(), "logprobs": values}


@pytest.fixture(scope="module")
def answers(tiny_dir, tmp_path_factory) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("cuts")
    plans = {"pruned": plan_of(tiny_dir, *REMOVED), "wrong": plan_of(tiny_dir, 2, 3)}
    cuts = {name: sleb.apply(plan, tiny_dir, home / name) for name, plan in plans.items()}
    found = {"dense": oracle(tiny_dir)} | {name: oracle(path) for name, path in cuts.items()}
    config = VerifyConfig()
    found["reference"] = module._reference(tiny_dir, config, plans["pruned"], cuts["pruned"])
    return found


class Place:
    """A dense and a pruned model, and what the stand-ins answer for each."""

    def __init__(self, home: Path, tiny_dir: Path, answers: dict[str, dict]) -> None:
        self.answers, self.plan = answers, plan_of(tiny_dir, *REMOVED)
        self.dense, self.out = home / "dense", home / "out"
        self.dense.mkdir()
        for file in tiny_dir.iterdir():
            (self.dense / file.name).symlink_to(file)
        sleb.apply(self.plan, tiny_dir, self.out)
        self.says(self.dense, answers["dense"])
        self.says(self.out, answers["pruned"])

    def says(self, folder: Path, answer: dict, by: float = 0.0) -> None:
        """``by`` is added to every other log-probability."""
        values = [x - by * (i % 2) for i, x in enumerate(answer.get("logprobs", ()))]
        text = json.dumps({**answer, "logprobs": values})
        (folder / "oracle.json").write_text(text)
        folder.with_name(folder.name + ".gguf").write_text(text)

    def check(self, *runtimes: str, **options) -> RuntimeReport:
        return check_runtimes(
            self.out, model=self.dense, plan=self.plan, runtimes=runtimes, **options
        )


@pytest.fixture
def place(tmp_path, tiny_dir, answers, monkeypatch) -> Place:
    """Children are in this process, where a test does not want them to be real."""
    monkeypatch.setattr(worker, "Child", InProcess)
    with pretending(tmp_path / "modules"):
        yield Place(tmp_path, tiny_dir, answers)


@pytest.fixture
def quick(place, monkeypatch) -> Place:
    """The reference is computed once for all tests."""
    monkeypatch.setattr(module, "_reference", lambda *_: place.answers["reference"])
    return place


def one(found: RuntimeReport):
    (verdict,) = found.verdicts
    return verdict


def test_transformers_itself_runs_the_checkpoint(place, tiny_dir):
    found = place.check("transformers")
    v = one(found)
    assert (v.verdict, v.how, v.limit) == ("accepted", "loaded", pytest.approx(1e-3, rel=0.1))
    assert max(v.dense, v.pruned) < 1e-5
    assert (found.tokens, found.removed, found.dtype) == (254, REMOVED, "float32")
    values = [place.answers[name]["logprobs"] for name in ("dense", "pruned")]
    moved = sum(abs(a - b) for a, b in zip(*values, strict=True)) / 254
    assert found.moved == pytest.approx(moved, rel=1e-4)
    assert moved > 100 * v.limit
    found.require()
    assert TypeAdapter(RuntimeReport).validate_json(json.dumps(asdict(found))) == found


def test_a_runtime_that_computes_the_same_is_accepted(place):
    found = place.check("vllm", "llama.cpp")
    assert [v.runtime for v in found.verdicts] == ["vllm", "llama.cpp"]
    for v in found.verdicts:
        assert (v.verdict, v.how, v.why, v.version) == ("accepted", "loaded", None, "unknown")
        assert max(v.dense, v.pruned) < 1e-5
    found.require()


@pytest.mark.parametrize("runtime", ["vllm", "llama.cpp"])
def test_a_runtime_that_runs_other_blocks_is_caught(quick, runtime):
    quick.says(quick.out, quick.answers["wrong"])
    found = quick.check(runtime)
    v = one(found)
    assert (v.verdict, v.how) == ("refused", "loaded")
    assert v.pruned > 0.1 > v.limit > v.dense
    with pytest.raises(VerificationFailed, match=runtime):
        found.require()


@pytest.mark.parametrize(
    ("dense", "pruned", "verdict"),
    [
        (0.01, 0.01, "accepted"),
        (0.01, 0.031, "accepted"),
        (0.01, 0.033, "refused"),
        (0.1, 0.1, "undecided"),  # it computes another dense model
        (0.1, 0.32, "refused"),
        (0.0, 0.0018, "accepted"),
        (0.0, 0.0022, "refused"),
    ],
)
def test_a_runtime_may_deviate_as_it_does_on_the_dense_model(quick, dense, pruned, verdict):
    quick.says(quick.dense, quick.answers["dense"], by=dense)
    quick.says(quick.out, quick.answers["pruned"], by=pruned)
    v = one(quick.check("vllm"))
    assert v.verdict == verdict
    assert (v.dense, v.pruned) == pytest.approx((dense / 2, pruned / 2), abs=1e-5)
    assert v.limit == pytest.approx(3 * dense / 2 + 0.001, abs=1e-5)


@pytest.mark.parametrize(
    ("which", "answer", "verdict", "why"),
    [
        ("dense", {"says": "no such\narchitecture"}, "undecided", "RuntimeError: no such archit"),
        ("out", {"says": "no luck"}, "refused", "pruned-fails: error RuntimeError: no luck"),
        ("out", {"dies": 1}, "refused", "ended with 7"),
        ("out", {"logprobs": [float("nan")] * 254}, "refused", "not finite"),
    ],
)
def test_a_runtime_that_does_not_run_a_model(quick, which, answer, verdict, why, monkeypatch):
    if "dies" in answer:
        monkeypatch.setattr(worker, "Child", Child)
    known = quick.answers["pruned"] if "logprobs" in answer else {"ids": []}
    quick.says(quick.out if which == "out" else quick.dense, {**known, **answer})
    found = quick.check("vllm")
    assert one(found).verdict == verdict
    assert why in str(one(found).why)
    assert "\n" not in str(one(found).why)
    if verdict == "undecided":
        found.require()
    else:
        with pytest.raises(VerificationFailed):
            found.require()


@pytest.mark.slow
def test_a_repaired_checkpoint_is_compared_with_its_repair(place):
    """The reference has the tensors that the plan says were re-fitted."""
    from safetensors.torch import load_file, save_file

    file = place.out / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name] * 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    place.says(place.out, oracle(place.out))
    assert one(place.check("vllm")).verdict == "refused"
    digest = hashlib.sha256(tensor_bytes(tensors[name])).hexdigest()
    repair = SimpleNamespace(removed=REMOVED, tensors={name: digest})
    place.plan = place.plan.model_copy(update={"repair": repair})
    assert one(place.check("vllm")).verdict == "accepted"
    # a shallower cut has no repair
    assert one(place.check("vllm", depth=1)).pruned > 0.01
    # a tensor that is not the plan's is no reference
    repair.tensors[name] = "0" * 64
    with pytest.raises(InputError, match=r"down_proj.*plan"):
        place.check("vllm")


def python_with(modules: Path, home: Path) -> Path:
    """An interpreter without any packages but these modules: neither sleb's, nor sleb itself."""
    wrapper = home / "python"
    add = f"import sys; sys.path.insert(0, '{modules}')"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I -c "{add}\n$3" "$4"\n')
    wrapper.chmod(0o755)
    return wrapper


@pytest.mark.slow
def test_another_interpreter_needs_neither_sleb_nor_its_packages(
    place, tmp_path, monkeypatch, capsys
):
    python = python_with(Path(sys.path.pop(0)), tmp_path)
    assert one(place.check("vllm")).how == "by rule"
    monkeypatch.setattr(worker, "Child", Child)
    place.plan.save(tmp_path / "plan.json")
    verify = ["verify", place.out, "--model", place.dense, "--runtime", "vllm"]
    ran = run(capsys, *verify, "--python", f"vllm={python}", "--json")
    assert ran.code == 0
    (v,) = ran.json["runtimes"]["verdicts"]
    assert (v["verdict"], v["how"]) == ("accepted", "loaded")
    assert ran.json["verification"]["checks"]
    place.says(place.out, place.answers["wrong"])
    ran = run(capsys, *verify, "--python", f"vllm={python}")
    assert ran.code == 3
    assert "refused" in ran.out
    assert "do not serve it" in ran.err


def test_a_gguf_file_alone_is_run(quick, capsys, monkeypatch):
    monkeypatch.setattr(module, "resolve", lambda ref, *_: SimpleNamespace(path=quick.out))
    monkeypatch.setattr(worker, "Child", Child)
    file = quick.out.with_name("out.gguf")
    verify = ["verify", file, "--model", quick.dense]
    assert "verified by running it: --runtime llama-cpp" in refused(capsys, 2, *verify)
    assert "no plan" in refused(capsys, 2, *verify, "--runtime", "llama-cpp")
    quick.plan.save(quick.out.with_name("out.plan.json"))
    ran = run(capsys, *verify, "--runtime", "llama.cpp", "--json")
    assert (ran.code, list(ran.json)) == (0, ["runtimes"])
    assert ran.json["runtimes"]["verdicts"][0]["verdict"] == "accepted"
    quick.says(quick.out, quick.answers["wrong"])
    assert run(capsys, *verify, "--runtime", "llama-cpp").code == 3
    said = refused(capsys, 2, "verify", "none", "--model", quick.dense)
    assert "none" in said


def test_what_cannot_be_asked_for(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker, "Child", Child)
    (bare := tmp_path / "bare").mkdir()
    one = ["--runtime", "vllm", "--python"]
    for options, said in [
        (["--runtime", "transformers,vlm"], "'vllm'"),
        ([*one, "vllm"], "RUNTIME=PATH"),
        ([*one, "llama-cpp=/bin/true"], "is not in --runtime"),
        ([*one, "vllm=/no/python"], "does not run"),
        ([*one, "vllm=/bin/true"], "ended with 0"),
        ([*one, f"vllm={python_with(bare, bare)}"], "no vllm"),
        (["--python", "vllm=x"], "--runtime"),
    ]:
        assert said in refused(capsys, 2, "verify", place.out, "--model", place.dense, *options)
    with pytest.raises(InputError, match="unknown runtime ''"):
        parse_runtimes("")
    assert parse_runtimes("llama-cpp, vllm,vllm,llama.cpp") == ("llama.cpp", "vllm")


def test_what_is_not_installed_is_judged_by_rule_and_proves_nothing(place, capsys):
    sys.path.pop(0)
    for folder in (place.dense, place.out):
        folder.with_name(folder.name + ".gguf").unlink()
    found = place.check("vllm", "llama.cpp")
    for v in found.verdicts:
        assert (v.how, v.verdict, v.dense, v.pruned) == ("by rule", "accepted", None, None)
    assert found.moved is None
    refused_by_rule = replace(found.verdicts[0], verdict="refused")
    replace(found, verdicts=(refused_by_rule,)).require()
    ran = run(capsys, "verify", place.out, "--model", place.dense, "--runtime", "vllm")
    assert ran.code == 0
    assert "by rule" in ran.out
    assert "no proof" in ran.out


def test_llama_cpp_needs_the_files_of_both(place):
    place.out.with_name("out.gguf").unlink()
    v = one(place.check("llama-cpp"))  # as the command line has it, too
    assert (v.how, v.verdict) == ("by rule", "accepted")
    assert v.no_file


@pytest.mark.slow
def test_vllm_itself(tiny_dir, tmp_path):
    """With SLEB_TEST_VLLM, an interpreter that has vLLM. Heads of 32, which its kernels take."""
    python = os.environ.get("SLEB_TEST_VLLM")
    if not python:
        pytest.skip("SLEB_TEST_VLLM is not set to an interpreter that has vLLM")
    model, _ = tiny("gemma3_text", hidden_size=128, head_dim=32, vocab_size=259,
                    max_position_embeddings=256)  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    plan = plan_of(tmp_path / "model", 2, 3)
    out = sleb.apply(plan, tmp_path / "model", tmp_path / "out")
    options = {"model": tmp_path / "model", "plan": plan, "runtimes": ["vllm"]}
    right = check_runtimes(out, pythons={"vllm": python}, **options)
    assert (one(right).how, one(right).verdict) == ("loaded", "accepted"), right
    config = json.loads((out / "config.json").read_text())
    config["layer_types"] = config["layer_types"][1:] + config["layer_types"][:1]
    (out / "config.json").write_text(json.dumps(config))
    shifted = check_runtimes(out, pythons={"vllm": python}, **options)
    assert (one(shifted).how, one(shifted).verdict) == ("loaded", "refused"), shifted
