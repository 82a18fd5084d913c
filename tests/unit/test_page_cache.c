// The page cache alone, against a model of what every sector should be.
#include "unit.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "writeback/page_cache.h"

#define DISK_BYTES (8 * MiB)

static struct page_cache cache;
static bool is_hole; // what pages that come in are told

static bool needs_space(void *place)
{
    (void)place;
    return is_hole;
}

static int setup(void **state)
{
    (void)state;
    is_hole = false;
    return page_cache_create(&cache, MiB, 512);
}

static int teardown(void **state)
{
    (void)state;
    page_cache_destroy(&cache);
    return 0;
}

static int cache_write(uint64_t offset, const void *buf, uint32_t len)
{
    struct iovec iov = {(void *)buf, len};

    return page_cache_write(&cache, offset, len, &iov, needs_space, NULL, NULL);
}

// All of it, or fails the test.
static void must_write(uint64_t offset, char byte, uint32_t len)
{
    char buf[CACHE_CHUNK_BYTES];

    memset(buf, byte, len);
    assert_int_equal(cache_write(offset, buf, len), len);
}

static void assert_cached(uint64_t offset, char byte, uint32_t len)
{
    char buf[CACHE_CHUNK_BYTES];
    struct iovec iov = {buf, len};
    bool is_cached;

    assert_int_equal(page_cache_read(&cache, offset, len, &iov, &is_cached), len);
    assert_true(is_cached);
    for (uint32_t i = 0; i < len; i++)
        assert_int_equal(buf[i], byte);
}

static void assert_not_cached(uint64_t offset, uint64_t len)
{
    bool is_cached, is_delayed;

    assert_int_equal(page_cache_look(&cache, offset, len, &is_cached, &is_delayed), len);
    assert_false(is_cached);
}

struct taken {
    struct iovec iov[64];
    struct page_ref refs[64];
    struct page_vec vec;
    uint64_t len;
};

static void take(struct taken *taken, uint64_t offset, uint64_t end)
{
    taken->vec = (struct page_vec){.iov = taken->iov, .refs = taken->refs, .max_iov = 64, .max_refs = 64};
    taken->len = page_cache_take(&cache, offset, end, &taken->vec);
}

static unsigned give_back(const struct taken *taken, int error)
{
    return page_cache_written(&cache, taken->refs, taken->vec.nr_refs, error);
}

static void test_a_part_of_a_page_needs_no_read(void **state)
{
    bool is_cached, is_delayed;

    (void)state;
    must_write(1024, 'a', 512);
    assert_cached(1024, 'a', 512);
    assert_int_equal(page_cache_look(&cache, 0, 4096, &is_cached, &is_delayed), 1024);
    assert_false(is_cached);
    assert_int_equal(page_cache_look(&cache, 1024, 4096, &is_cached, &is_delayed), 512);
    assert_true(is_cached);
    assert_not_cached(1536, 64 * MiB); // far beyond the chunk
}

static void test_a_part_of_a_sector_asks_for_the_rest_of_it(void **state)
{
    char sector[512], old[512];
    struct iovec iov = {sector, 100};
    struct cache_fill fill = {.offset = 512, .data = old};

    (void)state;
    memset(sector, 'n', sizeof(sector));
    memset(old, 'o', sizeof(old));
    assert_int_equal(cache_write(600, sector, 100), -EAGAIN);
    assert_int_equal(atomic_load(&cache.nr_dirty), 0);
    fill.nr_drops = page_cache_drops(&cache, 512);
    assert_int_equal(page_cache_write(&cache, 600, 100, &iov, needs_space, NULL, &fill), 100);
    assert_cached(512, 'o', 88);
    assert_cached(600, 'n', 100);
    assert_cached(700, 'o', 324);
    // It is here now.
    assert_int_equal(cache_write(512, sector, 5), 5);
    // Whole sectors in front of a partial one are taken.
    assert_int_equal(cache_write(4096, old, 512), 512);
    must_write(8192, 'w', 1024);
    assert_int_equal(cache_write(16384, cache.frames, 1000), 512);
}

static void test_a_fill_that_a_drop_has_overtaken_is_refused(void **state)
{
    char sector[512] = "";
    struct iovec iov = {sector, 10};
    struct cache_fill fill = {.offset = 0, .data = sector, .nr_drops = page_cache_drops(&cache, 0)};

    (void)state;
    must_write(0, 'x', 512);
    page_cache_drop(&cache, 0, 512);
    assert_int_equal(page_cache_write(&cache, 3, 10, &iov, needs_space, NULL, &fill), -ESTALE);
}

static void test_what_was_written_back_is_gone(void **state)
{
    struct taken taken;

    (void)state;
    must_write(4096, 'a', 8192);
    take(&taken, 4096, DISK_BYTES);
    assert_int_equal(taken.len, 8192);
    assert_cached(4096, 'a', 8192); // under write-back it is here
    assert_int_equal(give_back(&taken, 0), 2);
    assert_not_cached(0, CACHE_CHUNK_BYTES);
    assert_int_equal(atomic_load(&cache.nr_dirty), 0);
    assert_int_equal(atomic_load(&cache.nr_used), 0);
}

static void test_a_page_under_write_back_is_not_torn(void **state)
{
    struct taken first, second;
    struct dirty_at at;

    (void)state;
    must_write(0, 'a', 4096);
    take(&first, 0, DISK_BYTES);
    must_write(512, 'b', 512);
    assert_int_equal(((char *)first.iov[0].iov_base)[512], 'a');
    assert_cached(0, 'a', 512);
    assert_cached(512, 'b', 512);
    // It is not written a second time while the first is on its way.
    assert_true(page_cache_find(&cache, 0, DISK_BYTES, false, &at));
    assert_int_equal(at.offset, 512);
    assert_true(at.is_busy);
    take(&second, 512, DISK_BYTES);
    assert_int_equal(second.len, 0);
    assert_int_equal(give_back(&first, 0), 1);
    take(&second, 512, DISK_BYTES);
    assert_int_equal(second.len, 512);
    assert_int_equal(((char *)second.iov[0].iov_base)[0], 'b');
    give_back(&second, 0);
    assert_int_equal(atomic_load(&cache.nr_used), 0);
}

static void test_an_error_leaves_all_of_it_dirty(void **state)
{
    struct taken taken;

    (void)state;
    must_write(0, 'a', 4096);
    take(&taken, 0, DISK_BYTES);
    must_write(0, 'b', 512);
    give_back(&taken, -EIO);
    assert_int_equal(atomic_load(&cache.nr_failed), 1);
    assert_cached(0, 'b', 512);
    assert_cached(512, 'a', 3584);
    take(&taken, 0, DISK_BYTES);
    assert_int_equal(taken.len, 4096);
    assert_int_equal(atomic_load(&cache.nr_failed), 0);
    give_back(&taken, 0);
    assert_int_equal(atomic_load(&cache.nr_used), 0);
}

static void test_two_runs_of_a_page_are_under_way_together(void **state)
{
    struct taken first, second;

    (void)state;
    must_write(0, 'a', 512);
    must_write(2048, 'b', 512);
    take(&first, 0, DISK_BYTES);
    take(&second, 2048, DISK_BYTES);
    assert_int_equal(first.len, 512);
    assert_int_equal(second.len, 512);
    assert_int_equal(give_back(&first, -EIO), 0);
    assert_int_equal(give_back(&second, 0), 0);
    assert_int_equal(atomic_load(&cache.nr_failed), 1);
    take(&first, 0, DISK_BYTES);
    assert_int_equal(first.len, 512);
    assert_int_equal(give_back(&first, 0), 1);
}

static void test_memory_ends_and_comes_back(void **state)
{
    char buf[CACHE_PAGE_BYTES] = "";
    uint64_t nr = 0;

    (void)state;
    while (cache_write(nr * CACHE_CHUNK_BYTES, buf, 512) == 512)
        nr++;
    assert_int_equal(nr, cache.nr_frames);
    assert_int_equal(cache_write(nr * CACHE_CHUNK_BYTES, buf, 512), -ENOMEM);
    assert_int_equal(cache_write(0, buf, 4096), 4096); // a page that is here
    assert_int_equal(page_cache_drop(&cache, 0, nr * CACHE_CHUNK_BYTES), nr);
    assert_int_equal(atomic_load(&cache.nr_used), 0);
    assert_int_equal(cache_write(nr * CACHE_CHUNK_BYTES, buf, 512), 512);
}

static void test_promises_add_up(void **state)
{
    char buf[CACHE_PAGE_BYTES] = "";
    struct dirty_at at;

    (void)state;
    is_hole = true;
    atomic_store(&cache.max_delayed, 3);
    must_write(0, 'a', 512);
    must_write(0, 'a', 4096);
    must_write(8192, 'a', 8192);
    assert_int_equal(atomic_load(&cache.nr_delayed), 3);
    assert_int_equal(cache_write(65536, buf, 4096), -ENOSPC);
    assert_int_equal(atomic_load(&cache.nr_delayed), 3);
    assert_int_equal(atomic_load(&cache.nr_dirty), 3);
    // Not written before it has a place.
    assert_true(page_cache_find(&cache, 0, DISK_BYTES, false, &at));
    assert_true(at.is_delayed);
    page_cache_place(&cache, 0, 4096, true);
    assert_int_equal(atomic_load(&cache.nr_delayed), 2);
    assert_true(page_cache_find(&cache, 0, DISK_BYTES, true, &at));
    assert_int_equal(at.offset, 8192);
    // A part of a page that goes gives nothing back, the whole page does.
    page_cache_drop(&cache, 8192, 512);
    assert_int_equal(atomic_load(&cache.nr_delayed), 2);
    page_cache_drop(&cache, 8192, 4096);
    assert_int_equal(atomic_load(&cache.nr_delayed), 1);
    assert_int_equal(cache_write(65536, buf, 4096), 4096);
    page_cache_drop(&cache, 0, DISK_BYTES);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
}

// ---- At random

static char model[DISK_BYTES / 512]; // what each sector holds; 0: nothing
static char below[DISK_BYTES / 512]; // what was written back

static void check_model(void)
{
    char buf[512];
    struct iovec iov = {buf, sizeof(buf)};

    for (uint64_t i = 0; i < DISK_BYTES / 512; i++) {
        bool is_cached;

        page_cache_read(&cache, i * 512, 512, &iov, &is_cached);
        assert_int_equal(is_cached ? buf[7] : below[i], model[i]);
    }
}

static void note_below(const struct taken *taken, uint64_t offset)
{
    uint64_t sector = offset / 512;

    for (unsigned i = 0; i < taken->vec.nr_iov; i++) {
        for (size_t j = 0; j < taken->iov[i].iov_len; j += 512)
            below[sector++] = ((char *)taken->iov[i].iov_base)[j];
    }
}

static void test_all_operations_at_random(void **state)
{
    uint64_t random = 42, pending_at = 0;
    struct taken pending = {.len = 0};

    (void)state;
    memset(model, 0, sizeof(model));
    memset(below, 0, sizeof(below));
    for (unsigned round = 0; round < 20000; round++) {
        uint64_t at = unit_random(&random) % (DISK_BYTES - CACHE_CHUNK_BYTES) / 512 * 512;
        uint64_t room = CACHE_CHUNK_BYTES - at % CACHE_CHUNK_BYTES;
        uint64_t want = (unit_random(&random) % 32 + 1) * 512;
        uint32_t len = (uint32_t)min_of(room, want);
        char byte = (char)(unit_random(&random) % 100 + 1), buf[CACHE_CHUNK_BYTES];
        struct dirty_at found;
        int ret;

        switch (unit_random(&random) % 8) {
        case 0:
        case 1:
        case 2:
        case 3:
            memset(buf, byte, len);
            is_hole = unit_random(&random) % 2;
            ret = cache_write(at, buf, len);
            assert_true(ret > 0 || ret == -ENOMEM);
            if (ret > 0)
                memset(model + at / 512, byte, (size_t)ret / 512);
            break;
        case 4: // the end of a write-back, which another write may have changed meanwhile
            if (!pending.len)
                break;
            ret = unit_random(&random) % 3 ? 0 : -EIO;
            if (!ret)
                note_below(&pending, pending_at);
            give_back(&pending, ret);
            pending.len = 0;
            break;
        case 5:
            if (pending.len)
                break;
            page_cache_place(&cache, at, at + 4 * CACHE_CHUNK_BYTES, true);
            if (page_cache_find(&cache, at, DISK_BYTES, false, &found) && !found.is_delayed) {
                pending_at = found.offset;
                take(&pending, found.offset, DISK_BYTES);
                assert_true(pending.len > 0);
            }
            break;
        case 6:
            if (pending.len && at < pending_at + pending.len && pending_at < at + len)
                break;
            page_cache_drop(&cache, at, len);
            memset(model + at / 512, 0, len / 512);
            memset(below + at / 512, 0, len / 512);
            break;
        default:
            page_cache_drop(&cache, at, len); // nothing is pending there, or it is
            if (pending.len && at < pending_at + pending.len && pending_at < at + len) {
                note_below(&pending, pending_at);
                give_back(&pending, 0);
                pending.len = 0;
            }
            memset(model + at / 512, 0, len / 512);
            memset(below + at / 512, 0, len / 512);
        }
        if (round % 2000 == 0)
            check_model();
    }
    if (pending.len)
        give_back(&pending, -EIO);
    check_model();
    page_cache_drop(&cache, 0, DISK_BYTES);
    assert_int_equal(atomic_load(&cache.nr_used), 0);
    assert_int_equal(atomic_load(&cache.nr_dirty), 0);
    assert_int_equal(atomic_load(&cache.nr_delayed), 0);
    assert_int_equal(atomic_load(&cache.nr_failed), 0);
}

// Each writes a stripe of its own; one more takes and gives back all over.
static void *stripe_main(void *arg)
{
    uint64_t stripe = (uint64_t)(uintptr_t)arg, random = stripe + 1;
    char buf[CACHE_PAGE_BYTES];

    for (unsigned i = 0; i < 3000; i++) {
        uint64_t page = unit_random(&random) % (DISK_BYTES / CACHE_PAGE_BYTES / 4) * 4 + stripe;

        memset(buf, (int)stripe + 'a', sizeof(buf));
        cache_write(page * CACHE_PAGE_BYTES, buf, sizeof(buf));
        if (i % 16 == 0)
            page_cache_drop(&cache, page * CACHE_PAGE_BYTES, 512);
    }
    return NULL;
}

static void test_threads(void **state)
{
    pthread_t threads[4];
    struct dirty_at at;
    struct taken taken;

    (void)state;
    for (uintptr_t i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, stripe_main, (void *)i), 0);
    for (unsigned i = 0; i < 500; i++) {
        if (!page_cache_find(&cache, 0, DISK_BYTES, false, &at))
            continue;
        take(&taken, at.offset, DISK_BYTES);
        give_back(&taken, i % 5 ? 0 : -EIO);
    }
    for (unsigned i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    while (page_cache_find(&cache, 0, DISK_BYTES, false, &at)) {
        take(&taken, at.offset, DISK_BYTES);
        assert_int_equal(((char *)taken.iov[0].iov_base)[0], 'a' + (char)(at.offset / CACHE_PAGE_BYTES % 4));
        give_back(&taken, 0);
    }
    assert_int_equal(atomic_load(&cache.nr_used), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_a_part_of_a_page_needs_no_read, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_part_of_a_sector_asks_for_the_rest_of_it, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_fill_that_a_drop_has_overtaken_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_what_was_written_back_is_gone, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_page_under_write_back_is_not_torn, setup, teardown),
        cmocka_unit_test_setup_teardown(test_an_error_leaves_all_of_it_dirty, setup, teardown),
        cmocka_unit_test_setup_teardown(test_two_runs_of_a_page_are_under_way_together, setup, teardown),
        cmocka_unit_test_setup_teardown(test_memory_ends_and_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_promises_add_up, setup, teardown),
        cmocka_unit_test_setup_teardown(test_all_operations_at_random, setup, teardown),
        cmocka_unit_test_setup_teardown(test_threads, setup, teardown),
    };

    return cmocka_run_group_tests_name("page_cache", tests, NULL, NULL);
}
