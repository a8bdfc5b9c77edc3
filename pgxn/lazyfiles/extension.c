/*
 * Files of Zenith's extensions, where the server looks for them.
 *
 * CREATE EXTENSION reads from directories of the distribution, which may be unwritable and are not ours to
 * write in.  So these files are kept elsewhere, those of each extension beside its library, and the server
 * is led there.  For an extension NAME these are:
 *
 *   SHAREDIR/extension/NAME.control, SHAREDIR/extension/NAME--*.sql   opened, asked for, listed
 *   PKGLIBDIR/NAME.so   asked for, opened ("$libdir/NAME" in the catalogs names the library on every
 *                       machine; of a preloaded one the server finds that it has this very file already)
 *
 * All other paths are left as they are.
 */
#include "lazyfiles.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#define MAX_EXTENSIONS 4
#define MAX_LISTINGS 8

typedef struct Extension
{
	char		directory[PATH_MAX];
	const char *name;			/* without the ".so" of its library; not terminated */
	size_t		length;			/* of the name */
} Extension;

/* A listing of SHAREDIR/extension in progress: first what is there, then our files. */
typedef struct Listing
{
	DIR		   *theirs;			/* NULL: unused */
	DIR		   *ours;			/* being read once theirs is at its end */
	unsigned	next;			/* extension to be read after that */
} Listing;

static Extension extensions[MAX_EXTENSIONS];
static unsigned extension_count;
static Listing listings[MAX_LISTINGS];

#define LIBC(name, type) ((type) dlsym(RTLD_NEXT, name))

typedef DIR *(*OpenDir) (const char *);
typedef struct dirent *(*ReadDir) (DIR *);
typedef int (*CloseDir) (DIR *);
typedef int (*Stat) (const char *, struct stat *);
typedef void *(*DlOpen) (const char *, int);

/* One extension, by the path of its library. */
static void
add_extension(const char *library, size_t length)
{
	Extension  *extension = &extensions[extension_count];
	const char *name = memrchr(library, '/', length);

	if (extension_count == MAX_EXTENSIONS || library[0] != '/' || length >= PATH_MAX || length < 4 ||
		memcmp(library + length - 3, ".so", 3) != 0)
		lazy_die("ZENITH_LAZYFILES_EXTENSIONS is not a list of at most %d libraries", MAX_EXTENSIONS);
	memcpy(extension->directory, library, (size_t) (name - library));
	extension->name = name + 1;
	extension->length = (size_t) (library + length - 3 - extension->name);
	extension_count++;
}

/* Paths of the libraries of our extensions, with colons between; NULL: there are none. */
void
extension_init(const char *libraries)
{
	while (libraries != NULL)
	{
		const char *end = strchrnul(libraries, ':');

		add_extension(libraries, (size_t) (end - libraries));
		libraries = *end == ':' ? end + 1 : NULL;
	}
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

/* The extension whose library this is by its name. */
static const Extension *
library_owner(const char *name)
{
	for (const Extension *e = extensions; e < extensions + extension_count; e++)
		if (strncmp(name, e->name, e->length) == 0 && strcmp(name + e->length, ".so") == 0)
			return e;
	return NULL;
}

/* The extension whose control file or script this is by its name. */
static const Extension *
script_owner(const char *name)
{
	size_t		length = strlen(name);

	for (const Extension *e = extensions; e < extensions + extension_count; e++)
	{
		const char *rest = name + e->length;

		if (strncmp(name, e->name, e->length) != 0)
			continue;
		if (strcmp(rest, ".control") == 0 ||
			(strncmp(rest, "--", 2) == 0 && strcmp(name + length - 4, ".sql") == 0))
			return e;
	}
	return NULL;
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
	const Extension *owner;

	if (extension_count == 0 || path == NULL || path[0] != '/' || !is_server())
		return path;
	name = strrchr(path, '/') + 1;
	owner = library_owner(name);
	if (owner != NULL && !lies_in(path, name, dlsym(RTLD_DEFAULT, "pkglib_path")))
		owner = NULL;
	if (owner == NULL)
	{
		owner = script_owner(name);
		if (owner == NULL || !lies_in(path, name, server_directory()))
			return path;
	}
	if (snprintf(buffer, PATH_MAX, "%s/%s", owner->directory, name) >= PATH_MAX)
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

static const char *
library_path(const char *path)
{
	static char buffer[PATH_MAX];

	return extension_path(path, buffer);
}

/*
 * The call of libc's function must be the last thing here, so that it becomes a jump: libc looks at who
 * called it for where to search for a library that has no path.
 */
EXPORT void *
dlopen(const char *path, int flags)
{
	DlOpen		libc_dlopen = LIBC("dlopen", DlOpen);

	return libc_dlopen(library_path(path), flags);
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

	if (opened == NULL || extension_count == 0 || !is_server() || path[0] != '/' ||
		server_directory() == NULL || strcmp(path, server_directory()) != 0)
		return opened;
	listing = find_listing(NULL);
	if (listing != NULL)
		*listing = (Listing) {.theirs = opened};
	return opened;
}

/* The next of our files; NULL after the last one, or with errno set. */
static struct dirent *
read_ours(Listing *listing, ReadDir libc_readdir)
{
	struct dirent *entry;

	for (;;)
	{
		if (listing->ours == NULL)
		{
			if (listing->next == extension_count)
				return NULL;
			listing->ours = LIBC("opendir", OpenDir) (extensions[listing->next++].directory);
			if (listing->ours == NULL)
				return NULL;
		}
		while ((entry = libc_readdir(listing->ours)) != NULL)
			if (script_owner(entry->d_name) != NULL)
				return entry;
		if (errno != 0)
			return NULL;
		LIBC("closedir", CloseDir) (listing->ours);
		listing->ours = NULL;
	}
}

static struct dirent *
read_listing(Listing *listing, ReadDir libc_readdir)
{
	struct dirent *entry = NULL;
	int			saved_errno = errno;

	errno = 0;
	if (listing->ours == NULL && listing->next == 0)
		while ((entry = libc_readdir(listing->theirs)) != NULL && script_owner(entry->d_name) != NULL)
			;
	if (entry == NULL && errno == 0)
		entry = read_ours(listing, libc_readdir);
	if (errno == 0)
		errno = saved_errno;
	return entry;
}

EXPORT struct dirent *
readdir(DIR *directory)
{
	static ReadDir libc_readdir;
	Listing    *listing = extension_count > 0 ? find_listing(directory) : NULL;

	if (libc_readdir == NULL)
		libc_readdir = LIBC("readdir", ReadDir);
	return listing != NULL ? read_listing(listing, libc_readdir) : libc_readdir(directory);
}

EXPORT int
closedir(DIR *directory)
{
	CloseDir	libc_closedir = LIBC("closedir", CloseDir);
	Listing    *listing = extension_count > 0 ? find_listing(directory) : NULL;

	if (listing != NULL)
	{
		if (listing->ours != NULL)
			libc_closedir(listing->ours);
		*listing = (Listing) {0};
	}
	return libc_closedir(directory);
}
