// Power cuts under write-back. An io of the test's keeps the image in memory and a log of all that reaches it
// and of all that clients were told; then the log is cut at random points. What a disk with a volatile cache
// may hold after each cut has to contain all that had been flushed, and for each sector that or something
// written to it later.
#include "fixture.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/io.h"
#include "writeback/wb.h"

#define DISK_BYTES (8 * MiB)
#define NR_SECTORS (DISK_BYTES / SECTOR_BYTES)
#define NR_CLIENTS 6
#define STRIPE_SECTORS 24

enum event_type {
    IMAGE_WRITE,      // submitted: len sectors, whose versions are in versions[]
    IMAGE_WRITE_DONE, // of event id
    IMAGE_FLUSH,
    IMAGE_FLUSH_DONE,
    CLIENT_WRITE, // submitted: len sectors become version
    CLIENT_WRITE_DONE,
    CLIENT_FLUSH,
    CLIENT_FLUSH_DONE,
};

struct event {
    enum event_type type;
    bool is_fua;
    uint32_t id, start, len, version;
    uint32_t *versions;
    int done_at; // of IMAGE_WRITE: when, or -1
};

static struct {
    pthread_mutex_t lock;
    struct event *events;
    uint32_t nr, max;
    uint32_t disk[NR_SECTORS]; // what reads see
    uint32_t nr_overlaps;
    uint64_t random;
    struct io io, *real;
} test = {.lock = PTHREAD_MUTEX_INITIALIZER};

// lock held.
static uint32_t log_event(struct event event)
{
    if (test.nr == test.max) {
        test.max = test.max ? 2 * test.max : 4096;
        test.events = realloc(test.events, test.max * sizeof(*test.events));
    }
    event.done_at = -1;
    test.events[test.nr] = event;
    return test.nr++;
}

static uint32_t log_now(struct event event)
{
    uint32_t id;

    pthread_mutex_lock(&test.lock);
    id = log_event(event);
    pthread_mutex_unlock(&test.lock);
    return id;
}

// A sector is its version, over and over.
static void fill(char *sector, uint32_t version)
{
    for (unsigned i = 0; i < SECTOR_BYTES / sizeof(version); i++)
        memcpy(sector + i * sizeof(version), &version, sizeof(version));
}

static uint32_t version_of(const char *sector)
{
    uint32_t version;

    memcpy(&version, sector, sizeof(version));
    for (unsigned i = 1; i < SECTOR_BYTES / sizeof(version); i++) {
        if (memcmp(sector, sector + i * sizeof(version), sizeof(version)))
            fail_msg("a sector is torn");
    }
    return version;
}

// ---- The image

static uint64_t some_ns(void)
{
    uint64_t random;

    pthread_mutex_lock(&test.lock);
    random = unit_random(&test.random);
    pthread_mutex_unlock(&test.lock);
    return random % 4 ? random / 4 % 100000 : 2000000;
}

static void image_later(struct rq *rq, void (*done)(struct ring_op *op, int res))
{
    rq->ring_op.done = done;
    rq->ring_op.code = RING_TIMEOUT;
    rq->ring_op.timeout_ns = some_ns();
    ring_queue(rq->queue->ring, &rq->ring_op);
}

// Of an IMAGE_WRITE. lock held.
static void image_apply(uint32_t id)
{
    uint32_t done_at = log_event((struct event){.type = IMAGE_WRITE_DONE, .id = id});
    struct event *event = &test.events[id];

    for (uint32_t i = 0; i < event->len; i++)
        test.disk[event->start + i] = event->versions[i];
    event->done_at = (int)done_at;
}

static void image_write_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);
    uint32_t id = (uint32_t)rq->lock.start;

    (void)res;
    pthread_mutex_lock(&test.lock);
    image_apply(id);
    pthread_mutex_unlock(&test.lock);
    if (rq->op == REQ_OP_WRITE)
        rq_part_done(rq, (int)rq_part_bytes(rq));
    else
        rq_end(rq, 0);
}

// lock held. Two writes to one sector at a time would come out in any order.
static void check_overlaps(uint32_t start, uint32_t len)
{
    for (uint32_t i = test.nr > 2000 ? test.nr - 2000 : 0; i < test.nr; i++) {
        const struct event *event = &test.events[i];

        if (event->type == IMAGE_WRITE && event->done_at < 0 && event->start < start + len &&
            start < event->start + event->len)
            test.nr_overlaps++;
    }
}

static void image_write(struct rq *rq, uint64_t offset, uint64_t len)
{
    struct event event = {.type = IMAGE_WRITE,
                          .is_fua = rq->flags & RQ_FUA, // of zeroes, which an io makes durable itself
                          .start = (uint32_t)(offset / SECTOR_BYTES),
                          .len = (uint32_t)(len / SECTOR_BYTES)};
    unsigned nr = 0;

    event.versions = calloc(event.len, sizeof(*event.versions));
    for (unsigned i = 0; rq->op == REQ_OP_WRITE && i < rq->part_nr_iov; i++) {
        for (size_t at = 0; at < rq->iov[i].iov_len; at += SECTOR_BYTES)
            event.versions[nr++] = version_of((char *)rq->iov[i].iov_base + at);
    }
    pthread_mutex_lock(&test.lock);
    check_overlaps(event.start, event.len);
    rq->lock.start = log_event(event);
    pthread_mutex_unlock(&test.lock);
    image_later(rq, image_write_done);
}

static void image_rw(struct io *io, struct rq *rq)
{
    uint32_t sector = (uint32_t)(rq->ext.offset_bytes / SECTOR_BYTES);
    int len = (int)rq_part_bytes(rq);

    (void)io;
    if (rq->op == REQ_OP_WRITE) {
        image_write(rq, rq->ext.offset_bytes, rq_part_bytes(rq));
        return;
    }
    pthread_mutex_lock(&test.lock);
    for (unsigned i = 0; i < rq->part_nr_iov; i++) {
        for (size_t at = 0; at < rq->iov[i].iov_len; at += SECTOR_BYTES)
            fill((char *)rq->iov[i].iov_base + at, test.disk[sector++]);
    }
    pthread_mutex_unlock(&test.lock);
    rq_part_done(rq, len);
}

static void image_flush_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    (void)res;
    log_now((struct event){.type = IMAGE_FLUSH_DONE, .id = (uint32_t)rq->lock.start});
    rq->flush_done(op, 0);
}

static void image_flush(struct io *io, struct rq *rq)
{
    (void)io;
    rq->flush_done = rq->ring_op.done;
    rq->lock.start = log_now((struct event){.type = IMAGE_FLUSH});
    image_later(rq, image_flush_done);
}

static void image_other(struct io *io, struct rq *rq)
{
    (void)io;
    image_write(rq, rq->offset_bytes, rq->len_bytes);
}

static const struct io_ops image_ops = {
    .name = "log", .is_stored = true, .rw = image_rw, .flush = image_flush, .other = image_other};

// ---- Clients, each with stripes of its own

struct client {
    struct fixture_rq frq;
    unsigned number, nr_left;
    uint64_t random;
    uint32_t version, id, start, len;
    _Alignas(4096) char buf[STRIPE_SECTORS * SECTOR_BYTES];
    uint32_t last[NR_SECTORS]; // what it wrote
    unsigned nr_wrong;
};

static void client_done(struct client *client)
{
    struct rq *rq = &client->frq.rq;

    if (rq->error)
        client->nr_wrong++;
    if (rq->op == REQ_OP_READ) {
        for (uint32_t i = 0; i < client->len; i++)
            client->nr_wrong += version_of(client->buf + i * SECTOR_BYTES) != client->last[client->start + i];
    } else if (rq->op == REQ_OP_FLUSH) {
        log_now((struct event){.type = CLIENT_FLUSH_DONE, .id = client->id});
    } else {
        log_now((struct event){.type = CLIENT_WRITE_DONE, .id = client->id, .is_fua = rq->flags & RQ_FUA});
    }
}

static bool client_next(struct client *client)
{
    static const uint8_t ops[] = {REQ_OP_READ,  REQ_OP_WRITE, REQ_OP_WRITE, REQ_OP_WRITE,
                                  REQ_OP_WRITE, REQ_OP_WRITE, REQ_OP_FLUSH, REQ_OP_WRITE_ZEROES};
    void (*done)(struct rq * rq) = client->frq.rq.done;
    uint8_t op = ops[unit_random(&client->random) % ARRAY_SIZE(ops)], flags = 0;
    uint32_t nr_stripes = NR_SECTORS / STRIPE_SECTORS / NR_CLIENTS, first;

    if (!client->nr_left--)
        return false;
    first = (uint32_t)(unit_random(&client->random) % STRIPE_SECTORS);
    client->start = ((uint32_t)(unit_random(&client->random) % nr_stripes) * NR_CLIENTS + client->number) *
                        STRIPE_SECTORS +
                    first;
    client->len = (uint32_t)(unit_random(&client->random) % (STRIPE_SECTORS - first)) + 1;
    if (op == REQ_OP_WRITE || op == REQ_OP_WRITE_ZEROES) {
        uint32_t version = op == REQ_OP_WRITE ? client->version += NR_CLIENTS : 0;

        if (unit_random(&client->random) % 10 == 0)
            flags = RQ_FUA;
        for (uint32_t i = 0; i < client->len; i++) {
            fill(client->buf + i * SECTOR_BYTES, version);
            client->last[client->start + i] = version;
        }
        client->id = log_now((struct event){
            .type = CLIENT_WRITE, .start = client->start, .len = client->len, .version = version});
    } else if (op == REQ_OP_FLUSH) {
        client->id = log_now((struct event){.type = CLIENT_FLUSH});
    }
    client->frq.iov[0] = (struct iovec){client->buf, client->len * SECTOR_BYTES};
    client->frq.rq = (struct rq){.op = op, .flags = flags, .buf_index = -1, .done = done};
    if (op == REQ_OP_FLUSH)
        return true;
    client->frq.rq.offset_bytes = client->start * SECTOR_BYTES;
    client->frq.rq.len_bytes = client->len * SECTOR_BYTES;
    if (op != REQ_OP_WRITE_ZEROES) {
        client->frq.rq.iov = client->frq.iov;
        client->frq.rq.nr_iov = 1;
    }
    return true;
}

static bool client_again(struct fixture_rq *frq)
{
    struct client *client = container_of(frq, struct client, frq);

    client_done(client);
    if (!client_next(client))
        return false;
    fixture_submit(frq->queue, frq);
    return true;
}

// ---- The cuts

// What is durable for certain, of the events before cut: writes that were done before the last flush that
// was done had begun. Those after that may be, sector by sector.
static void disk_after(uint32_t cut, uint64_t *random, uint32_t *disk)
{
    int flushed = -1; // where that flush began

    for (uint32_t i = 0; i < cut; i++) {
        if (test.events[i].type == IMAGE_FLUSH_DONE)
            flushed = max_of(flushed, (int)test.events[i].id);
    }
    memset(disk, 0, NR_SECTORS * sizeof(*disk));
    for (uint32_t i = 0; i < cut; i++) {
        const struct event *event = &test.events[i];
        bool is_certain = event->done_at >= 0 && event->done_at < (event->is_fua ? (int)cut : flushed);

        for (uint32_t j = 0; event->type == IMAGE_WRITE && j < event->len; j++) {
            if (is_certain || unit_random(random) % 2)
                disk[event->start + j] = event->versions[j];
        }
    }
}

// Where each sector's history has to begin: its last write that a client was told is durable.
static void bases_at(uint32_t cut, int *base)
{
    int flushed = -1;

    for (uint32_t i = 0; i < NR_SECTORS; i++)
        base[i] = -1;
    for (uint32_t i = 0; i < cut; i++) {
        if (test.events[i].type == CLIENT_FLUSH_DONE)
            flushed = max_of(flushed, (int)test.events[i].id);
    }
    for (uint32_t i = 0; i < cut; i++) {
        const struct event *event = &test.events[i], *write = &test.events[event->id];

        if (event->type != CLIENT_WRITE_DONE || !((int)i < flushed || event->is_fua))
            continue;
        for (uint32_t j = 0; j < write->len; j++)
            base[write->start + j] = max_of(base[write->start + j], (int)event->id);
    }
}

static void check_cut(uint32_t cut, uint64_t *random)
{
    static uint32_t disk[NR_SECTORS];
    static int base[NR_SECTORS];
    static bool is_right[NR_SECTORS];

    disk_after(cut, random, disk);
    bases_at(cut, base);
    for (uint32_t i = 0; i < NR_SECTORS; i++)
        is_right[i] = base[i] < 0 && !disk[i];
    for (uint32_t i = 0; i < cut; i++) {
        const struct event *event = &test.events[i];

        for (uint32_t j = event->start; event->type == CLIENT_WRITE && j < event->start + event->len; j++)
            is_right[j] |= (int)i >= base[j] && event->version == disk[j];
    }
    for (uint32_t i = 0; i < NR_SECTORS; i++) {
        if (!is_right[i])
            fail_msg("cut at %u of %u: sector %u holds version %u", cut, test.nr, i, disk[i]);
    }
}

// The image has all of its blocks, and what can go past the cache does.
static void pass_by(struct fixture *fixture)
{
    int fd = open(fixture->path, O_RDWR | O_CLOEXEC);
    char *zeroes = calloc(1, DISK_BYTES);

    assert_int_equal(pwrite(fd, zeroes, DISK_BYTES, 0), DISK_BYTES);
    assert_int_equal(fsync(fd), 0);
    close(fd);
    free(zeroes);
    atomic_store(&fixture->dev->writeback->pass_by_until_ns, 1ULL << 62);
}

static void cut_everywhere(void **state, bool is_passing)
{
    const char *quick = getenv("BIGHT_TEST_QUICK");
    bool is_quick = is_under_valgrind() || (quick && !strcmp(quick, "1"));
    struct fixture_options options = {.ring = ring_ops_of(state), .io = "direct", .nr_queues = 2};
    struct fixture fixture;
    struct client *clients;
    uint64_t random = 99;

    options.size_bytes = DISK_BYTES;
    fixture = fixture_create(&options);
    if (!fixture.dev->image->is_direct) {
        fixture_destroy(&fixture);
        skip();
    }
    fixture_destroy(&fixture);
    options.writeback_bytes = MiB;
    fixture = fixture_create(&options);
    if (is_passing)
        pass_by(&fixture);
    clients = aligned_alloc(4096, NR_CLIENTS * sizeof(*clients));
    memset(clients, 0, NR_CLIENTS * sizeof(*clients));
    test.nr = test.nr_overlaps = 0;
    test.random = 7;
    memset(test.disk, 0, sizeof(test.disk));
    test.real = fixture.dev->io;
    test.io = (struct io){.ops = &image_ops, .dev = fixture.dev, .image = fixture.dev->image};
    fixture.dev->io = &test.io; // nothing is in flight
    for (unsigned i = 0; i < NR_CLIENTS; i++) {
        clients[i].number = i;
        clients[i].version = i + 1;
        clients[i].random = 77 + i;
        clients[i].nr_left = is_quick ? 150 : 600;
        fixture_rq_init(&clients[i].frq, REQ_OP_FLUSH, 0, 0, NULL, 0);
        clients[i].id = log_now((struct event){.type = CLIENT_FLUSH});
        clients[i].frq.again = client_again;
        fixture_submit(&fixture.dev->queues[i % 2], &clients[i].frq);
    }
    for (unsigned i = 0; i < NR_CLIENTS; i++) {
        fixture_wait(&clients[i].frq);
        assert_int_equal(clients[i].nr_wrong, 0);
    }
    assert_true(!is_passing || atomic_load(&fixture.dev->writeback->nr_passed));
    fixture_stop(&fixture); // a pass may go on: the log grows until here
    assert_int_equal(test.nr_overlaps, 0);
    for (unsigned i = 0; i < (is_quick ? 300 : 2000); i++)
        check_cut((uint32_t)(unit_random(&random) % (test.nr + 1)), &random);
    fixture.dev->io = test.real;
    fixture_destroy(&fixture);
    for (uint32_t i = 0; i < test.nr; i++)
        free(test.events[i].versions);
    free(clients);
}

static void what_was_flushed_survives_every_cut(void **state)
{
    cut_everywhere(state, false);
}

static void also_what_passed_the_cache_by(void **state)
{
    cut_everywhere(state, true);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_flushed_survives_every_cut),
        cmocka_unit_test(also_what_passed_the_cache_by),
    };
    int nr_failed = run_on_both_rings(tests);

    free(test.events);
    return nr_failed;
}
