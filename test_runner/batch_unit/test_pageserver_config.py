"""Configuration of the pageserver: defaults, overrides, error texts."""

from pathlib import Path

import pytest

from pageserver import config
from pageserver.config import ConfigError

WORKDIR = Path("/somewhere")


def parse(text: str = "", **keys: object) -> config.PageServerConf:
    document = {"id": 7, **config.parse_override(text), **keys}
    return config.parse_config(document, WORKDIR)


def chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return " <- ".join(texts)


def test_defaults() -> None:
    conf = parse()
    assert conf.id == 7
    assert conf.listen_pg_addr == "127.0.0.1:64000"
    assert conf.listen_http_addr == "127.0.0.1:9898"
    tenant = conf.tenant
    assert tenant.checkpoint_distance == tenant.compaction_target_size == 256 * 1024 * 1024
    assert (tenant.gc_horizon, tenant.pitr_interval) == (64 * 1024 * 1024, 24 * 3600)
    assert (tenant.compaction_period, tenant.gc_period) == (1.0, 100.0)
    assert (tenant.compaction_threshold, tenant.image_creation_threshold) == (10, 3)
    assert tenant.compression == "zstd"
    assert (conf.open_layer_memory_limit, conf.open_layer_spill_threshold) == (512 << 20, 64 << 20)
    assert (conf.wait_lsn_timeout, conf.wal_redo_timeout) == (60.0, 60.0)
    assert conf.checkpoint_timeout == 600.0
    assert parse("checkpoint_timeout = '0 s'").checkpoint_timeout == 0.0
    assert conf.initial_superuser_name == "zenith_admin"
    assert (conf.page_cache_size, conf.max_file_descriptors) == (8192, 100)
    assert conf.layer_index_memory_limit == 256 << 20
    assert conf.tenants_path == WORKDIR / "tenants"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("checkpoint_period = '1 s'", "unrecognized pageserver option 'checkpoint_period'"),
        ("gc_horizon = 'x'", "configure option gc_horizon is not an integer"),
        ("gc_horizon = true", "configure option gc_horizon is not an integer"),
        ("gc_horizon = -1", "configure option gc_horizon cannot be negative"),
        (
            "gc_horizon = 9223372036854775808",
            "configure option gc_horizon must be at most 9223372036854775807",
        ),
        ("checkpoint_distance = 0", "configure option checkpoint_distance must be at least 1"),
        ("listen_pg_addr = 5", "configure option listen_pg_addr is not a string"),
        ("listen_pg_addr = 'nowhere'", "invalid address 'nowhere'"),
        ("gc_period = 'soon'", "invalid duration"),
        ("compaction_threshold = 0", "configure option compaction_threshold must be at least 1"),
        ("pitr_interval = 3600", "configure option pitr_interval is not a string"),
        ("pitr_interval = 'long'", "invalid duration 'long'"),
        ("compression = 'lz4'", "invalid compression 'lz4', expected one of ('zstd', 'none')"),
        ("auth_type = 'trust'", "invalid auth_type 'trust'"),
        ("remote_storage = 'x'", "configure option remote_storage is not a table"),
        ("remote_storage = {}", "no 'local_path' nor 'bucket_name' option"),
        (
            "remote_storage = {local_path='a', bucket_name='b'}",
            "local_path and bucket_name are mutually exclusive",
        ),
        ("remote_storage = {bucket_name='b'}", "'bucket_region' option is mandatory"),
        ("remote_storage = {bucket_region='b'}", "'bucket_name' option is mandatory"),
        (
            "remote_storage = {local_path='a', max_concurrent_sync=0}",
            "configure option remote_storage.max_concurrent_sync must be at least 1",
        ),
        (
            "remote_storage = {local_path='a', max_sync_errors='1'}",
            "configure option remote_storage.max_sync_errors is not an integer",
        ),
        (
            "remote_storage = {bucket_name='b', bucket_region='r', endpoint='localhost:1'}",
            "configure option remote_storage.endpoint: 'localhost:1' is not a URL",
        ),
        ("id = 'one'", "configure option id is not an integer"),
        (
            "remote_storage = {local_path='a', what=1}",
            "unrecognized pageserver option 'remote_storage.what'",
        ),
    ],
)
def test_errors_name_the_option(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert chain(caught.value).startswith(
        "Failed to parse pageserver configuration <- invalid config <- "
    )
    assert expected in chain(caught.value)


def test_id_is_mandatory_and_fixed_at_init() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse_config({}, WORKDIR)
    assert "missing id" in chain(caught.value)
    with pytest.raises(ConfigError, match="node id can only be set during pageserver init"):
        config.merge_overrides({"id": 1}, ["id = 2"], init=False)
    assert config.merge_overrides({}, ["id = 2"], init=True) == {"id": 2}


def test_durations_are_text_with_units() -> None:
    assert parse("gc_period = '1h 30min'").tenant.gc_period == 5400
    assert parse("gc_period = '100ms'").tenant.gc_period == pytest.approx(0.1)
    assert parse("pitr_interval = '0 s'").tenant.pitr_interval == 0.0


def test_overrides_replace_top_level_keys_in_order() -> None:
    base = {"id": 1, "gc_horizon": 5, "remote_storage": {"local_path": "a", "max_sync_errors": 3}}
    merged = config.merge_overrides(
        base,
        ["gc_horizon=6", " gc_horizon = 7", "remote_storage={local_path='b'}"],
        init=False,
    )
    assert merged == {"id": 1, "gc_horizon": 7, "remote_storage": {"local_path": "b"}}
    assert base["gc_horizon"] == 5
    with pytest.raises(ConfigError, match="could not be parsed as a toml document"):
        config.merge_overrides(base, ["gc_horizon"], init=False)


def test_file_round_trip(tmp_path: Path) -> None:
    document = {"id": 3, "listen_pg_addr": "localhost:1", "initdb_options": ["-k"]}
    (tmp_path / "pageserver.toml").write_text(config.dump_document(document))
    assert config.load_document(tmp_path) == document
    assert config.parse_config(document, tmp_path).initdb_options == ("-k",)


def test_commented_defaults_are_the_defaults() -> None:
    """What the initial file shows with a '#' before it changes nothing when that is taken away."""
    lines = config.DEFAULT_CONFIG_FILE.splitlines()
    settings = [line[1:] for line in lines if line.startswith("#") and line[1:2].isalpha()]
    document = config.parse_override("\n".join(line for line in settings if line[:3] != "id "))
    assert document
    assert config.parse_config({"id": 7, **document}, WORKDIR).tenant == parse().tenant
    for name in (
        "open_layer_memory_limit",
        "open_layer_spill_threshold",
        "page_cache_size",
        "layer_index_memory_limit",
        "checkpoint_timeout",
    ):
        assert name in document
        assert getattr(config.parse_config({"id": 7, **document}, WORKDIR), name) == getattr(
            parse(), name
        )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"No pageserver config at '{tmp_path}/pageserver.toml'"):
        config.load_document(tmp_path)


def test_remote_storage_is_accepted_with_a_warning() -> None:
    assert config.ineffective_settings(parse()) == []
    (warning,) = config.ineffective_settings(parse("remote_storage={local_path='x'}"))
    assert "the directory /somewhere/x, but this version does not upload anything" in warning
    bucket = (
        "[remote_storage]\nbucket_name='b'\nbucket_region='r'\nprefix_in_bucket='/p/'\n"
        "access_key_id='id'\nsecret_access_key='hidden'\nendpoint='http://127.0.0.1:1'"
    )
    conf = parse(bucket)
    (warning,) = config.ineffective_settings(conf)
    assert "the bucket b below p/, but" in warning and "hidden" not in warning
    assert conf.remote_storage is not None
    assert (conf.remote_storage.max_concurrent_sync, conf.remote_storage.max_sync_errors) == (
        100,
        10,
    )


def test_relative_paths_are_below_the_workdir() -> None:
    conf = parse("auth_validation_public_key_path='auth_public_key.pem'\npg_distrib_dir='pg'")
    assert conf.auth_validation_public_key_path == WORKDIR / "auth_public_key.pem"
    assert conf.pg_distrib_dir == WORKDIR / "pg"
    assert parse("pg_distrib_dir='/usr/pg'").pg_distrib_dir == Path("/usr/pg")
