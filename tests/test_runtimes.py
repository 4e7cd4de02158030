"""`sleb verify --runtime`: what is loaded is compared, what is not is judged by rules, and the two
are told apart. vLLM and llama.cpp are played by modules that answer from a file."""

from __future__ import annotations

import ast
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
from plan_tools import plan_of
from sleb.core.errors import InputError, VerificationFailed
from sleb.runtimes import compatibility as module
from sleb.runtimes import probe
from sleb.runtimes.compatibility import RuntimeReport, check_runtimes, parse_runtimes

REMOVED = (1, 3)
VLLM = """
import json
from pathlib import Path
print("a line that is no answer", flush=True)
class SamplingParams:
    def __init__(self, temperature, max_tokens, prompt_logprobs, detokenize):
        assert (max_tokens, prompt_logprobs) == (1, 0)
class LLM:
    def __init__(self, model, dtype, max_model_len, skip_tokenizer_init, **_):
        assert dtype == "float32"
        self.known = json.loads((Path(model) / "oracle.json").read_text())
        if "says" in self.known: raise RuntimeError(self.known["says"])
        if "dies" in self.known: raise SystemExit(7)
        assert max_model_len == len(self.known["ids"]) + 1
    def generate(self, prompts, asked, use_tqdm):
        (prompt,) = prompts
        ids = prompt["prompt_token_ids"]
        assert ids == self.known["ids"]
        made = type("Answer", (), {})()
        value = lambda x: type("LogProb", (), {"logprob": x})()
        pairs = zip(ids[1:], self.known["logprobs"])
        made.prompt_logprobs = [None, *({i: value(x)} for i, x in pairs)]
        return [made]
"""
LLAMA = """
import json
import numpy as np
class Llama:
    def __init__(self, model_path, n_ctx, n_gpu_layers, logits_all, verbose):
        assert logits_all and n_gpu_layers == 0
        self.known = json.loads(open(model_path).read())
    def eval(self, ids):
        assert ids == self.known["ids"]
        self.scores = np.full((len(ids), 259), -np.inf)
        for i, (token, x) in enumerate(zip(ids[1:], self.known["logprobs"])):
            self.scores[i, token] = 5 + x
            self.scores[i, token - 1] = 5 + np.log1p(-np.exp(x))
"""


def oracle(path: Path) -> dict:
    """What a right runtime would answer: ids of the probe, and their log-probabilities in the
    model at ``path``, loaded as it is."""
    loaded = sleb.load(path, dtype="float32", device="cpu")
    windows, _ = sleb.calibration.load_windows(loaded.tokenizer, (), windows=1, length=255, seed=0)
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
    loaded = sleb.load(tiny_dir, dtype="float32", device="cpu")
    found["reference"] = module._reference(loaded, cuts["pruned"], plans["pruned"], REMOVED)
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

    def quick(self, monkeypatch) -> None:
        """The reference is computed once for all tests."""
        monkeypatch.setattr(module, "load", lambda *_, **__: None)
        monkeypatch.setattr(module, "_reference", lambda *_: self.answers["reference"])

    def check(self, *runtimes: str, **options) -> RuntimeReport:
        return check_runtimes(
            self.out, model=self.dense, plan=self.plan, runtimes=runtimes, **options
        )


@pytest.fixture
def place(tmp_path, tiny_dir, answers, monkeypatch) -> Place:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "vllm.py").write_text(VLLM)
    (modules / "llama_cpp.py").write_text(LLAMA)
    monkeypatch.syspath_prepend(modules)
    return Place(tmp_path, tiny_dir, answers)


def one(found: RuntimeReport):
    (verdict,) = found.verdicts
    return verdict


# -- loaded ----------------------------------------------------------------------------------------


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
    assert [v.runtime for v in found.verdicts] == ["vllm", "llama-cpp"]
    for v in found.verdicts:
        assert (v.verdict, v.how, v.why, v.version) == ("accepted", "loaded", "", "unknown")
        assert max(v.dense, v.pruned) < 1e-5
    found.require()


@pytest.mark.parametrize("runtime", ["vllm", "llama-cpp"])
def test_a_runtime_that_runs_other_blocks_is_caught(place, runtime, monkeypatch):
    place.quick(monkeypatch)
    place.says(place.out, place.answers["wrong"])
    found = place.check(runtime)
    v = one(found)
    assert (v.verdict, v.how) == ("refused", "loaded")
    assert v.pruned > 0.1 > v.limit > v.dense
    with pytest.raises(VerificationFailed, match=rf"not right in {runtime} unknown: .*rounding"):
        found.require()


@pytest.mark.parametrize(
    ("dense", "pruned", "verdict"),
    [
        (0.1, 0.1, "accepted"),
        (0.1, 0.29, "accepted"),
        (0.1, 0.32, "refused"),
        (0.0, 0.0018, "accepted"),
        (0.0, 0.0022, "refused"),
    ],
)
def test_a_runtime_may_deviate_as_it_does_on_the_dense_model(
    place, dense, pruned, verdict, monkeypatch
):
    place.quick(monkeypatch)
    place.says(place.dense, place.answers["dense"], by=dense)
    place.says(place.out, place.answers["pruned"], by=pruned)
    v = one(place.check("vllm"))
    assert v.verdict == verdict
    assert (v.dense, v.pruned) == pytest.approx((dense / 2, pruned / 2), abs=1e-5)
    assert v.limit == pytest.approx(3 * dense / 2 + 0.001, abs=1e-5)


@pytest.mark.parametrize(
    ("which", "answer", "verdict", "why"),
    [
        ("dense", {"says": "no such\narchitecture"}, "undecided", "RuntimeError: no such archit"),
        (
            "out",
            {"says": "no luck"},
            "refused",
            "does not run the pruned model: RuntimeError: no l",
        ),
        ("out", {"dies": 1}, "refused", "its process ended with 7"),
        ("out", {"logprobs": [float("nan")] * 254}, "refused", "not finite"),
    ],
)
def test_a_runtime_that_does_not_run_a_model(place, which, answer, verdict, why, monkeypatch):
    place.quick(monkeypatch)
    kept = place.answers["pruned"] if "logprobs" in answer else {"ids": []}
    place.says(place.out if which == "out" else place.dense, {**kept, **answer})
    found = place.check("vllm")
    assert one(found).verdict == verdict
    assert why in one(found).why
    assert "\n" not in one(found).why
    if verdict == "undecided":
        found.require()
    else:
        with pytest.raises(VerificationFailed):
            found.require()


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
    repair = SimpleNamespace(removed=REMOVED, tensors={name: "0" * 64})
    place.plan = place.plan.model_copy(update={"repair": repair})
    assert one(place.check("vllm")).verdict == "accepted"
    # a shallower cut has no repair
    assert one(place.check("vllm", depth=1)).pruned > 0.01


def test_another_interpreter(place, tmp_path, monkeypatch, capsys):
    modules = sys.path.pop(0)
    wrapper = tmp_path / "python"
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    code += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" {modules} "$2"\n')
    wrapper.chmod(0o755)
    assert one(place.check("vllm")).how == "by rule"
    place.plan.save(tmp_path / "plan.json")
    verify = ["verify", place.out, "--model", place.dense, "--runtime", "vllm"]
    ran = run(capsys, *verify, "--python", f"vllm={wrapper}", "--json")
    assert ran.code == 0
    (v,) = ran.json["runtimes"]["verdicts"]
    assert (v["verdict"], v["how"]) == ("accepted", "loaded")
    assert ran.json["verification"]["checks"]
    place.says(place.out, place.answers["wrong"])
    ran = run(capsys, *verify, "--python", f"vllm={wrapper}")
    assert ran.code == 3
    assert "refused  loaded" in ran.out
    assert "do not serve it there" in ran.err


def test_a_gguf_file_alone_is_run(place, capsys, monkeypatch):
    place.quick(monkeypatch)
    monkeypatch.setattr(module, "resolve", lambda ref, *_: SimpleNamespace(path=place.out))
    file = place.out.with_name("out.gguf")
    verify = ["verify", file, "--model", place.dense]
    assert "verified by running it: --runtime" in refused(capsys, 2, *verify)
    assert "no plan" in refused(capsys, 2, *verify, "--runtime", "llama-cpp")
    place.plan.save(place.out.with_name("out.plan.json"))
    ran = run(capsys, *verify, "--runtime", "llama-cpp", "--json")
    assert (ran.code, list(ran.json)) == (0, ["runtimes"])
    assert ran.json["runtimes"]["verdicts"][0]["verdict"] == "accepted"
    place.says(place.out, place.answers["wrong"])
    assert run(capsys, *verify, "--runtime", "llama-cpp").code == 3
    said = refused(capsys, 2, "verify", "none", "--model", place.dense, "--plan", "x.json")
    assert "no checkpoint folder at none" in said


def test_what_cannot_be_asked_for(place, tmp_path, capsys):
    verify = ["verify", place.out, "--model", place.dense]
    said = refused(capsys, 2, *verify, "--runtime", "transformers,vlm")
    assert "unknown runtime 'vlm' (did you mean 'vllm'?)" in said
    assert "RUNTIME=PATH" in refused(capsys, 2, *verify, "--runtime", "vllm", "--python", "vllm")
    given = [*verify, "--runtime", "vllm", "--python"]
    assert "is not in --runtime" in refused(capsys, 2, *given, "llama-cpp=/bin/true")
    assert "does not run: No such file" in refused(capsys, 2, *given, "vllm=/no/python")
    assert "ended with 0" in refused(capsys, 2, *given, "vllm=/bin/true")
    other = tmp_path / "other"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -I "$2"\n')
    other.chmod(0o755)
    assert "has no vllm" in refused(capsys, 2, *given, f"vllm={other}")
    assert "--python is for --runtime" in refused(capsys, 2, *verify, "--python", "vllm=x")
    with pytest.raises(InputError, match="unknown runtime ''"):
        parse_runtimes("")
    assert parse_runtimes("llama.cpp, vllm,vllm") == ("llama-cpp", "vllm")


def test_the_child_imports_nothing_of_sleb():
    tree = ast.parse(Path(probe.__file__).read_text())
    names = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert {"json", "transformers"} <= names
    assert not any(name.startswith("sleb") for name in names)


# -- by rule ---------------------------------------------------------------------------------------


def test_what_is_not_installed_is_judged_by_rule_and_proves_nothing(place, capsys):
    sys.path.pop(0)
    for folder in (place.dense, place.out):
        folder.with_name(folder.name + ".gguf").unlink()
    found = place.check("vllm", "llama-cpp")
    for v in found.verdicts:
        assert (v.how, v.verdict, v.dense, v.pruned) == ("by rule", "accepted", None, None)
    assert found.moved is None
    refused_by_rule = replace(found.verdicts[0], verdict="refused")
    replace(found, verdicts=(refused_by_rule,)).require()
    ran = run(capsys, "verify", place.out, "--model", place.dense, "--runtime", "vllm")
    assert ran.code == 0
    assert "accepted  by rule" in ran.out
    assert "no proof" in ran.out


def test_llama_cpp_needs_the_files_of_both(place):
    place.out.with_name("out.gguf").unlink()
    v = one(place.check("llama-cpp"))
    assert (v.how, v.verdict) == ("by rule", "accepted")
    assert "no .gguf file of both models" in v.why


# -- for real --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vllm_itself(tiny_dir, tmp_path):
    """With SLEB_TEST_VLLM, an interpreter that has vLLM. Heads of 32, which its kernels take."""
    python = os.environ.get("SLEB_TEST_VLLM")
    if not python:
        pytest.skip("SLEB_TEST_VLLM is not set to an interpreter that has vLLM")
    from conftest import byte_tokenizer
    from zoo import tiny

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
