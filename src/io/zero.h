// DISCARD and WRITE_ZEROES, for direct and buffered alike.
#pragma once

struct rq;

// On a worker. Edges of blocks are the caller's to exclude (direct.c). 0 or a negative errno.
int zero_work(struct rq *rq);
