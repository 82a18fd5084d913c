// Direct I/O: the lock over ranges, and what is not aligned.
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/bounce.h"
#include "io/direct.h"

static struct fixture setup(void **state, uint64_t size_bytes, unsigned nr_queues)
{
    struct fixture fixture = fixture_create(&(struct fixture_options){
        .ring = ring_ops_of(state), .io = "direct", .size_bytes = size_bytes, .nr_queues = nr_queues});

    if (!fixture.dev->image->is_direct) {
        fixture_destroy(&fixture);
        skip();
    }
    return fixture;
}

// ---- The lock over ranges, by itself: requests that do nothing but hold it

struct holder {
    struct rq rq;
    struct ring_op post;
    uint64_t start, end;
    bool is_exclusive;
    atomic_int nr_locked;
    atomic_uint order;
    pthread_t thread; // that was told
};

static atomic_uint nr_locked_all;

static void holder_locked(struct ring_op *op, int res)
{
    struct holder *holder = container_of(op, struct holder, rq.ring_op);

    (void)res;
    holder->thread = pthread_self();
    atomic_store(&holder->order, atomic_fetch_add(&nr_locked_all, 1));
    atomic_fetch_add(&holder->nr_locked, 1);
}

static void holder_lock(void *arg)
{
    struct holder *holder = arg;

    direct_lock(&holder->rq, holder->start, holder->end, holder->is_exclusive, holder_locked);
}

static void holder_unlock(void *arg)
{
    struct holder *holder = arg;

    direct_unlock(&holder->rq);
}

static void nothing(void *arg)
{
    (void)arg;
}

static void lock(struct device *dev, unsigned queue, struct holder *holder, uint64_t start, uint64_t end,
                 bool is_exclusive)
{
    *holder = (struct holder){.start = start, .end = end, .is_exclusive = is_exclusive};
    holder->rq.queue = &dev->queues[queue];
    fixture_on_queue(holder->rq.queue, holder_lock, holder);
}

// Until all posts that it makes have been done.
static void unlock(struct device *dev, struct holder *holder)
{
    fixture_on_queue(holder->rq.queue, holder_unlock, holder);
    for (unsigned q = 0; q < dev->nr_queues; q++)
        fixture_on_queue(&dev->queues[q], nothing, NULL);
}

static void ranges_exclude_each_other_when_they_overlap_and_one_is_exclusive(void **state)
{
    static const uint64_t ends[] = {0, 1, 10, 20, 30, 31};
    struct fixture fixture = setup(state, MiB, 2);

    for (unsigned kind = 0; kind < 4; kind++) {
        for (unsigned from = 0; from < ARRAY_SIZE(ends); from++) {
            for (unsigned to = from + 1; to < ARRAY_SIZE(ends); to++) {
                bool overlaps = ends[from] < 30 && 10 < ends[to], excludes = overlaps && kind;
                struct holder first, second;

                lock(fixture.dev, 0, &first, 10, 30, kind & 1);
                lock(fixture.dev, to % 2, &second, ends[from], ends[to], kind & 2);
                assert_int_equal(atomic_load(&first.nr_locked), 1);
                assert_int_equal(atomic_load(&second.nr_locked), excludes ? 0 : 1);
                unlock(fixture.dev, &first);
                assert_int_equal(atomic_load(&second.nr_locked), 1);
                unlock(fixture.dev, &second);
            }
        }
    }
    fixture_destroy(&fixture);
}

static void who_waits_is_told_on_its_own_queue(void **state)
{
    struct fixture fixture = setup(state, MiB, 3);
    struct holder holders[3];

    for (unsigned i = 0; i < 3; i++)
        lock(fixture.dev, i, &holders[i], 0, 4096, true);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(atomic_load(&holders[i].nr_locked), 1);
        assert_true(pthread_equal(holders[i].thread, fixture.dev->queues[i].thread));
        unlock(fixture.dev, &holders[i]);
    }
    fixture_destroy(&fixture);
}

static void who_waits_is_not_overtaken(void **state)
{
    struct fixture fixture = setup(state, MiB, 1);
    struct holder a, b, c, d;

    lock(fixture.dev, 0, &a, 0, 4096, false);
    lock(fixture.dev, 0, &b, 0, 8192, true);     // waits for a
    lock(fixture.dev, 0, &c, 0, 4096, false);    // would go with a, but b was first
    lock(fixture.dev, 0, &d, 8192, 9000, false); // is nobody's concern
    assert_int_equal(atomic_load(&b.nr_locked), 0);
    assert_int_equal(atomic_load(&c.nr_locked), 0);
    assert_int_equal(atomic_load(&d.nr_locked), 1);
    unlock(fixture.dev, &a);
    assert_int_equal(atomic_load(&b.nr_locked), 1);
    assert_int_equal(atomic_load(&c.nr_locked), 0);
    unlock(fixture.dev, &b);
    assert_int_equal(atomic_load(&c.nr_locked), 1);
    unlock(fixture.dev, &c);
    unlock(fixture.dev, &d);
    fixture_destroy(&fixture);
}

static void one_unlock_lets_all_go_on_who_can(void **state)
{
    struct fixture fixture = setup(state, MiB, 2);
    struct holder all, parts[6], again;

    lock(fixture.dev, 0, &all, 0, 60, true);
    for (unsigned i = 0; i < 6; i++)
        lock(fixture.dev, i % 2, &parts[i], i * 10, i * 10 + 10, i % 3);
    lock(fixture.dev, 0, &again, 0, 60, true);
    unlock(fixture.dev, &all);
    for (unsigned i = 0; i < 6; i++)
        assert_int_equal(atomic_load(&parts[i].nr_locked), 1);
    for (unsigned i = 0; i < 6; i++) {
        assert_int_equal(atomic_load(&again.nr_locked), 0);
        unlock(fixture.dev, &parts[i]);
    }
    assert_int_equal(atomic_load(&again.nr_locked), 1);
    unlock(fixture.dev, &again);
    fixture_destroy(&fixture);
}

// Many at once: readers and writers of cells; an exclusive holder of a cell is alone in it.
#define NR_CELLS 8
#define NR_ROUNDS 400

struct user {
    struct rq rq;
    struct ring_op post;
    uint64_t seed;
    unsigned nr_rounds;
    atomic_bool is_over;
};

static struct {
    atomic_int nr_shared, nr_exclusive;
} cells[NR_CELLS];
static atomic_uint nr_clashes;

static void user_go(struct user *user);

static void user_leave(struct ring_op *op, int res)
{
    struct user *user = container_of(op, struct user, post);

    (void)res;
    for (uint64_t i = user->rq.lock.start; i < user->rq.lock.end; i++)
        atomic_fetch_sub(user->rq.lock.is_exclusive ? &cells[i].nr_exclusive : &cells[i].nr_shared, 1);
    direct_unlock(&user->rq);
    user_go(user);
}

static void user_locked(struct ring_op *op, int res)
{
    struct user *user = container_of(op, struct user, rq.ring_op);

    (void)res;
    for (uint64_t i = user->rq.lock.start; i < user->rq.lock.end; i++) {
        bool is_exclusive = user->rq.lock.is_exclusive;
        int nr_same = atomic_fetch_add(is_exclusive ? &cells[i].nr_exclusive : &cells[i].nr_shared, 1);

        if (atomic_load(is_exclusive ? &cells[i].nr_shared : &cells[i].nr_exclusive) ||
            (is_exclusive && nr_same))
            atomic_fetch_add(&nr_clashes, 1);
    }
    user->post.done = user_leave;
    ring_post(user->rq.queue->ring, &user->post, 0); // holds it for a while
}

static void user_go(struct user *user)
{
    uint64_t start = unit_random(&user->seed) % NR_CELLS, len = 1 + unit_random(&user->seed) % 3;

    if (!user->nr_rounds--) {
        atomic_store(&user->is_over, true);
        return;
    }
    direct_lock(&user->rq, start, min_of(start + len, NR_CELLS), unit_random(&user->seed) % 2, user_locked);
}

static void user_start(void *arg)
{
    user_go(arg);
}

static void many_on_all_queues_never_clash_and_all_come_to_an_end(void **state)
{
    struct fixture fixture = setup(state, MiB, 3);
    static struct user users[24];

    atomic_store(&nr_clashes, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(users); i++) {
        users[i] = (struct user){.rq = {.queue = &fixture.dev->queues[i % 3]},
                                 .seed = i + 1,
                                 .nr_rounds = NR_ROUNDS};
        fixture_on_queue(users[i].rq.queue, user_start, &users[i]);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(users); i++) {
        unsigned nr_waits = 0;

        while (!atomic_load(&users[i].is_over)) {
            usleep(1000);
            assert_true(++nr_waits < 60000);
        }
    }
    assert_int_equal(atomic_load(&nr_clashes), 0);
    fixture_destroy(&fixture);
}

// D2: no write takes its range as long as none is unaligned; from then on every one does.
static void aligned_writes_take_their_range_once_there_was_an_unaligned_one(void **state)
{
    struct fixture fixture = setup(state, MiB, 2);
    const struct direct *direct = container_of(fixture.dev->io, struct direct, io);
    char *buf = aligned_alloc(4096, 4096);
    struct fixture_rq frq;
    struct holder holder;

    memset(buf, 1, 4096);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 4096, buf, 4096), 0);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 1, buf, 100), 0);
    assert_false(direct->is_locking);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 1, buf, 100), 0);
    assert_true(direct->is_locking);
    lock(fixture.dev, 1, &holder, 0, 8192, true);
    fixture_rq_init(&frq, REQ_OP_WRITE, 0, 4096, buf, 4096);
    fixture_submit(&fixture.dev->queues[0], &frq);
    usleep(20000);
    assert_int_equal(atomic_load(&frq.nr_done), 0);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 8192, buf, 4096), 0); // elsewhere
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, buf, 4096), 0);     // reads exclude nobody
    unlock(fixture.dev, &holder);
    assert_int_equal(fixture_wait(&frq), 0);
    free(buf);
    fixture_destroy(&fixture);
}

// ---- Reads and writes at any offset

static uint64_t file_size(const char *path)
{
    struct stat st;

    assert_int_equal(stat(path, &st), 0);
    return (uint64_t)st.st_size;
}

static void random_io(void **state, uint64_t size, uint64_t seed, unsigned nr_rounds, uint64_t max_len)
{
    struct fixture fixture = setup(state, size, 2);
    char *shadow = calloc(1, size), *raw = aligned_alloc(4096, (max_len + 8192) / 4096 * 4096);
    char *check = malloc(size);
    int fd;

    for (unsigned i = 0; i < nr_rounds; i++) {
        uint64_t offset = unit_random(&seed) % size, len = 1 + unit_random(&seed) % max_len,
                 kind = unit_random(&seed) % 8;
        char *buf = raw + (kind & 1 ? unit_random(&seed) % 4096 : 0);
        struct fixture_rq frq;

        if (kind & 2) // some are aligned
            offset = round_down(offset, 4096);
        len = min_of(len, size - offset);
        if (kind & 2 && len > 4096)
            len = round_down(len, 4096);
        if (kind == 7) {
            fixture_rq_init(&frq, REQ_OP_WRITE_ZEROES, 0, offset, NULL, len);
            memset(shadow + offset, 0, len);
        } else if (kind >= 3) {
            for (uint64_t j = 0; j < len; j++)
                shadow[offset + j] = buf[j] = (char)unit_random(&seed);
            fixture_rq_init(&frq, REQ_OP_WRITE, kind == 5 ? RQ_FUA : 0, offset, buf, len);
        } else {
            memset(buf, 0x11, len);
            fixture_rq_init(&frq, REQ_OP_READ, 0, offset, buf, len);
        }
        fixture_submit(&fixture.dev->queues[i % 2], &frq);
        assert_int_equal(fixture_wait(&frq), 0);
        if (frq.rq.op == REQ_OP_READ)
            assert_memory_equal(buf, shadow + offset, len);
        assert_int_equal(file_size(fixture.path), size); // never grows
    }
    fd = open(fixture.path, O_RDONLY);
    assert_int_equal(pread(fd, check, size, 0), size);
    close(fd);
    assert_memory_equal(check, shadow, size);
    assert_int_equal(fixture_destroy(&fixture), 0);
    free(shadow);
    free(raw);
    free(check);
}

static void unaligned_reads_and_writes_hit_the_bytes_they_name(void **state)
{
    random_io(state, 64 * KiB, 1, 300, 9000);
    random_io(state, 4 * MiB, 2, 40, 3 * MiB); // more than a scratch buffer
}

static void files_whose_size_is_no_multiple_of_the_block_never_grow(void **state)
{
    static const uint64_t sizes[] = {1, 511, 513, 4095, 4097, 20000, 65537};

    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++)
        random_io(state, sizes[i], i + 10, 60, 9000);
}

static void a_scatter_list_off_the_alignment_is_served(void **state)
{
    struct fixture fixture = setup(state, 64 * KiB, 1);
    char out[12289], in[12289];
    uint64_t seed = 9;

    for (unsigned round = 0; round < 40; round++) {
        struct fixture_rq frq;
        size_t a = 1 + unit_random(&seed) % 6000, b = 1 + unit_random(&seed) % 6000,
               offset = unit_random(&seed) % 5000;

        for (size_t i = 0; i < a + b; i++)
            out[i] = (char)unit_random(&seed);
        fixture_rq_init(&frq, REQ_OP_WRITE, 0, offset, out, a);
        frq.iov[1] = (struct iovec){out + a, b};
        frq.rq.nr_iov = 2;
        frq.rq.len_bytes = a + b;
        fixture_submit(&fixture.dev->queues[0], &frq);
        assert_int_equal(fixture_wait(&frq), 0);
        memset(in, 0, sizeof(in));
        fixture_rq_init(&frq, REQ_OP_READ, 0, offset, in, b);
        frq.iov[1] = (struct iovec){in + b, a};
        frq.rq.nr_iov = 2;
        frq.rq.len_bytes = a + b;
        fixture_submit(&fixture.dev->queues[0], &frq);
        assert_int_equal(fixture_wait(&frq), 0);
        assert_memory_equal(in, out, a + b);
    }
    fixture_destroy(&fixture);
}

static void what_a_truncated_file_lacks_reads_as_zeroes(void **state)
{
    struct fixture fixture = setup(state, 64 * KiB, 1);
    char *buf = aligned_alloc(4096, 64 * KiB);

    memset(buf, 0x77, 64 * KiB);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 64 * KiB), 0);
    assert_int_equal(truncate(fixture.path, 10001), 0);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, buf, 64 * KiB), 0);
    for (unsigned i = 0; i < 64 * KiB; i++)
        assert_int_equal(buf[i], i < 10001 ? 0x77 : 0);
    memset(buf, 0x77, 64 * KiB);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 9000, buf, 30001), 0);
    for (unsigned i = 0; i < 30001; i++)
        assert_int_equal(buf[i], i < 1001 ? 0x77 : 0);
    free(buf);
    fixture_destroy(&fixture);
}

// D1: every writer has bytes of its own, all of them in the same blocks, aligned writers among them.
#define NR_NEIGHBOURS 16
#define NEIGHBOUR_BYTES 64

static char neighbour_bufs[NR_NEIGHBOURS][NEIGHBOUR_BYTES];
static atomic_uint nr_neighbour_rounds;

static bool neighbour_again(struct fixture_rq *frq)
{
    if (atomic_fetch_add(&nr_neighbour_rounds, 1) > 1500)
        return false;
    frq->iov[0] = (struct iovec){neighbour_bufs[frq->rq.tag], NEIGHBOUR_BYTES};
    memset(neighbour_bufs[frq->rq.tag], (int)(atomic_load(&nr_neighbour_rounds) & 0xff), NEIGHBOUR_BYTES);
    frq->rq.iov = frq->iov;
    frq->rq.nr_iov = 1;
    queue_submit(frq->queue, &frq->rq);
    return true;
}

static void no_neighbours_bytes_are_lost(void **state)
{
    struct fixture fixture = setup(state, 64 * KiB, 3);
    static struct fixture_rq frqs[NR_NEIGHBOURS];
    char check[NR_NEIGHBOURS * NEIGHBOUR_BYTES];

    atomic_store(&nr_neighbour_rounds, 0);
    for (unsigned i = 0; i < NR_NEIGHBOURS; i++) {
        memset(neighbour_bufs[i], (int)i, NEIGHBOUR_BYTES);
        fixture_rq_init(&frqs[i], REQ_OP_WRITE, 0, i * NEIGHBOUR_BYTES, neighbour_bufs[i], NEIGHBOUR_BYTES);
        frqs[i].rq.tag = (uint16_t)i;
        frqs[i].again = neighbour_again;
        fixture_submit(&fixture.dev->queues[i % 3], &frqs[i]);
    }
    for (unsigned i = 0; i < NR_NEIGHBOURS; i++) {
        assert_int_equal(fixture_wait(&frqs[i]), 0);
    }
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, check, sizeof(check)), 0);
    for (unsigned i = 0; i < NR_NEIGHBOURS; i++)
        assert_memory_equal(check + i * NEIGHBOUR_BYTES, neighbour_bufs[i], NEIGHBOUR_BYTES);
    fixture_destroy(&fixture);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranges_exclude_each_other_when_they_overlap_and_one_is_exclusive),
        cmocka_unit_test(who_waits_is_told_on_its_own_queue),
        cmocka_unit_test(who_waits_is_not_overtaken),
        cmocka_unit_test(one_unlock_lets_all_go_on_who_can),
        cmocka_unit_test(many_on_all_queues_never_clash_and_all_come_to_an_end),
        cmocka_unit_test(aligned_writes_take_their_range_once_there_was_an_unaligned_one),
        cmocka_unit_test(unaligned_reads_and_writes_hit_the_bytes_they_name),
        cmocka_unit_test(files_whose_size_is_no_multiple_of_the_block_never_grow),
        cmocka_unit_test(a_scatter_list_off_the_alignment_is_served),
        cmocka_unit_test(what_a_truncated_file_lacks_reads_as_zeroes),
        cmocka_unit_test(no_neighbours_bytes_are_lost),
    };

    return run_on_both_rings(tests);
}
