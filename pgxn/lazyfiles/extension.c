/*
 * Files of the zenith extension, where the server looks for them.
 *
 * CREATE EXTENSION reads from directories of the distribution, which may be unwritable and are not ours to
 * write in.  So these files are kept elsewhere, all in one directory, and the server is led there:
 *
 *   SHAREDIR/extension/zenith.control, SHAREDIR/extension/zenith--*.sql   opened, asked for, listed
 *   PKGLIBDIR/zenith.so   asked for ("$libdir/zenith" in the catalogs names the library on every machine;
 *                         the server then finds that it has this very file loaded already)
 *
 * All other paths are left as they are.
 */
#include "lazyfiles.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#define MAX_LISTINGS 8

/* A listing of SHAREDIR/extension in progress: first what is there, then our files. */
typedef struct Listing
{
	DIR		   *theirs;			/* NULL: unused */
	DIR		   *ours;			/* being read once theirs is at its end */
} Listing;

static const char *extension_directory; /* NULL: there is none */
static Listing listings[MAX_LISTINGS];

#define LIBC(name, type) ((type) dlsym(RTLD_NEXT, name))

typedef DIR *(*OpenDir) (const char *);
typedef struct dirent *(*ReadDir) (DIR *);
typedef int (*CloseDir) (DIR *);
typedef int (*Stat) (const char *, struct stat *);

void
extension_init(const char *directory)
{
	extension_directory = directory;
}

/* The server's directory of extensions, NULL if this is not a server that knows it yet. */
static const char *
server_directory(void)
{
	static char directory[PATH_MAX];
	const char *executable;
	void		(*get_share_path) (const char *, char *);

	if (directory[0] != '\0')
		return directory;
	executable = dlsym(RTLD_DEFAULT, "my_exec_path");
	get_share_path = (void (*) (const char *, char *)) dlsym(RTLD_DEFAULT, "get_share_path");
	if (executable == NULL || executable[0] == '\0' || get_share_path == NULL)
		return NULL;
	get_share_path(executable, directory);
	strncat(directory, "/extension", sizeof(directory) - strlen(directory) - 1);
	return directory;
}

/* Is this the name of a control file or script of the extension? */
static bool
is_extension_file(const char *name)
{
	size_t		length = strlen(name);

	return strcmp(name, "zenith.control") == 0 ||
		(strncmp(name, "zenith--", 8) == 0 && length > 4 && strcmp(name + length - 4, ".sql") == 0);
}

/* Does path lie directly in directory? */
static bool
lies_in(const char *path, const char *name, const char *directory)
{
	size_t		length = directory != NULL ? strlen(directory) : 0;

	return length > 0 && (size_t) (name - path) == length + 1 && strncmp(path, directory, length) == 0;
}

/* Where the file of this path really is: path itself unless it is one of ours. */
const char *
extension_path(const char *path, char buffer[PATH_MAX])
{
	const char *name;
	bool		ours;

	if (extension_directory == NULL || path == NULL || path[0] != '/' || !is_server())
		return path;
	name = strrchr(path, '/') + 1;
	if (strncmp(name, "zenith", 6) != 0)
		return path;
	if (strcmp(name, "zenith.so") == 0)
		ours = lies_in(path, name, dlsym(RTLD_DEFAULT, "pkglib_path"));
	else
		ours = is_extension_file(name) && lies_in(path, name, server_directory());
	if (!ours || snprintf(buffer, PATH_MAX, "%s/%s", extension_directory, name) >= PATH_MAX)
		return path;
	return buffer;
}

EXPORT int
stat(const char *path, struct stat *status)
{
	static Stat libc_stat;
	char		buffer[PATH_MAX];

	if (libc_stat == NULL)
		libc_stat = LIBC("stat", Stat);
	return libc_stat(extension_path(path, buffer), status);
}

/* ---- listing ---- */

static Listing *
find_listing(DIR *theirs)
{
	for (int i = 0; i < MAX_LISTINGS; i++)
		if (listings[i].theirs == theirs)
			return &listings[i];
	return NULL;
}

EXPORT DIR *
opendir(const char *path)
{
	DIR		   *opened = LIBC("opendir", OpenDir) (path);
	Listing    *listing;

	if (opened == NULL || extension_directory == NULL || !is_server() || path[0] != '/' ||
		server_directory() == NULL || strcmp(path, server_directory()) != 0)
		return opened;
	listing = find_listing(NULL);
	if (listing != NULL)
		*listing = (Listing) {.theirs = opened};
	return opened;
}

static struct dirent *
read_listing(Listing *listing, ReadDir libc_readdir)
{
	struct dirent *entry;

	while (listing->ours == NULL)
	{
		int			saved_errno = errno;

		errno = 0;
		entry = libc_readdir(listing->theirs);
		if (entry == NULL && errno != 0)
			return NULL;
		errno = saved_errno;
		if (entry != NULL && !is_extension_file(entry->d_name))
			return entry;
		if (entry == NULL)
			listing->ours = LIBC("opendir", OpenDir) (extension_directory);
		if (entry == NULL && listing->ours == NULL)
			return NULL;
	}
	while ((entry = libc_readdir(listing->ours)) != NULL && !is_extension_file(entry->d_name))
		;
	return entry;
}

EXPORT struct dirent *
readdir(DIR *directory)
{
	static ReadDir libc_readdir;
	Listing    *listing = extension_directory != NULL ? find_listing(directory) : NULL;

	if (libc_readdir == NULL)
		libc_readdir = LIBC("readdir", ReadDir);
	return listing != NULL ? read_listing(listing, libc_readdir) : libc_readdir(directory);
}

EXPORT int
closedir(DIR *directory)
{
	CloseDir	libc_closedir = LIBC("closedir", CloseDir);
	Listing    *listing = extension_directory != NULL ? find_listing(directory) : NULL;

	if (listing != NULL)
	{
		if (listing->ours != NULL)
			libc_closedir(listing->ours);
		*listing = (Listing) {0};
	}
	return libc_closedir(directory);
}
