"""Which adapter a name means, and whose secret goes where."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from frontend.adapters import (
    MAX_USED,
    AdapterNames,
    SourceOff,
    UnknownSource,
    UsedAdapters,
    Wanted,
    scope_of,
    source_token,
    tenant_of,
)
from frontend.authorization import Authorization
from frontend.parameters import ParameterError
from pipeline.config import SOURCES
from pipeline.messages import AdapterKey
from tests.frontend.fakes import BASE, make_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_adapter(tmp_path, "here")
    make_adapter(tmp_path, "team/nested@home")
    return tmp_path


def find(
    root: Path,
    name: str | None,
    *,
    source: str | None = None,
    token: str | None = None,
    default: str = "auto",
    sources: Sequence[str] = SOURCES,
) -> Wanted | None:
    names = AdapterNames(base_model=BASE, default_source=default, sources=sources, roots=(root,))
    return names.find(name, source=source, token=token, parameter="model")


@pytest.mark.parametrize("name", [None, "", BASE])
def test_no_name_and_the_base_models_name_mean_the_base_model(root: Path, name: str | None) -> None:
    assert find(root, name, source="hub") is None


@pytest.mark.parametrize("name", ["here", "team/nested@home"])
def test_auto_is_local_where_a_root_holds_it(root: Path, name: str) -> None:
    assert find(root, name) == Wanted(AdapterKey("local", name), None)


def test_a_path_below_a_root_is_the_same_adapter_as_its_id(root: Path) -> None:
    assert find(root, str(root / "here")) == Wanted(AdapterKey("local", "here"), None)
    assert find(root, f"{root}//team/nested@home/") == find(root, "team/nested@home")
    assert find(root, str(root), source="local") == Wanted(AdapterKey("local", str(root)), None)


@pytest.mark.parametrize("name", ["elsewhere", "../here", "/etc"])
def test_auto_is_the_hub_where_no_root_holds_it(root: Path, name: str) -> None:
    assert find(root, name) == Wanted(AdapterKey("hub", name), None)


def test_the_default_source_and_the_named_one_are_taken_at_their_word(root: Path) -> None:
    assert find(root, "here", default="hub") == Wanted(AdapterKey("hub", "here"), None)
    assert find(root, "gone", default="local") == Wanted(AdapterKey("local", "gone"), None)
    assert find(root, "here", source="hub") == Wanted(AdapterKey("hub", "here"), None)
    assert find(root, "gone", source="local") == Wanted(AdapterKey("local", "gone"), None)


def test_a_hub_id_may_name_its_revision(root: Path) -> None:
    wanted = find(root, "org/name@refs/pr/1")
    assert wanted is not None
    assert wanted.key == AdapterKey("hub", "org/name", "refs/pr/1")


@pytest.mark.parametrize("name", ["@main", "org/name@", "a\nb", "a\x00", "x" * 513, "\u202e"])
def test_what_cannot_be_an_id_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ParameterError) as refused:
        find(root, name, source="hub")
    assert refused.value.parameter == "model"


def test_another_source_is_refused_in_loraxs_words(root: Path) -> None:
    with pytest.raises(UnknownSource, match="Invalid source 'moon' when downloading adapter 'x'"):
        find(root, "x", source="moon")


@pytest.mark.parametrize("source", ["s3", "pbase", "http"])
def test_a_source_that_is_off_is_refused(root: Path, source: str) -> None:
    with pytest.raises(SourceOff, match=f"'{source}' is not turned on") as refused:
        find(root, "a/b", source=source, sources=("local", "hub"))
    assert 400 <= refused.value.status < 500


@pytest.mark.parametrize(
    ("source", "name", "id"),
    [
        (None, "here/", "here"),
        ("local", "team/nested@home//", "team/nested@home"),
        ("hub", "org/name@main", "org/name"),
        ("s3", "bucket/some/prefix/", "s3://bucket/some/prefix"),
        (None, "s3://bucket/some/prefix", "s3://bucket/some/prefix"),
        (None, "https://Host.org:443/a/b/", "https://host.org/a/b"),
        (None, "http://[::1]:8000/a.tar.gz", "http://[::1]:8000/a.tar.gz"),
        (None, "pb://repo/3", "pb://repo/3"),
        ("pbase", "repo", "pb://repo"),
    ],
)
def test_an_adapter_has_one_id_however_it_is_written(
    root: Path, source: str | None, name: str, id: str
) -> None:
    wanted = find(root, name, source=source, token="secret")
    assert wanted is not None
    assert wanted.key.id == id
    assert find(root, id, source=source, token="secret") == wanted, (
        "what is shown of a key can be asked for"
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("local", "/"),
        ("local", "./here"),
        ("local", "team/../here"),
        ("local", "team//nested@home"),
        (None, "here/."),
        ("s3", "bucket"),
        ("s3", "s3://bucket/"),
        ("s3", "/prefix"),
        ("pbase", "a/b/c"),
        ("pbase", "a/"),
        ("http", "ftp://host/x"),
        ("http", "host/x"),
        ("http", "https://user:secret@host/x"),
        ("http", "https://host/x?signature=secret"),
        ("http", "https://host/x#part"),
        ("http", "https://host:99999/x"),
        ("http", "https://[::1/x"),
    ],
)
def test_what_is_no_id_of_its_source_is_refused(root: Path, source: str, name: str) -> None:
    with pytest.raises(ParameterError) as refused:
        find(root, name, source=source)
    assert refused.value.parameter == "model"
    assert "secret" not in refused.value.message


def test_the_credentials_of_s3_are_the_servers_and_a_request_token_stays_here(root: Path) -> None:
    assert find(root, "b/p", source="s3", token="t") == Wanted(AdapterKey("s3", "s3://b/p"), None)


def test_a_token_is_for_the_hub_and_makes_another_adapter(root: Path) -> None:
    with_token = find(root, "org/name", token="hf_secret")
    assert with_token is not None
    assert with_token.token == "hf_secret"
    assert with_token.key.scope == scope_of("hf_secret") != scope_of("hf_other")
    assert find(root, "here", token="hf_secret") == Wanted(AdapterKey("local", "here"), None)


def test_a_scope_does_not_tell_its_token() -> None:
    assert scope_of(None) == ""
    assert len(scope_of("hf_secret")) == 32
    assert "secret" not in scope_of("hf_secret")


def test_the_body_wins_over_the_header() -> None:
    shown = Authorization(adapter_token="hf_header")
    assert source_token("hf_body", shown) == "hf_body"
    assert source_token("", shown) == source_token(None, shown) == "hf_header"
    assert source_token(None, None) is None
    assert source_token("EMPTY", None) == "EMPTY"


def test_a_tenant_is_known_by_its_bearer_then_by_its_token() -> None:
    everything = Authorization(bearer="key", adapter_token="hf_header")
    assert tenant_of("hf_body", everything) == scope_of("key")
    assert tenant_of("hf_body", Authorization(adapter_token="hf_header")) == scope_of("hf_body")
    assert tenant_of(None, Authorization(adapter_token="hf_header")) == scope_of("hf_header")
    assert tenant_of(None, None) == tenant_of(None, Authorization()) == ""


@pytest.mark.parametrize("token", ["a\r\nX-Evil: 1", "tok\u00e9n", "x" * 4097])
def test_what_could_not_be_sent_in_a_header_is_no_token(token: str) -> None:
    with pytest.raises(ParameterError) as refused:
        source_token(token, None)
    assert token not in refused.value.message


def test_used_adapters_are_shown_to_those_who_may_know_of_them() -> None:
    used = UsedAdapters()
    used.add(AdapterKey("hub", "public", "v2"))
    used.add(AdapterKey("hub", "mine", scope="me"))
    used.add(AdapterKey("hub", "theirs", scope="them"))
    assert used.names("me") == ["mine", "public@v2"]
    assert used.names("") == ["public@v2"]


def test_only_the_latest_used_adapters_are_remembered() -> None:
    used = UsedAdapters()
    used.add(AdapterKey("hub", "first"))
    used.add(AdapterKey("hub", "second"))
    used.add(AdapterKey("hub", "first"))
    for number in range(MAX_USED - 1):
        used.add(AdapterKey("hub", str(number)))
    names = used.names("")
    assert len(names) == MAX_USED
    assert "first" in names
    assert "second" not in names
