#include "control/metrics.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/device.h"
#include "core/stats.h"
#include "util/util.h"

static const double percentiles[] = {50, 90, 99, 99.9};

// Upper bounds of what is told as a histogram, in microseconds.
static const unsigned bounds_us[] = {10,   25,   50,    100,   250,    500,    1000,
                                     2500, 5000, 10000, 50000, 250000, 1000000};

static struct json_object *latency_json(const struct op_stats *op)
{
    struct json_object *array = json_object_new_array();

    for (unsigned b = 0; b < STATS_NR_BUCKETS; b++)
        json_object_array_add(array, json_object_new_uint64(atomic_load(&op->latency[b])));
    return array;
}

void metrics_latency_since(struct json_object *now, struct json_object *before, struct op_stats *op)
{
    now = json_object_object_get(now, "latency_buckets");
    before = json_object_object_get(before, "latency_buckets");
    for (unsigned b = 0; b < STATS_NR_BUCKETS; b++)
        op->latency[b] = json_object_get_uint64(json_object_array_get_idx(now, b)) -
                         json_object_get_uint64(json_object_array_get_idx(before, b));
}

static struct json_object *op_json(const struct op_stats *op, bool has_buckets)
{
    struct json_object *object = json_object_new_object(), *latency = json_object_new_object();
    char name[16];

    json_object_object_add(object, "done", json_object_new_uint64(atomic_load(&op->nr_done)));
    json_object_object_add(object, "errors", json_object_new_uint64(atomic_load(&op->nr_errors)));
    json_object_object_add(object, "bytes", json_object_new_uint64(atomic_load(&op->nr_bytes)));
    for (unsigned i = 0; i < ARRAY_SIZE(percentiles); i++) {
        snprintf(name, sizeof(name), "p%g", percentiles[i]);
        json_object_object_add(latency, name,
                               json_object_new_uint64(stats_percentile_ns(op, percentiles[i])));
    }
    json_object_object_add(object, "latency_ns", latency);
    if (has_buckets)
        json_object_object_add(object, "latency_buckets", latency_json(op));
    return object;
}

struct json_object *metrics_json(const struct device *dev, bool has_buckets)
{
    struct queue_stats *sum = malloc(sizeof(*sum));
    struct json_object *object, *ops;

    if (!sum)
        return NULL;
    stats_sum(dev, sum);
    object = json_object_new_object();
    ops = json_object_new_object();
    json_object_object_add(object, "time_ns", json_object_new_uint64(util_now_ns()));
    json_object_object_add(object, "in_flight", json_object_new_uint64(atomic_load(&sum->nr_inflight)));
    for (unsigned i = 0; i < REQ_OP_NR; i++)
        json_object_object_add(ops, stats_op_name(i), op_json(&sum->op[i], has_buckets));
    json_object_object_add(object, "ops", ops);
    free(sum);
    return object;
}

static void print_counter(FILE *file, const struct device *dev, const struct queue_stats *sum,
                          const char *name, const char *help, size_t at)
{
    fprintf(file, "# TYPE %s counter\n# HELP %s %s\n", name, name, help);
    for (unsigned i = 0; i < REQ_OP_NR; i++)
        fprintf(file, "%s_total{device=\"%s\",op=\"%s\"} %" PRIu64 "\n", name, dev->name, stats_op_name(i),
                atomic_load((const _Atomic uint64_t *)((const char *)&sum->op[i] + at)));
}

// Buckets are counted up to a bound that may lie inside one of ours: that one is left to the next bound.
static void print_latency(FILE *file, const struct device *dev, const struct op_stats *op,
                          const char *op_name)
{
    uint64_t nr = 0, sum_ns = 0;
    unsigned b = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(bounds_us); i++) {
        for (; b < STATS_NR_BUCKETS && stats_bucket_ns(b + 1) <= bounds_us[i] * 1000ULL; b++) {
            nr += atomic_load(&op->latency[b]);
            sum_ns += atomic_load(&op->latency[b]) * stats_bucket_ns(b);
        }
        // Floats are told from integers by their point.
        fprintf(file, "bight_latency_seconds_bucket{device=\"%s\",op=\"%s\",le=\"%g%s\"} %" PRIu64 "\n",
                dev->name, op_name, bounds_us[i] / 1e6, bounds_us[i] % 1000000 ? "" : ".0", nr);
    }
    for (; b < STATS_NR_BUCKETS; b++) {
        nr += atomic_load(&op->latency[b]);
        sum_ns += atomic_load(&op->latency[b]) * stats_bucket_ns(b);
    }
    fprintf(file, "bight_latency_seconds_bucket{device=\"%s\",op=\"%s\",le=\"+Inf\"} %" PRIu64 "\n",
            dev->name, op_name, nr);
    fprintf(file, "bight_latency_seconds_count{device=\"%s\",op=\"%s\"} %" PRIu64 "\n", dev->name, op_name,
            nr);
    fprintf(file, "bight_latency_seconds_sum{device=\"%s\",op=\"%s\"} %.9f\n", dev->name, op_name,
            (double)sum_ns / 1e9);
}

// Device names need no escapes: they are held to letters, digits and . _ - (state.h).
char *metrics_text(const struct device *dev)
{
    struct queue_stats *sum = malloc(sizeof(*sum));
    char *text = NULL;
    size_t len;
    FILE *file = sum ? open_memstream(&text, &len) : NULL;

    if (!file) {
        free(sum);
        return NULL;
    }
    stats_sum(dev, sum);
    print_counter(file, dev, sum, "bight_requests", "Requests that are complete, failed ones included.",
                  offsetof(struct op_stats, nr_done));
    print_counter(file, dev, sum, "bight_errors", "Requests that failed.",
                  offsetof(struct op_stats, nr_errors));
    print_counter(file, dev, sum, "bight_bytes", "Bytes of requests that did not fail.",
                  offsetof(struct op_stats, nr_bytes));
    fprintf(file, "# TYPE bight_latency_seconds histogram\n# UNIT bight_latency_seconds seconds\n"
                  "# HELP bight_latency_seconds From a request's arrival to its end.\n");
    for (unsigned i = 0; i < REQ_OP_NR; i++)
        print_latency(file, dev, &sum->op[i], stats_op_name(i));
    fprintf(
        file,
        "# TYPE bight_in_flight gauge\n# HELP bight_in_flight Requests that have come and are not complete.\n"
        "bight_in_flight{device=\"%s\"} %u\n",
        dev->name, atomic_load(&sum->nr_inflight));
    fprintf(file,
            "# TYPE bight_size_bytes gauge\n# UNIT bight_size_bytes bytes\n# HELP bight_size_bytes The "
            "device's size.\n"
            "bight_size_bytes{device=\"%s\"} %" PRIu64 "\n# EOF\n",
            dev->name, dev->limits.size_bytes);
    fclose(file);
    free(sum);
    return text;
}
