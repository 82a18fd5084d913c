#include "util/util.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * NSEC_PER_SEC + (uint64_t)ts.tv_nsec;
}

uint64_t util_now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

uint64_t util_coarse_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC_COARSE);
}

int64_t util_nr_cached_pages(int fd, uint64_t offset_bytes, uint64_t len_bytes)
{
    const struct {
        uint64_t offset_bytes, len_bytes;
    } range = {offset_bytes, len_bytes};
    struct {
        uint64_t nr_cached, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted;
    } pages;

    return syscall(SYS_cachestat, fd, &range, &pages, 0) < 0 ? -errno : (int64_t)pages.nr_cached;
}

void util_wait_alone(const char *name, int pipe_fd)
{
    sigset_t all;
    char byte;
    int null;

    prctl(PR_SET_NAME, name);
    setsid();
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    if (chdir("/") < 0)
        _exit(1);
    null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd <= 2; fd++)
        dup2(null, fd);
    dup2(pipe_fd, 3);
    close_range(4, ~0U, 0);
    while (read(3, &byte, 1) < 0 && errno == EINTR)
        ;
}

int util_parse_size(const char *text, uint64_t *bytes)
{
    static const char suffixes[] = "KMGT";
    const char *suffix;
    unsigned shift = 0;
    char *end;
    unsigned long long n;

    // strtoull would take blanks, signs and hexadecimal.
    if (!isdigit((unsigned char)text[0]))
        return -EINVAL;
    errno = 0;
    n = strtoull(text, &end, 10);
    if (errno)
        return -errno;
    if (*end) {
        suffix = strchr(suffixes, toupper((unsigned char)*end));
        if (!suffix || end[1])
            return -EINVAL;
        shift = 10 * (unsigned)(suffix - suffixes + 1);
    }
    // Offsets are off_t: what does not fit there is no size.
    if (n > (uint64_t)INT64_MAX >> shift)
        return -ERANGE;
    *bytes = (uint64_t)n << shift;
    return 0;
}

int util_parse_uint(const char *text, unsigned long min, unsigned long max, unsigned long *value)
{
    char *end;
    unsigned long n;

    if (!isdigit((unsigned char)text[0]))
        return -EINVAL;
    errno = 0;
    n = strtoul(text, &end, 10);
    if (*end)
        return -EINVAL;
    if (errno || n < min || n > max)
        return -ERANGE;
    *value = n;
    return 0;
}

// How many bytes of a character text begins with; 0: none that is well-formed.
static size_t utf8_bytes(const char *text)
{
    // A first byte from here on leads this many more, to a number of at least that.
    static const struct {
        unsigned char first;
        unsigned nr_more, min;
    } leads[] = {{0xf8, 0, 0},    {0xf0, 3, 0x10000}, {0xe0, 2, 0x800},
                 {0xc0, 1, 0x80}, {0x80, 0, 0},       {0, 0, 0}};

    unsigned char c = (unsigned char)*text;
    unsigned i = 0, code;

    while (c < leads[i].first)
        i++;
    if (c >= 0x80 && !leads[i].nr_more)
        return 0;
    code = c & (leads[i].nr_more ? 0x3fU >> leads[i].nr_more : 0x7fU);
    for (unsigned more = 1; more <= leads[i].nr_more; more++) {
        c = (unsigned char)text[more];
        if ((c & 0xc0) != 0x80) // the end of the text as well
            return 0;
        code = code << 6 | (c & 0x3fU);
    }
    if (code < leads[i].min || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        return 0;
    return 1 + leads[i].nr_more;
}

bool util_is_utf8(const char *text)
{
    size_t bytes = 1;

    for (; *text && bytes; text += bytes)
        bytes = utf8_bytes(text);
    return bytes;
}

void util_make_utf8(char *text)
{
    while (*text) {
        size_t bytes = utf8_bytes(text);

        if (!bytes)
            *text = '?';
        text += bytes ? bytes : 1;
    }
}
