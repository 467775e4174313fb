"""Put a checkpoint folder where others can load it: a Hugging Face repository, or a folder that serves as a hub.

Nothing goes out before everything that can be checked here was checked; what arrived is fetched again and compared
before it gets its tag. huggingface_hub does the transfer and looks after the token. Whatever breaks on the way, the
error says what is online already.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geo_pretrain.cards.front_matter import UNSTATED
from geo_pretrain.checkpoint import (
    CONFIG,
    FINETUNED,
    ROLES,
    Checkpoint,
    check_digest,
    check_target,
    parse_config,
    read_checkpoint,
    staged,
    verify_files,
)
from geo_pretrain.errors import CheckpointError, DigestMismatch, GeoPretrainError, HubError, some
from geo_pretrain.halving import write_halved
from geo_pretrain.hub import HF_PREFIX
from geo_pretrain.hub.names import check_published_name
from geo_pretrain.hub.outgoing import outgoing
from geo_pretrain.redact import safe
from geo_pretrain.targets import folder_fault

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FIRST_TAG = "v1"
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
INITIAL_FILES = {".gitattributes", "README.md", "LICENSE"}  # what a repository has that was just made on the website


@dataclass(frozen=True)
class SentFile:
    """One file that goes, or went, out."""

    role: str  # "config" for config.json
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Publication:
    """The published files and their location; after a dry run, those that would be published."""

    name: str
    to: str
    files: tuple[SentFile, ...]  # config.json last
    left_out: tuple[str, ...]  # in the folder, but no part of the checkpoint
    dry_run: bool
    cleaned: tuple[str, ...] = field(default=(), kw_only=True)  # texts that lose paths of this machine, or keys
    url: str = ""  # for people; the folder for a folder
    repo: str | None = None  # Hugging Face only, as are the next three
    private: bool = False
    tag: str | None = None
    commit: str | None = None  # None after a dry run
    verified: Mapping[str, float] = field(default_factory=dict)  # output -> difference, of the files as they were there

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        where = (
            f"{self.to} ({'private' if self.private else 'public'} if new), tag {self.tag}" if self.repo else self.url
        )
        lines = [f"{'Would publish' if self.dry_run else 'Published'} {self.name!r} to {where}:"]
        lines += [f"  {file.name}: {file.size} bytes, sha256 {file.sha256}" for file in self.files]
        lines.append(f"  in all: {len(self.files)} files, {self.size} bytes")
        if self.left_out:
            lines.append(f"Not part of the checkpoint, so left out: {', '.join(self.left_out)}")
        if self.cleaned:
            lines.append(f"Without the folders of this machine that the originals name: {', '.join(self.cleaned)}")
        if self.dry_run:
            return "\n".join([*lines, "This was a dry run: nothing was written or sent."])
        if self.commit is not None:
            worst = max(self.verified.values())
            lines.append(f"{self.url}, commit {self.commit}")
            lines.append(f"Fetched again: all digests agree, golden outputs within {worst:.1g} (relative).")
            lines.append(f"For its catalog entry:\n{self.catalog_lines()}")
        return "\n".join(lines)

    def catalog_lines(self, base: str | None = None) -> str:
        """The `files=` of this checkpoint's catalog entry. `base`: the URL under which a folder hub is served.

        Empty when nobody could fetch the files: after a dry run, and for a folder without `base`.
        """
        if base is None and self.commit is None:
            return ""
        lines = ["files=("]
        for file in self.files:
            if file.role != "config" and file.size > 0:
                source = (
                    f"{base.rstrip('/')}/{self.name}/{file.name}" if base else f"{HF_PREFIX}{self.repo}@{self.commit}"
                )
                lines.append(f'    File("{file.role}", "{file.name}", {file.size}, "{file.sha256}", ("{source}",)),')
        return "\n".join([*lines, "),"])


def publish(
    folder: Path | str,
    to: Path | str,
    *,
    tag: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    half: bool = False,
) -> Publication:
    """Publish a checkpoint folder to `to`: "hf-hub:owner/repo", or a folder that GEO_PRETRAIN_HUB may name.

    Refused with `CheckpointError`, before anything is sent: an unfinished run, a license chain with unstated terms, a
    missing card, altered or unlisted files, golden outputs that are not reproduced, and a name for which the catalog
    has other files, another network or other input. `dry_run` checks all of it and tells what would go.

    On Hugging Face the files of the inventory and config.json become one commit, are fetched again, compared and
    loaded, and then tagged (`tag`, "v1" unless given). A tag stays what it is: one that exists with other content is
    refused, the same content once more changes nothing. `private` makes a new repository private. In a folder they
    become <to>/<name>, all at once; another checkpoint of that name there is refused. Recipe, log, card and config.json
    go without absolute paths, logins and keys; the originals stay as they are. `half`: with matrices in float16, see
    `halving.write_halved`. Raises `HubError` when the target
    cannot be used or a transfer fails, saying what is online by then, and `DigestMismatch` when what arrived differs.
    """
    if half:
        with tempfile.TemporaryDirectory() as temporary:
            halved = write_halved(folder, Path(temporary) / Path(folder).resolve().name)
            return publish(halved.folder, to, tag=tag, private=private, dry_run=dry_run)
    checkpoint = read_checkpoint(folder)
    spec = str(to)
    if spec.startswith(HF_PREFIX):
        repo, tag = _repository(spec), FIRST_TAG if tag is None else tag
        if not TAG.fullmatch(tag):
            raise HubError(f"tag={tag!r}; letters, digits, '.', '_' and '-' are accepted, such as 'v2'.")
    elif re.match(r"(hf|https?):", spec):
        raise HubError(f"Cannot publish to {spec!r}; {HF_PREFIX}owner/repo or a folder is accepted.")
    elif tag is not None or private:
        raise HubError(f"tag= and private= are understood by Hugging Face only, not by the folder {spec!r}.")
    elif not Path(to).exists() and (fault := folder_fault(Path(to))) is not None:
        raise HubError(f"Cannot publish to {fault}")
    check_publishable(checkpoint)
    config = (checkpoint.folder / CONFIG).read_bytes()
    texts = outgoing(checkpoint)
    config = texts.get(CONFIG, config)
    left_out, sent = _left_out(checkpoint), parse_config(config, checkpoint.folder)
    plan = Publication(checkpoint.name, spec, _files(sent, config), left_out, dry_run, cleaned=tuple(sorted(texts)))
    if spec.startswith(HF_PREFIX):
        plan = replace(plan, repo=repo, tag=tag, private=private)
        return plan if dry_run else _Upload(sent, texts | {CONFIG: config}, plan).run()
    target = Path(to).expanduser() / checkpoint.name
    if not _in_folder(target, config) and not dry_run:
        copy_to(target, sent, texts | {CONFIG: config})
    return replace(plan, url=str(target))


def check_publishable(checkpoint: Checkpoint, *, named: bool = True) -> None:
    """Raise `CheckpointError` for a folder that must not be published, see `publish`.

    `named=False`: its name is somebody else's question.
    """
    from geo_pretrain.loading import verify

    folder = checkpoint.folder
    if not checkpoint.finished:
        raise CheckpointError(
            f"{folder}: its training did not finish; finished checkpoints are accepted. Resume the run."
        )
    for name, stored in checkpoint.files.items():
        if stored.role not in (*ROLES, FINETUNED):
            raise CheckpointError(f"{folder / name}: has role {stored.role!r}; accepted: {', '.join(ROLES)}.")
    for role in (*checkpoint.network_roles(), "golden", "card"):
        checkpoint.file_of(role)
    verify_files(checkpoint)
    if not (folder / checkpoint.file_of("card")).read_bytes().strip():
        raise CheckpointError(
            f"{folder / checkpoint.file_of('card')}: is empty; a card that says what this is is accepted."
        )
    _check_license(checkpoint)
    verify(folder, local_files_only=True)
    if named:
        check_published_name(checkpoint)


def _check_license(checkpoint: Checkpoint) -> None:
    """Refuse weights whose license chain contains unstated terms; a `License` cannot be built with gaps."""
    terms = {"the weights": checkpoint.license.weights, "the code": checkpoint.license.code}
    terms |= {f"the data set {name}": license for name, license in checkpoint.license.datasets}
    unstated = [what for what, license in terms.items() if license == UNSTATED]
    unstated += ["the start weights"] if UNSTATED in checkpoint.license.base_model else []
    if unstated:
        raise CheckpointError(
            f"{checkpoint.folder}: the license chain is incomplete, nobody stated terms for {', '.join(unstated)} "
            f"({UNSTATED}); accepted: an SPDX identifier or the name of known terms. Ask the owners, and keep it to "
            "yourself until then."
        )


def _files(checkpoint: Checkpoint, config: bytes) -> tuple[SentFile, ...]:
    files = [SentFile(stored.role, name, stored.size, stored.sha256) for name, stored in checkpoint.files.items()]
    return (*files, SentFile("config", CONFIG, len(config), hashlib.sha256(config).hexdigest()))


def _left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    ours = {CONFIG, *checkpoint.files}
    return tuple(sorted(path.name for path in checkpoint.folder.iterdir() if path.name not in ours))


def _in_folder(target: Path, config: bytes) -> bool:
    """Whether the folder holds this very checkpoint, undamaged. Another checkpoint or other files are refused."""
    hub = target.parent
    if (hub / CONFIG).is_file() or (hub.exists() and not hub.is_dir()):
        what = "a file" if hub.is_file() else "a checkpoint itself"
        raise HubError(f"{hub} is {what}; a folder that holds, or will hold, checkpoint folders is accepted.")
    check_target(target, target.name)
    if not (target / CONFIG).is_file():
        return False
    if (target / CONFIG).read_bytes() != config:
        raise HubError(
            f"{target} holds another checkpoint of this name. A published name never changes meaning: publish this one "
            "under another name, or remove that folder."
        )
    try:
        verify_files(read_checkpoint(target))
    except CheckpointError:
        return False  # damaged, so it is written again
    return True


def copy_to(target: Path, checkpoint: Checkpoint, texts: Mapping[str, bytes]) -> None:
    """Copy the files of the checkpoint to `target`; those in `texts`, config.json among them, have these bytes."""
    try:
        with staged(target, str(os.getpid())) as staging:
            for name in {*checkpoint.files} - {*texts}:
                shutil.copyfile(checkpoint.folder / name, staging / name)  # contents alone: rights follow the umask
            for name, text in texts.items():
                (staging / name).write_bytes(text)
            verify_files(read_checkpoint(staging))
    except OSError as error:
        raise HubError(f"{target}: cannot be written ({error.strerror or error}). Choose another folder.") from error


def _repository(spec: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo = spec.removeprefix(HF_PREFIX)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"Cannot publish to {spec!r}; {HF_PREFIX}owner/repo is accepted ({error}).") from error
    if repo.count("/") != 1:
        raise HubError(f"Cannot publish to {spec!r}; {HF_PREFIX}owner/repo is accepted.")
    return repo


class _Upload:
    """One upload to Hugging Face; after a failure `done` and `doing` state what is online."""

    def __init__(self, checkpoint: Checkpoint, texts: Mapping[str, bytes], plan: Publication) -> None:
        self.checkpoint, self.texts, self.plan = checkpoint, texts, plan
        self.config = texts[CONFIG]
        self.repo, self.tag = str(plan.repo), str(plan.tag)
        self.done: list[str] = []
        self.doing = ""

    def run(self) -> Publication:
        import huggingface_hub

        client = huggingface_hub.HfApi(library_name="geo_pretrain")
        with self._explained(), tempfile.TemporaryDirectory(prefix="geo_pretrain-") as folder:
            client.whoami()  # a missing or refused token is noticed before anything is made
            tagged, head = self._look(client, Path(folder))
            commit = tagged or self._commit(client, head or self._create(client))
            verified = self._fetch_again(client, commit, Path(folder))
            if tagged is None:
                self.doing = f"setting the tag {self.tag!r}"
                client.create_tag(self.repo, tag=self.tag, revision=commit)
        url = f"{client.endpoint}/{self.repo}/tree/{self.tag}"
        return replace(self.plan, commit=commit, url=url, verified=verified)

    def _look(self, client: HfApi, folder: Path) -> tuple[str | None, str | None]:
        """The commits of our tag and of main, None if missing. Refuses a repository that holds something else."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = client.model_info(self.repo)
        except RepositoryNotFoundError:
            return None, None
        if self.plan.private and not info.private:
            raise HubError(f"{self.repo!r} is public; make it private on the website, or publish without private.")
        tags = {tag.name: tag.target_commit for tag in client.list_repo_refs(self.repo).tags}
        if self.tag in tags:
            if self._config_at(client, tags[self.tag], folder) == self.config:
                return tags[self.tag], info.sha
            raise HubError(
                f"{self.repo!r} has a tag {self.tag!r} with other content, and a tag never changes meaning. Publish "
                f"this checkpoint under another one, such as {_next_tag(tags)!r}."
            )
        files = {sibling.rfilename for sibling in info.siblings or ()}
        if CONFIG in files:
            online = parse_config(self._config_at(client, str(info.sha), folder) or b"", Path(self.repo))
            if online.name != self.checkpoint.name:
                raise HubError(
                    f"{self.repo!r} holds {online.name!r}, not {self.checkpoint.name!r}; it is one name's place."
                )
        elif not files <= INITIAL_FILES:
            raise HubError(
                f"{self.repo!r} holds something else ({some(sorted(files - INITIAL_FILES))}); give a new repository."
            )
        return None, info.sha

    def _config_at(self, client: HfApi, commit: str, folder: Path) -> bytes | None:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(client.hf_hub_download(self.repo, CONFIG, revision=commit, cache_dir=folder)).read_bytes()
        except EntryNotFoundError:
            return None

    def _create(self, client: HfApi) -> str:
        """Create the repository; return its first commit."""
        kind = "private" if self.plan.private else "public"
        self.doing = f"creating the {kind} repository {self.repo!r}"
        client.create_repo(self.repo, private=self.plan.private)
        self.doing = ""
        self.done.append(f"the {kind} repository {self.repo!r} was created")
        return str(client.model_info(self.repo).sha)

    def _commit(self, client: HfApi, head: str) -> str:
        """Send all files in one commit on main, which removes checkpoint files of an earlier version."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        online = {sibling.rfilename for sibling in client.model_info(self.repo, revision=head).siblings or ()}
        stale = online & set(ROLES.values()) - set(self.checkpoint.files)
        operations: list[Any] = [
            CommitOperationAdd(name, self.texts.get(name) or self.checkpoint.folder / name)
            for name in self.checkpoint.files
        ]
        operations.append(CommitOperationAdd(CONFIG, self.config))
        self.doing = f"sending {len(operations)} files"
        info = client.create_commit(
            self.repo,
            [*operations, *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=f"{self.checkpoint.name} {self.tag}",
            parent_commit=head,  # somebody else's push in between is an error, not a mixture
        )
        self.doing = ""
        self.done.append(f"{len(operations)} files are on main of {self.repo!r}, in commit {info.oid}, without a tag")
        return str(info.oid)

    def _fetch_again(self, client: HfApi, commit: str, folder: Path) -> Mapping[str, float]:
        """Download every file into an empty cache, compare the digests and recompute the golden outputs."""
        from geo_pretrain.loading import verify

        def fetch(name: str, *, again: bool = False) -> Path:
            cache = folder / "fetched"
            return Path(client.hf_hub_download(self.repo, name, revision=commit, cache_dir=cache, force_download=again))

        config = fetch(CONFIG)
        if config.read_bytes() != self.config:
            raise DigestMismatch(f"{self.repo}@{commit}: its {CONFIG} is not the one that was sent.")
        for name, stored in self.checkpoint.files.items():
            try:
                check_digest(fetch(name), stored)
            except DigestMismatch:  # on the way back, perhaps
                check_digest(fetch(name, again=True), stored)
        return dict(verify(config.parent, local_files_only=True).errors)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of the client and its libraries into ours; each states what is online."""
        from huggingface_hub import errors

        try:
            yield
        except GeoPretrainError as error:
            raise type(error)(f"{error}\n{self._so_far(error)}") from error
        except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
            raise HubError(f"Hugging Face, {self.repo!r}: {_reason(error)}\n{self._so_far(error)}") from error
        except BaseException as error:
            error.add_note(safe(self._so_far(error)))
            raise

    def _so_far(self, error: BaseException) -> str:
        parts = list(self.done)
        if self.doing:
            refused = _response(error) is not None
            parts.append(f"{self.doing} {'failed' if refused else 'broke off, perhaps after it took effect'}")
        if not parts:
            return "Nothing was published."
        return f"So far: {'; '.join(parts)}. The same command again goes on from there."


def _next_tag(tags: Mapping[str, str]) -> str:
    numbers = [int(tag[1:]) for tag in tags if re.fullmatch(r"v\d+", tag)]
    return f"v{max(numbers, default=1) + 1}"


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _response(error: BaseException) -> Any:
    """The Hub's answer that an error is about, if there was one."""
    responses = (getattr(one, "response", None) for one in _chain(error))
    return next((response for response in responses if response is not None), None)


def _reason(error: BaseException) -> str:
    """Explain an error in one line, with its remedy."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token. Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
    texts = [" ".join(str(one).split()) or type(one).__name__ for one in _chain(error)]
    text = "; because: ".join(dict.fromkeys(texts[:2]))
    text += "" if text.endswith(".") else "."
    response = _response(error)
    if response is None:
        offline = "HF_HUB_OFFLINE" in text
        return f"{text} {'Unset HF_HUB_OFFLINE' if offline else 'Check the network, then run the same command again'}."
    hints = {
        401: "The token was refused: log in with `hf auth login --force`, or set HF_TOKEN.",
        403: "This token may not do that: use one with write permission, and a namespace that it may write to.",
        409: "Somebody else changed the repository meanwhile: look at it, then run the same command again.",
        412: "Somebody else pushed meanwhile: look at the repository, then run the same command again.",
        429: "Wait a while, then run the same command again.",
    }
    status = int(response.status_code)
    hint = hints.get(status, "The Hub has a problem: run the same command again later." if status >= 500 else "")
    return f"{text} {hint}".strip()
