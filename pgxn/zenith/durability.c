/*
 * Settings that acknowledged commits rest on cannot be weakened while the server runs.
 *
 * synchronous_standby_names: emptied by ALTER SYSTEM and a reload it would release every waiting commit
 * as if it were durable, and let the later ones through.  Once it has a value it keeps it until the
 * server stops.
 *
 * synchronous_commit: "off" remains the user's choice, per session and transaction, and means that the
 * commit may be lost.  "local" promises that the commit survives a crash of this server.  Its disk is not
 * synced and is thrown away after a crash, so only the quorum can keep that promise: "local" is taken as
 * "on".  Nor is there "off" for a worker that applies a publisher's changes.  It tells the publisher what is
 * flushed, and the publisher forgets that; with "off", the default of a subscription, "flushed" is what
 * is written to this server's disk.
 *
 * log_min_messages: the guard of the commit wait (sync_wait.c) runs when the server reports, as a WARNING,
 * that it gives up waiting; a level above that would silence the report and so the guard.  Such a level
 * is taken as "warning".
 *
 * All are done by adding a check to the server's own settings.
 */
#include "zenith.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "replication/logicalworker.h"
#include "replication/syncrep.h"
#include "utils/guc_tables.h"

static GucStringCheckHook standby_names_check;
static GucEnumCheckHook log_level_check;
static GucEnumCheckHook commit_level_check;

static struct config_generic *
find_setting(const char *name)
{
	struct config_generic **settings;
	int			count;

#if PG_VERSION_NUM >= 160000
	settings = get_guc_variables(&count);
#else
	settings = get_guc_variables();
	count = GetNumConfigOptions();
#endif
	for (int i = 0; i < count; i++)
		if (strcmp(settings[i]->name, name) == 0)
			return settings[i];
	elog(FATAL, "zenith: the server has no setting \"%s\"", name);
	return NULL;				/* keep compiler quiet */
}

static bool
check_standby_names(char **newval, void **extra, GucSource source)
{
	const char *wanted = *newval != NULL ? *newval : "";

	if (SyncRepStandbyNames != NULL && SyncRepStandbyNames[0] != '\0' &&
		strcmp(wanted, SyncRepStandbyNames) != 0)
	{
		GUC_check_errcode(ERRCODE_CANT_CHANGE_RUNTIME_PARAM);
		GUC_check_errmsg("parameter \"synchronous_standby_names\" cannot be changed while the server runs");
		GUC_check_errdetail("Acknowledged commits rest on it.");
		return false;
	}
	return standby_names_check == NULL || standby_names_check(newval, extra, source);
}

/* Would the server's log leave out WARNINGs at this level?  (LOG ranks between ERROR and FATAL there.) */
static bool
hides_warnings(int level)
{
	return level == LOG || level > WARNING;
}

static bool
check_log_level(int *newval, void **extra, GucSource source)
{
	if (hides_warnings(*newval))
	{
		*newval = WARNING;
		if (source >= PGC_S_INTERACTIVE && MyProcPid != PostmasterPid)
			ereport(WARNING,
					(errmsg("\"log_min_messages\" is taken as \"warning\""),
					 errdetail("Levels above it would hide the report that a commit stops waiting.")));
	}
	return log_level_check == NULL || log_level_check(newval, extra, source);
}

static bool
check_commit_level(int *newval, void **extra, GucSource source)
{
	if (*newval == SYNCHRONOUS_COMMIT_LOCAL_FLUSH)
	{
		*newval = SYNCHRONOUS_COMMIT_ON;
		/* To whoever sets it, not where a value is looked at for later (PGC_S_TEST). */
		if (source == PGC_S_SESSION)
			ereport(NOTICE,
					(errmsg("\"synchronous_commit\" is taken as \"on\""),
					 errdetail("This server's disk does not outlive a crash: \"local\" would protect from nothing."),
					 errhint("Set it to \"off\" for commits that may be lost.")));
	}
	if (*newval == SYNCHRONOUS_COMMIT_OFF && IsLogicalWorker())
		*newval = SYNCHRONOUS_COMMIT_ON;
	return commit_level_check == NULL || commit_level_check(newval, extra, source);
}

/* Add a check to a setting.  The files were read before: its value is set again if the check changes it. */
static GucEnumCheckHook
add_check(const char *name, GucEnumCheckHook check)
{
	struct config_enum *setting = (struct config_enum *) find_setting(name);
	GucEnumCheckHook previous = setting->check_hook;
	int			value = *setting->variable;

	setting->check_hook = check;
	SetConfigOption(name, config_enum_lookup_by_value(setting, value), setting->gen.scontext,
					setting->gen.source);
	return previous;
}

void
durability_init(void)
{
	struct config_string *standby_names =
		(struct config_string *) find_setting("synchronous_standby_names");

	standby_names_check = standby_names->check_hook;
	standby_names->check_hook = check_standby_names;
	log_level_check = add_check("log_min_messages", check_log_level);
	commit_level_check = add_check("synchronous_commit", check_commit_level);
}
