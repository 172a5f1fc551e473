// Preloaded by tests: a slow fsync of one rank, and a Linux that refuses PR_SET_PDEATHSIG.
//   SLOW_FSYNC="seconds:part of the path"   the first fsync of such a file sleeps so long
//   SLOW_RANK="1"                           of this rank alone
//   NO_PDEATHSIG=1                          prctl(PR_SET_PDEATHSIG) answers EPERM
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static int slept;

int fsync(int fd) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  const char *slow = getenv("SLOW_FSYNC"), *only = getenv("SLOW_RANK"), *rank = getenv("RANK");
  if (slow && !slept && (!only || (rank && !strcmp(only, rank)))) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    const char *part = strchr(slow, ':');
    if (length > 0 && part) {
      path[length] = 0;
      if (strstr(path, part + 1)) {
        struct timespec time = {atoi(slow), 0};
        slept = 1;
        fprintf(stderr, "slow fsync begins: %s\n", path);
        nanosleep(&time, NULL);
        fprintf(stderr, "slow fsync ends\n");
      }
    }
  }
  return real(fd);
}

int prctl(int option, ...) {
  static int (*real)(int, unsigned long, unsigned long, unsigned long, unsigned long);
  if (!real) real = dlsym(RTLD_NEXT, "prctl");
  if (option == PR_SET_PDEATHSIG && getenv("NO_PDEATHSIG")) {
    errno = EPERM;
    return -1;
  }
  va_list rest;
  va_start(rest, option);
  unsigned long a = va_arg(rest, unsigned long), b = va_arg(rest, unsigned long);
  unsigned long c = va_arg(rest, unsigned long), d = va_arg(rest, unsigned long);
  va_end(rest);
  return real(option, a, b, c, d);
}
