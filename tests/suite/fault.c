/* Makes the n-th operation of a program that changes a file below a folder fail, or end the program.
 *
 * Loaded with LD_PRELOAD. FAULT_FOLDER: only files below it count. FAULT_AT: which operation, from 1 on; 0 for none. FAULT_KIND: error (EIO),
 * full (ENOSPC, from then on), short (half is written, then EIO), kill (SIGKILL before it), or after (SIGKILL after it). FAULT_LOG: a file to which each
 * operation's name and path are appended, by which a test knows how many there are and what they do.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long count;
static _Thread_local int inside;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_below(const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    char resolved[PATH_MAX];
    if (!folder || !path) return 0;
    if (path[0] != '/') {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        if (snprintf(resolved, sizeof resolved, "%s/%s", here, path) >= (int)sizeof resolved) return 0;
        path = resolved;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int is_descriptor_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static int is_kind(const char *kind) {
    const char *wanted = getenv("FAULT_KIND");
    return wanted && strcmp(wanted, kind) == 0;
}

/* Counts an operation. 0: it may go on; 1: it is to fail, errno is set; 2: it is to be cut short; 3: it is the last one. */
static int fault(const char *operation, const char *path) {
    if (inside) return 0;
    inside = 1;
    long now = atomic_fetch_add(&count, 1) + 1;
    const char *log = getenv("FAULT_LOG"), *at = getenv("FAULT_AT");
    if (log) {
        int file = open(log, O_WRONLY | O_APPEND | O_CREAT, 0644);
        if (file >= 0) {
            dprintf(file, "%s %s\n", operation, path ? path : "");
            close(file);
        }
    }
    inside = 0;
    long wanted = at ? atol(at) : 0;
    if (wanted == 0) return 0;
    if (is_kind("full") && now >= wanted) {
        errno = ENOSPC;
        return strncmp(operation, "unlink", 6) && strncmp(operation, "rmdir", 5) ? 1 : 0;
    }
    if (now != wanted) return 0;
    if (is_kind("kill")) raise(SIGKILL);
    if (is_kind("after")) return 3;
    if (is_kind("short")) {
        errno = EIO;
        return strncmp(operation, "write", 5) ? 1 : 2;
    }
    if (is_kind("error")) {
        errno = EIO;
        return 1;
    }
    return 0;
}

#define WRAP(type, name, parameters, arguments, path, condition) \
    type name parameters {                                      \
        if (!(condition)) return REAL(name) arguments;          \
        int found = fault(#name, path);                         \
        if (found == 1 || found == 2) return -1;                \
        type result = REAL(name) arguments;                     \
        if (found == 3) raise(SIGKILL);                         \
        return result;                                          \
    }

ssize_t write(int descriptor, const void *bytes, size_t length) {
    if (!is_descriptor_below(descriptor)) return REAL(write)(descriptor, bytes, length);
    int found = fault("write", 0);
    if (found == 1) return -1;
    if (found == 2 && length / 2 > 0) {
        REAL(write)(descriptor, bytes, length / 2);
        errno = EIO;
        return -1;
    }
    ssize_t result = REAL(write)(descriptor, bytes, length);
    if (found == 3) raise(SIGKILL);
    return result;
}

WRAP(ssize_t, writev, (int descriptor, const struct iovec *parts, int number), (descriptor, parts, number), 0, is_descriptor_below(descriptor))
WRAP(int, fsync, (int descriptor), (descriptor), 0, is_descriptor_below(descriptor))
WRAP(int, fdatasync, (int descriptor), (descriptor), 0, is_descriptor_below(descriptor))
WRAP(int, ftruncate64, (int descriptor, off64_t length), (descriptor, length), 0, is_descriptor_below(descriptor))
WRAP(int, rename, (const char *from, const char *to), (from, to), to, is_below(to))
WRAP(int, renameat, (int one, const char *from, int other, const char *to), (one, from, other, to), to, is_below(to))
WRAP(int, renameat2, (int one, const char *from, int other, const char *to, unsigned flags), (one, from, other, to, flags), to, is_below(to))
WRAP(int, link, (const char *from, const char *to), (from, to), to, is_below(to))
WRAP(int, linkat, (int one, const char *from, int other, const char *to, int flags), (one, from, other, to, flags), to, is_below(to))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode), path, is_below(path))
WRAP(int, unlink, (const char *path), (path), path, is_below(path))
WRAP(int, rmdir, (const char *path), (path), path, is_below(path))

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *place, size_t length, unsigned flags) {
    if (!is_descriptor_below(to)) return REAL(copy_file_range)(from, at, to, place, length, flags);
    int found = fault("copy_file_range", 0);
    if (found == 1 || found == 2) return -1;
    ssize_t result = REAL(copy_file_range)(from, at, to, place, length, flags);
    if (found == 3) raise(SIGKILL);
    return result;
}

WRAP(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), path, path[0] == '/' ? is_below(path) : is_descriptor_below(folder))

static int creates(int flags) { return flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC); }

#define WRAP_OPEN(name, parameters, arguments, is_ours)                                  \
    int name parameters {                                                                \
        va_list list;                                                                    \
        va_start(list, flags);                                                           \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(list, mode_t) : 0;        \
        va_end(list);                                                                    \
        if (inside || !creates(flags) || !(is_ours)) return REAL(name) arguments;        \
        int found = fault("open", path);                                                       \
        if (found == 1 || found == 2) return -1;                                         \
        int result = REAL(name) arguments;                                               \
        if (found == 3) raise(SIGKILL);                                                  \
        return result;                                                                   \
    }

WRAP_OPEN(open, (const char *path, int flags, ...), (path, flags, mode), is_below(path))
WRAP_OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), is_below(path))
WRAP_OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), is_below(path))
WRAP_OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), is_below(path))
