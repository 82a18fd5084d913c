// DISCARD and WRITE_ZEROES: what is left in the file, and of its space.
#include "fixture.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "io/io.h"

#define DISK_BYTES (512 * KiB)
#define FROM (128 * KiB)
#define LEN (256 * KiB)

static const char *const ios[] = {"buffered", "direct"};
static char buf[DISK_BYTES] __attribute__((aligned(4096)));

// Filled with ones.
static struct fixture setup(void **state, const char *io)
{
    struct fixture fixture = fixture_create(
        &(struct fixture_options){.ring = ring_ops_of(state), .io = io, .size_bytes = DISK_BYTES});

    memset(buf, 1, DISK_BYTES);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, DISK_BYTES), 0);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_FLUSH, 0, 0, NULL, 0), 0); // now it has its space
    return fixture;
}

static uint64_t space(const struct fixture *fixture)
{
    struct stat st;

    assert_int_equal(stat(fixture->path, &st), 0);
    assert_int_equal(st.st_size, DISK_BYTES); // never another size
    return (uint64_t)st.st_blocks * 512;
}

// Zeroes in [from, to), ones from margin bytes around that on.
static void expect_zeroes_about(struct fixture *fixture, uint64_t from, uint64_t to, uint64_t margin)
{
    memset(buf, 0x77, DISK_BYTES);
    assert_int_equal(fixture_do(fixture->dev, REQ_OP_READ, 0, 0, buf, DISK_BYTES), 0);
    for (uint64_t i = 0; i < DISK_BYTES; i++) {
        if (i >= from && i < to)
            assert_int_equal(buf[i], 0);
        else if (i + margin < from || i >= to + margin)
            assert_int_equal(buf[i], 1);
        else
            assert_in_range(buf[i], 0, 1);
    }
}

static void expect_zeroes(struct fixture *fixture, uint64_t from, uint64_t to)
{
    expect_zeroes_about(fixture, from, to, 0);
}

static void zeroes_give_back_space_unless_that_is_not_wanted(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct fixture fixture = setup(state, ios[i]);
        uint64_t all = space(&fixture);

        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, RQ_NOUNMAP, FROM, NULL, LEN), 0);
        expect_zeroes(&fixture, FROM, FROM + LEN);
        assert_true(space(&fixture) >= all);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, 0, FROM, NULL, LEN), 0);
        expect_zeroes(&fixture, FROM, FROM + LEN);
        if (!atomic_load(&fixture.dev->io->cannot_punch))
            assert_true(space(&fixture) <= all - LEN);
        fixture_destroy(&fixture);
    }
}

static void zeroes_hit_the_bytes_they_name(void **state)
{
    static const uint64_t froms[] = {0, 1, 511, 512, 4095, 4096, 10000},
                          lens[] = {0, 1, 511, 513, 4096, 5000, 70001};

    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct fixture fixture = setup(state, ios[i]);

        for (unsigned latch = 0; latch < 4; latch++) { // every way to do it
            atomic_store(&fixture.dev->io->cannot_punch, latch & 1);
            atomic_store(&fixture.dev->io->cannot_zero_range, latch & 2);
            for (unsigned f = 0; f < ARRAY_SIZE(froms); f++) {
                for (unsigned l = 0; l < ARRAY_SIZE(lens); l++) {
                    unsigned flags = (f + l) % 3 ? 0 : RQ_NOUNMAP | RQ_FUA;

                    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, flags, froms[f], NULL,
                                                lens[l]),
                                     0);
                    expect_zeroes(&fixture, froms[f], froms[f] + lens[l]);
                    memset(buf, 1, DISK_BYTES);
                    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, DISK_BYTES), 0);
                }
            }
        }
        fixture_destroy(&fixture);
    }
}

static void edges_in_a_hole_leave_it_one(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct fixture fixture = setup(state, ios[i]);
        uint64_t before;

        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, 0, FROM, NULL, LEN), 0);
        before = space(&fixture);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, 0, FROM + 100, NULL, 200), 0);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, 0, FROM + 8500, NULL, LEN / 2), 0);
        expect_zeroes(&fixture, FROM, FROM + LEN);
        if (!atomic_load(&fixture.dev->io->cannot_punch))
            assert_true(space(&fixture) == before);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, RQ_NOUNMAP | RQ_FUA, FROM + 100, NULL,
                                    200),
                         0);
        if (!atomic_load(&fixture.dev->io->cannot_punch))
            assert_true(space(&fixture) > before);
        fixture_destroy(&fixture);
    }
}

static void fast_zeroes_are_refused_rather_than_written(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct fixture fixture = setup(state, ios[i]);

        atomic_store(&fixture.dev->io->cannot_punch, true);
        atomic_store(&fixture.dev->io->cannot_zero_range, true);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, RQ_FAST_ZERO, FROM, NULL, LEN),
                         -EOPNOTSUPP);
        expect_zeroes(&fixture, 0, 0);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE_ZEROES, 0, FROM, NULL, LEN), 0);
        expect_zeroes(&fixture, FROM, FROM + LEN);
        fixture_destroy(&fixture);
    }
}

static void a_discard_gives_back_the_blocks_in_its_range(void **state)
{
    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct fixture fixture = setup(state, ios[i]);
        uint64_t all = space(&fixture);

        assert_int_equal(fixture_do(fixture.dev, REQ_OP_DISCARD, 0, 4300, NULL, 200), 0); // none in there
        expect_zeroes_about(&fixture, 4400, 4400, 100);
        memset(buf, 1, 200);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 4300, buf, 200), 0);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_DISCARD, 0, FROM - 100, NULL, LEN + 200), 0);
        if (!atomic_load(&fixture.dev->io->cannot_discard)) {
            expect_zeroes_about(&fixture, FROM, FROM + LEN, 100);
            assert_true(space(&fixture) <= all - LEN);
        }
        fixture_destroy(&fixture);
    }
}

static void a_discard_that_cannot_be_done_is_no_error(void **state)
{
    struct fixture fixture = setup(state, "buffered");

    atomic_store(&fixture.dev->io->cannot_discard, true);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_DISCARD, RQ_FUA, FROM, NULL, LEN), 0);
    expect_zeroes(&fixture, 0, 0);
    fixture_destroy(&fixture);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(zeroes_give_back_space_unless_that_is_not_wanted),
        cmocka_unit_test(zeroes_hit_the_bytes_they_name),
        cmocka_unit_test(edges_in_a_hole_leave_it_one),
        cmocka_unit_test(fast_zeroes_are_refused_rather_than_written),
        cmocka_unit_test(a_discard_gives_back_the_blocks_in_its_range),
        cmocka_unit_test(a_discard_that_cannot_be_done_is_no_error),
    };

    return run_on_both_rings(tests);
}
