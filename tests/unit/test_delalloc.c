// Delayed allocation on a mapper of the test's, which counts, gives less than it was asked, and fails.
#include "unit.h"

#include <errno.h>
#include <string.h>

#include "writeback/delalloc.h"

#define DISK_BYTES (64 * MiB)
#define NR_BLOCKS (DISK_BYTES / CACHE_PAGE_BYTES)

static struct {
    struct map map;
    bool is_allocated[NR_BLOCKS];
    uint64_t max_bytes; // of an answer with create; 0: all
    uint64_t free_blocks;
    int fail_at_call; // < 0: never
    int error;
    bool is_strict; // full is full, also for what needs no space
    bool cannot_allocate;
    unsigned nr_creates, nr_looks, nr_wrong;
} fake;

static struct page_cache cache;
static struct delalloc delalloc;

static int fake_look(uint64_t block, uint64_t nr_blocks, struct extent *ext)
{
    uint64_t n = 1;

    fake.nr_looks++;
    while (n < nr_blocks && fake.is_allocated[block + n] == fake.is_allocated[block])
        n++;
    ext->state = fake.is_allocated[block] ? EXTENT_MAPPED : EXTENT_HOLE;
    ext->len_bytes = n * CACHE_PAGE_BYTES;
    return 0;
}

static int fake_create(uint64_t block, uint64_t nr_blocks, struct extent *ext)
{
    uint64_t n;

    if ((int)fake.nr_creates++ == fake.fail_at_call)
        return fake.error;
    if (fake.cannot_allocate) {
        ext->state = EXTENT_HOLE;
        return 0;
    }
    if (fake.max_bytes)
        nr_blocks = min_of(nr_blocks, fake.max_bytes / CACHE_PAGE_BYTES);
    if (!fake.free_blocks && fake.is_strict)
        return -ENOSPC;
    for (n = 0; n < nr_blocks; n++) {
        if (fake.is_allocated[block + n])
            continue;
        if (!fake.free_blocks)
            break;
        fake.free_blocks--;
        fake.is_allocated[block + n] = true;
    }
    if (!n)
        return -ENOSPC;
    ext->len_bytes = n * CACHE_PAGE_BYTES;
    return 0;
}

static int fake_extent(struct map *map, uint64_t start, uint64_t len, bool create, bool may_block,
                       struct extent *ext)
{
    int ret;

    (void)map;
    *ext = (struct extent){.start_bytes = start, .len_bytes = len, .state = EXTENT_MAPPED};
    if (!may_block || start + len > DISK_BYTES)
        fake.nr_wrong++;
    ret = create ? fake_create(start / CACHE_PAGE_BYTES, (len + CACHE_PAGE_BYTES - 1) / CACHE_PAGE_BYTES, ext)
                 : fake_look(start / CACHE_PAGE_BYTES, (len + CACHE_PAGE_BYTES - 1) / CACHE_PAGE_BYTES, ext);
    ext->len_bytes = min_of(ext->len_bytes, len);
    return ret;
}

static const struct map_ops fake_ops = {.name = "fake", .extent = fake_extent};

static int setup(void **state)
{
    (void)state;
    memset(&fake, 0, sizeof(fake));
    fake.map.ops = &fake_ops;
    fake.fail_at_call = -1;
    fake.free_blocks = NR_BLOCKS;
    return page_cache_create(&cache, 16 * MiB, 512) ||
           delalloc_create(&delalloc, &cache, &fake.map, -1, DISK_BYTES, MiB);
}

static int teardown(void **state)
{
    (void)state;
    assert_int_equal(fake.nr_wrong, 0);
    delalloc_destroy(&delalloc);
    page_cache_destroy(&cache);
    return 0;
}

static void write_pages(uint64_t page, uint64_t nr_pages)
{
    char buf[CACHE_PAGE_BYTES];
    struct iovec iov = {buf, sizeof(buf)};

    memset(buf, 'w', sizeof(buf));
    for (; nr_pages; page++, nr_pages--) {
        uint64_t at = page * CACHE_PAGE_BYTES;
        _Atomic uint8_t *place = delalloc_place(&delalloc, at);

        if (*place == PLACE_UNKNOWN)
            assert_int_equal(delalloc_look_up(&delalloc, at), 0);
        assert_true(*place != PLACE_UNKNOWN);
        assert_int_equal(page_cache_write(&cache, at, CACHE_PAGE_BYTES, &iov, delalloc_needs_space,
                                          (void *)place, NULL),
                         CACHE_PAGE_BYTES);
    }
}

// As write-back does: every DELAYED page gets its place, or is passed over. Returns how many were not
// placed, and the first error.
static uint64_t allocate_all(int *error)
{
    struct dirty_at at;
    uint64_t from = 0, end, nr_failed = 0;

    *error = 0;
    while (page_cache_find(&cache, from, DISK_BYTES, true, &at)) {
        int ret = delalloc_allocate(&delalloc, at.offset, &end);

        if (ret < 0) {
            assert_true(end > at.offset);
            *error = *error ? *error : ret;
            nr_failed += (end - at.offset) / CACHE_PAGE_BYTES;
            from = end;
        }
    }
    return nr_failed;
}

static void test_one_call_for_a_sequential_write(void **state)
{
    int error;

    (void)state;
    write_pages(0, 2048); // 8 MiB
    assert_int_equal(fake.nr_looks, 1);
    assert_int_equal(atomic_load(&cache.nr_delayed), 2048);
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 1);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
    assert_int_equal(atomic_load(&cache.nr_dirty), 2048);
}

static void test_random_pages_close_by_are_one_run(void **state)
{
    uint64_t random = 7;
    int error;

    (void)state;
    // 3 of the 256 pages of a unit each time: nearly every unit has some, so its neighbours join.
    for (unsigned unit = 0; unit < 64; unit++) {
        for (unsigned i = 0; i < 3; i++)
            write_pages(unit * 256 + unit_random(&random) % 256, 1);
    }
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 1);
    assert_int_equal(fake.free_blocks, 0); // all units
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
}

static void test_a_lone_page_takes_a_chunk_only(void **state)
{
    int error;

    (void)state;
    write_pages(1000, 1);
    write_pages(9000, 1);
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 2);
    assert_int_equal(NR_BLOCKS - fake.free_blocks, 2 * CACHE_CHUNK_PAGES);
    // A second one close by, later: its unit takes no more calls.
    write_pages(800, 1);
    assert_int_equal(allocate_all(&error), 0);
    write_pages(900, 1);
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 3);
    assert_int_equal(NR_BLOCKS - fake.free_blocks, 256 + CACHE_CHUNK_PAGES);
}

static void test_a_lone_page_behind_a_whole_unit_takes_its_own(void **state)
{
    int error;

    (void)state;
    write_pages(256, 1);
    write_pages(300, 1);
    write_pages(3 * 256 + 77, 1);
    write_pages(10 * 256 + 77, 1); // too far behind
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 3);
    assert_int_equal(NR_BLOCKS - fake.free_blocks, 256 + 256 + CACHE_CHUNK_PAGES);
}

static void test_what_is_mapped_is_not_asked_for(void **state)
{
    int error;

    (void)state;
    memset(fake.is_allocated + 512, true, 1024);
    write_pages(600, 100);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 0);
    // Runs on both sides of it do not join over it, nor are they rounded into it.
    write_pages(500, 12);
    write_pages(1536, 12);
    assert_int_equal(atomic_load(&cache.nr_delayed), 24);
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 2);
    // Allocated once, it is mapped.
    page_cache_drop(&cache, 0, DISK_BYTES);
    write_pages(500, 12);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
}

static void test_a_mapper_that_gives_less_is_asked_for_the_rest(void **state)
{
    int error;

    (void)state;
    fake.max_bytes = 64 * KiB;
    write_pages(0, 256);
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 16);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
}

static void test_a_call_that_fails_leaves_the_rest_delayed(void **state)
{
    int error;

    (void)state;
    fake.max_bytes = 64 * KiB;
    fake.fail_at_call = 3;
    fake.error = -EIO;
    write_pages(0, 256);
    // The first three had their places, the fourth is asked for once more and gets it.
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(fake.nr_creates, 17);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
    assert_int_equal(atomic_load(&cache.nr_dirty), 256);
}

static void test_no_space(void **state)
{
    int error;

    (void)state;
    fake.free_blocks = 100;
    write_pages(0, 60);
    write_pages(4096, 60);
    assert_int_equal(allocate_all(&error), 24); // the first run was rounded to 64
    assert_int_equal(error, -ENOSPC);
    assert_int_equal(fake.free_blocks, 0);
    assert_int_equal(atomic_load(&cache.nr_delayed), 24);
    assert_int_equal(atomic_load(&cache.nr_dirty), 120);
    // Space comes: nothing was lost.
    fake.free_blocks = 1000;
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
}

static void test_what_is_mapped_needs_no_space(void **state)
{
    int error;

    (void)state;
    memset(fake.is_allocated, true, 8); // half a chunk, so it is not known to be mapped
    fake.free_blocks = 0;
    fake.is_strict = true;
    write_pages(2, 1);
    write_pages(7, 2);
    assert_int_equal(atomic_load(&cache.nr_delayed), 3);
    assert_int_equal(allocate_all(&error), 1);
    assert_int_equal(error, -ENOSPC);
    assert_int_equal(atomic_load(&cache.nr_delayed), 1);
}

static void test_rounding_is_left_out_where_space_is_promised(void **state)
{
    int error;

    (void)state;
    fake.free_blocks = 3;
    write_pages(100, 1);
    write_pages(200, 1);
    write_pages(1000, 1);
    delalloc_set_tight(&delalloc); // as if what is free were promised
    assert_int_equal(allocate_all(&error), 0);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
    assert_true(fake.is_allocated[100] && fake.is_allocated[200] && fake.is_allocated[1000]);
}

static void test_nothing_is_promised_while_space_is_tight(void **state)
{
    char buf[CACHE_PAGE_BYTES] = "";
    struct iovec iov = {buf, sizeof(buf)};

    (void)state;
    write_pages(0, 1);
    delalloc_set_tight(&delalloc);
    delalloc_refresh(&delalloc);
    assert_int_equal(page_cache_write(&cache, 8192, CACHE_PAGE_BYTES, &iov, delalloc_needs_space,
                                      (void *)delalloc_place(&delalloc, 8192), NULL),
                     -ENOSPC);
    assert_int_equal(delalloc_create_now(&delalloc, 8192, 12288), 0);
    assert_int_equal(NR_BLOCKS - fake.free_blocks, 1);
    atomic_store(&delalloc.is_tight, false);
    delalloc_refresh(&delalloc);
    write_pages(2, 1);
}

static void test_nothing_is_promised_after_a_refusal(void **state)
{
    char buf[CACHE_PAGE_BYTES] = "";
    struct iovec iov = {buf, sizeof(buf)};
    int error;

    (void)state;
    write_pages(0, 2);
    fake.free_blocks = 1; // the file system tells of any amount, but there is a quota
    assert_int_equal(allocate_all(&error), 1);
    assert_int_equal(error, -ENOSPC);
    delalloc_refresh(&delalloc);
    assert_int_equal(page_cache_write(&cache, MiB, CACHE_PAGE_BYTES, &iov, delalloc_needs_space,
                                      (void *)delalloc_place(&delalloc, MiB), NULL),
                     -ENOSPC);
    fake.free_blocks = 1000;
    assert_int_equal(allocate_all(&error), 0);
    delalloc_refresh(&delalloc);
    write_pages(256, 1);
}

static void test_what_is_fresh(void **state)
{
    int error;

    (void)state;
    write_pages(0, 256);
    assert_false(delalloc_is_fresh(&delalloc, 0, 4096));
    assert_int_equal(allocate_all(&error), 0);
    assert_true(delalloc_is_fresh(&delalloc, 0, MiB));
    assert_int_equal(delalloc_wrote(&delalloc, 0, 4096), CACHE_CHUNK_BYTES);
    assert_false(delalloc_is_fresh(&delalloc, 4096, 8192));
    assert_true(delalloc_is_fresh(&delalloc, CACHE_CHUNK_BYTES, MiB));
    assert_int_equal(delalloc_wrote(&delalloc, 0, 8192), 8192); // it was not fresh any more
    // A hole that was punched is one again.
    delalloc_punch(&delalloc, MiB / 2, MiB);
    assert_false(delalloc_is_fresh(&delalloc, MiB / 2, MiB / 2 + 4096));
    assert_true(delalloc_needs_space((void *)delalloc_place(&delalloc, MiB / 2)));
}

static void test_a_mapped_place_with_a_hole_needs_space(void **state)
{
    (void)state;
    memset(fake.is_allocated, true, 8); // half a chunk
    write_pages(2, 1);
    assert_int_equal(atomic_load(&cache.nr_delayed), 1); // it is not known better
    assert_false(delalloc_is_fresh(&delalloc, 0, 4096));
    delalloc_create_now(&delalloc, 0, CACHE_CHUNK_BYTES);
    assert_false(delalloc_is_fresh(&delalloc, 0, 4096)); // there is data
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
}

static void test_the_last_page_of_an_odd_size(void **state)
{
    uint64_t end;

    (void)state;
    delalloc_destroy(&delalloc);
    assert_int_equal(delalloc_create(&delalloc, &cache, &fake.map, -1, MiB - 1024, MiB), 0);
    write_pages(255, 1);
    assert_int_equal(delalloc_allocate(&delalloc, 255 * CACHE_PAGE_BYTES, &end), 0);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
}

static void test_a_promise_is_kept_until_the_write_where_only_that_allocates(void **state)
{
    struct page_ref refs[4];
    struct iovec iov[4];
    struct page_vec vec = {.iov = iov, .refs = refs, .max_iov = 4, .max_refs = 4};
    struct dirty_at at;
    int error;

    (void)state;
    fake.cannot_allocate = true;
    write_pages(0, 2);
    assert_int_equal(allocate_all(&error), 0);
    assert_false(page_cache_find(&cache, 0, DISK_BYTES, true, &at)); // they can be written
    assert_int_equal(atomic_load(&cache.nr_delayed), 2);
    assert_true(delalloc_needs_space((void *)delalloc_place(&delalloc, 0)));
    assert_false(delalloc_is_fresh(&delalloc, 0, 4096));
    atomic_store(&cache.space->max_promised, 10);
    assert_int_equal(page_cache_take(&cache, 0, 8192, &vec), 8192);
    page_cache_written(&cache, refs, vec.nr_refs, -ENOSPC);
    assert_int_equal(atomic_load(&cache.nr_delayed), 2);
    vec.nr_iov = vec.nr_refs = 0;
    assert_int_equal(page_cache_take(&cache, 0, 8192, &vec), 8192);
    page_cache_written(&cache, refs, vec.nr_refs, 0);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
    assert_int_equal(atomic_load(&cache.space->max_promised), 8);
    // A write that comes when all is promised needs a promise of its own, unless it is mapped.
    assert_int_equal(delalloc_create_now(&delalloc, 8192, 16384), 1);
    atomic_store(&cache.space->max_promised, 1);
    assert_int_equal(delalloc_create_now(&delalloc, 8192, 16384), -ENOSPC);
    fake.is_allocated[2] = fake.is_allocated[3] = true;
    assert_int_equal(delalloc_create_now(&delalloc, 8192, 16384), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_one_call_for_a_sequential_write, setup, teardown),
        cmocka_unit_test_setup_teardown(test_random_pages_close_by_are_one_run, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_lone_page_takes_a_chunk_only, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_lone_page_behind_a_whole_unit_takes_its_own, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_is_mapped_is_not_asked_for, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_mapper_that_gives_less_is_asked_for_the_rest, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_call_that_fails_leaves_the_rest_delayed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_space, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_is_mapped_needs_no_space, setup, teardown),
        cmocka_unit_test_setup_teardown(test_rounding_is_left_out_where_space_is_promised, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nothing_is_promised_while_space_is_tight, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nothing_is_promised_after_a_refusal, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_is_fresh, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_mapped_place_with_a_hole_needs_space, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_last_page_of_an_odd_size, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_promise_is_kept_until_the_write_where_only_that_allocates,
                                        setup, teardown),
    };

    return cmocka_run_group_tests_name("delalloc", tests, NULL, NULL);
}
