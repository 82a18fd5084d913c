// Straight-line code with blocking calls: one worker runs it for one request.
//
//  B1. Whole blocks go through image->fd (O_DIRECT). The last block of a file whose size is no multiple
//      of the block cannot be written so without making the file longer: its bytes go through
//      image->buffered_fd, and never by O_DIRECT.
//  B2. fd is the image's, or where the map has redirected to (map_extent()): whole blocks there, without an
//      end, and at the same place within a block.

#include "io/bounce.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "core/device.h"
#include "core/flush.h"
#include "core/queue.h"
#include "io/io.h"
#include "ring/workers.h"
#include "util/iov.h"
#include "util/util.h"

// Reads len bytes, or up to the end of the file. Bytes read, or a negative errno.
static int read_all(const struct image *image, int fd, void *buf, size_t len, uint64_t offset)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = pread(fd, (char *)buf + done, len - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        done += (size_t)n;
        // Part of a block is the end of the file: to ask there once more would be an unaligned read.
        if (!n || n % (ssize_t)image->dio_offset_align)
            break;
    }
    return (int)done;
}

static int write_all(int fd, const void *buf, size_t len, uint64_t offset, int rw_flags)
{
    while (len) {
        struct iovec iov = {.iov_base = (void *)buf, .iov_len = len};
        ssize_t n = pwritev2(fd, &iov, 1, (off_t)offset, rw_flags);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? -errno : -EIO;
        buf = (const char *)buf + n;
        offset += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

// The block of the file at offset, zeroes behind its end.
static int read_block(const struct image *image, int fd, void *block, uint64_t offset)
{
    int n = read_all(image, fd, block, image->dio_offset_align, offset);

    if (n < 0)
        return n;
    memset((char *)block + n, 0, image->dio_offset_align - (size_t)n);
    return 0;
}

// One scratch buffer's worth of a write at [start, end): from iov, skip bytes into it, or zeroes when
// iov is NULL.
static int bounce_write_piece(const struct image *image, int fd, uint64_t start, uint64_t end,
                              const struct iovec *iov, size_t skip, int rw_flags)
{
    char *scratch = workers_scratch();
    uint64_t align = image->dio_offset_align;
    uint64_t first = round_down(start, align), last = round_up(end, align);
    uint64_t blocks_end =
        fd == image->fd ? min_of(last, round_down(image->file_bytes, align)) : last; // B1, B2
    int ret = 0;

    if (!scratch)
        return -ENOMEM;
    if (start > first && first < blocks_end)
        ret = read_block(image, fd, scratch, first);
    if (!ret && end < last && last == blocks_end && (last - align > first || start == first))
        ret = read_block(image, fd, scratch + (last - align - first), last - align);
    if (ret < 0)
        return ret;
    if (iov)
        iov_to_buf(iov, skip, scratch + (start - first), end - start);
    else
        memset(scratch + (start - first), 0, end - start);
    if (blocks_end > first)
        ret = write_all(fd, scratch, blocks_end - first, first, rw_flags);
    if (!ret && end > blocks_end) {
        uint64_t tail = max_of(start, blocks_end);

        ret = write_all(image->buffered_fd, scratch + (tail - first), end - tail, tail, rw_flags);
    }
    return ret;
}

// The end of the piece that begins at start and fits the scratch buffer.
static uint64_t bounce_piece_end(const struct image *image, uint64_t start, uint64_t end)
{
    return min_of(end, round_down(start, image->dio_offset_align) + WORKERS_SCRATCH_BYTES);
}

static int bounce_write(const struct image *image, int fd, uint64_t offset, uint64_t len,
                        const struct iovec *iov, int rw_flags)
{
    uint64_t end = offset + len, next;

    for (uint64_t at = offset; at < end; at = next) {
        int ret;

        next = bounce_piece_end(image, at, end);
        ret = bounce_write_piece(image, fd, at, next, iov, at - offset, rw_flags);
        if (ret < 0)
            return ret;
    }
    return 0;
}

static int bounce_read(const struct image *image, int fd, uint64_t offset, uint64_t len,
                       const struct iovec *iov)
{
    char *scratch = workers_scratch();
    uint64_t align = image->dio_offset_align, end = offset + len, next;

    if (!scratch)
        return -ENOMEM;
    for (uint64_t at = offset; at < end; at = next) {
        uint64_t first = round_down(at, align);
        int n;

        next = bounce_piece_end(image, at, end);
        n = read_all(image, fd, scratch, round_up(next, align) - first, first);
        if (n < 0)
            return n;
        if (first + (uint64_t)n < next)
            memset(scratch + n, 0, next - first - (uint64_t)n);
        iov_from_buf(iov, at - offset, scratch + (at - first), next - at);
    }
    return 0;
}

int bounce_work(struct rq *rq)
{
    struct device *dev = rq->queue->dev;
    uint64_t len = min_of(rq_part_bytes(rq), LIMITS_MAX_TRANSFER_BYTES); // the result is an int
    int ret;

    if (rq->op == REQ_OP_READ) {
        ret = bounce_read(dev->image, rq->ext.fd, rq->ext.offset_bytes, len, rq->iov);
    } else {
        ret = bounce_write(dev->image, rq->ext.fd, rq->ext.offset_bytes, len, rq->iov, flush_rw_flags(rq));
        if (ret < 0)
            flush_write_failed(rq, ret);
    }
    return ret < 0 ? ret : (int)len;
}

int bounce_write_zeroes(const struct image *image, uint64_t offset_bytes, uint64_t len_bytes, int rw_flags)
{
    return bounce_write(image, image->fd, offset_bytes, len_bytes, NULL, rw_flags);
}
