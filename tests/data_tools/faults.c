/* A preloaded library that fails, or kills the process after, one call on one path.

   FAULT_UNDER   a prefix: only paths below it are looked at
   FAULT_LOG     a descriptor that gets a line "op path" for each call
   FAULT         "serial|op|path|errno": the first such call (* in the path stands for anything) fails with errno; errno 0: the call is
                 made, and then the process is killed. Another serial makes it count anew. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char done[8192];

static int fault(const char *op, const char *path) { /* errno, 0 for a kill, -1 for nothing */
  const char *under = getenv("FAULT_UNDER"), *log = getenv("FAULT_LOG"), *want = getenv("FAULT");
  if (!under || !path || strncmp(path, under, strlen(under))) return -1;
  char line[4400], copy[8192], *save = 0;
  if (log && *log) {
    int n = snprintf(line, sizeof line, "%s %s\n", op, path);
    syscall(SYS_write, atoi(log), line, n);
  }
  if (!want || !*want || !strcmp(done, want)) return -1;
  snprintf(copy, sizeof copy, "%s", want);
  strtok_r(copy, "|", &save);
  const char *o = strtok_r(0, "|", &save), *p = strtok_r(0, "|", &save);
  const char *number = strtok_r(0, "|", &save);
  if (!o || !p || !number || strcmp(o, op) || fnmatch(p, path, 0)) return -1;
  snprintf(done, sizeof done, "%s", want);
  return atoi(number);
}

static const char *of(int fd, char *path, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  long n = syscall(SYS_readlink, link, path, size - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return path;
}

static const char *at(int dir, const char *name, char *path, size_t size) {
  char parent[4096];
  if (name[0] == '/' || dir == AT_FDCWD) return name;
  if (!of(dir, parent, sizeof parent)) return 0;
  snprintf(path, size, "%s/%s", parent, name);
  return path;
}

#define REAL(name, ...) static int (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
#define WRAP(op, path, call) \
  int number = fault(op, path); \
  if (number > 0) { errno = number; return -1; } \
  int result = call; \
  if (!number) kill(getpid(), SIGKILL); \
  return result

#define OPEN(name) \
  int name(const char *p, int flags, ...) { \
    va_list a; va_start(a, flags); mode_t m = va_arg(a, mode_t); va_end(a); \
    REAL(#name, const char *, int, ...); \
    WRAP("open", p, real(p, flags, m)); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
  int name(int d, const char *p, int flags, ...) { \
    char b[8192]; va_list a; va_start(a, flags); mode_t m = va_arg(a, mode_t); va_end(a); \
    REAL(#name, int, const char *, int, ...); \
    WRAP("open", at(d, p, b, sizeof b), real(d, p, flags, m)); }
OPENAT(openat)
OPENAT(openat64)
#define STAT(name, type) \
  int name(const char *p, struct type *s) { \
    REAL(#name, const char *, struct type *); WRAP("stat", p, real(p, s)); }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
#define STATAT(name, type) \
  int name(int d, const char *p, struct type *s, int f) { \
    char b[8192]; REAL(#name, int, const char *, struct type *, int); \
    WRAP("stat", at(d, p, b, sizeof b), real(d, p, s, f)); }
STATAT(fstatat, stat)
STATAT(fstatat64, stat64)
int rename(const char *p, const char *q) {
  REAL("rename", const char *, const char *); WRAP("rename", q, real(p, q)); }
int renameat(int d, const char *p, int e, const char *q) {
  REAL("renameat", int, const char *, int, const char *); WRAP("rename", q, real(d, p, e, q)); }
int mkdir(const char *p, mode_t m) {
  REAL("mkdir", const char *, mode_t); WRAP("mkdir", p, real(p, m)); }
int rmdir(const char *p) { REAL("rmdir", const char *); WRAP("rmdir", p, real(p)); }
int unlink(const char *p) { REAL("unlink", const char *); WRAP("unlink", p, real(p)); }
int unlinkat(int d, const char *p, int f) {
  char b[8192]; REAL("unlinkat", int, const char *, int);
  WRAP("unlink", at(d, p, b, sizeof b), real(d, p, f)); }
int fsync(int fd) {
  char b[8192]; REAL("fsync", int); WRAP("fsync", of(fd, b, sizeof b), real(fd)); }
ssize_t write(int fd, const void *data, size_t n) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "write");
  char b[8192];
  int number = fd > 2 ? fault("write", of(fd, b, sizeof b)) : -1;
  if (number > 0) { errno = number; return -1; }
  ssize_t result = real(fd, data, n);
  if (!number) kill(getpid(), SIGKILL);
  return result;
}
ssize_t read(int fd, void *data, size_t n) {
  static ssize_t (*real)(int, void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "read");
  char b[8192];
  int number = fault("read", of(fd, b, sizeof b));
  if (number > 0) { errno = number; return -1; }
  ssize_t result = real(fd, data, n);
  if (!number) kill(getpid(), SIGKILL);
  return result;
}
DIR *opendir(const char *p) {
  static DIR *(*real)(const char *);
  if (!real) real = dlsym(RTLD_NEXT, "opendir");
  int number = fault("opendir", p);
  if (number > 0) { errno = number; return 0; }
  DIR *result = real(p);
  if (!number) kill(getpid(), SIGKILL);
  return result;
}
