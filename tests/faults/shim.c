// A preloaded library that records file-system calls and makes one of them fail.
//
// It sees the calls that go from Python, numpy, torch and safetensors to the C library, and looks
// only at paths below the directory FAULTS_ROOT. Two things can be switched on, by the environment
// or, after a fork, by calling the functions at the end:
//
//   FAULTS_LOG=FILE        append a line "OPERATION<tab>PATH" for each call, before it is made
//   FAULTS_POSITION=TEXT   "ACTION:VALUE:OPERATION:OCCURRENCE:PATH": do something at that call:
//                          e: fail with errno VALUE, s: sleep VALUE ms, k: SIGKILL after the call.
//                          OCCURRENCE 0 means every such call; * in PATH stands for anything
//   FAULTS_RANK=N          FAULTS_POSITION is meant for the process whose RANK is N
//
// In the log, a line "!OPERATION<tab>PATH" follows where it happens, and "~..." after a sleep.
//
// Paths are relative to FAULTS_ROOT. The process id, and numbers of nine and more digits (times,
// thread ids), are written as # so that a path is the same in every run.
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LONG_NUMBER 9

static char root[PATH_MAX];
static size_t root_length;
static int log_file = -1;

static struct {
  char action, operation[16], path[PATH_MAX];
  int value, always;
  atomic_int left;  // matching calls until it happens; 0: nothing is armed, or it has happened
} position;

static __thread int kill_after_call;

// --- Which path is meant --------------------------------------------------------------------------

static void append(char *text, size_t size, const char *more) {
  size_t length = strlen(text);
  snprintf(text + length, size - length, "%s", more);
}

// The absolute path of a descriptor; 0 where it has none.
static int path_of_descriptor(int fd, char *path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
  if (length <= 0 || path[0] != '/') return 0;
  path[length] = 0;
  return 1;
}

// The absolute path of (directory, name), without "//" and "/./".
static int absolute(int directory, const char *name, char *path, size_t size) {
  char raw[PATH_MAX] = "";
  if (!name) return 0;
  if (!*name) return path_of_descriptor(directory, path, size);
  if (name[0] != '/') {
    if (directory == AT_FDCWD) {
      if (syscall(SYS_getcwd, raw, sizeof raw) <= 0) return 0;
    } else if (!path_of_descriptor(directory, raw, sizeof raw)) {
      return 0;
    }
    append(raw, sizeof raw, "/");
  }
  append(raw, sizeof raw, name);
  size_t length = 0;
  for (char *from = raw; *from && length + 1 < size; from++) {
    if (from[0] == '/' && from[1] == '/') continue;
    if (from[0] == '/' && from[1] == '.' && (from[2] == '/' || !from[2])) {
      from++;
      continue;
    }
    path[length++] = *from;
  }
  if (length > 1 && path[length - 1] == '/') length--;
  path[length] = 0;
  return 1;
}

// The path below the root with its changing numbers replaced; 0 where it is not below the root.
static int below_root(const char *path, char *relative, size_t size) {
  if (!root_length || strncmp(path, root, root_length)) return 0;
  if (path[root_length] && path[root_length] != '/') return 0;
  const char *from = path + root_length + (path[root_length] == '/');
  char own[16];
  int own_length = snprintf(own, sizeof own, "%d", (int)getpid());
  size_t length = 0;
  if (!*from) relative[length++] = '.';
  while (*from && length + 1 < size) {
    size_t digits = strspn(from, "0123456789");
    // Hexadecimal digests keep their digits: they are the same in every run.
    int hexadecimal = (from > path && isxdigit((unsigned char)from[-1])) ||
                      isxdigit((unsigned char)from[digits]);
    int is_own = digits == (size_t)own_length && !strncmp(from, own, digits);
    if (digits && !hexadecimal && (digits >= LONG_NUMBER || is_own)) {
      relative[length++] = '#';
      from += digits;
    } else {
      for (size_t i = 0; i < (digits ? digits : 1) && length + 1 < size; i++)
        relative[length++] = *from++;
    }
  }
  relative[length] = 0;
  return 1;
}

// --- What happens at a call -----------------------------------------------------------------------

static void note(const char *mark, const char *operation, const char *relative) {
  char line[PATH_MAX + 32];
  if (log_file < 0) return;
  int length = snprintf(line, sizeof line, "%s%s\t%s\n", mark, operation, relative);
  syscall(SYS_write, log_file, line, length);
}

// The errno with which the call must fail; 0 where it is to be made.
static int consider(const char *operation, const char *path) {
  char relative[PATH_MAX];
  kill_after_call = 0;
  if ((log_file < 0 && position.left <= 0) || !below_root(path, relative, sizeof relative)) return 0;
  note("", operation, relative);
  if (position.left <= 0 || strcmp(position.operation, operation) ||
      fnmatch(position.path, relative, 0) ||
      (!position.always && atomic_fetch_sub(&position.left, 1) != 1))
    return 0;
  note("!", operation, relative);
  if (position.action == 'e') return position.value;
  if (position.action == 's') {
    struct timespec duration = {position.value / 1000, position.value % 1000 * 1000000L};
    nanosleep(&duration, 0);
    note("~", operation, relative);
  }
  kill_after_call = position.action == 'k';
  return 0;
}

// Whether a signal handler runs on its own small stack, as those of Python do after
// faulthandler.enable(): the buffers here would run over its end, into the heap.
static int in_signal_handler(void) {
  stack_t stack;
  return !sigaltstack(0, &stack) && (stack.ss_flags & SS_ONSTACK);
}

static __attribute__((noinline)) int look_at_path(const char *operation, int directory,
                                                  const char *name) {
  int before = errno;
  char path[PATH_MAX];
  int failure = absolute(directory, name, path, sizeof path) ? consider(operation, path) : 0;
  errno = before;
  return failure;
}

static int at_path(const char *operation, int directory, const char *name) {
  return in_signal_handler() ? 0 : look_at_path(operation, directory, name);
}

static __attribute__((noinline)) int look_at_descriptor(const char *operation, int fd) {
  int before = errno;
  char path[PATH_MAX];
  int failure = 0;
  if (fd != log_file && (log_file >= 0 || position.left > 0) &&
      path_of_descriptor(fd, path, sizeof path))
    failure = consider(operation, path);
  errno = before;
  return failure;
}

static int at_descriptor(const char *operation, int fd) {
  return fd <= 2 || in_signal_handler() ? 0 : look_at_descriptor(operation, fd);
}

static void after_call(void) {
  if (kill_after_call) kill(getpid(), SIGKILL);
}

#define REAL(type, name, ...)                                   \
  static type (*real)(__VA_ARGS__);                             \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define FAIL_OR(failed, type, call) \
  if (failure) {                    \
    errno = failure;                \
    return failed;                  \
  }                                 \
  type result = call;               \
  after_call();                     \
  return result

#define ON_PATH(type, failed, name, operation, parameters, directory, path, types, arguments) \
  type name parameters {                                                                      \
    REAL(type, #name, types);                                                                 \
    int failure = at_path(operation, directory, path);                                        \
    FAIL_OR(failed, type, real arguments);                                                    \
  }

#define ON_DESCRIPTOR(type, failed, name, operation, parameters, fd, types, arguments) \
  type name parameters {                                                               \
    REAL(type, #name, types);                                                          \
    int failure = at_descriptor(operation, fd);                                        \
    FAIL_OR(failed, type, real arguments);                                             \
  }

#define T(...) __VA_ARGS__

// --- Opening --------------------------------------------------------------------------------------

static const char *opening(int flags) {
  return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? "create" : "open";
}

#define OPEN(name)                                                 \
  int name(const char *path, int flags, ...) {                     \
    REAL(int, #name, const char *, int, ...);                      \
    va_list more;                                                  \
    va_start(more, flags);                                         \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                                  \
    int failure = at_path(opening(flags), AT_FDCWD, path);         \
    FAIL_OR(-1, int, real(path, flags, mode));                     \
  }
#define OPENAT(name)                                               \
  int name(int directory, const char *path, int flags, ...) {      \
    REAL(int, #name, int, const char *, int, ...);                 \
    va_list more;                                                  \
    va_start(more, flags);                                         \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                                  \
    int failure = at_path(opening(flags), directory, path);        \
    FAIL_OR(-1, int, real(directory, path, flags, mode));          \
  }
#define FOPEN(name)                                                \
  FILE *name(const char *path, const char *mode) {                 \
    REAL(FILE *, #name, const char *, const char *);               \
    int failure = at_path(strpbrk(mode, "wa+") ? "create" : "open", AT_FDCWD, path); \
    FAIL_OR(0, FILE *, real(path, mode));                          \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)
ON_PATH(DIR *, 0, opendir, "opendir", (const char *p), AT_FDCWD, p, T(const char *), (p))
ON_DESCRIPTOR(DIR *, 0, fdopendir, "opendir", (int fd), fd, T(int), (fd))

// --- Looking --------------------------------------------------------------------------------------

ON_PATH(int, -1, stat, "stat", (const char *p, struct stat *s), AT_FDCWD, p,
        T(const char *, struct stat *), (p, s))
ON_PATH(int, -1, stat64, "stat", (const char *p, struct stat64 *s), AT_FDCWD, p,
        T(const char *, struct stat64 *), (p, s))
ON_PATH(int, -1, lstat, "stat", (const char *p, struct stat *s), AT_FDCWD, p,
        T(const char *, struct stat *), (p, s))
ON_PATH(int, -1, lstat64, "stat", (const char *p, struct stat64 *s), AT_FDCWD, p,
        T(const char *, struct stat64 *), (p, s))
ON_PATH(int, -1, fstatat, "stat", (int d, const char *p, struct stat *s, int f), d, p,
        T(int, const char *, struct stat *, int), (d, p, s, f))
ON_PATH(int, -1, fstatat64, "stat", (int d, const char *p, struct stat64 *s, int f), d, p,
        T(int, const char *, struct stat64 *, int), (d, p, s, f))
ON_PATH(int, -1, statx, "stat", (int d, const char *p, int f, unsigned m, struct statx *s), d, p,
        T(int, const char *, int, unsigned, struct statx *), (d, p, f, m, s))
ON_PATH(int, -1, access, "access", (const char *p, int m), AT_FDCWD, p, T(const char *, int), (p, m))
ON_PATH(int, -1, faccessat, "access", (int d, const char *p, int m, int f), d, p,
        T(int, const char *, int, int), (d, p, m, f))
ON_DESCRIPTOR(int, -1, fstat, "fstat", (int fd, struct stat *s), fd, T(int, struct stat *), (fd, s))
ON_DESCRIPTOR(int, -1, fstat64, "fstat", (int fd, struct stat64 *s), fd, T(int, struct stat64 *),
              (fd, s))

struct dirent *readdir(DIR *d) {
  REAL(struct dirent *, "readdir", DIR *);
  int failure = at_descriptor("readdir", dirfd(d));
  FAIL_OR(0, struct dirent *, real(d));
}
struct dirent64 *readdir64(DIR *d) {
  REAL(struct dirent64 *, "readdir64", DIR *);
  int failure = at_descriptor("readdir", dirfd(d));
  FAIL_OR(0, struct dirent64 *, real(d));
}

// --- Reading and writing --------------------------------------------------------------------------

ON_DESCRIPTOR(ssize_t, -1, read, "read", (int fd, void *b, size_t n), fd, T(int, void *, size_t),
              (fd, b, n))
ON_DESCRIPTOR(ssize_t, -1, pread, "read", (int fd, void *b, size_t n, off_t o), fd,
              T(int, void *, size_t, off_t), (fd, b, n, o))
ON_DESCRIPTOR(ssize_t, -1, pread64, "read", (int fd, void *b, size_t n, off64_t o), fd,
              T(int, void *, size_t, off64_t), (fd, b, n, o))
ON_DESCRIPTOR(ssize_t, -1, readv, "read", (int fd, const struct iovec *v, int n), fd,
              T(int, const struct iovec *, int), (fd, v, n))
ON_DESCRIPTOR(ssize_t, -1, write, "write", (int fd, const void *b, size_t n), fd,
              T(int, const void *, size_t), (fd, b, n))
ON_DESCRIPTOR(ssize_t, -1, pwrite, "write", (int fd, const void *b, size_t n, off_t o), fd,
              T(int, const void *, size_t, off_t), (fd, b, n, o))
ON_DESCRIPTOR(ssize_t, -1, pwrite64, "write", (int fd, const void *b, size_t n, off64_t o), fd,
              T(int, const void *, size_t, off64_t), (fd, b, n, o))
ON_DESCRIPTOR(ssize_t, -1, writev, "write", (int fd, const struct iovec *v, int n), fd,
              T(int, const struct iovec *, int), (fd, v, n))
ON_DESCRIPTOR(ssize_t, -1, sendfile, "write", (int to, int from, off_t *o, size_t n), to,
              T(int, int, off_t *, size_t), (to, from, o, n))
ON_DESCRIPTOR(ssize_t, -1, sendfile64, "write", (int to, int from, off64_t *o, size_t n), to,
              T(int, int, off64_t *, size_t), (to, from, o, n))
ON_DESCRIPTOR(ssize_t, -1, copy_file_range, "write",
              (int from, off64_t *p, int to, off64_t *q, size_t n, unsigned f), to,
              T(int, off64_t *, int, off64_t *, size_t, unsigned), (from, p, to, q, n, f))
ON_DESCRIPTOR(int, -1, ftruncate, "truncate", (int fd, off_t n), fd, T(int, off_t), (fd, n))
ON_DESCRIPTOR(int, -1, ftruncate64, "truncate", (int fd, off64_t n), fd, T(int, off64_t), (fd, n))
ON_DESCRIPTOR(int, -1, fsync, "fsync", (int fd), fd, T(int), (fd))
ON_DESCRIPTOR(int, -1, fdatasync, "fsync", (int fd), fd, T(int), (fd))
ON_DESCRIPTOR(int, -1, flock, "flock", (int fd, int o), fd, T(int, int), (fd, o))
ON_DESCRIPTOR(void *, MAP_FAILED, mmap, "mmap",
              (void *a, size_t n, int p, int f, int fd, off_t o), fd,
              T(void *, size_t, int, int, int, off_t), (a, n, p, f, fd, o))
ON_DESCRIPTOR(void *, MAP_FAILED, mmap64, "mmap",
              (void *a, size_t n, int p, int f, int fd, off64_t o), fd,
              T(void *, size_t, int, int, int, off64_t), (a, n, p, f, fd, o))

// --- Names ----------------------------------------------------------------------------------------

ON_PATH(int, -1, rename, "rename", (const char *a, const char *b), AT_FDCWD, b,
        T(const char *, const char *), (a, b))
ON_PATH(int, -1, renameat, "rename", (int d, const char *a, int e, const char *b), e, b,
        T(int, const char *, int, const char *), (d, a, e, b))
ON_PATH(int, -1, renameat2, "rename", (int d, const char *a, int e, const char *b, unsigned f), e, b,
        T(int, const char *, int, const char *, unsigned), (d, a, e, b, f))
ON_PATH(int, -1, link, "link", (const char *a, const char *b), AT_FDCWD, b,
        T(const char *, const char *), (a, b))
ON_PATH(int, -1, linkat, "link", (int d, const char *a, int e, const char *b, int f), e, b,
        T(int, const char *, int, const char *, int), (d, a, e, b, f))
ON_PATH(int, -1, symlink, "link", (const char *a, const char *b), AT_FDCWD, b,
        T(const char *, const char *), (a, b))
ON_PATH(int, -1, mkdir, "mkdir", (const char *p, mode_t m), AT_FDCWD, p, T(const char *, mode_t),
        (p, m))
ON_PATH(int, -1, mkdirat, "mkdir", (int d, const char *p, mode_t m), d, p,
        T(int, const char *, mode_t), (d, p, m))
ON_PATH(int, -1, unlink, "unlink", (const char *p), AT_FDCWD, p, T(const char *), (p))
ON_PATH(int, -1, rmdir, "rmdir", (const char *p), AT_FDCWD, p, T(const char *), (p))
ON_PATH(int, -1, remove, "unlink", (const char *p), AT_FDCWD, p, T(const char *), (p))
ON_PATH(int, -1, chmod, "chmod", (const char *p, mode_t m), AT_FDCWD, p, T(const char *, mode_t),
        (p, m))
ON_DESCRIPTOR(int, -1, fchmod, "chmod", (int fd, mode_t m), fd, T(int, mode_t), (fd, m))

int unlinkat(int directory, const char *path, int flags) {
  REAL(int, "unlinkat", int, const char *, int);
  int failure = at_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, path);
  FAIL_OR(-1, int, real(directory, path, flags));
}

// Of the process, not of a path: it counts as one on the root.
int prctl(int option, ...) {
  REAL(int, "prctl", int, unsigned long, unsigned long, unsigned long, unsigned long);
  va_list more;
  va_start(more, option);
  unsigned long a = va_arg(more, unsigned long), b = va_arg(more, unsigned long);
  unsigned long c = va_arg(more, unsigned long), d = va_arg(more, unsigned long);
  va_end(more);
  int failure = option == PR_SET_PDEATHSIG ? at_path("pdeathsig", AT_FDCWD, root) : 0;
  FAIL_OR(-1, int, real(option, a, b, c, d));
}

// --- Switching it on ------------------------------------------------------------------------------

// Returns 1 if the text is a position; "" switches the fault off.
int faults_arm(const char *text) {
  int occurrence = 0;
  position.left = 0;
  if (!*text) return 1;
  if (sscanf(text, "%c:%d:%15[^:]:%d:%4095[^\n]", &position.action, &position.value, position.operation,
             &occurrence, position.path) != 5)
    return 0;
  position.always = !occurrence;
  position.left = occurrence ? occurrence : 1;
  return 1;
}

// Append to this file from now on; "" for none.
void faults_log(const char *path) {
  if (log_file >= 0) syscall(SYS_close, log_file);
  log_file = -1;
  if (*path)
    log_file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

__attribute__((constructor)) static void begin(void) {
  const char *text = getenv("FAULTS_ROOT");
  if (!text || text[0] != '/') return;
  snprintf(root, sizeof root, "%s", text);
  root_length = strlen(root);
  if ((text = getenv("FAULTS_LOG"))) faults_log(text);
  const char *only = getenv("FAULTS_RANK"), *rank = getenv("RANK");
  if (only && (!rank || strcmp(only, rank))) return;
  if ((text = getenv("FAULTS_POSITION"))) faults_arm(text);
}
