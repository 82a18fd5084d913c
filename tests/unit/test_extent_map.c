// Look-ups, marks, and what is made of FIEMAP's records.

#include "unit.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "map/extent_map.h"
#include "map/fiemap.h"
#include "util/util.h"

#define BLOCK 4096ULL

static struct region *add_region(struct extent_map *map, uint64_t index)
{
    struct region *region;

    assert_null(extent_map_begin_fill(map, index, &region));
    assert_non_null(region);
    return region;
}

static struct extents_build begin_build(uint64_t known_bytes)
{
    struct extents_build build = {.max_extents = 2, .known_bytes = known_bytes};

    build.extents = calloc(1, sizeof(*build.extents) + build.max_extents * sizeof(build.extents->at[0]));
    assert_non_null(build.extents);
    return build;
}

static void take(struct extents_build *build, uint64_t start, uint64_t len, enum file_state state,
                 uint64_t physical)
{
    struct file_extent ext = {start, len, state, physical};

    assert_int_equal(extents_take(build, &ext), 0);
}

static void assert_found(const struct extent_map *map, uint64_t start, uint64_t len, enum whereabouts place,
                         uint64_t found_len, uint64_t offset)
{
    struct found found;

    assert_int_equal(extent_map_find(map, start, len, &found), 0);
    assert_int_equal(found.place, place);
    assert_int_equal(found.len_bytes, found_len);
    if (place == ON_DEVICE)
        assert_int_equal(found.offset_bytes, offset);
}

// Two regions: one of some pieces, one that goes on where the first ends.
static void create(struct extent_map *map)
{
    struct extents_build build = begin_build(UINT64_MAX);

    assert_int_equal(extent_map_create(map, 3 * REGION_BYTES - 5), 0);
    assert_int_equal(map->nr_regions, 3);
    take(&build, 0, 2 * BLOCK, FILE_WRITTEN, 100 * BLOCK);
    take(&build, 2 * BLOCK, 2 * BLOCK, FILE_HOLE, 0);
    take(&build, 4 * BLOCK, 2 * BLOCK, FILE_UNWRITTEN, 500 * BLOCK);
    take(&build, 6 * BLOCK, 2 * BLOCK, FILE_SHARED, 600 * BLOCK);
    take(&build, 8 * BLOCK, 2 * BLOCK, FILE_OTHER, 0);
    take(&build, 10 * BLOCK, REGION_BYTES - 10 * BLOCK, FILE_WRITTEN, 1000 * BLOCK);
    assert_int_equal(build.extents->nr_device, 2);
    assert_int_equal(build.extents->nr_extents, 4); // neighbours of one kind are one
    atomic_store(&add_region(map, 0)->extents, build.extents);
    build = begin_build(UINT64_MAX);
    take(&build, REGION_BYTES, REGION_BYTES, FILE_WRITTEN, 990 * BLOCK + REGION_BYTES);
    atomic_store(&add_region(map, 1)->extents, build.extents);
}

static void every_place_is_found(void **state)
{
    struct extent_map map;

    (void)state;
    create(&map);
    assert_found(&map, 0, BLOCK, ON_DEVICE, BLOCK, 100 * BLOCK);
    assert_found(&map, BLOCK + 512, 4 * BLOCK, ON_DEVICE, BLOCK - 512, 101 * BLOCK + 512);
    assert_found(&map, 2 * BLOCK, 8 * BLOCK, NOWHERE, 4 * BLOCK, 0);
    assert_found(&map, 7 * BLOCK, 8 * BLOCK, IN_FILE, 3 * BLOCK, 0);
    assert_found(&map, 10 * BLOCK, BLOCK, ON_DEVICE, BLOCK, 1000 * BLOCK);
    extent_map_destroy(&map);
}

static void what_goes_on_behind_a_region_is_one_extent(void **state)
{
    struct extent_map map;

    (void)state;
    create(&map);
    assert_found(&map, REGION_BYTES - BLOCK, 3 * BLOCK, ON_DEVICE, 3 * BLOCK, 989 * BLOCK + REGION_BYTES);
    extent_map_mark(&map, REGION_BYTES + 8 * BLOCK, BLOCK);
    assert_found(&map, REGION_BYTES - BLOCK, 3 * BLOCK, ON_DEVICE, BLOCK, 989 * BLOCK + REGION_BYTES);
    extent_map_destroy(&map);
}

static void what_is_not_known_is_to_be_asked_for(void **state)
{
    struct extent_map map;
    struct found found;

    (void)state;
    create(&map);
    assert_int_equal(extent_map_find(&map, 2 * REGION_BYTES, BLOCK, &found), -EAGAIN);
    assert_found(&map, 3 * REGION_BYTES, BLOCK, IN_FILE, BLOCK, 0); // the file has become longer
    add_region(&map, 2);
    assert_found(&map, 2 * REGION_BYTES + BLOCK, BLOCK, IN_FILE, BLOCK, 0); // it is being asked for
    region_free(extent_map_replace(&map, 0, NULL));
    assert_null(extent_map_replace(&map, 0, &extent_map_closed));
    assert_found(&map, 0, BLOCK, IN_FILE, BLOCK, 0);
    assert_null(extent_map_replace(&map, 0, NULL)); // nothing of its own to free
    extent_map_destroy(&map);
}

static void a_file_that_grows_keeps_what_is_known(void **state)
{
    struct extent_map map;
    struct found found;

    (void)state;
    create(&map);
    assert_int_equal(extent_map_grow(&map, 40 * REGION_BYTES + 1), 0);
    assert_found(&map, BLOCK, BLOCK, ON_DEVICE, BLOCK, 101 * BLOCK);
    assert_int_equal(extent_map_find(&map, 40 * REGION_BYTES, BLOCK, &found), -EAGAIN);
    assert_int_equal(extent_map_grow(&map, 1), 0); // nor does it shrink
    assert_int_equal(map.nr_regions, 41);
    extent_map_destroy(&map);
}

// Extents of very different lengths: the look-up begins far from where it ends.
static void every_block_of_an_uneven_region_is_found(void **state)
{
    struct extents_build build = begin_build(UINT64_MAX);
    struct extent_map map;
    uint64_t at = 0, len = 0;

    (void)state;
    assert_int_equal(extent_map_create(&map, REGION_BYTES), 0);
    for (unsigned i = 0; at < REGION_BYTES; i++, at += len) {
        len = min_of(i % 7 ? (1 + i % 3) * BLOCK : 300 * BLOCK, REGION_BYTES - at);
        if (i > 60)
            len = BLOCK;
        take(&build, at, len, FILE_WRITTEN, 10 * at);
    }
    atomic_store(&add_region(&map, 0)->extents, build.extents);
    for (size_t i = 0; i < build.extents->nr_extents; i++) {
        uint64_t start = build.extents->at[i].start_bytes, end = build.extents->at[i + 1].start_bytes;

        for (at = start; at < end; at += BLOCK)
            assert_found(&map, at, BLOCK, ON_DEVICE, BLOCK, 10 * start + (at - start));
    }
    extent_map_destroy(&map);
}

static void what_is_marked_goes_by_way_of_the_file(void **state)
{
    struct extent_map map;

    (void)state;
    create(&map);
    assert_false(extent_map_mark(&map, 3 * BLOCK + 100, 10));
    assert_found(&map, 2 * BLOCK, 4 * BLOCK, NOWHERE, BLOCK, 0);
    assert_found(&map, 3 * BLOCK, 3 * BLOCK, IN_FILE, BLOCK, 0);
    assert_found(&map, 4 * BLOCK, 2 * BLOCK, NOWHERE, 2 * BLOCK, 0);
    extent_map_mark(&map, BLOCK, BLOCK);
    assert_found(&map, 0, 2 * BLOCK, ON_DEVICE, BLOCK, 100 * BLOCK);
    assert_found(&map, BLOCK, BLOCK, IN_FILE, BLOCK, 0);
    extent_map_mark(&map, 2 * REGION_BYTES, BLOCK);     // not known: nothing to mark
    extent_map_mark(&map, 3 * REGION_BYTES - 1, BLOCK); // nor behind the end
    extent_map_destroy(&map);
}

static void many_marks_make_a_region_due_once(void **state)
{
    struct extent_map map;
    unsigned nr_due = 0;

    (void)state;
    create(&map);
    for (unsigned round = 0; round < 2; round++) {
        for (uint64_t at = 0; at < REGION_BYTES; at += MARK_BYTES)
            nr_due += extent_map_mark(&map, at, 512);
    }
    assert_int_equal(nr_due, 1);
    assert_int_equal(atomic_load(&map.regions[0]->nr_marks), REGION_NR_MARKS);
    extent_map_destroy(&map);
}

static void behind_what_is_known_is_the_file(void **state)
{
    struct extents_build build = begin_build(3 * BLOCK);

    (void)state;
    take(&build, 0, 5 * BLOCK, FILE_WRITTEN, 100 * BLOCK);
    take(&build, 5 * BLOCK, BLOCK, FILE_HOLE, 0);
    assert_int_equal(build.extents->nr_extents, 2);
    assert_int_equal(build.extents->at[1].start_bytes, 3 * BLOCK);
    assert_int_equal(build.extents->at[1].where, IN_FILE);
    assert_int_equal(build.extents->at[2].start_bytes, 6 * BLOCK);
    assert_int_equal(build.extents->bytes[ON_DEVICE], 3 * BLOCK);
    assert_int_equal(build.extents->bytes[IN_FILE], 3 * BLOCK);
    free(build.extents);
}

// One thread replaces regions as the keeper does, with a pause in place of its barrier; others look up. Every
// answer is one of the two that were ever right.

struct racers {
    struct extent_map map;
    atomic_bool is_over;
    atomic_uint nr_passed[2]; // look-ups begun anew, by each reader
    atomic_uint nr_wrong;
};

struct racer {
    struct racers *racers;
    unsigned number;
    pthread_t thread;
};

static void *race(void *arg)
{
    struct racer *racer = arg;
    struct racers *racers = racer->racers;
    uint64_t random = racer->number + 1;

    while (!atomic_load(&racers->is_over)) {
        uint64_t at = round_down(unit_random(&random) % REGION_BYTES, BLOCK);
        struct found found;
        int ret = extent_map_find(&racers->map, at, BLOCK, &found);

        if (!ret && found.place == ON_DEVICE && found.offset_bytes != at + REGION_BYTES &&
            found.offset_bytes != at + 2 * REGION_BYTES)
            atomic_fetch_add(&racers->nr_wrong, 1);
        if (unit_random(&random) % 16 == 0)
            extent_map_mark(&racers->map, at, BLOCK);
        atomic_fetch_add(&racers->nr_passed[racer->number], 1);
        if (unit_random(&random) % 256 == 0)
            sched_yield(); // there may be fewer CPUs than threads
    }
    return NULL;
}

static void regions_are_replaced_under_look_ups(void **state)
{
    struct racers racers = {.nr_wrong = 0};
    struct racer racer[2] = {{&racers, 0, 0}, {&racers, 1, 0}};

    (void)state;
    assert_int_equal(extent_map_create(&racers.map, REGION_BYTES), 0);
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&racer[i].thread, NULL, race, &racer[i]), 0);
    for (unsigned round = 0; round < 3000; round++) {
        struct extents_build build = begin_build(UINT64_MAX);
        struct region *old, *filled;
        unsigned passed[2];

        for (uint64_t at = 0; at < REGION_BYTES; at += REGION_BYTES / 8)
            take(&build, at, REGION_BYTES / 8, FILE_WRITTEN,
                 at + (1 + (at / (REGION_BYTES / 8) + round) % 2) * REGION_BYTES);
        old = extent_map_begin_fill(&racers.map, 0, &filled);
        for (unsigned i = 0; i < 2; i++) {
            passed[i] = atomic_load(&racers.nr_passed[i]);
            while (atomic_load(&racers.nr_passed[i]) - passed[i] < 2)
                sched_yield();
        }
        region_free(old);
        atomic_store_explicit(&filled->extents, build.extents, memory_order_release);
    }
    atomic_store(&racers.is_over, true);
    for (unsigned i = 0; i < 2; i++)
        pthread_join(racer[i].thread, NULL);
    assert_int_equal(atomic_load(&racers.nr_wrong), 0);
    extent_map_destroy(&racers.map);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_place_is_found),
        cmocka_unit_test(what_goes_on_behind_a_region_is_one_extent),
        cmocka_unit_test(what_is_not_known_is_to_be_asked_for),
        cmocka_unit_test(a_file_that_grows_keeps_what_is_known),
        cmocka_unit_test(every_block_of_an_uneven_region_is_found),
        cmocka_unit_test(what_is_marked_goes_by_way_of_the_file),
        cmocka_unit_test(many_marks_make_a_region_due_once),
        cmocka_unit_test(behind_what_is_known_is_the_file),
        cmocka_unit_test(regions_are_replaced_under_look_ups),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
