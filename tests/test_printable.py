"""Text from files is shown only through one function: hostile text behind every door."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_tools import run
from gguf_tools import plan_of, write_tiny
from report_tools import hostile as hostile_record
from report_tools import html
from sleb.core.errors import SlebError
from sleb.core.printable import LONGEST_MESSAGE, printable, printable_json
from sleb.views.card import model_card

FORBIDDEN = set(map(chr, [*range(32), *range(127, 160), *range(0xD800, 0xE000)]))
FORBIDDEN |= set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FORBIDDEN |= set("\u2028\u2029\u200b\ufeff")
ESCAPES = "\x1b[2J\x1b[31mPASSED\x1b]0;owned\x07"
HOSTILE = {
    "escapes": ESCAPES,
    "carriage return": "good\rpassed",
    "lines": "a\nsleb: all checks passed\n",
    "bidi": "\u202egate\u2066",
    "separators": "a\u2028b\u0085c\x9b31m",
    "long": "x" * 2**20,
}
EVERY_KIND = "".join(text for name, text in HOSTILE.items() if name != "long")
each = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
hostile = pytest.mark.parametrize("text", [EVERY_KIND, HOSTILE["long"]], ids=["controls", "long"])


def harmless(text: str, longest: int = 12_000) -> None:
    """No character that a terminal obeys, but for the ends of lines, which are not very long."""
    for line in text.split("\n"):
        assert not FORBIDDEN & set(line), ascii(line[:300])
        assert len(line) <= longest
    assert "\nsleb: all gates" not in text


@given(st.text(st.characters(exclude_categories=())) | st.binary().map(lambda b: b.decode("latin")))
def test_what_is_printable_is_harmless_and_short(text):
    shown = printable(text, 50)
    assert not FORBIDDEN & set(shown)
    assert len(shown) <= 50
    shown.encode()
    assert printable(shown, 50) == shown
    if len(text) <= 50 and not FORBIDDEN & set(text) and text.isprintable():
        assert shown == text


@given(st.recursive(st.text(st.characters(exclude_categories=())), lambda s: st.lists(s)))
def test_printable_json_is_the_same_json(value):
    text = printable_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == value
    assert not (FORBIDDEN - {"\n"}) & set(text)


def test_controls_are_shown_as_escapes_and_the_end_is_kept_where_asked():
    assert printable("a\x1b[1m\u202e\U000e0041") == "a\\x1b[1m\\u202e\\U000e0041"
    assert printable("日本 été ‌") == "日本 été ‌"
    assert printable("a\nb\tc\r", lines=True) == "a\nb\tc\\x0d"
    assert printable("abcdefgh" * 9, 10, ending=3) == "abcdef…fgh"
    assert printable("x" * 999, None) == "x" * 999


@each
def test_every_error_is_one_harmless_line(text):
    message = str(SlebError(f"no {text} here; try another"))
    harmless(message, LONGEST_MESSAGE)
    assert "\n" not in message
    assert message.endswith("try another")


def told(capsys, *arguments) -> None:
    """Run a command that may go well or fail as a mistake does: all it says is harmless."""
    ran = run(capsys, *arguments)
    assert ran.code in (0, 2, 3, 4, 5, 6), ran.err[:500]
    harmless(ran.out, sys.maxsize if "--json" in arguments else 12_000)  # facts are whole
    harmless(ran.err)
    if ran.code not in (0, 3, 4):
        assert ran.out == ""
        assert len(ran.err.splitlines()) == 1, ran.err[:500]


def change(path: Path, *keys, value, add: str | None = None) -> None:
    """Set a value inside a JSON file, or ``add`` a key with it there."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[: None if add is not None else -1]:
        inner = inner[key]
    inner[keys[-1] if add is None else add] = value
    path.write_text(json.dumps(content))


@pytest.fixture
def here(place, tiny_dir) -> Path:
    """A plan, and a model that may be spoilt."""
    shutil.copytree(tiny_dir, place / "copy")
    return place


PLAN = {
    "key": ((), True),
    "key inside": (("model",), True),
    "metric": (("metric",), False),
    "strategy": (("strategy",), False),
    "unit": (("unit",), False),
    "architecture": (("model", "architecture"), False),
    "version": (("versions",), True),
    "source": (("calibration", "sources", 0, "spec"), False),
}


@hostile
@pytest.mark.parametrize(("keys", "added"), PLAN.values(), ids=PLAN)
def test_from_a_plan(here, capsys, text, keys, added):
    change(here / "plan.json", *keys, value=text, add=text if added else None)
    told(capsys, "export", "plan.json", "--as", "layer-map")
    told(capsys, "export", "plan.json", "--as", "mergekit", "--model", "MODEL")
    told(capsys, "apply", "plan.json", "MODEL", "-o", "OUT")
    if (here / "OUT").exists():
        harmless((here / "OUT/README.md").read_text())
        told(capsys, "verify", "OUT", "--model", "MODEL")


CONFIG = {
    "model type": (("model_type",), False),
    "architecture": (("architectures",), False),
    "dtype": (("dtype",), False),
    "activation": (("hidden_act",), False),
    "key": ((), True),
}


@hostile
@pytest.mark.parametrize(("keys", "added"), CONFIG.values(), ids=CONFIG)
def test_from_a_config(here, capsys, text, keys, added):
    value = [text] * 6 if added else [text] if keys == ("architectures",) else text
    change(here / "copy/config.json", *keys, value=value, add=text if added else None)
    told(capsys, "inspect", "copy")
    told(capsys, "inspect", "copy", "--json")
    told(capsys, "apply", "plan.json", "copy", "-o", "OUT")


@hostile
def test_from_a_tokenizer(here, capsys, text):
    options = ("--windows", "2", "--length", "16", "--text", "text.txt")
    (here / "text.txt").write_text("a few words " * 20)
    change(here / "copy/tokenizer_config.json", value=text, add="tokenizer_class")
    told(capsys, "eval", "copy", *options)
    change(here / "copy/tokenizer.json", "model", "type", value=text)
    told(capsys, "eval", "copy", *options)


@pytest.mark.parametrize("text", [EVERY_KIND, "x" * 200], ids=["controls", "long"])
def test_from_names_of_files_and_from_arguments(here, capsys, text):
    told(capsys, "inspect", text)
    told(capsys, "apply", text, "MODEL", "-o", "OUT")
    os.rename("copy", text)
    told(capsys, "inspect", text)
    told(capsys, "inspect", text, "--json")
    os.rename(text, "copy")
    told(capsys, "search", "MODEL", "--remove", text)
    told(capsys, "search", "MODEL", "--remove", "1", "--text", text)
    told(capsys, "search", "MODEL", "--remove", "1", "--metric", text)
    told(capsys, "search", "MODEL", "--remove", "1", "--protect", text)
    told(capsys, "search", "MODEL", "--remove", "1", "--device", text)
    told(capsys, "search", "MODEL", f"--{text}")
    told(capsys, text)
    shutil.copy("plan.json", text)
    told(capsys, "apply", text, "MODEL", "-o", "OUT")
    if (here / "OUT").exists():
        harmless((here / "OUT/README.md").read_text())


@hostile
def test_from_weights(here, capsys, text):
    weights = here / "copy/model.safetensors"
    raw = weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for old in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        new = {(text + name if name == old else name): info for name, info in header.items()}
        changed = json.dumps(new).encode()
        weights.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + size :])
        told(capsys, "inspect", "copy")
        told(capsys, "apply", "plan.json", "copy", "-o", "OUT")
        told(capsys, "verify", "copy", "--model", "MODEL", "--plan", "plan.json")
    index = {"metadata": {}, "weight_map": dict.fromkeys(header, text)}
    (here / "copy/model.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    told(capsys, "inspect", "copy")


@hostile
@pytest.mark.parametrize("where", ["architecture", "key", "value"])
def test_from_a_gguf_file(here, capsys, text, where):
    if where == "architecture":
        write_tiny(here / "m.gguf", architecture=text[:60000])
    else:
        text = text[:60000]
        added = {f"llama.{text}": [1] * 8} if where == "key" else {"general.name": text}
        write_tiny(here / "m.gguf", last=added)
    plan_of("llama", 8, 3, 1).save(here / "gguf.json")
    told(capsys, "inspect", "m.gguf")
    told(capsys, "apply", "gguf.json", "m.gguf", "-o", "cut.gguf", "--other-weights")


@hostile
def test_from_checksums_and_a_side_car(here, capsys, text):
    assert run(capsys, "apply", "plan.json", "MODEL", "-o", "OUT").code == 0
    sums = here / "OUT/SHA256SUMS"
    kept = sums.read_text()
    sums.write_text(f"{kept}{'0' * 64}  {text}\n", encoding="utf-8")
    told(capsys, "restore", "OUT", "-o", "BACK")
    sums.write_text(kept)
    change(here / "OUT/rollback/rollback.json", value=text, add=text)
    told(capsys, "restore", "OUT", "-o", "BACK")


@hostile
def test_from_settings_and_prompts(here, capsys, text):
    quoted = json.dumps(text[:60000])
    (here / "sleb.toml").write_text(f'model = "MODEL"\nout = "OUT"\n[search]\n{quoted} = 1\n')
    told(capsys, "run", "sleb.toml")
    (here / "sleb.toml").write_text(f"model = {quoted}\nout = {quoted}\n[search]\nremove = 1\n")
    told(capsys, "run", "sleb.toml")
    (here / "prompts.jsonl").write_text(json.dumps({text: text}))
    told(capsys, "compare", "MODEL", "MODEL", "--prompts", "prompts.jsonl")
    (here / "gate.toml").write_text(f"[perplexity]\n{quoted} = 1\n")
    told(capsys, "verify", "MODEL", "--model", "MODEL", "--gate", "gate.toml")
    (here / "rows.jsonl").write_text(json.dumps({text: text}))
    told(capsys, "search", "MODEL", "--remove", "1", "--text", "rows.jsonl")


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_from_a_record_on_the_page_and_in_the_card(tmp_path, tiny_dir, lang):
    record, plan = hostile_record(EVERY_KIND, EVERY_KIND)
    record = replace(record, environment={**record.environment, "dtype": EVERY_KIND})
    assert not (FORBIDDEN - {"\n"}) & set(html(record, plan, lang))
    harmless(model_card(plan, record, tiny_dir), sys.maxsize)
