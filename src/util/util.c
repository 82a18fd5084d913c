#include "util/util.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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
