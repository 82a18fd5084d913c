// BLOCK_STATUS over a map of the test's, and over the real one.
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "core/block_status.h"

// A byte for each step of the device: M(apped), H(ole), U(nwritten). Steps are answered one at a time.
#define STEP 512

static const char *layout;
static int error_at;

static int steps_extent(struct map *map, uint64_t start, uint64_t len, bool create, bool may_block,
                        struct extent *ext)
{
    uint64_t step = start / STEP;

    (void)map;
    assert_false(create);
    assert_true(may_block);
    if (error_at >= 0 && step >= (uint64_t)error_at)
        return -EIO;
    *ext = (struct extent){.start_bytes = start,
                           .len_bytes = min_of(len, (step + 1) * STEP - start),
                           .state = layout[step] == 'M'   ? EXTENT_MAPPED
                                    : layout[step] == 'H' ? EXTENT_HOLE
                                                          : EXTENT_UNWRITTEN};
    return 0;
}

static const struct map_ops steps_ops = {.name = "steps", .extent = steps_extent};

static struct extent exts[16];
static unsigned nr_exts;
static uint32_t block_bytes = 1;

static int status(uint64_t offset, uint64_t len, unsigned max, unsigned flags)
{
    struct map map = {.ops = &steps_ops};
    struct device dev = {.map = &map};
    struct queue queue = {.dev = &dev, .limits.min_block_bytes = block_bytes};
    struct iovec iov = {exts, max * sizeof(exts[0])};
    struct rq rq = {.op = REQ_OP_BLOCK_STATUS,
                    .flags = (uint8_t)flags,
                    .queue = &queue,
                    .offset_bytes = offset,
                    .len_bytes = len,
                    .iov = &iov,
                    .nr_iov = 1};
    int ret;

    memset(exts, 0xee, sizeof(exts));
    ret = block_status_work(&rq);
    nr_exts = rq.nr_extents;
    return ret;
}

static void expect(unsigned i, enum extent_state state, uint64_t start, uint64_t len)
{
    assert_true(i < nr_exts);
    assert_int_equal(exts[i].state, state);
    assert_int_equal(exts[i].start_bytes, start);
    assert_int_equal(exts[i].len_bytes, len);
}

static void neighbours_in_the_same_state_are_one_extent(void **state)
{
    (void)state;
    error_at = -1;
    layout = "MMMHHUUUUM";
    assert_int_equal(status(0, 10 * STEP, 16, 0), 0);
    assert_int_equal(nr_exts, 4);
    expect(0, EXTENT_MAPPED, 0, 3 * STEP);
    expect(1, EXTENT_HOLE, 3 * STEP, 2 * STEP);
    expect(2, EXTENT_UNWRITTEN, 5 * STEP, 4 * STEP);
    expect(3, EXTENT_MAPPED, 9 * STEP, STEP);
}

static void the_range_asked_for_is_kept_to_the_byte(void **state)
{
    (void)state;
    error_at = -1;
    layout = "MMHHMM";
    assert_int_equal(status(STEP + 1, 3 * STEP, 16, 0), 0);
    assert_int_equal(nr_exts, 3);
    expect(0, EXTENT_MAPPED, STEP + 1, STEP - 1);
    expect(1, EXTENT_HOLE, 2 * STEP, 2 * STEP);
    expect(2, EXTENT_MAPPED, 4 * STEP, 1);
    assert_int_equal(status(2 * STEP + 5, 1, 16, 0), 0);
    assert_int_equal(nr_exts, 1);
    expect(0, EXTENT_HOLE, 2 * STEP + 5, 1);
}

static void extents_are_made_of_whole_blocks(void **state)
{
    (void)state;
    error_at = -1;
    block_bytes = 4 * STEP;
    layout = "HHHHHHMMMHHHHHHHHUUUUUUUHUUUHHHH";
    assert_int_equal(status(0, 32 * STEP, 16, 0), 0);
    assert_int_equal(nr_exts, 7);
    expect(0, EXTENT_HOLE, 0, 4 * STEP);
    expect(1, EXTENT_MAPPED, 4 * STEP, 8 * STEP); // two blocks with a hole in each
    expect(2, EXTENT_HOLE, 12 * STEP, 4 * STEP);
    expect(3, EXTENT_MAPPED, 16 * STEP, 4 * STEP); // hole and unwritten
    expect(4, EXTENT_UNWRITTEN, 20 * STEP, 4 * STEP);
    expect(5, EXTENT_MAPPED, 24 * STEP, 4 * STEP);
    expect(6, EXTENT_HOLE, 28 * STEP, 4 * STEP);
    assert_int_equal(status(4 * STEP, 8 * STEP, 16, RQ_ONE_EXTENT), 0);
    assert_int_equal(nr_exts, 1);
    expect(0, EXTENT_MAPPED, 4 * STEP, 8 * STEP);
    block_bytes = 1;
}

static void one_extent_is_whole_when_only_one_is_wanted(void **state)
{
    (void)state;
    error_at = -1;
    layout = "HHHMMM";
    assert_int_equal(status(0, 6 * STEP, 16, RQ_ONE_EXTENT), 0);
    assert_int_equal(nr_exts, 1);
    expect(0, EXTENT_HOLE, 0, 3 * STEP);
}

static void no_more_are_told_than_there_is_room_for(void **state)
{
    (void)state;
    error_at = -1;
    layout = "MHMHMMMM";
    for (unsigned max = 1; max <= 6; max++) {
        assert_int_equal(status(0, 8 * STEP, max, 0), 0);
        assert_int_equal(nr_exts, min_of(max, 5));
        if (max >= 5)
            expect(4, EXTENT_MAPPED, 4 * STEP, 4 * STEP);
        expect(0, EXTENT_MAPPED, 0, STEP);
        assert_int_equal(((unsigned char *)&exts[max])[0], 0xee); // nothing behind it is touched
    }
}

static void an_error_of_the_map_is_the_answer(void **state)
{
    (void)state;
    layout = "MMMM";
    error_at = 2;
    assert_int_equal(status(0, 4 * STEP, 16, 0), -EIO);
    assert_int_equal(status(0, 2 * STEP, 16, 0), 0);
}

static void holes_of_a_file_are_told_through_a_queue(void **state)
{
    struct fixture fixture = fixture_create(
        &(struct fixture_options){.ring = ring_ops_of(state), .io = "buffered", .size_bytes = MiB});
    static char block[64 * KiB];
    uint64_t at = 0, nr_data = 0;
    struct fixture_rq frq;

    memset(block, 1, sizeof(block));
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 256 * KiB, block, sizeof(block)), 0);
    fixture_rq_init(&frq, REQ_OP_BLOCK_STATUS, 0, 0, exts, MiB);
    frq.iov[0].iov_len = sizeof(exts);
    fixture_submit(&fixture.dev->queues[0], &frq);
    assert_int_equal(fixture_wait(&frq), 0);
    nr_exts = frq.rq.nr_extents;
    for (unsigned i = 0; i < nr_exts; i++) {
        assert_int_equal(exts[i].start_bytes, at);
        at += exts[i].len_bytes;
        if (exts[i].state == EXTENT_MAPPED)
            nr_data += exts[i].len_bytes;
        else
            assert_true(at <= 256 * KiB || exts[i].start_bytes >= 320 * KiB); // never where data is
    }
    assert_int_equal(at, MiB);
    assert_true(nr_data >= sizeof(block));
    fixture_destroy(&fixture);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(neighbours_in_the_same_state_are_one_extent),
        cmocka_unit_test(the_range_asked_for_is_kept_to_the_byte),
        cmocka_unit_test(extents_are_made_of_whole_blocks),
        cmocka_unit_test(one_extent_is_whole_when_only_one_is_wanted),
        cmocka_unit_test(no_more_are_told_than_there_is_room_for),
        cmocka_unit_test(an_error_of_the_map_is_the_answer),
    };
    static const struct CMUnitTest ring_tests[] = {
        cmocka_unit_test(holes_of_a_file_are_told_through_a_queue),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) + run_on_both_rings(ring_tests);
}
