#include "unit.h"

#include <errno.h>

#include "core/device.h"
#include "core/rq.h"

#define SIZE (64 * MiB)

static int check_on(const struct device *dev, enum req_op op, uint64_t offset, uint64_t len)
{
    struct rq rq = {.op = (uint8_t)op, .offset_bytes = offset, .len_bytes = len};

    return device_check(&dev->limits, &rq);
}

static struct device device_with(uint64_t size, uint32_t block, bool is_read_only)
{
    return (struct device){
        .limits = {.size_bytes = size,
                   .min_block_bytes = block,
                   .preferred_block_bytes = 4096,
                   .max_transfer_bytes = LIMITS_MAX_TRANSFER_BYTES,
                   .is_read_only = is_read_only},
    };
}

static bool has_range(enum req_op op)
{
    return op != REQ_OP_FLUSH;
}

static int out_of_range(enum req_op op)
{
    return op == REQ_OP_WRITE || op == REQ_OP_WRITE_ZEROES ? -ENOSPC : -EINVAL;
}

static void the_whole_device_is_in_range_and_one_byte_more_is_not(void **state)
{
    struct device dev = device_with(MiB, 1, false);

    (void)state;
    for (unsigned i = 0; i < REQ_OP_NR; i++) {
        enum req_op op = (enum req_op)i;
        int error = has_range(op) ? out_of_range(op) : 0;

        assert_int_equal(check_on(&dev, op, 0, MiB), 0);
        assert_int_equal(check_on(&dev, op, MiB - 1, 1), 0);
        assert_int_equal(check_on(&dev, op, 0, MiB + 1), error);
        assert_int_equal(check_on(&dev, op, MiB - 1, 2), error);
        assert_int_equal(check_on(&dev, op, MiB, 1), error);
        assert_int_equal(check_on(&dev, op, MiB + 1, 1), error);
    }
}

static void sums_near_2_to_the_64_do_not_wrap_around(void **state)
{
    static const uint64_t numbers[] = {0,
                                       1,
                                       4096,
                                       SIZE - 1,
                                       SIZE,
                                       SIZE + 1,
                                       INT64_MAX,
                                       (uint64_t)INT64_MAX + 1,
                                       UINT64_MAX - SIZE,
                                       UINT64_MAX - SIZE + 1,
                                       UINT64_MAX - 4096,
                                       UINT64_MAX - 1,
                                       UINT64_MAX};
    struct device dev = device_with(SIZE, 1, false);

    (void)state;
    for (unsigned i = 0; i < REQ_OP_NR; i++) {
        for (unsigned a = 0; a < ARRAY_SIZE(numbers); a++) {
            for (unsigned b = 0; b < ARRAY_SIZE(numbers); b++) {
                enum req_op op = (enum req_op)i;
                unsigned __int128 end = (unsigned __int128)numbers[a] + numbers[b];
                bool is_long =
                    (op == REQ_OP_READ || op == REQ_OP_WRITE) && numbers[b] > LIMITS_MAX_TRANSFER_BYTES;
                int error = !has_range(op) ? 0 : end > SIZE ? out_of_range(op) : is_long ? -EINVAL : 0;

                assert_int_equal(check_on(&dev, op, numbers[a], numbers[b]), error);
            }
        }
    }
}

static void nothing_fits_an_empty_device_but_nothing(void **state)
{
    struct device dev = device_with(0, 1, false);

    (void)state;
    assert_int_equal(check_on(&dev, REQ_OP_READ, 0, 0), 0);
    assert_int_equal(check_on(&dev, REQ_OP_READ, 0, 1), -EINVAL);
    assert_int_equal(check_on(&dev, REQ_OP_WRITE, 0, 1), -ENOSPC);
}

static void requests_of_no_bytes_are_in_range_up_to_the_end(void **state)
{
    struct device dev = device_with(MiB, 512, false);

    (void)state;
    for (unsigned i = 0; i < REQ_OP_NR; i++) {
        enum req_op op = (enum req_op)i;

        assert_int_equal(check_on(&dev, op, 0, 0), 0);
        assert_int_equal(check_on(&dev, op, MiB, 0), 0);
        assert_int_equal(check_on(&dev, op, MiB + 512, 0), has_range(op) ? out_of_range(op) : 0);
    }
}

static void a_read_only_device_refuses_all_writes_first_of_all(void **state)
{
    struct device dev = device_with(MiB, 512, true);

    (void)state;
    for (unsigned i = 0; i < REQ_OP_NR; i++) {
        enum req_op op = (enum req_op)i;
        bool is_write = op == REQ_OP_WRITE || op == REQ_OP_DISCARD || op == REQ_OP_WRITE_ZEROES;

        assert_int_equal(check_on(&dev, op, 0, 512), is_write ? -EPERM : 0);
        assert_int_equal(check_on(&dev, op, 0, 0), is_write ? -EPERM : 0);
        if (is_write) {
            assert_int_equal(check_on(&dev, op, 2 * MiB, 512), -EPERM);
            assert_int_equal(check_on(&dev, op, 1, 511), -EPERM);
        }
    }
}

static void offset_and_length_are_multiples_of_the_block(void **state)
{
    (void)state;
    for (uint32_t block = 1; block <= 4096; block *= 2) {
        struct device dev = device_with(MiB, block, false);

        for (unsigned i = 0; i < REQ_OP_NR; i++) {
            enum req_op op = (enum req_op)i;
            int error = has_range(op) && block > 1 ? -EINVAL : 0;

            assert_int_equal(check_on(&dev, op, block, 2 * block), 0);
            assert_int_equal(check_on(&dev, op, 1, block), error);
            assert_int_equal(check_on(&dev, op, 0, 1), error);
            assert_int_equal(check_on(&dev, op, block / 2, block), error && block > 1 ? error : 0);
            assert_int_equal(check_on(&dev, op, 4096, 4096 + block / 2), block > 1 ? error : 0);
        }
    }
}

static void only_reads_and_writes_are_bound_by_the_transfer_limit(void **state)
{
    struct device dev = device_with(SIZE, 1, false);

    (void)state;
    for (unsigned i = 0; i < REQ_OP_NR; i++) {
        enum req_op op = (enum req_op)i;
        bool is_bound = op == REQ_OP_READ || op == REQ_OP_WRITE;

        assert_int_equal(check_on(&dev, op, 0, LIMITS_MAX_TRANSFER_BYTES), 0);
        assert_int_equal(check_on(&dev, op, 0, LIMITS_MAX_TRANSFER_BYTES + 1), is_bound ? -EINVAL : 0);
    }
}

static void a_flush_is_let_in_whatever_its_fields_say(void **state)
{
    struct device dev = device_with(MiB, 4096, true);

    (void)state;
    assert_int_equal(check_on(&dev, REQ_OP_FLUSH, UINT64_MAX, UINT64_MAX), 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_whole_device_is_in_range_and_one_byte_more_is_not),
        cmocka_unit_test(sums_near_2_to_the_64_do_not_wrap_around),
        cmocka_unit_test(nothing_fits_an_empty_device_but_nothing),
        cmocka_unit_test(requests_of_no_bytes_are_in_range_up_to_the_end),
        cmocka_unit_test(a_read_only_device_refuses_all_writes_first_of_all),
        cmocka_unit_test(offset_and_length_are_multiples_of_the_block),
        cmocka_unit_test(only_reads_and_writes_are_bound_by_the_transfer_limit),
        cmocka_unit_test(a_flush_is_let_in_whatever_its_fields_say),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
