#include "unit.h"

#include <stdlib.h>
#include <string.h>

#include "core/device.h"
#include "core/queue.h"
#include "core/stats.h"

static void buckets_grow_with_the_latency_and_stay_in_range(void **state)
{
    unsigned last = 0;

    (void)state;
    for (unsigned shift = 0; shift < 64; shift++) {
        for (unsigned eighth = 0; eighth < 8; eighth++) {
            uint64_t ns = (1ULL << shift) + ((1ULL << shift) >> 3) * eighth;
            unsigned bucket = stats_bucket(ns);

            assert_true(bucket >= last);
            assert_true(bucket < STATS_NR_BUCKETS);
            last = bucket;
        }
    }
    assert_int_equal(stats_bucket(0), 0);
    assert_int_equal(stats_bucket(UINT64_MAX), STATS_NR_BUCKETS - 1);
}

static void neighbours_fall_into_the_same_bucket_or_the_next(void **state)
{
    (void)state;
    for (uint64_t ns = 0; ns < 100000; ns++)
        assert_in_range(stats_bucket(ns + 1), stats_bucket(ns), stats_bucket(ns) + 1);
}

static void bucket_ns_is_the_smallest_latency_of_its_bucket(void **state)
{
    (void)state;
    for (unsigned bucket = 0; bucket < STATS_NR_BUCKETS; bucket++) {
        uint64_t ns = stats_bucket_ns(bucket);

        assert_int_equal(stats_bucket(ns), bucket);
        if (bucket)
            assert_int_equal(stats_bucket(ns - 1), bucket - 1);
    }
}

static void a_bucket_is_at_most_a_quarter_of_its_value_wide(void **state)
{
    (void)state;
    for (unsigned bucket = 4; bucket < STATS_NR_BUCKETS; bucket++)
        assert_true((stats_bucket_ns(bucket + 1) - stats_bucket_ns(bucket)) * 4 <= stats_bucket_ns(bucket));
}

static void percentiles_are_the_upper_ends_of_their_buckets(void **state)
{
    struct op_stats *op = calloc(1, sizeof(*op));

    (void)state;
    assert_int_equal(stats_percentile_ns(op, 50), 0);
    stats_add(&op->latency[stats_bucket(1000)], 98);
    stats_add(&op->latency[stats_bucket(50000)], 1);
    stats_add(&op->latency[stats_bucket(7000000)], 1);
    assert_int_equal(stats_percentile_ns(op, 0), stats_bucket_ns(stats_bucket(1000) + 1));
    assert_int_equal(stats_percentile_ns(op, 50), stats_bucket_ns(stats_bucket(1000) + 1));
    assert_int_equal(stats_percentile_ns(op, 98), stats_bucket_ns(stats_bucket(1000) + 1));
    assert_int_equal(stats_percentile_ns(op, 99), stats_bucket_ns(stats_bucket(50000) + 1));
    assert_int_equal(stats_percentile_ns(op, 99.5), stats_bucket_ns(stats_bucket(7000000) + 1));
    assert_int_equal(stats_percentile_ns(op, 100), stats_bucket_ns(stats_bucket(7000000) + 1));
    free(op);
}

static struct queue queues[3];
static struct queue_stats stats[3];
static char dev_name[] = "disk";

static struct device device_of_queues(void)
{
    memset(queues, 0, sizeof(queues));
    memset(stats, 0, sizeof(stats));
    for (unsigned i = 0; i < ARRAY_SIZE(queues); i++)
        queues[i].stats = &stats[i];
    return (struct device){.name = dev_name, .queues = queues, .nr_queues = ARRAY_SIZE(queues)};
}

static void the_sum_covers_every_queue_and_counter(void **state)
{
    struct device dev = device_of_queues();
    struct queue_stats *sum = calloc(1, sizeof(*sum));

    (void)state;
    for (unsigned q = 0; q < ARRAY_SIZE(queues); q++) {
        stats_add(&queues[q].stats->nr_inflight, q);
        for (unsigned i = 0; i < REQ_OP_NR; i++) {
            struct op_stats *op = &queues[q].stats->op[i];

            stats_add(&op->nr_done, 100 + i);
            stats_add(&op->nr_errors, i);
            stats_add(&op->nr_bytes, 1000 * q);
            stats_add(&op->latency[q * 50], i + 1);
        }
    }
    stats_sum(&dev, sum);
    assert_int_equal(sum->nr_inflight, 0 + 1 + 2);
    for (unsigned i = 0; i < REQ_OP_NR; i++) {
        assert_int_equal(sum->op[i].nr_done, 3 * (100 + i));
        assert_int_equal(sum->op[i].nr_errors, 3 * i);
        assert_int_equal(sum->op[i].nr_bytes, 3000);
        for (unsigned b = 0; b < STATS_NR_BUCKETS; b++)
            assert_int_equal(sum->op[i].latency[b], b == 0 || b == 50 || b == 100 ? i + 1 : 0);
    }
    free(sum);
}

static void the_table_names_each_op_that_was_used_and_no_other(void **state)
{
    struct device dev = device_of_queues();
    char *text;
    size_t len;
    FILE *file = open_memstream(&text, &len);

    (void)state;
    stats_add(&queues[1].stats->op[REQ_OP_WRITE].nr_done, 12);
    stats_add(&queues[1].stats->op[REQ_OP_WRITE].nr_errors, 3);
    stats_add(&queues[2].stats->op[REQ_OP_WRITE].nr_bytes, 36864);
    stats_add(&queues[2].stats->op[REQ_OP_PREFETCH].nr_done, 1);
    stats_print(&dev, file);
    fclose(file);
    assert_non_null(strstr(text, "disk: 0 in flight\n"));
    assert_non_null(strstr(text, "disk: write: 12 done, 3 errors, 36864 bytes"));
    assert_non_null(strstr(text, "disk: prefetch: 1 done"));
    assert_null(strstr(text, "read"));
    assert_null(strstr(text, "flush"));
    free(text);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(buckets_grow_with_the_latency_and_stay_in_range),
        cmocka_unit_test(neighbours_fall_into_the_same_bucket_or_the_next),
        cmocka_unit_test(bucket_ns_is_the_smallest_latency_of_its_bucket),
        cmocka_unit_test(a_bucket_is_at_most_a_quarter_of_its_value_wide),
        cmocka_unit_test(percentiles_are_the_upper_ends_of_their_buckets),
        cmocka_unit_test(the_sum_covers_every_queue_and_counter),
        cmocka_unit_test(the_table_names_each_op_that_was_used_and_no_other),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
