/*
 * Settings that acknowledged commits rest on cannot be weakened while the server runs.
 *
 * synchronous_standby_names: emptied by ALTER SYSTEM and a reload it would release every waiting commit
 * as if it were durable, and let the later ones through.  Once it has a value it keeps it until the
 * server stops.  (synchronous_commit remains the user's choice, per session and transaction: "local" and
 * "off" mean that the commit may be lost.)
 *
 * log_min_messages: the guard of the commit wait (sync_wait.c) runs when the server reports, as a WARNING,
 * that it gives up waiting; a level above that would silence the report and so the guard.  Such a level
 * is taken as "warning".
 *
 * Both are done by adding a check to the server's own settings.
 */
#include "zenith.h"

#include "miscadmin.h"
#include "replication/syncrep.h"
#include "utils/guc_tables.h"

static GucStringCheckHook standby_names_check;
static GucEnumCheckHook log_level_check;

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

void
durability_init(void)
{
	struct config_string *standby_names =
		(struct config_string *) find_setting("synchronous_standby_names");
	struct config_enum *log_level = (struct config_enum *) find_setting("log_min_messages");

	standby_names_check = standby_names->check_hook;
	standby_names->check_hook = check_standby_names;
	log_level_check = log_level->check_hook;
	log_level->check_hook = check_log_level;
	/* The files were read before: set the value again, with the check. */
	if (hides_warnings(*log_level->variable))
		SetConfigOption("log_min_messages", "warning", log_level->gen.scontext, log_level->gen.source);
}
