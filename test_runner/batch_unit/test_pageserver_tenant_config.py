"""Settings of single tenants: which there are, what they are worth, how they last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_unit.pageserver_support import HttpError, Pageserver, Root, running, scratch_directory

from pageserver import tenant_config
from pageserver.config import ConfigError
from pageserver.layered_repository.settings import StoreSettings
from pageserver.tenant_config import TENANT_KEYS, effective_conf, merge_overrides
from zenith_utils.ids import TenantId

pytestmark = pytest.mark.timeout(120)


def test_overrides_come_before_defaults() -> None:
    defaults = {"gc_horizon": 5, "gc_period": "7 s"}
    conf = effective_conf(defaults, {"gc_horizon": 6})
    assert (conf.gc_horizon, conf.gc_period, conf.pitr_interval) == (6, 7.0, 86400.0)
    assert set(conf.document()) == TENANT_KEYS
    assert effective_conf({}, conf.document()) == conf


def test_target_size_follows_checkpoint_distance() -> None:
    assert effective_conf({}, {"checkpoint_distance": 1 << 20}).compaction_target_size == 1 << 20
    defaults = {"compaction_target_size": 5 << 20}
    conf = effective_conf(defaults, {"checkpoint_distance": 1 << 20})
    assert conf.compaction_target_size == 5 << 20


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"gc_horizn": 1}, "unrecognized tenant option 'gc_horizn', expected one of checkpoint_"),
        ({"page_cache_size": 1}, "unrecognized tenant option 'page_cache_size'"),
        ({"gc_period": 20}, "configure option gc_period is not a string"),
        ({"gc_horizon": -1}, "configure option gc_horizon cannot be negative"),
        ({"compression": "gzip"}, "invalid compression 'gzip'"),
        ({"compression": ""}, "invalid compression ''"),
        ({"gc_period": "9" * 400 + " s"}, "configure option gc_period"),
    ],
)
def test_errors_name_the_option(overrides: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("'", ".")):
        effective_conf({"gc_horizon": 3}, overrides)


def test_changes_merge_and_null_removes() -> None:
    current = {"gc_horizon": 5, "gc_period": "7 s"}
    assert merge_overrides(current, {"gc_period": None, "compression": "none"}) == {
        "gc_horizon": 5,
        "compression": "none",
    }
    assert merge_overrides({}, {"gc_period": None}) == {}


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config"
    assert tenant_config.load_overrides(path) == {}
    overrides = {"gc_horizon": 1 << 40, "pitr_interval": "1h 30min"}
    tenant_config.save_overrides(path, overrides)
    assert tenant_config.load_overrides(path) == overrides
    path.write_text("gc_horizon = ")
    with pytest.raises(ConfigError, match=f"Failed to read '{path}' as tenant config"):
        tenant_config.load_overrides(path)


def test_settings_of_the_store() -> None:
    conf = effective_conf({}, {"compression": "none", "compaction_threshold": 4})
    settings = conf.store_settings(StoreSettings(wait_lsn_timeout=5.0, spill_after=7))
    assert (settings.compress_layers, settings.compaction_threshold) == (False, 4)
    assert (settings.wait_lsn_timeout, settings.spill_after) == (5.0, 7)
    assert settings.checkpoint_distance == settings.target_size == 256 << 20


# ---- a running pageserver


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    with running("gc_horizon=1000") as root:
        yield root


def configured(server: Pageserver, tenant: TenantId) -> tuple[dict[str, Any], dict[str, Any]]:
    answer = server.http("GET", f"tenant/{tenant}/config")
    assert answer["tenant_id"] == str(tenant)
    return answer["effective"], answer["overrides"]


def test_created_with_settings(root: Root) -> None:
    server = root.server
    body = {"gc_period": "20 s", "checkpoint_distance": 1 << 20, "compression": None}
    tenant = TenantId.parse(server.http("POST", "tenant", body))
    effective, overrides = configured(server, tenant)
    assert overrides == {"gc_period": "20 s", "checkpoint_distance": 1 << 20}
    assert (effective["gc_period"], effective["checkpoint_distance"]) == ("20s", 1 << 20)
    assert (effective["gc_horizon"], effective["pitr_interval"]) == (1000, "1day")
    assert configured(server, root.tenant)[1] == {}


def test_changed_while_running(root: Root) -> None:
    server = root.server
    tenant = server.create_tenant()
    change = {"tenant_id": str(tenant), "gc_horizon": 77, "pitr_interval": "0 s"}
    assert server.http("PUT", "tenant/config", change)["effective"]["gc_horizon"] == 77
    server.http("PUT", "tenant/config", {"tenant_id": str(tenant), "gc_horizon": None})
    effective, overrides = configured(server, tenant)
    assert overrides == {"pitr_interval": "0 s"}
    assert (effective["gc_horizon"], effective["pitr_interval"]) == (1000, "0s")


def test_refused_settings_change_nothing(root: Root) -> None:
    server = root.server
    tenant = TenantId.parse(server.http("POST", "tenant", {"gc_horizon": 5}))
    for body, text in (
        ({"gc_horizn": 1}, "Bad request: unrecognized tenant option 'gc_horizn'"),
        ({"gc_horizon": "5"}, "Bad request: configure option gc_horizon is not an integer"),
        ({"gc_horizon": 6, "gc_period": "soon"}, "gc_period: invalid duration 'soon'"),
    ):
        with pytest.raises(HttpError, match=text) as caught:
            server.http("PUT", "tenant/config", {"tenant_id": str(tenant), **body})
        assert caught.value.status == 400
        with pytest.raises(HttpError, match=text) as caught:
            server.http("POST", "tenant", body)
        assert caught.value.status == 400
    assert configured(server, tenant)[1] == {"gc_horizon": 5}
    with pytest.raises(HttpError, match="missing field `tenant_id`") as caught:
        server.http("PUT", "tenant/config", {"gc_horizon": 5})
    assert caught.value.status == 400
    nobody = TenantId.generate()
    with pytest.raises(HttpError, match=f"Tenant {nobody} not found") as caught:
        server.http("PUT", "tenant/config", {"tenant_id": str(nobody), "gc_horizon": 5})
    assert caught.value.status == 404
    with pytest.raises(HttpError, match=f"Tenant {nobody} not found") as caught:
        server.http("GET", f"tenant/{nobody}/config")
    assert caught.value.status == 404


def test_settings_outlive_a_restart_and_bad_ones_stop_only_their_tenant() -> None:
    with scratch_directory() as path:
        server = Pageserver(path / "ps")
        server.start()
        try:
            good = TenantId.parse(server.http("POST", "tenant", {"gc_horizon": 5}))
            bad = TenantId.parse(server.http("POST", "tenant", {"gc_horizon": 6}))
            server.http("PUT", "tenant/config", {"tenant_id": str(good), "gc_period": "9 s"})
            assert server.stop() == 0
            half_made = server.workdir / "tenants" / f"{TenantId.generate()}.___temp"
            half_made.mkdir()
            (server.workdir / "tenants" / str(bad) / "config").write_text("gc_horizn = 6\n")
            server.start("gc_horizon=8", "pitr_interval='3 s'")
            effective, overrides = configured(server, good)
            assert overrides == {"gc_horizon": 5, "gc_period": "9 s"}
            assert (effective["gc_horizon"], effective["pitr_interval"]) == (5, "3s")
            assert [x["id"] for x in server.http("GET", "tenant")] == [str(good)]
            with pytest.raises(HttpError, match=r"cannot be used: .*'gc_horizn'"):
                server.http("GET", f"tenant/{bad}/config")
            assert not half_made.exists()
        finally:
            server.stop(9)
