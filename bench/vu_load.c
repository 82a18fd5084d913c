// vu_load: load on a vhost-user-blk socket, and a check of what comes back.
//
// Prints one line of JSON. With --verify, random requests in random shapes are compared with a model of the
// disk; the exit status tells.

#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/stats.h"
#include "util/util.h"
#include "vu_client.h"

static const char usage_text[] =
    "usage: vu_load --socket PATH [OPTIONS]\n"
    "\n"
    "  --rw WHAT          randread (default), randwrite, read, write, randrw\n"
    "  --bs BYTES         of a request (4K)\n"
    "  --depth N          requests in flight in each queue (64)\n"
    "  --queues N         each with a thread (1)\n"
    "  --size BYTES       of the disk, from its beginning (all)\n"
    "  --seconds N        how long, with fractions (2)\n"
    "  --ramp N           seconds before that do not count (0.3)\n"
    "  --requests N       so many in each queue, and a flush, instead of --seconds\n"
    "  --flush-every N    a flush after each N requests\n"
    "  --ring-size N      (256)\n"
    "  --poll             look for what is done, without interrupts\n"
    "  --packed, --no-event-idx, --no-indirect, --no-flush\n"
    "  --inflight         have requests in flight tracked\n"
    "  --regions N        share the memory in so many pieces (1)\n"
    "  --verify N         check N requests in random shapes instead\n"
    "  --seed N           of what is random (1)\n";

struct options {
    struct vuc_options vuc;
    unsigned depth, bs_bytes;
    uint64_t size_bytes, seed;
    double seconds, ramp_seconds;
    bool is_random, is_indirect;
    unsigned write_percent;
    unsigned nr_verify;
    uint64_t nr_requests, flush_every; // 0: by time; never
};

struct worker {
    struct options *options;
    struct vuc_queue *queue;
    pthread_t thread;
    uint64_t seed, next_block;
    uint64_t nr_begun, nr_unflushed; // nr_begun without flushes
    uint64_t nr_done, nr_errors, sum_ns, max_ns, begin_ns, end_ns, cpu_ns;
    uint64_t buckets[STATS_NR_BUCKETS];
};

static uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed << 13; // xorshift64
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static uint64_t thread_cpu_ns(void)
{
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    return (uint64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * NSEC_PER_SEC +
           (uint64_t)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000;
}

// ---- Load

static void worker_prepare_flush(struct worker *worker, struct vuc_rq *rq)
{
    vuc_prepare(worker->queue, rq, VIRTIO_BLK_T_FLUSH, 0, 0, 0);
    rq->is_indirect = worker->options->is_indirect;
    worker->nr_unflushed = 0;
}

static void worker_prepare(struct worker *worker, struct vuc_rq *rq)
{
    const struct options *options = worker->options;
    struct vuc *vuc = worker->queue->vuc;
    uint64_t nr_blocks = options->size_bytes / options->bs_bytes, block;
    bool is_write = options->write_percent && (options->write_percent == 100 ||
                                               next_random(&worker->seed) % 100 < options->write_percent);
    uint64_t data_at = vuc->data_at + (uint64_t)(worker->queue->index * options->depth + rq->slot) *
                                          round_up(options->bs_bytes, 4096);

    if (options->flush_every && worker->nr_unflushed == options->flush_every) {
        worker_prepare_flush(worker, rq);
        return;
    }
    worker->nr_begun++;
    worker->nr_unflushed++;
    if (options->is_random)
        block = next_random(&worker->seed) % nr_blocks;
    else
        block = worker->next_block++ % nr_blocks;
    vuc_prepare(worker->queue, rq, is_write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN,
                block * (options->bs_bytes / SECTOR_BYTES), data_at, options->bs_bytes);
    rq->is_indirect = options->is_indirect;
}

static void worker_count(struct worker *worker, struct vuc_rq *rq, uint64_t now_ns)
{
    uint64_t ns = now_ns - rq->begin_ns;

    worker->nr_done += rq->nr_pieces > 2; // no flush
    worker->nr_errors += *vuc_status(worker->queue, rq) != VIRTIO_BLK_S_OK;
    worker->sum_ns += ns;
    worker->max_ns = max_of(worker->max_ns, ns);
    worker->buckets[stats_bucket(ns)]++;
}

static void worker_wait(struct worker *worker)
{
    if (worker->options->vuc.is_polling)
        __builtin_ia32_pause();
    else if (vuc_arm(worker->queue) && !vuc_sleep(worker->queue, 10000))
        fprintf(stderr, "vu_load: queue %u: nothing has come for 10 s\n", worker->queue->index);
}

// What --requests ends with; its time counts.
static void worker_flush(struct worker *worker, struct vuc_rq *rq)
{
    worker_prepare_flush(worker, rq);
    rq->begin_ns = util_now_ns();
    vuc_submit(worker->queue, rq);
    vuc_kick(worker->queue);
    while (!vuc_reap(worker->queue))
        worker_wait(worker);
    worker->end_ns = util_now_ns();
    worker_count(worker, rq, worker->end_ns);
}

static void *worker_main(void *arg)
{
    struct worker *worker = arg;
    struct options *options = worker->options;
    struct vuc_rq *rqs = calloc(options->depth, sizeof(*rqs)), *rq;
    uint64_t start_ns = util_now_ns(), now_ns = start_ns, cpu_ns = 0;
    uint64_t ramp_ns = (uint64_t)(options->ramp_seconds * 1e9);
    uint64_t end_ns = start_ns + ramp_ns + (uint64_t)(options->seconds * 1e9);
    unsigned nr_inflight = options->depth, nr_new;

    if (options->nr_requests) {
        ramp_ns = 0;
        end_ns = UINT64_MAX;
        worker->begin_ns = start_ns;
        cpu_ns = thread_cpu_ns();
    }
    for (unsigned i = 0; i < options->depth; i++) {
        rqs[i].slot = i;
        worker_prepare(worker, &rqs[i]);
        rqs[i].begin_ns = now_ns;
        if (!vuc_submit(worker->queue, &rqs[i])) {
            fprintf(stderr, "vu_load: a ring of %u is too small for depth %u\n", worker->queue->size,
                    options->depth);
            exit(1);
        }
    }
    vuc_kick(worker->queue);
    while (nr_inflight) {
        nr_new = 0;
        while (nr_new < 8 && (rq = vuc_reap(worker->queue))) {
            if (!nr_new++)
                now_ns = util_now_ns();
            if (now_ns >= start_ns + ramp_ns && now_ns < end_ns) {
                if (!worker->begin_ns) {
                    worker->begin_ns = now_ns;
                    cpu_ns = thread_cpu_ns();
                }
                worker_count(worker, rq, now_ns);
                worker->end_ns = now_ns;
            }
            if (now_ns >= end_ns || (options->nr_requests && worker->nr_begun >= options->nr_requests)) {
                nr_inflight--;
                continue;
            }
            worker_prepare(worker, rq);
            rq->begin_ns = now_ns;
            vuc_submit(worker->queue, rq);
        }
        if (nr_new)
            vuc_kick(worker->queue);
        else
            worker_wait(worker);
    }
    if (options->nr_requests)
        worker_flush(worker, &rqs[0]);
    worker->cpu_ns = thread_cpu_ns() - cpu_ns;
    free(rqs);
    return NULL;
}

static uint64_t percentile_ns(const uint64_t *buckets, uint64_t nr, double percent)
{
    uint64_t wanted = (uint64_t)((double)nr * percent / 100), seen = 0;

    for (unsigned i = 0; i < STATS_NR_BUCKETS; i++) {
        seen += buckets[i];
        if (seen > wanted)
            return stats_bucket_ns(i);
    }
    return 0;
}

// What compresses is stored without work by some devices.
static void fill_data(struct vuc *vuc, uint64_t seed)
{
    for (uint64_t at = vuc->data_at; at + sizeof(seed) <= vuc->memory_bytes; at += sizeof(seed)) {
        uint64_t v = next_random(&seed);

        memcpy(vuc->memory + at, &v, sizeof(v));
    }
}

static int run_load(struct vuc *vuc, struct options *options)
{
    struct worker *workers = calloc(options->vuc.nr_queues, sizeof(*workers)), sum = {0};
    double iops = 0, cpu = 0, longest = 0;
    uint64_t nr_kicks = 0, nr_interrupts = 0;

    fill_data(vuc, options->seed * 0x9e3779b97f4a7c15ULL + 7);
    for (unsigned i = 0; i < options->vuc.nr_queues; i++) {
        workers[i] = (struct worker){.options = options,
                                     .queue = &vuc->queues[i],
                                     .seed = options->seed * 0x9e3779b97f4a7c15ULL + i + 1,
                                     .next_block = options->size_bytes / options->bs_bytes /
                                                   options->vuc.nr_queues * i};
        if (pthread_create(&workers[i].thread, NULL, worker_main, &workers[i]))
            return 1;
    }
    for (unsigned i = 0; i < options->vuc.nr_queues; i++) {
        struct worker *worker = &workers[i];
        double seconds;

        pthread_join(worker->thread, NULL);
        seconds = (double)(worker->end_ns - worker->begin_ns) / 1e9;
        longest = seconds > longest ? seconds : longest;
        if (seconds > 0)
            iops += (double)worker->nr_done / seconds;
        cpu += seconds > 0 ? (double)worker->cpu_ns / 1e9 / seconds : 0;
        sum.nr_done += worker->nr_done;
        sum.nr_errors += worker->nr_errors;
        sum.sum_ns += worker->sum_ns;
        sum.max_ns = max_of(sum.max_ns, worker->max_ns);
        nr_kicks += worker->queue->nr_kicks;
        nr_interrupts += worker->queue->nr_interrupts;
        for (unsigned b = 0; b < STATS_NR_BUCKETS; b++)
            sum.buckets[b] += worker->buckets[b];
    }
    printf(
        "{\"iops\": %.0f, \"requests\": %llu, \"errors\": %llu, \"lat_mean_us\": %.2f, \"lat_p50_us\": %.2f, "
        "\"lat_p99_us\": %.2f, \"lat_max_us\": %.1f, \"cpu_percent\": %.0f, \"kicks\": %llu, "
        "\"interrupts\": %llu, \"seconds\": %.4f}\n",
        iops, (unsigned long long)sum.nr_done, (unsigned long long)sum.nr_errors,
        sum.nr_done ? (double)sum.sum_ns / (double)sum.nr_done / 1e3 : 0,
        (double)percentile_ns(sum.buckets, sum.nr_done, 50) / 1e3,
        (double)percentile_ns(sum.buckets, sum.nr_done, 99) / 1e3, (double)sum.max_ns / 1e3, cpu * 100,
        (unsigned long long)nr_kicks, (unsigned long long)nr_interrupts, longest);
    free(workers);
    return sum.nr_done && !sum.nr_errors ? 0 : 1;
}

// ---- Verify

#define VERIFY_MAX_BYTES (128 * 1024)
#define VERIFY_AREA_BYTES (256 * 1024) // of a request: its data, with gaps, and its odds and ends

struct op {
    struct vuc_rq rq;
    struct vuc_queue *queue;
    uint32_t type;
    uint64_t begin, len_bytes; // on the disk
    uint64_t area_at, status_at;
    uint64_t data_seed;
    bool is_busy;
};

struct verify {
    struct options *options;
    struct vuc *vuc;
    uint8_t *model;
    uint64_t size_bytes, seed;
    struct op *ops;
    unsigned nr_ops;
};

static bool verify_overlaps(const struct verify *verify, uint64_t begin, uint64_t len)
{
    for (unsigned i = 0; i < verify->nr_ops; i++) {
        const struct op *op = &verify->ops[i];

        if (op->is_busy && begin < op->begin + op->len_bytes && op->begin < begin + len)
            return true;
    }
    return false;
}

// Bytes of either direction as pieces of random lengths with random gaps. Where the next may begin.
static uint64_t verify_scatter(struct verify *verify, struct op *op, uint64_t at, uint64_t len, bool is_in,
                               unsigned max_pieces)
{
    while (len) {
        uint64_t n =
            max_pieces > 1 && next_random(&verify->seed) % 8 ? next_random(&verify->seed) % len + 1 : len;

        if (next_random(&verify->seed) % 2)
            n = max_of(round_down(n, 512), min_of(len, 512));
        if (max_pieces)
            max_pieces--;
        if (!max_pieces)
            n = len;
        if (next_random(&verify->seed) % 2)
            at = round_up(at, 4096);
        else if (next_random(&verify->seed) % 2)
            at += next_random(&verify->seed) % 64;
        op->rq.pieces[op->rq.nr_pieces++] = (struct vuc_piece){at, (uint32_t)n, is_in};
        at += n;
        len -= n;
    }
    return at;
}

static void verify_copy(struct verify *verify, struct op *op, bool is_in, uint64_t skip, void *buf,
                        uint64_t len, bool to_memory)
{
    for (unsigned i = 0; i < op->rq.nr_pieces && len; i++) {
        const struct vuc_piece *piece = &op->rq.pieces[i];
        uint64_t n = piece->len_bytes;
        char *at = verify->vuc->memory + piece->at;

        if (piece->is_in != is_in)
            continue;
        if (skip >= n) {
            skip -= n;
            continue;
        }
        n = min_of(n - skip, len);
        if (to_memory)
            memcpy(at + skip, buf, n);
        else
            memcpy(buf, at + skip, n);
        skip = 0;
        buf = (char *)buf + n;
        len -= n;
    }
}

static void verify_fill(uint8_t *buf, uint64_t len, uint64_t seed)
{
    for (uint64_t i = 0; i + 8 <= len; i += 8) {
        uint64_t v = next_random(&seed);

        memcpy(buf + i, &v, sizeof(v));
    }
}

static void verify_begin(struct verify *verify, struct op *op, uint32_t type, uint64_t begin, uint64_t len)
{
    struct virtio_blk_outhdr header = {.type = type, .sector = begin / SECTOR_BYTES};
    struct virtio_blk_discard_write_zeroes range = {.sector = begin / SECTOR_BYTES,
                                                    .num_sectors = (uint32_t)(len / SECTOR_BYTES)};
    uint64_t out = 0, in = 0, at = op->area_at;
    uint8_t *data = malloc(VERIFY_MAX_BYTES);

    op->type = type;
    op->begin = begin;
    op->len_bytes = len;
    op->is_busy = true;
    op->data_seed = next_random(&verify->seed);
    op->rq.nr_pieces = 0;
    op->rq.arg = op;
    if (type == VIRTIO_BLK_T_WRITE_ZEROES && next_random(&verify->seed) % 2)
        range.flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    if (type == VIRTIO_BLK_T_OUT) {
        out = len;
        verify_fill(data, len, op->data_seed);
    } else if (type == VIRTIO_BLK_T_WRITE_ZEROES) {
        out = sizeof(range);
        memcpy(data, &range, sizeof(range));
    } else if (type == VIRTIO_BLK_T_IN) {
        in = len;
    }
    at = verify_scatter(verify, op, at, sizeof(header) + out, false, 12);
    at = round_up(at, 64);
    verify_scatter(verify, op, at, in + 1, true, 12);
    verify_copy(verify, op, false, 0, &header, sizeof(header), true);
    verify_copy(verify, op, false, sizeof(header), data, out, true);
    op->status_at =
        op->rq.pieces[op->rq.nr_pieces - 1].at + op->rq.pieces[op->rq.nr_pieces - 1].len_bytes - 1;
    verify->vuc->memory[op->status_at] = (char)0xff;
    op->queue = &verify->vuc->queues[next_random(&verify->seed) % verify->options->vuc.nr_queues];
    op->rq.is_indirect = verify->options->is_indirect && next_random(&verify->seed) % 2;
    free(data);
}

// false: something is wrong.
static bool verify_end(struct verify *verify, struct op *op)
{
    uint8_t status = (uint8_t)verify->vuc->memory[op->status_at], *data;
    uint32_t len = op->type == VIRTIO_BLK_T_IN ? (uint32_t)op->len_bytes + 1 : 1;
    bool is_right = true;

    op->is_busy = false;
    if (status != VIRTIO_BLK_S_OK || op->rq.len != len) {
        fprintf(stderr, "vu_load: type %u at %llu, %llu bytes: status %u, %u bytes written\n", op->type,
                (unsigned long long)op->begin, (unsigned long long)op->len_bytes, status, op->rq.len);
        return false;
    }
    if (op->type == VIRTIO_BLK_T_OUT) {
        verify_fill(verify->model + op->begin, op->len_bytes, op->data_seed);
    } else if (op->type == VIRTIO_BLK_T_WRITE_ZEROES) {
        memset(verify->model + op->begin, 0, op->len_bytes);
    } else if (op->type == VIRTIO_BLK_T_IN) {
        data = malloc(VERIFY_MAX_BYTES);
        verify_copy(verify, op, true, 0, data, op->len_bytes, false);
        is_right = !memcmp(data, verify->model + op->begin, op->len_bytes);
        free(data);
        if (!is_right)
            fprintf(stderr, "vu_load: read at %llu, %llu bytes: not what was written\n",
                    (unsigned long long)op->begin, (unsigned long long)op->len_bytes);
    }
    return is_right;
}

static bool verify_reap(struct verify *verify, bool may_sleep)
{
    for (;;) {
        bool is_any = false;

        for (unsigned i = 0; i < verify->options->vuc.nr_queues; i++) {
            struct vuc_rq *rq;

            while ((rq = vuc_reap(&verify->vuc->queues[i]))) {
                is_any = true;
                if (!verify_end(verify, rq->arg))
                    return false;
            }
        }
        if (is_any || !may_sleep)
            return true;
        if (verify->options->vuc.is_polling || verify->options->vuc.nr_queues > 1)
            usleep(50);
        else if (vuc_arm(&verify->vuc->queues[0]) && !vuc_sleep(&verify->vuc->queues[0], 60000))
            return false;
    }
}

static bool verify_is_idle(const struct verify *verify)
{
    for (unsigned i = 0; i < verify->nr_ops; i++) {
        if (verify->ops[i].is_busy)
            return false;
    }
    return true;
}

static struct op *verify_free_op(struct verify *verify)
{
    for (unsigned i = 0; i < verify->nr_ops; i++) {
        if (!verify->ops[i].is_busy)
            return &verify->ops[i];
    }
    return NULL;
}

// One request of random kind and place. false: something is wrong.
static bool verify_step(struct verify *verify, bool is_first_read, uint64_t *read_at)
{
    static const uint32_t types[] = {VIRTIO_BLK_T_IN,  VIRTIO_BLK_T_IN,           VIRTIO_BLK_T_OUT,
                                     VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_FLUSH};
    struct op *op = verify_free_op(verify);
    uint64_t sectors = verify->size_bytes / SECTOR_BYTES, begin, len;
    uint32_t type = types[next_random(&verify->seed) % ARRAY_SIZE(types)];

    if (!op)
        return verify_reap(verify, true);
    begin = next_random(&verify->seed) % sectors * SECTOR_BYTES;
    len = next_random(&verify->seed) % (VERIFY_MAX_BYTES / SECTOR_BYTES) * SECTOR_BYTES + SECTOR_BYTES;
    if (next_random(&verify->seed) % 2) {
        begin = round_down(begin, 4096);
        len = max_of(round_down(len, 4096), 4096);
    }
    if (is_first_read) {
        type = VIRTIO_BLK_T_IN;
        begin = *read_at;
        len = VERIFY_MAX_BYTES;
    }
    len = min_of(len, verify->size_bytes - begin);
    if (type == VIRTIO_BLK_T_FLUSH)
        begin = len = 0;
    if (verify_overlaps(verify, begin, len))
        return verify_reap(verify, true);
    verify_begin(verify, op, type, begin, len);
    while (!vuc_submit(op->queue, &op->rq)) {
        op->is_busy = false; // it is not in flight yet
        if (!verify_reap(verify, true))
            return false;
        op->is_busy = true;
    }
    if (is_first_read)
        *read_at += len;
    vuc_kick(op->queue);
    return verify_reap(verify, false);
}

static int run_verify(struct vuc *vuc, struct options *options)
{
    struct verify verify = {.options = options,
                            .vuc = vuc,
                            .size_bytes = options->size_bytes,
                            .seed = options->seed * 0x9e3779b97f4a7c15ULL + 1,
                            .nr_ops = options->depth};
    bool is_right = true;
    uint64_t read_at = options->size_bytes;

    // The disk begins as zeroes everywhere: the model, too.
    verify.model = calloc(1, options->size_bytes);
    verify.ops = calloc(verify.nr_ops, sizeof(*verify.ops));
    for (unsigned i = 0; i < verify.nr_ops; i++) {
        verify.ops[i].area_at = vuc->data_at + (uint64_t)i * VERIFY_AREA_BYTES;
        verify.ops[i].rq.slot = i;
    }
    for (unsigned n = 0; n < options->nr_verify && is_right; n++)
        is_right = verify_step(&verify, false, &read_at);
    read_at = 0; // all of it, at the end
    while (is_right && read_at < options->size_bytes)
        is_right = verify_step(&verify, true, &read_at);
    while (is_right && !verify_is_idle(&verify))
        is_right = verify_reap(&verify, true);
    printf("{\"verified\": %s, \"requests\": %u}\n", is_right ? "true" : "false", options->nr_verify);
    free(verify.model);
    free(verify.ops);
    return !is_right;
}

// ---- Options

enum {
    OPT_SOCKET = 256,
    OPT_RW,
    OPT_BS,
    OPT_DEPTH,
    OPT_QUEUES,
    OPT_SIZE,
    OPT_SECONDS,
    OPT_RAMP,
    OPT_REQUESTS,
    OPT_FLUSH_EVERY,
    OPT_RING_SIZE,
    OPT_POLL,
    OPT_PACKED,
    OPT_NO_EVENT_IDX,
    OPT_NO_INDIRECT,
    OPT_NO_FLUSH,
    OPT_INFLIGHT,
    OPT_REGIONS,
    OPT_VERIFY,
    OPT_SEED,
};

static const struct option long_options[] = {
    {"socket", required_argument, NULL, OPT_SOCKET},
    {"rw", required_argument, NULL, OPT_RW},
    {"bs", required_argument, NULL, OPT_BS},
    {"depth", required_argument, NULL, OPT_DEPTH},
    {"queues", required_argument, NULL, OPT_QUEUES},
    {"size", required_argument, NULL, OPT_SIZE},
    {"seconds", required_argument, NULL, OPT_SECONDS},
    {"ramp", required_argument, NULL, OPT_RAMP},
    {"requests", required_argument, NULL, OPT_REQUESTS},
    {"flush-every", required_argument, NULL, OPT_FLUSH_EVERY},
    {"ring-size", required_argument, NULL, OPT_RING_SIZE},
    {"poll", no_argument, NULL, OPT_POLL},
    {"packed", no_argument, NULL, OPT_PACKED},
    {"no-event-idx", no_argument, NULL, OPT_NO_EVENT_IDX},
    {"no-indirect", no_argument, NULL, OPT_NO_INDIRECT},
    {"no-flush", no_argument, NULL, OPT_NO_FLUSH},
    {"inflight", no_argument, NULL, OPT_INFLIGHT},
    {"regions", required_argument, NULL, OPT_REGIONS},
    {"verify", required_argument, NULL, OPT_VERIFY},
    {"seed", required_argument, NULL, OPT_SEED},
    {NULL, 0, NULL, 0},
};

static void die_usage(void)
{
    fputs(usage_text, stderr);
    exit(2);
}

static unsigned number(const char *text, unsigned min, unsigned max)
{
    unsigned long n;

    if (util_parse_uint(text, min, max, &n) < 0)
        die_usage();
    return (unsigned)n;
}

static uint64_t size(const char *text)
{
    uint64_t bytes;

    if (util_parse_size(text, &bytes) < 0)
        die_usage();
    return bytes;
}

static void parse_rw(struct options *options, const char *text)
{
    options->is_random = !strncmp(text, "rand", 4);
    text += options->is_random ? 4 : 0;
    if (!strcmp(text, "read"))
        options->write_percent = 0;
    else if (!strcmp(text, "write"))
        options->write_percent = 100;
    else if (!strcmp(text, "rw"))
        options->write_percent = 50;
    else
        die_usage();
}

static void parse(struct options *options, int argc, char **argv)
{
    int option;

    while ((option = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
        switch (option) {
        case OPT_SOCKET:
            options->vuc.path = optarg;
            break;
        case OPT_RW:
            parse_rw(options, optarg);
            break;
        case OPT_BS:
            options->bs_bytes = (unsigned)size(optarg);
            break;
        case OPT_DEPTH:
            options->depth = number(optarg, 1, 1024);
            break;
        case OPT_QUEUES:
            options->vuc.nr_queues = number(optarg, 1, 64);
            break;
        case OPT_SIZE:
            options->size_bytes = size(optarg);
            break;
        case OPT_SECONDS:
            options->seconds = strtod(optarg, NULL);
            break;
        case OPT_RAMP:
            options->ramp_seconds = strtod(optarg, NULL);
            break;
        case OPT_REQUESTS:
            options->nr_requests = number(optarg, 1, 1000000000);
            break;
        case OPT_FLUSH_EVERY:
            options->flush_every = number(optarg, 1, 1000000000);
            break;
        case OPT_RING_SIZE:
            options->vuc.queue_size = number(optarg, 2, 32768);
            break;
        case OPT_POLL:
            options->vuc.is_polling = true;
            break;
        case OPT_PACKED:
            options->vuc.features_off &= ~VU_BIT(VIRTIO_F_RING_PACKED);
            break;
        case OPT_NO_EVENT_IDX:
            options->vuc.features_off |= VU_BIT(VIRTIO_RING_F_EVENT_IDX);
            break;
        case OPT_NO_INDIRECT:
            options->is_indirect = false;
            break;
        case OPT_NO_FLUSH:
            options->vuc.features_off |= VU_BIT(VIRTIO_BLK_F_FLUSH) | VU_BIT(VIRTIO_BLK_F_CONFIG_WCE);
            break;
        case OPT_INFLIGHT:
            options->vuc.has_inflight = true;
            break;
        case OPT_REGIONS:
            options->vuc.nr_regions = number(optarg, 1, VU_TABLE_REGIONS);
            break;
        case OPT_VERIFY:
            options->nr_verify = number(optarg, 1, 100000000);
            break;
        case OPT_SEED:
            options->seed = number(optarg, 1, 4000000000U);
            break;
        default:
            die_usage();
        }
    }
    if (optind < argc || !options->vuc.path || !options->bs_bytes || options->bs_bytes % SECTOR_BYTES)
        die_usage();
}

int main(int argc, char **argv)
{
    struct options options = {
        .vuc = {.nr_queues = 1,
                .queue_size = 256,
                .nr_regions = 1,
                .features_off = VU_BIT(VIRTIO_F_RING_PACKED),
                .memfd = -1,
                .inflight_fd = -1},
        .depth = 64,
        .bs_bytes = 4096,
        .seconds = 2,
        .ramp_seconds = 0.3,
        .seed = 1,
        .is_random = true,
        .is_indirect = true,
    };
    struct vuc vuc;
    uint64_t disk_bytes;
    int status;

    parse(&options, argc, argv);
    options.vuc.data_bytes =
        options.depth * (options.nr_verify ? VERIFY_AREA_BYTES + 4 * 4096ULL
                                           : options.vuc.nr_queues * round_up(options.bs_bytes, 4096));
    if (options.nr_verify)
        options.vuc.data_bytes += 4 * MiB; // what gaps may push behind the end of the last
    if (vuc_connect(&vuc, &options.vuc) < 0)
        return 1;
    disk_bytes = vuc.config.capacity * SECTOR_BYTES;
    if (!options.size_bytes || options.size_bytes > disk_bytes)
        options.size_bytes = disk_bytes;
    if (options.size_bytes < options.bs_bytes) {
        fprintf(stderr, "vu_load: the disk is smaller than a request\n");
        return 1;
    }
    status = options.nr_verify ? run_verify(&vuc, &options) : run_load(&vuc, &options);
    vuc_disconnect(&vuc);
    return status;
}
