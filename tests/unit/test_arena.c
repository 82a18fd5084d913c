#include "unit.h"

#include <stdlib.h>
#include <string.h>

#include "util/arena.h"

// A model of the arena that is too simple to be wrong: a byte a page.
struct model {
    char used[512];
    size_t nr_pages;
};

static size_t model_get(struct model *model, size_t n)
{
    for (size_t start = 0; start + n <= model->nr_pages; start++) {
        size_t i = 0;

        while (i < n && !model->used[start + i])
            i++;
        if (i == n) {
            memset(model->used + start, 1, n);
            return start;
        }
    }
    return SIZE_MAX;
}

struct piece {
    char *mem;
    size_t nr_pages;
};

static void random_gets_and_puts(size_t nr_pages, uint64_t seed, size_t max_run)
{
    struct arena arena;
    struct model model = {.nr_pages = nr_pages};
    struct piece pieces[128];
    unsigned nr_pieces = 0;

    assert_int_equal(arena_create(&arena, nr_pages * ARENA_PAGE_BYTES), 0);
    for (unsigned step = 0; step < 20000; step++) {
        if (nr_pieces < ARRAY_SIZE(pieces) && unit_random(&seed) % 5 < 3) {
            size_t n = 1 + unit_random(&seed) % max_run, at = model_get(&model, n);
            char *mem = arena_get(&arena, n);

            if (at == SIZE_MAX) {
                assert_null(mem);
                continue;
            }
            assert_ptr_equal(mem, arena.base + at * ARENA_PAGE_BYTES);
            mem[0] = mem[n * ARENA_PAGE_BYTES - 1] = (char)step;
            pieces[nr_pieces++] = (struct piece){mem, n};
        } else if (nr_pieces) {
            unsigned i = (unsigned)(unit_random(&seed) % nr_pieces);
            struct piece *piece = &pieces[i];

            memset(model.used + (size_t)(piece->mem - arena.base) / ARENA_PAGE_BYTES, 0, piece->nr_pages);
            arena_put(&arena, piece->mem, piece->nr_pages);
            *piece = pieces[--nr_pieces];
        }
    }
    arena_destroy(&arena);
}

static void it_gives_out_the_lowest_run_that_is_free(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        random_gets_and_puts(1, seed, 2);
        random_gets_and_puts(63, seed, 8);
        random_gets_and_puts(64, seed, 70);
        random_gets_and_puts(65, seed, 3);
        random_gets_and_puts(500, seed, 20);
        random_gets_and_puts(512, seed, 200);
    }
}

static void nothing_larger_than_the_arena_can_be_had(void **state)
{
    struct arena arena;
    void *all;

    (void)state;
    assert_int_equal(arena_create(&arena, 100 * ARENA_PAGE_BYTES), 0);
    assert_null(arena_get(&arena, 101));
    assert_null(arena_get(&arena, 128));
    assert_null(arena_get(&arena, SIZE_MAX / ARENA_PAGE_BYTES));
    all = arena_get(&arena, 100);
    assert_ptr_equal(all, arena.base);
    assert_null(arena_get(&arena, 1));
    arena_put(&arena, all, 100);
    assert_ptr_equal(arena_get(&arena, 100), arena.base);
    arena_destroy(&arena);
}

static void memory_is_aligned_to_pages_and_zeroed_at_first(void **state)
{
    struct arena arena;
    char *mem;

    (void)state;
    assert_int_equal(arena_create(&arena, 10 * ARENA_PAGE_BYTES), 0);
    for (unsigned i = 0; i < 10; i++) {
        mem = arena_get(&arena, 1);
        assert_int_equal((uintptr_t)mem % ARENA_PAGE_BYTES, 0);
        assert_int_equal(mem[0] | mem[ARENA_PAGE_BYTES - 1], 0);
    }
    arena_destroy(&arena);
}

static void pages_are_rounded_up(void **state)
{
    (void)state;
    assert_int_equal(arena_pages(0), 0);
    assert_int_equal(arena_pages(1), 1);
    assert_int_equal(arena_pages(4096), 1);
    assert_int_equal(arena_pages(4097), 2);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_gives_out_the_lowest_run_that_is_free),
        cmocka_unit_test(nothing_larger_than_the_arena_can_be_had),
        cmocka_unit_test(memory_is_aligned_to_pages_and_zeroed_at_first),
        cmocka_unit_test(pages_are_rounded_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
