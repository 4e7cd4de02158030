"""Resolve MODEL, as a user writes it, to a checkpoint folder on disk.

MODEL is a folder, a hub id (``org/name`` or ``org/name@revision``), or a .gguf file. A GGUF file is
dequantized to bfloat16 once, into a cache keyed by the file's hash, because parsing its vocabulary
takes transformers half a minute.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sleb.checkpoints.checkpoint import refuse_plan_alone, shard_names
from sleb.checkpoints.gguf_fields import refuse_parts
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import (
    SAID,
    DataError,
    InputError,
    ResourceError,
    UnsupportedModel,
    did_you_mean,
    map_exceptions,
)
from sleb.core.files import file_sha256, staged_dir
from sleb.core.progress import Progress, silent
from sleb.models.gguf_source import check_tensors, correct_tokens, corrections, parsed_once

logger = logging.getLogger(__name__)

CONVERSION = 3
"""Version of what is made of a GGUF file; those of earlier ones are not used again."""

# Weights as they are named by their writers; others are fetched when an index names them. Not those
# of other formats beside them, nor a second copy in a folder.
HUB_FILES = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """``ref`` as the user wrote it, and the folder that holds its weights."""

    ref: str
    path: Path
    is_gguf: bool = False


def called(ref: str | Path) -> str:
    """What a model is called where it is only named: the last part of a path or hub id."""
    return Path(ref).name or str(ref)


def cache_dir() -> Path:
    """Where converted models are kept: ``$SLEB_CACHE``, else ``~/.cache/sleb``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SLEB_CACHE") or Path(base) / "sleb").expanduser()


@dataclass(frozen=True)
class _OnHub:
    """A repository, what of it is asked for, and what may have been meant if there is none."""

    repo: str
    revision: str | None
    hint: str


def resolve(ref: str | Path, progress: Progress = silent) -> ModelSource:
    """Find the checkpoint folder for ``ref``, fetching or converting it if need be.

    Raises:
        InputError: no such folder, file or hub id, or not a model.
        DataError: the GGUF file is corrupt.
        ResourceError: the hub cannot be reached, or the disk is full.
    """
    ref = str(ref)
    found = find(ref)
    if isinstance(found, Path):
        if found.is_dir():
            return ModelSource(ref=ref, path=found)
        return ModelSource(ref=ref, path=_dequantized(found, progress), is_gguf=True)
    folder = _from_hub(found.repo, found.revision, HUB_FILES, found.hint)
    if lacking := [name for name in shard_names(folder) if not (folder / name).exists()]:
        _from_hub(found.repo, found.revision, lacking, found.hint)
    return ModelSource(ref=ref, path=folder)


def find(ref: str) -> Path | _OnHub:
    """Where ``ref`` is: a checkpoint folder or a .gguf file on this disk, or a repository. Reads
    nothing and fetches nothing.

    Raises:
        InputError: there is no such folder or file, and it is no name of a repository either.
    """
    if not ref:
        raise InputError("MODEL is empty; give a folder, a hub id or a .gguf file")
    path = Path(ref).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{ref} is an adapter (PEFT); merge it into its base model first")
        if not (path / "config.json").is_file():
            refuse_plan_alone(path)
            raise InputError(f"{ref} has no config.json: not a Hugging Face checkpoint")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{ref} is a file; MODEL is a folder, a hub id or a .gguf file")
        return path
    here, _, revision = ref.rpartition("@")
    if here and Path(here).expanduser().exists():
        raise InputError(
            f"{here} is on this disk, and only a model on the hub has revisions: give it without "
            f"{revision}"
        )
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings)
    on_hub = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", ref)
    if path.suffix == ".gguf" or not on_hub or ref[0] in "./~":
        raise InputError(f"no model at {ref}{hint}; check the path")
    return _OnHub(on_hub[1], on_hub[2], hint)


def _from_hub(repo: str, revision: str | None, files: list[str], hint: str) -> Path:
    """The snapshot of ``repo`` at ``revision`` (a branch, tag or commit), with these ``files``."""
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # in offline mode a commit that is in the cache is asked for on the network otherwise
    where: dict[str, Any] = {"revision": revision, "local_files_only": is_offline_mode()}
    try:
        return Path(snapshot_download(repo, allow_patterns=files, **where))  # draws its own bars
    except RevisionNotFoundError:
        raise InputError(
            f"{repo} has no revision {revision} on the hub; give a branch, tag or commit"
        ) from None
    except GatedRepoError:
        raise InputError(
            f"{repo} is gated: accept its terms on the hub, then `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"no folder named {repo} here{hint} and no such model on the hub; check the name, and "
            "for a private model log in with: hf auth login"
        ) from None
    except Exception as error:  # the errors of the client's transports share no base
        if _disk_is_full(error):
            raise ResourceError(
                f"disk full while fetching {repo}; free some space and repeat the command"
            ) from None
        raise ResourceError(
            f"no folder named {repo} here{hint}, and the hub cannot be reached for it "
            f"({type(error).__name__}); check the path or the network"
        ) from None


def _disk_is_full(error: Exception) -> bool:
    """Also for the errors of Rust libraries, which tell only in their text."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)


def _dequantized(path: Path, progress: Progress) -> Path:
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise DataError(f"{path} does not start as a GGUF file: fetch it again")
    out = cache_dir() / "gguf" / f"{file_sha256(path)[:32]}-{CONVERSION}"
    if not (out / "config.json").is_file():
        logger.info("dequantizing %s into %s", path, out)
        with (
            progress.stage(f"dequantizing {path.name} (once)", None),
            staged_dir(out, force=True) as stage,
        ):
            _convert(path, stage)
    return out


def read_by_transformers(path: Path) -> AbstractContextManager[None]:
    """Says what it means that transformers cannot read a .gguf file that is sound itself."""
    needs = f"reading {path.name} needs the gguf package: pip install gguf ({SAID})"
    unread = (
        f"{path}: transformers {version('transformers')} does not convert this file ({SAID}); give "
        "the model as a Hugging Face checkpoint"
    )
    return map_exceptions((ImportError, InputError, needs), (Exception, UnsupportedModel, unread))


def _convert(path: Path, out: Path) -> None:
    import torch
    from huggingface_hub import ModelCardData
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": path.name}
    with quiet_transformers(), quiet_tqdm(), parsed_once():  # 5.17 draws a bar of its own
        with read_by_transformers(path):
            file = GGUFFile.open(path)  # its errors say more than those of transformers
            refuse_parts(file)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=torch.bfloat16,
                trust_remote_code=False,
                quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
                **where,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **where)
            correct_tokens(path, tokenizer)
        check_tensors(file, model)
        for name, value in corrections(file, model.config).items():
            setattr(model.config, name, value)
        model.config._name_or_path = ""
        vars(model.config).pop("_model_name_or_path", None)
        try:
            model.save_pretrained(out)
        except Exception as error:
            if _disk_is_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise
        tokenizer.save_pretrained(out)
        stated = _stated(path)
        again = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
        _check_tokenizer(path, tokenizer, again, stated)
    keys = ("license", "license_name", "license_link", "language")
    data = ModelCardData(**{key: stated[key] for key in keys if stated[key]})
    (out / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n", encoding="utf-8")


def _stated(path: Path) -> dict[str, Any]:
    """What a GGUF file states of its licence, languages and tokenizer; None where it is silent."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    names = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
        "language": "general.languages",
        "tokenizer": "tokenizer.ggml.model",
        "add_bos": "tokenizer.ggml.add_bos_token",
    }
    return {k: fields[name].contents() if name in fields else None for k, name in names.items()}


def _check_tokenizer(path: Path, converted: Any, reloaded: Any, stated: dict[str, Any]) -> None:
    """Refuse a tokenizer that transformers did not convert faithfully: the model would load, and
    read every text as noise. (Seen with transformers 5.17 and Gemma 3; 5.23 converts it.)

    Raises:
        UnsupportedModel: with what is wrong.
    """
    probe = "The quick brown fox – naïve café, 東京,\n\tdef f(x): return 42  # done"
    ids = converted(probe).input_ids
    kind = type(converted.backend_tokenizer.model).__name__
    wrong = None
    if kind == "Unigram" and stated["tokenizer"] in ("llama", "gpt2"):
        wrong = "it merges pieces by rank in the file, and by likelihood here"
    elif reloaded(probe).input_ids != ids:
        wrong = "saved and loaded again it gives other tokens"
    elif stated["add_bos"] and ids[:1] != [converted.bos_token_id]:
        wrong = "the file's starts every text with BOS, this one does not"
    if wrong:
        raise UnsupportedModel(
            f"{path}: transformers {version('transformers')} does not convert its tokenizer "
            f"faithfully ({wrong}); give the model as a Hugging Face checkpoint, or upgrade "
            "transformers (5.23 converts more)"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own bars and notices; put its settings back afterwards."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()


@contextmanager
def quiet_tqdm() -> Iterator[None]:
    """Silence all bars of the process, for calls into libraries whose bars obey no setting."""
    from tqdm import tqdm

    kept, show = vars(tqdm)["__init__"], tqdm.__init__  # a descriptor, and what it makes

    def hide(self: Any, *args: Any, **kwargs: Any) -> None:
        show(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = hide
    try:
        yield
    finally:
        tqdm.__init__ = kept
