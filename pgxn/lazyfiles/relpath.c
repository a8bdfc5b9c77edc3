/*
 * Path of a relation file -> relation fork and segment number.
 *
 * The forms are those of GetRelationPath() in common/relpath.c and _mdfd_segpath() in md.c:
 *
 *   global/REL[_FORK][.SEGMENT]
 *   base/DATABASE/REL[_FORK][.SEGMENT]
 *   pg_tblspc/TABLESPACE/PG_<major>_<catalog version>/DATABASE/REL[_FORK][.SEGMENT]
 *
 * relative to the data directory, which is the server's working directory, or absolute.
 */
#include "lazyfiles.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#define DEFAULTTABLESPACE_OID 1663
#define GLOBALTABLESPACE_OID 1664

/* Postgres' absolute path of the data directory; NULL in other programs. */
static char *const *data_directory;

void
relpath_init(void)
{
	data_directory = dlsym(RTLD_DEFAULT, "DataDir");
}

/*
 * Is this the server?  Programs that it starts (archive_command, COPY ... PROGRAM) inherit the library,
 * but a relative path may mean anything there.
 */
bool
is_server(void)
{
	return data_directory != NULL;
}

static bool
skip_prefix(const char **p, const char *prefix)
{
	size_t		length = strlen(prefix);

	if (strncmp(*p, prefix, length) != 0)
		return false;
	*p += length;
	return true;
}

/* A number as Postgres prints it: no sign, no leading zero, not above 2^32-1. */
static bool
parse_number(const char **p, uint32_t *number)
{
	uint64_t	value = 0;
	const char *s = *p;

	if (*s < '1' || *s > '9')
		return false;
	for (; *s >= '0' && *s <= '9'; s++)
	{
		value = value * 10 + (uint64_t) (*s - '0');
		if (value > UINT32_MAX)
			return false;
	}
	*p = s;
	*number = (uint32_t) value;
	return true;
}

static bool
parse_directory(const char **p, RelTag *tag)
{
	if (skip_prefix(p, "base/"))
	{
		tag->spcnode = DEFAULTTABLESPACE_OID;
		return parse_number(p, &tag->dbnode) && skip_prefix(p, "/");
	}
	if (skip_prefix(p, "global/"))
	{
		tag->spcnode = GLOBALTABLESPACE_OID;
		tag->dbnode = 0;
		return true;
	}
	if (skip_prefix(p, "pg_tblspc/"))
	{
		const char *slash;

		if (!parse_number(p, &tag->spcnode) || !skip_prefix(p, "/PG_"))
			return false;
		slash = strchr(*p, '/');
		if (slash == NULL)
			return false;
		*p = slash + 1;
		return parse_number(p, &tag->dbnode) && skip_prefix(p, "/");
	}
	return false;
}

static bool
parse_fork(const char **p, uint32_t *forknum)
{
	if (**p != '_')
		*forknum = 0;
	else if (skip_prefix(p, "_fsm"))
		*forknum = FSM_FORK;
	else if (skip_prefix(p, "_vm"))
		*forknum = 2;
	else if (skip_prefix(p, "_init"))
		*forknum = 3;
	else
		return false;
	return true;
}

bool
parse_relation_path(const char *path, RelTag *tag, uint32_t *segment)
{
	if (lazy_map == NULL || path == NULL)
		return false;
	if (path[0] == '/' && (data_directory == NULL || *data_directory == NULL ||
						   !skip_prefix(&path, *data_directory) || *path++ != '/'))
		return false;
	skip_prefix(&path, "./");

	*segment = 0;
	if (!parse_directory(&path, tag) || !parse_number(&path, &tag->relnode) ||
		!parse_fork(&path, &tag->forknum))
		return false;
	if (*path == '.')
	{
		path++;
		if (!parse_number(&path, segment) || *segment > UINT32_MAX / SEGMENT_BLOCKS)
			return false;
	}
	return *path == '\0';
}

/* The inverse: the path of a segment, relative to the data directory. */
void
segment_path(const RelTag *tag, uint32_t segment, char path[SEGMENT_PATH_MAX])
{
	static const char *const suffix[] = {"", "_fsm", "_vm", "_init"};
	char		directory[SEGMENT_PATH_MAX / 2];
	char		number[16] = "";

	if (tag->spcnode == GLOBALTABLESPACE_OID)
		strcpy(directory, "global");
	else if (tag->spcnode == DEFAULTTABLESPACE_OID)
		snprintf(directory, sizeof(directory), "base/%u", tag->dbnode);
	else
		snprintf(directory, sizeof(directory), "pg_tblspc/%u/%.40s/%u", tag->spcnode,
				 lazy_map->tablespace_version, tag->dbnode);
	if (segment > 0)
		snprintf(number, sizeof(number), ".%u", segment);
	snprintf(path, SEGMENT_PATH_MAX, "%s/%u%s%s", directory, tag->relnode, suffix[tag->forknum],
			 number);
}
