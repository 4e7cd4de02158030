"""The model card of a cut: valid metadata whatever the original's card holds, and provenance."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st

from report_plan import plan
from report_tools import complete, put
from sleb.core.card import cut_card, front_matter, inherited, with_section
from sleb.core.printable import printable
from sleb.views.card import model_card

HOSTILE = [
    "---\nlicense: !!python/object/apply:os.system ['touch /tmp/owned']\n---\n",
    "---\nlicense: {a: [b]}\nlanguage: {x: y}\n---\n",
    '---\nlicense: "mit\\n---\\n# owned"\nlicense_name: "a\\n---\\nb"\n---\n',
    "---\nlicense: mit\nlicense_link: 'javascript:alert(1)'\n---\n",
    "---\nlicense: mit\nlicense_link: ../../secret\n---\n",
    "---\nlicense: mit\nlicense_name: 'x: [unclosed'\n---\n",
    "---\nlicense: mit\nlicense_name: '<script>alert(1)</script>'\n---\n",
    f"---\nlicense: {'m' * 5000}\nlanguage: [{'e' * 5000}, 5, null, true]\n---\n",
    "---\nlicense: &a [*a]\n---\n",
    "---\n" + "[" * 5000 + "\n---\n",
    "---\nlicense: 2026-01-01\nlanguage: 1.5\n---\n",
    "---\n- a\n- b\n---\n",
    "no card at all",
]


@pytest.mark.parametrize("card", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_card_gives_valid_metadata(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    text = front_matter(tmp_path, "someone/small")
    lines = text.splitlines()
    assert (lines[0], lines[-1], lines.count("---")) == ("---", "---", 2)
    found = yaml.safe_load("\n".join(lines[1:-1]))
    assert found["base_model"] == "someone/small"
    assert found["tags"] == ["sleb", "pruned", "block-pruning"]
    assert set(found) <= {
        "base_model", "base_model_relation", "tags", "library_name", "pipeline_tag", "license",
        "license_name", "license_link", "language",
    }  # fmt: skip
    assert found.get("license", "mit") == "mit"
    assert "script" not in found.get("license_link", "")
    assert ".." not in found.get("license_link", "")
    assert ModelCard(text + "\n# x\n").data.base_model == "someone/small"
    assert not Path("/tmp/owned").exists()


@settings(max_examples=40)
@given(st.dictionaries(
    st.sampled_from(["license", "license_name", "license_link", "language"]),
    st.recursive(st.text(max_size=30) | st.none() | st.booleans() | st.integers(),
                 lambda inner: st.lists(inner, max_size=3)),
))  # fmt: skip
def test_any_metadata_gives_a_card_that_reads_back(tmp_path, data):
    (tmp_path / "README.md").write_text(
        f"---\n{yaml.safe_dump(data, allow_unicode=True)}---\n# x\n", encoding="utf-8", newline=""
    )
    kept = inherited(tmp_path)
    (tmp_path / "new.md").write_text(front_matter(tmp_path) + "\n# y\n", encoding="utf-8")
    found = metadata_load(tmp_path / "new.md")
    assert {key: found.get(key) for key in kept} == kept
    assert set(found) - set(kept) == {"library_name", "pipeline_tag", "tags"}


def test_licence_and_language_go_on(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE.txt\n"
        "language: [en, no, zh-Hant]\n---\n"
    )
    assert inherited(tmp_path) == {
        "license": "other", "license_name": "llama3.2", "license_link": "LICENSE.txt",
        "language": ["en", "no", "zh-Hant"],
    }  # fmt: skip
    (tmp_path / "README.md").write_text("---\nlicense: [Apache-2.0]\nlanguage: ja\n---\n")
    assert inherited(tmp_path) == {"license": "apache-2.0", "language": ["ja"]}


def test_a_licence_file_speaks_where_the_card_does_not(tmp_path):
    (tmp_path / "LICENCE.md").write_text("terms")
    assert inherited(tmp_path) == {
        "license": "other", "license_name": "see-license-file", "license_link": "LICENCE.md"
    }  # fmt: skip


def test_the_base_model_is_a_name_on_the_hub_or_none(tmp_path, monkeypatch):
    def base(source: Path, model: str | None) -> object:
        return yaml.safe_load(front_matter(source, model).strip("-\n")).get("base_model")

    assert base(tmp_path, "someone/small") == "someone/small"
    assert base(tmp_path, str(tmp_path)) is None
    assert base(tmp_path, "/gone/model") is None
    assert base(tmp_path, "a/b: c") is None
    snapshot = tmp_path / "models--someone--big--one" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert base(snapshot, str(snapshot)) == "someone/big--one"
    assert base(snapshot, None) == "someone/big--one"


def test_a_code_block_cannot_be_ended_from_inside(tiny_plan, tmp_path):
    command = "sleb prune 'a```b'\n```\n# owned"
    card = cut_card(tiny_plan, tmp_path, command=command)
    assert f"````\n{printable(command)}\n````\n" in card


def test_a_section_says_that_what_stands_above_is_of_before(tmp_path):
    assert with_section(tmp_path, "Healed", ["done"]) == "## Healed\n\ndone\n"
    (tmp_path / "README.md").write_text("# cut\n\n")
    card = with_section(tmp_path, "Healed", ["done"])
    assert card.startswith("# cut\n\n## Healed\n\nWhat is said above")
    assert card.endswith("done\n")


def test_the_card_names_no_folder_of_its_author(tmp_path):
    home = "/home/me/My work"
    command = f"sleb prune '{home}/clerk' --text 'mail={home}/m.jsonl' --text=/data/b.txt -o ~/out"
    record = complete(command=command, model=f"{home}/clerk")
    for path, new in {
        "prompts.source": "/home/me/p.jsonl, C:\\me\\q.jsonl",
        "evaluation_text.source": "given",
        "evaluation_text.texts": ("/home/me/a.jsonl", "b.txt"),
        "speed.models.0.path": "/home/me/clerk",
        "draft.drafts.0.path": "/home/me/small",
    }.items():
        record = put(record, path, new)
    card = model_card(plan(), record, tmp_path)
    for told in ("home", "My work", "/data", "~", "me\\"):
        assert told not in card, told
    assert "\nsleb prune clerk --text mail=m.jsonl --text=b.txt -o out\n" in card
    assert "a.jsonl, b.txt" in card
    assert "https://huggingface.co" in model_card(plan(), complete(model="a/b"), tmp_path)


def test_what_was_measured_is_the_model_index_of_the_card_alone(tmp_path):
    """The hub's own reader gets every figure of the record back; a section on what was done since
    takes them out."""
    record = complete(model="a/clerk-1b")
    (tmp_path / "README.md").write_text(model_card(plan(), record, tmp_path), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == Path(record.verification.checkpoint).name != "clerk-1b"
    read = data.eval_results
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in read}
    domains = record.evaluation.domains.items()
    expected = {(name, "perplexity"): q.pruned_perplexity.value for name, q in domains}
    expected[f"prompts: {record.prompts.source}", "agreement"] = record.prompts.agreement.value
    expected |= {(task.name, task.metric): task.pruned.value for task in record.tasks}
    assert found == {key: round(value, 4) for key, value in expected.items()}
    text = with_section(tmp_path, "Quantized", ["it was"])
    assert ModelCard(text).data.eval_results is None
    assert ModelCard(text).data.base_model == "a/clerk-1b"
    assert "\n## Quantized\n" in text
