"""The test framework's names and signatures, which tests elsewhere were written for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures import (
    benchmark_fixture,
    compare_fixtures,
    log_helper,
    utils,
    zenith_fixtures,
)

# name(parameters): what follows in ours has a default, or is a keyword.
ZENITH_FIXTURES = """
PgProtocol(host, port, username=None, password=None, dbname=None, schema=None)
PgProtocol.connstr(dbname=None, schema=None, username=None, password=None)
PgProtocol.connect(autocommit=True, dbname=None, schema=None, username=None, password=None)
PgProtocol.connect_async(dbname='postgres', username=None, password=None)
PgProtocol.safe_psql(query, kwargs)
PortDistributor(base_port, port_number)
PortDistributor.get_port()
can_bind(host, port)
AuthKeys(pub, priv)
AuthKeys.generate_management_token()
AuthKeys.generate_tenant_token(tenant_id)
MockS3Server(port)
MockS3Server.endpoint()
MockS3Server.region()
MockS3Server.access_key()
MockS3Server.secret_key()
MockS3Server.kill()
ZenithEnvBuilder(repo_dir, port_distributor, pageserver_remote_storage=None, pageserver_config_override=None, num_safekeepers=0, pageserver_auth_enabled=False, rust_log_override=None, default_branch_name='main')
ZenithEnvBuilder.init()
ZenithEnvBuilder.start()
ZenithEnvBuilder.init_start()
ZenithEnvBuilder.enable_local_fs_remote_storage(force_enable=True)
ZenithEnvBuilder.enable_s3_mock_remote_storage(bucket_name, force_enable=True)
ZenithEnv(config)
ZenithEnv.start()
ZenithEnv.get_safekeeper_connstrs()
ZenithPageserver(env, port, remote_storage=None, config_override=None)
ZenithPageserver.start(overrides=())
ZenithPageserver.stop(immediate=False)
ZenithPageserver.http_client(auth_token=None)
ZenithPageserverHttpClient(port, auth_token=None)
ZenithPageserverHttpClient.check_status()
ZenithPageserverHttpClient.timeline_attach(tenant_id, timeline_id)
ZenithPageserverHttpClient.timeline_detach(tenant_id, timeline_id)
ZenithPageserverHttpClient.timeline_create(tenant_id, new_timeline_id=None, ancestor_timeline_id=None, ancestor_start_lsn=None)
ZenithPageserverHttpClient.tenant_list()
ZenithPageserverHttpClient.tenant_create(new_tenant_id=None)
ZenithPageserverHttpClient.timeline_list(tenant_id)
ZenithPageserverHttpClient.timeline_detail(tenant_id, timeline_id)
ZenithPageserverHttpClient.get_metrics()
PageserverPort(pg, http)
SafekeeperPort(pg, http)
LocalFsStorage(root)
append_pageserver_param_overrides(params_to_update, pageserver_remote_storage, pageserver_config_override=None)
ZenithCli(env)
ZenithCli.create_tenant(tenant_id=None)
ZenithCli.list_tenants()
ZenithCli.create_timeline(new_branch_name, tenant_id=None)
ZenithCli.create_root_branch(branch_name, tenant_id=None)
ZenithCli.create_branch(new_branch_name='main', ancestor_branch_name=None, tenant_id=None, ancestor_start_lsn=None)
ZenithCli.list_timelines(tenant_id=None)
ZenithCli.init(config_toml, initial_timeline_id=None)
ZenithCli.pageserver_start(overrides=())
ZenithCli.pageserver_stop(immediate=False)
ZenithCli.safekeeper_start(id)
ZenithCli.safekeeper_stop(id=None, immediate=False)
ZenithCli.pg_create(branch_name, node_name=None, tenant_id=None, lsn=None, port=None)
ZenithCli.pg_start(node_name, tenant_id=None, lsn=None, port=None)
ZenithCli.pg_stop(node_name, tenant_id=None, destroy=False)
ZenithCli.raw_cli(arguments, check_return_code=True)
PgBin(log_dir)
PgBin.run(command, env=None, cwd=None)
PgBin.run_capture(command, env=None, cwd=None, kwargs)
VanillaPostgres(pgdatadir, pg_bin, port)
VanillaPostgres.configure(options)
VanillaPostgres.start()
VanillaPostgres.stop()
VanillaPostgres.get_subdir_size(subdir)
ZenithProxy(port)
ZenithProxy.start_static(addr='127.0.0.1:5432')
Postgres(env, tenant_id, port)
Postgres.create(branch_name, node_name=None, lsn=None, config_lines=None)
Postgres.create_start(branch_name, node_name=None, lsn=None, config_lines=None)
Postgres.start()
Postgres.stop()
Postgres.stop_and_destroy()
Postgres.config(lines)
Postgres.adjust_for_wal_acceptors(wal_acceptors)
Postgres.pg_data_dir_path()
Postgres.pg_xact_dir_path()
Postgres.pg_twophase_dir_path()
Postgres.config_file_path()
PostgresFactory(env)
PostgresFactory.create_start(branch_name, node_name=None, tenant_id=None, lsn=None, config_lines=None)
PostgresFactory.create(branch_name, node_name=None, tenant_id=None, lsn=None, config_lines=None)
PostgresFactory.stop_all()
Safekeeper(env, port, id, auth_token=None, running=False)
Safekeeper.start()
Safekeeper.stop(immediate=False)
Safekeeper.append_logical_message(tenant_id, timeline_id, request)
Safekeeper.http_client()
SafekeeperHttpClient(port)
SafekeeperHttpClient.check_status()
SafekeeperHttpClient.timeline_status(tenant_id, timeline_id)
SafekeeperHttpClient.get_metrics()
SafekeeperTimelineStatus(acceptor_epoch, flush_lsn)
wait_for(number_of_iterations, interval, func)
assert_local(client, tenant, timeline)
remote_consistent_lsn(client, tenant, timeline)
wait_for_upload(client, tenant, timeline, lsn)
last_record_lsn(client, tenant, timeline)
wait_for_last_record_lsn(client, tenant, timeline, lsn)
check_restored_datadir_content(test_output_dir, env, pg)
list_files_to_compare(pgdata_dir)
should_skip_dir(dirname)
should_skip_file(filename)
get_dir_size(path)
read_pid(path)
get_test_output_dir(request)
"""  # noqa: E501
UTILS = """
get_self_dir()
mkdir_if_needed(path)
subprocess_capture(capture_dir, cmd, kwargs)
global_counter()
lsn_to_hex(num)
lsn_from_hex(lsn_hex)
print_gc_result(row)
"""
BENCHMARK = """
ZenithBenchmarker(property_recorder)
ZenithBenchmarker.record(metric_name, metric_value, unit, report)
ZenithBenchmarker.record_duration(metric_name)
ZenithBenchmarker.record_pg_bench_result(pg_bench_result)
ZenithBenchmarker.get_io_writes(pageserver)
ZenithBenchmarker.get_peak_mem(pageserver)
ZenithBenchmarker.get_timeline_size(repo_dir, tenantid, timelineid)
ZenithBenchmarker.record_pageserver_writes(pageserver, metric_name)
"""
COMPARE = """
PgCompare.flush()
PgCompare.report_peak_memory_use()
PgCompare.report_size()
PgCompare.record_pageserver_writes(out_name)
PgCompare.record_duration(out_name)
ZenithCompare(zenbenchmark, zenith_simple_env, pg_bin, branch_name)
VanillaCompare(zenbenchmark, vanilla_pg)
"""
LOG_HELPER = "getLogger(name='root')"

MODULES = [
    (zenith_fixtures, ZENITH_FIXTURES),
    (utils, UTILS),
    (benchmark_fixture, BENCHMARK),
    (compare_fixtures, COMPARE),
    (log_helper, LOG_HELPER),
]
CALLABLES = [
    pytest.param(module, *match.groups(), id=f"{module.__name__}.{match[1]}")
    for module, table in MODULES
    for match in re.finditer(r"^(\S+?)\((.*)\)$", table, re.MULTILINE)
]


@pytest.mark.parametrize(("module", "name", "parameters"), CALLABLES)
def test_signature(module: Any, name: str, parameters: str) -> None:
    """Names, order and defaults are as documented; additions do not get in their way."""
    function: Callable[..., object] = module
    for part in name.split("."):
        function = getattr(function, part)
    ours = list(inspect.signature(function).parameters.values())
    if "." in name:
        ours = ours[1:]  # self
    wanted = [text for text in parameters.split(", ") if text]
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in ours[: len(wanted)]
    ]
    assert shown == wanted
    for extra in ours[len(wanted) :]:
        assert extra.default is not extra.empty or extra.kind is extra.VAR_KEYWORD, extra


def test_globals() -> None:
    """Where things are, and the conventions, by name."""
    for name in ("base_dir", "zenith_binpath", "pg_distrib_dir", "top_output_dir"):
        assert isinstance(getattr(zenith_fixtures, name), str)
    assert zenith_fixtures.WORKER_PORT_NUM == 100
    assert zenith_fixtures.DEFAULT_BRANCH_NAME == "main"
    assert {"pg_wal", "pg_stat", "pg_subtrans"} <= set(zenith_fixtures.SKIP_DIRS)
    assert {"pg.log", "pg_control", "postmaster.pid"} <= set(zenith_fixtures.SKIP_FILES)
    assert log_helper.log is log_helper.getLogger()


def test_all_names() -> None:
    """What `from fixtures.zenith_fixtures import *` gives is there."""
    missing = [name for name in zenith_fixtures.__all__ if not hasattr(zenith_fixtures, name)]
    assert not missing


def test_classes_and_helpers_of_the_page() -> None:
    """docs/testing.md says that they can be imported from there: those that its tables name."""
    text = (Path(zenith_fixtures.base_dir) / "docs" / "testing.md").read_text()
    classes, recipes = (
        re.search(rf"^## {heading}$.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
        for heading in ("The classes", "Recipes")
    )
    assert classes and recipes
    names = set(re.findall(r"^\*\*`(\w+)`", classes[0], re.MULTILINE))
    names |= set(re.findall(r"^\| `(\w+)\(", recipes[0], re.MULTILINE))
    names |= {"Writer", "verify_pages", "check_restored_datadir_content", "lsn_from_hex"}
    assert {"ZenithEnv", "Postgres", "PgBin", "wait_until"} <= names
    assert names <= set(zenith_fixtures.__all__)


def test_kinds_of_figures() -> None:
    """Their texts are in files of results."""
    assert [str(kind) for kind in benchmark_fixture.MetricReport] == [
        "test_param",
        "higher_is_better",
        "lower_is_better",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "worker_seq_no",
        "worker_base_port",
        "port_distributor",
        "zenith_simple_env",
        "zenith_env_builder",
        "pg_bin",
        "vanilla_pg",
        "static_proxy",
        "test_output_dir",
        "zenbenchmark",
        "zenith_compare",
        "vanilla_compare",
        "zenith_with_baseline",
    ],
)
def test_fixture_exists(request: pytest.FixtureRequest, name: str) -> None:
    """By its name."""
    manager: Any = request.session._fixturemanager
    assert manager.getfixturedefs(name, request.node)
