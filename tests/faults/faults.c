/* A disk that fails: a library for LD_PRELOAD that counts what a process changes below some folders, and lets one of
   those calls fail, or ends the process there. It also lists what is changed anywhere, and lets the clock jump.

   Environment, read when the library is loaded, or fault_set(), fault_list() and fault_clock(), called later:
     FAULT_FOLDERS  folders whose files are counted, resolved, with ':' between them
     FAULT_AT       number of the call that fails, from 1; 0 counts only
     FAULT_ERRNO    its errno; 0 for none
     FAULT_FLAGS    sum of: 1 keeps failing, as a full disk does; 2 a write writes half of its bytes first;
                    4 the process ends there with code 137, as a killed one does; 8 it stops there, until it is
                    continued, and the call succeeds
     FAULT_LIST     file to which the name and path of every call that changes something is added, wherever it is
     FAULT_CLOCK    readings of the clock after which it jumps, ':', and by how many seconds

   Compiled as C, so that no header's exception specification is in the way. */
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
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { KEEPS = 1, HALF = 2, ENDS = 4, STOPS = 8 };
/* What a call needs: only new space is refused by a full disk. */
enum need { SPACE, WRITES, NO_SPACE };
enum verdict { GO_ON, FAIL, WRITE_HALF };

static char folders[8192];
static atomic_long wanted;
static int code, flags;
/* Shared with children, so that a parent knows where a child has ended. */
static struct {
    atomic_long calls, fired;
    char what[PATH_MAX + 64];
} alone, *seen = &alone;
static int list = -1;
static atomic_long readings, jump_after;
static long jump;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

long fault_calls(void) { return seen->calls; }
/* The call that failed, or "". */
const char *fault_what(void) { return seen->fired ? seen->what : ""; }

void fault_set(const char *below, long at, int error, int how) {
    wanted = 0;
    snprintf(folders, sizeof folders, "%s", below);
    seen->calls = seen->fired = 0;
    code = error;
    flags = how;
    wanted = at;
}

void fault_list(const char *path) {
    int old = list;
    list = *path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (old >= 0) syscall(SYS_close, old);
}

void fault_clock(long after, long seconds) {
    readings = 0;
    jump = seconds;
    jump_after = after;
}

__attribute__((constructor)) static void begin(void) {
    const char *at = getenv("FAULT_AT"), *error = getenv("FAULT_ERRNO"), *how = getenv("FAULT_FLAGS");
    const char *below = getenv("FAULT_FOLDERS"), *listed = getenv("FAULT_LIST"), *clock = getenv("FAULT_CLOCK");
    void *space = mmap(NULL, sizeof alone, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (space != MAP_FAILED) seen = space;
    if (below) fault_set(below, at ? atol(at) : 0, error ? atoi(error) : EIO, how ? atoi(how) : 0);
    if (listed) fault_list(listed);
    if (clock && strchr(clock, ':')) fault_clock(atol(clock), atol(strchr(clock, ':') + 1));
}

static int is_below(const char *path) {
    const char *start = folders;
    while (*start) {
        size_t length = strcspn(start, ":");
        if (length && !strncmp(path, start, length) && (path[length] == '/' || !path[length])) return 1;
        start += length + (start[length] == ':');
    }
    return 0;
}

/* Absolute path of an open file, or of a path relative to an open folder. */
static const char *path_of(int file, const char *path, char *space) {
    char link[64];
    ssize_t length;
    if (path && *path == '/') return path;
    if (file == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    length = readlink(link, space, PATH_MAX - 1);
    if (length < 0) return "";
    space[length] = 0;
    if (path) snprintf(space + length, PATH_MAX - (size_t)length, "/%s", path);
    return space;
}

static void note(const char *name, const char *full) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", name, full);
    syscall(SYS_write, list, line, length);
}

static enum verdict decide(const char *name, int file, const char *path, enum need need) {
    char space[PATH_MAX];
    const char *full;
    long number, at = wanted;
    int saved = errno, is_full = code == ENOSPC || code == EDQUOT;
    if (list < 0 && !*folders) return GO_ON;
    full = path_of(file, path, space);
    /* Terminals, pipes and sockets are not on a disk. */
    if (*full != '/' || !strncmp(full, "/dev/", 5) || !strncmp(full, "/proc/", 6)) { errno = saved; return GO_ON; }
    /* What is written to an open file needs no line of its own. */
    if (list >= 0 && path) note(name, full);
    errno = saved;
    if (!*folders || !is_below(full)) return GO_ON;
    number = atomic_fetch_add(&seen->calls, 1) + 1;
    if (!at || number < at || (number > at && !(flags & KEEPS))) return GO_ON;
    if (is_full && need == NO_SPACE && !(flags & ENDS)) return GO_ON;
    if (!atomic_exchange(&seen->fired, number)) snprintf(seen->what, sizeof seen->what, "%s %s", name, full);
    if (flags & STOPS) {
        wanted = 0;
        raise(SIGSTOP);
        return GO_ON;
    }
    if (need == WRITES && (flags & HALF) && number == at) return WRITE_HALF;
    if (flags & ENDS) _exit(137);
    if (!code) return GO_ON;
    errno = code;
    return FAIL;
}

/* What follows a write of half of the bytes: the process ends, or goes on with what is left. */
static ssize_t halved(ssize_t written) {
    if (flags & ENDS) _exit(137);
    return written;
}

static int changes(int how) { return (how & O_ACCMODE) != O_RDONLY || (how & (O_CREAT | O_TRUNC)); }
static mode_t mode_in(int how, va_list more) {
    return (how & O_CREAT) || (how & O_TMPFILE) == O_TMPFILE ? va_arg(more, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int how, ...) { \
        va_list more; mode_t mode; \
        REAL(name); \
        va_start(more, how); mode = mode_in(how, more); va_end(more); \
        if (changes(how) && decide("open", AT_FDCWD, path, SPACE)) return -1; \
        return real(path, how, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int how, ...) { \
        va_list more; mode_t mode; \
        REAL(name); \
        va_start(more, how); mode = mode_in(how, more); va_end(more); \
        if (changes(how) && decide("open", folder, path, SPACE)) return -1; \
        return real(folder, path, how, mode); \
    }
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        if (strpbrk(mode, "wa+") && decide("open", AT_FDCWD, path, SPACE)) return NULL; \
        return real(path, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *content, size_t size) {
    REAL(write);
    switch (decide("write", file, NULL, WRITES)) {
        case FAIL: return -1;
        case WRITE_HALF: return halved(real(file, content, size / 2));
        default: return real(file, content, size);
    }
}

#define PWRITE(name, type) \
    ssize_t name(int file, const void *content, size_t size, type at) { \
        REAL(name); \
        switch (decide("pwrite", file, NULL, WRITES)) { \
            case FAIL: return -1; \
            case WRITE_HALF: return halved(real(file, content, size / 2, at)); \
            default: return real(file, content, size, at); \
        } \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

size_t fwrite(const void *content, size_t size, size_t count, FILE *file) {
    REAL(fwrite);
    switch (decide("fwrite", fileno(file), NULL, WRITES)) {
        case FAIL: return 0;
        case WRITE_HALF: real(content, size, count / 2, file); fflush(file); return (size_t)halved(0);
        default: return real(content, size, count, file);
    }
}

#define REFUSED(name, file, path, need, result, call) \
    REAL(name); \
    if (decide(#name, file, path, need)) return result; \
    return real call

ssize_t writev(int file, const struct iovec *parts, int count) {
    REFUSED(writev, file, NULL, SPACE, -1, (file, parts, count));
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    REFUSED(pwritev, file, NULL, SPACE, -1, (file, parts, count, at));
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    REFUSED(sendfile, to, NULL, SPACE, -1, (to, from, at, size));
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    REFUSED(sendfile64, to, NULL, SPACE, -1, (to, from, at, size));
}
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *at, size_t size, unsigned how) {
    REFUSED(copy_file_range, to, NULL, SPACE, -1, (from, start, to, at, size, how));
}
int ftruncate(int file, off_t size) { REFUSED(ftruncate, file, NULL, SPACE, -1, (file, size)); }
int ftruncate64(int file, off64_t size) { REFUSED(ftruncate64, file, NULL, SPACE, -1, (file, size)); }
int truncate(const char *path, off_t size) { REFUSED(truncate, AT_FDCWD, path, SPACE, -1, (path, size)); }
int fallocate(int file, int how, off_t at, off_t size) {
    REFUSED(fallocate, file, NULL, SPACE, -1, (file, how, at, size));
}
int fsync(int file) { REFUSED(fsync, file, NULL, SPACE, -1, (file)); }
int fdatasync(int file) { REFUSED(fdatasync, file, NULL, SPACE, -1, (file)); }
int mkdir(const char *path, mode_t mode) { REFUSED(mkdir, AT_FDCWD, path, SPACE, -1, (path, mode)); }
int mkdirat(int folder, const char *path, mode_t mode) { REFUSED(mkdirat, folder, path, SPACE, -1, (folder, path, mode)); }
int rmdir(const char *path) { REFUSED(rmdir, AT_FDCWD, path, NO_SPACE, -1, (path)); }
int unlink(const char *path) { REFUSED(unlink, AT_FDCWD, path, NO_SPACE, -1, (path)); }
int unlinkat(int folder, const char *path, int how) { REFUSED(unlinkat, folder, path, NO_SPACE, -1, (folder, path, how)); }
int symlink(const char *to, const char *path) { REFUSED(symlink, AT_FDCWD, path, SPACE, -1, (to, path)); }
int link(const char *from, const char *to) { REFUSED(link, AT_FDCWD, to, SPACE, -1, (from, to)); }
static void note_moved(int folder, const char *path) {
    char space[PATH_MAX];
    if (list >= 0) note("move", path_of(folder, path, space));
}
int rename(const char *from, const char *to) {
    note_moved(AT_FDCWD, from);
    REFUSED(rename, AT_FDCWD, to, SPACE, -1, (from, to));
}
int renameat(int folder, const char *from, int other, const char *to) {
    note_moved(folder, from);
    REFUSED(renameat, other, to, SPACE, -1, (folder, from, other, to));
}
int renameat2(int folder, const char *from, int other, const char *to, unsigned how) {
    note_moved(folder, from);
    REFUSED(renameat2, other, to, SPACE, -1, (folder, from, other, to, how));
}

/* The clock of the day; that which measures durations never jumps. */
static long jumped(void) {
    long after = jump_after;
    return after && atomic_fetch_add(&readings, 1) >= after ? jump : 0;
}
int clock_gettime(clockid_t which, struct timespec *now) {
    int failed;
    REAL(clock_gettime);
    failed = real(which, now);
    if (!failed && which == CLOCK_REALTIME) now->tv_sec += jumped();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    int failed;
    REAL(gettimeofday);
    failed = real(now, zone);
    if (!failed) now->tv_sec += jumped();
    return failed;
}
time_t time(time_t *now) {
    time_t seconds;
    REAL(time);
    seconds = real(NULL) + jumped();
    if (now) *now = seconds;
    return seconds;
}
