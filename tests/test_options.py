"""Every option of every verb: declared once, the same everywhere, and used or refused."""

import json
from dataclasses import asdict

import pytest

import sleb
import sleb.config as config_module
import sleb.project as project_module
from cli_tools import COMMANDS, run
from sleb.cli import verbs
from sleb.cli.main import main
from sleb.config import InputError, LoadOptions, Options, PruneConfig, SearchConfig, takes
from sleb.project import Project
from sleb.project_file import ELSEWHERE
from sleb.selection.goal import Goal

BY_NAME = {verb.name: verb for verb in verbs.VERBS}
every_verb = pytest.mark.parametrize("verb", BY_NAME)
GIVEN = {  # what a verb needs to be called, beside the option that is tried
    "apply": "plan.json MODEL -o new",
    "bench": "MODEL OUT",
    "compare": "MODEL OUT --prompts prompts.txt",
    "demo": "",
    "export": "plan.json --as mergekit",
    "heal": "OUT --model MODEL -o new",
    "init": "-o new.toml",
    "prune": "MODEL --remove 2 -o new",
    "push": "OUT me/it",
    "quantize": "MODEL -o new",
    "report": "OUT",
    "restore": "OUT -o new",
    "run": "sleb.toml",
    "search": "MODEL --remove 2 -o new.json",
    "transfer": "MODEL --remove 2 --text a=default --text b=default",
    "verify": "OUT --model MODEL",
}


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_plan):
    """A folder with a plan and a checkpoint's name, and no model: nothing is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    for name in ("OUT/run.json", "prompts.txt", "sleb.toml"):
        (tmp_path / name).touch()
    (tmp_path / "sleb.toml").write_text(
        'model = "m/m"\nout = "o"\n[text]\na = "default"\n[search]\nremove = 2\n'
    )
    for name in ("plan.json", "OUT/plan.json"):
        tiny_plan.save(tmp_path / name)
    return tmp_path


@pytest.fixture
def called(monkeypatch):
    """What a command calls the public function with; None if it was refused before."""

    def call(*line: str):
        found: list[dict] = []

        def spy(**values):
            found.append({k: v for k, v in values.items() if k not in ("progress", "command")})
            raise InputError("called")

        monkeypatch.setattr(verbs.Verb, "function", property(lambda verb: spy))
        code = main([*line])
        assert code == 2
        return found[0] if found else None

    return call


def parameter(verb: str, name: str):
    (found,) = (p for p in COMMANDS[verb].params if p.name == name)
    return found


def words(verb: str, name: str) -> list[str]:
    """The option on a command line, with a value that is not its default."""
    found = parameter(verb, name)
    if found.is_flag:
        return [found.secondary_opts[0] if found.default else found.opts[0]]
    return [found.opts[0], "3"]


@every_verb
def test_the_command_line_has_the_defaults_of_the_declaration(verb):
    for name, field in BY_NAME[verb].options.model_fields.items():
        shown = parameter(verb, name)
        assert shown.help == field.description
        assert shown.default == (None if field.default == () else field.default)


@every_verb
def test_every_option_changes_the_call_or_is_refused(place, called, verb):
    given = [verb, *GIVEN.get(verb, "MODEL").split()]
    before = called(*given)
    assert before is not None
    own = [a.name for a in BY_NAME[verb].arguments if a.flag and a.name != "record"]
    for name in [*BY_NAME[verb].options.model_fields, *own]:
        option, line = words(verb, name), list(given)
        for same in (option[0], "-o" if option[0] == "--out" else ""):  # it must be given
            if same in line:
                del line[line.index(same) : line.index(same) + 2]
        after = called(*line, *option)
        assert after is None or after[name] != before[name], name
        assert after is None or {**after, name: 0} == {**before, name: 0}, name


def test_a_field_is_declared_in_one_class():
    """Verbs that share an option share its group, or say with `like` whose it is."""
    homes: dict[str, set[str]] = {}
    for kind in vars(config_module).values():
        if isinstance(kind, type) and issubclass(kind, Options):
            for name in vars(kind).get("__annotations__", {}):
                if not config_module.declared(kind, name).get("group"):
                    homes.setdefault(name, set()).add(kind.__name__)
    own = {"repair", "heldout", "batch"}  # another meaning in apply and heal
    assert {name for name, found in homes.items() if len(found) > 1} <= own


VALUES = {
    "device": "cpu", "device_map": "auto", "dtype": "float32", "keep_answers": 0.9,
    "loss_on": "all",
    "max_loss_increase": 0.1,
    "max_memory": "1GB", "max_prompts": 19, "metric": "kl", "min_similarity": 0.5,
    "prompts": ["none"], "protect": "0", "repair": False, "size": "1MB", "speedup": 1.5,
    "save": "memory", "strategy": "beam", "unit": "attention",
}  # fmt: skip
IN_FILE = [n for n in PruneConfig.model_fields if n not in ELSEWHERE]


@pytest.mark.parametrize("name", IN_FILE)
@pytest.mark.parametrize("above", [False, True])
def test_every_option_of_prune_stands_in_the_project_file_and_is_handed_on(
    tmp_path, monkeypatch, name, above
):
    if above and name not in LoadOptions.model_fields:
        return
    default = PruneConfig.model_fields[name].default
    value = VALUES.get(name, not default if isinstance(default, bool) else 3)

    def project(top: str = "", search: str = "") -> Project:
        target = "" if name in Goal.__dataclass_fields__ and search else "remove = 2\n"
        target += 'unit = "mlp"\n' if name == "save" else ""  # of parts alone
        file = tmp_path / "sleb.toml"
        file.write_text(
            f'model = "m"\nout = "o"\n{top}[text]\na = "default"\n[search]\n{target}{search}'
        )
        return Project.load(file)

    line = f"{name} = {json.dumps(value)}\n"
    before, after = project(), project(line) if above else project(search=line)
    told = tuple(value) if isinstance(value, list) else value
    assert getattr(after.search, name) == told != getattr(before.search, name)
    assert after.keys()["prune"] != before.keys()["prune"]
    calls = []
    monkeypatch.setattr(project_module, "prune", lambda *a, **k: calls.append(k) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        project_module._pruned(after, "key", False, lambda *a: None)
    assert calls[0][name] == told
    assert calls[0]["curve"] is True


SMALL = {"windows": 4, "length": 16, "dtype": "float32", "device": "cpu"}
FLAGS = [word for k, v in SMALL.items() for word in (f"--{k}", str(v))]


def test_python_gives_what_the_command_line_gives(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(tiny_dir)

    def told(*line) -> dict:
        ran = run(capsys, *line)
        assert ran.code == 0, ran.err
        return ran.json

    found = sleb.similarity(model, **SMALL)
    assert json.loads(json.dumps(asdict(found), default=lambda a: a.tolist())) == told(
        "similarity", model, *FLAGS, "--json"
    )
    plan = sleb.search(model, SearchConfig(remove=2, **SMALL), out="ours.json")
    assert json.loads(plan.to_json()) == told(
        "search", model, "--remove", 2, *FLAGS, "-o", "plan.json", "--json"
    )
    assert (tmp_path / "ours.json").read_text() == (tmp_path / "plan.json").read_text()
    told("apply", "plan.json", model, "-o", "theirs", "--json")
    ours = sleb.apply("ours.json", model, tmp_path / "ours")
    for path in (tmp_path / "theirs").iterdir():
        assert path.is_dir() or path.read_bytes() == (ours / path.name).read_bytes()
    measured = sleb.evaluate(model, plan=ours / "plan.json", **SMALL)
    assert json.loads(json.dumps(asdict(measured))) == told(
        "eval", model, "--plan", "theirs/plan.json", *FLAGS, "--json"
    )
    assert run(capsys, "export", "plan.json", "--as", "layer-map").out == (
        sleb.export("plan.json", "layer-map").text
    )
    assert sleb.verify(ours, model=model).passed


def test_keywords_and_a_config_are_one_call():
    @takes(SearchConfig)
    def called(model, config, *, other=0):
        return model, config, other

    wanted = ("m", SearchConfig(remove=6, seed=2), 1)
    assert called("m", remove=6, seed=2, other=1) == wanted
    assert called("m", SearchConfig(remove=5, seed=2), remove=6, other=1) == wanted
    with pytest.raises(InputError, match=r"no option remov .*'remove'"):
        SearchConfig.of({"remov": 3})
    with pytest.raises(InputError, match="--windows 0"):
        called("m", windows=0)
