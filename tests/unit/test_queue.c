// Queues and their device: requests through a map and an io of the test's, freezes, beginnings and ends.
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "io/io.h"

#define DISK_BYTES (256 * KiB)

// ---- An io over memory, which moves as little as it is told, later

static struct {
    struct io io;
    char disk[DISK_BYTES];
    uint64_t max_bytes; // of one step; 0: all
    uint64_t end_bytes; // where its file ends
    uint64_t delay_ns;
    int fail_after_steps, error; // < 0: never
    int flush_result;
    bool holds_once; // gives the request back by rq_hold() first
    atomic_int nr_steps, nr_inside, nr_wrong;
    struct io *real;
} mem;

static void mem_done(struct ring_op *op, int res)
{
    struct rq *rq = container_of(op, struct rq, ring_op);

    (void)res;
    res = op->res;
    atomic_fetch_sub(&mem.nr_inside, 1);
    rq_part_done(rq, res);
}

static int mem_move(struct rq *rq)
{
    uint64_t at = rq->ext.offset_bytes, left = rq_part_bytes(rq), moved = 0, in_list = 0;

    for (unsigned i = 0; i < rq->part_nr_iov; i++)
        in_list += rq->iov[i].iov_len;
    if (in_list != left || at + left > DISK_BYTES || !left)
        atomic_fetch_add(&mem.nr_wrong, 1);
    if (mem.max_bytes)
        left = min_of(left, mem.max_bytes);
    left = at < mem.end_bytes ? min_of(left, mem.end_bytes - at) : 0;
    for (unsigned i = 0; moved < left; i++) {
        size_t n = min_of(left - moved, rq->iov[i].iov_len);

        if (rq->op == REQ_OP_READ)
            memcpy(rq->iov[i].iov_base, mem.disk + at + moved, n);
        else
            memcpy(mem.disk + at + moved, rq->iov[i].iov_base, n);
        moved += n;
    }
    return (int)moved;
}

static void mem_rw(struct io *io, struct rq *rq)
{
    int step = atomic_fetch_add(&mem.nr_steps, 1);

    (void)io;
    if (mem.holds_once) {
        mem.holds_once = false;
        rq_hold(rq);
        return;
    }
    atomic_fetch_add(&mem.nr_inside, 1);
    rq->ring_op.done = mem_done;
    rq->ring_op.res = step == mem.fail_after_steps ? mem.error : mem_move(rq);
    if (!mem.delay_ns) {
        ring_post(rq->queue->ring, &rq->ring_op, rq->ring_op.res);
        return;
    }
    rq->ring_op.code = RING_TIMEOUT;
    rq->ring_op.timeout_ns = mem.delay_ns;
    ring_queue(rq->queue->ring, &rq->ring_op);
}

static void mem_flush(struct io *io, struct rq *rq)
{
    (void)io;
    rq->ring_op.done(&rq->ring_op, mem.flush_result);
}

static void mem_other(struct io *io, struct rq *rq)
{
    (void)io;
    rq_end(rq, 0);
}

static const struct io_ops mem_ops = {
    .name = "mem", .is_stored = true, .rw = mem_rw, .flush = mem_flush, .other = mem_other};

// ---- A map of the test's: extents of odd lengths, some of which lie elsewhere

static struct {
    struct map_ops ops;
    uint64_t extent_bytes;
    bool has_holes;
    int error;
} odd;

static enum extent_state odd_state(uint64_t number)
{
    return number % 3 == 1 ? EXTENT_HOLE : number % 3 == 2 ? EXTENT_UNWRITTEN : EXTENT_MAPPED;
}

// Pairs of extents change places.
static uint64_t odd_place(uint64_t at)
{
    uint64_t number = at / odd.extent_bytes, other = number ^ 1;

    return other * odd.extent_bytes + at % odd.extent_bytes;
}

static int odd_extent(struct map *map, uint64_t start, uint64_t len, bool create, bool may_block,
                      struct extent *ext)
{
    uint64_t number = start / odd.extent_bytes;

    (void)map;
    (void)create;
    (void)may_block;
    if (odd.error)
        return odd.error;
    *ext = (struct extent){.start_bytes = start,
                           .len_bytes = min_of(len, (number + 1) * odd.extent_bytes - start),
                           .state = odd.has_holes ? odd_state(number) : EXTENT_MAPPED,
                           .offset_bytes = odd_place(start)};
    return 0;
}

// ---- A device of both

static struct fixture setup(void **state, unsigned nr_queues)
{
    struct fixture fixture = fixture_create(&(struct fixture_options){.ring = ring_ops_of(state),
                                                                      .size_bytes = DISK_BYTES,
                                                                      .nr_queues = nr_queues});
    struct device *dev = fixture.dev;

    memset(&mem, 0, sizeof(mem));
    memset(&odd, 0, sizeof(odd));
    mem.io = (struct io){.ops = &mem_ops, .dev = dev};
    mem.end_bytes = DISK_BYTES;
    mem.fail_after_steps = -1;
    mem.real = dev->io;
    odd.ops = (struct map_ops){.name = "odd", .extent = odd_extent};
    odd.extent_bytes = DISK_BYTES / 2;
    dev->io = &mem.io;
    dev->map->ops = &odd.ops;
    dev->durability = (struct durability){true, FLUSH_FDATASYNC, FUA_DSYNC};
    return fixture;
}

static void teardown(struct fixture *fixture)
{
    fixture_stop(fixture);
    assert_int_equal(atomic_load(&mem.nr_wrong), 0);
    fixture->dev->io = mem.real;
    fixture_destroy(fixture);
}

static void fill(char *buf, size_t len, uint64_t seed)
{
    for (size_t i = 0; i < len; i++)
        buf[i] = (char)unit_random(&seed);
}

static void split_at_random(struct fixture_rq *frq, char *buf, size_t len, uint64_t *seed)
{
    unsigned n = 0;

    for (; n < ARRAY_SIZE(frq->iov) - 1 && len > 1; n++) {
        size_t piece = 1 + unit_random(seed) % (len - 1);

        frq->iov[n] = (struct iovec){buf, piece};
        buf += piece;
        len -= piece;
    }
    frq->iov[n++] = (struct iovec){buf, len};
    frq->rq.iov = frq->iov;
    frq->rq.nr_iov = (uint16_t)n;
}

static char model[DISK_BYTES], buf[DISK_BYTES];

static void random_requests(struct fixture *fixture, uint64_t seed, unsigned nr_rounds)
{
    for (unsigned i = 0; i < nr_rounds; i++) {
        uint64_t offset = unit_random(&seed) % DISK_BYTES, len = 1 + unit_random(&seed) % 5000;
        bool is_write = unit_random(&seed) % 2;
        struct fixture_rq frq;

        len = min_of(len, DISK_BYTES - offset);
        fixture_rq_init(&frq, is_write ? REQ_OP_WRITE : REQ_OP_READ, 0, offset, buf, len);
        split_at_random(&frq, buf, len, &seed);
        fill(buf, len, seed);
        if (is_write)
            memcpy(model + offset, buf, len);
        fixture_submit(&fixture->dev->queues[0], &frq);
        assert_int_equal(fixture_wait(&frq), 0);
        if (!is_write)
            assert_memory_equal(buf, model + offset, len);
    }
}

static void requests_that_cross_extents_are_split_and_put_where_the_map_says(void **state)
{
    static const uint64_t lens[] = {4096, 1000, 999, 65536, 512};

    for (unsigned i = 0; i < ARRAY_SIZE(lens); i++) {
        struct fixture fixture = setup(state, 1);

        memset(model, 0, sizeof(model));
        odd.extent_bytes = lens[i];
        // The last pair has to be whole.
        fixture.dev->limits.size_bytes = DISK_BYTES / (2 * lens[i]) * 2 * lens[i];
        for (unsigned round = 0; round < 150; round++) {
            uint64_t seed = round * 31 + i + 1, size = fixture.dev->limits.size_bytes;
            uint64_t offset = unit_random(&seed) % size, len = 1 + unit_random(&seed) % 9000;
            struct fixture_rq frq;

            len = min_of(len, size - offset);
            fill(buf, len, seed);
            for (uint64_t j = 0; j < len; j++)
                model[odd_place(offset + j)] = buf[j];
            fixture_rq_init(&frq, REQ_OP_WRITE, 0, offset, buf, len);
            split_at_random(&frq, buf, len, &seed);
            fixture_submit(&fixture.dev->queues[0], &frq);
            assert_int_equal(fixture_wait(&frq), 0);
        }
        assert_memory_equal(mem.disk, model, DISK_BYTES);
        teardown(&fixture);
    }
}

static void short_reads_and_writes_are_continued(void **state)
{
    static const uint64_t steps[] = {1000, 333, 64, 4999};

    for (unsigned i = 0; i < ARRAY_SIZE(steps); i++) {
        struct fixture fixture = setup(state, 1);

        memset(model, 0, sizeof(model));
        mem.max_bytes = steps[i];
        odd.extent_bytes = DISK_BYTES / 2; // which change places, seen from both sides alike
        random_requests(&fixture, i + 1, 200);
        assert_true(atomic_load(&mem.nr_steps) > 200);
        teardown(&fixture);
    }
}

static void short_io_and_many_extents_go_together(void **state)
{
    struct fixture fixture = setup(state, 1);

    memset(model, 0, sizeof(model));
    mem.max_bytes = 100;
    odd.extent_bytes = 1024;
    random_requests(&fixture, 77, 200);
    teardown(&fixture);
}

static void holes_and_unwritten_extents_read_as_zeroes_without_io(void **state)
{
    struct fixture fixture = setup(state, 1);
    uint64_t seed = 3;

    odd.extent_bytes = 1024;
    odd.has_holes = true;
    memset(mem.disk, 0x5a, sizeof(mem.disk));
    for (unsigned i = 0; i < 200; i++) {
        uint64_t offset = unit_random(&seed) % DISK_BYTES, len = 1 + unit_random(&seed) % 8000;
        struct fixture_rq frq;

        len = min_of(len, DISK_BYTES - offset);
        memset(buf, 0x11, len);
        fixture_rq_init(&frq, REQ_OP_READ, 0, offset, buf, len);
        split_at_random(&frq, buf, len, &seed);
        fixture_submit(&fixture.dev->queues[0], &frq);
        assert_int_equal(fixture_wait(&frq), 0);
        for (uint64_t j = 0; j < len; j++)
            assert_int_equal(buf[j], odd_state((offset + j) / 1024) == EXTENT_MAPPED ? 0x5a : 0);
    }
    // One that lies in a hole altogether asks nobody.
    atomic_store(&mem.nr_steps, 0);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 1024, buf, 2048), 0);
    assert_int_equal(atomic_load(&mem.nr_steps), 0);
    teardown(&fixture);
}

static void a_read_past_the_end_of_the_file_gives_zeroes(void **state)
{
    struct fixture fixture = setup(state, 1);

    mem.end_bytes = 200001; // the device's halves change places
    memset(mem.disk, 0x5a, sizeof(mem.disk));
    memset(buf, 0x11, sizeof(buf));
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, buf, DISK_BYTES), 0);
    for (uint64_t i = 0; i < DISK_BYTES; i++)
        assert_int_equal(buf[i], odd_place(i) < mem.end_bytes ? 0x5a : 0);
    teardown(&fixture);
}

static void a_write_that_moves_nothing_is_an_error(void **state)
{
    struct fixture fixture = setup(state, 1);

    mem.end_bytes = 5000;
    odd.extent_bytes = DISK_BYTES / 2;
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 10000), -EIO);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, DISK_BYTES / 2, buf, 5000), 0);
    teardown(&fixture);
}

static void an_error_ends_the_request_also_when_part_of_it_was_done(void **state)
{
    struct fixture fixture = setup(state, 1);
    struct queue_stats sum;

    mem.max_bytes = 1000;
    mem.fail_after_steps = 3;
    mem.error = -ENOSPC;
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 10000), -ENOSPC);
    assert_int_equal(atomic_load(&mem.nr_steps), 4);
    odd.error = -EUCLEAN;
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, buf, 10), -EUCLEAN);
    odd.error = 0;
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 10000), 0);
    stats_sum(fixture.dev, &sum);
    assert_int_equal(sum.op[REQ_OP_WRITE].nr_done, 2);
    assert_int_equal(sum.op[REQ_OP_WRITE].nr_errors, 1);
    assert_int_equal(sum.op[REQ_OP_WRITE].nr_bytes, 10000);
    assert_int_equal(sum.op[REQ_OP_READ].nr_errors, 1);
    assert_int_equal(sum.nr_inflight, 0);
    teardown(&fixture);
}

static void what_the_door_refuses_does_not_reach_the_io(void **state)
{
    struct fixture fixture = setup(state, 1);

    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, DISK_BYTES, buf, 1), -EINVAL);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, DISK_BYTES - 1, buf, 2), -ENOSPC);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_DISCARD, 0, UINT64_MAX, NULL, 2), -EINVAL);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, DISK_BYTES, NULL, 0), 0);
    assert_int_equal(atomic_load(&mem.nr_steps), 0);
    teardown(&fixture);
}

static void a_flush_that_failed_fails_for_ever(void **state)
{
    struct fixture fixture = setup(state, 2);

    assert_int_equal(fixture_do(fixture.dev, REQ_OP_FLUSH, 0, 0, NULL, 0), 0);
    mem.flush_result = -EIO;
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_FLUSH, 0, 0, NULL, 0), -EIO);
    mem.flush_result = 0;
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_FLUSH, 0, 0, NULL, 0), -EIO);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 100), 0); // writes go on
    mem.flush_result = -ENOSPC;
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_FLUSH, 0, 0, NULL, 0), -EIO); // the first one stays
    teardown(&fixture);
}

// ---- Freezes

struct test_freeze {
    struct freeze freeze;
    struct device *dev;
    sem_t sem;
    int nr_frozen, nr_busy;
    unsigned order;
};

static atomic_uint nr_freezes;

static void look(struct test_freeze *test)
{
    test->nr_frozen++;
    test->order = atomic_fetch_add(&nr_freezes, 1);
    test->nr_busy = atomic_load(&mem.nr_inside);
}

static void look_at_frozen(struct freeze *freeze)
{
    struct test_freeze *test = container_of(freeze, struct test_freeze, freeze);

    look(test);
    sem_post(&test->sem);
}

static void freeze_init(struct test_freeze *test, struct device *dev)
{
    *test = (struct test_freeze){.freeze.frozen = look_at_frozen, .dev = dev};
    sem_init(&test->sem, 0, 0);
}

static void freeze_wait(struct test_freeze *test)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    assert_int_equal(sem_timedwait(&test->sem, &until), 0);
    assert_int_equal(test->nr_frozen, 1);
    assert_int_equal(test->nr_busy, 0);
}

static void nothing(void *arg)
{
    (void)arg;
}

static void what_comes_while_frozen_is_held_and_done_afterwards(void **state)
{
    struct fixture fixture = setup(state, 2);
    struct fixture_rq frqs[20], beyond;
    struct test_freeze freeze;

    freeze_init(&freeze, fixture.dev);
    device_freeze(fixture.dev, &freeze.freeze);
    freeze_wait(&freeze);
    fixture_rq_init(&beyond, REQ_OP_READ, 0, DISK_BYTES, buf, 1);
    fixture_submit(&fixture.dev->queues[0], &beyond);
    for (unsigned i = 0; i < 20; i++) {
        enum req_op op = i % 4 == 3 ? REQ_OP_FLUSH : i % 4 == 2 ? REQ_OP_DISCARD : REQ_OP_WRITE;

        fixture_rq_init(&frqs[i], op, 0, op == REQ_OP_FLUSH ? 0 : i * 100, op == REQ_OP_WRITE ? buf : NULL,
                        op == REQ_OP_FLUSH ? 0 : 100);
        fixture_submit(&fixture.dev->queues[i % 2], &frqs[i]);
    }
    for (unsigned q = 0; q < 2; q++)
        fixture_on_queue(&fixture.dev->queues[q], nothing, NULL); // they have come by now
    for (unsigned i = 0; i < 20; i++)
        assert_int_equal(atomic_load(&frqs[i].nr_done), 0);
    assert_int_equal(atomic_load(&mem.nr_steps), 0);
    assert_int_equal(atomic_load(&beyond.nr_done), 0); // its end may be another one afterwards
    device_unfreeze(fixture.dev);
    assert_int_equal(fixture_wait(&beyond), -EINVAL);
    for (unsigned i = 0; i < 20; i++)
        assert_int_equal(fixture_wait(&frqs[i]), 0);
    teardown(&fixture);
}

static void freezes_are_done_one_after_the_other_in_order(void **state)
{
    struct fixture fixture = setup(state, 3);
    struct test_freeze freezes[5];

    atomic_store(&nr_freezes, 0);
    for (unsigned i = 0; i < 5; i++) {
        freeze_init(&freezes[i], fixture.dev);
        device_freeze(fixture.dev, &freezes[i].freeze);
    }
    for (unsigned i = 0; i < 5; i++) {
        freeze_wait(&freezes[i]);
        for (unsigned q = 0; q < 3; q++)
            fixture_on_queue(&fixture.dev->queues[q], nothing, NULL);
        assert_int_equal(atomic_load(&nr_freezes), i + 1); // the next one waits for the end of this
        assert_int_equal(freezes[i].order, i);
        device_unfreeze(fixture.dev);
    }
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, buf, 100), 0);
    teardown(&fixture);
}

static void unfreeze_at_once(struct freeze *freeze)
{
    struct test_freeze *test = container_of(freeze, struct test_freeze, freeze);

    look(test);
    device_unfreeze(test->dev); // from inside
    sem_post(&test->sem);
}

#define NR_LOADS 48

static atomic_bool is_load_over;
static atomic_uint nr_load_done;

static bool submit_again(struct fixture_rq *frq)
{
    atomic_fetch_add(&nr_load_done, 1);
    if (atomic_load(&is_load_over))
        return false;
    frq->iov[0] = (struct iovec){buf + (frq->rq.offset_bytes & 0xffff), 512};
    frq->rq.iov = frq->iov;
    frq->rq.nr_iov = 1;
    queue_submit(frq->queue, &frq->rq);
    return true;
}

static void under_load_nothing_is_in_flight_while_frozen(void **state)
{
    struct fixture fixture = setup(state, 3);
    static struct fixture_rq frqs[NR_LOADS];

    atomic_store(&is_load_over, false);
    atomic_store(&nr_load_done, 0);
    mem.max_bytes = 300;
    for (unsigned i = 0; i < NR_LOADS; i++) {
        fixture_rq_init(&frqs[i], REQ_OP_WRITE, 0, i * 4096, buf + (i * 4096 & 0xffff), 512);
        frqs[i].again = submit_again;
        fixture_submit(&fixture.dev->queues[i % 3], &frqs[i]);
    }
    for (unsigned i = 0; i < 200; i++) {
        struct test_freeze freeze;
        unsigned nr_done = atomic_load(&nr_load_done), nr_steps;

        freeze_init(&freeze, fixture.dev);
        if (i % 2)
            freeze.freeze.frozen = unfreeze_at_once;
        device_freeze(fixture.dev, &freeze.freeze);
        freeze_wait(&freeze);
        if (!(i % 2)) {
            nr_steps = (unsigned)atomic_load(&mem.nr_steps);
            for (unsigned q = 0; q < 3; q++)
                fixture_on_queue(&fixture.dev->queues[q], nothing, NULL);
            assert_int_equal(atomic_load(&mem.nr_inside), 0);
            assert_int_equal(atomic_load(&mem.nr_steps), nr_steps);
            device_unfreeze(fixture.dev);
        }
        while (atomic_load(&nr_load_done) == nr_done) // work goes on between two freezes
            nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
    }
    atomic_store(&is_load_over, true);
    for (unsigned i = 0; i < NR_LOADS; i++) {
        assert_int_equal(fixture_wait(&frqs[i]), 0);
    }
    teardown(&fixture);
}

static void a_request_that_an_io_gives_back_begins_again_after_a_freeze(void **state)
{
    struct fixture fixture = setup(state, 1);
    struct test_freeze freeze;
    struct fixture_rq frq;

    fill(buf, 9000, 4);
    mem.max_bytes = 700;
    odd.extent_bytes = 2000;
    fixture_rq_init(&frq, REQ_OP_WRITE, 0, 0, buf, 9000);
    mem.holds_once = true;
    fixture_submit(&fixture.dev->queues[0], &frq);
    fixture_on_queue(&fixture.dev->queues[0], nothing, NULL);
    assert_int_equal(atomic_load(&mem.nr_steps), 1);
    freeze_init(&freeze, fixture.dev);
    device_freeze(fixture.dev, &freeze.freeze);
    freeze_wait(&freeze); // what is held does not keep it
    assert_int_equal(atomic_load(&frq.nr_done), 0);
    device_unfreeze(fixture.dev);
    assert_int_equal(fixture_wait(&frq), 0);
    for (uint64_t i = 0; i < 9000; i++)
        assert_int_equal(mem.disk[odd_place(i)], buf[i]);
    teardown(&fixture);
}

// ---- Beginning and end

static void a_device_that_stops_finishes_what_is_in_flight(void **state)
{
    struct fixture fixture = setup(state, 2);
    struct fixture_rq frqs[40];

    mem.delay_ns = 10000000;
    for (unsigned i = 0; i < 40; i++) {
        fixture_rq_init(&frqs[i], REQ_OP_WRITE, 0, i * 1000, buf, 1000);
        fixture_submit(&fixture.dev->queues[i % 2], &frqs[i]);
    }
    teardown(&fixture);
    for (unsigned i = 0; i < 40; i++)
        assert_int_equal(fixture_wait(&frqs[i]), 0);
}

static void queues_are_picked_in_turn(void **state)
{
    struct fixture fixture = setup(state, 3);

    for (unsigned i = 0; i < 9; i++)
        assert_ptr_equal(device_pick_queue(fixture.dev), &fixture.dev->queues[i % 3]);
    teardown(&fixture);
}

static void a_failed_start_says_why_and_leaves_nothing(void **state)
{
    static const struct {
        const char *path, *io, *map, *says;
    } tries[] = {
        {NULL, "nothing", "linear", "--io: nothing: no such io"},
        {NULL, "", "linear", "no such io"},
        {NULL, "null:x", "linear", "takes no"},
        {NULL, "buffered:x", "linear", "takes no"},
        {NULL, "fault:x", "linear", "fault: x: not understood"},
        {NULL, "null", "circular", "--map: circular"},
        {"/nonexistent/disk", "null", "linear", "/nonexistent/disk"},
        {"/", "null", "linear", "directory"},
        {"/dev/null", "null", "linear", "/dev/null"},
    };
    char dir[64], path[80];

    fixture_make_dir(dir);
    snprintf(path, sizeof(path), "%s/disk", dir);
    fixture_make_file(path, 4096);
    for (unsigned round = 0; round < 2; round++) { // a lock left behind would be seen
        for (unsigned i = 0; i < ARRAY_SIZE(tries); i++) {
            struct device_options options = {.name = "disk",
                                             .io = tries[i].io,
                                             .map = tries[i].map,
                                             .ring = ring_ops_of(state),
                                             .nr_queues = 1,
                                             .depth = 1};
            struct device *dev;
            struct err err = {""};

            assert_true(device_create(&dev, tries[i].path ? tries[i].path : path, &options, &err) < 0);
            assert_non_null(strstr(err.line, tries[i].says));
            assert_null(strchr(err.line, '\n'));
        }
    }
    unlink(path);
    rmdir(dir);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_that_cross_extents_are_split_and_put_where_the_map_says),
        cmocka_unit_test(short_reads_and_writes_are_continued),
        cmocka_unit_test(short_io_and_many_extents_go_together),
        cmocka_unit_test(holes_and_unwritten_extents_read_as_zeroes_without_io),
        cmocka_unit_test(a_read_past_the_end_of_the_file_gives_zeroes),
        cmocka_unit_test(a_write_that_moves_nothing_is_an_error),
        cmocka_unit_test(an_error_ends_the_request_also_when_part_of_it_was_done),
        cmocka_unit_test(what_the_door_refuses_does_not_reach_the_io),
        cmocka_unit_test(a_flush_that_failed_fails_for_ever),
        cmocka_unit_test(what_comes_while_frozen_is_held_and_done_afterwards),
        cmocka_unit_test(freezes_are_done_one_after_the_other_in_order),
        cmocka_unit_test(under_load_nothing_is_in_flight_while_frozen),
        cmocka_unit_test(a_request_that_an_io_gives_back_begins_again_after_a_freeze),
        cmocka_unit_test(a_device_that_stops_finishes_what_is_in_flight),
        cmocka_unit_test(queues_are_picked_in_turn),
        cmocka_unit_test(a_failed_start_says_why_and_leaves_nothing),
    };

    return run_on_both_rings(tests);
}
