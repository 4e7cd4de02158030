"""Upload a checkpoint to a model hub, as it was checked here and nothing else of the folder."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.checksums import ROLLBACK, SUMS, check_sums
from sleb.config import PushConfig, takes
from sleb.core.errors import DataError, InputError, ResourceError, SlebError
from sleb.core.files import check_folder
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.surgery.rollback_original import open_original

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[\w.][\w./-]{0,200}")
# Formats that run code when they are opened, and what sleb leaves behind when it is interrupted.
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|joblib|npy|npz)", re.IGNORECASE)
_LEFTOVER = re.compile(r".*\.(journal|heal|part|tmp|lock)")


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Where a checkpoint went. ``commit`` is null where nothing was sent (``dry_run``)."""

    repo: str
    revision: str
    url: str
    commit: str | None
    files: tuple[str, ...]
    nbytes: int


@takes(PushConfig)
def push(out: str | Path, repo: str, config: PushConfig, *, progress: Progress = silent) -> Pushed:
    """Upload the checkpoint folder ``out`` to ``repo`` (``owner/name``, or ``name`` under the
    token's account), which is made if there is none; ``revision`` is a branch, made likewise.

    The token is huggingface_hub's: from its own store or ``HF_TOKEN``. Left out are hidden files,
    journals and, without ``with_rollback``, the side-car. ``dry_run`` does all the checks that
    need no network, and sends nothing.

    Raises:
        InputError: no plan in ``out``, no checksums, a symbolic link or a pickled file in it; no
            token, or the hub refuses it or the request.
        DataError: a file is not what its checksum says.
        ResourceError: the hub cannot be reached, or failed.
    """
    out = Path(out)
    if not _REPO.fullmatch(repo):
        raise InputError(f"'{repo}' is not a repository; write OWNER/NAME")
    revision, with_rollback = config.revision, config.with_rollback
    branch = revision or "main"
    if not _REVISION.fullmatch(branch) or ".." in branch:
        raise InputError(f"--revision '{revision}' is not the name of a branch")
    names = files_to_push(out, with_rollback=with_rollback)
    nbytes = sum((out / name).stat().st_size for name in names)
    _check_contents(out, with_rollback, progress)
    if config.dry_run:
        return Pushed(
            repo=repo, revision=branch, url="", commit=None, files=tuple(names), nbytes=nbytes
        )
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise InputError("not logged in to the hub: run hf auth login, or set HF_TOKEN")
    api = HfApi(token=token)
    with _hub_errors(repo, token):
        repo_id = api.create_repo(repo, private=config.private or None, exist_ok=True).repo_id
        if config.private and not api.repo_info(repo_id).private:
            raise InputError(
                f"{repo_id} is there already and public; make it private on the hub, or choose "
                "another name"
            )
        if revision and revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(  # it draws its own bars
            repo_id=repo_id,
            folder_path=out,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload a checkpoint pruned with sleb",
        )
    return Pushed(
        repo=repo_id,
        revision=branch,
        url=f"{api.endpoint}/{repo_id}" + ("" if branch == "main" else f"/tree/{branch}"),
        commit=done.oid,
        files=tuple(names),
        nbytes=nbytes,
    )


def files_to_push(out: Path, *, with_rollback: bool = False) -> list[str]:
    """What of the folder ``out`` is uploaded: paths inside it, sorted, with ``/`` between parts.

    Raises:
        InputError: no checkpoint with a plan, or something that must not be uploaded.
    """
    check_folder(out, "make one with: sleb prune")
    if not (out / "plan.json").is_file():
        raise InputError(
            f"{out} has no plan.json, so it is not known what was cut from which model"
        )
    if with_rollback and not (out / ROLLBACK).is_dir():
        raise InputError(f"{out} has no {ROLLBACK} folder; leave out --with-rollback")
    found = []
    for folder, folders, names in os.walk(out):
        above = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if above == out and not with_rollback and ROLLBACK in folders:
            folders.remove(ROLLBACK)
        for name in [*folders, *names]:
            path = above / name
            if name.startswith(".") or (name in names and _LEFTOVER.fullmatch(name)):
                continue
            if path.is_symlink():
                raise InputError(
                    f"{path} is a symbolic link to {os.readlink(path)}: only files of the folder "
                    "itself are uploaded"
                )
            if name in names:
                if _PICKLED.fullmatch(name) or not path.is_file():
                    raise InputError(
                        f"{path} may run code when it is opened, or is no file: remove it, "
                        "weights go as safetensors"
                    )
                found.append(path.relative_to(out).as_posix())
    return sorted(found)


def _check_contents(out: Path, with_rollback: bool, progress: Progress) -> None:
    """Raise unless plan, weights, checksums and, if it goes along, the side-car are in order."""
    Plan.load(out / "plan.json")
    Checkpoint.open(out)
    if not (out / SUMS).is_file():
        raise InputError(
            f"{out} has no {SUMS}, so damage would go unnoticed; sleb apply and sleb prune write it"
        )
    _, wrong = check_sums(out, progress)
    if wrong:
        named = "; ".join(f"{name} is {state}" for name, state in [*wrong.items()][:3])
        raise DataError(f"{out} is not as {SUMS} says: {named}; nothing was uploaded")
    if with_rollback:
        open_original(out, progress)


@contextmanager
def _hub_errors(repo: str, token: str) -> Iterator[None]:
    """Turn what the hub and its client raise into one line, in which the token does not occur."""
    quiet = logging.getLogger("huggingface_hub")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # its retries, as they happen
    try:
        yield
    except SlebError:
        raise
    except Exception as error:  # the client's errors share no base, and some have a cause
        raise _translated(error, repo, token) from None
    finally:
        quiet.setLevel(level)


def _translated(error: Exception, repo: str, token: str) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) and cause not in chain:
        chain.append(cause)
    said = " ".join(str(error).replace(token, "***").split())[:300]
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return ResourceError("the hub is switched off here: unset HF_HUB_OFFLINE")
        if isinstance(one, HfHubHTTPError):
            return _refused(one.response.status_code, said, repo)
    if isinstance(error, ValueError):
        return InputError(f"the hub does not take this for {repo}: {said}")
    if isinstance(error, (OSError, RuntimeError)) or type(error).__module__.startswith("http"):
        return ResourceError(
            f"the hub cannot be reached ({type(error).__name__}: {said}); check the network and "
            "repeat the command"
        )
    return error


def _refused(status: int, said: str, repo: str) -> SlebError:
    """What an HTTP status means for someone who uploads."""
    if status == 401:
        return InputError("the hub does not know the token (401): run hf auth login again")
    if status == 403:
        return InputError(f"the token may not write to {repo} (403): use one with write access")
    if status == 404:
        return InputError(f"the hub has no {repo}, or hides it from this token (404)")
    if status in (409, 412):
        return ResourceError(f"{repo} changed meanwhile ({status}): repeat the command")
    if 400 <= status < 500 and status not in (408, 429):
        return InputError(f"the hub refuses the upload to {repo} ({status}): {said}")
    return ResourceError(f"the hub failed ({status}) while uploading to {repo}: repeat the command")
