/*
 * A node at a past LSN (zenith.read_only_node) stays read-only: promoted, it would go its own way, outside
 * the storage.  pg_promote() is refused here; fsm_log.c stops a node that was promoted by other means.
 */
#include "zenith.h"

#include "catalog/objectaccess.h"
#include "utils/fmgroids.h"

static object_access_hook_type previous_hook;

static void
zenith_object_access(ObjectAccessType access, Oid class_id, Oid object_id, int sub_id, void *argument)
{
	if (access == OAT_FUNCTION_EXECUTE && object_id == F_PG_PROMOTE)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("a read-only node cannot be promoted"),
				 errhint("Create a branch at this node's LSN and start a node on it.")));
	if (previous_hook != NULL)
		previous_hook(access, class_id, object_id, sub_id, argument);
}

void
read_only_init(void)
{
	if (!zenith_read_only_node)
		return;
	previous_hook = object_access_hook;
	object_access_hook = zenith_object_access;
}
