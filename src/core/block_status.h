#pragma once

struct rq;

// Fills rq->iov[0] with the extents of the range, neighbours in the same state as one. On a worker:
// the map may block. 0 or a negative errno.
int block_status_work(struct rq *rq);
