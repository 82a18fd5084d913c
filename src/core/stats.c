#include "core/stats.h"

#include <inttypes.h>
#include <string.h>

#include "core/device.h"
#include "core/queue.h"
#include "map/map.h"
#include "writeback/writeback.h"

static const char *const op_names[REQ_OP_NR] = {
    [REQ_OP_READ] = "read",
    [REQ_OP_WRITE] = "write",
    [REQ_OP_FLUSH] = "flush",
    [REQ_OP_DISCARD] = "discard",
    [REQ_OP_WRITE_ZEROES] = "write_zeroes",
    [REQ_OP_BLOCK_STATUS] = "block_status",
    [REQ_OP_PREFETCH] = "prefetch",
};

const char *stats_op_name(enum req_op op)
{
    return op_names[op];
}

uint64_t stats_bucket_ns(unsigned bucket)
{
    unsigned octave = bucket >> STATS_SUB_BITS, sub = bucket & ((1 << STATS_SUB_BITS) - 1);

    if (!octave)
        return sub;
    return (uint64_t)((1 << STATS_SUB_BITS) + sub) << (octave - 1);
}

void stats_sum(const struct device *dev, struct queue_stats *sum)
{
    memset(sum, 0, sizeof(*sum));
    for (unsigned q = 0; q < dev->nr_queues; q++) {
        const struct queue_stats *stats = dev->queues[q].stats;

        stats_add(&sum->nr_inflight, atomic_load(&stats->nr_inflight));
        for (unsigned i = 0; i < REQ_OP_NR; i++) {
            const struct op_stats *op = &stats->op[i];

            stats_add(&sum->op[i].nr_done, atomic_load(&op->nr_done));
            stats_add(&sum->op[i].nr_errors, atomic_load(&op->nr_errors));
            stats_add(&sum->op[i].nr_bytes, atomic_load(&op->nr_bytes));
            for (unsigned b = 0; b < STATS_NR_BUCKETS; b++)
                stats_add(&sum->op[i].latency[b], atomic_load(&op->latency[b]));
        }
    }
}

uint64_t stats_percentile_ns(const struct op_stats *op, double percent)
{
    uint64_t total = 0, seen = 0;

    for (unsigned b = 0; b < STATS_NR_BUCKETS; b++)
        total += atomic_load(&op->latency[b]);
    for (unsigned b = 0; b < STATS_NR_BUCKETS; b++) {
        seen += atomic_load(&op->latency[b]);
        if (seen && (double)seen >= (double)total * percent / 100)
            return stats_bucket_ns(b + 1);
    }
    return 0;
}

static void stats_print_map(const struct device *dev, FILE *file)
{
    struct map_status status;

    if (!dev->map || !map_describe(dev->map, &status))
        return;
    fprintf(file, "bight: %s: map %s: ", dev->name, dev->map->ops->name);
    if (status.is_redirecting)
        fprintf(file, "redirects to %s: ", status.device);
    else
        fprintf(file, "does not redirect: %s: ", status.why_not);
    fprintf(file,
            "%" PRIu64 " bytes in %" PRIu64 " extents, %" PRIu64 " bytes of zeroes, %" PRIu64
            " by way of the file, %" PRIu64 " not asked for yet; opened by others %" PRIu64 " times\n",
            status.device_bytes, status.nr_extents, status.zero_bytes, status.file_bytes,
            status.unknown_bytes, status.nr_lease_breaks);
}

void stats_print(const struct device *dev, FILE *file)
{
    struct queue_stats sum;
    struct writeback_stats writeback;

    stats_sum(dev, &sum);
    fprintf(file, "bight: %s: %u in flight\n", dev->name, atomic_load(&sum.nr_inflight));
    stats_print_map(dev, file);
    if (writeback_stats(dev, &writeback))
        fprintf(file,
                "bight: %s: writeback: %" PRIu64 " of %" PRIu64 " bytes used, %" PRIu64 " dirty, %" PRIu64
                " delayed, %" PRIu64 " reserved, %" PRIu64 " failed; %" PRIu64 " written, %" PRIu64
                " a second, by %" PRIu64 " writes; %" PRIu64 " allocated, %" PRIu64 " runs, %" PRIu64
                " calls of the map; %" PRIu64 " times throttled, %" PRIu64 " past the cache\n",
                dev->name, writeback.used_bytes, writeback.size_bytes, writeback.dirty_bytes,
                writeback.delayed_bytes, writeback.reserved_bytes, writeback.failed_bytes,
                writeback.written_bytes, writeback.bytes_per_s, writeback.nr_writes,
                writeback.allocated_bytes, writeback.nr_runs, writeback.nr_map_calls, writeback.nr_throttled,
                writeback.nr_passed);
    for (unsigned i = 0; i < REQ_OP_NR; i++) {
        const struct op_stats *op = &sum.op[i];

        if (!atomic_load(&op->nr_done))
            continue;
        fprintf(file,
                "bight: %s: %s: %" PRIu64 " done, %" PRIu64 " errors, %" PRIu64 " bytes, latency p50 %" PRIu64
                " us, p99 %" PRIu64 " us\n",
                dev->name, op_names[i], atomic_load(&op->nr_done), atomic_load(&op->nr_errors),
                atomic_load(&op->nr_bytes), stats_percentile_ns(op, 50) / 1000,
                stats_percentile_ns(op, 99) / 1000);
    }
}
