/*
 * Start of the library, and its settings.
 *
 * The prefix "zenith" is not reserved: an unknown zenith.* setting of a newer or older node must neither
 * stop the server nor spoil a reload.
 */
#include "zenith.h"

#include <dlfcn.h>
#include <unistd.h>

#include "fmgr.h"
#include "miscadmin.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

bool		zenith_read_only_node = false;
int			zenith_fsm_log_interval = 30;
int			zenith_max_cluster_size = -1;

static char *tenant;
static char *timeline;
static char *page_server_connstring;
static char *callmemaybe_connstring;
static char *wal_acceptors;
static int	max_replication_write_lag;
static int	max_replication_flush_lag;
static int	max_replication_apply_lag;
static char *feedback_file;

/* Written by whoever makes a data directory with incomplete relation files. */
#define LAZYFILES_MARKER "pg_stat/zenith.lazyfiles"

/*
 * Relation files with holes read as zeros, which are valid pages, unless lazyfiles fills them.  (A
 * library that cannot be preloaded is only worth a warning to the dynamic loader.)
 */
static void
require_lazyfiles(void)
{
	int			(*active) (void);

	if (access(LAZYFILES_MARKER, F_OK) != 0)
		return;
	active = (int (*) (void)) dlsym(RTLD_DEFAULT, "zenith_lazyfiles_active");
	if (active == NULL || !active())
		ereport(FATAL,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("relation files of this directory are incomplete and the lazyfiles library is not preloaded"),
				 errhint("Start the compute node with \"zenith pg start\".")));
}

static void
define_string(const char *name, const char *description, char **variable, GucContext context)
{
	DefineCustomStringVariable(name, description, NULL, variable, "", context, 0, NULL, NULL, NULL);
}

static void
define_megabytes(const char *name, const char *description, int *variable)
{
	DefineCustomIntVariable(name, description, "0 or less means no limit.", variable, -1, -1, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MB, NULL, NULL, NULL);
}

static void
define_settings(void)
{
	define_string("zenith.zenith_tenant", "Tenant of this node.", &tenant, PGC_POSTMASTER);
	define_string("zenith.zenith_timeline", "Timeline of this node.", &timeline, PGC_POSTMASTER);
	define_string("zenith.page_server_connstring", "Where the pageserver listens.",
				  &page_server_connstring, PGC_SIGHUP);
	define_string("zenith.callmemaybe_connstring",
				  "Where the pageserver connects to if there are no safekeepers.",
				  &callmemaybe_connstring, PGC_SIGHUP);
	define_string("zenith.wal_acceptors", "Comma separated addresses of the safekeepers.",
				  &wal_acceptors, PGC_POSTMASTER);
	define_megabytes("zenith.max_replication_write_lag",
					 "WAL that the pageserver may have yet to receive before commits wait for it.",
					 &max_replication_write_lag);
	define_megabytes("zenith.max_replication_flush_lag",
					 "WAL that the pageserver may have yet to make durable before commits wait for it.",
					 &max_replication_flush_lag);
	define_megabytes("zenith.max_replication_apply_lag",
					 "WAL that the pageserver may have yet to upload before commits wait for it.",
					 &max_replication_apply_lag);
	DefineCustomIntVariable("zenith.max_cluster_size",
							"Size of all relations together above which they do not grow.",
							"0 or less means no limit.", &zenith_max_cluster_size, -1, -1, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MB, NULL, assign_max_cluster_size, NULL);
	define_string("zenith.feedback_file", "File in which the server finds what the pageserver reports.",
				  &feedback_file, PGC_POSTMASTER);
	DefineCustomBoolVariable("zenith.read_only_node", "This node stays read-only.", NULL,
							 &zenith_read_only_node, false, PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("zenith.fsm_log_interval",
							"Time between two passes that carry free space maps into the WAL.", NULL,
							&zenith_fsm_log_interval, 30, 1, 3600, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL,
							NULL);
}

/*
 * The names under which a patched server knew these settings.  The server reads its files before it
 * loads libraries, so they are set by their dotted twins; here they only show the twins' values.
 */
#define SHOW_TWIN(name) \
	static char *name##_twin; \
	static const char * \
	show_##name(void) \
	{ \
		return GetConfigOptionByName("zenith." #name, NULL, false); \
	}

SHOW_TWIN(wal_acceptors)
SHOW_TWIN(max_replication_write_lag)
SHOW_TWIN(max_replication_flush_lag)
SHOW_TWIN(max_replication_apply_lag)

#define DEFINE_TWIN(name) \
	DefineCustomStringVariable(#name, "Shows zenith." #name ".", NULL, &name##_twin, "", PGC_SIGHUP, \
							   GUC_DISALLOW_IN_AUTO_FILE, NULL, NULL, show_##name)

static void
define_twins(void)
{
	DEFINE_TWIN(wal_acceptors);
	DEFINE_TWIN(max_replication_write_lag);
	DEFINE_TWIN(max_replication_flush_lag);
	DEFINE_TWIN(max_replication_apply_lag);
}

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("zenith must be loaded via \"shared_preload_libraries\"")));
	require_lazyfiles();
	define_settings();
	define_twins();
	feedback_init(feedback_file);
	cluster_size_init();
	durability_init();
	sync_wait_init();
	cancelled_read_init();
	read_only_init();
	fsm_log_init();
}
