"""Settings: where each value comes from, and one sentence for whatever is wrong."""

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import FIELDS, Settings, load_settings, to_environment
from pipeline.errors import ConfigError


def environment(folder: Path, toml: str = "", **variables: str) -> dict[str, str]:
    """One that names a file with these lines."""
    path = folder / "some.toml"
    path.write_text(toml)
    return {"LORADEX_CONFIG": str(path), **variables}


def sentence(*arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(*arguments)
    return str(caught.value)


def test_without_any_source_each_setting_has_its_default() -> None:
    assert load_settings({}, {}) == Settings()


def test_the_environment_wins_over_the_file_and_a_flag_over_both(tmp_path: Path) -> None:
    toml = "port = 1\nrows = 1\nhost = 'file'"
    sources = environment(tmp_path, toml, LORADEX_PORT="2", LORADEX_ROWS="2")
    settings = load_settings({"port": "3"}, sources)
    assert (settings.port, settings.rows, settings.host) == (3, 2, "file")


def test_a_flag_that_was_not_given_counts_for_nothing(tmp_path: Path) -> None:
    assert load_settings({"port": None}, environment(tmp_path, "port = 1")).port == 1


def test_the_file_of_the_working_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({}, {}) == Settings()
    (tmp_path / "loradex.toml").write_text("adapter_root = ['a', 'b']\nprefix_cache = false")
    settings = load_settings({}, {})
    assert (settings.adapter_root, settings.prefix_cache) == (("a", "b"), False)


def test_variables_without_our_prefix_are_not_looked_at() -> None:
    assert load_settings({}, {"PORT": "1", "MYLORADEX_PORT": "2"}) == Settings()


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("PREFIX_CACHE", "false", "prefix_cache: "),
        ("PREFIX_CACHE", "0", "prefix_cache: "),
        ("DRAIN_SECONDS", "0.5", "drain_seconds: "),
    ],
)
def test_text_is_read_as_the_kind_of_its_setting(variable: str, text: str, expected: str) -> None:
    settings = load_settings({}, {f"LORADEX_{variable}": text})
    value = getattr(settings, expected.removesuffix(": "))
    assert value == float(text) if "." in text else value is False


@pytest.mark.parametrize(
    ("flags", "variables", "expected"),
    [
        ({"port": "http"}, {}, "port: Expected `int`, got `str`"),
        ({"port": "70000"}, {}, "port: Expected `int` <= 65535"),
        ({}, {"LORADEX_PORT": "-1"}, "port: Expected `int` >= 0"),
        ({}, {"LORADEX_DTYPE": "int4"}, "dtype: Invalid enum value 'int4'"),
        ({}, {"LORADEX_MODEL_ID": ""}, "model_id: Expected `str` of length >= 1"),
        ({}, {"LORADEX_POTR": "1"}, "LORADEX_POTR: there is no setting `potr`"),
        (
            {"rows": "10", "step_tokens": "9"},
            {},
            "step_tokens: 9 is less than rows (10), so that not every sequence could run in a step",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_its_key(
    flags: dict[str, str], variables: dict[str, str], expected: str
) -> None:
    assert sentence(flags, variables) == expected


def test_a_key_of_the_file_that_does_not_exist_is_named_with_the_file(tmp_path: Path) -> None:
    sources = environment(tmp_path, "potr = 1")
    assert sentence({}, sources) == f"{tmp_path}/some.toml: there is no setting `potr`"


@pytest.mark.parametrize("content", [b"port = ", b"host = '\xff'"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    expected = f"{path}: not TOML: "
    assert sentence({}, {"LORADEX_CONFIG": str(path)}).startswith(expected)


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    assert sentence({}, {"LORADEX_CONFIG": str(path)}) == (
        f"LORADEX_CONFIG: cannot read {path}: No such file or directory"
    )


def other_value(name: str) -> Any:
    """A value that is not the default."""
    values: dict[str, Any] = {
        "default_adapter_source": "hub",
        "load_format": "dummy",
        "dtype": "float32",
        "device": "cuda",
        "attention": "sdpa",
        "lora_kernels": "reference",
        "log_level": "debug",
        "log_format": "json",
        "tool_format": "llama",
        "pooling": "mean",
        "adapter_root": ("a", "/b c"),
        "kv_block_tokens": 32,
        "gpu_memory_fraction": 0.5,
        "adapter_pool_fraction": 0.5,
        "pinned_pool_fraction": 0.25,
        "watermark_gamma": 0.25,
    }
    default = FIELDS[name].default
    if name in values:
        return values[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return default + "x"
    if isinstance(default, tuple):
        return ("one", "http://two:3")
    return default + 1


@pytest.mark.parametrize("name", FIELDS)
def test_each_setting_reaches_a_child_process(name: str) -> None:
    changed = Settings(**{name: other_value(name)})
    variables = to_environment(changed)
    assert list(variables) == [f"LORADEX_{name.upper()}"]
    assert load_settings({}, variables) == changed


def test_a_secret_shows_in_no_text_of_the_settings() -> None:
    settings = Settings(admin_api_key="not-for-everybody", port=1)
    assert repr(settings) == "Settings(port=1, admin_api_key='***')"
    assert "not-for-everybody" not in f"{settings}"


def test_no_adapter_root_at_all_reaches_a_child_process() -> None:
    none = Settings(adapter_root=())
    assert load_settings({}, to_environment(none)) == none


def test_adapter_roots_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    settings = Settings(adapter_root=(f"{tmp_path}/link", f"{tmp_path}/real/.."))
    assert settings.adapter_roots() == (tmp_path / "real", tmp_path)


def test_the_run_folder_is_private_to_user_and_port_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Settings(run_dir="/somewhere").run_folder() == Path("/somewhere")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    name = f"loradex-{os.getuid()}-81"
    assert Settings(port=81).run_folder() == Path("/run/user/7") / name
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert Settings(port=81).run_folder().name == name


def test_every_setting_has_a_description() -> None:
    descriptions = [str(field.type) for field in FIELDS.values()]
    assert all("description=" in text for text in descriptions)


def test_several_values_in_one_variable_are_separated_so_that_urls_stay_whole() -> None:
    variables = {
        "LORADEX_HTTP_HOST": "models.org,http://10.0.0.1:8000",
        "LORADEX_S3_BUCKET": "a,b",
        "LORADEX_ADAPTER_ROOT": os.pathsep.join(["/a", "/b"]),
    }
    settings = load_settings({}, variables)
    assert settings.http_host == ("models.org", "http://10.0.0.1:8000")
    assert settings.s3_bucket == ("a", "b")
    assert to_environment(settings) == variables


def test_the_sources_that_are_on_are_those_that_have_what_they_need() -> None:
    assert load_settings({}, {}).adapter_sources() == ("local", "hub")
    flags = {"s3_bucket": ["b"], "http_host": ["h"], "pbase_gateway": "g", "pbase_bucket": "b"}
    assert load_settings(flags, {}).adapter_sources() == ("local", "hub", "s3", "pbase", "http")
    assert "pbase" not in load_settings({"pbase_gateway": "g"}, {}).adapter_sources()
    assert "source s3 is off" in sentence({"default_adapter_source": "s3"}, {})


@pytest.mark.parametrize("key", ["", "a b", "a,b", "é", "a\n"])
def test_an_api_key_must_fit_a_header_and_a_list(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key: "):
        load_settings({"api_key": ["good", key]}, {"LORADEX_CONFIG": os.devnull})


def test_several_api_keys_are_handed_on_and_shown_to_nobody() -> None:
    settings = load_settings({}, {"LORADEX_API_KEY": "one,two", "LORADEX_CONFIG": os.devnull})
    assert settings.api_key == ("one", "two")
    assert to_environment(settings)["LORADEX_API_KEY"] == "one,two"
    assert "one" not in repr(settings)
