#include "unit.h"

#include "core/limits.h"
#include "core/queue.h"
#include "image/image.h"

static void without_a_block_size_any_byte_may_be_addressed(void **state)
{
    struct image image = {.size_bytes = 1000001, .dio_offset_align = 1, .dio_mem_align = 1};
    struct limits limits = limits_of(&image, 0);

    (void)state;
    assert_int_equal(limits.size_bytes, 1000001);
    assert_int_equal(limits.min_block_bytes, 1);
    assert_int_equal(limits.preferred_block_bytes, 4096);
    assert_int_equal(limits.max_transfer_bytes, 32 * MiB);
    assert_true(limits.max_buf_bytes == UINT64_MAX);
}

static void the_size_is_rounded_down_to_the_block(void **state)
{
    (void)state;
    for (uint32_t block = 512; block <= 4096; block *= 2) {
        for (uint64_t size = 0; size < 3 * block; size += 511) {
            struct image image = {.size_bytes = size, .dio_offset_align = 512, .dio_mem_align = 4};
            struct limits limits = limits_of(&image, block);

            assert_int_equal(limits.size_bytes, size / block * block);
            assert_int_equal(limits.min_block_bytes, block);
            assert_int_equal(limits.preferred_block_bytes, 4096);
        }
    }
}

static void a_disk_with_larger_sectors_prefers_them(void **state)
{
    struct image image = {.size_bytes = MiB, .dio_offset_align = 16384, .dio_mem_align = 4};

    (void)state;
    assert_int_equal(limits_of(&image, 0).preferred_block_bytes, 16384);
    assert_int_equal(limits_of(&image, 512).preferred_block_bytes, 16384);
    assert_int_equal(limits_of(&image, 512).min_block_bytes, 512);
}

static void buffers_are_bounded_but_for_a_share_of_each_stream(void **state)
{
    static struct queue queue = {.limits.max_buf_bytes = 8 * MiB};
    uint64_t large = 0, small = 0, late = 0;

    (void)state;
    while (queue_has_room(&queue, large, MiB))
        queue_count_bufs(&queue, &large, MiB);
    assert_int_equal(large, 8 * MiB);
    while (queue_has_room(&queue, small, 4096)) // though there is no room any more
        queue_count_bufs(&queue, &small, 4096);
    assert_int_equal(small, QUEUE_STREAM_BYTES);
    assert_true(queue_has_room(&queue, late, 32 * MiB)); // or nobody would wake it
    queue_count_bufs(&queue, &late, 32 * MiB);
    assert_false(queue_has_room(&queue, late, 1));
    queue_count_bufs(&queue, &late, -(int64_t)(32 * MiB));
    queue_count_bufs(&queue, &large, -(int64_t)(8 * MiB));
    assert_int_equal(queue.buf_bytes, small);
    assert_true(queue_has_room(&queue, small, MiB));
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_block_size_any_byte_may_be_addressed),
        cmocka_unit_test(the_size_is_rounded_down_to_the_block),
        cmocka_unit_test(a_disk_with_larger_sectors_prefers_them),
        cmocka_unit_test(buffers_are_bounded_but_for_a_share_of_each_stream),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
