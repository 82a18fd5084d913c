// What FIEMAP tells, put in order.

#include "unit.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <string.h>
#include <unistd.h>

#include "fixture.h"
#include "map/fiemap.h"
#include "util/util.h"

#define BLOCK 4096U

struct taken {
    struct file_extent exts[16];
    unsigned nr;
    int ret; // for take()
};

static int take(void *arg, const struct file_extent *ext)
{
    struct taken *taken = arg;

    assert_true(taken->nr < ARRAY_SIZE(taken->exts));
    taken->exts[taken->nr++] = *ext;
    return taken->ret;
}

static struct fiemap_walk walk_of(struct taken *taken, uint64_t start, uint64_t end)
{
    *taken = (struct taken){.nr = 0};
    return (struct fiemap_walk){.at = start, .end = end, .block_bytes = BLOCK, .take = take, .arg = taken};
}

static int next(struct fiemap_walk *walk, uint64_t start, uint64_t len, uint64_t physical, uint32_t flags)
{
    return fiemap_next(walk, &(struct fiemap_extent){.fe_logical = start,
                                                     .fe_length = len,
                                                     .fe_physical = physical,
                                                     .fe_flags = flags});
}

static void assert_extent(const struct file_extent *ext, uint64_t start, uint64_t len, enum file_state state,
                          uint64_t physical)
{
    assert_int_equal(ext->start_bytes, start);
    assert_int_equal(ext->len_bytes, len);
    assert_int_equal(ext->state, state);
    if (state == FILE_WRITTEN)
        assert_int_equal(ext->physical_bytes, physical);
}

static void gaps_are_holes(void **state)
{
    struct taken taken;
    struct fiemap_walk walk = walk_of(&taken, 0, 10 * BLOCK);

    (void)state;
    assert_int_equal(next(&walk, 2 * BLOCK, BLOCK, 7 * BLOCK, 0), 0);
    assert_int_equal(next(&walk, 5 * BLOCK, BLOCK, 9 * BLOCK, FIEMAP_EXTENT_LAST), 0);
    assert_int_equal(fiemap_end(&walk), 0);
    assert_int_equal(taken.nr, 5);
    assert_extent(&taken.exts[0], 0, 2 * BLOCK, FILE_HOLE, 0);
    assert_extent(&taken.exts[1], 2 * BLOCK, BLOCK, FILE_WRITTEN, 7 * BLOCK);
    assert_extent(&taken.exts[2], 3 * BLOCK, 2 * BLOCK, FILE_HOLE, 0);
    assert_extent(&taken.exts[3], 5 * BLOCK, BLOCK, FILE_WRITTEN, 9 * BLOCK);
    assert_extent(&taken.exts[4], 6 * BLOCK, 4 * BLOCK, FILE_HOLE, 0);
}

static void extents_are_cut_to_the_range(void **state)
{
    struct taken taken;
    struct fiemap_walk walk = walk_of(&taken, 4 * BLOCK, 6 * BLOCK);

    (void)state;
    assert_int_equal(next(&walk, BLOCK, 100 * BLOCK, 50 * BLOCK, 0), 0);
    assert_int_equal(fiemap_end(&walk), 0);
    assert_int_equal(taken.nr, 1);
    assert_extent(&taken.exts[0], 4 * BLOCK, 2 * BLOCK, FILE_WRITTEN, 53 * BLOCK);
}

static void only_plain_extents_count_as_written(void **state)
{
    static const struct {
        uint32_t flags;
        enum file_state state;
    } rows[] = {
        {0, FILE_WRITTEN},
        {FIEMAP_EXTENT_LAST, FILE_WRITTEN},
        {FIEMAP_EXTENT_MERGED, FILE_WRITTEN},
        {FIEMAP_EXTENT_UNWRITTEN, FILE_UNWRITTEN},
        {FIEMAP_EXTENT_UNWRITTEN | FIEMAP_EXTENT_SHARED, FILE_UNWRITTEN},
        {FIEMAP_EXTENT_SHARED, FILE_SHARED},
        {FIEMAP_EXTENT_SHARED | FIEMAP_EXTENT_ENCODED, FILE_OTHER},
        {FIEMAP_EXTENT_UNKNOWN, FILE_OTHER},
        {FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC, FILE_OTHER},
        {FIEMAP_EXTENT_ENCODED, FILE_OTHER},
        {FIEMAP_EXTENT_DATA_ENCRYPTED, FILE_OTHER},
        {FIEMAP_EXTENT_NOT_ALIGNED, FILE_OTHER},
        {FIEMAP_EXTENT_DATA_INLINE, FILE_OTHER},
        {FIEMAP_EXTENT_DATA_TAIL, FILE_OTHER},
        {1U << 31, FILE_OTHER}, // of a kernel to come
    };

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct taken taken;
        struct fiemap_walk walk = walk_of(&taken, 0, BLOCK);

        assert_int_equal(next(&walk, 0, BLOCK, BLOCK, rows[i].flags), 0);
        assert_int_equal(taken.nr, 1);
        assert_int_equal(taken.exts[0].state, rows[i].state);
    }
}

static void what_is_not_aligned_is_not_written(void **state)
{
    static const uint64_t rows[][3] = {{512, BLOCK, BLOCK},
                                       {0, BLOCK + 512, BLOCK},
                                       {0, BLOCK, BLOCK + 512},
                                       {0, 2 * BLOCK, -(uint64_t)BLOCK}};

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct taken taken;
        struct fiemap_walk walk = walk_of(&taken, 0, 4 * BLOCK);

        assert_int_equal(next(&walk, rows[i][0], rows[i][1], rows[i][2], 0), 0);
        assert_int_equal(taken.exts[taken.nr - 1].state, FILE_OTHER);
    }
}

static void nonsense_is_an_error(void **state)
{
    struct taken taken;
    struct fiemap_walk walk = walk_of(&taken, 0, 10 * BLOCK);

    (void)state;
    assert_int_equal(next(&walk, 0, 0, 0, 0), -EIO);
    assert_int_equal(next(&walk, BLOCK, UINT64_MAX, 0, 0), -EIO);
    assert_int_equal(taken.nr, 0);
    assert_int_equal(next(&walk, 0, 2 * BLOCK, BLOCK, 0), 0);
    assert_int_equal(next(&walk, BLOCK, BLOCK, BLOCK, 0), -EIO); // behind us
    assert_int_equal(taken.nr, 1);
}

static void the_taker_ends_the_walk(void **state)
{
    struct taken taken;
    struct fiemap_walk walk = walk_of(&taken, 0, 10 * BLOCK);

    (void)state;
    taken.ret = -ENOMEM;
    assert_int_equal(next(&walk, 2 * BLOCK, BLOCK, 0, 0), -ENOMEM);
    assert_int_equal(taken.nr, 1);
}

static void a_real_file_is_covered_without_gaps(void **state)
{
    char dir[64], path[80];
    struct taken taken;
    struct fiemap_walk walk = walk_of(&taken, 0, 64 * BLOCK);
    uint64_t at = 0;
    int fd, ret;

    (void)state;
    fixture_make_dir(dir);
    snprintf(path, sizeof(path), "%s/disk", dir);
    fixture_make_file(path, 64 * BLOCK);
    fd = open(path, O_RDWR | O_CLOEXEC);
    assert_int_equal(pwrite(fd, path, sizeof(path), 8 * BLOCK), sizeof(path));
    ret = fiemap_run(fd, &walk, true);
    close(fd);
    unlink(path);
    rmdir(dir);
    if (ret == -EOPNOTSUPP)
        skip();
    assert_int_equal(ret, 0);
    for (unsigned i = 0; i < taken.nr; i++) {
        assert_int_equal(taken.exts[i].start_bytes, at);
        at += taken.exts[i].len_bytes;
    }
    assert_int_equal(at, 64 * BLOCK);
    assert_int_equal(taken.exts[0].state, FILE_HOLE);
    assert_int_equal(taken.exts[1].start_bytes, 8 * BLOCK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gaps_are_holes),
        cmocka_unit_test(extents_are_cut_to_the_range),
        cmocka_unit_test(only_plain_extents_count_as_written),
        cmocka_unit_test(what_is_not_aligned_is_not_written),
        cmocka_unit_test(nonsense_is_an_error),
        cmocka_unit_test(the_taker_ends_the_walk),
        cmocka_unit_test(a_real_file_is_covered_without_gaps),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
