#include "util/iov.h"

#include <string.h>

#include "util/util.h"

// The next contiguous piece: at most len bytes of it, skip bytes into the list.
static char *iov_piece(const struct iovec **iov, size_t *skip, size_t *len)
{
    char *at;

    while (*skip >= (*iov)->iov_len) {
        *skip -= (*iov)->iov_len;
        (*iov)++;
    }
    at = (char *)(*iov)->iov_base + *skip;
    *len = min_of(*len, (*iov)->iov_len - *skip);
    *skip += *len;
    return at;
}

void iov_from_buf(const struct iovec *iov, size_t skip, const void *buf, size_t len)
{
    const char *from = buf;

    while (len) {
        size_t n = len;
        char *to = iov_piece(&iov, &skip, &n);

        memcpy(to, from, n);
        from += n;
        len -= n;
    }
}

void iov_to_buf(const struct iovec *iov, size_t skip, void *buf, size_t len)
{
    char *to = buf;

    while (len) {
        size_t n = len;
        const char *from = iov_piece(&iov, &skip, &n);

        memcpy(to, from, n);
        to += n;
        len -= n;
    }
}

void iov_zero(const struct iovec *iov, size_t skip, size_t len)
{
    while (len) {
        size_t n = len;
        char *to = iov_piece(&iov, &skip, &n);

        memset(to, 0, n);
        len -= n;
    }
}
