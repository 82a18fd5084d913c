// Write-back in a device: requests against a model of what every byte should be, on both kinds of ring.
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/image.h"
#include "io/io.h"
#include "writeback/wb.h"

#define DISK_BYTES (16 * MiB)

static struct fixture begin(void **state, const struct fixture_options *extra)
{
    struct fixture_options options = *extra;
    struct fixture fixture;
    bool can_direct;

    options.ring = ring_ops_of(state);
    if (!options.io)
        options.io = "direct";
    if (!options.size_bytes)
        options.size_bytes = DISK_BYTES;
    options.image.is_format_raw = true;
    if (!options.writeback_bytes)
        options.writeback_bytes = MiB;
    // Where the scratch directory cannot do direct I/O, write-back is refused.
    fixture = fixture_create(&(struct fixture_options){.ring = options.ring, .io = "direct"});
    can_direct = fixture.dev->image->is_direct;
    fixture_destroy(&fixture);
    if (!can_direct)
        skip();
    return fixture_create(&options);
}

static void file_read(const struct fixture *fixture, void *buf, size_t len, uint64_t offset)
{
    int fd = open(fixture->path, O_RDONLY | O_CLOEXEC);

    assert_true(fd >= 0);
    assert_int_equal(pread(fd, buf, len, (off_t)offset), len);
    close(fd);
}

static void assert_bytes(const char *buf, char byte, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (buf[i] != byte)
            fail_msg("byte %zu is %d, not %d", i, buf[i], byte);
    }
}

static void device_has(struct device *dev, uint64_t offset, char byte, uint32_t len)
{
    char *buf = malloc(len);

    memset(buf, 0x55, len);
    assert_int_equal(fixture_do(dev, REQ_OP_READ, 0, offset, buf, len), 0);
    assert_bytes(buf, byte, len);
    free(buf);
}

static void file_has(const struct fixture *fixture, uint64_t offset, char byte, uint32_t len)
{
    char *buf = malloc(len);

    file_read(fixture, buf, len, offset);
    assert_bytes(buf, byte, len);
    free(buf);
}

static int do_write(struct device *dev, unsigned flags, uint64_t offset, char byte, uint32_t len)
{
    char *buf = malloc(len);
    int error;

    memset(buf, byte, len);
    error = fixture_do(dev, REQ_OP_WRITE, flags, offset, buf, len);
    free(buf);
    return error;
}

static int do_flush(struct device *dev)
{
    return fixture_do(dev, REQ_OP_FLUSH, 0, 0, NULL, 0);
}

static struct writeback_stats stats_of(const struct device *dev)
{
    struct writeback_stats stats;

    assert_true(writeback_stats(dev, &stats));
    return stats;
}

static void a_flush_brings_it_below(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct device *dev = fixture.dev;
    struct writeback_stats stats;

    assert_int_equal(do_write(dev, 0, 8192, 'a', 100 * KiB), 0);
    stats = stats_of(dev);
    assert_int_equal(stats.dirty_bytes, 100 * KiB);
    assert_int_equal(stats.delayed_bytes, 100 * KiB);
    device_has(dev, 8192, 'a', 100 * KiB);
    device_has(dev, 0, 0, 8192);
    file_has(&fixture, 8192, 0, 100 * KiB); // nothing has asked for it
    assert_int_equal(do_flush(dev), 0);
    file_has(&fixture, 8192, 'a', 100 * KiB);
    stats = stats_of(dev);
    assert_int_equal(stats.used_bytes, 0);
    assert_int_equal(stats.reserved_bytes, 0);
    assert_int_equal(stats.nr_map_calls, 1);
    assert_int_equal(stats.nr_writes, 1);
    device_has(dev, 8192, 'a', 100 * KiB);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void the_end_brings_it_below(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});

    assert_int_equal(do_write(fixture.dev, 0, 4096, 'e', 4096), 0);
    fixture_stop(&fixture);
    file_has(&fixture, 4096, 'e', 4096);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void fua_is_for_its_own_range(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct device *dev = fixture.dev;

    assert_int_equal(do_write(dev, 0, 0, 'a', 4096), 0);
    assert_int_equal(do_write(dev, RQ_FUA, 4096, 'f', 4096), 0);
    file_has(&fixture, 0, 0, 4096);
    file_has(&fixture, 4096, 'f', 4096);
    assert_int_equal(stats_of(dev).dirty_bytes, 4096);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void what_is_smaller_than_a_sector(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){.size_bytes = MiB + 1000});
    struct device *dev = fixture.dev;

    assert_int_equal(do_write(dev, 0, 0, 'o', 8192), 0);
    assert_int_equal(do_flush(dev), 0);
    assert_int_equal(do_write(dev, 0, 100, 'a', 7), 0);
    assert_int_equal(do_write(dev, 0, 500, 'b', 5000), 0);
    assert_int_equal(fixture_do(dev, REQ_OP_WRITE_ZEROES, 0, 105, NULL, 50), 0);
    assert_int_equal(fixture_do(dev, REQ_OP_WRITE_ZEROES, RQ_FUA, 1000, NULL, 3000), 0);
    assert_int_equal(do_write(dev, 0, MiB + 3, 't', 997), 0); // up to the end, which is no whole block
    assert_int_equal(do_flush(dev), 0);
    file_has(&fixture, 0, 'o', 100);
    file_has(&fixture, 100, 'a', 5);
    file_has(&fixture, 105, 0, 50);
    file_has(&fixture, 155, 'o', 345);
    file_has(&fixture, 500, 'b', 500);
    file_has(&fixture, 1000, 0, 3000);
    file_has(&fixture, 4000, 'b', 1500);
    file_has(&fixture, 5500, 'o', 2692);
    file_has(&fixture, MiB, 0, 3);
    file_has(&fixture, MiB + 3, 't', 997);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void zeroes_and_discards_drop_what_is_cached(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct device *dev = fixture.dev;

    assert_int_equal(do_write(dev, 0, 0, 'a', 64 * KiB), 0);
    assert_int_equal(fixture_do(dev, REQ_OP_WRITE_ZEROES, 0, 4096, NULL, 8192), 0);
    assert_int_equal(fixture_do(dev, REQ_OP_DISCARD, 0, 32 * KiB, NULL, 32 * KiB), 0);
    assert_int_equal(stats_of(dev).dirty_bytes, 24 * KiB);
    assert_int_equal(stats_of(dev).reserved_bytes, 24 * KiB);
    device_has(dev, 4096, 0, 8192);
    device_has(dev, 12288, 'a', 20 * KiB);
    assert_int_equal(do_flush(dev), 0);
    file_has(&fixture, 0, 'a', 4096);
    file_has(&fixture, 4096, 0, 8192);
    file_has(&fixture, 32 * KiB, 0, 32 * KiB);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void block_status_tells_cached_data(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct extent exts[8];
    struct fixture_rq frq;

    assert_int_equal(do_write(fixture.dev, 0, MiB, 'a', 8192), 0);
    fixture_rq_init(&frq, REQ_OP_BLOCK_STATUS, 0, 0, exts, DISK_BYTES);
    frq.iov[0].iov_len = sizeof(exts);
    fixture_submit(&fixture.dev->queues[0], &frq);
    assert_int_equal(fixture_wait(&frq), 0);
    assert_int_equal(frq.rq.nr_extents, 3);
    assert_int_equal(exts[0].state, EXTENT_HOLE);
    assert_int_equal(exts[0].len_bytes, MiB);
    assert_int_equal(exts[1].state, EXTENT_DELAYED);
    assert_int_equal(exts[1].len_bytes, 8192);
    assert_int_equal(exts[2].state, EXTENT_HOLE);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void more_than_memory(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});

    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(do_write(fixture.dev, 0, i * 2 * MiB, (char)('a' + i), 2 * MiB), 0);
    assert_true(stats_of(fixture.dev).used_bytes <= MiB);
    for (unsigned i = 0; i < 8; i++)
        device_has(fixture.dev, i * 2 * MiB, (char)('a' + i), 2 * MiB);
    assert_int_equal(do_flush(fixture.dev), 0);
    for (unsigned i = 0; i < 8; i++)
        file_has(&fixture, i * 2 * MiB, (char)('a' + i), 2 * MiB);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void the_neighbour_behind_the_device_s_end_stays(void **state)
{
    struct fixture fixture =
        begin(state, &(struct fixture_options){.image = {.size_limit_bytes = MiB - 100}});
    int fd = open(fixture.path, O_RDWR | O_CLOEXEC);
    char buf[9];

    assert_int_equal(pwrite(fd, "neighbour", 9, MiB - 100), 9);
    fsync(fd);
    close(fd);
    assert_int_equal(do_write(fixture.dev, 0, MiB - 8192, 'x', 8192 - 100), 0);
    fixture_stop(&fixture);
    file_read(&fixture, buf, 9, MiB - 100);
    assert_memory_equal(buf, "neighbour", 9);
    file_has(&fixture, MiB - 8192, 'x', 8192 - 100);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void an_error_is_told_by_every_flush_until_it_is_written(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){.io = "fault:write.error=1"});
    struct device *dev = fixture.dev;
    struct io *fault = dev->io;

    assert_int_equal(do_write(dev, 0, 0, 'a', 8192), 0);
    assert_int_equal(do_flush(dev), -EIO);
    assert_int_equal(do_flush(dev), -EIO);
    assert_int_equal(stats_of(dev).failed_bytes, 8192);
    assert_int_equal(stats_of(dev).error, -EIO);
    assert_int_equal(do_write(dev, RQ_FUA, 64 * KiB, 'f', 4096), -EIO);
    device_has(dev, 0, 'a', 8192);
    file_has(&fixture, 0, 0, 8192);
    dev->io = fault->lower; // as if the disk were well again; nothing is in flight
    assert_int_equal(do_flush(dev), 0);
    assert_int_equal(stats_of(dev).failed_bytes, 0);
    file_has(&fixture, 0, 'a', 8192);
    dev->io = fault;
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void what_cannot_be_written_is_told_at_the_end(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){.io = "fault:write.error=1"});

    assert_int_equal(do_write(fixture.dev, 0, 0, 'a', 8192), 0);
    assert_int_equal(fixture_destroy(&fixture), -EIO);
}

static void writers_are_told_when_nothing_can_be_written(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){.io = "fault:write.error=1:ENOSPC"});
    int error = 0;

    for (unsigned i = 0; i < 8 && !error; i++)
        error = do_write(fixture.dev, 0, i * MiB, 'a', MiB);
    assert_int_equal(error, -ENOSPC);
    assert_int_equal(fixture_destroy(&fixture), -ENOSPC);
}

// ---- Past the cache (W5)

#define LONG_TIME_NS (1ULL << 62)

// Nothing was asked of the map yet: the file has all of its blocks when it is.
static void fill_file(const struct fixture *fixture, char byte)
{
    int fd = open(fixture->path, O_RDWR | O_CLOEXEC);
    char *buf = malloc(DISK_BYTES);

    memset(buf, byte, DISK_BYTES);
    assert_int_equal(pwrite(fd, buf, DISK_BYTES, 0), DISK_BYTES);
    assert_int_equal(fsync(fd), 0);
    close(fd);
    free(buf);
}

static void load(struct device *dev, bool is_loaded)
{
    atomic_store(&dev->writeback->pass_by_until_ns, is_loaded ? LONG_TIME_NS : 0);
}

static int write_page(struct device *dev, unsigned flags, uint64_t offset, char byte)
{
    static _Alignas(4096) char buf[4096];

    memset(buf, byte, sizeof(buf));
    return fixture_do(dev, REQ_OP_WRITE, flags, offset, buf, sizeof(buf));
}

static void under_load_a_write_passes_the_cache_by(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct device *dev = fixture.dev;

    fill_file(&fixture, 'o');
    assert_int_equal(write_page(dev, 0, 0, 'k'), 0); // the place is known then
    assert_int_equal(do_flush(dev), 0);
    load(dev, true);
    assert_int_equal(write_page(dev, 0, 8192, 'a'), 0);
    assert_int_equal(stats_of(dev).nr_passed, 1);
    assert_int_equal(stats_of(dev).used_bytes, 0);
    file_has(&fixture, 8192, 'a', 4096);
    device_has(dev, 8192, 'a', 4096);
    load(dev, false);
    assert_int_equal(write_page(dev, 0, 8192, 'b'), 0);
    load(dev, true);
    assert_int_equal(write_page(dev, 0, 8192, 'c'), 0);  // what is cached is older
    assert_int_equal(write_page(dev, 0, 12288, 'd'), 0); // goes on where that ended
    assert_int_equal(stats_of(dev).nr_passed, 1);
    file_has(&fixture, 8192, 'a', 4096);
    device_has(dev, 8192, 'c', 4096);
    assert_int_equal(do_flush(dev), 0);
    file_has(&fixture, 8192, 'c', 4096);
    file_has(&fixture, 12288, 'd', 4096);
    file_has(&fixture, 16384, 'o', 4096);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void what_write_back_allocated_does_not_pass_it_by(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct device *dev = fixture.dev;

    load(dev, true);
    assert_int_equal(write_page(dev, 0, 0, 'a'), 0);
    assert_int_equal(do_flush(dev), 0);
    assert_int_equal(write_page(dev, 0, 8192, 'b'), 0); // zeroes around others may be on their way there
    assert_int_equal(stats_of(dev).nr_passed, 0);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void load_begins_and_ends_by_itself(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct writeback *wb = fixture.dev->writeback;
    uint64_t random = 5;

    fill_file(&fixture, 0);
    for (unsigned i = 0; i < 4096 && !stats_of(fixture.dev).nr_passed; i++)
        assert_int_equal(write_page(fixture.dev, 0, unit_random(&random) % (DISK_BYTES / 4096) * 4096, 'l'),
                         0);
    assert_true(stats_of(fixture.dev).nr_passed);
    atomic_store(&wb->pass_by_until_ns, 1); // long ago, and not much has come
    atomic_store(&wb->passed_bytes, 4096);
    assert_int_equal(do_flush(fixture.dev), 0);
    assert_int_equal(write_page(fixture.dev, 0, 0, 'm'), 0);
    assert_int_equal(stats_of(fixture.dev).used_bytes, 4096);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void a_discard_that_cannot_be_done_brings_nothing_back(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){0});
    struct device *dev = fixture.dev;

    fill_file(&fixture, 'o');
    atomic_store(&dev->io->cannot_discard, true);
    assert_int_equal(do_write(dev, 0, 8192, 'n', 4096), 0);
    assert_int_equal(fixture_do(dev, REQ_OP_DISCARD, 0, 0, NULL, 64 * KiB), 0);
    device_has(dev, 8192, 'n', 4096);
    assert_int_equal(do_flush(dev), 0);
    file_has(&fixture, 8192, 'n', 4096);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void a_part_of_a_sector_waits_for_what_passes_the_cache_by(void **state)
{
    static _Alignas(4096) char whole[4096];
    char parts[] = "parts";
    struct fixture fixture = begin(state, &(struct fixture_options){.io = "fault:write.delay=1:50"});
    struct device *dev = fixture.dev;
    struct fixture_rq frq, part;

    fill_file(&fixture, 'o');
    assert_int_equal(do_write(dev, 0, 100, 'k', 8), 0);
    assert_int_equal(do_flush(dev), 0);
    load(dev, true);
    memset(whole, 'w', sizeof(whole));
    fixture_rq_init(&frq, REQ_OP_WRITE, 0, 8192, whole, sizeof(whole));
    fixture_rq_init(&part, REQ_OP_WRITE, 0, 8192, parts, 5);
    fixture_submit(&dev->queues[0], &frq);
    fixture_submit(&dev->queues[0], &part);
    assert_int_equal(fixture_wait(&frq), 0);
    assert_int_equal(fixture_wait(&part), 0);
    assert_int_equal(stats_of(dev).nr_passed, 1);
    assert_int_equal(do_flush(dev), 0);
    file_has(&fixture, 8192 + 5, 'w', 4096 - 5);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

// ---- At random. Clients share the device in stripes, so that each knows what its own bytes are.

#define NR_CLIENTS 8
#define STRIPE_BYTES (24 * KiB) // neither pages nor chunks end with them
#define NR_STRIPES (DISK_BYTES / STRIPE_BYTES / NR_CLIENTS)

struct client {
    struct fixture_rq frq;
    uint64_t random;
    unsigned number, nr_left;
    uint64_t at, len;
    char *buf;
    char *model; // of its own stripes
    unsigned nr_wrong;
};

static uint64_t device_offset(const struct client *client, uint64_t at)
{
    return (at / STRIPE_BYTES * NR_CLIENTS + client->number) * STRIPE_BYTES + at % STRIPE_BYTES;
}

static void client_check(struct client *client)
{
    struct rq *rq = &client->frq.rq;

    if (rq->error || (rq->op == REQ_OP_READ && memcmp(client->buf, client->model + client->at, client->len)))
        client->nr_wrong++;
}

static bool client_go(struct client *client)
{
    static const uint8_t ops[] = {REQ_OP_READ,  REQ_OP_READ,         REQ_OP_WRITE,   REQ_OP_WRITE,
                                  REQ_OP_WRITE, REQ_OP_WRITE_ZEROES, REQ_OP_DISCARD, REQ_OP_FLUSH};
    uint64_t *random = &client->random, room;
    uint8_t op = ops[unit_random(random) % ARRAY_SIZE(ops)], flags = 0;
    unsigned unit = unit_random(random) % 8 ? 512 : 1;
    void (*done)(struct rq * rq) = client->frq.rq.done;

    if (!client->nr_left--)
        return false;
    client->at = unit_random(random) % (NR_STRIPES * STRIPE_BYTES) / unit * unit;
    room = STRIPE_BYTES - client->at % STRIPE_BYTES;
    client->len = unit_random(random) % STRIPE_BYTES / unit * unit + unit;
    client->len = min_of(client->len, room);
    if (op == REQ_OP_DISCARD) { // its contents are undefined: whole blocks, which are zeroed
        client->at = round_up(client->at, 4096);
        client->len = 4096;
        if (client->at >= NR_STRIPES * STRIPE_BYTES)
            client->at = 0;
        op = REQ_OP_WRITE_ZEROES;
    }
    if (op == REQ_OP_WRITE) {
        memset(client->buf, (int)(unit_random(random) % 255 + 1), client->len);
        memcpy(client->model + client->at, client->buf, client->len);
    } else if (op == REQ_OP_WRITE_ZEROES) {
        memset(client->model + client->at, 0, client->len);
    } else {
        memset(client->buf, 0x77, client->len);
    }
    if ((op == REQ_OP_WRITE || op == REQ_OP_WRITE_ZEROES) && unit_random(random) % 8 == 0)
        flags = RQ_FUA;
    client->frq.rq = (struct rq){
        .op = op,
        .flags = flags,
        .buf_index = -1,
        .offset_bytes = op == REQ_OP_FLUSH ? 0 : device_offset(client, client->at),
        .len_bytes = op == REQ_OP_FLUSH ? 0 : client->len,
        .done = done,
    };
    client->frq.iov[0] = (struct iovec){client->buf, client->len};
    if (op == REQ_OP_READ || op == REQ_OP_WRITE) {
        client->frq.rq.iov = client->frq.iov;
        client->frq.rq.nr_iov = 1;
    }
    return true;
}

// On the queue's thread, where the one before it is done.
static bool client_again(struct fixture_rq *frq)
{
    struct client *client = container_of(frq, struct client, frq);

    client_check(client);
    if (!client_go(client))
        return false;
    // Not from within done(): by way of the ring.
    fixture_submit(frq->queue, frq);
    return true;
}

static void run_clients(struct fixture *fixture, unsigned nr_rounds)
{
    struct client *clients = calloc(NR_CLIENTS, sizeof(*clients));
    unsigned nr_queues = fixture->dev->nr_queues, nr_wrong = 0;
    char *disk = malloc(DISK_BYTES);

    for (unsigned i = 0; i < NR_CLIENTS; i++) {
        struct client *client = &clients[i];

        client->number = i;
        client->random = 1234 + i;
        client->nr_left = nr_rounds;
        client->buf = aligned_alloc(4096, round_up(STRIPE_BYTES, 4096));
        client->model = calloc(NR_STRIPES, STRIPE_BYTES);
        fixture_rq_init(&client->frq, REQ_OP_FLUSH, 0, 0, NULL, 0);
        client->frq.again = client_again;
        fixture_submit(&fixture->dev->queues[i % nr_queues], &client->frq);
    }
    for (unsigned i = 0; i < NR_CLIENTS; i++) {
        assert_int_equal(fixture_wait(&clients[i].frq), 0);
        nr_wrong += clients[i].nr_wrong;
    }
    assert_int_equal(nr_wrong, 0);
    assert_int_equal(do_flush(fixture->dev), 0);
    file_read(fixture, disk, DISK_BYTES, 0);
    for (unsigned i = 0; i < NR_CLIENTS; i++) {
        for (uint64_t at = 0; at < NR_STRIPES * STRIPE_BYTES; at += STRIPE_BYTES)
            assert_memory_equal(disk + device_offset(&clients[i], at), clients[i].model + at, STRIPE_BYTES);
        free(clients[i].buf);
        free(clients[i].model);
    }
    assert_int_equal(stats_of(fixture->dev).used_bytes, 0);
    assert_int_equal(stats_of(fixture->dev).reserved_bytes, 0);
    free(disk);
    free(clients);
}

static unsigned nr_rounds(void)
{
    const char *quick = getenv("BIGHT_TEST_QUICK");

    return is_under_valgrind() ? 100 : quick && !strcmp(quick, "1") ? 400 : 2000;
}

static void clients_at_random(void **state)
{
    struct fixture fixture = begin(state, &(struct fixture_options){.nr_queues = 3});

    run_clients(&fixture, nr_rounds());
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void clients_at_random_on_a_disk_that_writes_less(void **state)
{
    struct fixture fixture =
        begin(state, &(struct fixture_options){.nr_queues = 2, .io = "fault:write.short=0.3,read.short=0.2"});

    run_clients(&fixture, nr_rounds() / 2);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void clients_at_random_with_slow_writes(void **state)
{
    struct fixture fixture =
        begin(state, &(struct fixture_options){.nr_queues = 2, .io = "fault:write.delay=0.3:1"});

    run_clients(&fixture, nr_rounds() / 4);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void clients_at_random_past_the_cache(void **state)
{
    struct fixture fixture =
        begin(state, &(struct fixture_options){.nr_queues = 3, .io = "fault:write.delay=0.1:1"});

    fill_file(&fixture, 0);
    load(fixture.dev, true);
    run_clients(&fixture, nr_rounds());
    assert_true(stats_of(fixture.dev).nr_passed);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void it_is_refused_where_it_makes_no_sense(void **state)
{
    struct device_options options = {.name = "disk",
                                     .io = "buffered",
                                     .map = "linear",
                                     .ring = ring_ops_of(state),
                                     .nr_queues = 1,
                                     .depth = 1,
                                     .writeback_bytes = MiB};
    struct device *dev;
    struct err err = {""};
    char dir[64], path[80];

    fixture_make_dir(dir);
    snprintf(path, sizeof(path), "%s/disk", dir);
    fixture_make_file(path, MiB);
    assert_true(device_create(&dev, path, &options, &err) < 0);
    assert_non_null(strstr(err.line, "kernel's write-back"));
    options.io = "direct";
    options.image.offset_bytes = 100;
    assert_true(device_create(&dev, path, &options, &err) < 0);
    unlink(path);
    rmdir(dir);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_flush_brings_it_below),
        cmocka_unit_test(the_end_brings_it_below),
        cmocka_unit_test(fua_is_for_its_own_range),
        cmocka_unit_test(what_is_smaller_than_a_sector),
        cmocka_unit_test(zeroes_and_discards_drop_what_is_cached),
        cmocka_unit_test(block_status_tells_cached_data),
        cmocka_unit_test(more_than_memory),
        cmocka_unit_test(the_neighbour_behind_the_device_s_end_stays),
        cmocka_unit_test(an_error_is_told_by_every_flush_until_it_is_written),
        cmocka_unit_test(what_cannot_be_written_is_told_at_the_end),
        cmocka_unit_test(writers_are_told_when_nothing_can_be_written),
        cmocka_unit_test(under_load_a_write_passes_the_cache_by),
        cmocka_unit_test(what_write_back_allocated_does_not_pass_it_by),
        cmocka_unit_test(load_begins_and_ends_by_itself),
        cmocka_unit_test(a_discard_that_cannot_be_done_brings_nothing_back),
        cmocka_unit_test(a_part_of_a_sector_waits_for_what_passes_the_cache_by),
        cmocka_unit_test(clients_at_random),
        cmocka_unit_test(clients_at_random_on_a_disk_that_writes_less),
        cmocka_unit_test(clients_at_random_with_slow_writes),
        cmocka_unit_test(clients_at_random_past_the_cache),
        cmocka_unit_test(it_is_refused_where_it_makes_no_sense),
    };

    return run_on_both_rings(tests);
}
