// Tag sets: a transport's requests in flight, made once, never allocated on the way. A tag set
// belongs to one stream of requests (an NBD connection, a vring), so that a client that stalls runs
// out of its own tags and of nobody else's. Used by one thread.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "core/rq.h"

struct tags {
    unsigned depth;
    unsigned nr_free;
    bool is_exhausted; // ran out, and fewer than half are free again since
    struct rq **free;  // stack: the last used is the warmest
    char *rqs;
    size_t stride_bytes;
};

// Each tag is a struct of rq_bytes that begins with a struct rq. 0 or -ENOMEM. Cold.
int tags_create(struct tags *tags, unsigned depth, size_t rq_bytes);
void tags_destroy(struct tags *tags);

// NULL: out of tags, stop producing until tags_can_resume(). Hot.
static inline struct rq *tags_get(struct tags *tags)
{
    if (!tags->nr_free) {
        tags->is_exhausted = true;
        return NULL;
    }
    return tags->free[--tags->nr_free];
}

static inline void tags_put(struct tags *tags, struct rq *rq)
{
    tags->free[tags->nr_free++] = rq;
}

// A producer that was stopped goes on at half of the tags, not at the first free one: batches.
static inline bool tags_can_resume(struct tags *tags)
{
    if (tags->nr_free * 2 >= tags->depth)
        tags->is_exhausted = false;
    return !tags->is_exhausted;
}

static inline unsigned tags_nr_used(const struct tags *tags)
{
    return tags->depth - tags->nr_free;
}
