/*
 * get_raw_page_at_lsn(): a page as the pageserver has it, past buffers and files of this server.
 *
 * The connection is made for the one request.  Where the pageserver is stands in the environment of
 * the server as lazyfiles finds it (map.c there), which has the token, too.
 *
 *   request   u8 2, u8 latest, u64 lsn, u32 spcnode, u32 dbnode, u32 relnode, u8 forknum, u32 blkno
 *   page      u8 102, 8192 bytes
 *   error     u8 103, message, NUL
 */
#include "postgres.h"

#include <dlfcn.h>

#include "access/relation.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "common/relpath.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/block.h"
#include "utils/builtins.h"
#include "utils/pg_lsn.h"
#include "utils/rel.h"
#include "utils/varlena.h"

#include "../lazyfiles/lazyfiles.h"

#if PG_VERSION_NUM >= 160000
#define relation_tag(rel) {(rel)->rd_locator.spcOid, (rel)->rd_locator.dbOid, (rel)->rd_locator.relNumber, 0}
#else
#define relation_tag(rel) {(rel)->rd_node.spcNode, (rel)->rd_node.dbNode, (rel)->rd_node.relNode, 0}
#endif

#define REQUEST_TAG 2
#define PAGE_TAG 102
#define ERROR_TAG 103
#define REQUEST_PAYLOAD 27
#define PAGE_PAYLOAD (1 + BLOCK_SIZE)

extern PGDLLEXPORT Datum zenith_get_raw_page_at_lsn(PG_FUNCTION_ARGS);
extern PGDLLEXPORT Datum zenith_get_raw_page_at_lsn_of_file(PG_FUNCTION_ARGS);

PG_FUNCTION_INFO_V1(zenith_get_raw_page_at_lsn);
PG_FUNCTION_INFO_V1(zenith_get_raw_page_at_lsn_of_file);

StaticAssertDecl(BLCKSZ == BLOCK_SIZE, "pages of the pageserver have another size");

/* What connection.c calls when the environment is not usable. */
void
lazy_die(const char *format,...)
{
	char		message[256];
	va_list		arguments;

	va_start(arguments, format);
	vsnprintf(message, sizeof(message), format, arguments);
	va_end(arguments);
	ereport(ERROR, (errcode(ERRCODE_CONFIG_FILE_ERROR), errmsg("%s", message)));
}

/* ---- arguments ---- */

static void
check_caller(FunctionCallInfo fcinfo)
{
	if (!superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be superuser to use raw page functions")));
	for (int i = 0; i < PG_NARGS() - 1; i++)
		if (PG_ARGISNULL(i))
			ereport(ERROR,
					(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
					 errmsg("only the LSN of get_raw_page_at_lsn() may be null")));
}

static uint32_t
block_argument(int64 block)
{
	if (block < 0 || block > MaxBlockNumber)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid block number %lld", (long long) block)));
	return (uint32_t) block;
}

/* The LSN, 0 for null. */
static uint64_t
lsn_argument(FunctionCallInfo fcinfo, int number)
{
	XLogRecPtr	lsn;

	if (PG_ARGISNULL(number))
		return 0;
	lsn = PG_GETARG_LSN(number);
	if (XLogRecPtrIsInvalid(lsn))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid LSN 0/0"),
				 errhint("Use NULL for the newest page.")));
	return lsn;
}

/* The files of a relation by its name. */
static RelTag
named_relation(text *name)
{
	Relation	relation = relation_openrv(makeRangeVarFromNameList(textToQualifiedNameList(name)),
										   AccessShareLock);
	RelTag		tag = relation_tag(relation);

	if (!RELKIND_HAS_STORAGE(relation->rd_rel->relkind))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("\"%s\" has no pages", RelationGetRelationName(relation))));
	if (relation->rd_rel->relpersistence == RELPERSISTENCE_TEMP)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("\"%s\" is temporary, its pages never reach the pageserver",
						RelationGetRelationName(relation))));
	relation_close(relation, AccessShareLock);
	return tag;
}

/* ---- request and reply ---- */

static uint8_t *
put_u64(uint8_t *p, uint64_t value)
{
	return put_u32(put_u32(p, (uint32_t) (value >> 32)), (uint32_t) value);
}

static bool
send_request(const RelTag *tag, uint32_t block, uint64_t lsn)
{
	uint8_t		message[MESSAGE_HEADER + REQUEST_PAYLOAD];
	uint8_t    *p = message;

	*p++ = 'd';
	p = put_u32(p, 4 + REQUEST_PAYLOAD);
	*p++ = REQUEST_TAG;
	*p++ = lsn == 0;			/* the newest */
	p = put_u64(p, lsn);
	p = put_u32(p, tag->spcnode);
	p = put_u32(p, tag->dbnode);
	p = put_u32(p, tag->relnode);
	*p++ = (uint8_t) tag->forknum;
	put_u32(p, block);
	return connection_send(message, sizeof(message));
}

/* Wait for the reply; false with the error in *reason, "" if an interrupt ended the wait. */
static bool
receive_page(uint8_t *page, char *reason, size_t size)
{
	char		type;
	const uint8_t *body;
	size_t		length;

	do
	{
		if (!connection_receive(MESSAGE_HEADER + PAGE_PAYLOAD, UINT64_MAX, &type, &body, &length))
		{
			snprintf(reason, size, "%s", errno == ECANCELED ? "" : strerror(errno));
			return false;
		}
	} while (type == 'N' || type == 'S');
	if (type == 'd' && length == PAGE_PAYLOAD && body[0] == PAGE_TAG)
	{
		memcpy(page, body + 1, BLOCK_SIZE);
		return true;
	}
	if (type == 'd' && length > 1 && body[0] == ERROR_TAG && body[length - 1] == '\0')
		snprintf(reason, size, "%s", (const char *) body + 1);
	else if (type == 'E')
		snprintf(reason, size, "%s", connection_error(body, length));
	else
		snprintf(reason, size, "its reply does not match the request");
	return false;
}

/* The token for the pageserver, which lazyfiles has taken out of the environment; NULL without one. */
static const char *
auth_token(void)
{
	const char *(*token) (void) =
		(const char *(*) (void)) dlsym(RTLD_DEFAULT, "zenith_lazyfiles_auth_token");

	return token != NULL ? token() : NULL;
}

static void
open_connection(void)
{
	const char *address = getenv("ZENITH_LAZYFILES_PAGESERVER");
	const char *tenant = getenv("ZENITH_LAZYFILES_TENANT");
	const char *timeline = getenv("ZENITH_LAZYFILES_TIMELINE");
	char		reason[256];

	if (address == NULL || tenant == NULL || timeline == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("this server has no pageserver"),
				 errhint("Start the compute node with \"zenith pg start\".")));
	connection_init(address, tenant, timeline, auth_token());
	connection_drop();			/* one that an interrupted call has left */
	if (!connection_open(reason, sizeof(reason)))
	{
		CHECK_FOR_INTERRUPTS();
		ereport(ERROR,
				(errcode(ERRCODE_CONNECTION_FAILURE),
				 errmsg("could not connect to the pageserver at %s: %s", address, reason)));
	}
}

static bytea *
fetch_page(const RelTag *tag, uint32_t block, uint64_t lsn)
{
	bytea	   *page = palloc(VARHDRSZ + BLOCK_SIZE);
	char		reason[512];
	bool		received = false;

	SET_VARSIZE(page, VARHDRSZ + BLOCK_SIZE);
	open_connection();
	if (!send_request(tag, block, lsn))
		snprintf(reason, sizeof(reason), "%s", strerror(errno));
	else
		received = receive_page((uint8_t *) VARDATA(page), reason, sizeof(reason));
	connection_drop();
	if (received)
		return page;
	CHECK_FOR_INTERRUPTS();
	ereport(ERROR,
			(errcode(ERRCODE_IO_ERROR),
			 errmsg("could not read block %u of relation %u/%u/%u, fork %u, from the pageserver: %s",
					block, tag->spcnode, tag->dbnode, tag->relnode, tag->forknum, reason)));
}

/* ---- SQL ---- */

Datum
zenith_get_raw_page_at_lsn(PG_FUNCTION_ARGS)
{
	RelTag		tag;
	uint32_t	block;
	uint64_t	lsn;
	uint32_t	fork;

	check_caller(fcinfo);
	fork = (uint32_t) forkname_to_number(text_to_cstring(PG_GETARG_TEXT_PP(1)));
	block = block_argument(PG_GETARG_INT64(2));
	lsn = lsn_argument(fcinfo, 3);
	tag = named_relation(PG_GETARG_TEXT_PP(0));
	tag.forknum = fork;
	PG_RETURN_BYTEA_P(fetch_page(&tag, block, lsn));
}

Datum
zenith_get_raw_page_at_lsn_of_file(PG_FUNCTION_ARGS)
{
	RelTag		tag;
	uint32_t	block;
	int64		fork;

	check_caller(fcinfo);
	fork = PG_GETARG_INT64(3);
	if (fork < 0 || fork > MAX_FORKNUM)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid fork number %lld", (long long) fork),
				 errhint("Forks are 0 (main), 1 (fsm), 2 (vm) and 3 (init).")));
	tag = (RelTag) {PG_GETARG_OID(0), PG_GETARG_OID(1), PG_GETARG_OID(2), (uint32_t) fork};
	block = block_argument(PG_GETARG_INT64(4));
	PG_RETURN_BYTEA_P(fetch_page(&tag, block, lsn_argument(fcinfo, 5)));
}
