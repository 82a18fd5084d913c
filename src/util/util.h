// Small things that everybody needs: no state, no allocation.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define min_of(a, b) ((a) < (b) ? (a) : (b))
#define max_of(a, b) ((a) > (b) ? (a) : (b))

#define KiB 1024ULL
#define MiB (1024 * KiB)
#define SECTOR_BYTES 512ULL
#define NSEC_PER_SEC 1000000000ULL

// align: a power of two.
static inline uint64_t round_down(uint64_t n, uint64_t align)
{
    return n & ~(align - 1);
}

static inline uint64_t round_up(uint64_t n, uint64_t align)
{
    return round_down(n + align - 1, align);
}

static inline int is_power_of_2(uint64_t n)
{
    return n && !(n & (n - 1));
}

// Monotonic time in nanoseconds.
uint64_t util_now_ns(void);

// The same to some milliseconds, and cheap.
uint64_t util_coarse_ns(void);

// Pages of the file of fd that the page cache has in [offset_bytes, + len_bytes), to its end where len_bytes
// is 0; or a negative errno (-ENOSYS before Linux 6.5). cachestat(2)
int64_t util_nr_cached_pages(int fd, uint64_t offset_bytes, uint64_t len_bytes);

// For a process that was just forked to outlive us: is called that, gives up every file but the pipe, lets no
// signal but SIGKILL end it, and returns when nobody has the other end any more.
void util_wait_alone(const char *name, int pipe_fd);

// A size: digits, then at most one of K, M, G, T (1024-based; either case). What off_t cannot hold is
// -ERANGE, everything else -EINVAL. 0 when it is one.
int util_parse_size(const char *text, uint64_t *bytes);

// A decimal number in [min, max]. 0, -EINVAL or -ERANGE.
int util_parse_uint(const char *text, unsigned long min, unsigned long max, unsigned long *value);

// Whether text is well-formed UTF-8 (RFC 3629).
bool util_is_utf8(const char *text);
// Puts a question mark for every byte that keeps it from being that.
void util_make_utf8(char *text);
