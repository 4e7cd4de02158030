"""Do two builds of sleb give the same results? Runs both on the same inputs and compares them.

    python tools/compare_builds.py OLD [NEW] [--only llama,gpt2] [--model SmolLM2.gguf] [--work DIR]

OLD and NEW are checkouts (``git worktree add ../old COMMIT``); NEW is the current folder if left
out. Each build is one process that executes all commands below through the command line's own
entry, in a folder of its own, with every path relative to it. Afterwards all files and all output
of ``--json`` are compared: plans and run records as facts, after the new build has read both (which
upgrades old ones); the cards' metadata; checkpoints, GGUF files, repaired tensors, restored models
and exports byte by byte. Exit code 1 and one line per difference, or 0. The rules at ``INTENDED``
name what may differ, and why.

The models are random and tiny, one per kind of structure, made by ``NEW/tests``. With ``--model``
a real one is pruned as well, by each build in turn, and CPU time and peak memory are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

INTENDED = [
    # (file, key), with the wildcards of a shell; and the reason
    ("*", "*seconds*", "a measured time"),
    ("*", "*started*", "the time of the run"),
    ("*", "*versions*", "versions of packages"),
    ("*", "*environment*", "the machine"),
    ("*", "*command", "options may be spelled in another order"),
    ("*", "*schema_version", "records of schema 2 hold keys in place of sentences"),
    ("*", "*checks.*", "checks have keys, and there are more of them; exit codes are compared"),
    ("*", "*verdicts.*.why*", "a key and figures in place of a sentence"),
    ("*", "*verdicts.*.no_file", "it stood in that sentence"),
    ("apply *--repaired*", "repair.*", "the plan's repair is shown where it is taken along"),
    ("*", "split*", "plans name the windows of every role since there is one split of the text"),
    (
        "*/config.json",
        "*sliding_window_pattern",
        "a period beside a list that it no longer describes",
    ),
    ("*/config.json", "no_rope_layer_interval", "likewise; transformers reads the list"),
    *(("*", f"gate.rows.*.{k}", "a limit is named by keys") for k in ("name", "of", "path")),
    *(("*", f"gate.rows.*.{k}", "a limit is named by keys") for k in ("near", "runtime")),
    ("*", "*evaluation_text.shared", "windows that repeat what was fitted on are counted"),
    ("heal *", "stopped", "a key in place of a sentence"),
    ("*/heal.json", "stopped", "a key in place of a sentence"),
    ("*SHA256SUMS", "*plan.json", "compared as facts, not bytes"),
    ("*SHA256SUMS", "*run.json", "compared as facts, not bytes"),
    ("*SHA256SUMS", "*README.md", "compared as facts, not bytes"),
    ("*SHA256SUMS", "*heal.json", "holds times; compared as facts, not bytes"),
    ("*SHA256SUMS", "*config.json", "compared as facts, not bytes"),
    ("*SHA256SUMS", "*rollback.json", "holds hashes of plan.json and config.json"),
    ("*rollback.json", "*plan.json", "compared as facts, not bytes"),
    ("*rollback.json", "*config.json", "compared as facts, not bytes"),
    ("*rollback.json", "*README.md", "compared as facts, not bytes"),
]

# One architecture per kind of structure, by its name in tests/zoo.py.
FAMILIES = [
    "llama",
    "llama:tied",
    "gpt2",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen3_next",
    "deepseek_v3",
    "smollm3",
    "laguna",
    "lfm2",
]

# Their repair is worth something, so that repaired tensors are compared.
TRAINED = ["llama", "llama:tied", "gpt2", "gemma2", "mixtral"]

SEARCH = (
    "--text text.txt --windows 6 --heldout 6 --length 32 --dtype float32 --device cpu --batch 4 "
    "--threads 1"
)
# Commands for every model; M stands for its folder, and for the name of what is written.
EVERY = f"""
inspect M --json
search M --remove 3 --curve {SEARCH} -o M.race.json --json
prune M --remove 2 --repair-tokens 1500 {SEARCH} -o M.repaired --json
verify M.repaired --model M --json
apply M.race.json M -o M.depth --depth 1 --json
restore M.repaired -o M.restored --json
eval M --plan M.race.json --text text.txt --windows 4 --length 32 --batch 4 --dtype float32 --json
"""
# Further commands for the first one.
REST = f"""
search M --remove 2 --exact {SEARCH} -o M.exact.json --json
prune M --max-loss-increase 5 --no-repair {SEARCH} -o M.plain --json
similarity M --text text.txt --windows 4 --length 32 --batch 4 --json
similarity M --text text.txt --windows 4 --length 32 --batch 4 --measure angular --json
similarity M --windows 4 --length 32 --batch 4 --measure cka --json
search M --remove 2 --metric one-shot-loss {SEARCH} -o M.one-shot-loss.json
search M --remove 2 --metric cosine {SEARCH} -o M.cosine.json
search M --remove 2 --metric kl {SEARCH} -o M.kl.json
search M --remove 2 --metric repaired-loss --protect 0-3,-1 {SEARCH} -o M.repaired-loss.json
search M --remove 2 --metric kl --exact --strategy one-shot {SEARCH} -o M.one-shot.json
search M --remove 2 --strategy window {SEARCH} -o M.window.json
search M --remove 2 --exact --strategy window {SEARCH} -o M.window-exact.json
search M --remove 3 --strategy beam {SEARCH} -o M.beam.json
search M --remove 3 --exact --strategy beam {SEARCH} -o M.beam-exact.json
search M --remove 3 --exact --strategy refine {SEARCH} -o M.refine.json
search M --remove 3 --strategy greedy-or-window {SEARCH} -o M.greedy-or-window.json
search M --max-loss-increase 0.5 {SEARCH} -o M.limit.json
search M --size 200KB {SEARCH} -o M.size.json
search M --speedup 1.3 {SEARCH} -o M.speedup.json
search M --curve --exact {SEARCH} -o M.curve.json
search M --remove 30% --protect 0,2-3,-1 --seed 3 {SEARCH} -o M.seed.json
search M --remove 2 --min-similarity 0.5 {SEARCH} -o M.min-similarity.json
search M --remove 2 --min-similarity auto {SEARCH} -o M.auto.json
search M --remove 2 --stream {SEARCH} -o M.stream.json
search M --remove 2 --windows 4 --length 48 --batch 4 --threads 1 -o M.default-text.json
search M --remove 2 {SEARCH} --text other.txt@2 -o M.two-texts.json
search M --remove 2 --dtype bfloat16 --text text.txt --windows 4 --length 32 --batch 4 -o M.bf.json
prune M --max-loss-increase 3 --repair-tokens 1500 {SEARCH} -o M.limited --json
prune M --remove 2 --stream --repair-tokens 1500 {SEARCH} -o M.streamed --json
prune M --remove 25% --no-keep --strategy window --repair-tokens 1500 {SEARCH} -o M.run --json
apply M.race.json M -o M.fitted --repair --repair-tokens 1500 --length 32 --text text.txt --json
apply M.race.json M -o M.unkept --no-keep
restore M.repaired -o M.restored-1 --depth 1 --json
restore M.run -o M.refused
verify M.fitted --model M --json
eval M.repaired --text text.txt --text other.txt --windows 4 --length 32 --batch 4 --json
export M.race.json --as mergekit --model M -o M.mergekit.yml
export M.race.json --as llama-cpp --model M -o M.llama-cpp.txt
export M.race.json --as modelopt-list --model M -o M.modelopt.txt
export M.run/plan.json --as vllm-args --model M -o M.vllm.txt
export M.race.json --as layer-map --model M -o M.map.txt --depth 2
apply M.race.json M.f32.gguf -o M.cut.gguf --other-weights --json
apply M.race.json M.q8_0.gguf -o M.cut-1.gguf --other-weights --depth 1 --json
apply M.repaired/plan.json M.f32.gguf -o M.cut-r.gguf --other-weights --repaired M.repaired --json
apply M.repaired/plan.json M.q8_0.gguf -o M.cut-q.gguf --other-weights --repaired M.repaired --json
compare M M.repaired --prompts prompts.txt --new-tokens 8 --dtype float32 --record M.repaired --json
transfer M --remove 2 {SEARCH.replace("text.txt", "a=text.txt")} --text b=other.txt --json
verify M.repaired --model M --gate gate.toml --json
search M --remove 99 {SEARCH} -o M.refused.json
search M --metric kl --remove 0 {SEARCH} -o M.refused.json
heal M.plain --model M --text text.txt --tokens 1024 --length 32 --heldout 4 -o M.healed --json
"""
REAL = (
    "prune MODEL --remove 20% --windows 4 --heldout 4 --length 64 --batch 4 --threads 1 "
    "--repair-tokens 4096 -o pruned --json"
)


# -- inputs --------------------------------------------------------------------------------------


def make_inputs(folder: Path, tests: Path, families: list[str]) -> None:
    """Random models with a tokenizer of bytes, two texts, prompts, limits, and GGUF files."""
    sys.path.insert(0, str(tests))
    import zoo
    from conftest import byte_tokenizer

    write_texts(folder)
    ids = byte_tokenizer()((folder / "text.txt").read_text(), return_tensors="pt")["input_ids"][0]
    for family in families:
        wider = {"intermediate_size": 64} if family == "llama" else {}  # for blocks of Q8_0
        model, _ = zoo.tiny(family, vocab_size=259, max_position_embeddings=256, **wider)
        if family in TRAINED:
            train(model, ids)
        out = folder / named(family)
        model.save_pretrained(out, max_shard_size="60KB" if family == "llama" else "1GB")
        byte_tokenizer().save_pretrained(out)
        if family == "llama":
            for kind in ("F32", "Q8_0"):
                write_gguf(folder / f"{out.name}.{kind.lower()}.gguf", model, kind)


def write_texts(folder: Path) -> None:
    for name, seed in (("text.txt", 1), ("other.txt", 2)):
        place = random.Random(seed)
        words = ["".join(place.choices("abcdefghij", k=place.randint(2, 9))) for _ in range(60)]
        text = ". ".join(" ".join(place.choices(words, k=12)) for _ in range(400))
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "prompts.txt").write_text("abc def\nthe block\n", encoding="utf-8")
    (folder / "gate.toml").write_text("[perplexity]\nmax_ratio = 9.0\n", encoding="utf-8")


def train(model: Any, ids: Any) -> None:
    """Have a random model learn its text a little, since a repair keeps only what helps."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        batch = rows[torch.randint(0, len(rows), (16,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def named(family: str) -> str:
    """The model's folder."""
    return re.sub(r"\W", "-", family)


def write_gguf(path: Path, model: Any, kind: str) -> None:
    """A Llama as llama.cpp's converter stores it: matrices in ``kind``, queries and keys with the
    halves of their rotation interleaved."""
    import gguf

    config, weights = model.config, model.state_dict()
    raw = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise ValueError(f"no name in GGUF for {name}")
        for own, heads in (
            ("attn_q", config.num_attention_heads),
            ("attn_k", config.num_key_value_heads),
        ):
            if f".{own}." in new:
                halves = tensor.view(heads, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        values = tensor.float().numpy()
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(new, values)
        else:
            writer.add_tensor(new, gguf.quants.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def commands(families: list[str]) -> list[list[str]]:
    """All command lines, as argument lists."""
    lines: list[list[str]] = []
    for family in families:
        text = EVERY + (REST if family == "llama" else "")
        for line in filter(None, text.splitlines()):
            lines.append([re.sub(r"^M(?=\.|$)", named(family), word) for word in line.split()])
    return lines


# -- running -------------------------------------------------------------------------------------


def environment(build: Path, home: Path) -> dict[str, str]:
    """Of a process of this build: one thread, no network, a cache of its own."""
    return {
        **os.environ,
        "PYTHONPATH": str(build / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SLEB_CACHE": str(home / ".cache"),
        "COLUMNS": "100",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def drive(listing: Path) -> None:
    """Run the listed commands in this process and folder; leave output and exit codes beside."""
    from sleb.cli.main import main

    results = []
    for arguments in json.loads(listing.read_text()):
        out, err, before = io.StringIO(), io.StringIO(), time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(arguments)
            except Exception as error:
                code = 1
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        spent = time.process_time() - before
        results.append((code, out.getvalue(), err.getvalue(), spent))
        sys.stderr.write("." if code == 0 else str(code))
        sys.stderr.flush()
    Path("results.json").write_text(json.dumps(results), encoding="utf-8")
    sys.stderr.write("\n")


def run_build(build: Path, home: Path, inputs: Path, lines: list[list[str]]) -> list[Any]:
    """Execute the commands in the folder ``home``, which links to the inputs."""
    listing, kept = home.with_suffix(".json"), home.with_suffix(".results.json")
    if kept.exists() and listing.read_text() == json.dumps(lines):
        found: list[Any] = json.loads(kept.read_text())
        return found
    kept.unlink(missing_ok=True)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    for path in inputs.iterdir():
        (home / path.name).symlink_to(path)
    listing.write_text(json.dumps(lines))
    subprocess.run(
        [sys.executable, __file__, "--drive", str(listing)],
        cwd=home,
        env=environment(build, home),
        check=True,
    )
    results: list[Any] = json.loads((home / "results.json").read_text())
    (home / "results.json").rename(kept)
    return results


# -- comparing -----------------------------------------------------------------------------------


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested lists and tables, by their dotted path."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and value:
        for i, inner in enumerate(value):
            yield from flat(inner, f"{key}.{i}")
    else:
        yield key, value


def facts_of(raw: Any, name: str) -> Any:
    """A plan or run record as this build reads it; any other JSON as it is. Plans are found at
    any depth."""
    import sleb
    from sleb.record import RunRecord

    if not isinstance(raw, dict):
        return raw
    scratch = Path(name)
    if {"order", "removed", "schema_version"} <= {*raw}:
        (scratch / "plan.json").write_text(json.dumps(raw))
        return sleb.Plan.load(scratch / "plan.json").model_dump(mode="json")
    if {"verification", "removed", "schema_version"} <= {*raw}:
        (scratch / "run.json").write_text(json.dumps(raw))
        record: Any = RunRecord.load(scratch)
        return asdict(record) if is_dataclass(record) else record.model_dump(mode="json")
    return {key: facts_of(value, name) for key, value in raw.items()}


def describe(home: Path, results: list[Any], lines: list[list[str]]) -> dict[str, dict[str, Any]]:
    """Everything that a build has left: what was printed and every file, as facts by key."""
    scratch = home.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for arguments, (code, out, err, _) in zip(lines, results, strict=True):
        facts: dict[str, Any] = {"exit code": code}
        if code:
            facts["error"] = len(err.strip().splitlines())
        if "--json" in arguments and code in (0, 3) and out.strip():
            facts |= flat(facts_of(json.loads(out), str(scratch)))
        found[" ".join(arguments)] = facts
    for path in sorted(home.rglob("*")):
        name = str(path.relative_to(home))
        linked = any((home / part).is_symlink() for part in (Path(name).parts[0],))
        if path.is_file() and not linked and not name.startswith(".cache"):
            found[name] = dict(file_facts(path, str(scratch)))
    return found


def file_facts(path: Path, scratch: str) -> Iterator[tuple[str, Any]]:
    """What is compared of a file."""
    import hashlib

    content = path.read_bytes()
    if path.name in ("plan.json", "run.json", "heal.json") or (
        path.suffix == ".json" and b'"order"' in content
    ):
        yield from flat(facts_of(json.loads(content), scratch))
    elif path.name in ("config.json", "rollback.json"):
        yield from flat(json.loads(content))
    elif path.name == "README.md":
        parts = content.decode().split("---")
        yield "metadata", parts[1] if len(parts) > 2 else ""
    elif path.name == "SHA256SUMS":
        for line in content.decode().splitlines():
            digest, name = line.split(maxsplit=1)
            yield name, digest
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (not a mapping)
                tensor = stored.get_tensor(key)
                raw = tensor.contiguous().flatten().view(dtype=_byte()).numpy().tobytes()
                yield f"tensor {key}", f"{tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
        yield "bytes", hashlib.sha256(content).hexdigest()
    else:
        if path.suffix in (".txt", ".yml"):
            content = re.sub(rb"/\S*/(old|new)(?=/)", b"HOME", content)
        yield "bytes", hashlib.sha256(content).hexdigest()


def _byte() -> Any:
    import torch

    return torch.uint8


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """One line per fact that differs and that no rule allows to."""
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            yield f"{name}: only in the {'new' if name in new else 'old'} build"
            continue
        a, b = old[name], new[name]
        if a.get("exit code") != b.get("exit code"):
            yield f"{name}: exit code {a.get('exit code')} became {b.get('exit code')}"
            continue
        for key in sorted({*a, *b}):
            if a.get(key, "absent") == b.get(key, "absent") or allowed(name, key):
                continue
            yield f"{name}: {key}: {shown(a, key)} became {shown(b, key)}"


def allowed(name: str, key: str) -> bool:
    """Whether a rule says that this may differ."""
    return any(fnmatch.fnmatch(name, n) and fnmatch.fnmatch(key, k) for n, k, _ in INTENDED)


def shown(facts: dict[str, Any], key: str) -> str:
    text = json.dumps(facts[key], default=str) if key in facts else "nothing"
    return text if len(text) < 80 else f"{text[:77]}..."


# -- the real model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """What a process took: CPU seconds and bytes at its peak."""

    seconds: float
    peak: int


def prune_real(build: Path, home: Path, model: str) -> tuple[list[Any], Used]:
    """`sleb prune` on a real model, in a process of its own."""
    home.mkdir(exist_ok=True)
    words = [model if word == "MODEL" else word for word in REAL.split()]
    environ = {**environment(build, home), "SLEB_CACHE": str(home.parent / "cache")}
    out, err = home / "stdout", home / "stderr"
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "sleb", *words, "--force"],
            cwd=home,
            env=environ,
            stdout=stdout,
            stderr=stderr,
        )
        _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    result = [code, out.read_text(), err.read_text(), 0.0]
    out.unlink(), err.unlink()
    if code:
        raise SystemExit(f"{build}: {result[2]}")
    return result, Used(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def compare_real(builds: list[Path], work: Path, model: str, times: int) -> list[str]:
    """Results, and the ratios of CPU time and peak memory, of runs in turn."""
    homes = [work / "real-old", work / "real-new"]
    used: list[list[Used]] = [[], []]
    for turn in range(times + 1):  # the first fills the caches, and is not counted
        for i in (0, 1) if turn % 2 else (1, 0):
            result, took = prune_real(builds[i], homes[i], model)
            (homes[i] / "result.json").write_text(json.dumps([result]))
            if turn:
                used[i].append(took)
                print(f"{['old', 'new'][i]}: {took.seconds:.1f} s, {took.peak / 2**20:.0f} MiB")
    for what in ("seconds", "peak"):
        pairs = zip(*([getattr(u, what) for u in side] for side in used), strict=True)
        ratios = [new / old for old, new in pairs]
        print(f"{what}, new over old: median {statistics.median(ratios):.3f} of {len(ratios)}")
    described = []
    for home in homes:
        results = json.loads((home / "result.json").read_text())
        (home / "result.json").unlink()
        described.append((str(home), results, [REAL.split()]))
    return compare_facts(builds[1], described, work)


def compare_facts(build: Path, sides: list[tuple[str, Any, Any]], work: Path) -> list[str]:
    """The differences, found by the new build, which reads the files of both."""
    job = work / "facts.json"
    job.write_text(json.dumps(sides))
    done = subprocess.run(
        [sys.executable, __file__, "--facts", str(job)],
        env=environment(build, work),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def facts(job: Path) -> None:
    """Print the differences between the two described runs."""
    sides = [describe(Path(h), results, lines) for h, results, lines in json.loads(job.read_text())]
    for line in differences(*sides):
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?", default=Path())
    parser.add_argument("--only", help="architectures, with commas between")
    parser.add_argument("--model", help="a real model to prune as well")
    parser.add_argument("--times", type=int, default=3, help="how often, with --model")
    parser.add_argument("--slowest", action="store_true", help="list the slowest commands")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for all that is written; what the old build left in it is used again",
    )
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--facts", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        drive(given.drive)
        return 0
    if given.facts:
        facts(given.facts)
        return 0
    if given.old is None:
        parser.error("give the old build's checkout")
    work = given.work or Path(tempfile.mkdtemp(prefix="compare-builds-"))
    work.mkdir(exist_ok=True)
    work, builds = work.resolve(), [given.old.resolve(), given.new.resolve()]
    families = given.only.split(",") if given.only else FAMILIES
    inputs = work / "inputs"
    (work / "new.results.json").unlink(missing_ok=True)
    if not inputs.exists():
        inputs.mkdir()
        make_inputs(inputs, builds[1] / "tests", families)
    lines = commands(families)
    sides, spent, timed = [], [], []
    for name, build in zip(("old", "new"), builds, strict=True):
        results = run_build(build, work / name, inputs, lines)
        spent.append(sum(r[3] for r in results))
        for line, (code, _, err, took) in zip(lines, results, strict=True):
            timed.append((round(took, 1), name, " ".join(line)))
            if code:
                print(f"{name}: exit {code}: sleb {' '.join(line)}: {err.strip()[-300:]}")
        sides.append((str(work / name), results, lines))
    found = compare_facts(builds[1], sides, work)
    if given.model:
        found += compare_real(builds, work, str(Path(given.model).resolve()), given.times)
    for line in found:
        print(line)
    if given.slowest:
        for row in sorted(timed, reverse=True)[:20]:
            print(*row)
    print(
        f"{len(lines)} commands on {len(families)} architectures: {len(found)} differences "
        f"({spent[0]:.0f} s and {spent[1]:.0f} s of CPU time; files in {work})"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
