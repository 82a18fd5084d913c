// --io fault:SPEC.
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/io.h"

static int parse(const char *spec, struct err *err)
{
    struct image image = {.is_direct = true, .dio_offset_align = 512, .dio_mem_align = 4};
    struct device dev = {.image = &image};
    char text[200];
    struct io *io;
    int ret;

    *err = (struct err){""};
    snprintf(text, sizeof(text), "fault:%s", spec);
    ret = io_create(&io, &dev, &image, text, err);
    if (!ret)
        io_destroy(io);
    return ret;
}

static void every_key_is_taken(void **state)
{
    static const char *const specs[] = {
        "",
        "io=direct",
        "io=buffered",
        "seed=0",
        "seed=4294967295",
        "after=100",
        "read.error=0",
        "read.error=1",
        "write.error=0.5:EIO",
        "flush.error=0.25:ENOSPC",
        "discard.error=1e-3:EINVAL",
        "write_zeroes.error=1:EDQUOT",
        "any.error=1:ENOMEM",
        "read.error=1:EPERM",
        "read.error=1:EROFS",
        "read.error=1:ETIMEDOUT",
        "read.delay=1:0",
        "write.delay=0.1:60000",
        "any.delay=1:5",
        "read.short=0.5",
        "write.short=1",
        "any.short=0.5",
        "write.torn=0.01",
        "any.torn=0.01",
        "io=buffered,seed=3,after=10,read.error=0.1,write.short=0.2,write.torn=0.3,flush.delay=0.4:1",
    };
    struct err err;

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(specs); i++) {
        if (parse(specs[i], &err))
            fail_msg("%s: %s", specs[i], err.line);
    }
}

static void every_wrong_key_or_value_gets_a_line(void **state)
{
    static const char *const specs[] = {
        "x",
        "=",
        "io",
        "io=",
        "io=null",
        "io=fault:",
        "seed",
        "seed=",
        "seed=-1",
        "seed=x",
        "seed=4294967296",
        "after=1.5",
        "read=1",
        "read.=1",
        ".error=1",
        "error=1",
        "read.error",
        "read.error=",
        "read.error=x",
        "read.error=-0.1",
        "read.error=1.1",
        "read.error=nan",
        "read.error=inf",
        "read.error=1x",
        "read.error=1:",
        "read.error=1:EFOO",
        "read.error=1:5",
        "read.error=1:eio",
        "any.error=1:EFOO",
        "read.delay=1",
        "read.delay=1:",
        "read.delay=1:x",
        "read.delay=1:-1",
        "read.delay=1:60001",
        "any.delay=1",
        "read.short=0.5:1",
        "read.torn=1",
        "flush.short=1",
        "discard.torn=1",
        "write.what=1",
        "prefetch.error=1",
        "block_status.error=1",
        "readx.error=1",
        "rea.error=1",
        "seed=1,read.error=2",
    };
    struct err err;

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(specs); i++) {
        if (parse(specs[i], &err) >= 0)
            fail_msg("'%s' was taken", specs[i]);
        assert_non_null(strstr(err.line, "--io: fault: "));
        assert_null(strchr(err.line, '\n'));
    }
}

static void what_is_underneath_decides_how_the_image_is_opened(void **state)
{
    (void)state;
    assert_true(io_wants_direct("fault:"));
    assert_true(io_wants_direct("fault:seed=1,io=direct"));
    assert_false(io_wants_direct("fault:io=buffered"));
    assert_true(io_wants_direct("direct"));
    assert_false(io_wants_direct("buffered"));
    assert_false(io_wants_direct("null"));
    assert_false(io_wants_direct("unknown"));
}

static struct fixture setup(void **state, const char *spec)
{
    char io[200];

    snprintf(io, sizeof(io), "fault:%s", spec);
    return fixture_create(&(struct fixture_options){.ring = ring_ops_of(state), .io = io, .size_bytes = MiB});
}

static char buf[64 * KiB], check[64 * KiB];

// A bit for each of 200 reads that failed.
static void failures_of(void **state, const char *spec, bool *failed)
{
    struct fixture fixture = setup(state, spec);

    for (unsigned i = 0; i < 200; i++) {
        int error = fixture_do(fixture.dev, REQ_OP_READ, 0, i * 512, buf, 512);

        assert_true(error == 0 || error == -ENOMEM);
        failed[i] = error;
    }
    fixture_destroy(&fixture);
}

static void the_same_seed_gives_the_same_faults(void **state)
{
    bool a[200], b[200], c[200];
    unsigned nr_failed = 0;

    failures_of(state, "io=buffered,seed=11,read.error=0.3:ENOMEM", a);
    failures_of(state, "io=buffered,seed=11,read.error=0.3:ENOMEM", b);
    failures_of(state, "io=buffered,seed=12,read.error=0.3:ENOMEM", c);
    assert_memory_equal(a, b, sizeof(a));
    assert_memory_not_equal(a, c, sizeof(a));
    for (unsigned i = 0; i < 200; i++)
        nr_failed += a[i];
    assert_in_range(nr_failed, 20, 120);
}

static void probabilities_of_zero_and_one_are_certain(void **state)
{
    struct fixture fixture =
        setup(state, "io=buffered,read.error=0,write.error=1:EDQUOT,flush.error=1:ENOSPC");

    for (unsigned i = 0; i < 50; i++) {
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, buf, 512), 0);
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 512), -EDQUOT);
    }
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_FLUSH, 0, 0, NULL, 0), -ENOSPC);
    assert_int_equal(fixture_destroy(&fixture), -ENOSPC); // the device remembers
}

static void errors_reach_every_op(void **state)
{
    static const enum req_op ops[] = {REQ_OP_READ, REQ_OP_WRITE, REQ_OP_DISCARD, REQ_OP_WRITE_ZEROES,
                                      REQ_OP_FLUSH};
    struct fixture fixture = setup(state, "io=buffered,any.error=1:ETIMEDOUT");

    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        bool has_data = ops[i] <= REQ_OP_WRITE;

        assert_int_equal(fixture_do(fixture.dev, ops[i], 0, 0, has_data ? buf : NULL,
                                    ops[i] == REQ_OP_FLUSH ? 0 : 512),
                         -ETIMEDOUT);
    }
    fixture_destroy(&fixture);
}

static void the_first_requests_pass_untouched(void **state)
{
    struct fixture fixture = setup(state, "io=buffered,after=5,any.error=1");

    for (unsigned i = 0; i < 5; i++)
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 512), 0);
    for (unsigned i = 0; i < 5; i++)
        assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 0, buf, 512), -EIO);
    fixture_destroy(&fixture);
}

static void short_io_is_whole_in_the_end(void **state)
{
    static const char *const lowers[] = {"io=direct", "io=buffered"};

    for (unsigned l = 0; l < ARRAY_SIZE(lowers); l++) {
        char spec[100], *aligned;
        struct fixture fixture;
        uint64_t seed = 8;

        snprintf(spec, sizeof(spec), "%s,any.short=0.8", lowers[l]);
        fixture = setup(state, spec);
        aligned = aligned_alloc(4096, sizeof(buf));
        for (unsigned i = 0; i < 30; i++) {
            uint64_t offset = i % 2 ? i * 1000 : i * 4096, len = i % 2 ? 20001 : 32768;

            for (uint64_t j = 0; j < len; j++)
                check[j] = aligned[j] = (char)unit_random(&seed);
            assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, offset, aligned, len), 0);
            memset(aligned, 0, len);
            assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, offset, aligned, len), 0);
            assert_memory_equal(aligned, check, len);
        }
        fixture_destroy(&fixture);
        free(aligned);
    }
}

static void a_torn_write_fails_with_a_part_of_it_written(void **state)
{
    struct fixture fixture = setup(state, "io=buffered,write.torn=1");
    unsigned nr_written = 0;

    memset(buf, 0x42, 8192);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_WRITE, 0, 4096, buf, 8192), -EIO);
    assert_int_equal(fixture_do(fixture.dev, REQ_OP_READ, 0, 0, check, 16384), 0);
    for (unsigned i = 0; i < 16384; i++) {
        assert_true(check[i] == 0 || (check[i] == 0x42 && i >= 4096 && i < 12288));
        nr_written += check[i] != 0;
    }
    assert_in_range(nr_written, 1, 8191);
    fixture_destroy(&fixture);
}

static void delayed_requests_wait_at_least_that_long_and_pass(void **state)
{
    struct fixture fixture = setup(state, "io=buffered,any.delay=1:15");
    static const enum req_op ops[] = {REQ_OP_WRITE, REQ_OP_READ, REQ_OP_FLUSH, REQ_OP_WRITE_ZEROES,
                                      REQ_OP_DISCARD};

    for (unsigned i = 0; i < ARRAY_SIZE(ops); i++) {
        uint64_t begin_ns = util_now_ns();

        assert_int_equal(fixture_do(fixture.dev, ops[i], 0, 0, i < 2 ? buf : NULL,
                                    ops[i] == REQ_OP_FLUSH ? 0 : 512),
                         0);
        assert_true(util_now_ns() - begin_ns >= 15000000);
    }
    assert_int_equal(fixture_destroy(&fixture), 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_key_is_taken),
        cmocka_unit_test(every_wrong_key_or_value_gets_a_line),
        cmocka_unit_test(what_is_underneath_decides_how_the_image_is_opened),
    };
    static const struct CMUnitTest ring_tests[] = {
        cmocka_unit_test(the_same_seed_gives_the_same_faults),
        cmocka_unit_test(probabilities_of_zero_and_one_are_certain),
        cmocka_unit_test(errors_reach_every_op),
        cmocka_unit_test(the_first_requests_pass_untouched),
        cmocka_unit_test(short_io_is_whole_in_the_end),
        cmocka_unit_test(a_torn_write_fails_with_a_part_of_it_written),
        cmocka_unit_test(delayed_requests_wait_at_least_that_long_and_pass),
    };

    return cmocka_run_group_tests(tests, NULL, NULL) + run_on_both_rings(ring_tests);
}
