#include "core/tags.h"

#include <errno.h>
#include <stdlib.h>

int tags_create(struct tags *tags, unsigned depth, size_t rq_bytes)
{
    *tags = (struct tags){.depth = depth, .stride_bytes = rq_bytes};
    tags->rqs = calloc(depth, rq_bytes);
    tags->free = calloc(depth, sizeof(*tags->free));
    if (!tags->rqs || !tags->free) {
        tags_destroy(tags);
        return -ENOMEM;
    }
    // Tag 0 on top of the stack.
    for (unsigned i = depth; i--;) {
        struct rq *rq = (struct rq *)(void *)(tags->rqs + i * rq_bytes);

        rq->tag = (uint16_t)i;
        tags_put(tags, rq);
    }
    return 0;
}

void tags_destroy(struct tags *tags)
{
    free(tags->rqs);
    free(tags->free);
    tags->rqs = NULL;
    tags->free = NULL;
}
