// One writer for one file: order within a queue, and all of many queues' requests.
#include "fixture.h"

#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/io.h"
#include "io/writer.h"

// Writes of one queue to the same place: the last one stays, whatever happens in between.
#define NR_QUEUES 3
#define NR_WRITES 400
#define LEN 512

static struct fixture_rq frqs[NR_QUEUES][NR_WRITES];
static char bufs[NR_QUEUES][NR_WRITES][LEN];
static unsigned nr_done[NR_QUEUES], nr_out_of_order;

static bool note_order(struct fixture_rq *frq)
{
    unsigned queue = frq->queue->index, number = (unsigned)(frq - frqs[queue]);

    if (nr_done[queue]++ != number)
        __atomic_fetch_add(&nr_out_of_order, 1, __ATOMIC_RELAXED);
    return false;
}

static struct writer writer;

static void written(struct ring_op *op, int res)
{
    rq_part_done(container_of(op, struct rq, ring_op), res);
}

static void writer_rw(struct io *io, struct rq *rq)
{
    (void)io;
    io_prep_rw(rq, written);
    writer_queue(&writer, rq);
}

static const struct io_ops writer_ops = {.name = "writer", .is_stored = true, .rw = writer_rw};

static void submit_all(void *arg)
{
    struct queue *queue = arg;

    for (unsigned i = 0; i < NR_WRITES; i++) {
        frqs[queue->index][i].queue = queue;
        queue_submit(queue, &frqs[queue->index][i].rq);
    }
}

// Queue 0 has the writer's place while it submits: nothing of it, and nothing of others, is written
// meanwhile.
static void submit_all_within(void *arg)
{
    struct queue *queue = arg;
    char check[LEN], zeroes[LEN] = {0};

    if (queue->index) {
        submit_all(arg);
        return;
    }
    while (!writer_try_begin(&writer)) // another queue's are being written
        sched_yield();
    assert_false(writer_try_begin(&writer));
    submit_all(arg);
    usleep(10000);
    assert_int_equal(pread(queue->dev->image->fd, check, LEN, 0), LEN);
    assert_memory_equal(check, zeroes, LEN);
    writer_end(&writer, queue);
}

static struct fixture prepare(void **state, const char *io)
{
    struct fixture fixture = fixture_create(&(struct fixture_options){
        .ring = ring_ops_of(state), .io = io, .size_bytes = 64 * KiB, .nr_queues = NR_QUEUES});

    memset(nr_done, 0, sizeof(nr_done));
    nr_out_of_order = 0;
    for (unsigned q = 0; q < NR_QUEUES; q++) {
        for (unsigned i = 0; i < NR_WRITES; i++) {
            memset(bufs[q][i], (int)(i & 0xff), LEN);
            memcpy(bufs[q][i], &i, sizeof(i));
            fixture_rq_init(&frqs[q][i], REQ_OP_WRITE, 0, q * 4096, bufs[q][i], LEN);
            frqs[q][i].again = note_order;
        }
    }
    return fixture;
}

static void wait_and_check(struct fixture *fixture)
{
    char check[LEN];

    for (unsigned q = 0; q < NR_QUEUES; q++) {
        for (unsigned i = 0; i < NR_WRITES; i++)
            assert_int_equal(fixture_wait(&frqs[q][i]), 0);
        assert_int_equal(fixture_do(fixture->dev, REQ_OP_READ, 0, q * 4096, check, LEN), 0);
        assert_memory_equal(check, bufs[q][NR_WRITES - 1], LEN);
    }
}

static void writes_of_a_queue_are_written_in_order(void **state)
{
    struct fixture fixture = prepare(state, "null");
    struct io io = {.ops = &writer_ops, .dev = fixture.dev}, *real = fixture.dev->io;
    int fd = open(fixture.path, O_RDONLY);
    char check[LEN];

    writer_init(&writer);
    fixture.dev->io = &io;
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned q = 0; q < NR_QUEUES; q++)
            fixture_on_queue(&fixture.dev->queues[q], round ? submit_all : submit_all_within,
                             &fixture.dev->queues[q]);
        for (unsigned q = 0; q < NR_QUEUES; q++) {
            for (unsigned i = 0; i < NR_WRITES; i++)
                assert_int_equal(fixture_wait(&frqs[q][i]), 0);
            assert_int_equal(pread(fd, check, LEN, q * 4096), LEN);
            assert_memory_equal(check, bufs[q][NR_WRITES - 1], LEN);
            nr_done[q] = 0;
            for (unsigned i = 0; i < NR_WRITES; i++) {
                fixture_rq_init(&frqs[q][i], REQ_OP_WRITE, 0, q * 4096, bufs[q][i], LEN);
                frqs[q][i].again = note_order;
            }
        }
    }
    assert_int_equal(nr_out_of_order, 0);
    fixture_stop(&fixture);
    assert_true(writer_try_begin(&writer));
    close(fd);
    fixture.dev->io = real;
    fixture_destroy(&fixture);
}

static void buffered_writes_to_one_place_keep_their_order(void **state)
{
    struct fixture fixture = prepare(state, "buffered");

    for (unsigned q = 0; q < NR_QUEUES; q++)
        fixture_on_queue(&fixture.dev->queues[q], submit_all, &fixture.dev->queues[q]);
    wait_and_check(&fixture);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

// FUA cannot be tried without blocking, so these all queue up.
static void durable_writes_keep_their_order(void **state)
{
    struct fixture fixture = prepare(state, "buffered");

    for (unsigned q = 0; q < NR_QUEUES; q++) {
        for (unsigned i = 0; i < NR_WRITES; i += 50)
            frqs[q][i].rq.flags = RQ_FUA;
        fixture_on_queue(&fixture.dev->queues[q], submit_all, &fixture.dev->queues[q]);
    }
    wait_and_check(&fixture);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

static void the_single_threaded_loop_does_everything_in_order(void **state)
{
    struct fixture fixture = fixture_create(&(struct fixture_options){
        .ring = ring_ops_of(state), .io = "buffered", .size_bytes = 64 * KiB, .nr_workers = 1});
    static struct fixture_rq reads[50], writes[50];
    static char in[50][LEN], out[50][LEN];
    struct fixture_rq flush;

    for (unsigned i = 0; i < 50; i++) {
        memset(out[i], (int)i + 1, LEN);
        fixture_rq_init(&writes[i], REQ_OP_WRITE, 0, 0, out[i], LEN);
        fixture_rq_init(&reads[i], REQ_OP_READ, 0, 0, in[i], LEN);
        fixture_submit(&fixture.dev->queues[0], &writes[i]);
        fixture_submit(&fixture.dev->queues[0], &reads[i]);
    }
    fixture_rq_init(&flush, REQ_OP_FLUSH, 0, 0, NULL, 0);
    fixture_submit(&fixture.dev->queues[0], &flush);
    for (unsigned i = 0; i < 50; i++) {
        assert_int_equal(fixture_wait(&writes[i]), 0);
        assert_int_equal(fixture_wait(&reads[i]), 0);
        assert_memory_equal(in[i], out[i], LEN); // a read sees the write before it, and no later one
    }
    assert_int_equal(fixture_wait(&flush), 0);
    assert_int_equal(fixture_destroy(&fixture), 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(writes_of_a_queue_are_written_in_order),
        cmocka_unit_test(buffered_writes_to_one_place_keep_their_order),
        cmocka_unit_test(durable_writes_keep_their_order),
        cmocka_unit_test(the_single_threaded_loop_does_everything_in_order),
    };

    return run_on_both_rings(tests);
}
