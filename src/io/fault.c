// fault:SPEC: an io over another one that fails, waits, moves less and tears writes, by chance that a
// seed makes repeatable (with one queue and one client). For tests.
//
// SPEC: KEY=VALUE, separated by commas:
//   io=direct|buffered       what is underneath (direct)
//   seed=N                   of the chance (1)
//   after=N                  the first N requests pass untouched (0)
//   OP.error=P[:ERRNO]       fails before anything is moved (EIO)
//   OP.delay=P:MS            waits before it goes on
//   read.short=P write.short=P   moves a part only: the core has to go on with the rest
//   write.torn=P             writes a part only, and fails with EIO
// OP: read, write, flush, discard, write_zeroes, or any (prefetch too); P: 0 to 1.

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/device.h"
#include "core/queue.h"
#include "io/io.h"
#include "util/util.h"

struct fault_chance {
    double error, delay, shorten, torn;
    int error_code;
    uint64_t delay_ns;
};

struct fault {
    struct io io;
    atomic_ullong state; // of the generator
    atomic_ullong nr_requests;
    uint64_t after;
    struct fault_chance chance[REQ_OP_NR];
};

static const struct {
    const char *name;
    enum req_op op; // REQ_OP_NR: any
} fault_ops[] = {
    {"read", REQ_OP_READ},       {"write", REQ_OP_WRITE}, {"flush", REQ_OP_FLUSH},
    {"discard", REQ_OP_DISCARD}, {"any", REQ_OP_NR},      {"write_zeroes", REQ_OP_WRITE_ZEROES},
};

static const struct {
    const char *name;
    int code;
} fault_errnos[] = {
    {"EIO", EIO},       {"ENOSPC", ENOSPC}, {"EINVAL", EINVAL}, {"EDQUOT", EDQUOT},
    {"ENOMEM", ENOMEM}, {"EPERM", EPERM},   {"EROFS", EROFS},   {"ETIMEDOUT", ETIMEDOUT},
};

// splitmix64: a counter that is mixed, so that threads need no lock.
static uint64_t fault_random(struct fault *fault)
{
    uint64_t z = atomic_fetch_add(&fault->state, 0x9e3779b97f4a7c15) + 0x9e3779b97f4a7c15;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static bool fault_hits(struct fault *fault, double probability)
{
    return probability > 0 && (double)(fault_random(fault) >> 11) < probability * 0x1p53;
}

static bool fault_is_due(struct fault *fault)
{
    return atomic_fetch_add(&fault->nr_requests, 1) >= fault->after;
}

// Some of the part, at least a byte less and not nothing; whole blocks where direct I/O wants them.
static uint64_t fault_some_bytes(struct fault *fault, const struct rq *rq)
{
    uint64_t align = rq->queue->dev->image->dio_offset_align, len = rq_part_bytes(rq);
    uint64_t some = round_down(fault_random(fault) % len, align);

    return some ? some : min_of(align, len);
}

static int fault_torn_work(struct rq *rq)
{
    const struct image *image = rq->queue->dev->image;
    uint64_t align = image->dio_offset_align, some = round_down(rq->iov[0].iov_len / 2, align);

    // Unaligned: nothing of it, which is torn as well.
    if (!(rq->ext.offset_bytes % align) && some)
        (void)!pwrite(rq->ext.fd, rq->iov[0].iov_base, some, (off_t)rq->ext.offset_bytes);
    return -EIO;
}

static void fault_pass(struct fault *fault, struct rq *rq)
{
    if (rq->op == REQ_OP_READ || rq->op == REQ_OP_WRITE)
        io_rw(fault->io.lower, rq);
    else if (rq->op == REQ_OP_FLUSH)
        io_flush(fault->io.lower, rq);
    else
        io_submit_other(fault->io.lower, rq);
}

static struct fault *fault_of(const struct rq *rq)
{
    return container_of(rq->queue->dev->io, struct fault, io);
}

static void fault_delay_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    (void)res;
    op->done = rq->flush_done;
    fault_pass(fault_of(rq), rq);
}

static void fault_fail(struct rq *rq, int error)
{
    if (rq->op == REQ_OP_FLUSH)
        rq->ring_op.done(&rq->ring_op, error); // flush_done() has to see it
    else if (rq->op == REQ_OP_READ || rq->op == REQ_OP_WRITE)
        rq_part_done(rq, error);
    else
        rq_end(rq, error);
}

static void fault_torn_done(struct ring_op *op, int res)
{
    rq_part_done(container_of(op, struct rq, ring_op), res);
}

static void fault_submit(struct io *io, struct rq *rq)
{
    struct fault *fault = container_of(io, struct fault, io);
    const struct fault_chance *chance = &fault->chance[rq->op];

    if (!fault_is_due(fault)) {
        fault_pass(fault, rq);
    } else if (fault_hits(fault, chance->error)) {
        fault_fail(rq, -chance->error_code);
    } else if (fault_hits(fault, chance->delay)) {
        rq->flush_done = rq->ring_op.done;
        rq->ring_op.done = fault_delay_done;
        rq->ring_op.code = RING_TIMEOUT;
        rq->ring_op.timeout_ns = chance->delay_ns;
        ring_queue(rq->queue->ring, &rq->ring_op);
    } else if (fault_hits(fault, chance->torn)) {
        rq_call_worker(rq, fault_torn_work, fault_torn_done);
    } else {
        if (fault_hits(fault, chance->shorten))
            rq_cut_part(rq, fault_some_bytes(fault, rq));
        fault_pass(fault, rq);
    }
}

// "P" or "P:REST"; rest points behind the colon, or is NULL.
static int parse_chance(const char *text, double *probability, const char **rest)
{
    char *end;

    *probability = strtod(text, &end);
    if (end == text || (*end && *end != ':') || !(*probability >= 0 && *probability <= 1))
        return -EINVAL;
    *rest = *end ? end + 1 : NULL;
    return 0;
}

static int parse_errno(const char *name, int *code)
{
    for (unsigned i = 0; i < ARRAY_SIZE(fault_errnos); i++) {
        if (!strcmp(name, fault_errnos[i].name)) {
            *code = fault_errnos[i].code;
            return 0;
        }
    }
    return -EINVAL;
}

static int parse_op_key(struct fault_chance *chance, enum req_op op, const char *key, const char *value)
{
    const char *rest;
    unsigned long ms;
    double probability;
    int ret = parse_chance(value, &probability, &rest);

    if (ret < 0)
        return ret;
    if (!strcmp(key, "error")) {
        chance->error = probability;
        return rest ? parse_errno(rest, &chance->error_code) : 0;
    }
    if (!strcmp(key, "delay")) {
        chance->delay = probability;
        ret = rest ? util_parse_uint(rest, 0, 60000, &ms) : -EINVAL;
        if (!ret)
            chance->delay_ns = ms * 1000000;
        return ret;
    }
    if (rest)
        return -EINVAL;
    if (!strcmp(key, "short") && (op == REQ_OP_READ || op == REQ_OP_WRITE))
        chance->shorten = probability;
    else if (!strcmp(key, "torn") && op == REQ_OP_WRITE)
        chance->torn = probability;
    else
        return -EINVAL;
    return 0;
}

// "OP.KEY"; "any" stands for all to which KEY applies.
static int parse_op(struct fault *fault, const char *name, const char *value)
{
    const char *dot = strchr(name, '.');

    for (unsigned i = 0; dot && i < ARRAY_SIZE(fault_ops); i++) {
        enum req_op op = fault_ops[i].op;
        int ret = -EINVAL;

        if (strlen(fault_ops[i].name) != (size_t)(dot - name) ||
            strncmp(name, fault_ops[i].name, (size_t)(dot - name)))
            continue;
        if (op != REQ_OP_NR)
            return parse_op_key(&fault->chance[op], op, dot + 1, value);
        for (unsigned j = 0; j < REQ_OP_NR; j++) {
            if (!parse_op_key(&fault->chance[j], (enum req_op)j, dot + 1, value))
                ret = 0;
        }
        return ret;
    }
    return -EINVAL;
}

static int parse_pair(struct fault *fault, const char *key, const char *value, char *lower)
{
    unsigned long n;
    int ret;

    if (!strcmp(key, "io")) {
        if (strcmp(value, "direct") && strcmp(value, "buffered"))
            return -EINVAL;
        strcpy(lower, value);
        return 0;
    }
    if (!strcmp(key, "seed")) {
        ret = util_parse_uint(value, 0, UINT32_MAX, &n);
        if (!ret)
            atomic_store(&fault->state, n);
        return ret;
    }
    if (!strcmp(key, "after")) {
        ret = util_parse_uint(value, 0, UINT32_MAX, &n);
        if (!ret)
            fault->after = n;
        return ret;
    }
    return parse_op(fault, key, value);
}

static int fault_parse(struct fault *fault, const char *spec, char *lower, struct err *err)
{
    char *copy = strdup(spec), *save, *pair;
    int ret = 0;

    if (!copy)
        return err_set(err, -ENOMEM, "--io: fault: out of memory");
    for (pair = strtok_r(copy, ",", &save); pair && !ret; pair = strtok_r(NULL, ",", &save)) {
        char *value = strchr(pair, '=');

        if (value)
            *value++ = '\0';
        ret = value ? parse_pair(fault, pair, value, lower) : -EINVAL;
        if (ret < 0)
            err_usage(err, "--io: fault: %s%s%s: not understood; see FAULTS in bight-serve(1)", pair,
                      value ? "=" : "", value ? value : "");
    }
    free(copy);
    return ret;
}

static bool fault_wants_direct(const char *spec)
{
    return !spec || !strstr(spec, "io=buffered");
}

static int fault_init(struct io *io, const char *spec, struct err *err)
{
    struct fault *fault = container_of(io, struct fault, io);
    char lower[16] = "direct";
    int ret;

    atomic_init(&fault->state, 1);
    for (unsigned i = 0; i < REQ_OP_NR; i++)
        fault->chance[i].error_code = EIO;
    ret = fault_parse(fault, spec ? spec : "", lower, err);
    return ret < 0 ? ret : io_create(&io->lower, io->dev, io->image, lower, err);
}

static void fault_exit(struct io *io)
{
    io_destroy(io->lower);
}

const struct io_ops io_fault_ops = {
    .name = "fault",
    .is_stored = true,
    .wants_direct = fault_wants_direct,
    .takes_spec = true,
    .io_bytes = sizeof(struct fault),
    .init = fault_init,
    .exit = fault_exit,
    .rw = fault_submit,
    .flush = fault_submit,
    .other = fault_submit,
};
