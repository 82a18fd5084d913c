// bench: how fast this machine reads an image by every map and io, without a transport.
//
// A loader is a queue's client on the queue's own thread: it keeps its share of the depth in flight until the
// time is over. Requests that end are given out again at the end of the batch, not from inside done(): an io
// may be done before it returns.

#include <assert.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "core/device.h"
#include "core/queue.h"
#include "ring/workers.h"
#include "util/log.h"
#include "util/util.h"

#define DEPTH_MAX 1024
#define NR_WORKERS 16
#define MEMORY_ALIGN 4096

static const char bench_help[] =
    "usage: bight bench [OPTIONS] IMAGE\n"
    "\n"
    "Measures how fast IMAGE is read by each --map and --io of bight serve that works here, and by none\n"
    "(null: what bight itself costs). No transport takes part. Nothing is written, unless --write is given.\n"
    "\n"
    "  --write              also write: what IMAGE has is lost\n"
    "  --seconds N          how long each load runs, with fractions (default: 1)\n"
    "  --depth N            requests in flight (default: 64)\n"
    "  --queues N           threads that serve requests (default: CPUs, at most 4)\n"
    "  --ring RING          auto (default), uring or threads\n"
    "  --json               for programs\n"
    "  -h, --help\n"
    "\n"
    "See bight-bench(1).\n";

enum {
    OPT_WRITE = 256,
    OPT_SECONDS,
    OPT_DEPTH,
    OPT_QUEUES,
    OPT_RING,
    OPT_JSON,
};

static const struct option bench_options[] = {
    {"write", no_argument, NULL, OPT_WRITE},
    {"seconds", required_argument, NULL, OPT_SECONDS},
    {"depth", required_argument, NULL, OPT_DEPTH},
    {"queues", required_argument, NULL, OPT_QUEUES},
    {"ring", required_argument, NULL, OPT_RING},
    {"json", no_argument, NULL, OPT_JSON},
    {"help", no_argument, NULL, 'h'},
    {NULL, 0, NULL, 0},
};

struct bench {
    const char *path, *ring_name;
    double seconds;
    unsigned long depth, nr_queues;
    bool is_writing, is_json;
    const struct ring_ops *ring;
    struct json_object *results;
    bool is_first; // line of the table
};

static const struct way {
    const char *map, *io;
} ways[] = {{"linear", "direct"}, {"linear", "buffered"}, {"fastfs", "direct"}, {"linear", "null"}};

static const struct load {
    const char *name;
    enum req_op op;
    bool is_random;
    uint32_t len_bytes;
} loads[] = {
    {"randread", REQ_OP_READ, true, 4 * KiB},
    {"read", REQ_OP_READ, false, 128 * KiB},
    {"randwrite", REQ_OP_WRITE, true, 4 * KiB},
    {"write", REQ_OP_WRITE, false, 128 * KiB},
};

struct bench_rq {
    struct rq rq;
    struct iovec iov;
    char *buf;
    struct loader *loader;
    uint64_t start_ns;
    struct bench_rq *next; // not in flight
};

// Shared by the loaders of a run.
struct run {
    const struct load *load;
    uint64_t nr_blocks, deadline_ns;
    _Atomic uint64_t next_block; // of a sequential load
    atomic_int error;            // the first one
    atomic_uint nr_running;      // loaders
    sem_t over;
};

struct loader {
    struct run *run;
    struct queue *queue;
    struct ring_op start_op;
    struct ring_hook hook;
    struct bench_rq *idle;
    unsigned nr_inflight;
    uint64_t seed;
    struct op_stats stats; // the queue's own know no time within a batch
};

// ---- On a queue's thread

static uint64_t loader_next_block(struct loader *loader)
{
    struct run *run = loader->run;

    if (!run->load->is_random)
        return atomic_fetch_add_explicit(&run->next_block, 1, memory_order_relaxed) % run->nr_blocks;
    loader->seed ^= loader->seed << 13; // xorshift64
    loader->seed ^= loader->seed >> 7;
    loader->seed ^= loader->seed << 17;
    return loader->seed % run->nr_blocks;
}

static void loader_rq_done(struct rq *rq)
{
    struct bench_rq *brq = container_of(rq, struct bench_rq, rq);
    struct loader *loader = brq->loader;
    int none = 0;

    if (rq->error)
        atomic_compare_exchange_strong(&loader->run->error, &none, rq->error);
    stats_add(&loader->stats.nr_done, 1);
    stats_add(&loader->stats.latency[stats_bucket(util_now_ns() - brq->start_ns)], 1);
    brq->next = loader->idle;
    loader->idle = brq;
    loader->nr_inflight--;
    ring_defer(loader->queue->ring, &loader->hook);
}

static void loader_submit(struct loader *loader, struct bench_rq *brq)
{
    const struct load *load = loader->run->load;

    brq->iov = (struct iovec){brq->buf, load->len_bytes};
    brq->rq.op = (uint8_t)load->op;
    brq->rq.buf_index = -1;
    brq->rq.iov = &brq->iov;
    brq->rq.nr_iov = 1;
    brq->rq.offset_bytes = loader_next_block(loader) * load->len_bytes;
    brq->rq.len_bytes = load->len_bytes;
    brq->rq.done = loader_rq_done;
    brq->start_ns = util_now_ns();
    loader->nr_inflight++;
    queue_submit(loader->queue, &brq->rq);
}

static void loader_refill(struct ring_hook *hook)
{
    struct loader *loader = container_of(hook, struct loader, hook);
    struct run *run = loader->run;
    struct bench_rq *brq = loader->idle;

    if (loader->queue->ring->now_ns < run->deadline_ns && !atomic_load(&run->error)) {
        loader->idle = NULL; // what is done at once is for the next batch
        while (brq) {
            struct bench_rq *next = brq->next;

            loader_submit(loader, brq);
            brq = next;
        }
        queue_unplug(loader->queue);
    } else if (!loader->nr_inflight && atomic_fetch_sub(&run->nr_running, 1) == 1) {
        sem_post(&run->over);
    }
}

static void loader_start(struct ring_op *op, int res)
{
    struct loader *loader = container_of(op, struct loader, start_op);

    (void)res;
    ring_defer(loader->queue->ring, &loader->hook);
}

// ---- A run

static void sum_up(struct op_stats *sum, const struct loader *loader)
{
    stats_add(&sum->nr_done, atomic_load(&loader->stats.nr_done));
    for (unsigned i = 0; i < STATS_NR_BUCKETS; i++)
        stats_add(&sum->latency[i], atomic_load(&loader->stats.latency[i]));
}

static int run_load(struct device *dev, const struct bench *bench, const struct load *load,
                    struct op_stats *stats, struct err *err)
{
    unsigned depth = (unsigned)bench->depth;
    struct run run = {.load = load, .nr_blocks = dev->limits.size_bytes / load->len_bytes};
    struct loader *loaders = calloc(dev->nr_queues, sizeof(*loaders));
    struct bench_rq *rqs = calloc(depth, sizeof(*rqs));
    char *memory = aligned_alloc(MEMORY_ALIGN, (size_t)depth * load->len_bytes);
    unsigned nr_loaders = min_of(dev->nr_queues, depth);
    int ret;

    if (!loaders || !rqs || !memory) {
        ret = err_set(err, -ENOMEM, "%s: out of memory; use a smaller --depth", bench->path);
        goto out;
    }
    memset(memory, 0xb1, (size_t)depth * load->len_bytes);
    sem_init(&run.over, 0, 0);
    atomic_store(&run.nr_running, nr_loaders);
    run.deadline_ns = util_now_ns() + (uint64_t)(bench->seconds * (double)NSEC_PER_SEC);
    for (unsigned i = 0; i < depth; i++) {
        struct loader *loader = &loaders[i % nr_loaders];

        rqs[i].buf = memory + (size_t)i * load->len_bytes;
        rqs[i].loader = loader;
        rqs[i].next = loader->idle;
        loader->idle = &rqs[i];
    }
    for (unsigned i = 0; i < nr_loaders; i++) {
        loaders[i].run = &run;
        loaders[i].queue = &dev->queues[i];
        loaders[i].seed = (i + 1) * 0x9e3779b97f4a7c15ULL;
        loaders[i].hook.run = loader_refill;
        loaders[i].start_op.done = loader_start;
        ring_post(loaders[i].queue->ring, &loaders[i].start_op, 0);
    }
    while (sem_wait(&run.over) < 0)
        ;                // EINTR
    device_barrier(dev); // every queue is past its post of the semaphore
    sem_destroy(&run.over);
    for (unsigned i = 0; i < nr_loaders; i++)
        sum_up(stats, &loaders[i]);
    ret = atomic_load(&run.error);
    if (ret < 0)
        err_set(err, ret, "%s: %s: %s; check the disk below", bench->path, load->name, strerror(-ret));
out:
    free(memory);
    free(rqs);
    free(loaders);
    return ret;
}

// ---- What it says

static void tell_load(struct bench *bench, const struct way *way, const struct load *load,
                      const struct op_stats *stats, double seconds)
{
    double iops = (double)atomic_load(&stats->nr_done) / seconds;
    double p50_us = (double)stats_percentile_ns(stats, 50) / 1e3,
           p99_us = (double)stats_percentile_ns(stats, 99) / 1e3;
    struct json_object *result;

    if (!bench->is_json) {
        if (bench->is_first)
            printf("%-8s %-10s %-10s %9s %10s %9s %10s %10s\n", "map", "io", "load", "bytes", "IOPS", "MB/s",
                   "p50 us", "p99 us");
        bench->is_first = false;
        printf("%-8s %-10s %-10s %9u %10.0f %9.0f %10.1f %10.1f\n", way->map, way->io, load->name,
               load->len_bytes, iops, iops * load->len_bytes / 1e6, p50_us, p99_us);
        fflush(stdout);
        return;
    }
    result = json_object_new_object();
    json_object_object_add(result, "map", json_object_new_string(way->map));
    json_object_object_add(result, "io", json_object_new_string(way->io));
    json_object_object_add(result, "load", json_object_new_string(load->name));
    json_object_object_add(result, "bytes", json_object_new_int64(load->len_bytes));
    json_object_object_add(result, "iops", json_object_new_double(iops));
    json_object_object_add(result, "p50_us", json_object_new_double(p50_us));
    json_object_object_add(result, "p99_us", json_object_new_double(p99_us));
    json_object_array_add(bench->results, result);
}

static void tell_refused(struct bench *bench, const struct way *way, const char *reason)
{
    struct json_object *result;

    if (!bench->is_json) {
        printf("%-8s %-10s not here: %s\n", way->map, way->io, reason);
        return;
    }
    result = json_object_new_object();
    json_object_object_add(result, "map", json_object_new_string(way->map));
    json_object_object_add(result, "io", json_object_new_string(way->io));
    json_object_object_add(result, "refused", json_object_new_string(reason));
    json_object_array_add(bench->results, result);
}

// ---- From map to map, io to io

// 1: it cannot be had, with err set.
static int bench_load(struct bench *bench, const struct way *way, const struct load *load, struct err *err)
{
    struct device_options options = {
        .name = "bench",
        .io = way->io,
        .map = way->map,
        .ring = bench->ring,
        .nr_queues = (unsigned)bench->nr_queues,
        .depth = (unsigned)bench->depth,
        .image = {.is_read_only = !bench->is_writing,
                  .want_direct = true,
                  .is_format_raw = !bench->is_writing},
    };
    struct op_stats stats = {0};
    struct device *dev;
    uint64_t start_ns;
    double seconds;
    int ret, flush_ret;

    if (device_create(&dev, bench->path, &options, err) < 0)
        return 1;
    start_ns = util_now_ns();
    if (dev->limits.size_bytes < load->len_bytes)
        ret = err_set(err, -EINVAL, "%s: has %" PRIu64 " bytes; name an image of %u at least", bench->path,
                      dev->limits.size_bytes, load->len_bytes);
    else
        ret = run_load(dev, bench, load, &stats, err);
    flush_ret = device_stop(dev);
    seconds = (double)(util_now_ns() - start_ns) / (double)NSEC_PER_SEC;
    if (!ret && flush_ret < 0)
        ret =
            err_set(err, flush_ret, "%s: flush: %s; check the disk below", bench->path, strerror(-flush_ret));
    workers_stop(); // R5 of ring/ring.h
    device_destroy(dev);
    if (!ret)
        tell_load(bench, way, load, &stats, seconds);
    return ret;
}

static int bench_way(struct bench *bench, const struct way *way, struct err *err)
{
    for (unsigned i = 0; i < ARRAY_SIZE(loads); i++) {
        int ret;

        if (loads[i].op == REQ_OP_WRITE && !bench->is_writing)
            continue;
        ret = bench_load(bench, way, &loads[i], err);
        if (ret < 0)
            return ret;
        if (ret && way == &ways[0]) // the plain one: nothing will work
            return -EINVAL;
        if (ret) {
            tell_refused(bench, way, err->line);
            return 0;
        }
    }
    return 0;
}

static int bench_run(struct bench *bench, struct err *err)
{
    int ret = 0;

    bench->ring = ring_choose(bench->ring_name, err);
    if (!bench->ring)
        return -EINVAL;
    workers_set_max(NR_WORKERS);
    if (bench->is_json)
        bench->results = json_object_new_array();
    for (unsigned i = 0; i < ARRAY_SIZE(ways) && !ret; i++)
        ret = bench_way(bench, &ways[i], err);
    if (bench->results && !ret)
        puts(json_object_to_json_string_ext(bench->results,
                                            JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
    json_object_put(bench->results);
    if (!ret && (fflush(stdout) || ferror(stdout)))
        ret = err_set(err, -EIO, "standard output: %s", strerror(errno));
    return ret;
}

static int parse_number(const char *name, unsigned long max, unsigned long *value, struct err *err)
{
    if (util_parse_uint(optarg, 1, max, value) < 0)
        return err_usage(err, "%s %s: give a number from 1 to %lu", name, optarg, max);
    return 0;
}

static int parse_seconds(struct bench *bench, struct err *err)
{
    char *end;

    bench->seconds = strtod(optarg, &end);
    if (end == optarg || *end || !(bench->seconds >= 0.01 && bench->seconds <= 3600))
        return err_usage(err, "--seconds %s: give a number from 0.01 to 3600", optarg);
    return 0;
}

static int parse_option(struct bench *bench, int option, char **argv, struct err *err)
{
    switch (option) {
    case OPT_WRITE:
        bench->is_writing = true;
        return 0;
    case OPT_SECONDS:
        return parse_seconds(bench, err);
    case OPT_DEPTH:
        return parse_number("--depth", DEPTH_MAX, &bench->depth, err);
    case OPT_QUEUES:
        return parse_number("--queues", 64, &bench->nr_queues, err);
    case OPT_RING:
        bench->ring_name = optarg;
        return 0;
    case OPT_JSON:
        bench->is_json = true;
        return 0;
    case 'h':
        return 1;
    case ':':
        return err_usage(err, "%s: needs a value; see bight bench --help", argv[optind - 1]);
    default:
        return err_usage(err, "%s: no such option; see bight bench --help", argv[optind - 1]);
    }
}

// 0: go on. 1: help was asked for. A negative errno: usage.
static int parse(struct bench *bench, int argc, char **argv, struct err *err)
{
    int option, ret;

    opterr = 0;
    while ((option = getopt_long(argc, argv, ":h", bench_options, NULL)) != -1) {
        ret = parse_option(bench, option, argv, err);
        if (ret)
            return ret;
    }
    if (argc - optind != 1)
        return err_usage(err, "name one IMAGE; see bight bench --help");
    bench->path = argv[optind];
    return 0;
}

static int bench_main(int argc, char **argv)
{
    struct bench bench = {.ring_name = "auto", .seconds = 1, .depth = 64, .is_first = true};
    long nr_cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct err err = {.line = ""};
    int ret;

    bench.nr_queues = nr_cpus > 0 ? min_of((unsigned long)nr_cpus, 4) : 1;
    ret = parse(&bench, argc, argv, &err);
    if (ret > 0) {
        fputs(bench_help, stdout);
        return CLI_OK;
    }
    if (!ret)
        ret = bench_run(&bench, &err);
    if (ret < 0)
        log_line("%s", err.line);
    return ret < 0 ? (err.is_usage ? CLI_USAGE : CLI_ERROR) : CLI_OK;
}

const struct cli_command cli_bench = {
    .name = "bench",
    .summary = "measure how fast an image is read here",
    .help = bench_help,
    .run = bench_main,
};
