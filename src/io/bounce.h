// What direct I/O cannot do in place: on a worker thread, by way of its scratch buffer.
#pragma once

#include <stdint.h>

struct image;
struct rq;

// rq's part at hand, whatever its alignment. Writes hold the range of their blocks (D1). Returns the
// bytes moved, 0 at the end of the file, or a negative errno.
int bounce_work(struct rq *rq);

// Writes zeroes to [offset, offset + len) of the image: blocks at the edges by read-modify-write, so
// the caller holds their range. rw_flags: RWF_*. 0 or a negative errno.
int bounce_write_zeroes(const struct image *image, uint64_t offset_bytes, uint64_t len_bytes, int rw_flags);
