#include "unit.h"

#include "core/limits.h"
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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_block_size_any_byte_may_be_addressed),
        cmocka_unit_test(the_size_is_rounded_down_to_the_block),
        cmocka_unit_test(a_disk_with_larger_sectors_prefers_them),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
