// Neighbours in one batch: what becomes one operation, and whom its result belongs to.
#include "fixture.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/io.h"
#include "io/plug.h"
#include "util/util.h"

#define LEN 4096
#define NR 200
#define SIZE ((uint64_t)NR * LEN)

static struct fixture_rq frqs[NR];
static char bufs[NR][LEN];
static unsigned nr_rqs, nr_issued, max_bytes, failing_block;
static uint64_t longest_bytes;
static struct rq *waiting[NR]; // issued, not done yet
static bool is_waiting;

// An operation of a disk in memory: no more than max_bytes, and failing_block cannot be touched.
static char disk[SIZE];

static void finish(struct ring_op *op)
{
    uint64_t at = op->rw.offset_bytes, done = 0;

    for (unsigned i = 0; i < op->rw.nr_iov && done < max_bytes; i++) {
        size_t n = min_of(op->rw.iov[i].iov_len, max_bytes - done);

        if (op->code == RING_READ)
            memcpy(op->rw.iov[i].iov_base, disk + at + done, n);
        else
            memcpy(disk + at + done, op->rw.iov[i].iov_base, n);
        done += n;
    }
    op->done(op, at / LEN <= failing_block && (at + done - 1) / LEN >= failing_block ? -EIO : (int)done);
}

static void issue(struct rq *rq)
{
    longest_bytes = max_of(longest_bytes, plug_bytes(rq));
    if (is_waiting)
        waiting[nr_issued++] = rq;
    else {
        nr_issued++;
        finish(&rq->ring_op);
    }
}

static void plug_io_rw(struct io *io, struct rq *rq)
{
    (void)io;
    plug_rw(rq, issue);
}

static const struct io_ops plug_io_ops = {.name = "plug", .is_stored = true, .rw = plug_io_rw};
static struct io plug_io = {.ops = &plug_io_ops}, *real_io;

static void submit_all(void *arg)
{
    struct queue *queue = arg;

    for (unsigned i = 0; i < nr_rqs; i++) {
        frqs[i].queue = queue;
        queue_submit(queue, &frqs[i].rq);
    }
    queue_unplug(queue);
    for (unsigned i = 0; is_waiting && i < nr_issued; i++)
        finish(&waiting[i]->ring_op);
}

static struct fixture prepare(void **state)
{
    struct fixture fixture = fixture_create(
        &(struct fixture_options){.ring = ring_ops_of(state), .io = "buffered", .size_bytes = SIZE});

    real_io = fixture.dev->io;
    plug_io.dev = fixture.dev;
    fixture.dev->io = &plug_io;
    nr_rqs = nr_issued = 0;
    max_bytes = SIZE;
    failing_block = NR;
    longest_bytes = 0;
    is_waiting = false;
    for (unsigned i = 0; i < SIZE; i++)
        disk[i] = (char)(i / LEN * 7 + i % 251);
    memset(bufs, 0, sizeof(bufs));
    return fixture;
}

static void end(struct fixture *fixture)
{
    fixture->dev->io = real_io;
    assert_int_equal(fixture_destroy(fixture), 0);
}

static void add(enum req_op op, unsigned flags, unsigned block)
{
    fixture_rq_init(&frqs[nr_rqs], op, flags, (uint64_t)block * LEN, bufs[nr_rqs], LEN);
    nr_rqs++;
}

static void run(struct fixture *fixture)
{
    fixture_on_queue(&fixture->dev->queues[0], submit_all, &fixture->dev->queues[0]);
}

static void check_read(unsigned i, unsigned block)
{
    assert_int_equal(fixture_wait(&frqs[i]), 0);
    assert_memory_equal(bufs[i], disk + (uint64_t)block * LEN, LEN);
}

static void neighbours_are_one_operation(void **state)
{
    struct fixture fixture = prepare(state);

    for (unsigned i = 0; i < 10; i++)
        add(REQ_OP_READ, 0, i + 3);
    run(&fixture);
    for (unsigned i = 0; i < 10; i++)
        check_read(i, i + 3);
    assert_int_equal(nr_issued, 1);
    end(&fixture);
}

static void a_chain_has_a_bound(void **state)
{
    struct fixture fixture = prepare(state);

    for (unsigned i = 0; i < NR; i++)
        add(REQ_OP_READ, 0, i);
    run(&fixture);
    for (unsigned i = 0; i < NR; i++)
        check_read(i, i);
    assert_int_equal(longest_bytes, PLUG_MAX_BYTES);
    assert_int_equal(nr_issued, (SIZE + PLUG_MAX_BYTES - 1) / PLUG_MAX_BYTES);
    end(&fixture);
}

static void what_is_no_neighbour_stands_alone(void **state)
{
    struct fixture fixture = prepare(state);

    add(REQ_OP_READ, 0, 1);
    add(REQ_OP_READ, 0, 3);       // a gap
    add(REQ_OP_READ, 0, 2);       // backwards
    add(REQ_OP_WRITE, 0, 3);      // another operation
    add(REQ_OP_WRITE, RQ_FUA, 4); // durable, the one before is not
    add(REQ_OP_WRITE, RQ_FUA, 5);
    run(&fixture);
    for (unsigned i = 0; i < nr_rqs; i++)
        assert_int_equal(fixture_wait(&frqs[i]), 0);
    assert_int_equal(nr_issued, nr_rqs);
    end(&fixture);
}

static void a_short_result_goes_to_the_first_and_the_rest_goes_on(void **state)
{
    struct fixture fixture = prepare(state);

    for (unsigned op = REQ_OP_READ; op <= REQ_OP_WRITE; op++) {
        for (max_bytes = LEN / 2; max_bytes <= 3 * LEN; max_bytes += LEN / 2) {
            nr_rqs = 0;
            for (unsigned i = 0; i < 8; i++) {
                add(op, 0, i);
                memset(bufs[i], (int)(op * 100 + i), LEN);
            }
            run(&fixture);
            for (unsigned i = 0; i < 8; i++)
                check_read(i, i); // for writes: the disk has what the buffer has
        }
    }
    end(&fixture);
}

// What is issued to make room may come back into the plug at once.
static void a_short_result_of_what_is_no_neighbour_is_not_lost(void **state)
{
    struct fixture fixture = prepare(state);

    max_bytes = LEN / 2;
    for (unsigned i = 0; i < 20; i++)
        add(REQ_OP_READ, 0, 2 * i);
    run(&fixture);
    for (unsigned i = 0; i < 20; i++)
        check_read(i, 2 * i);
    end(&fixture);
}

static void an_error_is_told_to_the_request_that_has_it(void **state)
{
    struct fixture fixture = prepare(state);

    failing_block = 5;
    for (unsigned i = 0; i < 8; i++)
        add(REQ_OP_READ, 0, i);
    run(&fixture);
    for (unsigned i = 0; i < 8; i++) {
        if (i == failing_block)
            assert_int_equal(fixture_wait(&frqs[i]), -EIO);
        else
            check_read(i, i);
    }
    end(&fixture);
}

static void more_chains_in_flight_than_there_is_room_for(void **state)
{
    struct fixture fixture = prepare(state);
    unsigned nr_chains = PLUG_NR_IOVS + 5;

    is_waiting = true;
    for (unsigned i = 0; i < nr_chains; i++) {
        add(REQ_OP_READ, 0, 4 * i);
        add(REQ_OP_READ, 0, 4 * i + 1);
    }
    run(&fixture);
    for (unsigned i = 0; i < nr_chains; i++) {
        check_read(2 * i, 4 * i);
        check_read(2 * i + 1, 4 * i + 1);
    }
    assert_int_equal(nr_issued, PLUG_NR_IOVS + 2 * 5);
    end(&fixture);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(neighbours_are_one_operation),
        cmocka_unit_test(a_chain_has_a_bound),
        cmocka_unit_test(what_is_no_neighbour_stands_alone),
        cmocka_unit_test(a_short_result_goes_to_the_first_and_the_rest_goes_on),
        cmocka_unit_test(a_short_result_of_what_is_no_neighbour_is_not_lost),
        cmocka_unit_test(an_error_is_told_to_the_request_that_has_it),
        cmocka_unit_test(more_chains_in_flight_than_there_is_room_for),
    };

    return run_on_both_rings(tests);
}
