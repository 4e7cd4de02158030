"""Fixtures: a tiny Llama with a byte tokenizer on disk, and the real model where make put it."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in each run; `make test-random` looks for others. A busy machine is no failure,
# and a folder that examples share is written anew by each.
usual = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("fixed", derandomize=True, database=None, **usual)
settings.register_profile("random", print_blob=True, **usual)
settings.load_profile("fixed")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BLOCKS = 6


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What the libraries hold by now stays: collecting garbage, as is done between two models, need
    not walk through half a million objects each time."""
    gc.collect()
    gc.freeze()


def byte_tokenizer(*more):
    """One token per byte (ids 3..258), plus <pad>, <s>, </s>, and ``more`` in its vocabulary, which
    no text is read as; adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet, *more])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_llama(blocks: int = BLOCKS, seed: int = 0, width: int = 48, **options):
    """A random Llama whose blocks matter: weights drawn with a standard deviation of 0.15."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model


def save_tiny(path: Path, **options) -> Path:
    """Save a tiny Llama and its tokenizer; ``shard`` is a shard size such as ``"20KB"``."""
    shard = options.pop("shard", "1GB")
    model = tiny_llama(**options)
    model.save_pretrained(path, max_shard_size=shard)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def unhurried(tmp_path_factory) -> Iterator[None]:
    """What is kept for later runs is not the user's own; a long text, such as the one that comes
    with sleb, is tokenized once for each tokenizer, not for each command; transformers writes no
    config into its log; and a slow machine has no more to say than a fast one."""
    from transformers import PreTrainedConfig

    from sleb.calibration import tokens
    from sleb.core import display as progress
    from sleb.core.errors import SHELL

    known: dict[tuple[str, ...], list[list[int]]] = {}
    encoded = tokens._encoded

    def remembered(tokenizer, texts: list[str], **options) -> list[list[int]]:
        if sum(map(len, texts)) < 2**16 or not hasattr(tokenizer, "backend_tokenizer"):
            return encoded(tokenizer, texts, **options)
        key = (tokenizer.backend_tokenizer.to_str(), *texts)
        if key not in known:
            known[key] = encoded(tokenizer, texts, **options)
        return known[key]

    SHELL.set(True)  # tests read messages as they are written, see test_notebook.py
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:  # all workers convert the real model once
            folder = folder.parent
        patch.setenv("SLEB_CACHE", str(folder / "cache"))
        patch.setattr(tokens, "_encoded", remembered)
        patch.setattr(PreTrainedConfig, "__repr__", object.__repr__)
        patch.setattr(progress, "QUIET_S", 600.0)
        patch.setattr(progress, "BRIEF_S", float("inf"))
        yield


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A checkpoint of 6 blocks in one file. Read it, never write to it."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def teach(model, ids, *, steps: int, generator) -> None:
    """Train on windows of 32 of the token ids [L]."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    for _ in range(steps):
        batch = rows[torch.randint(0, len(rows), (16,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> Path:
    """A tiny model that has learned its text, so that losses mean something; and that text."""
    import torch

    folder = tmp_path_factory.mktemp("learned")
    words = (
        "the block of a model passes its input through",
        "and nothing at all is lost",
        "for ever",
    )
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, 3, (1500,), generator=generator).tolist()
    (folder / "text.txt").write_text(". ".join(words[i] for i in picks))
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer((folder / "text.txt").read_text())["input_ids"])
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    teach(model, ids, steps=120, generator=generator)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def tiny_plan(tiny_dir):
    """A plan that removes 3 of the tiny model's 6 blocks."""
    import sleb

    return sleb.search(tiny_dir, remove=3, windows=4, length=16, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def cut(tiny_dir, tiny_plan, tmp_path_factory) -> Path:
    """The tiny model without the 3 blocks of the plan. Read it, never write to it."""
    import sleb

    return sleb.apply(tiny_plan, tiny_dir, tmp_path_factory.mktemp("cut") / "out")


@pytest.fixture(scope="module")
def loaded(tiny_dir):
    """The tiny model, loaded."""
    import sleb

    return sleb.load(tiny_dir, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def loaded_learned(learned):
    """The model that has learned its text, loaded."""
    import sleb

    return sleb.load(learned / "model", dtype="float32", device="cpu")


@pytest.fixture
def place(tiny_dir, tiny_plan, tmp_path, monkeypatch) -> Path:
    """A working folder with the tiny model in ``MODEL``, a link, and a plan for it."""
    (tmp_path / "MODEL").symlink_to(tiny_dir)
    tiny_plan.save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def real_model() -> str:
    """SmolLM2-135M-Instruct as GGUF, from SLEB_TEST_MODEL (`make test` sets it)."""
    path = os.environ.get("SLEB_TEST_MODEL", "")
    if not path:
        pytest.skip("SLEB_TEST_MODEL is not set; `make test` sets it")
    return str(Path(path).absolute())


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """4 kB of text: 4,096 tokens for the byte tokenizer."""
    words = "the block of a model passes its input through and nothing is lost "
    path = tmp_path / "text.txt"
    path.write_text((words * 70)[:4096], encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Write a file into an empty working folder; gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write
