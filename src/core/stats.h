// Counters of a queue: written by its thread alone, read by any; also by another process, and after the end
// of the one that wrote them (control/supervisor.h).
#pragma once

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>

#include "core/rq.h"

// Latency buckets: four to the power of two, so a bucket's width is at most a quarter of its value.
#define STATS_SUB_BITS 2
#define STATS_NR_BUCKETS 160 // up to 2^40 ns, 18 minutes; what is longer counts as that

struct op_stats {
    _Atomic uint64_t nr_done; // errors included
    _Atomic uint64_t nr_errors;
    _Atomic uint64_t nr_bytes;
    _Atomic uint64_t latency[STATS_NR_BUCKETS];
};

struct queue_stats {
    _Atomic unsigned nr_inflight;
    struct op_stats op[REQ_OP_NR]; // the last one is rare: queues are neighbours in an array
};

// No lock prefix: there is one writer.
#define stats_add(counter, n)                                                                 \
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + (n), \
                          memory_order_relaxed)

static inline unsigned stats_bucket(uint64_t ns)
{
    unsigned log2, bucket;

    if (ns < (1 << STATS_SUB_BITS))
        return (unsigned)ns;
    log2 = 63 - (unsigned)__builtin_clzll(ns);
    bucket = ((log2 - STATS_SUB_BITS + 1) << STATS_SUB_BITS) +
             (unsigned)((ns >> (log2 - STATS_SUB_BITS)) & ((1 << STATS_SUB_BITS) - 1));
    return bucket < STATS_NR_BUCKETS ? bucket : STATS_NR_BUCKETS - 1;
}

// The smallest latency that falls into the bucket.
uint64_t stats_bucket_ns(unsigned bucket);

// Sum over the queues of a device: a consistent picture is not promised while it works.
struct device;
void stats_sum(const struct device *dev, struct queue_stats *sum);

// The latency that percent of the op's requests stay below (upper end of the bucket), in ns; 0
// without any.
uint64_t stats_percentile_ns(const struct op_stats *op, double percent);

// "read", "write"...
const char *stats_op_name(enum req_op op);

// A table for people.
void stats_print(const struct device *dev, FILE *file);
