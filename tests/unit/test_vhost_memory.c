#include "unit.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "transport/vhost_user/memory.h"

#define PAGE 4096ULL

static int make_memfd(uint64_t bytes)
{
    int fd = memfd_create("memory", MFD_CLOEXEC);

    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)bytes), 0);
    return fd;
}

static void add(struct memory *memory, int fd, uint64_t guest, uint64_t size, uint64_t user, uint64_t offset)
{
    struct vu_region region = {guest, size, user, offset};

    assert_int_equal(memory_add(memory, &region, fd), 0);
}

// Where an address leads, and how far from there in one piece.
static char *at(const struct memory *memory, uint64_t guest, uint64_t len, uint64_t *cut)
{
    unsigned hint = 0;

    *cut = len;
    return memory_at(memory, guest, cut, &hint);
}

static void an_address_leads_into_its_region_and_no_further(void **state)
{
    static struct memory memory;
    int fd = make_memfd(16 * PAGE);
    uint64_t cut;
    char *host;

    (void)state;
    // In another order than that of the addresses; neighbours for the guest, and apart in the file.
    add(&memory, fd, 0x30000, 2 * PAGE, 0x900000, 8 * PAGE + 512);
    add(&memory, fd, 0x10000, 2 * PAGE, 0x700000, 0);
    add(&memory, fd, 0x10000 + 2 * PAGE, PAGE, 0x800000, 5 * PAGE);
    host = at(&memory, 0x10000, 1, &cut);
    assert_non_null(host);
    assert_ptr_equal(at(&memory, 0x10000 + PAGE, PAGE, &cut), host + PAGE);
    assert_int_equal(cut, PAGE);
    assert_ptr_equal(at(&memory, 0x10000 + PAGE, UINT64_MAX, &cut), host + PAGE); // the next is another piece
    assert_int_equal(cut, PAGE);
    assert_ptr_equal(at(&memory, 0x10000 + 2 * PAGE - 1, 2, &cut), host + 2 * PAGE - 1);
    assert_int_equal(cut, 1);
    assert_non_null(at(&memory, 0x10000 + 2 * PAGE, 1, &cut));
    assert_null(at(&memory, 0x10000 + 3 * PAGE, 1, &cut));
    assert_null(at(&memory, 0xffff, 1, &cut));
    assert_null(at(&memory, 0x30000 - 1, 1, &cut));
    assert_null(at(&memory, 0x30000 + 2 * PAGE, 1, &cut));
    assert_null(at(&memory, 0, 1, &cut));
    assert_null(at(&memory, UINT64_MAX, 1, &cut));
    // What is written there is in the file, at the offset.
    memcpy(at(&memory, 0x30000, 4, &cut), "here", 4);
    {
        char text[4];

        assert_int_equal(pread(fd, text, 4, 8 * PAGE + 512), 4);
        assert_memory_equal(text, "here", 4);
    }
    memory_clear(&memory);
    assert_null(at(&memory, 0x10000, 1, &cut));
    close(fd);
}

static void every_address_of_many_regions_is_found(void **state)
{
    static struct memory memory;
    int fd = make_memfd(MEMORY_MAX_REGIONS * PAGE);
    unsigned hint = 0;
    uint64_t seed = 5;

    (void)state;
    for (uint64_t i = 0; i < MEMORY_MAX_REGIONS; i++) {
        uint64_t n = i * 29 % MEMORY_MAX_REGIONS;

        add(&memory, fd, n * 2 * PAGE, PAGE, n * 2 * PAGE, n * PAGE);
    }
    assert_int_equal(memory_add(&memory, &(struct vu_region){1ULL << 40, PAGE, 1ULL << 40, 0}, fd), -ENOSPC);
    for (unsigned i = 0; i < 20000; i++) {
        uint64_t guest = unit_random(&seed) % (2 * PAGE * (MEMORY_MAX_REGIONS + 1)), len = 1;
        char *host = memory_at(&memory, guest, &len, &hint);
        bool is_there = guest / PAGE % 2 == 0 && guest < 2 * PAGE * MEMORY_MAX_REGIONS;

        assert_int_equal(!!host, is_there);
        if (is_there)
            assert_ptr_equal(host, memory_at_user(&memory, guest, 1));
    }
    memory_clear(&memory);
    close(fd);
}

static void rings_lie_in_one_region(void **state)
{
    static struct memory memory;
    int fd = make_memfd(4 * PAGE);

    (void)state;
    add(&memory, fd, 0, 2 * PAGE, 0x100000, 0);
    add(&memory, fd, 2 * PAGE, 2 * PAGE, 0x100000 + 2 * PAGE, 2 * PAGE);
    assert_non_null(memory_at_user(&memory, 0x100000, 2 * PAGE));
    assert_null(memory_at_user(&memory, 0x100000, 2 * PAGE + 1));
    assert_null(memory_at_user(&memory, 0x100000 + PAGE, 2 * PAGE));
    assert_null(memory_at_user(&memory, 0x100000 - 1, 2));
    assert_null(memory_at_user(&memory, UINT64_MAX, 2));
    assert_null(memory_at_user(&memory, 0x100000, UINT64_MAX));
    memory_clear(&memory);
    close(fd);
}

static void what_is_not_all_there_is_not_mapped(void **state)
{
    static struct memory memory;
    int fd = make_memfd(4 * PAGE), pipe_fds[2];
    static const struct vu_region wrong[] = {
        {0, 0, 0, 0},
        {0, 5 * PAGE, 0, 0},
        {0, PAGE, 0, 4 * PAGE},
        {0, PAGE, 0, 3 * PAGE + 1},
        {0, PAGE, 0, UINT64_MAX - PAGE + 1},
        {0, UINT64_MAX, 0, 1},
        {UINT64_MAX - PAGE + 1, 2 * PAGE, 0, 0},
        {0, 2 * PAGE, UINT64_MAX - PAGE + 1, 0},
    };

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++)
        assert_int_equal(memory_add(&memory, &wrong[i], fd), -EINVAL);
    assert_int_equal(pipe(pipe_fds), 0);
    assert_int_equal(memory_add(&memory, &(struct vu_region){0, PAGE, 0, 0}, pipe_fds[0]), -EINVAL);
    assert_true(memory_add(&memory, &(struct vu_region){0, PAGE, 0, 0}, -1) < 0);
    add(&memory, fd, PAGE, PAGE, PAGE, 0);
    assert_int_equal(memory_add(&memory, &(struct vu_region){2 * PAGE - 1, 2, 9 * PAGE, 0}, fd), -EEXIST);
    assert_int_equal(memory_add(&memory, &(struct vu_region){9 * PAGE, 2, 2 * PAGE - 1, 0}, fd), -EEXIST);
    assert_int_equal(memory_remove(&memory, &(struct vu_region){PAGE, PAGE, PAGE + 1, 0}), -ENOENT);
    assert_int_equal(memory_remove(&memory, &(struct vu_region){PAGE, PAGE, PAGE, 77}), 0);
    assert_int_equal(memory.nr_regions, 0);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    close(fd);
}

static void memory_that_is_cut_off_reads_as_zeroes_and_is_told(void **state)
{
    static struct memory memory;
    int fd = make_memfd(4 * PAGE);
    uint64_t cut;
    char *host;

    (void)state;
    add(&memory, fd, 0, 4 * PAGE, 0, 0);
    host = at(&memory, 0, 4 * PAGE, &cut);
    memset(host, 7, 4 * PAGE);
    assert_false(memory.is_lost);
    assert_int_equal(ftruncate(fd, PAGE), 0);
    assert_int_equal(*(volatile char *)host, 7); // what is left is not gone
    assert_false(memory.is_lost);
    assert_int_equal(*(volatile char *)(host + 2 * PAGE), 0);
    assert_true(memory.is_lost);
    *(volatile char *)(host + 3 * PAGE) = 1;
    memory_clear(&memory);
    assert_false(memory.is_lost);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        // The first: each test begins with cmocka's own signal handlers, and ours is installed once.
        cmocka_unit_test(memory_that_is_cut_off_reads_as_zeroes_and_is_told),
        cmocka_unit_test(an_address_leads_into_its_region_and_no_further),
        cmocka_unit_test(every_address_of_many_regions_is_found),
        cmocka_unit_test(rings_lie_in_one_region),
        cmocka_unit_test(what_is_not_all_there_is_not_mapped),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
