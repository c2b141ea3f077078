"""The Hub: what is pushed loads again, here and in peft; from the right revision; and failures say what they are about."""

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from torch import nn

import peftc
from tests.support.adapters import perturb
from tests.support.hub_server import TOKEN, Hub, connected, hub
from tests.support.models import tiny, token_ids
from tests.support.snapshots import assert_unchanged, snapshot

REPO = "user/repo"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
IDS = token_ids(2, 5, 64)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Hub]:
    with connected(monkeypatch, tmp_path) as found:
        yield found


def adapted(model: nn.Module, *names: str, **fields: Any) -> peftc.CompiledModel:
    """`model` with adapters of these names (default: `default`) that do something."""
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 2, "task_type": "CAUSAL_LM", **fields}
    specs = {name: peftc.LoraConfig(**fields) for name in names or ("default",)}
    return perturb(peftc.compile(model, specs)).eval()


def assert_same(one: peftc.CompiledModel, other: peftc.CompiledModel, name: str = "default") -> None:
    expected, found = one.adapter_state_dict(name), other.adapter_state_dict(name)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    one.set_adapter(name)
    other.set_adapter(name)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, one(IDS).logits)


def assert_nothing_is_there(server: Hub) -> None:
    for repo_id, repository in server.repositories.items():
        assert server.commits(repo_id) == []
        assert list(repository.refs) == ["main"]


def test_what_is_pushed_loads_again(server: Hub) -> None:
    model = tiny("llama")
    compiled = adapted(model)
    before = snapshot(compiled)
    info = compiled.push_to_hub(REPO, token=TOKEN, commit_message="title", commit_description="more")
    assert_unchanged(compiled, before)
    (commit,) = server.commits(REPO)
    assert str(info) == info.commit_url == f"{server.url}/{REPO}/commit/{commit.oid}"
    assert (info.oid, info.pr_url) == (commit.oid, None)
    assert (commit.title, commit.description) == ("title", "more")
    assert set(server.files(REPO)) == FILES
    assert not server.repositories[REPO].private
    assert sum(request.startswith("PUT /lfs/") for request in server.requests) == 1
    assert_same(compiled, peftc.load(model, REPO))
    other = adapted(model, "mine")
    other.load_adapter(REPO, "default")
    assert_same(compiled, other)


@pytest.mark.parametrize("options", [{}, {"form": "serving"}, {"selected_adapters": ["b"]}], ids=str)
def test_what_is_pushed_is_what_is_saved(options: dict[str, Any], server: Hub, tmp_path: Path) -> None:
    compiled = adapted(tiny("llama"), "default", "b", rank_pattern={"q_proj": 3})
    compiled.push_to_hub(REPO, token=TOKEN, **options)
    compiled.save_pretrained(tmp_path / "saved", **options)
    files = {file for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    assert server.files(REPO) == {str(file.relative_to(tmp_path / "saved")): file.read_bytes() for file in files}


def test_a_model_card_is_pushed_along(server: Hub) -> None:
    model = tiny("llama")
    model.config._name_or_path = "user/base"
    adapted(model).push_to_hub(REPO, token=TOKEN)
    card = server.files(REPO)["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["base_model"]) == ("peft", "user/base")
    assert "# Adapter" in card


def test_what_was_written_into_the_card_on_the_hub_stays(server: Hub) -> None:
    compiled = adapted(tiny("llama"))
    compiled.push_to_hub(REPO, token=TOKEN)
    card = b"---\nlicense: mit\nlibrary_name: peft\n---\n\nAll I know of it.\n"
    HfApi(token=TOKEN).upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
    perturb(compiled).push_to_hub(REPO, token=TOKEN)
    pushed = server.files(REPO)["README.md"].decode()
    assert "All I know of it." in pushed
    assert yaml.safe_load(pushed.split("---\n")[1])["license"] == "mit"


def test_pushing_again(server: Hub) -> None:
    model = tiny("llama")
    compiled = adapted(model)
    first = compiled.push_to_hub(REPO, token=TOKEN)
    assert compiled.push_to_hub(REPO, token=TOKEN).oid == first.oid
    perturb(compiled)
    second = compiled.push_to_hub(REPO, token=TOKEN)
    assert [commit.oid for commit in server.commits(REPO)] == [second.oid, first.oid]
    assert_same(compiled, peftc.load(model, REPO))


def test_adapters_of_other_names_are_in_subfolders(server: Hub) -> None:
    model = tiny("llama")
    compiled = adapted(model, "default", "b", "c")
    compiled.push_to_hub(REPO, token=TOKEN)
    assert set(server.files(REPO)) == {folder + file for folder in ("", "b/", "c/") for file in FILES}
    server.requests.clear()
    again = peftc.load(model, REPO, "b", subfolder="b")
    assert_same(compiled, again, "b")
    downloaded = {request.split("/", 5)[-1] for request in server.requests if request.startswith("GET /user")}
    assert downloaded == {"b/adapter_config.json", "b/adapter_model.safetensors"}
    again.load_adapter(REPO, "default")
    again.load_adapter(REPO, "c", subfolder="c")
    assert list(again.peft_config) == ["b", "default", "c"]
    for name in ("default", "c"):
        assert_same(compiled, again, name)


def test_revisions(server: Hub) -> None:
    model = tiny("llama")
    versions = [adapted(model, r=rank) for rank in (1, 2, 3)]
    hashes = [versions[0].push_to_hub(REPO, token=TOKEN).oid, versions[1].push_to_hub(REPO, token=TOKEN).oid]
    branch = versions[2].push_to_hub(REPO, token=TOKEN, revision="a/branch")
    assert [commit.oid for commit in server.commits(REPO, "a/branch")] == [branch.oid, *reversed(hashes)]
    wanted = {None: 1, "main": 1, hashes[0]: 0, hashes[1]: 1, "a/branch": 2, branch.oid: 2}
    for revision, version in wanted.items():
        assert_same(versions[version], peftc.load(model, REPO, revision=revision))
        other = adapted(model, "mine")
        other.load_adapter(REPO, "default", revision=revision)
        assert_same(versions[version], other)
    versions[0].push_to_hub(REPO, token=TOKEN, revision="a/branch")
    assert_same(versions[0], peftc.load(model, REPO, revision="a/branch"))
    assert_same(versions[1], peftc.load(model, REPO))


def test_a_pull_request(server: Hub) -> None:
    model = tiny("llama")
    old, new = adapted(model, r=1), adapted(model, r=2)
    old.push_to_hub(REPO, token=TOKEN)
    info = new.push_to_hub(REPO, token=TOKEN, create_pr=True)
    assert (info.pr_url, info.pr_revision) == (f"{server.url}/{REPO}/discussions/1", "refs/pr/1")
    assert_same(old, peftc.load(model, REPO))
    assert_same(new, peftc.load(model, REPO, revision="refs/pr/1"))
    with pytest.raises(peftc.CheckpointError, match=REPO):
        new.push_to_hub(REPO, token=TOKEN, create_pr=True, revision="branch")
    assert set(server.repositories[REPO].refs) == {"main", "refs/pr/1"}


def test_private_repositories_need_a_token(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny("llama")
    compiled = adapted(model)
    compiled.push_to_hub(REPO, token=TOKEN, private=True)
    assert server.repositories[REPO].private
    other = adapted(model, "mine")
    before = snapshot(other)
    for token in (None, False, "hf_wrong"):
        server.tokens.clear()
        with pytest.raises(peftc.CheckpointError, match=REPO):
            peftc.load(model, REPO, token=token)
        with pytest.raises(peftc.CheckpointError, match=REPO):
            other.load_adapter(REPO, "default", token=token)
        assert set(server.tokens) == {token or None}
    assert_unchanged(other, before)
    server.tokens.clear()
    assert_same(compiled, peftc.load(model, REPO, token=TOKEN))
    other.load_adapter(REPO, "default", token=TOKEN, cache_dir=tmp_path / "other")
    assert_same(compiled, other)
    assert set(server.tokens) == {TOKEN}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_same(compiled, peftc.load(model, REPO, force_download=True))
    assert compiled.push_to_hub("repo").repo_url.repo_id == REPO
    assert server.tokens.count(TOKEN) == len(server.tokens)


MISSING: dict[str, tuple[str, dict[str, Any], str]] = {
    "repository": ("user/none", {}, "user/none.*Repository Not Found"),
    "repository, logged in": ("user/none", {"token": TOKEN}, "user/none.*Repository Not Found"),
    "branch": (REPO, {"revision": "none"}, f"{REPO}.*no revision 'none'"),
    "commit": (REPO, {"revision": "0" * 40}, f"{REPO}.*no revision '0000"),
    "subfolder": (REPO, {"subfolder": "none"}, f"{REPO}.*'none'"),
    "subfolder of a commit": (REPO, {"subfolder": "b", "revision": "first"}, f"{REPO}.*'b'"),
    "cache": (REPO, {"local_files_only": True}, REPO),
    "name": ("user/repo/more", {}, "user/repo/more"),
}


@pytest.mark.parametrize(("repo", "options", "message"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_named(repo: str, options: dict[str, Any], message: str, server: Hub) -> None:
    model = tiny("llama")
    adapted(model).push_to_hub(REPO, token=TOKEN, revision="first")
    adapted(model, "default", "b").push_to_hub(REPO, token=TOKEN)
    other = adapted(model, "mine")
    before, base = snapshot(other), snapshot(model)
    with pytest.raises(peftc.CheckpointError, match=f"(?s){message}"):
        peftc.load(model, repo, inplace=True, **options)
    assert_unchanged(model, base)
    with pytest.raises(peftc.CheckpointError, match=f"(?s){message}"):
        other.load_adapter(repo, "theirs", **options)
    assert_unchanged(other, before)
    assert list(other.peft_config) == ["mine"]


@pytest.mark.parametrize("subfolder", ["../b", "/b", "b/../.."])
def test_subfolders_are_inside_of_the_repository(subfolder: str, server: Hub) -> None:
    with pytest.raises(peftc.CheckpointError, match="not inside"):
        peftc.load(tiny("llama"), REPO, subfolder=subfolder)
    assert server.requests == []


# What the client tries again, for half a minute, is refused once and for all here.
FAULTS: dict[str, tuple[str, int]] = {
    "create": ("POST /api/repos/create", 500),
    "branch": ("POST .*/branch/", 500),
    "card": ("POST /api/validate-yaml", 400),
    "preupload": ("POST .*/preupload/", 403),
    "batch": ("POST .*/objects/batch", 403),
    "upload": ("PUT ", 403),
    "commit": ("POST .*/commit/", 500),
}


@pytest.mark.parametrize(("pattern", "status"), FAULTS.values(), ids=FAULTS)
def test_a_push_that_fails_leaves_nothing(pattern: str, status: int, server: Hub) -> None:
    model = tiny("llama")
    compiled = adapted(model, "default", "b")
    before = snapshot(compiled)
    with server.failing(pattern, status), pytest.raises(peftc.CheckpointError, match=REPO):
        compiled.push_to_hub(REPO, token=TOKEN, revision="branch" if "branch" in pattern else None)
    assert_nothing_is_there(server)
    assert_unchanged(compiled, before)
    old = compiled.push_to_hub(REPO, token=TOKEN)
    expected = server.files(REPO)
    perturb(compiled)
    with server.failing(pattern, status), pytest.raises(peftc.CheckpointError, match=REPO):
        compiled.push_to_hub(REPO, token=TOKEN, revision="branch" if "branch" in pattern else None)
    assert [commit.oid for commit in server.commits(REPO)] == [old.oid]
    assert server.files(REPO) == expected
    compiled.push_to_hub(REPO, token=TOKEN)
    assert_same(compiled, peftc.load(model, REPO))


REFUSED: dict[str, tuple[str, str | None, str]] = {
    "no token": (REPO, None, f"{REPO}.*Invalid username or password"),
    "a wrong token": (REPO, "hf_wrong", f"{REPO}.*Invalid credentials"),
    "another's namespace": ("other/repo", TOKEN, "other/repo.*don't have the rights"),
    "a name that can't be": ("user/repo/more", TOKEN, "user/repo/more"),
    "a name with spaces": ("user/a repo", TOKEN, "user/a repo"),
}


@pytest.mark.parametrize(("repo", "token", "message"), REFUSED.values(), ids=REFUSED)
def test_pushes_that_the_hub_refuses(repo: str, token: str | None, message: str, server: Hub) -> None:
    with pytest.raises(peftc.CheckpointError, match=f"(?s){message}"):
        adapted(tiny("llama")).push_to_hub(repo, token=token)
    assert server.repositories == {}


def test_a_hub_that_can_not_be_reached(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    compiled = adapted(model)
    compiled.push_to_hub(REPO, token=TOKEN)
    with server.failing("GET /api/models/"), pytest.raises(peftc.CheckpointError, match=REPO):
        peftc.load(model, REPO)
    with hub() as gone:
        url = gone.url
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    with pytest.raises(peftc.CheckpointError, match=REPO):
        compiled.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(peftc.CheckpointError, match=REPO):
        peftc.load(model, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(peftc.CheckpointError, match=f"(?s){REPO}.*offline"):
        compiled.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(peftc.CheckpointError, match=f"(?s){REPO}.*HF_HUB_OFFLINE"):
        peftc.load(model, REPO)


def test_what_was_loaded_once_loads_offline(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny("llama")
    compiled = adapted(model, "default", "b")
    oid = compiled.push_to_hub(REPO, token=TOKEN).oid
    peftc.load(model, REPO)
    peftc.load(model, REPO, cache_dir=tmp_path / "mine", subfolder="b")
    server.requests.clear()
    for revision in (None, "main", oid):
        assert_same(compiled, peftc.load(model, REPO, local_files_only=True, revision=revision))
    other = adapted(model, "mine")
    other.load_adapter(REPO, "default", local_files_only=True)
    assert_same(compiled, other)
    other.load_adapter(REPO, "b", local_files_only=True, cache_dir=tmp_path / "mine", subfolder="b")
    assert_same(compiled, other, "b")
    # Only some of the repository is in either cache.
    for options in ({"subfolder": "b"}, {"cache_dir": tmp_path / "mine"}, {"revision": "none"}):
        with pytest.raises(peftc.CheckpointError, match=REPO):
            peftc.load(model, REPO, local_files_only=True, **options)
    assert server.requests == []
    with server.failing("."):
        assert_same(compiled, peftc.load(model, REPO))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert_same(compiled, peftc.load(model, REPO))
    assert server.requests == []


def test_downloading_again(server: Hub) -> None:
    model = tiny("llama")
    compiled = adapted(model)
    compiled.push_to_hub(REPO, token=TOKEN)
    weights = Path(huggingface_hub.hf_hub_download(REPO, "adapter_model.safetensors"))
    weights.resolve().write_bytes(b"broken")
    with pytest.raises(peftc.CheckpointError, match="not a readable safetensors file"):
        peftc.load(model, REPO)
    assert_same(compiled, peftc.load(model, REPO, force_download=True))
    assert_same(compiled, peftc.load(model, REPO))


def test_repositories_without_weights(server: Hub, tmp_path: Path) -> None:
    model, api = tiny("llama"), HfApi(token=TOKEN)
    compiled = adapted(model)
    compiled.push_to_hub(REPO, token=TOKEN)
    api.delete_file("adapter_model.safetensors", REPO)
    with pytest.raises(peftc.CheckpointError, match=r"a config, but no adapter_model\.safetensors"):
        peftc.load(model, REPO)
    torch.save(compiled.adapter_state_dict(), tmp_path / "adapter_model.bin")
    api.upload_file(path_or_fileobj=tmp_path / "adapter_model.bin", path_in_repo="adapter_model.bin", repo_id=REPO)
    with pytest.raises(peftc.CheckpointError, match=r"adapter_model\.bin.*allow_pickle=True"):
        peftc.load(model, REPO)
    assert_same(compiled, peftc.load(model, REPO, allow_pickle=True))
    api.delete_file("adapter_config.json", REPO)
    with pytest.raises((peftc.CheckpointError, peftc.SpecError), match=r"adapter_config\.json"):
        peftc.load(model, REPO, allow_pickle=True)


@pytest.mark.parametrize("files", [[], ["config.json"]], ids=["empty", "a model"])
def test_repositories_without_an_adapter(files: list[str], server: Hub) -> None:
    api = HfApi(token=TOKEN)
    api.create_repo(REPO)
    for name in files:
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=REPO)
    with pytest.raises((peftc.CheckpointError, peftc.SpecError), match=rf"{REPO}.*adapter"):
        peftc.load(tiny("llama"), REPO)


def test_peft_loads_what_is_pushed(server: Hub) -> None:
    model = tiny("llama")
    compiled = adapted(model, "default", "b")
    compiled.push_to_hub(REPO, token=TOKEN, private=True)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), REPO, token=TOKEN).eval()
    theirs.load_adapter(REPO, "b", subfolder="b", token=TOKEN)
    for name in ("default", "b"):
        compiled.set_adapter(name)
        theirs.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS).logits, compiled(IDS).logits)


def test_what_peft_saved_loads(server: Hub, tmp_path: Path) -> None:
    model, api = tiny("llama"), HfApi(token=TOKEN)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(peftc.load(model, REPO)(IDS).logits, theirs(IDS).logits)
